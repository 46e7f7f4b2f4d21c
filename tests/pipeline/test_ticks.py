"""Schedules in lockstep: nothing lost, nothing early, and what the ranks wait for one another."""

from typing import Any

import pytest

from tests.pipeline.schedules import made
from v3jax.pipeline import schedule as sched
from v3jax.pipeline.schedule import SCHEDULES, Schedule, needs, reported_bubble, result
from v3jax.pipeline.ticks import lockstep

SIZES = [(2, 4), (4, 8), (4, 30), (6, 12), (8, 16), (8, 20), (8, 40), (16, 32), (16, 120)]


@pytest.mark.parametrize("fb", [2.0, 3.0])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "n_micro"), [(4, 8), (8, 20)])
def test_ticks_hold_every_operation_once_after_what_it_needs(
    name: str, stages: int, n_micro: int, fb: float
) -> None:
    schedule = made(name, stages, n_micro)
    ticks = lockstep(schedule, fb=fb)
    when: dict[Any, tuple[int, int]] = {}
    for s, row in enumerate(ticks.rows):
        for r, some in enumerate(row):
            for i, op in enumerate(some):
                assert result(r, op) not in when
                for need in needs(schedule, r, op):
                    # On the rank itself what a tick has just computed is there; elsewhere the next
                    # tick has it.
                    assert when[need] < ((s, i) if need[1].rank == r else (s, 0))
                when[result(r, op)] = s, i
    wanted = {
        (kind, place, micro)
        for direction, path in enumerate(schedule.paths)
        for place in path
        for micro in schedule.micros(direction)
        for kind in ("output", "gradient", "weights")
    }
    assert set(when) == wanted


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
@pytest.mark.parametrize(("stages", "n_micro"), SIZES)
def test_lockstep_costs_no_more_than_the_reports_bubble(
    name: str, stages: int, n_micro: int
) -> None:
    """Less even: outputs do not wait for the rest of a pair, nor gradients for the weights'."""
    schedule = made(name, stages, n_micro)
    ticks = lockstep(schedule)
    share = {"1f1b": 2 / 3, "zb1p": 1.0, "dualpipe": 0.5, "dualpipev": 0.5}[name]
    assert ticks.bubble() == share * reported_bubble(schedule)
    assert max(ticks.peak_live()) <= sched.reported_peak(schedule)


@pytest.mark.parametrize(
    ("stages", "n_micro", "plain", "patient"),
    [(4, 16, 5, 9), (8, 40, 13, 24), (16, 120, 45, 86)],
)
def test_ranks_wait_for_pairs_where_overlap_pays(
    stages: int, n_micro: int, plain: int, patient: int
) -> None:
    schedule = sched.dualpipe(stages, n_micro)
    ticks, waiting = lockstep(schedule), lockstep(schedule, fb=1.5)
    assert (ticks.n_pairs, waiting.n_pairs) == (plain, patient)
    assert ticks.makespan() - ticks.makespan(fb=2.5) == pytest.approx(0.5 * plain)
    assert waiting.makespan(fb=1.5) < ticks.makespan(fb=1.5)
    assert waiting.makespan() - ticks.makespan() <= 5, "what the waiting costs, without overlap"
    if stages >= 8:
        assert waiting.bubble() <= 1.25 * reported_bubble(schedule)


def test_ranks_that_wait_for_one_another_are_found() -> None:
    good = sched.dualpipe(4, 8)
    first = list(good.instructions[0])
    first.insert(0, first.pop(3))
    stuck = Schedule(good.name, good.n_micro, good.paths, (tuple(first), *good.instructions[1:]))
    with pytest.raises(ValueError, match="schedule dualpipe: rank 0 waits for ever before Op"):
        lockstep(stuck)
