"""Tables, run by a machine that only names what it computes: every value is where it is wanted."""

from typing import Any

import numpy as np
import pytest

from tests.pipeline import schedules
from v3jax.pipeline import table as tables
from v3jax.pipeline.schedule import SCHEDULES, Place, fitted, forwards, reported_peak
from v3jax.pipeline.table import FORWARD, INPUTS, WEIGHTS, Table, make_table
from v3jax.pipeline.ticks import abreast, lockstep

SIZES = [(2, 4), (4, 8), (4, 14), (8, 20)]


def made(name: str, stages: int, n_micro: int, **options: Any) -> Table:
    return make_table(lockstep(schedules.made(name, stages, n_micro), **options))


class Machine:
    """Ranks with slots, in which lie names such as `("y", direction, stage, micro)`."""

    def __init__(self, table: Table) -> None:
        self.table, self.schedule = table, table.schedule
        self.ranks: list[dict[str, list[Any]]] = [
            {name: [None] * n for name, n in table.slots.items()}
            for _ in range(self.schedule.n_ranks)
        ]
        self.sent: dict[tuple[int, str], Any] = {}
        self.weights: list[Any] = []

    def field(self, name: str, tick: int, rank: int) -> int:
        return int(self.table.ranks[name][tick, rank])

    def run(self) -> None:
        for tick in range(self.table.n_ticks):
            self.arrive(tick)
            sent: dict[tuple[int, str], Any] = {}
            ends = {"enter": [], "loss": [], "back": [], "leave": []}
            for rank in range(self.schedule.n_ranks):
                self.tick(tick, rank, sent, ends)
            self.sent = sent
            for name, wanted in ends.items():
                row = getattr(self.table, f"{name}_SD")[tick]
                assert {(d, int(m)) for d, m in enumerate(row) if m >= 0} == set(wanted)

    def arrive(self, tick: int) -> None:
        for rank, slots in enumerate(self.ranks):
            for what in "xg":
                for side, other in (("left", rank - 1), ("right", rank + 1), ("here", rank)):
                    slot = self.field(f"{what}_{side}", tick, rank)
                    if slot >= 0:
                        slots[what][slot] = self.sent[other, what]

    def tick(self, tick: int, rank: int, sent: Any, ends: Any) -> None:
        slots, schedule = self.ranks[rank], self.schedule
        run = self.field("run", tick, rank)
        if run & FORWARD:
            place = Place(rank, self.field("f_chunk", tick, rank))
            direction, stage = schedule.direction(place), schedule.stage(place)
            micro = self.field("f_micro", tick, rank)
            if stage:
                got = slots["x"][self.field("f_x", tick, rank)]
                assert got == ("y", direction, stage - 1, micro)
            else:
                assert self.field("f_x", tick, rank) == -1
                ends["enter"].append((direction, micro))
            slots["saved"][self.field("f_saved", tick, rank)] = (direction, stage, micro)
            if schedule.after(place) is None:
                ends["loss"].append((direction, micro))
                slots["loss"][self.field("loss", tick, rank)] = ("g", direction, stage + 1, micro)
            else:
                sent[rank, "x"] = ("y", direction, stage, micro)
        if run & INPUTS:
            place = Place(rank, self.field("i_chunk", tick, rank))
            direction, stage = schedule.direction(place), schedule.stage(place)
            micro = self.field("i_micro", tick, rank)
            last = schedule.after(place) is None
            kind, field = ("loss", "i_loss") if last else ("g", "i_g")
            got = slots[kind][self.field(field, tick, rank)]
            assert got == ("g", direction, stage + 1, micro)
            if last:
                ends["back"].append((direction, micro))
            name = (direction, stage, micro)
            assert slots["saved"][self.field("i_saved", tick, rank)] == name
            slots["found"][self.field("i_found", tick, rank)] = name
            if stage:
                sent[rank, "g"] = ("g", direction, stage, micro)
            else:
                ends["leave"].append((direction, micro))
        if run & WEIGHTS:
            saved = slots["saved"][self.field("w_saved", tick, rank)]
            assert saved == slots["found"][self.field("w_found", tick, rank)]
            place = Place(rank, self.field("w_chunk", tick, rank))
            assert saved[:2] == (schedule.direction(place), schedule.stage(place))
            self.weights.append(saved)


@pytest.mark.parametrize("fb", [1.5, 3.0])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "n_micro"), SIZES)
def test_every_value_is_where_it_is_wanted(name: str, stages: int, n_micro: int, fb: float) -> None:
    check(made(name, stages, n_micro, fb=fb))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n_micro", [1, 3, 6, 9])
def test_few_or_odd_micro_batches_and_masked_ticks(name: str, n_micro: int) -> None:
    schedule = fitted(name, 4, n_micro)
    check(make_table(lockstep(schedule)))
    check(make_table(abreast(schedule)))


def check(table: Table) -> None:
    machine = Machine(table)
    machine.run()
    schedule = table.schedule
    wanted = [
        (direction, stage, micro)
        for direction in range(len(schedule.paths))
        for stage in range(schedule.n_stages)
        for micro in schedule.micros(direction)
    ]
    assert sorted(machine.weights) == wanted


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_forwards_alone_keep_nothing(name: str) -> None:
    schedule = forwards(fitted(name, 4, 5))
    table = make_table(lockstep(schedule))
    assert table.slots["saved"] == table.slots["found"] == table.slots["loss"] == 0
    assert (table.ranks["run"] & ~FORWARD == 0).all()
    assert sorted(table.loss_SD[table.loss_SD >= 0]) == list(range(5))
    assert (table.back_SD == -1).all()
    assert table.n_ticks <= 5 * schedule.n_stages / 4 + 7


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
@pytest.mark.parametrize(("stages", "n_micro"), [*SIZES, (16, 120)])
def test_slots_are_as_few_as_the_report_says(name: str, stages: int, n_micro: int) -> None:
    table = made(name, stages, n_micro)
    assert table.slots["saved"] <= reported_peak(table.schedule)
    assert table.slots["found"] <= table.slots["saved"]
    assert table.slots["x"] <= table.slots["saved"]


def test_a_slot_in_use_is_not_given_again() -> None:
    slots, ticks = tables._Slots(), np.full((6, 1), -1, np.int32)
    for first, last in ((0, 2), (2, 3), (3, 4), (1, 5)):
        slots.ask(first, last, (ticks, first, 0))
    slots.give()
    assert slots.count == 3
    assert ticks[:4, 0].tolist() == [0, 1, 2, 0], "what ends in a tick still lies there"


def test_the_machine_sees_a_wrong_slot() -> None:
    table = made("dualpipe", 4, 8)
    used = np.argwhere(table.ranks["f_x"] > 0)[0]
    table.ranks["f_x"][tuple(used)] = 0
    with pytest.raises(AssertionError):
        Machine(table).run()
