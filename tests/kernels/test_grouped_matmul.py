"""The TPU kernels of grouped products, interpreted, against products expert by expert.

Dims: N rows, M blocks, E experts, I inner and O outer features.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3jax.kernels import grouped_matmul as kernel
from v3jax.kernels.grouped_matmul import Blocks

BLOCK, INNER, OUTER = 16, 256, 384
EXPERTS = (0, 0, 2, 3, 3, 3)  # none for expert 1; two more blocks are not in use
FILLED = (16, 5, 1, 16, 16, 16, 0, 0)
N_BLOCKS, N_EXPERTS = 8, 4


def problem() -> tuple[jax.Array, jax.Array, jax.Array, Blocks]:
    rng = np.random.default_rng(0)
    shapes = (N_BLOCKS * BLOCK, INNER), (N_EXPERTS, INNER, OUTER), (N_BLOCKS * BLOCK, OUTER)
    x, w, dy = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes)
    experts = jnp.asarray(EXPERTS + (3,) * (N_BLOCKS - len(EXPERTS)), jnp.int32)
    blocks = Blocks(experts, jnp.asarray(FILLED, jnp.int32), jnp.int32(len(EXPERTS)), BLOCK)
    return x, w, dy, blocks


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def rows(m: int) -> slice:
    return slice(m * BLOCK, (m + 1) * BLOCK)


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_meet_their_experts_weight(transposed: bool) -> None:
    x, w, dy, blocks = problem()
    given = dy if transposed else x
    got = kernel.grouped_matmul(given, w, blocks, transposed=transposed, interpret=True)
    for m, e in enumerate(EXPERTS):
        weight = wide(w[e]).T if transposed else wide(w[e])
        np.testing.assert_allclose(wide(got[rows(m)]), wide(given[rows(m)]) @ weight, rtol=1e-2)


def test_weight_gradients_add_up_and_are_zero_without_rows() -> None:
    x, w, dy, blocks = problem()
    empty = np.arange(N_BLOCKS * BLOCK) % BLOCK >= np.repeat(FILLED, BLOCK)
    x, dy = (jnp.where(empty[:, None], jnp.nan, a) for a in (x, dy))
    got = kernel.grouped_weight_gradient(x, dy, w, blocks, interpret=True)
    wanted = np.zeros(w.shape)
    for m, e in enumerate(EXPERTS):
        used = slice(m * BLOCK, m * BLOCK + FILLED[m])
        wanted[e] += wide(x[used]).T @ wide(dy[used])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)


def test_no_block_in_use_gives_no_gradient() -> None:
    x, w, dy, blocks = problem()
    empty = replace(blocks, n_used=jnp.int32(0))
    got = kernel.grouped_weight_gradient(x, dy, w, empty, interpret=True)
    np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("balanced", [None, 40])
def test_cost_estimates_are_the_analytic_ones(balanced: int | None) -> None:
    x, w, dy, blocks = problem()
    blocks = replace(blocks, balanced_rows=balanced)
    n_rows = N_BLOCKS * BLOCK if balanced is None else balanced
    flops = 2 * n_rows * INNER * OUTER
    activations = 2 * n_rows * (INNER + OUTER)
    weights = N_EXPERTS * INNER * OUTER
    products = flops, activations + 2 * weights
    assert cost(lambda: kernel.grouped_matmul(x, w, blocks)) == products
    assert cost(lambda: kernel.grouped_matmul(dy, w, blocks, transposed=True)) == products
    gradient = cost(lambda: kernel.grouped_weight_gradient(x, dy, w, blocks))
    assert gradient == (flops, activations + 4 * weights)


def cost(call: Any) -> tuple[int, int]:
    """FLOPs and bytes that the one kernel of a call tells XLA."""
    (kernels,) = [e for e in jax.make_jaxpr(call)().eqns if e.primitive.name == "pallas_call"]
    estimate = kernels.params["cost_estimate"]
    return estimate.flops, estimate.bytes_accessed


@pytest.mark.parametrize("size", [128, 2048, 4096, 7168, 18_432])
def test_tiles_divide_in_whole_lanes(size: int) -> None:
    for row_bytes in (256, 4096, 14_336):
        tile = kernel._tile(size, row_bytes)
        assert size % tile == 0
        assert tile % kernel.LANES == 0
        assert tile == kernel.LANES or tile * row_bytes <= kernel._TILE_BYTES


def test_odd_shapes_and_types_are_left_to_the_plain_form() -> None:
    x, w, _, blocks = problem()
    assert kernel.fits(x, w, blocks)
    assert not kernel.fits(x.astype(jnp.float32), w.astype(jnp.float32), blocks)
    assert not kernel.fits(x[:, :200], w[:, :200], blocks)
