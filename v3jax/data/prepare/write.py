"""From kept documents to shards: tokenizer, ids, order, shards, and the folder under its index.

Documents are ordered by content hash and held out by another part of it, as in `data.corpus`, and
shards are cut by size in that order: nothing depends on the tasks.
"""

import heapq
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from v3jax.data import shards
from v3jax.data.prepare.config import PrepareConfig
from v3jax.data.prepare.staged import Quarantine, key_of, load, save, sha_of, whole
from v3jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from datatrove.data import Document

ROW = np.dtype(
    [
        ("h0", "<u8"),
        ("h1", "<u8"),
        ("h2", "<u8"),
        ("h3", "<u8"),
        ("name", "<u8"),
        ("source", "<i4"),
        ("tokens", "<i4"),
        ("text_bytes", "<i8"),
        ("at", "<i8"),
        ("size", "<i8"),
    ]
)
"""A record in a task's file: the key of its document, what it holds, where it lies."""
PLACE = np.dtype(
    [("task", "<i4"), ("at", "<i8"), ("size", "<i8"), ("tokens", "<i4"), ("shard", "<i4")]
)
"""A record in its final order."""
_BATCH = 64, 2**20  # documents and characters that are encoded together; ours
_RECORD_OVERHEAD = 64  # bytes ArrayRecord adds to a record, about


@dataclass(frozen=True)
class MakeTokenizer:
    """Reads the tokenizer, or trains it on the training documents of the lowest hashes."""

    cfg: PrepareConfig
    texts: Path
    """Where `Sample` put them."""
    folder: Path

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        if self.cfg.tokenizer is not None:
            tokenizer = load_tokenizer(self.cfg.tokenizer)
        else:
            texts = list(self._texts())
            if not texts:
                raise ValueError("nothing is left to train a tokenizer on; see stages/*/ledgers")
            tokenizer = train_tokenizer(texts, self.cfg.tokenizer_vocab_size)
        with whole(self.folder / shards.TOKENIZER, "w") as content:
            content.write(tokenizer.text)

    def _texts(self) -> Iterator[str]:
        """Samples of all tasks merged by hash, up to the cap."""
        left = self.cfg.tokenizer_mb * 1e6
        files = [_lines(file) for file in sorted(self.texts.glob("*.sample.jsonl"))]
        for _, text in heapq.merge(*files):
            left -= len(text.encode())
            if left < 0:
                return
            yield text


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    with file.open("rb") as lines:
        for line in lines:
            order, text = json.loads(line)
            yield order, text


@dataclass(frozen=True)
class Sample:
    """The training documents of a task with the lowest hashes, for the tokenizer."""

    cfg: PrepareConfig
    folder: Path

    def __call__(self, data: Iterable["Document"], rank: int, world_size: int) -> None:
        limit, size = self.cfg.tokenizer_mb * 1e6, 0
        heap: list[tuple[int, str, str]] = []
        for document in data:
            sha = sha_of(document.text).hex()
            if is_heldout(int(sha[:16], 16), self.cfg.heldout_fraction):
                continue
            heapq.heappush(heap, (-int(sha[8:], 16), sha[8:], document.text))
            size += len(document.text.encode())
            while size - len(heap[0][2].encode()) > limit:
                size -= len(heapq.heappop(heap)[2].encode())
        with whole(self.folder / f"{rank:05d}.sample.jsonl") as lines:
            for _, order, text in sorted(heap, reverse=True):
                lines.write(json.dumps([order, text], ensure_ascii=False).encode() + b"\n")


def is_heldout(h0: int, fraction: float) -> bool:
    """Whether a document is held out: by the first 32 bits of its SHA-256, as in `data.corpus`."""
    return h0 >> 32 < fraction * 2**32


@dataclass(frozen=True)
class Encode:
    """The ids of every document, as records in the order they come."""

    cfg: PrepareConfig
    tokenizer: Path
    folder: Path

    def __call__(self, data: Iterable["Document"], rank: int, world_size: int) -> None:
        tokenizer = load_tokenizer(self.tokenizer)
        width = shards.id_bytes(tokenizer.vocab_size)
        quarantine, rows, at = Quarantine(self.folder, rank, "encode"), [], 0
        with whole(self.folder / f"{rank:05d}.records") as content:
            for batch in _batches(data):
                encoded = tokenizer.encode_batch([d.text for d in batch])
                for document, ids in zip(batch, encoded, strict=True):
                    source = document.metadata["source"]
                    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
                        name = self.cfg.sources[source].name
                        quarantine.put(name, document.id, 0, "an id outside the vocabulary")
                        continue
                    record = shards.encode_record([*ids, tokenizer.eos], document.id, width)
                    content.write(record)
                    key = key_of(sha_of(document.text), document.id, source)
                    text_bytes = len(document.text.encode())
                    rows.append((*key, len(ids) + 1, text_bytes, at, len(record)))
                    at += len(record)
        quarantine.write()
        save(self.folder / f"{rank:05d}.rows.npy", np.array(rows, ROW))


