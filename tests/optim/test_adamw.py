"""AdamW with BF16 and FP32 moments against float64 NumPy over several leaves and 25 steps."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from tests.reference import adamw as reference
from v3jax import registry
from v3jax.optim.adamw import adamw, decayed, scale_by_adam

OPTIM = registry.get("v3_full").optim
N_STEPS = 25
LR = 1e-3
SHAPES = {
    "embed": (31, 16),
    "layer/q_a_proj": (16, 24),
    "layer/input_layernorm": (16,),
    "layer/experts": (4, 16, 8),
    "norm": (16,),
}
DECAYED = {"embed", "layer/q_a_proj", "layer/experts"}
Moments = Literal["bf16", "fp32"]


def settings(moments: Moments) -> reference.Settings:
    return reference.Settings(
        beta1=OPTIM.beta1,
        beta2=OPTIM.beta2,
        eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
        clip_norm=OPTIM.clip_norm,
        low_precision=moments == "bf16",
    )


def params() -> reference.Leaves:
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def gradients(step: int) -> reference.Leaves:
    """Of very different sizes between leaves and steps: some steps are clipped, some are not."""
    rng = np.random.default_rng(100 + step)
    size = 0.003 if step % 3 else 0.3
    return {
        k: (rng.normal(size=s) * size * 4.0 ** (i - 2)).astype(np.float32)
        for i, (k, s) in enumerate(SHAPES.items())
    }


def nested(leaves: reference.Leaves) -> dict[str, Any]:
    """Leaves under the names a model has."""
    layer = {k.removeprefix("layer/"): jnp.asarray(v) for k, v in leaves.items() if "/" in k}
    return {k: jnp.asarray(v) for k, v in leaves.items() if "/" not in k} | {"layer": layer}


def flat(tree: Any) -> reference.Leaves:
    layer = {f"layer/{k}": np.asarray(v) for k, v in tree["layer"].items()}
    return {k: np.asarray(v) for k, v in tree.items() if k != "layer"} | layer


def adam_state(state: optax.OptState) -> Any:
    (found,) = (s for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s))
    return found


def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def ulps_bf16(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance in BF16 codes of numbers of one sign."""
    codes = [x.astype(ml_dtypes.bfloat16).view(np.int16).astype(int) for x in (a, b)]
    return np.abs(codes[0] - codes[1])


@pytest.mark.parametrize("moments", ["bf16", "fp32"])
def test_every_step_equals_the_reference_started_from_the_same_moments(moments: Moments) -> None:
    tx = adamw(OPTIM, moments)
    update = jax.jit(tx.update)
    p, off, n = params(), 0, 0
    state = tx.init(nested(p))
    for step in range(N_STEPS):
        before = adam_state(state)
        g = gradients(step)
        direction, state = update(nested(g), state, nested(p))
        expected, mu, nu = reference.step(
            settings(moments), step + 1, g, flat(before.mu), flat(before.nu), p, DECAYED
        )
        after = adam_state(state)
        for k, got in flat(direction).items():
            np.testing.assert_allclose(got, expected[k], rtol=1e-5, atol=2e-6, err_msg=k)
            for stored, wanted in ((flat(after.mu)[k], mu[k]), (flat(after.nu)[k], nu[k])):
                assert stored.dtype == wanted.dtype
                np.testing.assert_allclose(
                    stored.astype(np.float32), wanted.astype(np.float32), rtol=2**-7
                )
                off, n = off + int((ulps_bf16(stored, wanted) > 0).sum()), n + stored.size
        p = {k: v - np.float32(LR) * flat(direction)[k] for k, v in p.items()}
    assert off <= n / 1000  # the two may round a value on the edge to different sides
    assert int(adam_state(state).count) == N_STEPS


@pytest.mark.parametrize(("moments", "tolerance"), [("bf16", 2e-2), ("fp32", 1e-4)])
def test_free_running_trajectories_stay_together(moments: Moments, tolerance: float) -> None:
    tx = adamw(OPTIM, moments)
    update = jax.jit(tx.update)
    p, q = params(), params()
    mu = {k: reference.stored(settings(moments), np.zeros_like(v)) for k, v in p.items()}
    nu, state = dict(mu), tx.init(nested(p))
    for step in range(N_STEPS):
        direction, state = update(nested(gradients(step)), state, nested(p))
        p = {k: v - np.float32(LR) * flat(direction)[k] for k, v in p.items()}
        expected, mu, nu = reference.step(
            settings(moments), step + 1, gradients(step), mu, nu, q, DECAYED
        )
        q = {k: v - LR * expected[k] for k, v in q.items()}
    for k, v in p.items():
        np.testing.assert_allclose(v, q[k], rtol=1e-6, atol=LR * tolerance, err_msg=k)


def test_some_test_gradients_are_clipped_and_some_are_not() -> None:
    norms = [float(optax.tree.norm(gradients(step))) for step in range(N_STEPS)]
    assert min(norms) < OPTIM.clip_norm < max(norms)


def test_direction_uses_the_moments_before_they_are_rounded() -> None:
    tx = adamw(OPTIM, "bf16")
    p = {"w": jnp.zeros(64)}
    g = {"w": jnp.asarray(np.random.default_rng(0).uniform(0.05, 0.1, size=64), jnp.float32)}
    direction: Any = tx.update(g, tx.init(p), p)[0]
    np.testing.assert_allclose(direction["w"], np.ones(64), rtol=3e-6)


def test_moments_take_two_bytes_each() -> None:
    state: Any = adam_state(adamw(OPTIM, "bf16").init({"w": jnp.zeros(8)}))
    assert state.mu["w"].dtype == state.nu["w"].dtype == jnp.bfloat16


def test_stored_moments_round_halves_to_even() -> None:
    ulp = 2.0**-7  # of BF16 just above 1
    tx = scale_by_adam(0.5, 0.5, 1e-8, "bf16")
    mu = jnp.asarray([1, 1 + ulp], jnp.bfloat16)
    g = jnp.asarray([1 + ulp, 1 + 2 * ulp])  # averages lie halfway between two codes
    state = optax.ScaleByAdamState(jnp.asarray(3), {"w": mu}, {"w": mu})
    stored: Any = tx.update({"w": g}, state)[1]
    np.testing.assert_array_equal(stored.mu["w"].astype(jnp.float32), [1, 1 + 2 * ulp])


def test_weight_decay_leaves_out_norms() -> None:
    assert decayed(nested(params())) == {
        "embed": True,
        "norm": False,
        "layer": {"q_a_proj": True, "input_layernorm": False, "experts": True},
    }


def test_non_finite_gradients_reach_the_direction() -> None:
    tx = adamw(OPTIM, "bf16")
    p = {"w": jnp.ones(4)}
    g = {"w": jnp.asarray([1.0, jnp.nan, 1.0, 1.0])}
    direction: Any = tx.update(g, tx.init(p), p)[0]
    assert not np.isfinite(np.asarray(direction["w"])).all()
