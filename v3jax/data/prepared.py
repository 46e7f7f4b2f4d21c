"""Rows of a prepared corpus: planned from its documents' lengths, read when they are asked for.

Training documents are put in fill-in-the-middle form and have newline tokens split as those of any
other corpus (`fim`). Both change lengths, so all documents are read once; lengths and plan are kept
in the cache, and from then on any row is there at once. A record that is damaged is counted, put on
record with its file and place, and left out of its row; beyond a budget the run stops.
Dims: N rows, P pieces of documents.
"""

import functools
import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from v3jax.config import DataConfig
from v3jax.data import fim
from v3jax.data.corpus import load_corpus
from v3jax.data.packing import (
    Mapped,
    Plan,
    PlannedRows,
    alone,
    make_plan,
    read_arrays,
    write_arrays,
)
from v3jax.data.shards import INDEX, CorruptRecord, Records, Shards, ShardSource
from v3jax.data.sources import Document
from v3jax.data.tokenizer import Tokenizer

_AT_ONCE = 2000
"""Documents that one process measures at a time."""


@dataclass(frozen=True)
class Chosen:
    """The sources of a prepared corpus that a run draws from, and their weights."""

    shards: Shards
    sources: tuple[ShardSource, ...]
    weights: tuple[float, ...]


def chosen(data: DataConfig) -> Chosen | None:
    """What `data.path` or `data.sources` name of a prepared corpus; None if they name none.

    Raises:
      ValueError: a folder that is damaged, has no such source, or stands beside other text.
    """
    if data.path is not None:
        folder = Path(data.path).expanduser()
        if not (folder / INDEX).is_file():
            return None
        shards = Shards.open(folder)
        return Chosen(shards, shards.sources, tuple(s.weight for s in shards.sources))
    folders = [_corpus_around(source.path) for source in data.sources]
    if not any(folders):
        return None
    first = next(folder for folder in folders if folder is not None)
    for source, folder in zip(data.sources, folders, strict=True):
        if folder is None or folder.resolve() != first.resolve():
            raise ValueError(
                f"data.sources: {source.path or source.name} is no source of {first}; prepare all "
                "sources of a run together"
            )
    shards = Shards.open(first)
    by_name = {source.name: source for source in shards.sources}
    names = [Path(source.path or "").name for source in data.sources]
    for name in names:
        if name not in by_name:
            raise ValueError(f"{first}: no source {name!r}; it has {', '.join(sorted(by_name))}")
    weights = tuple(source.weight for source in data.sources)
    return Chosen(shards, tuple(by_name[name] for name in names), weights)


def _corpus_around(path: str | None) -> Path | None:
    """The prepared corpus that a path lies in as a source."""
    folder = None if path is None else Path(path).expanduser().parent
    return folder if folder is not None and (folder / INDEX).is_file() else None


def held_out(data: DataConfig) -> list[tuple[str, tuple[Document, ...]]]:
    """Each source's name and held-out documents, of a prepared corpus or any other.

    Raises:
      ValueError: conversations, which are no text; or as `chosen`.
    """
    if data.format == "chat":
        raise ValueError(
            "data.format: figures by source are of text, and the run's documents are "
            "conversations; evaluate it with --tasks=harness:NAME --chat"
        )
    found = chosen(data)
    if found is None:
        corpus = load_corpus(data)
        names = [source.name for source in corpus.sources]
        return list(zip(names, corpus.heldout, strict=True))
    tokenizer = found.shards.tokenizer()

    def text_of(source: ShardSource, n: int) -> Document:
        ids, name = source.heldout.read_named(n)
        return Document(source.name, name, tokenizer.decode(ids[:-1]))

    return [
        (source.name, tuple(text_of(source, n) for n in range(len(source.heldout))))
        for source in found.sources
    ]


@dataclass(frozen=True)
class Damaged:
    """A document that could not be used, and why."""

    source: str
    side: str
    document: int
    reason: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.source, self.side, self.document


