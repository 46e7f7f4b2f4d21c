"""Rows sent between the devices of one mesh axis, in bins, and back (report section 3.2.2).

Every device has rows sorted by bin, and every bin belongs to one device of the axis: a node, or an
expert. `exchange` brings all rows of a bin together on its device, bins in order and each on a
block boundary, rows of one bin by sender; `exchange_back` is the mirror. Each is the other's
gradient. Only grouped collectives are used (all-gather, ragged all-to-all), no permutes, so that
both may stand in a branch that only some devices take, if all of the axis do.
Dims: P devices of the axis, S slots (bins of one device), C = P S chunks, N rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from v3jax.ops.dispatch import Blocks


@struct.dataclass
class Route:
    """Where chunks of rows leave from and land, seen from one device; all int32 `[C]`.

    A chunk is what one device sends to one bin. Outgoing chunks are listed by bin, incoming ones
    by sender, then slot.
    """

    out_start_C: jax.Array
    """First row of each outgoing chunk here."""
    out_size_C: jax.Array
    out_land_C: jax.Array
    """First row of each outgoing chunk on the device it goes to."""
    in_start_C: jax.Array
    """First row of each incoming chunk here."""
    in_size_C: jax.Array
    in_home_C: jax.Array
    """First row of each incoming chunk on the device it came from."""
    axis: str = struct.field(pytree_node=False)
    n_sent: int = struct.field(pytree_node=False)
    """Rows of the buffer on the sending side."""
    n_received: int = struct.field(pytree_node=False)
    """Rows of the buffer on the receiving side."""


def make_route(
    load_C: jax.Array, axis: str, *, n_sent: int, n_blocks: int, block: int = 1
) -> tuple[Route, Blocks]:
    """The route of rows sorted by bin, and how they lie where they land.

    Args:
      load_C: this device's rows of every bin, int32; together at most `n_sent`.
      axis: mesh axis to travel along, manual here; it must divide the bins.
      n_blocks: blocks of the receiving buffer, enough for what arrives (the caller sees to it).
      block: rows of a block; every bin starts on a new one.
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
            out_start_C=start_PC[me],
            out_size_C=load_C,
            out_land_C=land_PC[me],
            in_start_C=mine(land_PC),
            in_size_C=mine(load_PC),
            in_home_C=mine(start_PC),
            axis=axis,
            n_sent=n_sent,
            n_received=n_blocks * block,
        )
        end_S = jnp.cumsum(blocks_PS[me])
        slot_M = jnp.searchsorted(end_S, jnp.arange(n_blocks), side="right")
        blocks = Blocks(
            expert_M=jnp.minimum(slot_M, end_S.shape[0] - 1).astype(jnp.int32),
            n_used=end_S[-1].astype(jnp.int32),
            block=block,
        )
        return route, blocks


@jax.custom_vjp
def exchange(rows_N: jax.Array, route: Route) -> jax.Array:
    """Rows `[n_sent, ...]` to the devices of their bins: `[n_received, ...]`, the rest zeros."""
    return ragged_all_to_all(
        rows_N,
        jnp.zeros((route.n_received, *rows_N.shape[1:]), rows_N.dtype),
        route.out_start_C,
        route.out_size_C,
        route.out_land_C,
        route.in_size_C,
        axis_name=route.axis,
    )


@jax.custom_vjp
def exchange_back(rows_N: jax.Array, route: Route) -> jax.Array:
    """Rows `[n_received, ...]` to where they came from: `[n_sent, ...]`, the rest zeros."""
    return ragged_all_to_all(
        rows_N,
        jnp.zeros((route.n_sent, *rows_N.shape[1:]), rows_N.dtype),
        route.in_start_C,
        route.in_size_C,
        route.in_home_C,
        route.out_size_C,
        axis_name=route.axis,
    )


exchange.defvjp(
    lambda rows_N, route: (exchange(rows_N, route), route),
    lambda route, drows_N: (exchange_back(drows_N, route), None),
)
exchange_back.defvjp(
    lambda rows_N, route: (exchange_back(rows_N, route), route),
    lambda route, drows_N: (exchange(drows_N, route), None),
)


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all` on TPU and GPU, an equal one where XLA has none (CPU)."""

    def native(*arrays: Any) -> jax.Array:
        return lax.ragged_all_to_all(*arrays, axis_name=axis_name)

    def portable(*arrays: Any) -> jax.Array:
        return gathered_all_to_all(*arrays, axis_name=axis_name)

    arrays = (operand, output, input_offsets, send_sizes, output_offsets, recv_sizes)
    with jax.named_scope("ragged_all_to_all"):
        return lax.platform_dependent(*arrays, tpu=native, cuda=native, default=portable)


def gathered_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """As `jax.lax.ragged_all_to_all`: all devices' rows are gathered, each takes what is its own.

    Chunks that land here must not overlap.
    """
    del send_sizes
    n_devices = lax.axis_size(axis_name)
    me = lax.axis_index(axis_name)
    n_slots = input_offsets.shape[0] // n_devices
    offsets = jnp.stack([input_offsets, output_offsets]).reshape(2, n_devices, n_slots)
    offsets = lax.all_gather(offsets, axis_name)[:, :, me]  # [sender, 2, slot]
    source_C = (offsets[:, 0] + jnp.arange(n_devices)[:, None] * operand.shape[0]).reshape(-1)
    land_C = jnp.where(recv_sizes > 0, offsets[:, 1].reshape(-1), output.shape[0])
    order_C = jnp.argsort(land_C)
    # The chunk that a row belongs to is the last one to land at or before it.
    row_N = jnp.arange(output.shape[0])
    chunk_N = order_C[jnp.maximum(jnp.searchsorted(land_C[order_C], row_N, side="right") - 1, 0)]
    within_N = row_N - land_C[chunk_N]
    arrived_N = (within_N >= 0) & (within_N < recv_sizes[chunk_N])
    everything = lax.all_gather(operand, axis_name, tiled=True)
    rows = everything[jnp.where(arrived_N, source_C[chunk_N] + within_N, 0)]
    return jnp.where(arrived_N.reshape(-1, *[1] * (output.ndim - 1)), rows, output)
