"""The chunked head and cross-entropy. Dims: B batch, T time, D features, V vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.reference.loss import nll as reference_nll
from v3jax.config import MeshConfig
from v3jax.ops import loss as ops
from v3jax.sharding import make_mesh


def draw(b: int, t: int, d: int = 6, v: int = 11) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(t)
    hidden, head = rng.normal(size=(b, t, d)), rng.normal(size=(d, v))
    targets, weights = rng.integers(0, v, (b, t)), rng.random((b, t)) * (rng.random((b, t)) < 0.7)
    return (
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(head, jnp.float32),
        jnp.asarray(targets),
        jnp.asarray(weights, jnp.float32),
    )


def dense(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, head), axis=-1)
    return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0])


def test_nll_of_every_position_equals_the_reference() -> None:
    hidden, head, targets, weights = draw(2, 9)
    loss, nll = ops.linear_cross_entropy(hidden, head, targets, weights)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    wanted = np.array(
        [[reference_nll(logits[b, t], int(targets[b, t])) for t in range(9)] for b in range(2)]
    )
    np.testing.assert_allclose(nll, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, (wanted * np.asarray(weights)).sum(), rtol=1e-5)


@pytest.mark.parametrize("length", [9, 64, 97, 256])
def test_gradients_equal_the_dense_ones_at_any_length(length: int) -> None:
    hidden, head, targets, weights = draw(2, length)

    def fast(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return 3 * ops.linear_cross_entropy(hidden, head, targets, weights)[0]

    def slow(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return 3 * dense(hidden, head, targets, weights)

    got, got_grads = jax.jit(jax.value_and_grad(fast, argnums=(0, 1)))(hidden, head)
    wanted, grads = jax.value_and_grad(slow, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    for g, w in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4)
    assert float(fast(hidden, head)) == pytest.approx(float(got), rel=1e-6)


def test_positions_without_weight_change_nothing_even_if_they_overflow() -> None:
    hidden, head, targets, weights = draw(2, 9)
    weights = weights.at[0, 3].set(0.0)
    spoilt = hidden.at[0, 3].set(jnp.inf)

    def f(hidden: jax.Array) -> jax.Array:
        return ops.linear_cross_entropy(hidden, head, targets, weights)[0]

    assert float(f(spoilt)) == float(f(hidden))


def test_huge_logits_give_a_finite_loss() -> None:
    hidden, head, targets, weights = draw(1, 9)
    loss, _ = ops.linear_cross_entropy(1e4 * hidden, head, targets, weights)
    assert np.isfinite(float(loss))


def test_logits_are_fp32_whatever_the_activations_are() -> None:
    hidden, head, _, _ = draw(1, 9)
    assert ops.logits(hidden.astype(jnp.bfloat16), head).dtype == jnp.float32
    np.testing.assert_allclose(
        ops.logits(hidden, head), jnp.einsum("btd,dv->btv", hidden, head), atol=1e-5
    )


def test_a_vocabulary_split_over_devices_gives_the_same() -> None:
    hidden, head, targets, weights = draw(2, 12, v=16)
    mesh = make_mesh(MeshConfig(pipe=4))

    def run(hidden: Any, head: Any, targets: Any, weights: Any) -> Any:
        alone = ops.split_head_nll(hidden, head, targets, "pipe")
        return ops.split_head_gradients(hidden, head, targets, weights, "pipe"), alone

    (nll, dhidden, dhead), alone = jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(P(), P(None, "pipe"), P(), P()),
            out_specs=((P(), P(), P(None, "pipe")), P()),
            check_vma=False,
        )
    )(hidden, head, targets, weights)
    (_, wanted_nll), grads = jax.value_and_grad(
        ops.linear_cross_entropy, argnums=(0, 1), has_aux=True
    )(hidden, head, targets, weights)
    np.testing.assert_allclose(nll, wanted_nll, rtol=1e-5)
    np.testing.assert_array_equal(alone, nll)
    for g, w in zip((dhidden, dhead), grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-6)
