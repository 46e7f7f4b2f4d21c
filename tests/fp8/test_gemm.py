"""The three FP8 products against FP64, with ragged edges and empty experts."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.fp8 import reference
from v3jax.config import Fp8Config
from v3jax.kernels.grouped_matmul import Blocks
from v3jax.ops.dispatch import blocks_of
from v3jax.ops.fp8.gemm import gemm_nt, k_grouped_nt, m_grouped_nt
from v3jax.ops.fp8.quantize import E4M3, Quantized

CFG = Fp8Config()


def operand(shape: tuple[int, ...], tile: tuple[int, ...], seed: int) -> tuple[Quantized, Any]:
    """Random codes and scales, and the numbers that they are."""
    rng = np.random.default_rng(seed)
    codes = np.clip(rng.standard_normal(shape) * 100, -448, 448).astype(reference.E4M3)
    scales = rng.uniform(0.5, 2, reference.scale_shape(shape, tile)).astype(np.float32) * 1e-3
    exact = reference.numbers(codes, scales, tile)
    return Quantized(jnp.asarray(codes), jnp.asarray(scales)), exact


def close(got: Any, wanted: np.ndarray, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(
        np.asarray(got, np.float64), wanted, rtol=0, atol=tolerance * np.abs(wanted).max()
    )


def grouped(loads: list[int], n_blocks: int, block: int = 128) -> Blocks:
    load_E = jnp.asarray(loads, jnp.int32)
    end_E = jnp.cumsum(-(-load_E // block))
    return Blocks(*blocks_of(load_E, end_E, n_blocks, block), block=block)


@pytest.mark.parametrize("sizes", [(256, 384, 512), (200, 300, 576), (7, 33, 20)], ids=str)
@pytest.mark.parametrize(
    "cfg",
    [
        CFG,
        Fp8Config(tile=64, block=128, promotion=32),
        Fp8Config(tile=128, block=32, promotion=32),
    ],
    ids=["report", "smaller_tiles", "smaller_blocks"],
)
def test_gemm_nt(sizes: tuple[int, int, int], cfg: Fp8Config) -> None:
    m, n, k = sizes
    a, exact_a = operand((m, k), (cfg.tile,), 0)
    b, exact_b = operand((n, k), (cfg.block, cfg.block), 1)
    got = jax.jit(lambda a, b: gemm_nt(a, b, cfg, jnp.float32))(a, b)
    close(got, exact_a @ exact_b.T)


def test_a_long_contraction_is_a_loop() -> None:
    a, exact_a = operand((8, 128 * 40), (128,), 0)
    b, exact_b = operand((130, 128 * 40), (128, 128), 1)
    product = jax.jit(lambda a, b: gemm_nt(a, b, CFG, jnp.float32))
    close(product(a, b), exact_a @ exact_b.T)
    assert "while" in product.lower(a, b).as_text()


def test_outputs_are_rounded_once() -> None:
    """To BF16, from sums in FP32."""
    a, b = operand((128, 512), (128,), 0)[0], operand((128, 512), (128, 128), 1)[0]
    wanted = gemm_nt(a, b, CFG, jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gemm_nt(a, b, CFG, jnp.bfloat16), wanted)


@pytest.mark.parametrize("loads", [[100, 0, 300, 128], [0, 0, 0, 5], [0, 0, 0, 0]], ids=str)
def test_m_grouped_nt(loads: list[int]) -> None:
    """Experts without rows, tails, and blocks of nobody at the end."""
    n_blocks, n, k = 7, 192, 320
    blocks = grouped(loads, n_blocks)
    a, exact_a = operand((n_blocks * 128, k), (128,), 0)
    b, exact_b = operand((len(loads), n, k), (128, 128), 1)
    got = np.asarray(
        jax.jit(lambda a, b, blocks: m_grouped_nt(a, b, blocks, CFG, jnp.float32))(a, b, blocks)
    )
    wanted = np.einsum("mrk,mnk->mrn", exact_a.reshape(-1, 128, k), exact_b[blocks.expert_M])
    used = int(blocks.n_used)
    assert used == sum(-(-load // 128) for load in loads)
    if used:
        close(got.reshape(-1, 128, n)[:used], wanted[:used])


@pytest.mark.parametrize("loads", [[100, 0, 300, 128], [0, 0, 0, 5], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("promotion", [128, 32])
def test_k_grouped_nt(loads: list[int], promotion: int) -> None:
    """An expert without rows has a gradient of zeros; what lies after the last block counts not."""
    n_blocks, m, n = 7, 96, 160
    blocks, cfg = grouped(loads, n_blocks), replace(CFG, promotion=promotion)
    a, exact_a = operand((m, n_blocks * 128), (128,), 0)
    b, exact_b = operand((n, n_blocks * 128), (128,), 1)
    got = np.asarray(
        jax.jit(lambda a, b, blocks: k_grouped_nt(a, b, cfg, blocks, len(loads)))(a, b, blocks)
    )
    wanted = np.zeros((len(loads), m, n))
    for i in range(int(blocks.n_used)):
        at = slice(i * 128, (i + 1) * 128)
        wanted[blocks.expert_M[i]] += exact_a[:, at] @ exact_b[:, at].T
    for e, load in enumerate(loads):
        assert bool(np.any(got[e])) == (load > 0)
    if sum(loads):
        close(got, wanted)


def test_one_group_of_any_number_of_tokens() -> None:
    a, exact_a = operand((96, 300), (128,), 0)
    b, exact_b = operand((160, 300), (128,), 1)
    got = k_grouped_nt(a, b, CFG)
    assert got.dtype == jnp.float32
    close(got[0], exact_a @ exact_b.T)


def test_operands_that_do_not_fit_are_named() -> None:
    a, b = operand((256, 256), (128,), 0)[0], operand((128, 256), (128, 128), 1)[0]
    with pytest.raises(ValueError, match=r"^a: codes are float32, not float8_e4m3fn; quantize"):
        gemm_nt(replace(a, codes=a.codes.astype(jnp.float32)), b, CFG, jnp.float32)
    with pytest.raises(ValueError, match=r"^b: scales of \[128, 2\] .* not \[1, 2\], one a tile"):
        gemm_nt(a, replace(b, scales=jnp.ones((128, 2))), CFG, jnp.float32)
    with pytest.raises(ValueError, match=r"^a and b: 256 and 128 columns .* the contraction last"):
        gemm_nt(a, Quantized(b.codes[:, :128], b.scales[:, :1]), CFG, jnp.float32)
    with pytest.raises(ValueError, match=r"^a: scales of \[256, 2\] .* a tile of 1 x 64"):
        gemm_nt(a, b, Fp8Config(tile=64, promotion=64), jnp.float32)
    x, y = (operand((64, 256), (128,), i)[0] for i in range(2))
    with pytest.raises(ValueError, match=r"k_grouped_nt: blocks of 64 rows are not the tile"):
        k_grouped_nt(x, y, CFG, grouped([100], 4, block=64), 1)
    assert a.codes.dtype == E4M3
