"""Linear maps in FP8: outputs and gradients within what the recipe itself costs, against FP64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.fp8 import reference
from tests.fp8.test_gemm import grouped
from v3jax.config import Fp8Config
from v3jax.ops.fp8 import linear as ops
from v3jax.ops.fp8.quantize import E4M3, dequantize, pack_e5m6, quantize, unpack_e5m6
from v3jax.ops.norm import swiglu

CFG = Fp8Config()
BF16 = jnp.bfloat16


def normal(*shape: int, seed: int, scale: float = 1.0, dtype: Any = BF16) -> jax.Array:
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    return jnp.asarray(x, dtype)


def f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def error(got: Any, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(f64(got) - wanted) / np.linalg.norm(wanted))


def pulled(f: Any, dy: jax.Array, *arguments: Any) -> tuple[Any, ...]:
    """The output and the gradients of all arguments."""

    def run(*arguments: Any) -> tuple[Any, ...]:
        y, pull = jax.vjp(f, *arguments)
        return y, *pull(dy)

    return jax.jit(run)(*arguments)


X, W = normal(512, 384, seed=0), normal(384, 640, seed=1, scale=0.02, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("power_of_two", "exact", "limits"),
    [
        # Tiled anew without powers of two, x is rounded twice.
        ("none", True, (3.8e-2, 3.8e-2, 4.6e-2)),
        ("report", False, (3.8e-2, 3.8e-2, 4.6e-2)),
        ("report", True, (3.9e-2, 3.8e-2, 3.9e-2)),
        ("all", False, (3.9e-2, 3.9e-2, 3.9e-2)),
    ],
)
def test_outputs_and_gradients_are_within_the_recipe(
    power_of_two: Any, exact: bool, limits: tuple[float, ...]
) -> None:
    how = ops.recipe(Fp8Config(power_of_two=power_of_two), exact=exact)
    dy = normal(512, 640, seed=2)
    y, dx, dw = pulled(lambda x, w: ops.linear(x, w, how), dy, X, W)
    assert (y.dtype, dx.dtype, dw.dtype) == (BF16, BF16, jnp.float32)
    wanted = f64(X) @ f64(W), f64(dy) @ f64(W).T, f64(X).T @ f64(dy)
    for got, exactly, limit in zip((y, dx, dw), wanted, limits, strict=True):
        assert 0.9 * limit < error(got, exactly) < limit


@pytest.mark.parametrize("sizes", [(300, 200, 72), (2, 37, 5, 130)], ids=str)
def test_the_products_are_those_of_the_quantised_numbers(sizes: tuple[int, ...]) -> None:
    """Each with the tiles that the report gives it, to the rounding of results and of scales, whose
    last bit takes a few codes along."""
    *rows, inner, outer = sizes
    x, dy = normal(*rows, inner, seed=3), normal(*rows, outer, seed=4, scale=1e-6)
    w = normal(inner, outer, seed=5, dtype=jnp.float32)
    how = ops.recipe(CFG)
    y, dx, dw = pulled(lambda x, w: ops.linear(x, w, how), dy, x, w)

    def rounded(x: Any, tile: tuple[int, ...], floor: float = 1e-4) -> np.ndarray:
        x = np.asarray(x, np.float32)
        scale = reference.scales(x, tile, floor=floor)
        return reference.numbers(reference.codes(x, scale, tile), scale, tile)

    flat, dflat = x.reshape(-1, inner), dy.reshape(-1, outer)
    xq, wq = rounded(flat, (128,)), rounded(w, (128, 128))
    dq = rounded(dflat, (128,), 1e-30)
    again = rounded(np.asarray(xq.astype(np.float32), BF16), (128, 1))
    for got, wanted in (
        (y.reshape(-1, outer), xq @ wq),
        (dx.reshape(-1, inner), dq @ wq.T),
        (dw, again.T @ rounded(dflat, (128, 1), 1e-30)),
    ):
        assert error(got, wanted) < 7e-3


def test_the_input_may_come_quantised() -> None:
    """Then of x itself only the type is used, but its gradient goes to it."""
    how, dy = ops.recipe(CFG), normal(512, 640, seed=2)
    wanted = pulled(lambda x, w: ops.linear(x, w, how), dy, X, W)
    q = how.of(X)
    got = pulled(lambda x, w: ops.linear(x, w, how, q), dy, jnp.full_like(X, jnp.nan), W)
    for ours, theirs in zip(got, wanted, strict=True):
        assert error(ours, f64(theirs)) < 1e-3


def test_gradients_of_a_weight_from_e5m6() -> None:
    how, dy = ops.recipe(CFG, exact=True), normal(512, 640, seed=2)
    cached = pack_e5m6(X, 128)
    dw = pulled(lambda x, w: ops.linear(x, w, how, None, cached), dy, X, W)[2]
    near = f64(unpack_e5m6(cached, 128))
    assert error(near, f64(X)) < 5e-3
    x, dt = how.by_tokens(jnp.asarray(near, BF16), dy)
    wanted = f64(dequantize(x, (128,))) @ f64(dequantize(dt, (128,))).T
    np.testing.assert_allclose(dw, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_blocks_of_gradients_are_the_reports_negative_result() -> None:
    """A token with large gradients takes the others of its block down to nothing (appendix B.2)."""
    dy = normal(512, 640, seed=2).at[::64].multiply(1e5)
    wanted = f64(dy) @ f64(W).T

    def of_the_small(gradients: Any) -> float:
        how = ops.recipe(Fp8Config(gradients=gradients))
        dx = pulled(lambda x, w: ops.linear(x, w, how), dy, X, W)[1]
        small = np.arange(512) % 64 > 0
        return error(f64(dx)[small], wanted[small])

    assert of_the_small("tiles") < 3.8e-2
    assert of_the_small("blocks") > 0.3


def test_swiglu_is_computed_again_from_fp8() -> None:
    gate_up, w = normal(256, 512, seed=6), normal(256, 384, seed=7, scale=0.05, dtype=jnp.float32)
    dy, how = normal(256, 384, seed=8), ops.recipe(CFG)
    y, dgate_up, dw = pulled(lambda h, w: ops.swiglu_linear(h, w, how), dy, gate_up, w)
    exact = pulled(lambda h, w: swiglu(h) @ w, dy.astype(jnp.float32), f32(gate_up), w)
    for got, wanted, limit in zip((y, dgate_up, dw), exact, (0.04, 0.06, 0.06), strict=True):
        assert error(got, f64(wanted)) < limit
    kept = jax.vjp(lambda h: ops.swiglu_linear(h, w, how), gate_up)[1]
    arrays = [a for a in jax.tree.leaves(kept) if a.size >= gate_up.size // 2 and a is not w]
    assert [a.dtype for a in arrays] == [E4M3]


def f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def test_experts_maps_are_those_of_their_rows() -> None:
    """Each expert's rows as a map of their own; rows of nobody may hold anything."""
    loads = [130, 0, 256]
    blocks = grouped(loads, 6)
    starts, n = [0, 256, 256], 6 * 128
    filled = np.concatenate([np.arange(s, s + k) for s, k in zip(starts, loads, strict=True)])
    x = jnp.full((n, 256), jnp.nan, BF16).at[filled].set(normal(len(filled), 256, seed=9))
    dy = jnp.full((n, 384), jnp.nan, BF16).at[filled].set(normal(len(filled), 384, seed=10))
    w = normal(3, 256, 384, seed=11, scale=0.05, dtype=jnp.float32)
    how = ops.recipe(CFG, exact=True)
    y, dx, dw = pulled(lambda x, w: ops.grouped_linear(x, w, blocks, how), dy, x, w)
    assert dw.dtype == jnp.float32
    for e, (start, load) in enumerate(zip(starts, loads, strict=True)):
        if not load:
            assert not np.any(dw[e])
            continue
        rows = slice(start, start + load)
        alone = pulled(lambda x, w: ops.linear(x, w, how), dy[rows], x[rows], w[e])
        for got, wanted in zip((y[rows], dx[rows], dw[e]), alone, strict=True):
            assert error(got, f64(wanted)) < 1e-3


