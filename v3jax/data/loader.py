"""Batches of rows: a mixture of sources that resumes bit for bit.

Rows are drawn from the sources in the ratio of their weights, which may change on the way, each
source shuffled anew every epoch. Row `i` of that order can be read without those before it, so a
position is the loader's whole state, and a process reads only the rows that its devices hold.
Dims: M micro-batches, B sequences of one, R of them here, S = T + 1 tokens of a row.
"""

import bisect
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from v3jax.config import ExperimentConfig
from v3jax.data.ahead import ReadAhead
from v3jax.data.dataset import Dataset
from v3jax.data.prepared import Damaged, Quarantine
from v3jax.optim.schedules import batch_size


@dataclass(frozen=True)
class HostBatch:
    """One step's input on this host, padded to the ramp's largest number of micro-batches.

    `tokens_MRS` and `segments_MRS` are int32, segments as in `packing.Rows`; micro-batches from
    `n_micro` on are zeros.
    """

    tokens_MRS: np.ndarray
    segments_MRS: np.ndarray
    n_micro: int


class _MicroBatches:
    """Some rows of every micro-batch from row `first` of the order on: ids, segments, and what of
    the data turned out to be damaged."""

    def __init__(
        self, order: Any, size: int, rows: Sequence[int], first: int, quarantine: Quarantine | None
    ) -> None:
        self._order, self._size, self._rows, self._first = order, size, rows, first
        self._quarantine = quarantine

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, tuple[Damaged, ...]]:
        start = self._first + index * self._size
        tokens, segments = zip(*(self._order[start + row] for row in self._rows), strict=True)
        damaged = () if self._quarantine is None else self._quarantine.taken()
        return np.stack(tokens), np.stack(segments), damaged


class Loader:
    """Endless batches whose size follows the ramp over the sequences already drawn.

    Rows are read ahead by a thread, or by `data.workers` processes; `close` ends those.
    """

    def __init__(
        self, cfg: ExperimentConfig, dataset: Dataset, rows: Sequence[int] | None = None
    ) -> None:
        self.cfg = cfg
        self.digest = dataset.digest
        self.sequences = 0
        self._rows = range(cfg.batch.micro_batch) if rows is None else [int(row) for row in rows]
        self._order = _mixture(cfg, dataset)
        self._quarantine = dataset.quarantine
        self._ahead: ReadAhead[tuple[np.ndarray, np.ndarray, Any]] | None = None

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        batch, data = self.cfg.batch, self.cfg.data
        size = batch_size(batch, self.sequences * data.seq_len)
        n_micro = size // batch.micro_batch
        shape = (batch.end // batch.micro_batch, len(self._rows), data.seq_len + 1)
        tokens_MRS, segments_MRS = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        if self._ahead is None:
            self._ahead = self._read_from(self.sequences)
        for m in range(n_micro):
            tokens_MRS[m], segments_MRS[m], damaged = next(self._ahead)
            if self._quarantine is not None:
                self._quarantine.add_all(damaged)
        self.sequences += size
        return HostBatch(tokens_MRS, segments_MRS, n_micro)

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON, the same on every process: sequences drawn, the data's digest."""
        return {"sequences": self.sequences, "digest": self.digest}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position.

        Raises:
          ValueError: the position belongs to other data.
        """
        if state["digest"] != self.digest:
            raise ValueError(
                f"data: the checkpoint was trained on rows {state['digest']}, the corpus now gives "
                f"{self.digest}; restore the corpus or start a new workdir"
            )
        self.close()
        self.sequences = state["sequences"]

    def close(self) -> None:
        """Ends the processes that read ahead; the next batch starts new ones."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _read_from(self, first: int) -> ReadAhead[tuple[np.ndarray, np.ndarray, Any]]:
        """This loader's rows of the micro-batches from row `first` of the order on."""
        size = self.cfg.batch.micro_batch
        source = _MicroBatches(self._order, size, self._rows, first, self._quarantine)
        return ReadAhead(source, self.cfg.data.workers)


class _Order:
    """The endless order of rows, which any row can be read of without those before it."""

    def __init__(
        self, sources: Sequence[Any], phases: Sequence[tuple[int, Sequence[float]]]
    ) -> None:
        """`phases`: the first row of each and the sources' weights in it."""
        self._sources = sources
        self._first = [first for first, _ in phases]
        self._drawn = [[_Drawn(s) for s, weight in enumerate(w) if weight] for _, w in phases]
        self._selected = [
            _mixed(drawn, [w for w in weights if w])
            for drawn, (_, weights) in zip(self._drawn, phases, strict=True)
        ]
        self._before = [[0] * len(sources)]
        for phase in range(len(phases) - 1):
            length = self._first[phase + 1] - self._first[phase]
            self._before.append(self._after(phase, length))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        phase = bisect.bisect_right(self._first, index) - 1
        source, number = self._selected[phase][index - self._first[phase]]
        return self._sources[source][self._before[phase][source] + number]

    def _after(self, phase: int, length: int) -> list[int]:
        """Rows drawn of each source when so many rows of a phase are."""
        counts = list(self._before[phase])
        left = {drawn.source for drawn in self._drawn[phase]}
        index = length
        while left:  # the next of a source says how many there were
            source, number = self._selected[phase][index]
            if source in left:
                counts[source] += number
                left.remove(source)
            index += 1
        return counts


@dataclass(frozen=True)
class _Drawn:
    """Where a row lies: its source, and its number among those of it that a phase draws."""

    source: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.source, int(index)


def _mixed(drawn: Sequence[_Drawn], weights: Sequence[float]) -> Any:
    import grain

    sources = [grain.MapDataset.source(one) for one in drawn]
    return grain.MapDataset.mix(sources, weights=list(weights))


def _mixture(cfg: ExperimentConfig, dataset: Dataset) -> _Order:
    """Rows drawn from the sources by weight, each shuffled every epoch."""
    import grain

    filled = [bool(len(rows)) for rows in dataset.train]
    for _, weights in cfg.data.mixture:
        if len(weights) != len(filled):
            raise ValueError(
                f"data.mixture: {len(weights)} weights for {len(filled)} sources; give one a source"
            )
    sources = [
        grain.MapDataset.source(rows).seed(cfg.run.seed + i).shuffle().repeat() if some else None
        for i, (rows, some) in enumerate(zip(dataset.train, filled, strict=True))
    ]

    def of_filled(weights: Sequence[float]) -> list[float]:
        return [w if some else 0.0 for w, some in zip(weights, filled, strict=True)]

    phases, first = [], 0
    for until_tokens, weights in cfg.data.mixture or ((math.inf, dataset.weights),):
        phases.append((first, of_filled(weights)))
        if until_tokens != math.inf:
            first = int(until_tokens / cfg.data.seq_len)
    return _Order(sources, phases)


def make_loader(
    cfg: ExperimentConfig, dataset: Dataset, rows: Sequence[int] | None = None
) -> Loader:
    """A loader at the start of the data's order.

    `rows` says which of a micro-batch's rows it reads, ascending; None for all.
    """
    return Loader(cfg, dataset, rows)
