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
from v3jax.pipeline.table import FORWARD, INPUTS, WEIGHTS, Table, make_table
from v3jax.pipeline.ticks import Ticks, abreast, lockstep


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


NAMES = {FORWARD: "forward", INPUTS: "inputs", WEIGHTS: "weights"}
"""Conditionals have names, by which `v3jax.aot` knows how often they are true."""
ENDS = ("enter", "loss", "back", "leave")
FIELDS = tuple(make_table(lockstep(fitted("gpipe", 1, 1))).ranks)


def ticks_of(pipeline: PipelineConfig, n_ranks: int, n_micro: int, backward: bool = True) -> Ticks:
    """The ticks of a step, or of its forward passes alone."""
    schedule = fitted(pipeline.schedule, n_ranks, n_micro)
    if not backward:
        schedule = forwards(schedule)
    if pipeline.most_waiting is not None:
        schedule = with_waiting(schedule, pipeline.most_waiting)
    if pipeline.mode == "masked":
        return abreast(schedule)
    return lockstep(schedule, fb=pipeline.pair_time)


@functools.lru_cache(maxsize=256)
def table_of(pipeline: PipelineConfig, n_ranks: int, n_micro: int, backward: bool = True) -> Table:
    """The same as numbers."""
    return make_table(ticks_of(pipeline, n_ranks, n_micro, backward))


def idle_share(cfg: ExperimentConfig) -> float:
    """The share of a full step in which a rank waits, if a forward and each half of a backward take
    as long; 0 without a pipeline."""
    if cfg.mesh.pipe == 1:
        return 0.0
    n_micro = cfg.batch.end // cfg.batch.micro_batch
    ticks, fb = ticks_of(cfg.pipeline, cfg.mesh.pipe, n_micro), cfg.pipeline.pair_time
    return ticks.bubble(fb=fb) / ticks.makespan(fb=fb)


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


def shares(cfg: ExperimentConfig) -> dict[str, float]:
    """How often the conditionals of `pipeline.run`, by name, are true in a full step, on a rank in
    the middle. Forward and the halves of backward stand where no pair runs."""
    plan = plan_of(cfg)
    if plan is None:
        return {}
    n_micro = cfg.batch.end // cfg.batch.micro_batch
    table = table_of(cfg.pipeline, plan.n_ranks, n_micro)
    run_S, n_ticks = table.ranks["run"][:, plan.n_ranks // 2], table.n_ticks
    counts = {name: int((run_S & bit > 0).sum()) for bit, name in NAMES.items()}
    pairs = 0 if plan.masked else int((run_S == sum(NAMES)).sum())
    alone = {name: (n - pairs) / max(n_ticks - pairs, 1) for name, n in counts.items()}
    ends = ("first_forward", "last_forward", "first_backward", "last_backward")
    return (
        alone
        | dict.fromkeys(ends, 0.0)
        | {
            "pair": pairs / n_ticks,
            "keep": counts["forward"] / n_ticks,
            "one_of": n_micro / len(plan.paths) / n_ticks,
        }
    )
