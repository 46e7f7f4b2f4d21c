"""Numbers in FP8 with a scale for each tile, found from what is in the tile (report section 3.3.2).

E4M3 everywhere, gradients too. A tile is `1 x tile` (a token's channels), `tile x 1` (a channel's
tokens) or a block of both sides. A scale is the tile's largest magnitude over 448, or the next
power of two above, with which values move from one tiling to another without loss. Values are
clipped before the cast: beyond 448 XLA gives NaN where GPUs give 448.
Dims: K contraction, Q tiles along it, N rows, O columns, P blocks along K, R blocks along O.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from v3jax import kernels

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
ACTIVATION_FLOOR = 1e-4
"""Least magnitude of a tile of activations or weights, as in DeepSeek's kernels."""
GRADIENT_FLOOR = 1e-30
"""Of a tile of gradients, which a mean over many tokens makes far smaller than 1e-4 (ours)."""


@struct.dataclass
class Quantized:
    """Codes and the scales that multiply them."""

    codes: jax.Array
    """E4M3."""
    scales: jax.Array
    """FP32: of the codes' shape, each dimension that is tiled divided by its tile, rounded up."""


def unfused[T](x: T) -> T:
    """Arrays that XLA for CPU computes by themselves. As a part of what takes them, casts, sums and
    scales would be computed one number at a time, or anew for each; elsewhere fusing saves memory.
    """
    return jax.lax.optimization_barrier(x) if kernels.platform() == "cpu" else x


def scales_of(peak: jax.Array, *, power_of_two: bool, floor: float) -> jax.Array:
    """The scale of tiles with these largest magnitudes, FP32."""
    scale = jnp.maximum(peak.astype(jnp.float32), floor) / E4M3_MAX
    if not power_of_two:
        return scale
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint32)
    up = (bits + jnp.uint32(0x7FFFFF)) & jnp.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(up, jnp.float32)


def quantize(
    x: jax.Array,
    tile: tuple[int, ...],
    *,
    power_of_two: bool = False,
    floor: float = ACTIVATION_FLOOR,
) -> Quantized:
    """`x` in tiles of this shape over its last dimensions; at the edges a tile is what is there.

    `(tile,)` or `(1, tile)` for `1 x tile`, `(tile, 1)` for `tile x 1`, `(block, block)`.
    """
    with jax.named_scope("quantize"):
        parts, inner = _tiled(x, tile)
        # Dimensions are kept: without them XLA for GPU lays out all layers' weights anew in every
        # tick of a pipeline, a tenth more memory and a third more traffic in the full model.
        peak = jnp.max(jnp.abs(parts), axis=inner, keepdims=True)
        scales = scales_of(peak, power_of_two=power_of_two, floor=floor)
        return _coded(parts, unfused(scales), inner, x.shape)


def peaks_of(x: jax.Array, tile: tuple[int, ...]) -> jax.Array:
    """The largest magnitude of each tile, in x's type."""
    parts, inner = _tiled(x, tile)
    return jnp.max(jnp.abs(parts), axis=inner)


def with_scales(x: jax.Array, scales: jax.Array, tile: tuple[int, ...]) -> Quantized:
    """`x` over the scale of its tile."""
    parts, inner = _tiled(x, tile)
    return _coded(parts, jnp.expand_dims(scales, inner), inner, x.shape)


def _coded(
    parts: jax.Array, scales: jax.Array, inner: tuple[int, ...], shape: tuple[int, ...]
) -> Quantized:
    """The parts of `_tiled` over scales that have their dimensions."""
    codes = to_e4m3(parts.astype(jnp.float32) / scales)
    return Quantized(_whole(codes, inner, shape), scales.squeeze(inner))


def to_e4m3(x: jax.Array) -> jax.Array:
    """FP32 in E4M3: to the nearest, ties to even, 448 beyond it, NaN for NaN."""
    x = jnp.clip(x, -E4M3_MAX, E4M3_MAX)
    return _by_integers(x) if kernels.platform() == "cpu" else x.astype(E4M3)


