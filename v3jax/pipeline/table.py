"""Ticks as arrays of numbers, which one program runs on every rank.

What waits on a rank lies in numbered slots: inputs and gradients that have arrived (`x`, `g`), the
loss's gradients on the last stage (`loss`), what a forward saved until its weight gradients are
done (`saved`), and what an input's gradient found for them (`found`). Slots are used again; a rank
has as many as any rank needs.
Dims: S ticks, R ranks, D directions.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from v3jax.pipeline.schedule import Op, Place, Schedule
from v3jax.pipeline.ticks import Ticks

FORWARD, INPUTS, WEIGHTS = 1, 2, 4
"""Bits of `run`: which operations a rank runs in a tick; `WEIGHTS` comes after `INPUTS`."""

_FIELDS = (
    "run",
    "f_chunk",
    "f_micro",
    "f_x",  # slots that an operation reads or writes
    "f_saved",
    "i_chunk",
    "i_micro",
    "i_g",
    "i_saved",
    "i_found",
    "w_chunk",
    "w_saved",
    "w_found",
    "x_left",  # slots for what has arrived when the tick begins, from rank - 1, rank + 1 or itself
    "x_right",
    "x_here",
    "g_left",
    "g_right",
    "g_here",
    "loss",  # the slot for the loss's gradients at the end of the tick of its forward
    "i_loss",
)


@dataclass(frozen=True)
class Table:
    """What every rank does in every tick. -1 stands for nothing."""

    schedule: Schedule
    ranks: Mapping[str, np.ndarray]
    """Fields of `[S, R]` int32; `run` has bits, `*_chunk` and `*_micro` say of what, the others are
    slots."""
    enter_SD: np.ndarray
    """The micro-batch of a direction whose first stage runs forward in a tick."""
    loss_SD: np.ndarray
    """The one whose last stage has run forward in a tick, so that its loss is due at its end."""
    back_SD: np.ndarray
    """The one whose last stage has found the gradient of its input."""
    leave_SD: np.ndarray
    """The one whose first stage has found the gradient of its input."""
    slots: Mapping[str, int]
    """How many of each a rank has."""

    @property
    def n_ticks(self) -> int:
        return len(self.enter_SD)


class _Slots:
    """Numbers for what lives from one tick to another, both included."""

    def __init__(self) -> None:
        self.count = 0
        self._wanted: list[tuple[int, int, list[tuple[np.ndarray, int, int]]]] = []

    def ask(self, first: int, last: int, *fields: tuple[np.ndarray, int, int]) -> None:
        """A slot for these ticks, to be written into fields `(array, tick, rank)`."""
        self._wanted.append((first, last, list(fields)))

    def give(self) -> None:
        free: list[int] = []
        busy: list[tuple[int, int]] = []
        for first, last, fields in sorted(self._wanted, key=lambda want: want[:2]):
            while busy and busy[0][0] < first:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if not free:
                free.append(self.count)
                self.count += 1
            slot = heapq.heappop(free)
            heapq.heappush(busy, (last, slot))
            for array_SR, tick, rank in fields:
                array_SR[tick, rank] = slot


def make_table(ticks: Ticks) -> Table:
    """The table of ticks that `lockstep` has made."""
    schedule, n_ticks = ticks.schedule, len(ticks.rows)
    ranks = {name: np.full((n_ticks, schedule.n_ranks), -1, np.int32) for name in _FIELDS}
    ranks["run"][:] = 0
    ends = np.full((4, n_ticks, len(schedule.paths)), -1, np.int32)
    when = {
        (rank, op): tick
        for tick, row in enumerate(ticks.rows)
        for rank, some in enumerate(row)
        for op in some
    }
    pools = {
        name: [_Slots() for _ in range(schedule.n_ranks)]
        for name in ("x", "g", "loss", "saved", "found")
    }
    for (rank, op), tick in when.items():
        place = Place(rank, op.chunk)
        direction = schedule.direction(place)
        at = (tick, rank)
        letter = op.kind.lower()
        ranks[f"{letter}_chunk"][at] = op.chunk
        ranks["run"][at] |= {"F": FORWARD, "I": INPUTS, "W": WEIGHTS}[op.kind]
        if op.kind == "W":
            continue
        ranks[f"{letter}_micro"][at] = op.micro
        first, last = schedule.before(place) is None, schedule.after(place) is None
        weights_tick = when.get((rank, op._replace(kind="W")), -1)  # of forwards alone, none
        if op.kind == "F":
            if first:
                ends[0, tick, direction] = op.micro
            if last:
                ends[1, tick, direction] = op.micro
            if weights_tick >= 0:
                inputs_tick = when[rank, op._replace(kind="I")]
                saved = [(ranks["f_saved"], *at), (ranks["w_saved"], weights_tick, rank)]
                saved.append((ranks["i_saved"], inputs_tick, rank))
                pools["saved"][rank].ask(tick, weights_tick, *saved)
                if last:
                    loss = [(ranks["loss"], *at), (ranks["i_loss"], inputs_tick, rank)]
                    pools["loss"][rank].ask(tick, inputs_tick, *loss)
        else:
            found = [(ranks["i_found"], *at), (ranks["w_found"], weights_tick, rank)]
            pools["found"][rank].ask(tick, weights_tick, *found)
            if last:
                ends[2, tick, direction] = op.micro
            if first:
                ends[3, tick, direction] = op.micro
        other = schedule.after(place) if op.kind == "F" else schedule.before(place)
        if other is not None:
            _arrival(
                ranks,
                pools,
                op,
                place,
                other,
                tick + 1,
                when[other.rank, op._replace(chunk=other.chunk)],
            )
    for some in pools.values():
        for slots in some:
            slots.give()
    return Table(
        schedule=schedule,
        ranks=ranks,
        enter_SD=ends[0],
        loss_SD=ends[1],
        back_SD=ends[2],
        leave_SD=ends[3],
        slots={name: max(slots.count for slots in some) for name, some in pools.items()},
    )


def _arrival(
    ranks: Mapping[str, np.ndarray],
    pools: Mapping[str, list[_Slots]],
    op: Op,
    sender: Place,
    receiver: Place,
    arrives: int,
    used: int,
) -> None:
    """Room for a message from when it arrives until it is used."""
    what, letter = ("x", "f") if op.kind == "F" else ("g", "i")
    step = sender.rank - receiver.rank
    side = {-1: "left", 1: "right", 0: "here"}[step]
    fields = [
        (ranks[f"{what}_{side}"], arrives, receiver.rank),
        (ranks[f"{letter}_{what}"], used, receiver.rank),
    ]
    pools[what][receiver.rank].ask(arrives, used, *fields)
