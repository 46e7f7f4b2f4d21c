"""FP8 matrix products on Hopper GPUs (Pallas, Mosaic GPU), the twins of `ops.fp8.gemm`.

One warpgroup loads tiles by TMA, two multiply: each 64 rows of a 128 x 128 tile of the result, by
tensor cores over 128 elements of the contraction, after which the partial sums are scaled and
added up in FP32 registers (report sections 3.3.2 and 3.5.2). The grid is one program a
multiprocessor, which walks over tiles so that neighbours share operands in the L2 cache.

Operands have the contraction last; sizes are whole 128s. Each function is jitted, so that a kernel
is traced once for all that call it with the same shapes. Dims: M and N rows of the operands, K
contraction, Q = K / 128, T tokens, E experts.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from v3jax.kernels import device_kind, platform

BLOCK = 128
_GROUPS = 2
_ROWS = BLOCK // _GROUPS
"""Of the result, of one multiplying warpgroup."""
_STAGES = 4
_LOADER_REGISTERS = 40
_SNAKE = 8
"""Tiles side by side on the walk over the result."""
_BY_ROW, _BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True)
class Run:
    """Where a kernel runs."""

    n_programs: int = 132
    """Multiprocessors to use."""
    interpret: Any = False
    """`plgpu.InterpretGPUParams` to run on a CPU."""
    fence: bool = True
    """Whether reads of scales are fenced from the loader's next write to their place; off only to
    show that the race detector sees it."""


def runs_here() -> bool:
    """Whether the program being traced is for a GPU that has these kernels."""
    kind = r"\bG?(H20|H100|H200|H800)\b"
    return platform() == "gpu" and re.search(kind, device_kind()) is not None


@dataclass(frozen=True)
class _Tile:
    """128 x 128 of a result, as a program finds it in memory."""

    operands: tuple[Any, ...]
    """128 rows of A and B, over the whole contraction, and the scales of both or of A alone."""
    out: Any
    first: Any = 0
    """Where the contraction begins, in steps of 128."""
    steps: Any = None
    """How long it is; by default all of it."""
    of_b: Callable[[Any], Any] | None = None
    """The scale of B at a step, where it is one for the tile."""


@functools.partial(jax.jit, static_argnames=("dtype", "run"))
def gemm_nt(
    a_MK: jax.Array,
    scales_MQ: jax.Array,
    b_NK: jax.Array,
    scales_NQ: jax.Array,
    dtype: Any,
    run: Run | None = None,
) -> jax.Array:
    """`[M, K] x [N, K] -> [M, N]`: scales of a row's 128 columns, and of 128 x 128 blocks."""
    shape = (a_MK.shape[0], b_NK.shape[0])

    def kernel(a: Any, scales_a: Any, b: Any, scales_b: Any, out: Any) -> None:
        def tile(_: Any, mi: Any, ni: Any, multiply: Callable[[_Tile], None]) -> None:
            operands = (_rows(a, mi), _rows(b, ni), scales_a.at[:, _at(mi)])
            multiply(_Tile(operands, _corner(out, mi, ni), of_b=lambda step: scales_b[ni, step]))

        _walk(kernel_run, (a, b, scales_a), _grid(1, shape), tile, dtype)

    kernel_run = run or Run()
    result = jax.ShapeDtypeStruct(shape, dtype)
    return _call(kernel, result, kernel_run, "fp8_gemm_nt")(a_MK, scales_MQ.T, b_NK, scales_NQ)


@functools.partial(jax.jit, static_argnames=("dtype", "run"))
def m_grouped_nt(
    a_MK: jax.Array,
    scales_MQ: jax.Array,
    b_ENK: jax.Array,
    scales_ENQ: jax.Array,
    expert_M: jax.Array,
    dtype: Any,
    run: Run | None = None,
) -> jax.Array:
    """Each 128 rows by their expert's matrix: `[M, K] x [E, N, K] -> [M, N]`.

    `expert_M` has the expert of each 128 rows, int32; the result of -1 is left as it is.
    """
    shape = (a_MK.shape[0], b_ENK.shape[1])

    def kernel(a: Any, scales_a: Any, b: Any, scales_b: Any, experts: Any, out: Any) -> None:
        def tile(_: Any, mi: Any, ni: Any, multiply: Callable[[_Tile], None]) -> None:
            expert = experts[mi]

            @pl.when(expert >= 0)
            def _() -> None:
                operands = (_rows(a, mi), _rows(b.at[expert], ni), scales_a.at[:, _at(mi)])
                corner = _corner(out, mi, ni)
                multiply(_Tile(operands, corner, of_b=lambda step: scales_b[expert, ni, step]))

        _walk(kernel_run, (a, b.at[0], scales_a), _grid(1, shape), tile, dtype)

    kernel_run = run or Run()
    result = jax.ShapeDtypeStruct(shape, dtype)
    call = _call(kernel, result, kernel_run, "fp8_m_grouped_nt")
    return call(a_MK, scales_MQ.T, b_ENK, scales_ENQ, expert_M)


