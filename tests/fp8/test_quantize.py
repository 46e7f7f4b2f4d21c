"""Quantisation against NumPy, ml_dtypes and qwix."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix

from tests.fp8 import reference
from v3jax.ops.fp8.quantize import (
    GRADIENT_FLOOR,
    Quantized,
    dequantize,
    pack_e5m6,
    quantize,
    scales_of,
    to_e4m3,
    transposed,
    unpack_e5m6,
)

TILES = [(128,), (128, 1), (128, 128), (32,), (64, 64)]


def sample(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Rows of unlike size, with outliers and a tile of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal((*shape[:-1], 1)))
    x.reshape(-1)[:: max(x.size // 7, 1)] *= 300
    x[..., :5, : shape[-1] // 2] = 0
    return x.astype(dtype)


def bits(codes: Any) -> np.ndarray:
    return np.asarray(codes).view(np.uint8)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(256, 256), (200, 300), (3, 130, 140)], ids=str)
def test_scales_and_codes_are_the_references(
    tile: tuple[int, ...], power_of_two: bool, shape: tuple[int, ...]
) -> None:
    """Scales to a unit in the last place, as XLA multiplies by 1/448; codes for equal scales."""
    x = sample(shape)
    q = jax.jit(lambda x: quantize(x, tile, power_of_two=power_of_two))(x)
    wanted = reference.scales(x, tile, power_of_two=power_of_two)
    assert q.codes.shape == shape
    assert q.scales.shape == wanted.shape
    if power_of_two:
        np.testing.assert_array_equal(q.scales, wanted)
        assert np.all(np.frexp(np.asarray(q.scales))[0] == 0.5)
    else:
        np.testing.assert_array_max_ulp(np.asarray(q.scales), wanted, maxulp=1)
    codes = reference.codes(x, np.asarray(q.scales), tile)
    np.testing.assert_array_equal(bits(q.codes), bits(codes))
    got = dequantize(q, tile)
    exact = reference.numbers(codes, np.asarray(q.scales), tile)
    np.testing.assert_allclose(got, exact, rtol=1e-7)
    assert np.isfinite(np.asarray(got)).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("tile", "tiled"), [((128,), {1: 128}), ((128, 128), {0: 128, 1: 128})])
def test_qwix_finds_the_same(tile: tuple[int, ...], tiled: dict[int, int], dtype: Any) -> None:
    x = sample((256, 384), dtype=dtype)
    x[x == 0] = 1e-3
    ours = quantize(jnp.asarray(x), tile)
    theirs = qwix.quantize(
        jnp.asarray(x, jnp.float32),
        jnp.float8_e4m3fn,
        channelwise_axes=[] if len(tile) == 2 else [0],
        tiled_axes=tiled,
        calibration_method="absmax",
    )
    np.testing.assert_array_max_ulp(np.asarray(ours.scales), np.asarray(theirs.scale), maxulp=1)
    same = np.asarray(ours.scales) == np.asarray(theirs.scale)
    side = tuple(np.array(x.shape) // same.shape)
    spread = np.kron(same, np.ones(side, bool)).astype(bool)
    assert spread.mean() > 0.5
    np.testing.assert_array_equal(bits(ours.codes)[spread], bits(theirs.qvalue)[spread])


def test_casts_are_those_of_ml_dtypes() -> None:
    """Every code, the middles between neighbours and what lies just beside both; NaN, infinity."""
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    exact = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2])
    near = [np.nextafter(exact, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate(
        [exact, *near, np.array([1e-30, 2**-10, 464, 1e30, np.inf, np.nan], np.float32)]
    )
    x = np.concatenate([x, -x, np.random.default_rng(0).standard_normal(9999).astype(np.float32)])
    wanted = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    got = np.asarray(jax.jit(to_e4m3)(x))
    number = ~np.isnan(x)
    np.testing.assert_array_equal(bits(got)[number], bits(wanted)[number])
    assert np.isnan(got[~number].astype(np.float32)).all()


def test_transposed_codes_are_the_same_numbers() -> None:
    q = quantize(jnp.asarray(sample((2, 130, 300))), (128, 128))
    flipped = jax.jit(transposed)(q)
    np.testing.assert_array_equal(bits(flipped.codes), bits(q.codes).swapaxes(-1, -2))
    np.testing.assert_array_equal(flipped.scales, np.asarray(q.scales).swapaxes(-1, -2))


def test_values_beyond_the_largest_code_are_clipped() -> None:
    """A scale that rounds down would send the largest value beyond 448, where XLA casts to NaN."""
    assert np.isnan(np.asarray(jnp.float32(465).astype(jnp.float8_e4m3fn), np.float32))
    peaks = np.random.default_rng(0).uniform(1e-3, 1e5, 20_000).astype(np.float32)
    x = np.stack([peaks, -peaks], axis=1)
    q = quantize(jnp.asarray(x), (2,))
    assert (np.abs(np.asarray(q.codes, np.float32)) == 448).all()


@pytest.mark.parametrize("value", [0.0, 1e-6, 1e-30])
def test_tiles_of_next_to_nothing(value: float) -> None:
    """Activations end at the floor of DeepSeek's kernels; gradients as small are kept."""
    x = np.full((1, 128), value, np.float32)
    q = quantize(jnp.asarray(x), (128,))
    np.testing.assert_allclose(q.scales, 1e-4 / 448, rtol=1e-6)
    np.testing.assert_allclose(dequantize(q, (128,)), x, rtol=0.07, atol=1e-4 / 448 * 2**-10)
    small = quantize(jnp.asarray(x), (128,), floor=GRADIENT_FLOOR)
    np.testing.assert_allclose(dequantize(small, (128,)), x, rtol=0.07, atol=1e-37)


