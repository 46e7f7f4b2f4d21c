"""What the ranks of an experiment's pipeline know of one another, and their orders for a step.

How many micro-batches a step has is known when it runs, since the batch grows (report section 4.2),
and with it what each rank does when: the ticks are arrays that the compiled step is given, its
`Orders`. Fixed are the layers of each rank and, as the largest number of micro-batches asks for
them, the number of slots and the length of these arrays.
Dims: S ticks, R ranks, D directions.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from v3jax.config import ExperimentConfig, PipelineConfig
from v3jax.pipeline.placement import Layout, layout
from v3jax.pipeline.schedule import Place, fitted, forwards, with_waiting
from v3jax.pipeline.table import Table, make_table
from v3jax.pipeline.ticks import abreast, lockstep


@struct.dataclass
class Orders:
    """What every rank does in a step."""

    n_micro: Any
    """Micro-batches, int32."""
    n_ticks: Any
    """int32; later rows of the arrays mean nothing."""
    ranks: Any
    """Fields of `Table.ranks`, `[S, R]` int32; a device has the column of its rank."""
    ends: Any
    """`Table`'s `enter`, `loss`, `back` and `leave`, `[S, D]` int32."""
    any_S: Any
    """Bits of `run` that any rank has set."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What no step changes."""

    pipeline: PipelineConfig
    n_ranks: int
    paths: tuple[tuple[Place, ...], ...]
    """As `Schedule.paths`."""
    layout: Layout
    slots: Mapping[str, int]
    """As `Table.slots`."""
    sides: frozenset[str]
    """Fields of the tables, such as `x_left`, for messages that there are."""
    n_rows: int
    """S."""
    backward: bool

    @property
    def masked(self) -> bool:
        return self.pipeline.mode == "masked"

    def orders(self, n_micro: int) -> Orders:
        """Those of a step, NumPy arrays."""
        table = table_of(self.pipeline, self.n_ranks, n_micro, self.backward)

        def long(rows: np.ndarray) -> np.ndarray:
            return np.pad(rows, [(0, self.n_rows - len(rows)), *[(0, 0)] * (rows.ndim - 1)])

        together_S = np.bitwise_or.reduce(table.ranks["run"], axis=1)
        return Orders(
            n_micro=np.int32(n_micro),
            n_ticks=np.int32(table.n_ticks),
            ranks={name: long(array_SR) for name, array_SR in table.ranks.items()},
            ends={name: long(getattr(table, f"{name}_SD")) for name in ENDS},
            any_S=long(together_S),
        )

    def specs(self) -> Orders:
        """PartitionSpecs of orders."""
        whole: Any = P()
        return Orders(
            n_micro=whole,
            n_ticks=whole,
            ranks=dict.fromkeys(FIELDS, P(None, "pipe")),
            ends=dict.fromkeys(ENDS, whole),
            any_S=whole,
        )


ENDS = ("enter", "loss", "back", "leave")
FIELDS = tuple(make_table(lockstep(fitted("gpipe", 1, 1))).ranks)


@functools.lru_cache(maxsize=256)
def table_of(pipeline: PipelineConfig, n_ranks: int, n_micro: int, backward: bool = True) -> Table:
    """The ticks of a step, or of its forward passes alone."""
    schedule = fitted(pipeline.schedule, n_ranks, n_micro)
    if not backward:
        schedule = forwards(schedule)
    if pipeline.most_waiting is not None:
        schedule = with_waiting(schedule, pipeline.most_waiting)
    if pipeline.mode == "masked":
        return make_table(abreast(schedule))
    return make_table(lockstep(schedule, fb=pipeline.pair_time))


@functools.lru_cache(maxsize=16)
def plan_of(cfg: ExperimentConfig) -> Plan | None:
    """The plan of an experiment's steps; None without a pipeline.

    Raises:
      ValueError: the schedule does not take so many ranks, or there are too few layers for them.
    """
    if cfg.mesh.pipe == 1:
        return None
    batch = cfg.batch
    counts = range(batch.start // batch.micro_batch, batch.end // batch.micro_batch + 1)
    return _plan(cfg, counts, backward=True)


@functools.lru_cache(maxsize=16)
def evaluation_plan(cfg: ExperimentConfig, n_micro: int) -> Plan:
    """The plan of `n_micro` forward passes."""
    return _plan(cfg, [n_micro], backward=False)


def _plan(cfg: ExperimentConfig, counts: Iterable[int], *, backward: bool) -> Plan:
    n_ranks = cfg.mesh.pipe
    tables = [table_of(cfg.pipeline, n_ranks, n, backward) for n in counts]
    schedule = tables[-1].schedule
    arrivals = (name for name in FIELDS if name.partition("_")[2] in ("left", "right", "here"))
    return Plan(
        pipeline=cfg.pipeline,
        n_ranks=n_ranks,
        paths=schedule.paths,
        layout=layout(cfg.model, schedule),
        slots={name: max(table.slots[name] for table in tables) for name in tables[0].slots},
        sides=frozenset(n for n in arrivals if any((t.ranks[n] >= 0).any() for t in tables)),
        n_rows=max(table.n_ticks for table in tables),
        backward=backward,
    )
