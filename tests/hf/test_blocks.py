"""FP8 blocks against loops over single numbers, which know E4M3 only from its definition."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from tests.hf.small import at_most, refused
from v3jax.hf import blocks
from v3jax.hf.blocks import FP8, dequantize, quantize, scale_shape

BF16 = np.dtype(ml_dtypes.bfloat16)


def meaning(code: int) -> float:
    """What an E4M3 code stands for: sign, 4 bits of exponent biased by 7, 3 of mantissa, no
    infinity, NaN where all seven bits are set."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


MEANINGS = [meaning(code) for code in range(256)]
FINITE = sorted({m for m in MEANINGS if not math.isnan(m)})


def nearest(value: float) -> float:
    """The E4M3 number nearest to a value, of two the one whose last bit is 0."""
    if abs(value) >= 448:
        return math.copysign(448.0, value)
    best = sorted(FINITE, key=lambda m: abs(m - value))[:2]
    if abs(best[0] - value) != abs(best[1] - value):
        return best[0]
    return next(m for m in best if MEANINGS.index(m) % 2 == 0)


def dequantized_by_loops(codes_OI: np.ndarray, scales: np.ndarray) -> np.ndarray:
    out = np.zeros(codes_OI.shape, np.float32)
    for o in range(out.shape[0]):
        for i in range(out.shape[1]):
            scale = scales[o // 128, i // 128]
            out[o, i] = np.float32(MEANINGS[int(codes_OI[o, i])]) * scale
    return out


def quantized_by_loops(weights_OI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Meanings of the codes, and scales."""
    n_out, n_in = weights_OI.shape
    values = np.zeros((n_out, n_in))
    scales = np.zeros((math.ceil(n_out / 128), math.ceil(n_in / 128)), np.float32)
    for p in range(scales.shape[0]):
        for q in range(scales.shape[1]):
            members = [
                (o, i)
                for o in range(128 * p, min(128 * p + 128, n_out))
                for i in range(128 * q, min(128 * q + 128, n_in))
            ]
            peak = max(abs(np.float32(weights_OI[o, i])) for o, i in members)
            scales[p, q] = np.float32(peak) / np.float32(448) if peak else 1
            for o, i in members:
                values[o, i] = nearest(float(np.float32(weights_OI[o, i]) / scales[p, q]))
    return values, scales


def all_codes() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).reshape(2, 128).view(FP8)


def codes(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8)


@pytest.mark.parametrize("scale", [1.0, 0.003, 1e-30])
def test_all_256_codes_mean_what_e4m3_says_times_the_scale(scale: float) -> None:
    scales = np.array([[scale]], np.float32)
    wanted = np.array(MEANINGS, np.float32).reshape(2, 128) * scales[0, 0]
    got = dequantize(all_codes(), scales)
    np.testing.assert_array_equal(got, wanted)
    assert got.dtype == np.float32
    assert np.isnan(got).sum() == 2
    assert np.signbit(got).sum() == 128, "a zero keeps its sign"


SHAPES = [(128, 128), (1, 1), (129, 127), (130, 260), (64, 300), (300, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantizing_multiplies_each_block_by_its_scale(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 255, shape).astype(np.uint8)
    scales = rng.uniform(1e-4, 1e2, scale_shape(shape)).astype(np.float32)
    np.testing.assert_array_equal(
        dequantize(stored.view(FP8), scales), dequantized_by_loops(stored, scales)
    )


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16])
@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_quantizing_rounds_to_the_nearest_code_of_its_own_block(
    shape: tuple[int, int], dtype: np.dtype
) -> None:
    rng = np.random.default_rng(1)
    n_out, n_in = shape
    sizes = 10.0 ** rng.integers(-6, 3, (n_out // 128 + 1, n_in // 128 + 1))
    spread = sizes.repeat(128, 0).repeat(128, 1)[:n_out, :n_in]
    weights = (rng.normal(size=shape) * spread).astype(dtype)
    values, scales = quantize(weights)
    assert (values.dtype, scales.dtype) == (FP8, np.float32)
    wanted, wanted_scales = quantized_by_loops(weights)
    np.testing.assert_array_equal(scales, wanted_scales)
    np.testing.assert_array_equal(values.astype(np.float64), wanted)


def test_ties_go_to_the_even_code() -> None:
    halves = [(a + b) / 2 for a, b in itertools.pairwise(FINITE)]
    weights = np.array([[448.0, *halves]], np.float32)  # one block each of scale 1
    for first in range(1, weights.shape[1], 127):
        row = np.concatenate([weights[:, :1], weights[:, first : first + 127]], axis=1)
        values, scales = quantize(row)
        assert scales == 1
        assert values.astype(np.float64).tolist() == [[nearest(v) for v in row[0]]]


def test_nothing_grows_beyond_448_or_into_nan() -> None:
    rng = np.random.default_rng(2)
    # Peaks whose quotient by their own scale rounds to a little more than 448, among others.
    weights = rng.uniform(1, 2, (128 * 40, 128)).astype(np.float32)
    values, scales = quantize(weights)
    largest = np.abs(values.astype(np.float32)).reshape(40, 128, 128).max(axis=(1, 2))
    np.testing.assert_array_equal(largest, 448)
    ratio = weights.reshape(40, 128, 128).max(axis=(1, 2)) / scales[:, 0]
    assert (ratio > 448).any(), "the case this is about"
    # 627 times the least number there is: its scale is 1.4 times too small to be told.
    least = np.array([[627]], np.int32).view(np.float32) * np.array([1, -1], np.float32)
    assert quantize(least)[0].astype(np.float32).tolist() == [[448, -448]]


def test_a_block_of_zeros_has_the_scale_one_and_keeps_its_signs() -> None:
    weights = np.zeros((130, 260), np.float32)
    weights[129, 259] = 3.0
    weights[5, 5] = -0.0
    values, scales = quantize(weights)
    assert scales.tolist() == [[1, 1, 1], [1, 1, np.float32(3) / np.float32(448)]]
    back = dequantize(values, scales)
    assert np.signbit(back[5, 5])
    np.testing.assert_array_equal(back, weights)


def test_a_ragged_edge_has_a_scale_of_its_own() -> None:
    weights = np.ones((129, 130), np.float32)
    weights[128:] *= 4
    weights[:, 128:] *= 16
    assert (quantize(weights)[1] * 448).tolist() == [[1, 16], [4, 64]]


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16])
def test_quantized_weights_come_back_to_the_bit_through_fp32(dtype: np.dtype) -> None:
    rng = np.random.default_rng(3)
    sizes = 10.0 ** rng.uniform(-30, 30, (4, 5))
    weights = rng.normal(size=(500, 600)) * sizes.repeat(125, 0).repeat(120, 1)
    values, scales = quantize(weights.astype(dtype))
    again, same_scales = quantize(dequantize(values, scales))
    np.testing.assert_array_equal(same_scales, scales)
    np.testing.assert_array_equal(codes(again), codes(values))


def test_448_times_a_quotient_by_448_gives_the_quotient_back() -> None:
    """What the test before this one rests on, for every 8th mantissa there is."""
    mantissas = np.arange(0, 2**23, 8, dtype=np.int32) + np.int32(127 << 23)
    scales = mantissas.view(np.float32) / np.float32(448)
    np.testing.assert_array_equal(scales * np.float32(448) / np.float32(448), scales)


def test_a_transposed_view_is_quantized_as_its_copy() -> None:
    weights = np.random.default_rng(4).normal(size=(200, 150)).astype(np.float32).T
    for got, wanted in zip(quantize(weights), quantize(weights.copy()), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 2), (2, 3, 1), (6,)])
def test_scales_that_are_not_one_a_block_are_refused(shape: tuple[int, ...]) -> None:
    with refused(list(shape), "not [2, 3]"):
        dequantize(np.zeros((130, 260), FP8), np.ones(shape, np.float32))


def test_both_directions_take_little_memory_beyond_their_result() -> None:
    weights = np.ones((4096, 1024), np.float32)  # 16 MiB
    with at_most(4 * 2**20 + 4 * 2**20):
        values, scales = quantize(weights)
    with at_most(16 * 2**20 + 2**20):
        dequantize(values, scales)


def test_scale_shape_counts_begun_blocks() -> None:
    assert scale_shape((576, 7168)) == (5, 56)
    assert scale_shape((1, 128)) == (1, 1)
    assert scale_shape((129, 256)) == (2, 2)
    assert blocks.FP8_BLOCK == 128