def test_power_of_two_scales_are_the_next_above() -> None:
    peak = np.array([448, 448 * 2.0**-3, np.nextafter(np.float32(448), 1e3), 449, 224.1, 1.0])
    got = scales_of(jnp.asarray(peak, jnp.float32), power_of_two=True, floor=1e-4)
    np.testing.assert_array_equal(got, [1, 2.0**-3, 2, 2, 1, 2.0**-8])


def test_numbers_with_power_of_two_scales_move_between_tilings_without_loss() -> None:
    """The other way around they do not, which is why the report has such scales."""
    x = sample((256, 256), seed=1)

    def moved(power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
        first = dequantize(quantize(jnp.asarray(x), (128,), power_of_two=power_of_two), (128,))
        again = quantize(first, (128,), power_of_two=power_of_two)
        assert first.dtype == jnp.float32
        np.testing.assert_array_equal(first.astype(jnp.bfloat16), first)
        return np.asarray(first), np.asarray(dequantize(again, (128,)))

    np.testing.assert_array_equal(*moved(True))
    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)

    def error(power_of_two: bool) -> float:
        first = dequantize(quantize(jnp.asarray(x), (128,), power_of_two=power_of_two), (128,))
        columns = quantize(first, (128, 1), power_of_two=power_of_two)
        moved = dequantize(columns, (128, 1))
        return float(np.linalg.norm(moved - first) / np.linalg.norm(first))

    assert error(True) < 1e-3 < 1e-2 < error(False)


def test_blocks_are_those_of_the_public_checkpoints() -> None:
    """The exporter's own NumPy code finds the same codes and, where no block is zero, scales."""
    from v3jax.hf import blocks

    w = sample((300, 200), seed=3)
    w[w == 0] = 1e-2
    values, scales = blocks.quantize(w)
    q = quantize(jnp.asarray(w), (128, 128))
    np.testing.assert_array_max_ulp(np.asarray(q.scales), scales, maxulp=1)
    got = dequantize(Quantized(jnp.asarray(values), jnp.asarray(scales)), (128, 128))
    np.testing.assert_array_equal(got, blocks.dequantize(values, scales))


def test_e5m6_is_the_nearest_of_its_numbers() -> None:
    x = sample((64, 256), seed=2, dtype=ml_dtypes.bfloat16).astype(np.float32)
    packed = jax.jit(lambda x: pack_e5m6(x, 128))(x)
    assert packed.high.nbytes + packed.low.nbytes == x.size * 12 // 8
    got = np.asarray(unpack_e5m6(packed, 128))
    scale = reference.scales(x, (128,), power_of_two=True)
    np.testing.assert_array_equal(packed.scales, scale)
    parts = x.reshape(64, 2, 128) / scale[..., None]
    wanted = (reference.e5m6(parts) * scale[..., None]).reshape(x.shape)
    np.testing.assert_array_equal(got, wanted)
    kept = np.abs(x) > np.repeat(scale, 128, axis=1) * 2.0**-14
    assert np.max(np.abs(got - x)[kept] / np.abs(x)[kept]) <= 2.0**-7


def test_e5m6_of_what_e4m3_holds_is_exact() -> None:
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    x = codes[np.isfinite(codes)][None, :254]
    np.testing.assert_array_equal(unpack_e5m6(pack_e5m6(jnp.asarray(x), 128), 128)[:, 1:], x[:, 1:])
