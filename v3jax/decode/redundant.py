"""Redundant experts: every copy's weights, and the copy a token goes to (report section 3.4).

The router goes on choosing among a layer's E experts; R >= E replicas of them lie in memory, on a
mesh in equal runs on the devices. Of an expert's c copies the token in row n of a batch takes copy
n mod c: even over any run of rows, and it depends on nothing but the place in the batch. The report
leaves that choice open; this one is ours. Outputs are those of one copy each.
Dims: N tokens, K experts of a token, E experts, R replicas, C most copies, L MoE layers (MTP last).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Sharding

from v3jax.config import ModelConfig
from v3jax.eplb import Placement


@struct.dataclass
class Copies:
    """Where one layer's experts lie."""

    log2phy_EC: jax.Array
    """Replicas of each expert, int32, -1 behind the last."""
    copies_E: jax.Array
    """Replicas of each expert, int32."""


def check_fits(model: ModelConfig, placement: Placement) -> None:
    """Raises ValueError unless the placement has the model's MoE layers, MTP's too, and experts."""
    wanted = (model.n_moe_layers + model.mtp_depth, model.n_experts)
    if placement.copies.shape != wanted:
        found = " x ".join(map(str, placement.copies.shape))
        raise ValueError(
            f"placement: is of {found} MoE layers x experts, the model has {wanted[0]} x "
            f"{wanted[1]} (MTP modules included)"
        )


def with_copies(block: Any, placement: Placement, layer: int) -> Any:
    """A block's parameters with the experts' weights `[R, ...]` and the `copies` beside them.

    Weights stay split as they are.

    Raises:
      ValueError: the replicas do not divide over the devices that experts are split over.
    """
    replicas = placement.phy2log[layer].astype(np.int32)
    experts = {}
    for name, weight in block["mlp"]["experts"].items():
        n_shards = weight.shape[0] // weight.sharding.shard_shape(weight.shape)[0]
        if len(replicas) % n_shards:
            raise ValueError(
                f"placement: {len(replicas)} replicas do not divide over the {n_shards} devices "
                "that experts are split over"
            )
        experts[name] = _rows_of(weight, replicas, weight.sharding)
    copies = Copies(
        jnp.asarray(placement.log2phy[layer], jnp.int32),
        jnp.asarray(placement.copies[layer], jnp.int32),
    )
    return block | {"mlp": block["mlp"] | {"experts": experts, "copies": copies}}


@functools.partial(jax.jit, static_argnums=2)
def _rows_of(weight: jax.Array, rows: jax.Array, place: Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight[rows], place)


def replicas_of(copies: Copies, experts_NK: jax.Array) -> jax.Array:
    """The replica `[N, K]` that each choice of each token is sent to."""
    copy_NK = jnp.arange(experts_NK.shape[0])[:, None] % copies.copies_E[experts_NK]
    return copies.log2phy_EC[experts_NK, copy_NK]
