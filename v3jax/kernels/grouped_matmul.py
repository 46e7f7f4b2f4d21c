"""Grouped matrix products on TPU: blocks of rows, each times its expert's weight (Pallas).

The grid walks the blocks of rows innermost, so that consecutive blocks of one expert keep its
weight (or its weight's gradient) in fast memory. Blocks beyond the ones in use are skipped: their
steps map to the last block in use, move nothing and compute nothing.
Dims: N rows, M blocks, R rows of a block, E experts, I inner and O outer features.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
_TILE_BYTES = 8 * 2**20
"""Most of one weight tile; two are in flight."""
_VMEM_BYTES = 64 * 2**20


@struct.dataclass
class Blocks:
    """Rows grouped by expert in `M` whole blocks: what a product over them needs to know."""

    expert_M: jax.Array
    """Expert of every block, int32, rising."""
    filled_M: jax.Array
    """Rows of every block that hold a token, int32; they come first."""
    n_used: jax.Array
    """Blocks that hold at least one token, int32; they come first."""
    block: int = struct.field(pytree_node=False)
    balanced_rows: int | None = struct.field(pytree_node=False, default=None)
    """Rows in use of a balanced batch, in a receive buffer that has room for more; None: all."""

    def cleared(self, x_NI: jax.Array) -> jax.Array:
        """The rows that hold a token, zeros in place of the others."""
        filled_MR = jnp.arange(self.block) < self.filled_M[:, None]
        return jnp.where(filled_MR.reshape(-1, 1), x_NI, 0)

    def expected_rows(self, n_rows: int) -> int:
        """Rows that a product over `n_rows` of them is expected to work on."""
        return n_rows if self.balanced_rows is None else min(n_rows, self.balanced_rows)


def fits(x_NI: jax.Array, w_EIO: jax.Array, blocks: Blocks) -> bool:
    """Whether the kernels take these shapes and types: whole lanes and sublanes of BF16."""
    _, inner, outer = w_EIO.shape
    whole = inner % LANES == 0 and outer % LANES == 0 and blocks.block % 16 == 0
    return whole and x_NI.dtype == w_EIO.dtype == jnp.bfloat16


def matmul_cost(rows: int, w_EIO: jax.Array | jax.ShapeDtypeStruct) -> pl.CostEstimate:
    """Work of either product over so many rows: each operand and the result moved once."""
    n_experts, inner, outer = w_EIO.shape
    return pl.CostEstimate(
        flops=2 * rows * inner * outer,
        transcendentals=0,
        bytes_accessed=2 * (rows * (inner + outer) + n_experts * inner * outer),
    )


def weight_gradient_cost(rows: int, w_EIO: jax.Array | jax.ShapeDtypeStruct) -> pl.CostEstimate:
    """Work of the weight's gradient over so many rows; the result is FP32."""
    n_experts, inner, outer = w_EIO.shape
    return pl.CostEstimate(
        flops=2 * rows * inner * outer,
        transcendentals=0,
        bytes_accessed=2 * rows * (inner + outer) + 4 * n_experts * inner * outer,
    )