def _batches(documents: Iterable["Document"]) -> Iterator[list["Document"]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == _BATCH[0] or size >= _BATCH[1]:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class Order:
    """Where every record goes: its side of the split, its place, its shard."""

    cfg: PrepareConfig
    encoded: Path
    folder: Path
    n_tasks: int

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        tables = [load(self.encoded / f"{task:05d}.rows.npy") for task in range(self.n_tasks)]
        task_N = np.repeat(np.arange(self.n_tasks), [len(t) for t in tables])
        row_N = np.concatenate(tables)
        sources = []
        for number, source in enumerate(self.cfg.sources):
            mine = np.flatnonzero(row_N["source"] == number)
            chosen = _order(row_N[mine], source.max_mb)
            ordered, tasks = row_N[mine][chosen], task_N[mine][chosen]
            heldout = (ordered["h0"] >> np.uint64(32)) < self.cfg.heldout_fraction * 2**32
            about: dict[str, Any] = {
                "name": source.name,
                "over_cap": [
                    len(mine) - len(chosen),
                    int(row_N[mine]["text_bytes"].sum()) - int(ordered["text_bytes"].sum()),
                ],
            }
            for side, keep in (("train", ~heldout), ("heldout", heldout)):
                placed = _placed(ordered[keep], tasks[keep], self.cfg.shard_mb * 1e6)
                save(self.folder / f"{number:05d}-{side}.npy", placed)
                about[side] = {
                    "shards": int(placed["shard"].max(initial=-1)) + 1,
                    "text_bytes": int(ordered["text_bytes"][keep].sum()),
                }
            if not about["train"]["shards"]:
                raise ValueError(
                    f"sources[{source.name}]: nothing is left to train on; "
                    f"{self.encoded.parent}/clean/*.ledger.json say why"
                )
            sources.append(about)
        with whole(self.folder / "order.json", "w") as content:
            json.dump(sources, content)


def _order(row_N: np.ndarray, max_mb: float | None) -> np.ndarray:
    """Numbers of a source's rows in the order of their hashes, up to its cap."""
    low = row_N["h0"] & np.uint64(0xFFFFFFFF)
    order = np.lexsort((row_N["name"], row_N["h3"], row_N["h2"], row_N["h1"], low))
    if max_mb is None or not len(order):
        return order
    fits = np.cumsum(row_N["text_bytes"][order]) <= max_mb * 1e6
    return order[: max(1, int(fits.sum()))]


def _placed(row_N: np.ndarray, task_N: np.ndarray, limit: float) -> np.ndarray:
    """The records in order with the shard each goes to."""
    placed = np.zeros(len(row_N), PLACE)
    placed["task"] = task_N
    for name in ("at", "size", "tokens"):
        placed[name] = row_N[name]
    shard, filled = 0, 0
    for i, size in enumerate((row_N["size"] + _RECORD_OVERHEAD).tolist()):
        if filled and filled + size > limit:
            shard, filled = shard + 1, 0
        placed["shard"][i] = shard
        filled += size
    return placed


def folder_of(source: str) -> str:
    """A source's name as that of a folder."""
    return re.sub(r"[^\w.-]", "_", source)


@dataclass(frozen=True)
class WriteShards:
    """Writes the shards of a task, each read from the records of all tasks."""

    cfg: PrepareConfig
    encoded: Path
    ordered: Path
    tokenizer: Path
    folder: Path

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        width = shards.id_bytes(load_tokenizer(self.tokenizer).vocab_size)
        jobs = list(self._jobs())[rank::world_size]
        for number, side, shard, of in jobs:
            placed = load(self.ordered / f"{number:05d}-{side}.npy")
            placed = placed[placed["shard"] == shard]
            name = f"{side}-{shard:05d}-of-{of:05d}.array_record"
            folder = self.folder / folder_of(self.cfg.sources[number].name)
            writer = shards.Writer(folder / name, width)
            with _Files(self.encoded) as files:
                for task, at, size, *_ in placed.tolist():
                    record = files.read(task, at, size)
                    shards.decode_record(record, f"{self.encoded}/{task:05d}.records: byte {at}")
                    writer.write_record(record)
            with whole(folder / f"{name}.json", "w") as content:
                json.dump(asdict(writer.close()), content)

    def _jobs(self) -> Iterator[tuple[int, str, int, int]]:
        sources = json.loads((self.ordered / "order.json").read_text(encoding="utf-8"))
        for number, source in enumerate(sources):
            for side in shards.SIDES:
                n_shards = source[side]["shards"]
                yield from ((number, side, shard, n_shards) for shard in range(n_shards))


class _Files:
    """Records of tasks, from files that are opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open.values():
            file.close()

    def read(self, task: int, at: int, size: int) -> bytes:
        if task not in self._open:
            self._open[task] = (self._folder / f"{task:05d}.records").open("rb")
        return os.pread(self._open[task].fileno(), size, at)


def index_of(
    cfg: PrepareConfig, tokenizer: Tokenizer, ordered: Path, written: Path, out: Path
) -> dict[str, Any]:
    """The index of the corpus; writes the lengths beside the shards that are already in `out`."""
    sources = []
    about = json.loads((ordered / "order.json").read_text(encoding="utf-8"))
    for number, source in enumerate(cfg.sources):
        folder = folder_of(source.name)
        entry: dict[str, Any] = {"name": source.name, "kind": source.kind, "weight": source.weight}
        for side in shards.SIDES:
            lengths = load(ordered / f"{number:05d}-{side}.npy")["tokens"].astype(np.int32)
            file = out / folder / f"{side}-lengths.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            save(file, lengths)
            n_shards = about[number][side]["shards"]
            names = [f"{side}-{i:05d}-of-{n_shards:05d}.array_record" for i in range(n_shards)]
            made = [json.loads((written / folder / f"{n}.json").read_text()) for n in names]
            entry[side] = {
                "documents": len(lengths),
                "tokens": int(lengths.sum(dtype=np.int64)),
                "text_bytes": about[number][side]["text_bytes"],
                "lengths": {
                    "file": f"{folder}/{file.name}",
                    "sha256": shards.file_sha256(file),
                },
                "shards": [shard | {"file": f"{folder}/{shard['file']}"} for shard in made],
            }
        sources.append(entry)
    return {
        "format": shards.FORMAT,
        "tokenizer": {
            "sha256": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
        },
        "sources": sources,
    }


def place(source: Path, target: Path) -> None:
    """Puts a file at another path of, if possible, the same disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