def test_gated_swiglu_of_experts() -> None:
    loads = [200, 56]
    blocks = grouped(loads, 3)
    filled = np.r_[0:200, 256:312]
    gate_up = jnp.zeros((384, 512), BF16).at[filled].set(normal(256, 512, seed=12))
    gates = jnp.zeros(384).at[filled].set(jnp.asarray(np.random.default_rng(1).uniform(size=256)))
    gates = f32(gates)
    w = normal(2, 256, 128, seed=13, scale=0.05, dtype=jnp.float32)
    dy = jnp.zeros((384, 128), BF16).at[filled].set(normal(256, 128, seed=14))
    how = ops.recipe(CFG, exact_gradient=True)

    def ours(gate_up: Any, gates: Any, w: Any) -> Any:
        return ops.grouped_swiglu_linear(gate_up, gates, w, blocks, how)

    def exact(gate_up: Any, gates: Any, w: Any) -> Any:
        hidden = swiglu(gate_up) * gates[:, None]
        return jnp.concatenate([hidden[:256] @ w[0], hidden[256:] @ w[1]])

    got = pulled(ours, dy, gate_up, gates, w)
    wanted = pulled(exact, f32(dy), f32(gate_up), gates, w)
    for a, b, limit in zip(got, wanted, (0.04, 0.06, 0.07, 0.06), strict=True):
        used = b if b.shape[0] == 2 else b[filled]
        assert error(a if b.shape[0] == 2 else a[filled], f64(used)) < limit


def test_gradients_are_never_fp8() -> None:
    """Autodiff through the cast would make them so, which loses them: the reason for the rules."""
    dy = jnp.array([1e-4, 3.3, 1000.0], jnp.float32)
    pull = jax.vjp(lambda x: x.astype(E4M3).astype(jnp.float32), jnp.ones(3))[1]
    lost = np.asarray(pull(dy)[0])
    assert lost[0] == 0
    assert np.isnan(lost[2])

    how, small = ops.recipe(CFG, exact=True, exact_gradient=True), normal(512, 640, seed=2) * 1e-9
    gradients = pulled(lambda x, w: ops.linear(x, w, how), small, X, W)[1:]
    for g, wanted in zip(gradients, (f64(small) @ f64(W).T, f64(X).T @ f64(small)), strict=True):
        assert g.dtype != E4M3
        assert error(g, wanted) < 4e-2
    assert quantize(small, (128,)).codes.dtype == E4M3
