"""What a pipeline's ranks are told: orders for every number of micro-batches, and their sums."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from experiments.tiny import v3_tiny, v3_tiny_pipe
from experiments.v3 import v3_full
from v3jax.config import ExperimentConfig, PipelineConfig
from v3jax.pipeline.plan import ENDS, evaluation_plan, idle_share, plan_of, shares, table_of
from v3jax.pipeline.table import FORWARD, INPUTS, WEIGHTS


def long(schedule: Any = "dualpipe", **options: Any) -> ExperimentConfig:
    """v3_tiny_pipe with 5 to 16 micro-batches."""
    tiny = v3_tiny_pipe()
    return replace(
        tiny,
        batch=replace(tiny.batch, start=20, end=64),
        pipeline=PipelineConfig(schedule=schedule, **options),
    )


def test_an_experiment_without_stages_has_no_plan() -> None:
    assert plan_of(v3_tiny()) is None
    assert shares(v3_tiny()) == {}
    assert idle_share(v3_tiny()) == 0


@pytest.mark.parametrize("mode", ["branches", "masked"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipe"])
def test_orders_of_all_steps_have_one_shape_and_fit_the_slots(schedule: str, mode: str) -> None:
    plan = plan_of(long(schedule, mode=mode))
    assert plan is not None
    shapes = set()
    for n_micro in range(5, 17):
        orders = plan.orders(n_micro)
        shapes.add(tuple(a.shape for a in (*orders.ranks.values(), *orders.ends.values())))
        assert orders.n_micro == n_micro
        assert orders.n_ticks <= plan.n_rows
        run_SR = orders.ranks["run"][: orders.n_ticks]
        assert not orders.ranks["run"][orders.n_ticks :].any()
        for bit in (FORWARD, INPUTS, WEIGHTS):
            assert ((run_SR & bit > 0).sum(0) == n_micro).all()
            np.testing.assert_array_equal(
                orders.any_S[: orders.n_ticks] & bit > 0, (run_SR & bit > 0).any(1)
            )
        slots = {"f_saved": "saved", "i_found": "found", "f_x": "x", "i_g": "g", "i_loss": "loss"}
        for field, pool in slots.items():
            assert orders.ranks[field].max() < plan.slots[pool]
        for name in ENDS:
            told = orders.ends[name][: orders.n_ticks]
            assert sorted(told[told >= 0]) == list(range(n_micro))
    assert len(shapes) == 1


def test_messages_that_no_schedule_sends_are_not_sent() -> None:
    one, both = (plan_of(long(s)) for s in ("1f1b", "dualpipe"))
    assert one is not None
    assert both is not None
    assert one.sides == {"x_left", "g_right"}
    assert both.sides == {"x_left", "x_right", "g_left", "g_right"}


def test_held_out_rows_go_forward_alone() -> None:
    plan = evaluation_plan(long(), 6)
    assert not plan.backward
    assert plan.slots["saved"] == 0
    orders = plan.orders(6)
    assert set(np.unique(orders.ranks["run"])) <= {0, FORWARD}


@pytest.mark.parametrize("pair_time", [2.0, 3.0])
def test_shares_of_a_middle_rank_add_up_to_its_work(pair_time: float) -> None:
    cfg = long(pair_time=pair_time)
    n_ticks = table_of(cfg.pipeline, 4, 16).n_ticks
    found = shares(cfg)
    pairs = found["pair"] * n_ticks
    assert (pairs > 4) == (pair_time < 3)
    for name in ("forward", "inputs", "weights"):
        assert pairs + found[name] * (n_ticks - pairs) == pytest.approx(16)
    assert found["keep"] * n_ticks == pytest.approx(16)
    assert found["one_of"] * n_ticks == pytest.approx(8)


def test_the_full_runs_bubble() -> None:
    """DualPipe's of the report is 14 of 374; without waiting weight gradients it is that here."""
    full = v3_full()
    alone = replace(full, pipeline=replace(full.pipeline, pair_time=3.0))
    assert idle_share(alone) == pytest.approx(14 / 374)
    quick = replace(full, pipeline=PipelineConfig())
    assert idle_share(quick) == pytest.approx(7 / 367)
