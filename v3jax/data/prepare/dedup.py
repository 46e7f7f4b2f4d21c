"""Exact and near duplicates over all sources; the first source in order keeps a text.

MinHash signatures and their buckets are datatrove's (`minhash`). Which of a cluster is kept is
decided here: that of the first source, and there of the lowest content hash, whatever the tasks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from v3jax.data.prepare.staged import KEY, REMOVED, keys_file, load, save


def exact_duplicates(keys_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of documents whose text stands before, and of those kept for them.

    Args:
      keys_N: keys of documents, of dtype `KEY`.
    """
    hashes = [keys_N[h] for h in ("h3", "h2", "h1", "h0")]
    order = np.lexsort((keys_N["name"], keys_N["source"], *hashes))
    same = np.ones(len(order), bool)
    same[:1] = False
    for h in ("h0", "h1", "h2", "h3"):
        same[1:] &= keys_N[h][order][1:] == keys_N[h][order][:-1]
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    return order[same], order[first[same]]


@dataclass(frozen=True)
class FindExact:
    """Lists the exact duplicates among the texts whose hash belongs to this task."""

    documents: Path
    folder: Path

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        keys, places = [], []
        for task in range(world_size):
            found = load(keys_file(self.documents, task))
            mine = np.flatnonzero(found["h0"] % np.uint64(world_size) == rank)
            keys.append(found[mine])
            places += [(task, row) for row in mine.tolist()]
        removed, kept = exact_duplicates(np.concatenate(keys))
        rows = [(*places[r], *places[k]) for r, k in zip(removed, kept, strict=True)]
        save(self.folder / f"{rank:05d}.removed.npy", np.array(rows, REMOVED))


def clusters(pairs: Iterable[tuple[int, int]]) -> Iterator[list[int]]:
    """Connected sets of numbers."""
    parent: dict[int, int] = {}

    def root(x: int) -> int:
        while parent.setdefault(x, x) != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for a, b in pairs:
        parent[root(a)] = root(b)
    sets: dict[int, list[int]] = {}
    for x in sorted(parent):
        sets.setdefault(root(x), []).append(x)
    yield from sets.values()


@dataclass(frozen=True)
class Cluster:
    """Lists all but one of each cluster of near duplicates."""

    documents: Path
    exact: Path | None
    """Where exact duplicates are listed; signatures count only the others."""
    pairs: Path
    folder: Path
    n_tasks: int

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        keys = [load(keys_file(self.documents, task)) for task in range(self.n_tasks)]
        rows = [self._rows(task, len(found)) for task, found in enumerate(keys)]
        first = np.cumsum([0, *map(len, rows)])
        place = [(task, row) for task, some in enumerate(rows) for row in some.tolist()]
        key_N = np.concatenate(
            [k[r] for k, r in zip(keys, rows, strict=True)] or [np.zeros(0, KEY)]
        )
        order = np.lexsort([key_N[h] for h in ("name", "h3", "h2", "h1", "h0", "source")])
        rank_N = np.empty(len(order), np.int64)
        rank_N[order] = np.arange(len(order))
        removed = []
        for members in clusters(self._pairs(first)):
            kept = min(members, key=lambda n: rank_N[n])
            removed += [(*place[n], *place[kept]) for n in members if n != kept]
        save(self.folder / "00000.removed.npy", np.array(sorted(removed), REMOVED))

    def _rows(self, task: int, n: int) -> np.ndarray:
        """The rows of a task that have signatures, in their order."""
        keep = np.ones(n, bool)
        for file in [] if self.exact is None else sorted(self.exact.glob("*.removed.npy")):
            removed = load(file)
            keep[removed["row"][removed["task"] == task]] = False
        return np.flatnonzero(keep)

    def _pairs(self, first: np.ndarray) -> Iterator[tuple[int, int]]:
        """Pairs of documents by their number among all that have signatures."""
        for file in sorted(self.pairs.glob("*.dups")):
            quads = np.frombuffer(file.read_bytes(), "<u4").reshape(-1, 4).astype(np.int64)
            one, other = first[quads[:, 0]] + quads[:, 1], first[quads[:, 2]] + quads[:, 3]
            yield from zip(one.tolist(), other.tolist(), strict=True)
