"""Quantisation to FP8 on Hopper GPUs (Pallas, Mosaic GPU), the twins of `ops.fp8.quantize`.

Each program takes tiles of 64 x 128 numbers, brought and taken away by TMA. Scales leave as the
products of `fp8_gpu` read them, tiles first. Dims: N rows, K columns, Q = K / 128, T = N / 128.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from v3jax.kernels.fp8_gpu import BLOCK, Run, call

_ROWS = 64
_LARGEST = 448.0
_LAYOUT = plgpu.Layout.WGMMA


@functools.partial(jax.jit, static_argnames=("power_of_two", "floor", "run"))
def rows(
    x_NK: jax.Array, *, power_of_two: bool, floor: float, run: Run | None = None
) -> tuple[jax.Array, jax.Array]:
    """Codes `[N, K]` and the scales of each row's 128 columns, `[N, Q]`; whole 64s of rows."""
    run = run or Run()

    def load(parts: list[Any], gates: Any) -> jax.Array:
        del gates
        return plgpu.load(parts[0], layout=_LAYOUT).astype(jnp.float32)

    return _by_rows(x_NK, None, x_NK.shape[1], load, 1, power_of_two, floor, run, "fp8_quantize")


@functools.partial(jax.jit, static_argnames=("power_of_two", "floor", "run"))
def swiglu_rows(
    gate_up_N2K: jax.Array,
    gates_N: jax.Array | None,
    *,
    power_of_two: bool,
    floor: float,
    run: Run | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same of `silu(gate) * up`, times a row's gate if given, rounded to the input's type first
    as `ops.norm.swiglu` does; it is never in memory."""
    run = run or Run()
    dtype = gate_up_N2K.dtype

    def load(parts: list[Any], gates: Any) -> jax.Array:
        gate, up = (plgpu.load(p, layout=_LAYOUT).astype(jnp.float32) for p in parts)
        hidden = (gate / (1.0 + jnp.exp(-gate)) * up).astype(dtype).astype(jnp.float32)
        if gates is None:
            return hidden
        by_row = plgpu.load(gates, layout=_LAYOUT.reduce(1))
        hidden = hidden * lax.broadcast_in_dim(by_row, hidden.shape, [0])
        return hidden.astype(dtype).astype(jnp.float32)

    width = gate_up_N2K.shape[1] // 2
    return _by_rows(
        gate_up_N2K, gates_N, width, load, 2, power_of_two, floor, run, "fp8_swiglu_quantize"
    )


def _by_rows(
    x: jax.Array,
    gates: jax.Array | None,
    width: int,
    load: Callable[[list[Any], Any], jax.Array],
    n_parts: int,
    power_of_two: bool,
    floor: float,
    run: Run,
    name: str,
) -> tuple[jax.Array, jax.Array]:
    n_rows = x.shape[0]
    given = (x,) if gates is None else (x, gates)

    def kernel(*refs: Any) -> None:
        x_ref, *gate_refs, codes_ref, scales_ref = refs

        @plgpu.nd_loop((n_rows // _ROWS, width // BLOCK), collective_axes="sm")
        def _(loop: Any) -> None:
            ni, ki = loop.index
            at = pl.ds(ni * _ROWS, _ROWS)

            def scope(parts: list[Any], row_gates: Any, codes: Any, scales: Any, bar: Any) -> None:
                for i, part in enumerate(parts):
                    columns = pl.ds(i * width + ki * BLOCK, BLOCK)
                    plgpu.copy_gmem_to_smem(x_ref.at[at, columns], part, bar)
                for ref in gate_refs:
                    plgpu.copy_gmem_to_smem(ref.at[at], row_gates, bar)
                plgpu.barrier_wait(bar)
                numbers = load(parts, row_gates if gate_refs else None)
                to = codes_ref.at[at, pl.ds(ki * BLOCK, BLOCK)], scales_ref.at[ki, at]
                _leave(numbers, power_of_two, floor, (codes, scales), to)

            pl.run_scoped(
                scope,
                [plgpu.SMEM((_ROWS, BLOCK), x.dtype)] * n_parts,
                plgpu.SMEM((_ROWS,), jnp.float32),
                plgpu.SMEM((_ROWS, BLOCK), jnp.float8_e4m3fn),
                plgpu.SMEM((_ROWS,), jnp.float32),
                plgpu.Barrier(num_arrivals=n_parts + len(gate_refs)),
            )

    result = (
        jax.ShapeDtypeStruct((n_rows, width), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((width // BLOCK, n_rows), jnp.float32),
    )
    codes, scales = call(kernel, result, run, name)(*given)
    return codes, scales.T


@functools.partial(jax.jit, static_argnames=("power_of_two", "floor", "run"))
def columns(
    x_NK: jax.Array, *, power_of_two: bool, floor: float, run: Run | None = None
) -> tuple[jax.Array, jax.Array]:
    """Codes `[K, N]`, transposed, and the scales of each column's 128 rows, `[K, T]`."""
    run = run or Run()
    n_rows, width = x_NK.shape

    def kernel(x_ref: Any, codes_ref: Any, scales_ref: Any) -> None:
        @plgpu.nd_loop((n_rows // BLOCK, width // _ROWS), collective_axes="sm")
        def _(loop: Any) -> None:
            ni, ki = loop.index
            at = pl.ds(ki * _ROWS, _ROWS)

            def scope(x: Any, codes: Any, scales: Any, bar: Any) -> None:
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(ni * BLOCK, BLOCK), at], x, bar)
                plgpu.barrier_wait(bar)
                numbers = plgpu.load(
                    x.T,
                    layout=_LAYOUT,
                ).astype(jnp.float32)
                to = codes_ref.at[at, pl.ds(ni * BLOCK, BLOCK)], scales_ref.at[ni, at]
                _leave(numbers, power_of_two, floor, (codes, scales), to)

            pl.run_scoped(
                scope,
                plgpu.SMEM((BLOCK, _ROWS), x_NK.dtype),
                plgpu.SMEM((_ROWS, BLOCK), jnp.float8_e4m3fn),
                plgpu.SMEM((_ROWS,), jnp.float32),
                plgpu.Barrier(),
            )

    result = (
        jax.ShapeDtypeStruct((width, n_rows), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((n_rows // BLOCK, width), jnp.float32),
    )
    codes, scales = call(kernel, result, run, "fp8_quantize_columns")(x_NK)
    return codes, scales.T


def _leave(
    numbers: jax.Array,
    power_of_two: bool,
    floor: float,
    places: tuple[Any, Any],
    to: tuple[Any, Any],
) -> None:
    """Quantises a tile's rows and takes codes and scales from their places to memory."""
    scale = _scales(jnp.max(jnp.abs(numbers), axis=1), power_of_two, floor)
    codes, scales = places
    codes[...] = _codes(numbers, lax.broadcast_in_dim(scale, numbers.shape, [0]))
    scales[...] = scale
    plgpu.commit_smem()
    for place, target in zip(places, to, strict=True):
        plgpu.copy_smem_to_gmem(place, target)
    plgpu.wait_smem_to_gmem(0)


def _scales(peak: jax.Array, power_of_two: bool, floor: float) -> jax.Array:
    scale = jnp.maximum(peak, floor) / _LARGEST
    if not power_of_two:
        return scale
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    return lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


def _codes(numbers: jax.Array, scales: jax.Array) -> jax.Array:
    clipped = jnp.clip(numbers / scales, -_LARGEST, _LARGEST)
    return plgpu.layout_cast(clipped, _LAYOUT).astype(jnp.float8_e4m3fn)