class Quarantine:
    """Documents that could not be used, each once, and how many there may be.

    A copy in another process only collects: what it has `taken` is added here, where the budget is
    and the file.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._file: Path | None = None
        self._found: dict[tuple[str, str, int], Damaged] = {}
        self._new: list[Damaged] = []
        self._is_copy = False
        self._lock = threading.Lock()

    def add(self, records: Records, document: int, reason: str) -> None:
        """Puts a document on record.

        Raises:
          ValueError: that is one too many.
        """
        self.add_all([Damaged(records.source, records.side, document, reason)])

    def add_all(self, damaged: Iterable[Damaged]) -> None:
        """Puts documents on record; raises as `add`."""
        with self._lock:
            for one in damaged:
                if one.key in self._found:
                    continue
                self._found[one.key] = one
                if self._is_copy:
                    self._new.append(one)
                    continue
                if self._file is not None:
                    _append(self._file, [one])
                if len(self._found) > self._budget:
                    raise ValueError(
                        f"data: {len(self._found)} documents cannot be read, data.max_corrupt is "
                        f"{self._budget}; the last: {one.reason}"
                    )

    def taken(self) -> tuple[Damaged, ...]:
        """What a copy collected since it was asked last; nothing of the quarantine itself."""
        with self._lock:
            new, self._new = tuple(self._new), []
            return new

    def keep_in(self, file: Path | epath.Path) -> None:
        """Writes what was seen and what comes to a file, one JSON object a line, if it lies in a
        file system; what a run before wrote there counts too."""
        if "://" in str(file):
            return
        with self._lock:
            self._file = Path(file)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
            known = {d.key: d for d in (Damaged(**json.loads(x)) for x in text.splitlines())}
            _append(self._file, [one for key, one in self._found.items() if key not in known])
            self._found = known | self._found

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {"_budget": self._budget, "_found": dict(self._found)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _file=None, _new=[], _is_copy=True, _lock=threading.Lock())


def _append(file: Path, rows: Sequence[Damaged]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


@dataclass(frozen=True)
class TrainingDocuments:
    """A source's documents as training sees them."""

    records: Records
    tokenizer: Tokenizer
    seed: int
    fim_rate: float
    newline_split_rate: float
    vocab_size: int
    quarantine: Quarantine

    def __getitem__(self, index: int) -> np.ndarray:
        """Ids, int32; none of a document that cannot be used."""
        found = self._read(index)
        if found is None:
            return np.zeros(0, np.int32)
        if not self.fim_rate and not self.newline_split_rate:
            return found
        return fim.from_ids(
            self.tokenizer,
            found,
            seed=self.seed,
            fim_rate=self.fim_rate,
            newline_split_rate=self.newline_split_rate,
        )

    def _read(self, index: int) -> np.ndarray | None:
        try:
            ids = self.records.read(index)
        except CorruptRecord as error:
            reason = str(error)
        else:
            if len(ids) and ids.min() >= 0 and ids.max() < self.vocab_size:
                return ids
            reason = (
                f"{self.records.folder}: document {index} of {self.records.source} holds an id "
                f"outside the vocabulary of {self.vocab_size}"
            )
        self.quarantine.add(self.records, index, reason)
        return None

    def rearranged(self, index: int) -> bool:
        """Whether a document is put in fill-in-the-middle form."""
        ids = self.records.read(index)
        return fim.is_rearranged(self.seed, self.tokenizer.decode(ids[:-1]), self.fim_rate)


@dataclass(frozen=True)
class Measured(Mapped):
    """What one pass over a source's documents finds."""

    length_N: np.ndarray
    """Ids of each, int32."""
    kept_K: np.ndarray
    """Those that would be encoded again for each of several rows, int64, ascending."""
    first_K1: np.ndarray
    """Where their ids begin among all that are kept, and their number: int64 `[K + 1]`."""
    ids: np.ndarray
    """int32."""


