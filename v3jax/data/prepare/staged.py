"""What stages leave for one another: documents, their keys, ledgers of what was kept and dropped.

Every file belongs to one task and appears whole, so a task that was killed is simply done again.
A document is known by its task and its row in that task's file.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datatrove.data import Document

KEY = np.dtype(
    [("h0", "<u8"), ("h1", "<u8"), ("h2", "<u8"), ("h3", "<u8"), ("name", "<u8"), ("source", "<i4")]
)
"""SHA-256 of a document's text in four parts, a hash of its name, and the place of its source."""
REMOVED = np.dtype([("task", "<i4"), ("row", "<i4"), ("for_task", "<i4"), ("for_row", "<i4")])
"""A document that is dropped, and the one kept in its stead (-1 if there is none)."""
_EXCERPT = 200  # characters of a dropped document that the report shows


@dataclass(frozen=True)
class Folder:
    """The stages' folder of a preparation."""

    root: Path

    def stage(self, name: str) -> Path:
        """The folder of one stage."""
        path = self.root / "stages" / name
        path.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def whole(file: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a file for writing under a name of this process; it gets its own when it is whole."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    encoding = None if "b" in mode else "utf-8"
    with partial.open(mode, encoding=encoding) as content:
        yield content
    partial.replace(file)


def save(file: Path, array: np.ndarray) -> None:
    """Writes an array whole."""
    with whole(file) as content:
        np.save(content, array, allow_pickle=False)


def load(file: Path) -> np.ndarray:
    """An array that `save` wrote."""
    return np.load(file, allow_pickle=False)


def key_of(sha: bytes, name: str, source: int) -> tuple[int, ...]:
    """A row of `KEY`."""
    parts = (int.from_bytes(sha[i : i + 8]) for i in range(0, 32, 8))
    said = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return (*parts, int.from_bytes(said), source)


def sha_of(text: str) -> bytes:
    """What a document is known by: SHA-256 of its text."""
    return hashlib.sha256(text.encode()).digest()


class Store:
    """Writes a task's documents, one JSON line each, and their keys."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank

    def write(self, documents: Iterable["Document"]) -> None:
        """Writes all of them; the file appears when they are through."""
        keys = []
        with whole(documents_file(self._folder, self._rank)) as lines:
            for document in documents:
                source, sha = document.metadata["source"], sha_of(document.text)
                row = {
                    "name": document.id,
                    "source": source,
                    "language": document.metadata["language"],
                    "sha256": sha.hex(),
                    "text": document.text,
                }
                lines.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                keys.append(key_of(sha, document.id, source))
        save(keys_file(self._folder, self._rank), np.array(keys, KEY))


def documents_file(folder: Path, rank: int) -> Path:
    """Where a task's documents are."""
    return folder / f"{rank:05d}.jsonl"


def keys_file(folder: Path, rank: int) -> Path:
    """Where the keys of a task's documents are."""
    return folder / f"{rank:05d}.keys.npy"


def removed_rows(folder: Path, rank: int) -> dict[int, tuple[int, int]]:
    """Rows of a task that the lists in `folder` drop, and the documents kept for them."""
    found: dict[int, tuple[int, int]] = {}
    for file in sorted(folder.glob("*.removed.npy")):
        removed = load(file)
        for row in removed[removed["task"] == rank].tolist():
            found[row[1]] = (row[2], row[3])
    return found


@dataclass
class Ledger:
    """What one step of one task kept and dropped, by source and language."""

    step: str
    n_examples: int
    kept: Counter[tuple[int, str]] = field(default_factory=Counter)
    kept_bytes: Counter[tuple[int, str]] = field(default_factory=Counter)
    dropped: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    dropped_bytes: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    examples: dict[str, list[list[Any]]] = field(default_factory=dict)

    def keep(self, document: "Document") -> None:
        """Counts a document that goes on."""
        at = (document.metadata["source"], document.metadata["language"])
        self.kept[at] += 1
        self.kept_bytes[at] += len(document.text.encode())

    def drop(self, document: "Document", reason: str, detail: str = "") -> None:
        """Counts a document that goes no further; those of the lowest hashes become examples."""
        at = (document.metadata["source"], document.metadata["language"], reason)
        self.dropped[at] += 1
        self.dropped_bytes[at] += len(document.text.encode())
        order = sha_of(f"{reason}\0{document.id}\0{document.text}").hex()[:16]
        examples = self.examples.setdefault(reason, [])
        if len(examples) >= self.n_examples and (not examples or order >= examples[-1][0]):
            return
        text = document.text[:_EXCERPT]
        examples.append([order, at[0], at[1], document.id, detail, text])
        self.examples[reason] = sorted(examples)[: self.n_examples]

    def dropped_bytes_by_place(self) -> Counter[tuple[int, str]]:
        """Bytes dropped by source and language, whatever the reason."""
        total: Counter[tuple[int, str]] = Counter()
        for (source, language, _), size in self.dropped_bytes.items():
            total[source, language] += size
        return total

    def write(self, folder: Path, rank: int) -> None:
        """Writes it for `read_ledgers`."""
        about = {
            "step": self.step,
            "kept": [[*at, n, self.kept_bytes[at]] for at, n in self.kept.items()],
            "dropped": [[*at, n, self.dropped_bytes[at]] for at, n in self.dropped.items()],
            "examples": self.examples,
        }
        with whole(folder / f"{rank:05d}.{self.step}.ledger.json", "w") as content:
            json.dump(about, content, ensure_ascii=False)

    def add(self, about: dict[str, Any], n_examples: int) -> None:
        """Takes in what another task wrote."""
        for source, language, n, size in about["kept"]:
            self.kept[source, language] += n
            self.kept_bytes[source, language] += size
        for source, language, reason, n, size in about["dropped"]:
            self.dropped[source, language, reason] += n
            self.dropped_bytes[source, language, reason] += size
        for reason, examples in about["examples"].items():
            together = sorted(self.examples.get(reason, []) + examples)
            self.examples[reason] = together[:n_examples]


def read_ledgers(folder: Path, steps: Iterable[str], n_examples: int) -> list[Ledger]:
    """The ledgers of all tasks, added up by step."""
    found = []
    for step in steps:
        ledger = Ledger(step, n_examples)
        for file in sorted(folder.glob(f"*.{step}.ledger.json")):
            ledger.add(json.loads(file.read_text(encoding="utf-8")), n_examples)
        found.append(ledger)
    return found


class Quarantine:
    """Rows `{source, file, offset, reason}` of what one step of one task could not read."""

    def __init__(self, folder: Path, rank: int, step: str) -> None:
        self._file = folder / f"{rank:05d}.{step}.quarantine.jsonl"
        self.rows: list[dict[str, Any]] = []

    def put(self, source: str, file: str, offset: int, reason: str) -> None:
        """Adds a row."""
        self.rows.append({"source": source, "file": file, "offset": offset, "reason": reason})

    def write(self) -> None:
        """Writes the rows."""
        with whole(self._file, "w") as lines:
            for row in self.rows:
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_quarantine(*folders: Path) -> list[dict[str, Any]]:
    """The rows of all tasks in an order of their own."""
    rows = [
        json.loads(line)
        for folder in folders
        for file in sorted(folder.glob("*.quarantine.jsonl"))
        for line in file.read_text(encoding="utf-8").split("\n")
        if line
    ]
    return sorted(rows, key=lambda r: (r["source"], r["file"], r["offset"], r["reason"]))
