"""Little corpora with planted faults, and the command run in a process of its own."""

import json
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.data import small
from v3jax.data.prepare.config import PrepareConfig, PrepareSource

for _name in ("datatrove", "ftfy", "py3langid", "trafilatura", "pyarrow"):
    pytest.importorskip(_name, reason=f"needs the extra data: {_name}")

_TEXT = (
    "the of and to that have with be time year people way day man thing woman life child "
    "world school state family student group country problem hand part place case week "
    "company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service "
)
_WORDS = _TEXT.split()


def sentence(rng: random.Random, n_words: int = 12) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(n_words)).capitalize() + "."


def prose(seed: int, n_sentences: int = 12) -> str:
    """A document of its own that the rules for prose keep."""
    rng = random.Random(seed)
    return "\n".join(sentence(rng) for _ in range(n_sentences)) + "\n"


def changed(text: str, seed: int, share: float = 0.01) -> str:
    """A near duplicate: a share of the words replaced, at least one."""
    rng, found = random.Random(seed), text.split(" ")
    for i in rng.sample(range(len(found)), max(1, round(share * len(found)))):
        found[i] = "zebra"
    return " ".join(found)


def jsonl(file: Path, texts: Iterable[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    file.write_text("".join(lines), encoding="utf-8")
    return file


def tokenizer(folder: Path) -> Path:
    """A tokenizer.json of 600 ids."""
    file = folder / "tokenizer.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(small.tokenizer().text, encoding="utf-8")
    return file


def config(folder: Path, sources: Sequence[PrepareSource], **changes: Any) -> PrepareConfig:
    """A preparation in three tasks with a tenth held out."""
    plain: dict[str, Any] = {
        "sources": tuple(sources),
        "heldout_fraction": 0.1,
        "n_tasks": 3,
        "tokenizer": str(tokenizer(folder)),
    }
    return PrepareConfig(**plain | changes)


def write_config(file: Path, cfg: PrepareConfig) -> Path:
    """A file for `--config`: a frozen value is its own source text."""
    file.write_text(
        f"from v3jax.data.prepare.config import *\n\n\ndef prepare():\n    return {cfg!r}\n"
    )
    return file


def run(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "v3jax.data.prepare", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
