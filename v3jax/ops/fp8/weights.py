"""Weights on their way between the devices that store parts of them (report section 3.3.1).

A linear map takes a weight's master as FP8 codes with a scale for each block, so these travel, a
quarter of the master's bytes. Where the parts meet within blocks, so do the largest magnitudes of
their rows before, from which all devices find the same scales.
"""

import jax
import jax.numpy as jnp

from v3jax.ops.fp8.quantize import (
    ACTIVATION_FLOOR,
    Quantized,
    dequantize,
    peaks_of,
    quantize,
    scales_of,
    with_scales,
)
from v3jax.sharding import joined


def joined_blocks(block: int, part: jax.Array, dim: int, axes: tuple[str, ...]) -> jax.Array:
    """`sharding.joined` of what blocks of codes hold of a weight, FP32, in `jax.shard_map`.

    Quantised again it has the codes of the whole master, and its scales within one unit in the last
    place.

    Args:
      block: side of the blocks over the last two dimensions.
      part: this device's, `[..., I, O]`, split along `dim` over the mesh axes `axes`.
    """
    with jax.named_scope("fp8_weights"):
        across = dim - part.ndim
        if across < -2 or part.shape[dim] % block == 0:
            mine = quantize(part, (block, block))
            scales = joined(mine.scales, dim, axes)
        else:
            side = (1, block) if across == -2 else (block, 1)  # of a row within a block
            peaks = joined(peaks_of(part, side), dim, axes)
            of_blocks = peaks_of(peaks, (block, 1) if across == -2 else (1, block))
            scales = scales_of(of_blocks, power_of_two=False, floor=ACTIVATION_FLOOR)
            of_rows = jnp.repeat(scales, block, axis=dim)
            first = jax.lax.axis_index(axes) * part.shape[dim]
            own = jax.lax.dynamic_slice_in_dim(of_rows, first, part.shape[dim], axis=dim)
            mine = with_scales(part, own, side)
        # As bytes: XLA has few operations on FP8 that only move it.
        code = mine.codes.dtype
        sent = joined(jax.lax.bitcast_convert_type(mine.codes, jnp.uint8), dim, axes)
        codes = jax.lax.bitcast_convert_type(sent, code)
        return dequantize(Quantized(codes, scales), (block, block))
