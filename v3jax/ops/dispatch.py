"""Tokens sorted by expert into whole blocks of rows, and back, without dropping any.

Every expert's rows start on a block boundary, so a block belongs to one expert and a product over
blocks does work proportional to the tokens routed. Both directions and both gradients are gathers.
Dims: T tokens, K experts of a token, E experts, N rows, M blocks, D features.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from v3jax import kernels
from v3jax.kernels import rows as kernel
from v3jax.kernels.grouped_matmul import Blocks

_MAX_BLOCK = {"gpu": 1024}
"""By platform, 128 elsewhere. A GPU reads an expert's weight, and adds to its FP32 gradient, once a
block, which takes longer than the products of few rows."""
_MIN_BLOCK = 8


@struct.dataclass
class Layout:
    """Where each (token, choice) sits among `N = M * block` rows sorted by expert."""

    row_TK: jax.Array
    """Row of every choice of every token, int32; `N` for a choice of no expert."""
    token_N: jax.Array
    """Token of every row, int32; `T` for padding rows."""
    choice_N: jax.Array
    """Flat index `token * K + choice` of every row, int32; `T * K` for padding rows."""
    load_E: jax.Array
    """Choices of every expert, int32."""
    blocks: Blocks
    partial: bool = struct.field(pytree_node=False)
    """Whether there may be choices of no expert."""


def block_rows(n_choices: int, n_experts: int) -> int:
    """Rows of a block: a power of two near an eighth of an expert's mean load, within bounds.

    Smaller blocks waste less padding, larger ones make better matrix products.
    """
    mean_load = max(n_choices / n_experts, 1.0)
    most = _MAX_BLOCK.get(kernels.platform(), 128)
    return int(np.clip(2 ** int(np.log2(mean_load) - 2), _MIN_BLOCK, most))


def n_blocks_for(n_choices: int, n_experts: int, block: int) -> int:
    """Blocks that hold so many choices however they fall: each expert met fills one row of its
    last block at least."""
    return (n_choices + min(n_experts, n_choices) * (block - 1)) // block


def make_layout(
    experts_TK: jax.Array,
    n_experts: int,
    block: int | None = None,
    *,
    partial: bool = False,
    max_choices: int | None = None,
) -> Layout:
    """Puts the choices in the experts' order, stably, each expert's rows padded to whole blocks.

    The experts of a token are distinct. With `partial`, a choice equal to `n_experts` is of no
    expert and gets no row; `max_choices` is then the most that are of one (the caller sees to it),
    all of them by default.
    """
    with jax.named_scope("make_layout"):
        n_choices, top_k = experts_TK.size, experts_TK.shape[1]
        most = n_choices if max_choices is None else min(max_choices, n_choices)
        block = block_rows(most, n_experts) if block is None else block
        n_blocks = n_blocks_for(most, n_experts, block)
        place_TK, load_E = places(experts_TK, n_experts)
        end_block_E = jnp.cumsum(-(-load_E // block), dtype=jnp.int32)
        first_row_E = (end_block_E - (-(-load_E // block))) * block
        row_TK = place_TK + _of_choices(first_row_E, experts_TK)
        if partial:
            row_TK = jnp.where(experts_TK < n_experts, row_TK, n_blocks * block)
        choice_N = jnp.full(n_blocks * block, n_choices, jnp.int32)
        choice_N = choice_N.at[row_TK.reshape(-1)].set(
            jnp.arange(n_choices, dtype=jnp.int32), mode="drop", unique_indices=not partial
        )
        return Layout(
            row_TK=row_TK,
            token_N=choice_N // top_k,
            choice_N=choice_N,
            load_E=load_E,
            blocks=Blocks(*blocks_of(load_E, end_block_E, n_blocks, block), block=block),
            partial=partial,
        )


def blocks_of(
    load_E: jax.Array, end_block_E: jax.Array, n_blocks: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each block's expert and rows in use, `[M]`, and the number of blocks in use; int32.

    Args:
      load_E: rows of each expert.
      end_block_E: blocks up to the end of each expert's.
    """
    m = jnp.arange(n_blocks, dtype=jnp.int32)
    expert_M = jnp.sum(m[:, None] >= end_block_E, axis=1, dtype=jnp.int32)
    expert_M = jnp.minimum(expert_M, load_E.shape[0] - 1)
    # Rows from a block's first to the end of its expert's.
    first_block_E = end_block_E - (-(-load_E // block))
    left_M = load_E[expert_M] - (m - first_block_E[expert_M]) * block
    n_used = end_block_E[-1].astype(jnp.int32)
    filled_M = jnp.where(m < n_used, jnp.clip(left_M, 0, block), 0)
    return expert_M, filled_M.astype(jnp.int32), n_used


def places(experts_TK: jax.Array, n_experts: int) -> tuple[jax.Array, jax.Array]:
    """How many earlier tokens chose each choice's expert, `[T, K]`, and how many do in all, `[E]`.

    Both int32; what stands for a choice of no expert means nothing. Processors sort the choices;
    accelerators, which are slow at sorting, count them.
    """
    find = sorted_places if kernels.platform() == "cpu" else counted_places
    return find(experts_TK, n_experts)


def _of_choices(value_E: jax.Array, experts_TK: jax.Array) -> jax.Array:
    """The value of each choice's expert, `[T, K]`; on accelerators without a gather of scalars."""
    if kernels.platform() == "cpu":
        return value_E.at[experts_TK].get(mode="clip")
    is_TKE = experts_TK[:, :, None] == jnp.arange(value_E.shape[0])
    return jnp.sum(jnp.where(is_TKE, value_E, 0), axis=2, dtype=value_E.dtype)


def sorted_places(experts_TK: jax.Array, n_experts: int) -> tuple[jax.Array, jax.Array]:
    """`places` by a stable sort: work independent of the number of experts."""
    flat = experts_TK.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    first_E1 = jnp.searchsorted(flat[order], jnp.arange(n_experts + 1), side="left")
    first_E1 = first_E1.astype(jnp.int32)
    rank = jnp.zeros(flat.size, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    return (rank - first_E1[flat]).reshape(experts_TK.shape), jnp.diff(first_E1)


_TOKENS = 128
"""Tokens counted by one matrix product."""


def counted_places(experts_TK: jax.Array, n_experts: int) -> tuple[jax.Array, jax.Array]:
    """`places` by running sums over all experts.

    Within 128 tokens such a sum is a product with a triangle of ones, exact at any precision.
    """
    is_TKE = experts_TK[:, :, None] == jnp.arange(n_experts)
    chosen_TE = jnp.any(is_TKE, axis=1)
    padded_TE = jnp.pad(chosen_TE, ((0, -chosen_TE.shape[0] % _TOKENS), (0, 0)))
    chosen_GCE = padded_TE.reshape(-1, _TOKENS, n_experts).astype(jnp.float32)
    earlier_CC = jnp.tri(_TOKENS, k=-1, dtype=jnp.float32)
    within_GCE = jnp.einsum(
        "cb,gbe->gce", earlier_CC, chosen_GCE, preferred_element_type=jnp.float32
    ).astype(jnp.int32)
    load_GE = chosen_GCE.sum(1, dtype=jnp.int32)
    before_GE = jnp.cumsum(load_GE, axis=0, dtype=jnp.int32) - load_GE
    place_TE = (before_GE[:, None] + within_GCE).reshape(-1, n_experts)[: chosen_TE.shape[0]]
    place_TK = jnp.sum(jnp.where(is_TKE, place_TE[:, None], 0), axis=2, dtype=jnp.int32)
    return place_TK, load_GE.sum(0, dtype=jnp.int32)


def _rows_of(x_TD: jax.Array, index_N: jax.Array) -> jax.Array:
    """Gathers rows; an index past the end gives zeros."""
    return jnp.take(x_TD, index_N, axis=0, mode="fill", fill_value=0)


def _sum_back(rows_ND: jax.Array, layout: Layout) -> jax.Array:
    """The sum of each token's rows, `[T, D]`; a choice of no expert adds nothing."""
    if _by_kernel(rows_ND, layout.row_TK.size):
        return kernel.sum_rows(rows_ND, layout.row_TK)
    row_KT = layout.row_TK.T  # in this order the rows of all tokens add up as they lie
    rows_KTD = _rows_of(rows_ND, row_KT) if layout.partial else rows_ND[row_KT]
    return rows_KTD.sum(0)


@jax.custom_vjp
def dispatch(x_TD: jax.Array, layout: Layout) -> jax.Array:
    """Copies each token to the rows of its experts: `[T, D] -> [N, D]`.

    Padding rows within blocks are zero; past the last block in use, without blocks, they are not.
    """
    return _to_rows(x_TD, layout)


def _to_rows(x_TD: jax.Array, layout: Layout) -> jax.Array:
    if layout.blocks.block > 1:
        return _rows_of(x_TD, layout.token_N)
    if _by_kernel(x_TD, layout.token_N.size):
        return kernel.gather_rows(x_TD, layout.token_N)
    return jnp.take(x_TD, layout.token_N, axis=0, mode="clip")


def _by_kernel(x_TD: jax.Array, n_rows: int) -> bool:
    return kernels.platform() == "tpu" and kernel.fits(x_TD, n_rows)


def _dispatch_fwd(x_TD: jax.Array, layout: Layout) -> tuple[jax.Array, Layout]:
    return dispatch(x_TD, layout), layout


def _dispatch_bwd(layout: Layout, drows_ND: jax.Array) -> tuple[jax.Array, None]:
    return _sum_back(drows_ND, layout), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(rows_ND: jax.Array, layout: Layout) -> jax.Array:
    """Adds up each token's rows: `[N, D] -> [T, D]`."""
    return _sum_back(rows_ND, layout)


def _combine_fwd(rows_ND: jax.Array, layout: Layout) -> tuple[jax.Array, Layout]:
    return combine(rows_ND, layout), layout


def _combine_bwd(layout: Layout, dout_TD: jax.Array) -> tuple[jax.Array, None]:
    return _to_rows(dout_TD, layout), None


combine.defvjp(_combine_fwd, _combine_bwd)


@jax.custom_vjp
def dispatch_gates(gates_TK: jax.Array, layout: Layout) -> jax.Array:
    """The gate of every row, `[N]`; 0 on padding rows."""
    return _rows_of(gates_TK.reshape(-1), layout.choice_N)


def _gates_fwd(gates_TK: jax.Array, layout: Layout) -> tuple[jax.Array, Layout]:
    return dispatch_gates(gates_TK, layout), layout


def _gates_bwd(layout: Layout, drows_N: jax.Array) -> tuple[jax.Array, None]:
    row_TK = layout.row_TK
    return _rows_of(drows_N, row_TK) if layout.partial else drows_N[row_TK], None


dispatch_gates.defvjp(_gates_fwd, _gates_bwd)
