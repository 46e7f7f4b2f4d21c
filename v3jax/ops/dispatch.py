"""Tokens sorted by expert into whole blocks of rows, and back, without dropping any.

Every expert's rows start on a block boundary, so a block belongs to one expert and a product over
blocks does work proportional to the tokens routed. Both directions and both gradients are gathers.
Dims: T tokens, K experts of a token, E experts, N rows, M blocks, D features.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

_MAX_BLOCK = 128
_MIN_BLOCK = 8


@struct.dataclass
class Blocks:
    """Rows grouped by expert in `M` whole blocks: what a product over them needs to know."""

    expert_M: jax.Array
    """Expert of every block, int32, rising."""
    n_used: jax.Array
    """Blocks that hold at least one token, int32; they come first."""
    block: int = struct.field(pytree_node=False)
    roomy: bool = struct.field(pytree_node=False, default=False)
    """Whether many blocks are expected to be unused, as in a receive buffer."""


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
    """Rows of a block: a power of two near an eighth of an expert's mean load, within 8..128.

    Smaller blocks waste less padding, larger ones make better matrix products.
    """
    mean_load = max(n_choices / n_experts, 1.0)
    return int(np.clip(2 ** int(np.log2(mean_load) - 2), _MIN_BLOCK, _MAX_BLOCK))


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
    """Sorts the choices by expert, stably, each expert's rows padded to whole blocks.

    With `partial`, a choice equal to `n_experts` is of no expert and gets no row; `max_choices`
    is then the most that are of one (the caller sees to it), all of them by default.
    """
    with jax.named_scope("make_layout"):
        n_choices = experts_TK.size
        most = n_choices if max_choices is None else min(max_choices, n_choices)
        block = block_rows(most, n_experts) if block is None else block
        n_blocks = n_blocks_for(most, n_experts, block)
        flat = experts_TK.reshape(-1)
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        bounds_E1 = jnp.searchsorted(flat[order], jnp.arange(n_experts + 1), side="left")
        load_E = jnp.diff(bounds_E1)
        end_block_E = jnp.cumsum(-(-load_E // block))
        expert_M = jnp.searchsorted(end_block_E, jnp.arange(n_blocks), side="right")
        expert_M = jnp.minimum(expert_M, n_experts - 1).astype(jnp.int32)
        # Row n of expert e holds that expert's (n - first row)-th choice.
        first_row_E = (end_block_E - (-(-load_E // block))) * block
        offset_N = jnp.arange(n_blocks * block) - jnp.repeat(first_row_E[expert_M], block)
        expert_N = jnp.repeat(expert_M, block)
        filled_N = offset_N < load_E[expert_N]
        source_N = jnp.where(filled_N, bounds_E1[expert_N] + offset_N, 0)
        choice_N = jnp.where(filled_N, order[source_N], n_choices)
        rank = jnp.zeros_like(order).at[order].set(jnp.arange(n_choices, dtype=jnp.int32))
        row = first_row_E[flat] + rank - bounds_E1[flat]
        if partial:
            row = jnp.where(flat < n_experts, row, n_blocks * block)
        n_used = end_block_E[-1].astype(jnp.int32)
        return Layout(
            row_TK=row.reshape(experts_TK.shape).astype(jnp.int32),
            token_N=jnp.where(filled_N, choice_N // experts_TK.shape[1], experts_TK.shape[0]),
            choice_N=choice_N,
            load_E=load_E.astype(jnp.int32),
            blocks=Blocks(expert_M=expert_M, n_used=n_used, block=block),
            partial=partial,
        )


def _rows_of(x_TD: jax.Array, index_N: jax.Array) -> jax.Array:
    """Gathers rows; an index past the end gives zeros."""
    return jnp.take(x_TD, index_N, axis=0, mode="fill", fill_value=0)


def _back(rows_N: jax.Array, layout: Layout) -> jax.Array:
    """The row of every choice, `[T, K, ...]`; zeros for a choice of no expert."""
    return _rows_of(rows_N, layout.row_TK) if layout.partial else rows_N[layout.row_TK]


@jax.custom_vjp
def dispatch(x_TD: jax.Array, layout: Layout) -> jax.Array:
    """Copies each token to the rows of its experts: `[T, D] -> [N, D]`, padding rows zero."""
    return _rows_of(x_TD, layout.token_N)


def _dispatch_fwd(x_TD: jax.Array, layout: Layout) -> tuple[jax.Array, Layout]:
    return dispatch(x_TD, layout), layout


def _dispatch_bwd(layout: Layout, drows_ND: jax.Array) -> tuple[jax.Array, None]:
    return _back(drows_ND, layout).sum(1), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(rows_ND: jax.Array, layout: Layout) -> jax.Array:
    """Adds up each token's rows: `[N, D] -> [T, D]`."""
    return _back(rows_ND, layout).sum(1)


def _combine_fwd(rows_ND: jax.Array, layout: Layout) -> tuple[jax.Array, Layout]:
    return combine(rows_ND, layout), layout


def _combine_bwd(layout: Layout, dout_TD: jax.Array) -> tuple[jax.Array, None]:
    return _rows_of(dout_TD, layout.token_N), None


combine.defvjp(_combine_fwd, _combine_bwd)


@jax.custom_vjp
def dispatch_gates(gates_TK: jax.Array, layout: Layout) -> jax.Array:
    """The gate of every row, `[N]`; 0 on padding rows."""
    return _rows_of(gates_TK.reshape(-1), layout.choice_N)


def _gates_fwd(gates_TK: jax.Array, layout: Layout) -> tuple[jax.Array, Layout]:
    return dispatch_gates(gates_TK, layout), layout


def _gates_bwd(layout: Layout, drows_N: jax.Array) -> tuple[jax.Array, None]:
    return _back(drows_N, layout), None


dispatch_gates.defvjp(_gates_fwd, _gates_bwd)
