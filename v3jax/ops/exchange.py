"""Rows sent between the devices along mesh axes, in bins, and back (report section 3.2.2).

Every device has rows sorted by bin, and every bin belongs to one device of the axes: a node, or an
expert. `exchange` brings all rows of a bin together on its device, bins in order and each on a
block boundary, rows of one bin by sender; `exchange_back` is the mirror. Each is the other's
gradient. Only grouped collectives are used (all-gather, all-to-all), no permutes, so that
both may stand in a branch that only some devices take, if all along the axes do.
Dims: P devices along the axes, S slots (bins of one device), C = P S chunks, N rows.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from v3jax.kernels.grouped_matmul import Blocks
from v3jax.ops.dispatch import blocks_of

Axis = str | tuple[str, ...]
"""A mesh axis, or several that number devices together, the last one fastest."""


@struct.dataclass
class Chunks:
    """The chunks of rows that leave one device, or those that reach it; all int32 `[C]`."""

    start_C: jax.Array
    """First row of each chunk on this device."""
    size_C: jax.Array
    far_C: jax.Array
    """First row of each chunk on the device at its other end."""


@struct.dataclass
class Route:
    """Where chunks of rows leave from and land, seen from one device.

    A chunk is what one device sends to one bin. Outgoing chunks are listed by bin, incoming ones
    by sender, then slot.
    """

    out: Chunks
    into: Chunks
    axis: Axis = struct.field(pytree_node=False)
    n_sent: int = struct.field(pytree_node=False)
    """Rows of the buffer on the sending side."""
    n_received: int = struct.field(pytree_node=False)
    """Rows of the buffer on the receiving side."""


def make_route(
    load_C: jax.Array,
    axis: Axis,
    *,
    n_sent: int,
    n_blocks: int,
    block: int = 1,
    balanced_rows: int | None = None,
) -> tuple[Route, Blocks]:
    """The route of rows sorted by bin, and how they lie where they land.

    Args:
      load_C: this device's rows of every bin, int32; together at most `n_sent`.
      axis: mesh axis or axes to travel along, manual here; they must divide the bins.
      n_blocks: blocks of the receiving buffer, enough for what arrives (the caller sees to it).
      block: rows of a block; every bin starts on a new one.
      balanced_rows: rows that arrive of a balanced batch; by default as many as the buffer holds.
    """
    with jax.named_scope("make_route"):
        n_devices = lax.axis_size(axis)
        me = lax.axis_index(axis)
        load_PC = lax.all_gather(load_C, axis)
        start_PC = jnp.cumsum(load_PC, axis=1) - load_PC
        # On its device a bin starts where the blocks of the bins before it end.
        blocks_PS = -(-load_PC.sum(0).reshape(n_devices, -1) // block)
        first_PS = (jnp.cumsum(blocks_PS, axis=1) - blocks_PS) * block
        land_PC = first_PS.reshape(-1) + jnp.cumsum(load_PC, axis=0) - load_PC

        def mine(x_PC: jax.Array) -> jax.Array:
            return x_PC.reshape(n_devices, n_devices, -1)[:, me].reshape(-1)

        route = Route(
            out=Chunks(start_PC[me], load_C, land_PC[me]),
            into=Chunks(mine(land_PC), mine(load_PC), mine(start_PC)),
            axis=axis,
            n_sent=n_sent,
            n_received=n_blocks * block,
        )
        end_S = jnp.cumsum(blocks_PS[me])
        arrived_S = load_PC.sum(0).reshape(n_devices, -1)[me]
        blocks = Blocks(
            *blocks_of(arrived_S, end_S, n_blocks, block),
            block=block,
            balanced_rows=n_blocks * block if balanced_rows is None else balanced_rows,
        )
        return route, blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange(rows_N: jax.Array, route: Route, filled: bool = True) -> jax.Array:
    """Rows `[n_sent, ...]` to the devices of their bins: `[n_received, ...]`.

    The rest are zeros; if not `filled`, they hold anything, which saves writing them.
    """
    return _travel(rows_N, route.n_received, route.out, route.into, route, filled)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange_back(rows_N: jax.Array, route: Route, filled: bool = True) -> jax.Array:
    """Rows `[n_received, ...]` to where they came from: `[n_sent, ...]`; the rest as above."""
    return _travel(rows_N, route.n_sent, route.into, route.out, route, filled)


exchange.defvjp(
    lambda rows_N, route, filled: (exchange(rows_N, route, filled), route),
    lambda filled, route, drows_N: (exchange_back(drows_N, route, filled), None),
)
exchange_back.defvjp(
    lambda rows_N, route, filled: (exchange_back(rows_N, route, filled), route),
    lambda filled, route, drows_N: (exchange(drows_N, route, filled), None),
)


def _travel(
    rows_N: jax.Array, n_out: int, out: Chunks, into: Chunks, route: Route, filled: bool
) -> jax.Array:
    """The chunks `out` of every device where its `into` says: `[n_out, ...]`.

    `jax.lax.ragged_all_to_all` on TPU and GPU; XLA has none for CPU.
    """

    def native(rows_N: jax.Array, out: Chunks, into: Chunks) -> jax.Array:
        shape = (n_out, *rows_N.shape[1:])
        target = jnp.zeros(shape, rows_N.dtype) if filled else lax.empty(shape, rows_N.dtype)
        sizes = (out.start_C, out.size_C, out.far_C, into.size_C)
        return lax.ragged_all_to_all(rows_N, target, *sizes, axis_name=route.axis)

    def portable(rows_N: jax.Array, out: Chunks, into: Chunks) -> jax.Array:
        del out
        return _pick_from_all(rows_N, n_out, into, route.axis)

    with jax.named_scope("ragged_all_to_all"):
        return lax.platform_dependent(rows_N, out, into, tpu=native, cuda=native, default=portable)


def _pick_from_all(rows_N: jax.Array, n_out: int, into: Chunks, axis: Axis) -> jax.Array:
    """All devices' rows are gathered, each takes what is its own.

    A branch between exchanges of different widths would copy less, but XLA for CPU lets a later
    collective overtake one inside a branch, and devices that do so differently hang.
    """
    # The chunk that a row belongs to is the last one to land at or before it.
    start_C = jnp.where(into.size_C > 0, into.start_C, n_out)
    order_C = jnp.argsort(start_C)
    row_N = jnp.arange(n_out)
    chunk_N = order_C[jnp.maximum(jnp.searchsorted(start_C[order_C], row_N, side="right") - 1, 0)]
    within_N = row_N - start_C[chunk_N]
    arrived_N = (within_N >= 0) & (within_N < into.size_C[chunk_N])
    n_slots = into.size_C.shape[0] // lax.axis_size(axis)
    source_N = (chunk_N // n_slots) * rows_N.shape[0] + into.far_C[chunk_N] + within_N
    everything = lax.all_gather(rows_N, axis, tiled=True)
    source_N = jnp.where(arrived_N, source_N, everything.shape[0])
    return jnp.take(everything, source_N, axis=0, mode="fill", fill_value=0)
