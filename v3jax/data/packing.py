"""Best-fit packing of documents into rows (report section 4.1; arXiv 2404.10830), kept on disk.

Only documents longer than a row are cut, into row-size chunks; chunks then go, longest first, to
the row with the least space that still holds them. No chunk is ever broken. Tokens of a document
that a model only sees and that are no targets, such as a user's turn, come marked (`seen`).
Dims: N rows, S tokens of a row.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_INDEX = "rows.json"
_WINDOW = 2**20
"""Documents that are packed together: what the bins of one window hold in memory."""


class RowSource(Protocol):
    """Rows in a fixed order, each read when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and segments of a row, int32 `[S]`."""
        ...

    @property
    def n_tokens(self) -> int:
        """Tokens in all of them, padding not counted."""
        ...


class Mapped:
    """Arrays that lie in files: to another process goes the files' names."""

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: Path(x.filename) if isinstance(x, np.memmap) and x.filename else x
            for name, x in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, x in state.items():
            vars(self)[name] = np.load(x, mmap_mode="r") if isinstance(x, Path) else x


@dataclass(frozen=True)
class Rows(Mapped):
    """Packed rows `[N, S]` int32: ids, and segments with 0 for padding, negative where a token is
    no target."""

    tokens_NS: np.ndarray
    segments_NS: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens_NS)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.tokens_NS[index]), np.asarray(self.segments_NS[index])

    @property
    def n_tokens(self) -> int:
        """Tokens in all of them, padding not counted."""
        return int((self.segments_NS != 0).sum())


@dataclass(frozen=True)
class Chunk:
    """Tokens `start..end` of document `document`."""

    document: int
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


def cut(lengths: Sequence[int], capacity: int) -> list[Chunk]:
    """Documents as chunks of at most `capacity` tokens; shorter documents stay whole."""
    return [
        Chunk(document, start, min(start + capacity, length))
        for document, length in enumerate(lengths)
        for start in range(0, length, capacity)
    ]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item indices by best-fit decreasing; ties keep the given order.

    The open bins are kept by free space, with one bit for every size that has some: the best bin
    is the lowest bit from the item's length up.

    Raises:
      ValueError: an item is longer than `capacity`.
    """
    if any(length > capacity for length in lengths):
        raise ValueError(f"packing: an item is longer than {capacity} tokens; cut it first")
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    sizes = 0
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        fitting = sizes >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                sizes ^= 1 << space
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        left = space - length
        if left:
            by_space[left].append(chosen)
            sizes |= 1 << left
    return bins


def pack(documents: Sequence[np.ndarray], capacity: int, pad: int) -> Rows:
    """Rows of `capacity` ids that hold every token of `documents` exactly once.

    Segments number a row's chunks from 1, negated where a token is only `seen`; 0 marks padding,
    which holds the id `pad`.
    """
    chunks = cut([len(d) for d in documents], capacity)
    bins = best_fit([c.length for c in chunks], capacity)
    tokens_NS = np.full((len(bins), capacity), pad, np.int32)
    segments_NS = np.zeros((len(bins), capacity), np.int32)
    for row, items in enumerate(bins):
        at = 0
        for segment, item in enumerate(items, start=1):
            chunk = chunks[item]
            end = at + chunk.length
            ids = documents[chunk.document][chunk.start : chunk.end]
            tokens_NS[row, at:end], segments_NS[row, at:end] = _unmarked(ids, segment)
            at = end
    return Rows(tokens_NS, segments_NS)


def seen(ids: np.ndarray) -> np.ndarray:
    """Ids marked as no targets: negative, the bitwise complement."""
    return ~np.asarray(ids)


def _unmarked(ids: np.ndarray, segment: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids without marks, and their segment, negated for those that were marked."""
    return np.where(ids < 0, ~ids, ids), np.where(ids < 0, -segment, segment)


@dataclass(frozen=True)
class Plan(Mapped):
    """Which pieces of documents make each row, P pieces in all."""

    first_N: np.ndarray
    """The first piece of every row and, last, their number: int64 `[N + 1]`."""
    document_P: np.ndarray
    """int64."""
    start_P: np.ndarray
    """The piece's first token in its document, int64."""
    length_P: np.ndarray
    """int32."""


