"""Chunked causal attention against the dense product.

Dims: B batch, T time, H heads, K key dim, V value dim, S keys.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference.mla import softmax, visible
from v3jax.ops import attention as ops

SCALE = 0.37


def arrays(b: int, t: int, h: int = 2, k: int = 5, v: int = 3) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(t)
    shapes = (b, t, h, k), (b, t, h, k), (b, t, h, v), (b, t, h, v)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def dense(
    q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHV: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    s_BHTS = SCALE * jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK)
    p_BHTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], s_BHTS, -1e30), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", p_BHTS, v_BTHV)


def causal(segments_BT: np.ndarray | None, b: int, t: int) -> jax.Array:
    mask_BTS = np.tril(np.ones((t, t), bool))[None].repeat(b, 0)
    if segments_BT is not None:
        mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
    return jnp.asarray(mask_BTS)


@pytest.mark.parametrize("with_segments", [False, True])
def test_attention_equals_a_loop_over_queries(with_segments: bool) -> None:
    q, k, v, _ = arrays(2, 7)
    segments_BT = np.array([[1, 1, 1, 2, 2, 3, 0], [1, 2, 2, 2, 2, 2, 2]])
    wanted = np.zeros(v.shape)
    for b in range(2):
        for t in range(7):
            past = visible(t, segments_BT[b] if with_segments else None)
            for h in range(2):
                p = softmax(SCALE * np.asarray(k, np.float64)[b, past, h] @ np.asarray(q)[b, t, h])
                wanted[b, t, h] = p @ np.asarray(v)[b, past, h]
    segments = jnp.asarray(segments_BT) if with_segments else None
    got = ops.causal_attention(q, k, v, scale=SCALE, segments_BT=segments)
    np.testing.assert_allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize("length", [7, 300])
@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("long", [False, True])
def test_value_and_gradients_equal_dense_attention(
    length: int, with_segments: bool, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if long:  # what runs beyond 4096 positions, in chunks of which the last is not full
        monkeypatch.setattr(ops, "_LONG", 0)
        monkeypatch.setattr(ops, "_LONG_CHUNK", 64)
    q, k, v, probe = arrays(2, length)
    segments = np.cumsum(np.random.default_rng(0).random((2, length)) < 0.1, axis=1)
    segments_BT = segments if with_segments else None
    mask = causal(segments_BT, 2, length)

    def fast(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        segs = None if segments_BT is None else jnp.asarray(segments_BT)
        return jnp.sum(probe * ops.causal_attention(q, k, v, scale=SCALE, segments_BT=segs))

    def slow(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(probe * dense(q, k, v, mask))

    got, got_grads = jax.jit(jax.value_and_grad(fast, argnums=(0, 1, 2)))(q, k, v)
    wanted, grads = jax.jit(jax.value_and_grad(slow, argnums=(0, 1, 2)))(q, k, v)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
    for g, w in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-5)


def test_every_chunking_gives_the_same_result() -> None:
    q, k, v, _ = arrays(1, 11)
    whole = ops.causal_attention(q, k, v, scale=SCALE)
    with mock.patch.object(ops, "_MIN_CHUNK", 4):
        np.testing.assert_allclose(ops.causal_attention(q, k, v, scale=SCALE), whole, atol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    q, k, v, _ = arrays(1, 9)
    out = ops.causal_attention(q * 300, k * 300, v, scale=SCALE)
    assert np.isfinite(np.asarray(out)).all()


def test_bf16_inputs_stay_close_to_fp32() -> None:
    q, k, v, _ = arrays(2, 40)
    whole = ops.causal_attention(q, k, v, scale=SCALE)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got = ops.causal_attention(*low, scale=SCALE)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), whole, atol=0.04)


def test_no_program_holds_the_scores_of_a_long_sequence() -> None:
    length = 16_384
    q, k, v, _ = (jax.ShapeDtypeStruct((1, length, 1, d), jnp.bfloat16) for d in (24, 24, 16, 16))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return ops.causal_attention(q, k, v, scale=SCALE).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < length**2 / 8  # an eighth of a byte a score


@pytest.mark.parametrize("length", [12, 300])
def test_in_a_tree_a_token_sees_its_ancestors(length: int) -> None:
    rng = np.random.default_rng(length)
    parents_BT = np.full((2, length), -1)
    for b in range(2):
        path = []  # from a root to the token before
        for t in range(length):
            del path[rng.integers(0, len(path) + 1) :]  # leaves some of it, or all of it
            parents_BT[b, t] = path[-1] if path else -1
            path.append(t)
    ancestors_BTS = np.zeros((2, length, length), bool)
    ends_BT = np.zeros((2, length), int)
    for b in range(2):
        for t, parent in enumerate(parents_BT[b]):
            ancestors_BTS[b, t] = ancestors_BTS[b, parent] if parent >= 0 else False
            ancestors_BTS[b, t, t] = True
        ends_BT[b] = [np.flatnonzero(column)[-1] + 1 for column in ancestors_BTS[b].T]
    q, k, v, _ = arrays(2, length)
    got = ops.tree_attention(q, k, v, jnp.asarray(ends_BT), scale=SCALE)
    wanted = dense(q, k, v, jnp.asarray(ancestors_BTS))
    np.testing.assert_allclose(got, wanted, atol=2e-6)
