"""Schedules in lockstep: nothing lost, nothing early, and what the ranks wait for one another."""

from typing import Any

import pytest

from tests.pipeline.schedules import made
from v3jax.pipeline import schedule as sched
from v3jax.pipeline.schedule import (
    SCHEDULES,
    Schedule,
    fitted,
    needs,
    reported_bubble,
    result,
)
from v3jax.pipeline.table import make_table
from v3jax.pipeline.ticks import Ticks, abreast, lockstep

SIZES = [(2, 4), (4, 8), (4, 30), (6, 12), (8, 16), (8, 20), (8, 40), (16, 32), (16, 120)]


def check(ticks: Ticks) -> None:
    """Every operation is there once, after what it needs."""
    schedule = ticks.schedule
    when: dict[Any, tuple[int, int]] = {}
    for s, row in enumerate(ticks.rows):
        for r, some in enumerate(row):
            for i, op in enumerate(some):
                assert result(r, op) not in when
                for need in needs(schedule, r, op):
                    # On the rank itself what a tick has just computed is there; elsewhere the next
                    # tick has it. A loss is taken between ticks.
                    own = need[1].rank == r and need[0] == "gradient"
                    assert when[need] < ((s, i) if own else (s, 0))
                when[result(r, op)] = s, i
    wanted = {
        (kind, place, micro)
        for direction, path in enumerate(schedule.paths)
        for place in path
        for micro in schedule.micros(direction)
        for kind in ("output", "gradient", "weights")
    }
    assert set(when) == wanted


@pytest.mark.parametrize("fb", [2.0, 3.0])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "n_micro"), [(4, 8), (4, 3), (8, 20), (8, 17)])
def test_ticks_hold_every_operation_once_after_what_it_needs(
    name: str, stages: int, n_micro: int, fb: float
) -> None:
    schedule = fitted(name, stages // 2 if name == "dualpipev" else stages, n_micro)
    check(lockstep(schedule, fb=fb))
    check(abreast(schedule))


@pytest.mark.parametrize("n_micro", [*range(1, 20), 24, 32, 33])
def test_any_number_of_micro_batches_takes_no_longer_than_zb1p(n_micro: int) -> None:
    limit = lockstep(sched.zb1p(8, n_micro)).makespan()
    assert lockstep(fitted("dualpipe", 8, n_micro)).makespan() <= limit
    assert lockstep(fitted("dualpipev", 4, n_micro)).makespan() / 2 <= limit


def test_ranks_that_all_run_everything() -> None:
    """DualPipe loses 18 where the others' ticks of one kind cost 6; as no kind is missing from a
    tick in between, that is what 1F1B with half the memory has: it would need twice the ticks."""
    dual, one = (abreast(SCHEDULES[name](8, 20)) for name in ("dualpipe", "1f1b"))
    assert dual.bubble() == 18
    assert max(dual.peak_live()) == 9
    assert one.bubble() > 3 * dual.bubble()
    kinds = [{op.kind for some in row for op in some} for row in dual.rows]
    assert kinds[0] == {"F"}
    assert "F" not in kinds[-1]
    assert dual.makespan() == sum(map(len, kinds))
    for row in dual.rows:
        for some in row:
            assert len({op.kind for op in some}) == len(some)


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
    [(4, 16, 4, 9), (8, 40, 0, 24), (16, 120, 0, 86)],
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


@pytest.mark.parametrize(("most", "bubble", "found"), [(None, 7, 8), (4, 10, 5), (0, 14, 1)])
def test_weight_gradients_that_may_not_wait(most: int | None, bubble: int, found: int) -> None:
    """What waits takes memory, and fills the end of the step: without, DualPipe's bubble in
    lockstep is the report's."""
    schedule = sched.dualpipe(16, 120)
    if most is not None:
        schedule = sched.with_waiting(schedule, most)
        sched.check(schedule)
    ticks = lockstep(schedule)
    check(ticks)
    assert ticks.bubble() == bubble
    assert bubble <= reported_bubble(schedule)
    assert make_table(ticks).slots["found"] == found


def test_ranks_that_wait_for_one_another_are_found() -> None:
    good = sched.dualpipe(4, 8)
    first = list(good.instructions[0])
    first.insert(0, first.pop(3))
    stuck = Schedule(good.name, good.n_micro, good.paths, (tuple(first), *good.instructions[1:]))
    with pytest.raises(ValueError, match="schedule dualpipe: rank 0 waits for ever before Op"):
        lockstep(stuck)
