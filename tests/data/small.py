"""A little tokenizer, corpora on disk and configs for the tests of the data."""

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tiny import v3_tiny
from v3jax.config import BatchConfig, DataConfig, ExperimentConfig, SourceConfig
from v3jax.data.dataset import Dataset, open_dataset
from v3jax.data.packing import Rows
from v3jax.data.tokenizer import Tokenizer, train_tokenizer

ODD_TEXTS = (
    "",
    " ",
    "\n",
    "\r\n\r\n",
    "a\n\n\n  b\t\tc \r d",
    "don't; x = foo(bar);\n\n  return",
    "1234567 12,345.678 ٣٤٥٦ Ⅷ½",
    "中文\uff0c测试。\nひらがなカタカナ漢字abc漢字123",
    "e\u0301\u0301 n\u0303 \u1100\u1161 ﬁ ẞ İ",
    "\u200c\u200d\u200e\u2028\u2029\ufeff\u00a0\u3000",
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 \U0001f1e9\U0001f1ea \U0001d518 \U0010ffff \ue000",
    "\x00\x01\x07\x1b[0m\x7f\x85\ufffd\ufffe",
    "עברית العربية हिन्दी ไทย ქართული",
    "<｜end▁of▁sentence｜><｜fim▁hole｜> <|EOT|> <｜User｜>",
    "".join(map(chr, range(0x250))),
    "a" * 5000 + " " * 300 + "\n" * 300 + "." * 300 + ".\n" * 100,
)


def stdlib_texts(pattern: str = "c[a-o]*.py") -> list[str]:
    folder = Path(os.__file__).parent
    return [file.read_text(encoding="utf-8") for file in sorted(folder.glob(pattern))]


@cache
def tokenizer() -> Tokenizer:
    """600 ids, trained on some of the standard library."""
    return train_tokenizer(stdlib_texts(), 600)


def text(i: int, n_words: int = 30) -> str:
    """A document of its own: no two `i` have the same words."""
    return f"# document {i}\n" + " ".join(f"w{i}_{k}" for k in range(n_words)) + ".\n"


def write(folder: Path, texts: Iterable[str], name: str = "{i:03d}.txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, one in enumerate(texts):
        (folder / name.format(i=i)).write_bytes(one.encode())
    return folder


def data(**changes: Any) -> DataConfig:
    """No fill-in-the-middle, no splitting, a third held out, rows of 32 predictions."""
    plain = {
        "sources": (),
        "seq_len": 32,
        "heldout_fraction": 0.3,
        "fim_rate": 0.0,
        "newline_split_rate": 0.0,
        "tokenizer_vocab_size": 400,
    }
    return replace(v3_tiny().data, **plain | changes)


def source(name: str, path: Path, **changes: Any) -> SourceConfig:
    return SourceConfig(**{"name": name, "weight": 1.0, "max_mb": 1.0, "path": str(path)} | changes)


def config(seed: int = 0, **changes: Any) -> ExperimentConfig:
    """An experiment over these data, whose batch grows from 4 to 12 rows in micro-batches of 2."""
    tiny = v3_tiny()
    return replace(
        tiny,
        data=data(**changes),
        batch=BatchConfig(micro_batch=2, start=4, end=12, ramp_tokens=100 * 32.0),
        run=replace(tiny.run, seed=seed),
    )


N_TEXTS = 150  # of each source of `three_sources`


def write_three(root: Path) -> None:
    """Three sources of texts, long and short: folders `a`, `b` and `c`."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, (3, N_TEXTS)).tolist()
    for k, name in enumerate("abc"):
        write(root / name, (text(1000 * k + i, n) for i, n in enumerate(lengths[k])))


def three_sources(home: Path, weights: tuple[float, ...] = (0.5, 0.3, 0.2)) -> tuple:
    return tuple(
        source(name, home / name, weight=w) for name, w in zip("abc", weights, strict=True)
    )


def opened(home: Path, seed: int = 0, **changes: Any) -> tuple[ExperimentConfig, Dataset]:
    cfg = config(seed, **{"sources": three_sources(home)} | changes)
    return cfg, open_dataset(cfg, home / "cache")


def trained(dataset: Dataset) -> tuple[Rows, ...]:
    """The training rows of a corpus that lies in memory, by source."""
    found = tuple(rows for rows in dataset.train if isinstance(rows, Rows))
    assert len(found) == len(dataset.train)
    return found