def make_plan(lengths: Sequence[int] | np.ndarray, capacity: int, window: int = _WINDOW) -> Plan:
    """Rows of `capacity` tokens that hold every token of documents of these lengths exactly once.

    As `pack` has it, for `window` documents at a time.
    """
    sizes, documents, starts, pieces = [], [], [], []
    for first, part in enumerate(batched(np.asarray(lengths).tolist(), window)):
        chunks = cut(part, capacity)
        bins = best_fit([chunk.length for chunk in chunks], capacity)
        order = [item for items in bins for item in items]
        sizes += [len(items) for items in bins]
        documents.append(np.array([chunks[i].document for i in order], np.int64) + first * window)
        starts.append(np.array([chunks[i].start for i in order], np.int64))
        pieces.append(np.array([chunks[i].length for i in order], np.int32))
    return Plan(
        first_N=np.cumsum([0, *sizes]),
        document_P=np.concatenate([np.zeros(0, np.int64), *documents]),
        start_P=np.concatenate([np.zeros(0, np.int64), *starts]),
        length_P=np.concatenate([np.zeros(0, np.int32), *pieces]),
    )


class Documents(Protocol):
    """Documents in a fixed order, each read when it is asked for."""

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Ids of a document, int32; none if it cannot be read."""
        ...


class PlannedRows:
    """The rows of a plan, whose documents are read when a row is asked for."""

    def __init__(self, documents: Documents, plan: Plan, capacity: int, pad: int) -> None:
        self._documents, self._plan, self._capacity, self._pad = documents, plan, capacity, pad

    def __len__(self) -> int:
        return len(self._plan.first_N) - 1

    @property
    def n_tokens(self) -> int:
        """Tokens in all of them, padding not counted."""
        return int(self._plan.length_P.sum(dtype=np.int64))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and segments of a row; the place of a document that cannot be read is padding."""
        plan = self._plan
        tokens_S = np.full(self._capacity, self._pad, np.int32)
        segments_S = np.zeros(self._capacity, np.int32)
        at = 0
        for number, p in enumerate(range(plan.first_N[index], plan.first_N[index + 1]), start=1):
            start, length = int(plan.start_P[p]), int(plan.length_P[p])
            ids = self._documents[int(plan.document_P[p])][start : start + length]
            here = slice(at, at + len(ids))
            tokens_S[here], segments_S[here] = _unmarked(ids, number)
            at += length
        return tokens_S, segments_S


def write_rows(folder: Path, parts: dict[str, Rows], texts: dict[str, str] | None = None) -> None:
    """Writes named rows and text files to `folder`, whole."""
    arrays = {
        f"{name}_{kind}": array
        for name, rows in parts.items()
        for kind, array in (("tokens", rows.tokens_NS), ("segments", rows.segments_NS))
    }
    write_arrays(folder, arrays, texts)


def read_rows(folder: Path) -> dict[str, Rows] | None:
    """The named rows in `folder`, mapped into memory; None unless all are there, bit for bit."""
    arrays = read_arrays(folder)
    if arrays is None:
        return None
    names = [name.removesuffix("_tokens") for name in arrays if name.endswith("_tokens")]
    return {name: Rows(arrays[f"{name}_tokens"], arrays[f"{name}_segments"]) for name in names}


def write_arrays(
    folder: Path, arrays: Mapping[str, np.ndarray], texts: Mapping[str, str] | None = None
) -> None:
    """Writes named arrays and text files, whole: under another name, then renamed."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    digests = {}
    for name, array in arrays.items():
        file = partial / f"{name}.npy"
        np.save(file, array, allow_pickle=False)
        digests[file.name] = file_sha256(file)
    for name, text in (texts or {}).items():
        (partial / name).write_text(text, encoding="utf-8")
        digests[name] = file_sha256(partial / name)
    (partial / _INDEX).write_text(json.dumps(digests))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read_arrays(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays in a folder, mapped into memory; None unless all of it is there, bit for bit."""
    try:
        digests = json.loads((folder / _INDEX).read_text())
        whole = all(file_sha256(folder / file) == digest for file, digest in digests.items())
    except (OSError, ValueError, AttributeError):  # absent or damaged
        return None
    if not whole:
        return None
    return {
        file.removesuffix(".npy"): np.load(folder / file, mmap_mode="r", allow_pickle=False)
        for file in digests
        if file.endswith(".npy")
    }


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Makes processes that would write `path` wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