@functools.partial(jax.jit, static_argnames=("run",))
def k_grouped_nt(
    a_MT: jax.Array,
    scales_MQ: jax.Array,
    b_NT: jax.Array,
    scales_NQ: jax.Array,
    first_E: jax.Array,
    run: Run | None = None,
) -> jax.Array:
    """The sum over each expert's tokens: `[M, T] x [N, T] -> [E, M, N]`, FP32.

    Scales of a row's 128 tokens in both. `first_E` has the first 128 tokens of every expert and,
    last, the end of them, int32 `[E + 1]`; an expert without tokens gets zeros.
    """
    n_experts, shape = first_E.shape[0] - 1, (a_MT.shape[0], b_NT.shape[0])

    def kernel(a: Any, scales_a: Any, b: Any, scales_b: Any, first: Any, out: Any) -> None:
        def tile(e: Any, mi: Any, ni: Any, multiply: Callable[[_Tile], None]) -> None:
            scales = (scales_a.at[:, _at(mi)], scales_b.at[:, _at(ni)])
            steps = first[e + 1] - first[e]
            operands = (_rows(a, mi), _rows(b, ni), *scales)
            multiply(_Tile(operands, _corner(out.at[e], mi, ni), first[e], steps))

        operands = (a, b, scales_a, scales_b)
        _walk(kernel_run, operands, _grid(n_experts, shape), tile, jnp.float32)

    kernel_run = run or Run()
    result = jax.ShapeDtypeStruct((n_experts, *shape), jnp.float32)
    call = _call(kernel, result, kernel_run, "fp8_k_grouped_nt")
    return call(a_MT, scales_MQ.T, b_NT, scales_NQ.T, first_E)


def _walk(
    run: Run,
    operands: tuple[Any, ...],
    grid: tuple[int, int, int],
    tile: Callable[..., None],
    dtype: Any,
) -> None:
    """Computes tiles of the result, each by all warpgroups of one program.

    `tile(group, mi, ni, multiply)` says what one of them is made of and calls `multiply` with it.
    """
    n_steps = operands[0].shape[1] // BLOCK
    n_scales = len(operands) - 2

    def pipeline(body: Any, context: Any, first: Any = 0, steps: Any = n_steps) -> Any:
        matrix = plgpu.BlockSpec((BLOCK, BLOCK), lambda step: (0, first + step))
        scale = plgpu.BlockSpec((None, BLOCK), lambda step: (first + step, 0))
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(steps,),
            in_specs=[matrix, matrix, *[scale] * n_scales],
            compute_context=context,
            memory_registers=_LOADER_REGISTERS,
            num_compute_wgs=_GROUPS,
            max_concurrent_steps=_STAGES,
            wg_axis="warpgroup",
        )

    def nothing(*_: Any, **__: Any) -> None: ...

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(nothing, nothing).get_allocations(*operands),
        out_smem=plgpu.SMEM((_GROUPS, _ROWS, BLOCK), dtype),
        collective_axes="warpgroup",
    )
    def _(buffers: Any, out_smem: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        rows = pl.ds(warpgroup * _ROWS, _ROWS)

        def store(total: jax.Array, out: Any) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            place = out_smem.at[warpgroup]
            place[...] = total.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(place, out.at[rows])

        def multiply(tile: _Tile) -> None:
            def context(accumulate: Any) -> None:
                store(accumulate(_zeros()), tile.out)

            def body(index: Any, a: Any, b: Any, *rest: Any) -> jax.Array:
                *scales, total = rest

                def partial_sums(sums: Any) -> tuple[jax.Array, ...]:
                    plgpu.wgmma(sums, a.at[rows], b.T)
                    of_a = plgpu.load(scales[0].at[rows], layout=_BY_ROW)
                    if tile.of_b is not None:
                        of_a = of_a * tile.of_b(index[0])
                    of_b = [plgpu.load(s, layout=_BY_COLUMN) for s in scales[1:]]
                    if run.fence:
                        plgpu.commit_smem()
                    return sums[...], of_a, *of_b

                part, of_a, *of_b = pl.run_scoped(
                    partial_sums, plgpu.WGMMAAccumulatorRef((_ROWS, BLOCK), jnp.float32)
                )
                part = part * lax.broadcast_in_dim(of_a, part.shape, [0])
                for s in of_b:
                    part = part * lax.broadcast_in_dim(s, part.shape, [1])
                return total + part

            steps = n_steps if tile.steps is None else tile.steps
            run_pipeline = pipeline(body, context, tile.first, steps)

            @pl.when(steps > 0)
            def _() -> None:
                run_pipeline(*tile.operands, allocations=buffers)

            if tile.steps is not None:

                @pl.when((steps == 0) & (warpgroup < _GROUPS))
                def _() -> None:
                    store(_zeros(), tile.out)

        n_groups, m_tiles, n_tiles = grid

        @plgpu.nd_loop((n_groups, m_tiles * n_tiles), collective_axes="sm")
        def _(loop: Any) -> None:
            group, index = loop.index
            mi, ni = plgpu.planar_snake(index, (m_tiles, n_tiles), 1, _SNAKE)
            tile(group, mi, ni, multiply)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _call(kernel: Callable[..., None], result: Any, run: Run, name: str) -> Any:
    return call(kernel, result, run, name, num_threads=_GROUPS + 1, thread_name="warpgroup")


def call(kernel: Callable[..., None], result: Any, run: Run, name: str, **threads: Any) -> Any:
    """The function of arrays that a kernel over all multiprocessors, the axis `sm`, computes."""
    return plgpu.kernel(
        kernel,
        out_type=result,
        grid=(run.n_programs,),
        grid_names=("sm",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=run.interpret,
        kernel_name=name,
        **threads,
    )


def _zeros() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((_ROWS, BLOCK), jnp.float32), plgpu.Layout.WGMMA)


def _grid(n_groups: int, shape: tuple[int, int]) -> tuple[int, int, int]:
    return n_groups, shape[0] // BLOCK, shape[1] // BLOCK


def _at(i: Any) -> Any:
    return pl.ds(i * BLOCK, BLOCK)


def _rows(x: Any, i: Any) -> Any:
    return x.at[_at(i), :]


def _corner(x: Any, mi: Any, ni: Any) -> Any:
    return x.at[_at(mi), _at(ni)]
