"""FP8 by NumPy and ml_dtypes, one tile after the other: what `v3jax.ops.fp8` is compared with."""

import itertools

import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def tiles(shape: tuple[int, ...], tile: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Where each tile lies; `tile` is of the last dimensions."""
    sides = (1,) * (len(shape) - len(tile)) + tile
    starts = [range(0, n, t) for n, t in zip(shape, sides, strict=True)]
    return [
        tuple(slice(s, s + t) for s, t in zip(at, sides, strict=True))
        for at in itertools.product(*starts)
    ]


def scale_shape(shape: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    sides = (1,) * (len(shape) - len(tile)) + tile
    return tuple(-(-n // t) for n, t in zip(shape, sides, strict=True))


def scales(
    x: np.ndarray, tile: tuple[int, ...], *, power_of_two: bool = False, floor: float = 1e-4
) -> np.ndarray:
    found = []
    for at in tiles(x.shape, tile):
        peak = max(np.float32(np.abs(x[at].astype(np.float32)).max()), np.float32(floor))
        scale = np.float32(peak) / np.float32(448)
        found.append(np.exp2(np.ceil(np.log2(np.float64(scale)))) if power_of_two else scale)
    return np.array(found, np.float32).reshape(scale_shape(x.shape, tile))


def codes(x: np.ndarray, scale: np.ndarray, tile: tuple[int, ...]) -> np.ndarray:
    out = np.empty(x.shape, E4M3)
    for at, s in zip(tiles(x.shape, tile), scale.reshape(-1), strict=True):
        out[at] = np.clip(x[at].astype(np.float32) / s, -448, 448).astype(E4M3)
    return out


def numbers(code: np.ndarray, scale: np.ndarray, tile: tuple[int, ...]) -> np.ndarray:
    """Codes times scales, FP64."""
    out = np.empty(code.shape, np.float64)
    for at, s in zip(tiles(code.shape, tile), scale.reshape(-1), strict=True):
        out[at] = code[at].astype(np.float64) * np.float64(s)
    return out


def e5m6(x: np.ndarray) -> np.ndarray:
    """Rounded to the nearest of all numbers of 1 sign, 5 exponent and 6 mantissa bits, ties to even
    codes; within their range."""
    code = np.arange(2**11)
    exponent, mantissa = code >> 6, code & 63
    grid = np.where(
        exponent == 0, mantissa * 2.0**-20, (64 + mantissa) * 2.0 ** (exponent - 15.0 - 6)
    )[: 31 << 6]
    right = np.clip(np.searchsorted(grid, np.abs(x)), 1, len(grid) - 1)
    low, high = np.abs(x) - grid[right - 1], grid[right] - np.abs(x)
    nearest = np.where((low < high) | ((low == high) & (right % 2 == 1)), right - 1, right)
    return np.sign(x) * grid[nearest]
