"""FP8 matrix products on TPU (Pallas), the twins of `ops.fp8.gemm`.

The grid walks the blocks of rows innermost, so that an expert's weight stays in fast memory. TPU 7x
multiplies E4M3 as it is; the others get BF16, which holds it. Sums over 128 elements of the
contraction are scaled and added up in FP32. Sizes are whole 128s.
Dims: M and N rows of the operands, K contraction, Q = K / 128, E experts, B blocks of rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v3jax.kernels import device_kind, platform

BLOCK = 128
_TILE_BYTES = 4 * 2**20
"""Most of one weight tile; two are in flight."""
_VMEM_BYTES = 64 * 2**20
_NATIVE = ("TPU7x",)
"""Kinds of devices that multiply FP8."""


def runs_here() -> bool:
    """Whether the program being traced is for a TPU."""
    return platform() == "tpu"


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def gemm_nt(
    a_MK: jax.Array,
    scales_MQ: jax.Array,
    b_NK: jax.Array,
    scales_NQ: jax.Array,
    dtype: Any,
    *,
    interpret: Any = False,
) -> jax.Array:
    """`[M, K] x [N, K] -> [M, N]`: scales of a row's 128 columns, and of 128 x 128 blocks."""
    everyone_B = jnp.zeros(a_MK.shape[0] // BLOCK, jnp.int32)
    return m_grouped_nt(
        a_MK, scales_MQ, b_NK[None], scales_NQ[None], everyone_B, dtype, interpret=interpret
    )


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def m_grouped_nt(
    a_MK: jax.Array,
    scales_MQ: jax.Array,
    b_ENK: jax.Array,
    scales_ENQ: jax.Array,
    expert_B: jax.Array,
    dtype: Any,
    *,
    interpret: Any = False,
) -> jax.Array:
    """Each 128 rows by their expert's matrix: `[M, K] x [E, N, K] -> [M, N]`.

    `expert_B` names it, int32, -1 from some block on: results there are left as they are.
    """
    (m, k), n = a_MK.shape, b_ENK.shape[1]
    tile = next(
        t for t in range(n, 0, -BLOCK) if n % t == 0 and (t * k <= _TILE_BYTES or t == BLOCK)
    )
    n_used = jnp.sum(expert_B >= 0, dtype=jnp.int32)
    # A block's scale beside each of its columns.
    by_column_EQN = jnp.repeat(scales_ENQ, BLOCK, axis=1).swapaxes(1, 2)

    def block(b: jax.Array, n_used: jax.Array) -> jax.Array:
        return jnp.minimum(b, jnp.maximum(n_used[0] - 1, 0))

    def expert(b: jax.Array, experts: jax.Array, n_used: jax.Array) -> jax.Array:
        return jnp.maximum(experts[block(b, n_used)], 0)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(n // tile, m // BLOCK),
        in_specs=[
            pl.BlockSpec((BLOCK, k), lambda o, b, e, u: (block(b, u), 0)),
            pl.BlockSpec((BLOCK, k // BLOCK), lambda o, b, e, u: (block(b, u), 0)),
            pl.BlockSpec((None, tile, k), lambda o, b, e, u: (expert(b, e, u), o, 0)),
            pl.BlockSpec((None, k // BLOCK, tile), lambda o, b, e, u: (expert(b, e, u), 0, o)),
        ],
        out_specs=pl.BlockSpec((BLOCK, tile), lambda o, b, e, u: (block(b, u), o)),
    )
    return pl.pallas_call(
        functools.partial(_product, native=device_kind() in _NATIVE),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((m, n), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * n * k,
            transcendentals=0,
            bytes_accessed=m * k + b_ENK.size + m * n * jnp.dtype(dtype).itemsize,
        ),
        interpret=interpret,
        name="fp8_m_grouped_nt",
    )(expert_B, n_used[None], a_MK, scales_MQ, b_ENK, by_column_EQN)


def _product(
    experts: Any,
    n_used: Any,
    a: Any,
    scales_a: Any,
    b: Any,
    scales_b: Any,
    out: Any,
    *,
    native: bool,
) -> None:
    del experts

    @pl.when(pl.program_id(1) < n_used[0])
    def _() -> None:
        total = jnp.zeros(out.shape, jnp.float32)
        for q in range(scales_a.shape[1]):
            x, y = (ref[:, q * BLOCK : (q + 1) * BLOCK] for ref in (a, b))
            if not native:
                x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
            dims = (((1,), (1,)), ((), ()))
            part = jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
            total += part * scales_a[:, q : q + 1] * scales_b[q : q + 1, :]
        out[...] = total.astype(out.dtype)