def _by_integers(x: jax.Array) -> jax.Array:
    """The same by operations that CPUs have for many numbers at once, unlike XLA's cast."""
    word = jnp.uint32

    def bits(y: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(y, word)

    magnitude = bits(x) & word(0x7FFFFFFF)
    # Of 23 bits of mantissa the last 20 go; the exponent's bias goes from 127 to 7.
    rounded = (magnitude + word(0x7FFFF) + ((magnitude >> 20) & word(1))) >> 20
    normal = rounded - word((127 - 7) << 3)
    # Below 2**-6 numbers are 2**-9 apart, as FP32's are from 2**14 on.
    start = jnp.full((), 2.0**14, jnp.float32)
    subnormal = bits(jnp.abs(x) + start) - bits(start)
    least_normal = bits(jnp.full((), 2.0**-6, jnp.float32))
    code = jnp.where(magnitude < least_normal, subnormal, normal)
    code = jnp.minimum(code, word(0x7F)) | ((bits(x) >> 24) & word(0x80))
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), E4M3)


def transposed(q: Quantized) -> Quantized:
    """Rows as columns."""
    # As integers: XLA on CPU transposes these faster.
    integers = jax.lax.bitcast_convert_type(q.codes, jnp.uint8)
    codes = jax.lax.bitcast_convert_type(unfused(integers).swapaxes(-1, -2), E4M3)
    return Quantized(codes, q.scales.swapaxes(-1, -2))


def dequantize(q: Quantized, tile: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """`codes * scales`, computed in FP32."""
    with jax.named_scope("dequantize"):
        parts, inner = _tiled(q.codes.astype(jnp.float32), tile)
        numbers = parts * jnp.expand_dims(q.scales, inner)
        return _whole(numbers, inner, q.codes.shape).astype(dtype)


def _tiled(x: jax.Array, tile: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """Each dimension that is tiled as two, filled up with zeros, and where the tiles' own are."""
    tile = (1,) * (x.ndim - len(tile)) + tile
    if any(n % t for n, t in zip(x.shape, tile, strict=True)):
        x = jnp.pad(x, [(0, -n % t) for n, t in zip(x.shape, tile, strict=True)])
    shape: list[int] = []
    inner = []
    for n, t in zip(x.shape, tile, strict=True):
        shape += [n] if t == 1 else [n // t, t]
        inner += [] if t == 1 else [len(shape) - 1]
    return x.reshape(shape), tuple(inner)


def _whole(parts: jax.Array, inner: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """The dimensions as they were before `_tiled`."""
    sizes: list[int] = []
    for i, n in enumerate(parts.shape):
        if i in inner:
            sizes[-1] *= n
        else:
            sizes.append(n)
    x = parts.reshape(sizes)
    return x if x.shape == shape else x[tuple(slice(n) for n in shape)]


# ---- E5M6, in which the input of attention's output projection waits for the backward pass


@struct.dataclass
class Packed:
    """Numbers of 12 bits and the scales that multiply them."""

    high: jax.Array
    """The first 8 bits of each, uint8 `[..., K]`."""
    low: jax.Array
    """The last 4 bits of those of the first half of K, rounded up, and, above them, of the second;
    uint8."""
    scales: jax.Array
    """As of `Quantized`."""


def pack_e5m6(x: jax.Array, tile: int, *, power_of_two: bool = True) -> Packed:
    """`x` in tiles `1 x tile` of E5M6, with the scales that it has in E4M3.

    1 sign, 5 exponent and 6 mantissa bits: FP16 without its last four, rounded to nearest, ties to
    even. The report names the format alone (section 3.3.3); bias, subnormals and packing are ours.
    """
    parts, inner = _tiled(x.astype(jnp.float32), (tile,))
    peak = jnp.max(jnp.abs(parts), axis=-1, keepdims=True)
    scales = scales_of(peak, power_of_two=power_of_two, floor=ACTIVATION_FLOOR)
    half = _whole(parts / scales, inner, x.shape).astype(jnp.float16)
    bits = jax.lax.bitcast_convert_type(half, jnp.uint16)
    codes = (bits + 7 + ((bits >> 4) & 1)) >> 4
    odd = [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)]
    first, second = jnp.split(jnp.pad(codes & 15, odd), 2, axis=-1)
    low = (first | (second << 4)).astype(jnp.uint8)
    return Packed((codes >> 4).astype(jnp.uint8), low, scales.squeeze(inner))


def unpack_e5m6(packed: Packed, tile: int, dtype: Any = jnp.float32) -> jax.Array:
    """The numbers times their scales."""
    low = jnp.concatenate([packed.low & 15, packed.low >> 4], axis=-1).astype(jnp.uint16)
    bits = ((packed.high.astype(jnp.uint16) << 4) | low[..., : packed.high.shape[-1]]) << 4
    half = jax.lax.bitcast_convert_type(bits, jnp.float16)
    return dequantize(Quantized(half, packed.scales), (tile,), dtype)
