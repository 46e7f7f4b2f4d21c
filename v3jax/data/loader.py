"""Batches of rows: a mixture of sources that resumes bit for bit.

Rows are drawn from the sources in the ratio of their weights, each source shuffled anew every
epoch. Row `i` of that order can be read without those before it, so a position is the loader's
whole state, and a process reads only the rows that its devices hold.
Dims: M micro-batches, B sequences of one, R of them here, S = T + 1 tokens of a row.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from v3jax.config import ExperimentConfig
from v3jax.data.dataset import Dataset
from v3jax.data.packing import Rows
from v3jax.optim.schedules import batch_size


@dataclass(frozen=True)
class HostBatch:
    """One step's input on this host, padded to the ramp's largest number of micro-batches.

    `tokens_MRS` and `segments_MRS` are int32; micro-batches from `n_micro` on are zeros.
    """

    tokens_MRS: np.ndarray
    segments_MRS: np.ndarray
    n_micro: int


class _RowSource:
    """Rows as a random-access source of (tokens, segments) pairs."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows.tokens_NS)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self._rows.tokens_NS[index]), np.asarray(self._rows.segments_NS[index])


class _MicroBatches:
    """Some rows of every micro-batch from number `first` on, stacked, as a random-access source."""

    def __init__(self, order: Any, size: int, rows: Sequence[int], first: int) -> None:
        self._order, self._size, self._rows, self._first = order, size, rows, first

    def __len__(self) -> int:
        return sys.maxsize // self._size - self._first

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = (self._first + int(index)) * self._size
        tokens, segments = zip(*(self._order[start + row] for row in self._rows), strict=True)
        return np.stack(tokens), np.stack(segments)


class Loader:
    """Endless batches whose size follows the ramp over the sequences already drawn."""

    def __init__(
        self, cfg: ExperimentConfig, dataset: Dataset, rows: Sequence[int] | None = None
    ) -> None:
        self.cfg = cfg
        self.digest = dataset.digest
        self.sequences = 0
        self._rows = range(cfg.batch.micro_batch) if rows is None else [int(row) for row in rows]
        self._order = _mixture(cfg, dataset)
        self._micro_batches = self._read_from(0)

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        batch, data = self.cfg.batch, self.cfg.data
        size = batch_size(batch, self.sequences * data.seq_len)
        n_micro = size // batch.micro_batch
        shape = (batch.end // batch.micro_batch, len(self._rows), data.seq_len + 1)
        tokens_MRS, segments_MRS = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for m in range(n_micro):
            tokens_MRS[m], segments_MRS[m] = next(self._micro_batches)
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
        self.sequences = state["sequences"]
        self._micro_batches = self._read_from(self.sequences // self.cfg.batch.micro_batch)

    def _read_from(self, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """This loader's rows of the micro-batches from `first` on, read ahead in a thread."""
        import grain

        source = _MicroBatches(self._order, self.cfg.batch.micro_batch, self._rows, first)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def _mixture(cfg: ExperimentConfig, dataset: Dataset) -> Any:
    """The endless order of rows: drawn from the sources by weight, each shuffled every epoch."""
    import grain

    sources = [
        (
            grain.MapDataset.source(_RowSource(rows)).seed(cfg.run.seed + i).shuffle().repeat(),
            weight,
        )
        for i, (rows, weight) in enumerate(zip(dataset.train, dataset.weights, strict=True))
        if len(rows.tokens_NS)
    ]
    return grain.MapDataset.mix([s for s, _ in sources], weights=[w for _, w in sources])


def make_loader(
    cfg: ExperimentConfig, dataset: Dataset, rows: Sequence[int] | None = None
) -> Loader:
    """A loader at the start of the data's order.

    `rows` says which of a micro-batch's rows it reads, ascending; None for all.
    """
    return Loader(cfg, dataset, rows)
