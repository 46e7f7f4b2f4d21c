"""Pipeline schedules as data: what every rank computes, in order (report section 3.2.1).

    schedule = dualpipe(n_ranks=8, n_micro=20)
    print(draw(schedule), simulate(schedule).bubble_R)

An instruction is an operation, or a forward and a backward that run as one overlapped pair. A
schedule can be checked, priced and drawn without devices. A rank holds one or two chunks of the
model: under `dualpipe` the stage it has in each of the two directions, under `dualpipev` the two
stages where the only direction passes it. Dims: R ranks.
"""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Op(NamedTuple):
    """One micro-batch through one chunk of a rank."""

    kind: Kind
    """Forward, whole backward, or its halves: for the input and for the weights."""
    chunk: int
    micro: int


Instruction = tuple[Op, ...]
"""One operation, or a forward and a whole backward that overlap."""


class Place(NamedTuple):
    """Where a stage is: a rank's chunk."""

    rank: int
    chunk: int


@dataclass(frozen=True)
class Schedule:
    """Instructions of every rank, and the ways that micro-batches take."""

    name: str
    n_micro: int
    """Micro-batches of a step; the earlier half, or one more, takes the first of two paths."""
    paths: tuple[tuple[Place, ...], ...]
    """Places of the stages in order, for each direction in which micro-batches enter."""
    instructions: tuple[tuple[Instruction, ...], ...]

    @property
    def n_ranks(self) -> int:
        return len(self.instructions)

    @property
    def n_stages(self) -> int:
        return len(self.paths[0])

    @property
    def n_chunks(self) -> int:
        """Chunks of the model that a rank holds."""
        return 1 + max(place.chunk for path in self.paths for place in path)

    @cached_property
    def _stages(self) -> Mapping[Place, tuple[int, int]]:
        return {p: (d, i) for d, path in enumerate(self.paths) for i, p in enumerate(path)}

    def direction(self, place: Place) -> int:
        """The path that a place is on."""
        return self._stages[place][0]

    def stage(self, place: Place) -> int:
        """Counted along its path."""
        return self._stages[place][1]

    def micros(self, direction: int) -> range:
        """The micro-batches that take a path."""
        first = -(-self.n_micro // len(self.paths))
        return range(first, self.n_micro) if direction else range(first)

    def before(self, place: Place) -> Place | None:
        """Where its inputs come from; None where micro-batches enter."""
        direction, i = self._stages[place]
        return self.paths[direction][i - 1] if i else None

    def after(self, place: Place) -> Place | None:
        """Where its outputs go; None where the loss is."""
        direction, i = self._stages[place]
        return self.paths[direction][i + 1] if i + 1 < self.n_stages else None


# ---- Generators


class _Rank:
    """A rank's instructions as they are written: micro-batches of a chunk in order, and weight
    gradients in the order of the input gradients that left them."""

    def __init__(self, first: tuple[int, ...] = (0,)) -> None:
        self._next = Counter({(side, c): n for c, n in enumerate(first) for side in "FB"})
        self._waiting: deque[Op] = deque()
        self.written: list[Instruction] = []

    def _op(self, kind: Kind, chunk: int) -> Op:
        side = "F" if kind == "F" else "B"
        op = Op(kind, chunk, self._next[side, chunk])
        self._next[side, chunk] += 1
        return op

    def forward(self, chunk: int = 0) -> None:
        self.written.append((self._op("F", chunk),))

    def backward(self, chunk: int = 0) -> None:
        self.written.append((self._op("B", chunk),))

    def pair(self, forward: int, backward: int) -> None:
        self.written.append((self._op("F", forward), self._op("B", backward)))

    def inputs(self, chunk: int = 0) -> None:
        op = self._op("I", chunk)
        self._waiting.append(op._replace(kind="W"))
        self.written.append((op,))

    def weights(self) -> None:
        self.written.append((self._waiting.popleft(),))


def gpipe(n_ranks: int, n_micro: int) -> Schedule:
    """All forwards, then all backwards."""
    _some("gpipe", n_ranks, n_micro)

    def write(rank: _Rank, _: int) -> None:
        for _ in range(n_micro):
            rank.forward()
        for _ in range(n_micro):
            rank.backward()

    return _linear("gpipe", n_ranks, n_micro, write)


def one_f_one_b(n_ranks: int, n_micro: int) -> Schedule:
    """One forward, one backward, after as many forwards as there are ranks behind."""
    _some("1f1b", n_ranks, n_micro)

    def write(rank: _Rank, r: int) -> None:
        ahead = min(n_micro, n_ranks - 1 - r)
        for _ in range(ahead):
            rank.forward()
        for _ in range(n_micro - ahead):
            rank.forward()
            rank.backward()
        for _ in range(ahead):
            rank.backward()

    return _linear("1f1b", n_ranks, n_micro, write)


def zb1p(n_ranks: int, n_micro: int) -> Schedule:
    """1F1B whose weight gradients wait, on rank r for r micro-batches, and fill the end.

    The memory-neutral schedule of zero-bubble pipelining (arXiv 2401.10241), "ZB1P" in the report.
    """
    _some("zb1p", n_ranks, n_micro)

    def write(rank: _Rank, r: int) -> None:
        ahead = min(n_micro, n_ranks - 1 - r)
        for _ in range(ahead):
            rank.forward()
        for i in range(n_micro):
            if i < n_micro - ahead:
                rank.forward()
            rank.inputs()
            if i >= r:
                rank.weights()
        for _ in range(min(r, n_micro)):
            rank.weights()

    return _linear("zb1p", n_ranks, n_micro, write)


def dualpipe(n_ranks: int, n_micro: int) -> Schedule:
    """Micro-batches enter from both ends; a rank holds a stage of each direction (figure 5).

    Raises:
      ValueError: ranks or micro-batches are odd, or fewer micro-batches than twice the ranks.
    """
    other = "or take zb1p or 1f1b"
    _require(n_ranks >= 1, "dualpipe", f"{n_ranks} ranks; at least 2 are needed")
    _require(n_ranks % 2 == 0, "dualpipe", f"{n_ranks} ranks are odd; make them even {other}")
    _require(
        n_micro % 2 == 0, "dualpipe", f"{n_micro} micro-batches are odd; make them even {other}"
    )
    _enough("dualpipe", n_ranks, n_micro)
    last, half = n_ranks - 1, n_micro // 2
    written = []
    for r in range(n_ranks):
        rank = _Rank((0, half))
        near, far = (0, 1) if r <= last - r else (1, 0)
        _eight_steps(rank, n_ranks // 2, min(r, last - r), half, near, far)
        written.append(tuple(rank.written))
    paths = (
        tuple(Place(r, 0) for r in range(n_ranks)),
        tuple(Place(r, 1) for r in reversed(range(n_ranks))),
    )
    return Schedule("dualpipe", n_micro, paths, tuple(written))


def dualpipev(n_ranks: int, n_micro: int) -> Schedule:
    """DualPipe folded in the middle: half the devices, each with two stages of one direction.

    Raises:
      ValueError: fewer micro-batches than twice the ranks.
    """
    _some("dualpipev", n_ranks, n_micro)
    _enough("dualpipev", n_ranks, n_micro)
    written = []
    for r in range(n_ranks):
        rank = _Rank((0, 0))
        _eight_steps(rank, n_ranks, r, n_micro, 0, 1)
        written.append(tuple(rank.written))
    there = [Place(r, 0) for r in range(n_ranks)]
    back = [Place(r, 1) for r in reversed(range(n_ranks))]
    return Schedule("dualpipev", n_micro, ((*there, *back),), tuple(written))


def _eight_steps(rank: _Rank, half: int, r: int, n: int, near: int, far: int) -> None:
    """DualPipe of the rank `r` places from an end, of `half` up to the middle, with `n` micro-
    batches in each chunk; those of `near` enter at that end."""
    ramp = half - 1 - r
    for _ in range(2 * ramp):  # 1
        rank.forward(near)
    for _ in range(r + 1):  # 2
        rank.forward(near)
        rank.forward(far)
    for _ in range(ramp):  # 3
        rank.inputs(far)
        rank.weights()
        rank.forward(far)
    for i in range(n - 2 * half + r + 1):  # 4, the bulk
        if i == 0 and ramp == 0:  # nothing to overlap with yet
            rank.forward(near)
            rank.backward(far)
        else:
            rank.pair(near, far)
        rank.pair(far, near)
    for _ in range(ramp):  # 5
        rank.backward(far)
        rank.pair(far, near)
    for i in range(2 * (r + 1)):  # 6, weight gradients put off from the middle on
        chunk = near if i % 2 else far
        (rank.inputs if i > r else rank.backward)(chunk)
    for _ in range(ramp):  # 7
        rank.weights()
        rank.inputs(near)
    for _ in range(r + 1):  # 8
        rank.weights()


def _linear(name: str, n_ranks: int, n_micro: int, write: Callable[[_Rank, int], None]) -> Schedule:
    ranks = [_Rank() for _ in range(n_ranks)]
    for r, rank in enumerate(ranks):
        write(rank, r)
    path = tuple(Place(r, 0) for r in range(n_ranks))
    return Schedule(name, n_micro, (path,), tuple(tuple(rank.written) for rank in ranks))


def _require(true: bool, name: str, what: str) -> None:
    if not true:
        raise ValueError(f"schedule {name}: {what}")


def _some(name: str, n_ranks: int, n_micro: int) -> None:
    _require(
        min(n_ranks, n_micro) >= 1,
        name,
        f"{n_ranks} ranks and {n_micro} micro-batches; at least one of each is needed",
    )


def _enough(name: str, n_ranks: int, n_micro: int) -> None:
    _require(
        n_micro >= 2 * n_ranks,
        name,
        f"{n_micro} micro-batches are fewer than twice the {n_ranks} ranks; "
        "make micro-batches smaller, or take zb1p or 1f1b",
    )


SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


def fitted(name: str, n_ranks: int, n_micro: int) -> Schedule:
    """The schedule of that name for any number of micro-batches.

    Of the bidirectional ones, where they are too few or odd, that of the next number they take,
    without its last micro-batches: no slower than ZB1P and no more memory (ours; the report does
    not say how its first batches, of 24 micro-batches on 16 ranks, were run).

    Raises:
      ValueError: no micro-batch, or a number of ranks that the schedule does not take.
    """
    _some(name, n_ranks, n_micro)
    if name not in ("dualpipe", "dualpipev"):
        return SCHEDULES[name](n_ranks, n_micro)
    even = name == "dualpipe" and n_micro % 2
    whole = SCHEDULES[name](n_ranks, max(2 * n_ranks, n_micro + even))
    short = replace(whole, n_micro=n_micro)
    new = {
        old: micro
        for direction in range(len(whole.paths))
        for old, micro in zip(whole.micros(direction), short.micros(direction), strict=False)
    }
    kept = [
        [
            tuple(op._replace(micro=new[op.micro]) for op in instruction if op.micro in new)
            for instruction in instructions
        ]
        for instructions in whole.instructions
    ]
    return replace(short, instructions=tuple(tuple(filter(None, some)) for some in kept))


def with_waiting(schedule: Schedule, most: int) -> Schedule:
    """The schedule with at most so many weight gradients that wait on a rank: what more would wait
    is computed earlier. Each that waits holds what the input's gradient found for it."""
    written = []
    for instructions in schedule.instructions:
        waiting: deque[Instruction] = deque()
        new: list[Instruction] = []
        for instruction in instructions:
            kinds = [op.kind for op in instruction]
            if kinds == ["W"]:
                if not waiting or instruction != waiting[0]:
                    continue  # computed already
                waiting.popleft()
            new.append(instruction)
            if kinds == ["I"]:
                waiting.append((instruction[0]._replace(kind="W"),))
                while len(waiting) > most:
                    new.append(waiting.popleft())
        written.append(tuple(new))
    return replace(schedule, instructions=tuple(written))


def forwards(schedule: Schedule) -> Schedule:
    """The forward passes of a schedule alone."""
    kept = [
        [tuple(op for op in instruction if op.kind == "F") for instruction in instructions]
        for instructions in schedule.instructions
    ]
    return replace(schedule, instructions=tuple(tuple(filter(None, some)) for some in kept))


# ---- What a schedule costs


class Span(NamedTuple):
    """When an instruction ran."""

    rank: int
    start: float
    end: float
    instruction: Instruction


@dataclass(frozen=True)
class Simulation:
    """A step in which every instruction starts as soon as what it needs is there."""

    makespan: float
    bubble_R: tuple[float, ...]
    """Time that each rank is idle."""
    peak_live_R: tuple[int, ...]
    """The most chunks whose activations a rank holds at a time, from the start of the forward to
    the end of the backward for the weights."""
    spans: tuple[Span, ...]


def simulate(
    schedule: Schedule,
    *,
    f: float = 1.0,
    b: float = 2.0,
    w: float = 1.0,
    fb: float = 3.0,
    latency: float = 0.0,
) -> Simulation:
    """The step's time, idle times and memory.

    Args:
      f: time of a chunk's forward.
      b: of its whole backward.
      w: of the part of it for the weights.
      fb: of an overlapped pair.
      latency: until what one rank has computed is on another.

    Raises:
      ValueError: ranks wait for one another for ever.
    """
    duration = {"F": f, "B": b, "I": b - w, "W": w, "FB": fb}
    done: dict[Result, float] = {}
    clock_R, at_R = [0.0] * schedule.n_ranks, [0] * schedule.n_ranks
    spans: list[Span] = []
    while True:
        before = len(spans)
        for r, instructions in enumerate(schedule.instructions):
            while at_R[r] < len(instructions):
                instruction = instructions[at_R[r]]
                wanted = [need for op in instruction for need in needs(schedule, r, op)]
                if any(need not in done for need in wanted):
                    break
                ready = [done[n] + (latency if n[1].rank != r else 0.0) for n in wanted]
                start = max([clock_R[r], *ready])
                end = start + duration["".join(op.kind for op in instruction)]
                for op in instruction:
                    done[result(r, op)] = end
                spans.append(Span(r, start, end, instruction))
                clock_R[r], at_R[r] = end, at_R[r] + 1
        if len(spans) == before:
            break
    for r, instructions in enumerate(schedule.instructions):
        if at_R[r] < len(instructions):
            waiting = " and ".join(map(str, instructions[at_R[r]]))
            raise ValueError(f"schedule {schedule.name}: rank {r} waits for ever before {waiting}")
    makespan = max(clock_R)
    busy_R = [sum(s.end - s.start for s in spans if s.rank == r) for r in range(schedule.n_ranks)]
    return Simulation(
        makespan=makespan,
        bubble_R=tuple(makespan - busy for busy in busy_R),
        peak_live_R=tuple(_peak_live(spans, r) for r in range(schedule.n_ranks)),
        spans=tuple(spans),
    )


Result = tuple[str, Place, int]
"""What an operation leaves: `output`, an input's `gradient` or `weights`, where, of which micro."""


def result(rank: int, op: Op) -> Result:
    """What an operation leaves for others; nobody waits for a weight's gradient."""
    kind = {"F": "output", "B": "gradient", "I": "gradient", "W": "weights"}[op.kind]
    return kind, Place(rank, op.chunk), op.micro


def needs(schedule: Schedule, rank: int, op: Op) -> Iterator[Result]:
    """Results that an operation waits for."""
    place = Place(rank, op.chunk)
    if op.kind == "W":
        yield "gradient", place, op.micro
        return
    if op.kind != "F":
        yield "output", place, op.micro
    other = schedule.before(place) if op.kind == "F" else schedule.after(place)
    if other is not None:
        yield "output" if op.kind == "F" else "gradient", other, op.micro


def _peak_live(spans: list[Span], rank: int) -> int:
    changes = []
    for span in spans:
        for op in span.instruction if span.rank == rank else ():
            if op.kind == "F":
                changes.append((span.start, 1))
            elif op.kind != "I":
                changes.append((span.end, -1))
    live = peak = 0
    for _, change in sorted(changes):  # what ends frees its room for what starts then
        live += change
        peak = max(peak, live)
    return peak


_REPORTED = ("1f1b", "zb1p", "dualpipe", "dualpipev")


def reported_bubble(
    schedule: Schedule, *, f: float = 1.0, b: float = 2.0, w: float = 1.0, fb: float = 3.0
) -> float:
    """The bubble of the report's table 2, for the busiest rank.

    Exact in an event simulation if the halves of a backward are as long as a forward. Otherwise
    DualPipe's is up to about a unit smaller there; where `w` is longer than `b - w`, DualPipe's and
    ZB1P's are larger.

    Raises:
      ValueError: a schedule that the table does not have.
    """
    half = schedule.n_stages / 2 - 1
    if schedule.name == "1f1b":
        return (schedule.n_ranks - 1) * (f + b)
    if schedule.name == "zb1p":
        return (schedule.n_ranks - 1) * (f + b - 2 * w)
    if schedule.name in ("dualpipe", "dualpipev"):
        return half * (fb + b - 3 * w)
    raise ValueError(f"schedule {schedule.name}: the report's table 2 does not have it")


def reported_peak(schedule: Schedule) -> int:
    """Chunks live on a rank at most (report, table 2): PP, with DualPipe one more.

    Raises:
      ValueError: a schedule that the table does not have.
    """
    _require(schedule.name in _REPORTED, schedule.name, "the report's table 2 does not have it")
    return schedule.n_stages + ("dualpipe" in schedule.name)


# ---- Whether it is one


def check(schedule: Schedule) -> None:
    """Raises ValueError, naming the fault, unless the schedule computes a step and can be run.

    Each chunk runs every micro-batch of its direction forward once and backward once, whole or in
    halves, in this order; a pair is a forward and a whole backward of different micro-batches or
    chunks; weight gradients are computed in the order in which they were put off; messages between
    two chunks are received in the order in which they are sent; and no rank waits for ever.
    """
    name = schedule.name
    for rank, instructions in enumerate(schedule.instructions):
        put_off: deque[tuple[int, int]] = deque()
        seen: Counter[tuple[Place, int, str]] = Counter()
        for instruction in instructions:
            kinds = "".join(op.kind for op in instruction)
            _require(kinds in ("F", "B", "I", "W", "FB"), name, f"rank {rank}: {kinds} as one")
            for op in instruction:
                key = Place(rank, op.chunk), op.micro
                where = f"rank {rank}: {op.kind} of micro-batch {op.micro} in chunk {op.chunk}"
                if op.kind in "BI":
                    _require(seen[*key, "F"] == 1, name, f"{where} before its forward")
                if op.kind == "I":
                    put_off.append((op.chunk, op.micro))
                if op.kind == "W":
                    first = put_off.popleft() if put_off else None
                    _require(first == (op.chunk, op.micro), name, f"{where} is not the oldest")
                # B of a pair starts with its F, so that F cannot be the one it needs.
                side = "F" if op.kind == "F" else "W" if op.kind == "W" else "G"
                seen[*key, side] += 1
                _require(seen[*key, side] == 1, name, f"{where} is there twice")
            if kinds == "FB":
                same = instruction[0][1:] == instruction[1][1:]
                _require(not same, name, f"rank {rank}: a pair of one micro-batch's own two passes")
        _require(not put_off, name, f"rank {rank}: {len(put_off)} weight gradients never computed")
        _check_all_there(schedule, rank, seen)
    for place, other in _links(schedule):
        for kinds, way in (("F", (place, other)), ("BI", (other, place))):
            sent, received = (_order(schedule, end, kinds) for end in way)
            text = f"{way[0]} sends {kinds} in another order than {way[1]} receives"
            _require(sent == received, name, text)
    simulate(schedule)


def _check_all_there(
    schedule: Schedule, rank: int, seen: Mapping[tuple[Place, int, str], int]
) -> None:
    wanted = {
        (place, micro, side)
        for direction, path in enumerate(schedule.paths)
        for place in path
        if place.rank == rank
        for micro in schedule.micros(direction)
        for side in "FG"
    }
    found = {key for key, count in seen.items() if count and key[2] != "W"}
    for what, keys in (("misses", wanted - found), ("should not have", found - wanted)):
        for place, micro, side in sorted(keys):
            text = f"{'forward' if side == 'F' else 'backward'} of micro-batch {micro}"
            _require(False, schedule.name, f"rank {rank} {what} the {text} in chunk {place.chunk}")


def _links(schedule: Schedule) -> Iterator[tuple[Place, Place]]:
    for path in schedule.paths:
        yield from itertools.pairwise(path)


def _order(schedule: Schedule, place: Place, kinds: str) -> list[int]:
    """Micro-batches in the order in which a chunk runs them."""
    return [
        op.micro
        for instruction in schedule.instructions[place.rank]
        for op in instruction
        if op.chunk == place.chunk and op.kind in kinds
    ]


# ---- To look at


def draw(schedule: Schedule, simulation: Simulation | None = None, *, unit: float = 1.0) -> str:
    """A line a rank, time from left to right: `F3` forward of micro-batch 3, `B` and its halves `I`
    and `W`, `F3+B1` a pair; small letters are a rank's second chunk.

    Args:
      simulation: of this schedule; of durations 1, 2, 1 and 3 if not given.
      unit: time of one column.
    """
    simulation = simulation or simulate(schedule)
    width = 2 + len(str(schedule.n_micro - 1))
    lines = []
    for rank in range(schedule.n_ranks):
        line = f"{rank:3d} |"
        begin = len(line)
        for span in simulation.spans:
            if span.rank == rank:
                label = "+".join(_label(op) for op in span.instruction)
                start, end = (begin + round(t / unit) * width for t in (span.start, span.end))
                line = line.ljust(start) + label[: end - start].ljust(end - start)
        lines.append(line.rstrip())
    return "\n".join(lines)


def _label(op: Op) -> str:
    return f"{op.kind.lower() if op.chunk else op.kind}{op.micro}"
