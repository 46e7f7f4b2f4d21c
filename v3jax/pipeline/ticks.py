"""Schedules in lockstep: what a program does whose ranks exchange messages at common times.

A compiled SPMD program moves messages in collectives that all ranks take part in, so a rank whose
neighbour is in the middle of something waits for it. Taken as they are, DualPipe's pairs, three
units long beside single units, make its bubble 32 instead of 14 on 16 ranks. Here a tick is one
operation, backwards and pairs in their parts, one after the other: no rank waits for a longer one,
an output travels before the rest of its pair, and the bubble is smaller than that of the undivided
schedule. Where the next three operations of all ranks are a forward and the parts of a backward,
they run in one tick, in which they can overlap. Dims: R ranks, S ticks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from v3jax.pipeline.schedule import Instruction, Op, Result, Schedule, needs, result


@dataclass(frozen=True)
class Ticks:
    """A schedule's operations by tick. What a tick computes is on other ranks in the next one."""

    schedule: Schedule
    rows: tuple[tuple[Instruction, ...], ...]
    """`[S][R]`: nothing, one operation, or on all ranks three, `F`, `I` and `W` in some order; if
    masked, up to one of each kind."""
    masked: bool = False
    """Whether all ranks run what any of them has to."""

    @property
    def n_pairs(self) -> int:
        """Ticks in which all ranks run a forward beside a backward."""
        return sum(_are_pair(row[0]) for row in self.rows)

    def makespan(self, *, f: float = 1.0, b: float = 2.0, w: float = 1.0, fb: float = 3.0) -> float:
        """Time of the step if a tick is as long as its longest operation, or, masked, as all kinds
        of operations in it; see `simulate`."""
        duration = {"": 0.0, "F": f, "I": b - w, "W": w}
        if self.masked:
            kinds = [{op.kind for some in row for op in some} for row in self.rows]
            return sum(duration[kind] for some in kinds for kind in some)
        return sum(
            fb if _are_pair(row[0]) else max(duration[_kinds(some)] for some in row)
            for row in self.rows
        )

    def bubble(self, *, f: float = 1.0, b: float = 2.0, w: float = 1.0, fb: float = 3.0) -> float:
        """What of the makespan a rank does not need for its own work, taken as the schedule has it:
        pairs that overlap and others that do not."""
        duration = {"F": f, "B": b, "I": b - w, "W": w, "FB": fb}
        own = max(sum(duration[_kinds(i)] for i in some) for some in self.schedule.instructions)
        return self.makespan(f=f, b=b, w=w, fb=fb) - own

    def peak_live(self) -> tuple[int, ...]:
        """The most chunks whose activations each rank holds, from forward to weight gradient."""
        peaks = []
        for r in range(self.schedule.n_ranks):
            live = peak = 0
            for op in (op for row in self.rows for op in row[r]):
                live += op.kind == "F"
                peak = max(peak, live)
                live -= op.kind == "W"
            peaks.append(peak)
        return tuple(peaks)


def lockstep(
    schedule: Schedule, *, f: float = 1.0, b: float = 2.0, w: float = 1.0, fb: float = 3.0
) -> Ticks:
    """The schedule's operations, each as early as its rank's order and its messages allow.

    Pairs run in one tick where all ranks are at one. Ranks at the beginning of one wait for those
    in the middle of one, two ticks at most, if that makes the step shorter with these durations,
    which are those of `simulate`: an overlap has to pay for it.

    Raises:
      ValueError: ranks wait for one another for ever.
    """
    # With operations of one length and nothing gained by overlap, waiting never pays.
    even = f == w == b - w and fb >= f + b
    tried = [
        _lockstep(schedule, patient=patient) for patient in ([False] if even else [False, True])
    ]
    return min(tried, key=lambda ticks: ticks.makespan(f=f, b=b, w=w, fb=fb))


