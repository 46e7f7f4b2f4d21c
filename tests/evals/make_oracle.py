"""Records a tiny random checkpoint and what the harness's own `hf` class says of it.

    python tests/evals/make_oracle.py tests/evals/oracle TOKENIZER.json

Run it in an environment with `lm-eval==0.4.13`, `torch` and `transformers==5.23.0`; the tests only
read what it wrote. TOKENIZER.json is a run's of some 400 ids. It computes in FP32: transformers has
no FP64 path, its router and norms are FP32 in any case.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

MAX_LENGTH = 48
SHAPES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_nextn_predict_layers": 0,
}
PAIRS = [
    ("The balance of experts", " is kept"),
    ("The balance of experts", " is lost"),
    ("def f(x):", "\n    return x"),
    ("a trailing space ", "belongs to what follows"),
    ("", "no context at all"),
    ("中文", "测试"),
    ("a context that is longer than what the model may see, " * 6, "so it loses its beginning"),
    ("A", " B"),
]
# Texts that do not repeat themselves: where two windows hold the same tokens, lm-eval 0.4.13's `hf`
# class scores one of them with the other's logits.
DOCUMENTS = [
    "short",
    "".join(f"{n} times {n + 1} is {n * (n + 1)}; " for n in range(40)),
    "".join(f"{n}: 中文 ✓\n" for n in range(8)),
]


def main(folder: Path, tokenizer_file: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.bos_token, tokenizer.eos_token = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    torch.manual_seed(0)
    config = DeepseekV3Config(**SHAPES, vocab_size=len(tokenizer), tie_word_embeddings=False)
    network = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    for layer in network.model.layers[1:]:
        bias = layer.mlp.gate.e_score_correction_bias
        bias.data = 0.1 * torch.randn_like(bias, dtype=torch.float32)
    network.save_pretrained(folder)
    model = HFLM(
        pretrained=str(folder),  # read again: converting a model would round RoPE's frequencies
        dtype="float32",
        tokenizer=tokenizer,
        device="cpu",
        batch_size=3,
        max_length=MAX_LENGTH,
    )
    pairs = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    rolling = [Instance("loglikelihood_rolling", {}, (d,), i) for i, d in enumerate(DOCUMENTS)]
    found = {
        "max_length": MAX_LENGTH,
        "pairs": PAIRS,
        "scores": model.loglikelihood(pairs),
        "documents": DOCUMENTS,
        "rolling": model.loglikelihood_rolling(rolling),
    }
    text = json.dumps(found, ensure_ascii=False, indent=1)
    (folder / "answers.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