def measure(documents: TrainingDocuments, capacity: int, n_processes: int = 1) -> Measured:
    """Reads every document, in several processes, unless all stay as they were prepared."""
    records = documents.records
    if not documents.fim_rate and not documents.newline_split_rate:
        nothing = np.zeros(0, np.int64)
        length_N = np.asarray(records.lengths_N)
        return Measured(length_N, nothing, np.zeros(1, np.int64), np.zeros(0, np.int32))
    parts = [
        range(start, min(start + _AT_ONCE, len(records)))
        for start in range(0, len(records), _AT_ONCE)
    ]
    work = functools.partial(_measure_some, documents, capacity)
    if n_processes == 1 or len(parts) <= 1:
        found = list(map(work, parts))
    else:
        spawn = get_context("spawn")  # a process with threads in it must not fork
        with ProcessPoolExecutor(min(n_processes, len(parts)), spawn) as pool:
            found = list(pool.map(work, parts))
    lengths = [length for some, _ in found for length in some]
    kept = [one for _, some in found for one in some]
    sizes = [len(ids) for _, ids in kept]
    return Measured(
        np.array(lengths, np.int32),
        np.array([index for index, _ in kept], np.int64),
        np.cumsum([0, *sizes]),
        np.concatenate([np.zeros(0, np.int32), *(ids for _, ids in kept)]),
    )


def _measure_some(
    documents: TrainingDocuments, capacity: int, indices: Sequence[int]
) -> tuple[list[int], list[tuple[int, np.ndarray]]]:
    lengths, kept = [], []
    for index in indices:
        ids = documents[index]
        # A place is left for one that cannot be used, so that the plan does not depend on damage.
        lengths.append(len(ids) or int(documents.records.lengths_N[index]))
        if len(ids) > capacity and documents.rearranged(index):
            kept.append((index, ids))
    return lengths, kept


class _Cached:
    """Documents of which some are at hand."""

    def __init__(self, documents: TrainingDocuments, found: Measured) -> None:
        self._documents, self._found = documents, found

    def __getitem__(self, index: int) -> np.ndarray:
        found = self._found
        k = int(np.searchsorted(found.kept_K, index))
        if k < len(found.kept_K) and found.kept_K[k] == index:
            return found.ids[found.first_K1[k] : found.first_K1[k + 1]]
        return self._documents[index]


def training_rows(
    documents: TrainingDocuments, data: DataConfig, cache: Path, digest: str, n_processes: int = 1
) -> PlannedRows:
    """The rows of a source, whose plan is read from the cache or made and put there.

    Args:
      digest: of the corpus and all that shapes its rows.
    """
    capacity, source = data.seq_len + 1, documents.records.source
    key = hashlib.sha256(f"{digest} {source} {capacity}".encode()).hexdigest()[:24]
    folder = cache / "plans" / key
    arrays = read_arrays(folder)
    if arrays is None:
        with alone(folder):
            arrays = read_arrays(folder)
            if arrays is None:
                found = measure(documents, capacity, n_processes)
                arrays = vars(make_plan(found.length_N, capacity)) | vars(found)
                write_arrays(folder, arrays)
    plan = Plan(**{field.name: arrays[field.name] for field in fields(Plan)})
    found = Measured(**{field.name: arrays[field.name] for field in fields(Measured)})
    return PlannedRows(_Cached(documents, found), plan, capacity, documents.tokenizer.pad)


def heldout_rows(
    records: Sequence[Records], tokenizer: Tokenizer, data: DataConfig, quarantine: Quarantine
) -> PlannedRows:
    """Held-out documents of all sources together, as they were prepared."""
    every = _Joined(records, tokenizer, quarantine)
    lengths = np.concatenate([np.asarray(part.lengths_N) for part in records])
    capacity = data.seq_len + 1
    return PlannedRows(every, make_plan(lengths, capacity), capacity, tokenizer.pad)


class _Joined:
    """Documents of several sources one after the other."""

    def __init__(
        self, records: Sequence[Records], tokenizer: Tokenizer, quarantine: Quarantine
    ) -> None:
        vocab = tokenizer.vocab_size
        self._parts = [
            TrainingDocuments(part, tokenizer, 0, 0.0, 0.0, vocab, quarantine) for part in records
        ]
        self._first = np.cumsum([0, *(len(part) for part in records)])

    def __getitem__(self, index: int) -> np.ndarray:
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._parts[part][index - int(self._first[part])]
