"""The mixture of experts against a loop over tokens and chosen experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from tests.reference import balance, routing
from tests.reference.moe import moe as reference
from v3jax.config import ModelConfig
from v3jax.model.moe import MoE, RouterStats

CFG = small.CONFIG


def weights(cfg: ModelConfig = CFG) -> dict:
    return small.block_params(np.random.default_rng(0), cfg, (), moe=True)["mlp"]


def draw() -> tuple[np.ndarray, np.ndarray]:
    """Inputs [B, T, D] and a bias that makes many biased scores negative."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(2, 11, CFG.dim)), rng.normal(-0.4, 0.5, CFG.n_experts)


def run(
    p: dict,
    x: np.ndarray,
    bias: np.ndarray,
    counted: np.ndarray | None = None,
    cfg: ModelConfig = CFG,
) -> tuple[jax.Array, RouterStats]:
    variables = {
        "params": small.to_jax(p),
        "router_state": {"e_score_correction_bias": jnp.asarray(bias, jnp.float32)},
    }
    mask = None if counted is None else jnp.asarray(counted)
    return small.apply(MoE(*small.parts(cfg)), variables, jnp.asarray(x, jnp.float32), mask)


@pytest.mark.parametrize("n_shared", [0, 1, 2])
def test_output_equals_the_reference(n_shared: int) -> None:
    cfg = small.config(n_shared_experts=n_shared)
    p, (x, bias) = weights(cfg), draw()
    wanted = [reference(row, p, bias, cfg)[0] for row in x]
    np.testing.assert_allclose(run(p, x, bias, cfg=cfg)[0], wanted, rtol=1e-4, atol=2e-5)


def test_loads_and_balance_loss_equal_the_reference_without_padding_tokens() -> None:
    p, (x, bias) = weights(), draw()
    counted = np.random.default_rng(2).random((2, 11)) < 0.7
    _, stats = run(p, x, bias, counted)
    loads, losses = np.zeros(CFG.n_experts, int), 0.0
    for row, mask in zip(x, counted, strict=True):
        _, scores, chosen = reference(row, p, bias, CFG)
        loads += routing.load(chosen, CFG.n_experts, mask)
        losses += balance.sequence_loss(scores, CFG.top_k, mask)
    np.testing.assert_array_equal(stats.load_E, loads)
    assert stats.load_E.dtype == jnp.int32
    assert float(stats.balance_loss) == pytest.approx(losses, rel=1e-5)


def test_loads_sum_to_tokens_times_top_k() -> None:
    p, (x, bias) = weights(), draw()
    assert int(run(p, x, bias)[1].load_E.sum()) == 2 * 11 * CFG.top_k


def test_no_token_is_dropped_when_all_choose_the_same_experts() -> None:
    p, (x, bias) = weights(), draw()
    bias[[3, 4, 5]] += 50.0
    out, stats = run(p, x, bias)
    wanted = [reference(row, p, bias, CFG)[0] for row in x]
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(stats.load_E)[[3, 4, 5]], [22, 22, 22])


def test_gradients_equal_finite_differences_of_the_reference() -> None:
    x, bias = draw()
    tree = {"x": x, "p": weights()}
    probe = np.random.default_rng(4).normal(size=x.shape)

    def slow(t: dict) -> float:
        return sum(
            float(np.sum(w * reference(row, t["p"], bias, CFG)[0]))
            for w, row in zip(probe, t["x"], strict=True)
        )

    def fast(t: dict) -> jax.Array:
        state = {"e_score_correction_bias": jnp.asarray(bias, jnp.float32)}
        out, _ = small.apply(
            MoE(*small.parts(CFG)), {"params": t["p"], "router_state": state}, t["x"], None
        )
        return jnp.sum(jnp.asarray(probe, jnp.float32) * out)

    small.assert_same_derivatives(jax.jit(jax.grad(fast))(small.to_jax(tree)), slow, tree)


def test_the_router_works_in_fp32_below_bf16_activations() -> None:
    p, (x, bias) = weights(), draw()
    variables = {
        "params": small.to_jax(p),
        "router_state": {"e_score_correction_bias": jnp.asarray(bias, jnp.float32)},
    }
    low = jnp.asarray(x, jnp.bfloat16)
    out, stats = small.apply(MoE(*small.parts(CFG, compute="bf16")), variables, low, None)
    rounded = np.asarray(low, np.float64)
    chosen = [reference(row, p, bias, CFG)[2] for row in rounded]
    np.testing.assert_array_equal(stats.load_E, sum(routing.load(c, CFG.n_experts) for c in chosen))
    wanted = np.stack([reference(row, p, bias, CFG)[0] for row in rounded])
    assert out.dtype == jnp.bfloat16
    assert np.abs(np.asarray(out, np.float32) - wanted).max() < 0.05 * np.abs(wanted).max()
