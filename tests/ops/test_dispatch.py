"""The block layout and the grouped products, against loops over tokens.

Dims: T tokens, K choices, E experts, N rows, D features, I inner and O outer features.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import moe as reference
from v3jax.ops import dispatch as ops
from v3jax.ops import gemm

PATTERNS = ["random", "one_expert", "few", "balanced"]


def choices(pattern: str, t: int = 37, k: int = 3, e: int = 8) -> np.ndarray:
    """Distinct experts a token, [T, K]; unbalanced in various ways."""
    rng = np.random.default_rng(0)
    if pattern == "one_expert":
        return np.tile(np.array([5, 0, 7]), (t, 1))[:, :k]
    if pattern == "few":
        return np.stack([rng.permutation(4)[:k] for _ in range(t)])
    if pattern == "balanced":
        return (np.arange(t)[:, None] + np.arange(k)[None]) % e
    return np.stack([rng.permutation(e)[:k] for _ in range(t)])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block", [None, 1, 8, 128])
def test_every_choice_has_its_own_row_in_a_block_of_its_expert(
    pattern: str, block: int | None
) -> None:
    chosen = choices(pattern)
    layout = ops.make_layout(jnp.asarray(chosen), 8, block)
    rows = np.asarray(layout.row_TK)
    assert len(set(rows.ravel())) == chosen.size
    np.testing.assert_array_equal(
        np.asarray(layout.blocks.expert_M)[rows // layout.blocks.block], chosen
    )
    np.testing.assert_array_equal(
        np.asarray(layout.token_N)[rows], np.arange(37)[:, None].repeat(3, 1)
    )
    np.testing.assert_array_equal(
        np.asarray(layout.choice_N)[rows], np.arange(chosen.size).reshape(chosen.shape)
    )
    assert rows.max() < int(layout.blocks.n_used) * layout.blocks.block


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_without_a_token_are_marked_and_blocks_in_use_are_the_fewest(pattern: str) -> None:
    chosen = choices(pattern)
    layout = ops.make_layout(jnp.asarray(chosen), 8, 8)
    tokens = np.asarray(layout.token_N)
    assert (tokens < 37).sum() == chosen.size
    assert (tokens[np.asarray(layout.choice_N) == chosen.size] == 37).all()
    load = np.bincount(chosen.ravel(), minlength=8)
    assert int(layout.blocks.n_used) == np.ceil(load / 8).sum()
    assert (np.diff(np.asarray(layout.blocks.expert_M)) >= 0).all()


def test_rows_grow_with_tokens_not_with_tokens_times_experts() -> None:
    for n_experts in (16, 64, 256):
        chosen = jnp.zeros((512, 4), jnp.int32) + jnp.arange(4)
        layout = ops.make_layout(chosen, n_experts)
        n_rows = layout.token_N.shape[0]
        assert n_rows <= 512 * 4 + n_experts * layout.blocks.block
        assert n_rows <= 2 * 512 * 4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sorting_and_counting_find_the_same_places(pattern: str) -> None:
    chosen = np.concatenate([choices(pattern), choices(pattern, t=300)])
    chosen[::5, 1] = 8  # of no expert
    earlier = [[(chosen[:t] == e).sum() for e in row] for t, row in enumerate(chosen)]
    for find in (ops.sorted_places, ops.counted_places):
        place, load = find(jnp.asarray(chosen), 8)
        np.testing.assert_array_equal(
            np.where(chosen < 8, place, 0), np.where(chosen < 8, earlier, 0)
        )
        np.testing.assert_array_equal(load, np.bincount(chosen.ravel(), minlength=9)[:8])


@pytest.mark.parametrize("block", [1, 8])
def test_the_layout_is_the_same_on_accelerators(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = jnp.asarray(choices("random", t=300))
    here = ops.make_layout(chosen, 8, block)
    monkeypatch.setattr("v3jax.kernels.platform", lambda: "gpu")
    there = ops.make_layout(chosen, 8, block)
    jax.tree.map(np.testing.assert_array_equal, here, there)


def test_combine_of_dispatch_returns_each_token_once_a_choice() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(37, 6)), jnp.float32)
    layout = ops.make_layout(jnp.asarray(choices("one_expert")), 8)
    np.testing.assert_allclose(ops.combine(ops.dispatch(x, layout), layout), 3 * x, rtol=1e-6)


def test_padding_rows_of_a_dispatch_are_zero() -> None:
    layout = ops.make_layout(jnp.asarray(choices("random")), 8)
    rows = np.asarray(ops.dispatch(jnp.ones((37, 4)), layout))
    filled = np.asarray(layout.token_N) < 37
    assert (rows[filled] == 1).all()
    assert not rows[~filled].any()


def mixture(
    x: jax.Array, gates: jax.Array, gate_up: jax.Array, down: jax.Array, chosen: jax.Array
) -> jax.Array:
    """Dispatch, two grouped products, gate, combine: what the layer does with the pieces."""
    layout = ops.make_layout(chosen, gate_up.shape[0])
    hidden = gemm.grouped_matmul(ops.dispatch(x, layout), gate_up, layout.blocks)
    gate, up = jnp.split(hidden, 2, axis=-1)
    rows = gemm.grouped_matmul(jax.nn.silu(gate) * up, down, layout.blocks)
    return ops.combine(rows * ops.dispatch_gates(gates, layout)[:, None], layout)


def draw() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(1)
    shapes = (37, 6), (37, 3), (8, 6, 10), (8, 5, 6)
    return tuple(rng.normal(0, 0.5, s) for s in shapes)


@pytest.mark.parametrize("gather_bytes", [gemm._GATHER_BYTES, 0], ids=["gather", "loop"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_expert_outputs_equal_a_loop_over_tokens_and_none_is_dropped(
    pattern: str, gather_bytes: int
) -> None:
    x, gates, gate_up, down = draw()
    chosen = choices(pattern)
    wanted = reference.experts(x, chosen, gates, {"gate_up_proj": gate_up, "down_proj": down})
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, gates, gate_up, down)]
    with mock.patch.object(gemm, "_GATHER_BYTES", gather_bytes):
        got = jax.jit(mixture)(*arrays, jnp.asarray(chosen))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert (np.abs(np.asarray(got)).sum(-1) > 0).all()


def dense_mixture(
    x: jax.Array, gates: jax.Array, gate_up: jax.Array, down: jax.Array, chosen: jax.Array
) -> jax.Array:
    """Every expert on every token, then the chosen ones picked: independent of any layout."""
    hidden = jnp.einsum("td,edf->tef", x, gate_up)
    half = hidden.shape[-1] // 2
    y_TED = jnp.einsum("tef,efd->ted", jax.nn.silu(hidden[..., :half]) * hidden[..., half:], down)
    weight_TE = jnp.einsum("tk,tke->te", gates, jax.nn.one_hot(chosen, gate_up.shape[0]))
    return jnp.einsum("te,ted->td", weight_TE, y_TED)


@pytest.mark.parametrize("gather_bytes", [gemm._GATHER_BYTES, 0], ids=["gather", "loop"])
@pytest.mark.parametrize("pattern", ["random", "one_expert"])
def test_gradients_equal_those_of_the_dense_mixture(pattern: str, gather_bytes: int) -> None:
    arrays = [jnp.asarray(a, jnp.float32) for a in draw()]
    chosen = jnp.asarray(choices(pattern))
    probe = jnp.asarray(np.random.default_rng(5).normal(size=(37, 6)), jnp.float32)
    with mock.patch.object(gemm, "_GATHER_BYTES", gather_bytes):
        got = jax.jit(
            jax.grad(
                lambda x, g, gu, d: jnp.sum(probe * mixture(x, g, gu, d, chosen)), argnums=range(4)
            )
        )(*arrays)
    wanted = jax.grad(
        lambda x, g, gu, d: jnp.sum(probe * dense_mixture(x, g, gu, d, chosen)), argnums=range(4)
    )(*arrays)
    for g, w in zip(got, wanted, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-5)


def test_experts_without_tokens_get_zero_gradient() -> None:
    arrays = [jnp.asarray(a, jnp.float32) for a in draw()]
    chosen = jnp.asarray(choices("one_expert"))
    d_gate_up = np.asarray(
        jax.grad(lambda x, g, gu, d: jnp.sum(mixture(x, g, gu, d, chosen)), argnums=2)(*arrays)
    )
    used = np.abs(d_gate_up).sum((1, 2)) > 0
    np.testing.assert_array_equal(np.flatnonzero(used), [0, 5, 7])


def flops(n_experts: int) -> float:
    """FLOPs that XLA counts in the mixture at fixed active experts."""
    chosen = jnp.zeros((256, 4), jnp.int32) + jnp.arange(4)
    arrays = (
        jnp.zeros((256, 64)),
        jnp.zeros((256, 4)),
        jnp.zeros((n_experts, 64, 128)),
        jnp.zeros((n_experts, 64, 64)),
    )
    analysis = jax.jit(mixture).lower(*arrays, chosen).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def test_work_does_not_grow_with_the_number_of_experts() -> None:
    useful = 256 * 4 * 2 * (64 * 128 + 64 * 64)
    assert flops(16) >= useful
    assert flops(64) < 2.5 * useful
