"""Greedy decoding speed of Hugging Face transformers, run by `benchmarks.decoding`.

    PYTHON benchmarks/transformers_peer.py DIRECTORY BATCH PROMPT_LENGTH NEW_TOKENS REPEATS

Runs in an environment of its own with `torch` and `transformers`. Prints one JSON object: seconds
that calls of `generate` took after one to warm up, less those of a call for a single token, and the
ids they generated.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV3ForCausalLM


def main(directory: Path, batch: int, length: int, new_tokens: int, repeats: int) -> None:
    model = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    # The prompts of benchmarks.decoding.
    rng = np.random.default_rng(0)
    prompts = torch.tensor(rng.integers(0, model.config.vocab_size, (batch, length)))

    def timed(n: int) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=n,
            eos_token_id=None,
        )
        return time.perf_counter() - start, out[:, length:]

    _, ids = timed(new_tokens)
    seconds = [timed(new_tokens)[0] - timed(1)[0] for _ in range(repeats)]
    print(json.dumps({"seconds": seconds, "ids": ids.tolist()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
