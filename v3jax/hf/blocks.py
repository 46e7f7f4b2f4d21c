"""FP8 E4M3 weights with an FP32 scale for each block of 128 x 128, as the release keeps them.

Despite its name `weight_scale_inv` multiplies. Blocks at the edges may be ragged; a scale covers
what there is of its block. Both directions go along one row of blocks at a time, so they need
little memory beyond their result. Dims: O out, I in, P blocks along O, Q blocks along I.
"""

import ml_dtypes
import numpy as np

from v3jax.hf.config import FP8_BLOCK

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FP8_MAX = np.float32(448)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks along each axis."""
    return tuple(-(-n // FP8_BLOCK) for n in shape)


def dequantize(values_OI: np.ndarray, scales_PQ: np.ndarray) -> np.ndarray:
    """`values * scale` of each block, FP32 `[O, I]`.

    Raises:
      ValueError: scales that are not one for each block.
    """
    wanted = scale_shape(values_OI.shape)
    if scales_PQ.shape != wanted:
        raise ValueError(f"scales are {list(scales_PQ.shape)}, not {list(wanted)}")
    weights_OI = values_OI.astype(np.float32)
    for row, scales_Q in enumerate(scales_PQ):
        weights_OI[_block(row)] *= _spread(scales_Q, weights_OI.shape[1])
    return weights_OI


def quantize(weights_OI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(values [O, I] FP8, scales [P, Q] FP32)` of FP32 or BF16 weights, which must be finite.

    A scale is the block's largest magnitude over 448, and 1 for a block of zeros. What this gave
    comes back to the bit when it is dequantised to FP32 and quantised again: the largest code of a
    block is 448, and in FP32 `448 * scale / 448` is `scale` again for each one that is a quotient
    by 448, unless it is subnormal.
    """
    values_OI = np.empty(weights_OI.shape, FP8)
    scales_PQ = np.empty(scale_shape(weights_OI.shape), np.float32)
    starts_Q = np.arange(0, weights_OI.shape[1], FP8_BLOCK)
    for row in range(len(scales_PQ)):
        rows = weights_OI[_block(row)].astype(np.float32)
        peak_Q = np.maximum.reduceat(np.abs(rows).max(axis=0), starts_Q)
        scales_Q = peak_Q / _FP8_MAX
        scales_PQ[row] = np.where(scales_Q > 0, scales_Q, np.float32(1))
        quotients = rows / _spread(scales_PQ[row], rows.shape[1])
        values_OI[_block(row)] = np.clip(quotients, -_FP8_MAX, _FP8_MAX)
    return values_OI, scales_PQ


def _block(row: int) -> slice:
    """The rows of a row of blocks."""
    return slice(row * FP8_BLOCK, (row + 1) * FP8_BLOCK)


def _spread(scales_Q: np.ndarray, width: int) -> np.ndarray:
    """Each block's scale at each of its columns, `[width]`."""
    return np.repeat(scales_Q, FP8_BLOCK)[:width]
