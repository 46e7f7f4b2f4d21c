"""One training step: accumulation, the commit, biases, the batch ramp, and the full-size model.

Dims: M micro-batches, B sequences, S = T + 1 row, L MoE layers, E experts.
"""

import functools
import math
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.v3 import v3_full
from tests.model import small
from tests.reference.loss import Objective, counted
from tests.reference.loss import objective as reference
from tests.reference.transformer import forward
from v3jax import objective
from v3jax.config import ExperimentConfig
from v3jax.model import transformer
from v3jax.optim.ema import update_ema
from v3jax.optim.router_bias import proportional
from v3jax.sharding import abstract_mesh, make_mesh
from v3jax.state import (
    TrainState,
    abstract_state,
    catch_up,
    init_state,
    layer_biases,
    state_shardings,
    with_layer_biases,
)
from v3jax.step import abstract_amount, make_eval_step, make_train_step

BASE = small.experiment(small.config(n_layers=1, n_dense_layers=0, mtp_depth=1))
CFG = replace(BASE, optim=replace(BASE.optim, warmup_steps=10, weight_decay=0.0))
WARM = 10
M, B = 3, 2
GAMMA = 0.01


@functools.cache
def step_of(cfg: ExperimentConfig) -> Any:
    return make_train_step(cfg, make_mesh(cfg.mesh))


@functools.cache
def fresh(cfg: ExperimentConfig) -> TrainState:
    return init_state(cfg, make_mesh(cfg.mesh))


def state_of(cfg: ExperimentConfig) -> TrainState:
    """A state past warm-up with the small model's large random weights and biases."""
    state = fresh(cfg)
    params = small.to_jax(small.params(cfg.model))
    changed = replace(
        state,
        step=jnp.int32(WARM),
        params=params,
        router_state=small.to_jax(small.router_state(cfg.model)),
        ema=None if state.ema is None else jax.tree.map(jnp.copy, params),
        averaged=jnp.int32(WARM),
    )
    return jax.device_put(changed, state_shardings(cfg, make_mesh(cfg.mesh)))


def micro_batches(m: int = M, b: int = B, padding: int = 3) -> tuple[np.ndarray, np.ndarray]:
    tokens, segments = small.batch(CFG, m * b, padding=padding)
    return tokens.reshape(m, b, -1), segments.reshape(m, b, -1)


def run(
    cfg: ExperimentConfig, state: TrainState, tokens: np.ndarray, segments: np.ndarray, n: int
) -> tuple[TrainState, dict]:
    """One step on a copy, so that the caller's state outlives the donation."""
    places = state_shardings(cfg, make_mesh(cfg.mesh))
    copy = jax.device_put(jax.tree.map(jnp.copy, state), places)
    return step_of(cfg)(copy, jnp.asarray(tokens), jnp.asarray(segments), jnp.int32(n))


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def expected(cfg: ExperimentConfig, tokens: np.ndarray, segments: np.ndarray) -> Objective:
    """The reference's objective of all micro-batches as one batch."""
    params, router = small.params(cfg.model), small.router_state(cfg.model)
    width = tokens.shape[-1]
    rows = tokens.reshape(-1, width), segments.reshape(-1, width)
    return reference(params, router, *rows, cfg.model, 0.3, 0.05)


def test_metrics_equal_the_reference_on_the_whole_batch() -> None:
    tokens, segments = micro_batches()
    _, metrics = run(CFG, state_of(CFG), tokens, segments, M)
    wanted = expected(CFG, tokens, segments)
    assert float(metrics["loss"]) == pytest.approx(wanted.main, rel=1e-4)
    assert float(metrics["mtp_loss"]) == pytest.approx(wanted.mtp, rel=1e-4)
    assert float(metrics["balance_loss"]) == pytest.approx(0.05 * wanted.balance, rel=1e-4)
    assert float(metrics["mtp_weight"]) == pytest.approx(0.3)
    assert int(metrics["committed"]) == 1
    assert int(metrics["step"]) == WARM + 1
    assert int(metrics["sequences"]) == M * B