def _tile(size: int, row_bytes: int) -> int:
    """The largest divisor of `size`, in whole lanes, whose rows fit in a tile."""
    most = max(_TILE_BYTES // row_bytes, LANES)
    return next(
        tile
        for tile in range(size, 0, -LANES)
        if size % tile == 0 and (tile <= most or tile == LANES)
    )


def _at(m: jax.Array, n_used: jax.Array) -> jax.Array:
    """The block of a grid step: beyond the ones in use, the last of them."""
    return jnp.minimum(m, jnp.maximum(n_used[0] - 1, 0))


def _product(
    expert_M: jax.Array,
    n_used: jax.Array,
    x: jax.Array,
    w: jax.Array,
    y: jax.Array,
    *,
    contracted: int,
) -> None:
    del expert_M

    @pl.when(pl.program_id(1) < n_used[0])
    def _() -> None:
        dims = (((1,), (contracted,)), ((), ()))
        product = jax.lax.dot_general(x[...], w[...], dims, preferred_element_type=jnp.float32)
        y[...] = product.astype(y.dtype)


def grouped_matmul(
    x_NI: jax.Array,
    w_EIO: jax.Array,
    blocks: Blocks,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """`[N, I] x [E, I, O] -> [N, O]`, or `transposed`, `[N, O] x [E, I, O] -> [N, I]`.

    Rows of blocks that are not in use hold nothing of use.
    """
    n_rows, block = x_NI.shape[0], blocks.block
    _, inner, outer = w_EIO.shape
    n_in, n_out = (outer, inner) if transposed else (inner, outer)
    tile = _tile(n_out, n_in * w_EIO.dtype.itemsize)

    def weight(o: jax.Array, m: jax.Array, expert_M: jax.Array, n_used: jax.Array) -> tuple:
        e = expert_M[_at(m, n_used)]
        return (e, o, 0) if transposed else (e, 0, o)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(n_out // tile, n_rows // block),
        in_specs=[
            pl.BlockSpec((block, n_in), lambda o, m, _, n: (_at(m, n), 0)),
            pl.BlockSpec((None, tile, n_in) if transposed else (None, n_in, tile), weight),
        ],
        out_specs=pl.BlockSpec((block, tile), lambda o, m, _, n: (_at(m, n), o)),
    )
    return pl.pallas_call(
        functools.partial(_product, contracted=1 if transposed else 0),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((n_rows, n_out), x_NI.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=matmul_cost(blocks.expected_rows(n_rows), w_EIO),
        interpret=interpret,
        name="grouped_matmul_transposed" if transposed else "grouped_matmul",
    )(blocks.expert_M, blocks.n_used[None], x_NI, w_EIO)


def _gradient(
    expert_M: jax.Array,
    n_used: jax.Array,
    filled_M: jax.Array,
    x: jax.Array,
    dy: jax.Array,
    dw: jax.Array,
) -> None:
    m = pl.program_id(2)
    before = expert_M[jnp.maximum(m - 1, 0)]

    @pl.when(m < n_used[0])
    def _() -> None:
        # Rows that hold no token may hold anything, also in both operands.
        rows = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
        filled = rows < filled_M[m]
        product = jax.lax.dot_general(
            jnp.where(filled, x[...], 0),
            jnp.where(filled, dy[...], 0),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        first = (m == 0) | (expert_M[m] != before)
        dw[...] = jnp.where(first, 0.0, dw[...]) + product


def grouped_weight_gradient(
    x_NI: jax.Array,
    dy_NO: jax.Array,
    w_EIO: jax.Array | jax.ShapeDtypeStruct,
    blocks: Blocks,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`sum over an expert's rows of x^T dy`, FP32 `[E, I, O]`; 0 for an expert without rows."""
    n_rows, block = x_NI.shape[0], blocks.block
    n_experts, inner, outer = w_EIO.shape
    tile_o = _tile(outer, 4 * 1024)
    tile_i = _tile(inner, 4 * tile_o)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(inner // tile_i, outer // tile_o, n_rows // block),
        in_specs=[
            pl.BlockSpec((block, tile_i), lambda i, o, m, _, n, f: (_at(m, n), i)),
            pl.BlockSpec((block, tile_o), lambda i, o, m, _, n, f: (_at(m, n), o)),
        ],
        out_specs=pl.BlockSpec(
            (None, tile_i, tile_o), lambda i, o, m, e, n, f: (e[_at(m, n)], i, o)
        ),
    )
    dw_EIO = pl.pallas_call(
        _gradient,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((n_experts, inner, outer), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=weight_gradient_cost(blocks.expected_rows(n_rows), w_EIO),
        interpret=interpret,
        name="grouped_weight_gradient",
    )(blocks.expert_M, blocks.n_used[None], blocks.filled_M, x_NI, dy_NO)
    used_M = jnp.arange(blocks.expert_M.shape[0]) < blocks.n_used
    met_E = jnp.any((blocks.expert_M == jnp.arange(n_experts)[:, None]) & used_M, axis=1)
    return jnp.where(met_E[:, None, None], dw_EIO, 0.0)
