"""Rows gathered and added up on TPU, each by one copy from main memory (Pallas).

Rows are `[8, D / 8]`, whole tiles of memory, so that a copy reads nothing else. Rows of a step are
under way together while the result of the step before is written back.
Dims: N rows given, M rows wanted, T tokens, K rows of a token, R rows of a step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_STEP = 128
"""Rows under way together: 1.8 MB of V3's."""


def fits(x_N8d: jax.Array, n_rows: int) -> bool:
    """Whether the kernels take rows of this shape and type, so many of them."""
    tiled = x_N8d.ndim == 3 and x_N8d.shape[1] == 8 and x_N8d.shape[2] % 128 == 0
    return tiled and x_N8d.dtype == jnp.bfloat16 and n_rows % _STEP == 0


def cost(n_read: int, n_written: int, x_N8d: jax.Array | jax.ShapeDtypeStruct) -> pl.CostEstimate:
    """Every row read and written once; an addition for each number read beyond those written."""
    width = x_N8d.shape[1] * x_N8d.shape[2]
    return pl.CostEstimate(
        flops=(n_read - n_written) * width,
        transcendentals=0,
        bytes_accessed=(n_read + n_written) * width * x_N8d.dtype.itemsize,
    )


def _fetch(index: Any, x: Any, into: Any, arrived: Any, n_rows: int) -> None:
    """Starts all copies of a step, then waits for each; an index past the end reads the last."""
    last = x.shape[0] - 1

    def copy(r: jax.Array) -> Any:
        row = jnp.clip(index[0, r], 0, last)
        return pltpu.make_async_copy(x.at[row], into.at[r], arrived)

    jax.lax.fori_loop(0, n_rows, lambda r, _: copy(r).start(), None)
    jax.lax.fori_loop(0, n_rows, lambda r, _: copy(r).wait(), None)


def _gather(index: Any, x: Any, out: Any, arrived: Any) -> None:
    _fetch(index, x, out, arrived, out.shape[0])


def gather_rows(x_N8d: jax.Array, index_M: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`x[index]`, `[M, 8, d]`; an index past the end gives some row."""
    row = x_N8d.shape[1:]
    n_steps = index_M.size // _STEP
    return pl.pallas_call(
        _gather,
        grid=(n_steps,),
        in_specs=[
            pl.BlockSpec((None, 1, _STEP), lambda s: (s, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((_STEP, *row), lambda s: (s, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((index_M.size, *row), x_N8d.dtype),
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        cost_estimate=cost(index_M.size, index_M.size, x_N8d),
        interpret=interpret,
        name="gather_rows",
    )(index_M.reshape(n_steps, 1, _STEP), x_N8d)


def _sum(index: Any, x: Any, out: Any, rows: Any, arrived: Any, *, top_k: int) -> None:
    n_rows = rows.shape[0]
    _fetch(index, x, rows, arrived, n_rows)
    n_given = x.shape[0]

    def one(t: jax.Array, _: None) -> None:
        total = jnp.zeros(out.shape[1:], jnp.float32)
        for k in range(top_k):
            r = t * top_k + k
            row = rows[r].astype(jnp.float32)
            total += jnp.where(index[0, r] < n_given, row, 0.0)
        out[t] = total.astype(out.dtype)

    jax.lax.fori_loop(0, n_rows // top_k, one, None)


def sum_rows(x_N8d: jax.Array, row_TK: jax.Array, *, interpret: bool = False) -> jax.Array:
    """The sum of each token's rows in FP32, `[T, 8, d]`; an index past the end adds nothing."""
    row, (n_tokens, top_k) = x_N8d.shape[1:], row_TK.shape
    n_steps = row_TK.size // _STEP
    return pl.pallas_call(
        functools.partial(_sum, top_k=top_k),
        grid=(n_steps,),
        in_specs=[
            pl.BlockSpec((None, 1, _STEP), lambda s: (s, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((_STEP // top_k, *row), lambda s: (s, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((n_tokens, *row), x_N8d.dtype),
        scratch_shapes=[pltpu.VMEM((_STEP, *row), x_N8d.dtype), pltpu.SemaphoreType.DMA],
        cost_estimate=cost(row_TK.size, n_tokens, x_N8d),
        interpret=interpret,
        name="sum_rows",
    )(row_TK.reshape(n_steps, 1, _STEP), x_N8d)