def _lockstep(schedule: Schedule, *, patient: bool) -> Ticks:
    parts = [[_parts(i) for i in some] for some in schedule.instructions]
    todo = [[op for some in of_rank for op in some] for of_rank in parts]
    # How far into a pair each operation is; -1 outside of one.
    depth = [
        [i if len(some) == 3 else -1 for some in of_rank for i in range(len(some))]
        for of_rank in parts
    ]
    at_R = [0] * schedule.n_ranks
    done: set[Result] = set()
    rows: list[tuple[Instruction, ...]] = []
    while any(at < len(ops) for at, ops in zip(at_R, todo, strict=True)):
        row = [
            _possible(schedule, r, ops[at : at + 3], done)
            for r, (at, ops) in enumerate(zip(at_R, todo, strict=True))
        ]
        if not all(map(_are_pair, row)):
            row = [some[:1] for some in row]
            inside = [d[at] if at < len(d) else -1 for d, at in zip(depth, at_R, strict=True)]
            if patient and min(inside) == 0 and max(inside) > 0:
                row = [some if i > 0 else () for some, i in zip(row, inside, strict=True)]
        _step(schedule, todo, at_R, done, row)
        rows.append(tuple(row))
    return Ticks(schedule, tuple(rows))


def abreast(schedule: Schedule) -> Ticks:
    """The schedule's operations for ranks that all run what any of them has to.

    A rank does as much in a tick as it can, up to one operation of each kind: as long as forwards
    alone are possible, and when they have all been run, ticks have no other kind.

    Raises:
      ValueError: ranks wait for one another for ever.
    """
    todo = [[op for i in some for op in _parts(i)] for some in schedule.instructions]
    at_R = [0] * schedule.n_ranks
    done: set[Result] = set()
    rows: list[tuple[Instruction, ...]] = []
    while any(at < len(ops) for at, ops in zip(at_R, todo, strict=True)):
        row = tuple(
            _of_each_kind(schedule, r, ops[at : at + 3], done)
            for r, (at, ops) in enumerate(zip(at_R, todo, strict=True))
        )
        _step(schedule, todo, at_R, done, row)
        rows.append(row)
    return Ticks(schedule, tuple(rows), masked=True)


def _step(
    schedule: Schedule,
    todo: Sequence[Sequence[Op]],
    at_R: list[int],
    done: set[Result],
    row: Sequence[Instruction],
) -> None:
    """Counts a tick as done."""
    if not any(row):
        r = next(r for r, ops in enumerate(todo) if at_R[r] < len(ops))
        raise ValueError(
            f"schedule {schedule.name}: rank {r} waits for ever before {todo[r][at_R[r]]}"
        )
    for r, some in enumerate(row):
        at_R[r] += len(some)
        done |= {result(r, op) for op in some}


def _of_each_kind(
    schedule: Schedule, rank: int, ops: Sequence[Op], done: set[Result]
) -> Instruction:
    """The next operations, of different kinds, that a rank can run in one tick: `I` before `W`, so
    that one can use what the other finds."""
    some: list[Op] = []
    own: set[Result] = set()
    for op in ops:
        ready = all(need in done or need in own for need in needs(schedule, rank, op))
        if not ready or op.kind in _kinds(tuple(some)):
            break
        some.append(op)
        own |= {result(rank, op)} if op.kind == "I" else set()
    return tuple(some)


def _parts(instruction: Instruction) -> tuple[Op, ...]:
    """Single operations. A pair's backward comes first: the rank before waits for it longer."""
    *forwards, last = instruction
    if last.kind != "B":
        return instruction
    return (last._replace(kind="I"), last._replace(kind="W"), *forwards)


def _possible(schedule: Schedule, rank: int, ops: Sequence[Op], done: set[Result]) -> Instruction:
    """The operations that can run at once: after one another, with the messages that are there."""
    own: set[Result] = set()
    for i, op in enumerate(ops):
        if any(need not in done and need not in own for need in needs(schedule, rank, op)):
            return tuple(ops[:i])
        own.add(result(rank, op))
    return tuple(ops)


def _are_pair(instruction: Instruction) -> bool:
    """Whether these are a forward and the parts of one backward of something else."""
    by_kind = {op.kind: op[1:] for op in instruction}
    return sorted(by_kind) == ["F", "I", "W"] and by_kind["F"] != by_kind["I"] == by_kind["W"]


def _kinds(instruction: Instruction) -> str:
    return "".join(op.kind for op in instruction)
