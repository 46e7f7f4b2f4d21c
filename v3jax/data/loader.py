"""Batches of rows: a mixture of sources that resumes bit for bit.

The loader draws rows from the sources in the ratio of their weights, each source shuffled anew
every epoch, and its whole state is a position.
Dims: M micro-batches, B sequences of one, S = T + 1 tokens of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from v3jax.config import ExperimentConfig
from v3jax.data.dataset import Dataset
from v3jax.data.packing import Rows
from v3jax.optim.schedules import batch_size


@dataclass(frozen=True)
class HostBatch:
    """One step's input, padded to the ramp's largest number of micro-batches.

    `tokens_MBS` and `segments_MBS` are int32; micro-batches from `n_micro` on are zeros.
    """

    tokens_MBS: np.ndarray
    segments_MBS: np.ndarray
    n_micro: int


class _RowSource:
    """Rows as a random-access source of (tokens, segments) pairs."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows.tokens_NS)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self._rows.tokens_NS[index]), np.asarray(self._rows.segments_NS[index])


class Loader:
    """Endless batches whose size follows the ramp over the sequences already drawn."""

    def __init__(self, cfg: ExperimentConfig, dataset: Dataset) -> None:
        self.cfg = cfg
        self.digest = dataset.digest
        self.sequences = 0
        self._rows = iter(_mixture(cfg, dataset))

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        batch, data = self.cfg.batch, self.cfg.data
        size = batch_size(batch, self.sequences * data.seq_len)
        n_micro = size // batch.micro_batch
        shape = (batch.end // batch.micro_batch, batch.micro_batch, data.seq_len + 1)
        tokens_MBS, segments_MBS = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for m in range(n_micro):
            tokens_MBS[m], segments_MBS[m] = next(self._rows)
        self.sequences += size
        return HostBatch(tokens_MBS, segments_MBS, n_micro)

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON: sequences drawn, the iterator's own state, the data's digest."""
        return {
            "sequences": self.sequences,
            "iterator": self._rows.get_state(),
            "digest": self.digest,
        }

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
        self._rows.set_state(state["iterator"])


def _mixture(cfg: ExperimentConfig, dataset: Dataset) -> Any:
    """Micro-batches of rows drawn from the sources by weight, each shuffled every epoch."""
    import grain

    sources = [
        (
            grain.MapDataset.source(_RowSource(rows)).seed(cfg.run.seed + i).shuffle().repeat(),
            weight,
        )
        for i, (rows, weight) in enumerate(zip(dataset.train, dataset.weights, strict=True))
        if len(rows.tokens_NS)
    ]
    rows = grain.MapDataset.mix([s for s, _ in sources], weights=[w for _, w in sources])
    batches = rows.batch(cfg.batch.micro_batch, drop_remainder=True)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def make_loader(cfg: ExperimentConfig, dataset: Dataset) -> Loader:
    """A loader at the start of the data's order."""
    return Loader(cfg, dataset)