def test_accumulated_micro_batches_equal_one_large_batch() -> None:
    tokens, segments = micro_batches()
    state = state_of(CFG)
    many, metrics = run(CFG, state, tokens, segments, M)
    large = tokens.reshape(1, M * B, -1), segments.reshape(1, M * B, -1)
    one, wanted = run(CFG, state, *large, 1)
    assert float(metrics["grad_norm"]) == pytest.approx(float(wanted["grad_norm"]), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-6)
    np.testing.assert_array_equal(metrics["load_LE"], wanted["load_LE"])
    assert bits(many.router_state) == bits(one.router_state)
    for a, b in zip(moments(many), moments(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6)


def moments(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(state.opt_state) if x.ndim]


def test_micro_batches_beyond_the_count_change_nothing() -> None:
    tokens, segments = micro_batches()
    state = state_of(CFG)
    junk = tokens.copy()
    junk[2] = 7
    a, _ = run(CFG, state, tokens, segments, 2)
    b, _ = run(CFG, state, junk, segments, 2)
    assert bits(a) == bits(b)
    three, _ = run(CFG, state, junk, segments, 3)
    assert bits(three.params) != bits(a.params)


def test_the_batch_size_ramp_compiles_once() -> None:
    tokens, segments = micro_batches()
    step = step_of(CFG)
    before = step._cache_size()
    state = jax.tree.map(jnp.copy, fresh(CFG))
    for n, size in ((1, 2), (2, 6), (3, 12)):
        state, metrics = step(state, tokens, segments, jnp.int32(n))
        assert int(metrics["sequences"]) == size
    assert step._cache_size() == before + 1


def test_every_bias_moves_once_a_step_by_the_load_of_the_whole_batch() -> None:
    tokens, segments = micro_batches()
    state = state_of(CFG)
    new, metrics = run(CFG, state, tokens, segments, M)
    params, router = small.params(CFG.model), small.router_state(CFG.model)
    loads = np.zeros((2, CFG.model.n_experts), int)
    for row, segs in zip(tokens.reshape(M * B, -1), segments.reshape(M * B, -1), strict=True):
        out = forward(params, router, row, CFG.model)
        for layer, stats in enumerate(out.stats + out.mtp_stats):
            chosen = stats.chosen_TK[counted(segs, len(stats.chosen_TK))]
            loads[layer] += np.bincount(chosen.ravel(), minlength=12)
    assert metrics["load_LE"].dtype == jnp.int32
    np.testing.assert_array_equal(metrics["load_LE"], loads)
    assert loads[0].sum() == (M * B * 9 - 2) * CFG.model.top_k
    sign = np.sign(loads.mean(1, keepdims=True) - loads)
    wanted = np.float32(GAMMA) * sign.astype(np.float32) + np.asarray(
        layer_biases(state.router_state)
    )
    np.testing.assert_allclose(layer_biases(new.router_state), wanted, rtol=1e-6)
    assert np.abs(sign[-1]).sum() > 0  # the prediction module's too
    violation = ((loads.max(1) - loads.mean(1)) / loads.mean(1)).mean()
    assert float(metrics["max_violation"]) == pytest.approx(violation, rel=1e-5)


@pytest.mark.parametrize("depth", [1, 12])
def test_biases_are_stacked_in_the_order_of_the_loads(depth: int) -> None:
    model = small.config(mtp_depth=depth)
    state = small.router_state(model)
    wanted = [*state["moe_layers"]["mlp"]["e_score_correction_bias"]]
    wanted += [
        state[f"mtp_layers_{k}"]["block"]["mlp"]["e_score_correction_bias"] for k in range(depth)
    ]
    stacked = layer_biases(small.to_jax(state))
    np.testing.assert_allclose(stacked, np.array(wanted), rtol=1e-6)
    back = with_layer_biases(small.to_jax(state), stacked)
    assert bits(back) == bits(small.to_jax(state))


def poisoned(state: TrainState) -> TrainState:
    """Token 7 has an embedding that overflows; a batch with it is non-finite."""
    embed = state.params["embed_tokens"].at[7].set(jnp.inf)
    return replace(state, params=state.params | {"embed_tokens": embed})


def test_a_step_with_a_non_finite_loss_commits_nothing_at_all() -> None:
    tokens, segments = micro_batches()
    tokens[1, 0, 4] = 7
    before = replace(poisoned(state_of(CFG)), sequences=jnp.uint32(40))
    after, metrics = run(CFG, before, tokens, segments, M)
    assert int(metrics["committed"]) == 0
    assert int(after.bad_steps) == 1
    assert bits(replace(after, bad_steps=before.bad_steps)) == bits(before)
    again, _ = run(CFG, after, tokens, segments, M)
    assert int(again.bad_steps) == 2
    assert bits(replace(again, bad_steps=before.bad_steps)) == bits(before)


def test_a_step_with_a_finite_loss_and_a_non_finite_gradient_commits_nothing() -> None:
    tokens, segments = micro_batches()
    cfg = replace(CFG, name="bad_gradient")
    original = objective.loss

    def spoilt(
        cfg: ExperimentConfig, params: Any, *rest: Any, **more: Any
    ) -> tuple[jax.Array, Any]:
        total, parts = original(cfg, params, *rest, **more)
        return total + jnp.sqrt(0 * jnp.sum(params["norm"])), parts

    before = state_of(cfg)
    with mock.patch.object(objective, "loss", spoilt):
        after, metrics = run(cfg, before, tokens, segments, M)
    assert np.isfinite(float(metrics["loss"]))
    assert int(metrics["committed"]) == 0
    assert bits(replace(after, bad_steps=before.bad_steps)) == bits(before)


@pytest.mark.slow
def test_layers_in_a_loop_give_the_step_of_unrolled_ones() -> None:
    """Their gradients are added up layer by layer instead of leaf by leaf."""
    tokens, segments = micro_batches()
    cfg = replace(CFG, model=small.config(n_layers=4, n_dense_layers=2), name="unrolled")
    after, metrics = run(cfg, state_of(cfg), tokens, segments, M)
    looped = replace(cfg, name="looped")
    with mock.patch.object(transformer, "_UNROLLED", 0):
        again, others = run(looped, state_of(looped), tokens, segments, M)
    assert float(others["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    for a, b in zip(moments(after), moments(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_a_good_step_after_bad_ones_commits_everything_and_clears_their_count() -> None:
    tokens, segments = micro_batches()
    before = replace(state_of(CFG), bad_steps=jnp.int32(3))
    after, _ = run(CFG, before, tokens, segments, M)
    assert int(after.bad_steps) == 0
    after = catch_up(CFG, after, make_mesh(CFG.mesh))
    for name in ("params", "opt_state", "router_state", "ema"):
        pairs = zip(bits(getattr(before, name)), bits(getattr(after, name)), strict=True)
        assert all(a != b for a, b in pairs), name


def test_parameters_and_average_move_by_the_learning_rate() -> None:
    tokens, segments = micro_batches()
    before = state_of(CFG)
    after, metrics = run(CFG, before, tokens, segments, M)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after.params, before.params)
    largest = max(float(x) for x in jax.tree.leaves(moved))
    assert largest == pytest.approx(float(metrics["lr"]), rel=1e-2)
    _, again = run(CFG, after, tokens, segments, M)
    assert float(again["loss"]) < float(metrics["loss"])
    decay = CFG.optim.ema_decay
    assert decay is not None
    old, new = (np.asarray(s.params["lm_head"]) for s in (before, after))
    after = catch_up(CFG, jax.tree.map(jnp.copy, after), make_mesh(CFG.mesh))
    np.testing.assert_allclose(
        after.ema["lm_head"], decay * old + (1 - decay) * new, rtol=1e-6, atol=1e-7
    )


def test_the_average_lags_by_one_update_and_catches_up_to_the_last_bit() -> None:
    mesh, decay = make_mesh(CFG.mesh), CFG.optim.ema_decay
    assert decay is not None
    good = micro_batches()
    state = state_of(CFG)
    wanted = state.ema
    synchronous = jax.jit(lambda ema, params: update_ema(ema, params, decay))
    for spoilt in (False, False, True, False):  # a step that commits nothing among the others
        before = state
        state, _ = run(_spoilt(CFG) if spoilt else CFG, state, *good, M)
        assert int(state.averaged) == int(before.step)
        assert bits(state.ema) == bits(wanted)
        if not spoilt:
            wanted = synchronous(wanted, state.params)
        assert int(state.step) == int(before.step) + (not spoilt)
        caught = catch_up(CFG, jax.tree.map(jnp.copy, state), mesh)
        assert bits(caught.ema) == bits(wanted)
        assert bits(catch_up(CFG, caught, mesh).ema) == bits(wanted)  # once is enough


def _spoilt(cfg: ExperimentConfig) -> ExperimentConfig:
    """Whose steps are never finite."""
    return replace(cfg, mtp_weight=((math.inf, math.nan),))


def test_warm_up_starts_at_zero_and_counts_committed_steps() -> None:
    tokens, segments = micro_batches()
    before = replace(state_of(CFG), step=jnp.int32(0))
    after, metrics = run(CFG, before, tokens, segments, M)
    assert float(metrics["lr"]) == 0.0
    assert bits(after.params) == bits(before.params)
    _, metrics = run(CFG, after, tokens, segments, M)
    assert float(metrics["lr"]) == pytest.approx(CFG.optim.phases[0].lr / WARM, rel=1e-5)


def strategy(name: Any, alpha: float = 0.05) -> ExperimentConfig:
    balance = replace(CFG.balance, strategy=name, sequence_alpha=alpha, aux_alpha=0.2)
    return replace(CFG, balance=balance)


def test_balance_strategies_differ_in_bias_and_balance_term_only() -> None:
    tokens, segments = (x.reshape(1, M * B, -1) for x in micro_batches())
    names = ("loss_free", "aux_loss", "none")
    state = state_of(CFG)
    results = {n: run(strategy(n), state, tokens, segments, 1) for n in names}
    free_state, free = results["loss_free"]
    for n in names[1:]:
        new, metrics = results[n]
        for key in ("loss", "mtp_loss", "lr", "mtp_weight", "load_LE", "max_violation"):
            np.testing.assert_allclose(metrics[key], free[key], rtol=1e-6)
        assert float(metrics["bias_speed"]) == 0.0
        assert bits(new.router_state) == bits(state.router_state)
    assert bits(free_state.router_state) != bits(state.router_state)
    assert float(results["none"][1]["balance_loss"]) == 0.0
    assert float(results["aux_loss"][1]["balance_loss"]) == pytest.approx(
        4 * float(free["balance_loss"]), rel=1e-5
    )
    silent, _ = run(strategy("loss_free", 0.0), state, tokens, segments, 1)
    for a, b in zip(moments(silent), moments(results["none"][0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_the_bias_moves_by_the_rule_that_is_named() -> None:
    tokens, segments = (x.reshape(1, M * B, -1) for x in micro_batches())
    state = state_of(CFG)
    load = run(CFG, state, tokens, segments, 1)[1]["load_LE"]
    balance = replace(CFG.balance, bias_rule="proportional")
    new, metrics = run(replace(CFG, balance=balance), state, tokens, segments, 1)
    wanted = proportional(layer_biases(state.router_state), load, metrics["bias_speed"])
    np.testing.assert_allclose(layer_biases(new.router_state), wanted, rtol=1e-6)
    assert float(metrics["bias_mean"]) == pytest.approx(float(wanted.mean()), rel=1e-5)
    ranges = np.ptp(np.asarray(wanted), axis=1)
    assert float(metrics["bias_spread"]) == pytest.approx(ranges.mean(), rel=1e-5)


def test_an_unknown_bias_rule_is_named_before_anything_is_traced() -> None:
    balance = replace(CFG.balance, bias_rule="signs")
    with pytest.raises(ValueError, match="no rule 'signs'; did you mean sign"):
        make_train_step(replace(CFG, balance=balance))


def test_the_batch_loss_counts_each_micro_batch_by_its_sequences() -> None:
    balance = replace(CFG.balance, strategy="aux_loss", aux_alpha=0.2, loss_over="batch")
    cfg = replace(CFG, balance=balance)
    tokens, segments = micro_batches()
    state = state_of(cfg)
    apart = run(cfg, state, tokens, segments, M)[1]["balance_loss"]
    alone = [
        run(cfg, state, np.roll(tokens, -m, 0), np.roll(segments, -m, 0), 1)[1]["balance_loss"]
        for m in range(M)
    ]
    assert float(apart) == pytest.approx(np.mean(alone), rel=1e-5)


def test_balance_strategies_start_from_the_same_weights() -> None:
    free, none = (init_state(strategy(n), make_mesh(CFG.mesh)) for n in ("loss_free", "none"))
    assert bits(free) == bits(none)


def test_evaluation_step_gives_nats_and_targets() -> None:
    tokens, segments = micro_batches(1)
    state = state_of(CFG)
    nll, count = make_eval_step(CFG)(state.params, state.router_state, tokens[0], segments[0])
    wanted = expected(CFG, tokens, segments)
    assert int(count) == 2 * 9 - 3
    assert float(nll) / int(count) == pytest.approx(wanted.main, rel=1e-4)


def test_bf16_compute_keeps_fp32_state_and_comes_close() -> None:
    # Every expert is chosen, so that rounding cannot change a choice.
    model = small.config(n_layers=1, n_dense_layers=0, mtp_depth=1, top_k=12, top_groups=4)
    low = replace(CFG, model=model, numerics=small.numerics(compute="bf16", moments="bf16"))
    tokens, segments = micro_batches()
    after, metrics = run(low, state_of(low), tokens, segments, M)
    wanted = expected(low, tokens, segments)
    assert float(metrics["loss"]) == pytest.approx(wanted.main, rel=5e-3)
    assert float(metrics["mtp_loss"]) == pytest.approx(wanted.mtp, rel=5e-3)
    for tree in (after.params, after.router_state, after.ema):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    assert {x.dtype for x in moments(after)} == {jnp.dtype(jnp.bfloat16)}


def count(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def test_full_model_has_the_reports_parameter_counts_to_the_unit() -> None:
    cfg = v3_full()
    state = abstract_state(cfg, abstract_mesh(cfg.mesh))
    mtp = count(state.params["mtp_layers_0"]) + count(state.router_state["mtp_layers_0"])
    assert mtp == 11_610_068_224
    main = count(state.params) + count(state.router_state) - mtp
    assert main == 671_026_419_200
    assert count(state.ema) == count(state.params)


def test_full_step_lowers_under_the_abstract_mesh_of_its_real_size() -> None:
    cfg = v3_full()
    mesh = abstract_mesh(cfg.mesh)
    assert mesh.size == 2048
    n_micro = cfg.batch.end // cfg.batch.micro_batch
    rows = jax.ShapeDtypeStruct((n_micro, cfg.batch.micro_batch, cfg.data.seq_len + 1), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = make_train_step(cfg, mesh).trace(
            abstract_state(cfg, mesh), rows, rows, abstract_amount(cfg, mesh)
        )
        lowered = traced.lower(lowering_platforms=("cuda",))
    new, metrics = lowered.out_info
    assert metrics["load_LE"].shape == (59, 256)
    assert count(new.params) == count(abstract_state(cfg, mesh).params)
    assert '"expert"=8' in lowered.as_text()
