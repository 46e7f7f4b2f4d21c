"""Which rank has which layers, and their way from storage to the ranks and back.

Weights are to be stored without regard to stages, split over `pipe` as over the rest of a mesh
(ZeRO, report section 3.2): a checkpoint then knows nothing of a pipeline, the optimizer has the
same work on every rank, and no rank keeps what another computes with. Once a step each rank
sends its part of a layer to those that run it, in the compute type; gradients go back the same way,
where those of a layer that two ranks run, one in each direction, are added up.

A rank has as many slots for layers as any needs; some stay empty, since the dense layers and the
MTP modules, which the first and the last stage run as well, stand for layers there.
Dims: L layers of a stack, R ranks, C chunks of a rank, Q slots of a chunk, N = C Q.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from v3jax import sharding
from v3jax.config import ModelConfig
from v3jax.pipeline.schedule import Schedule
from v3jax.sharding import TOKEN_AXES, ShardingRules


def partition(model: ModelConfig, n_stages: int) -> tuple[range, ...]:
    """The MoE layers of each stage, as even as can be beside what the first and last have already.

    Raises:
      ValueError: a stage would have nothing to do.
    """
    counts = [0] * n_stages
    load = [0] * n_stages
    load[0] += model.n_dense_layers
    load[-1] += model.mtp_depth
    empty = [stage for stage, n in enumerate(load) if n == 0]
    if len(empty) > model.n_moe_layers:
        raise ValueError(
            f"mesh.pipe: {n_stages} stages, but the model has {model.n_moe_layers} MoE layers for "
            f"{len(empty)} of them; lower it"
        )
    for left in range(model.n_moe_layers, 0, -1):
        empty = [stage for stage, n in enumerate(load) if n == 0]
        stage = empty[0] if left == len(empty) else min(range(n_stages), key=load.__getitem__)
        counts[stage] += 1
        load[stage] += 1
    ends = np.cumsum(counts)
    return tuple(range(int(end) - count, int(end)) for end, count in zip(ends, counts, strict=True))


@dataclass(frozen=True, eq=False)
class Layout:
    """Layers by rank."""

    layers_RCQ: np.ndarray
    """The layer in each slot, -1 in an empty one; int32."""

    @property
    def flat(self) -> np.ndarray:
        """The same with the slots of all chunks in a row, 0 for an empty one, `[R, N]`."""
        return np.maximum(self.layers_RCQ, 0).reshape(len(self.layers_RCQ), -1)

    @property
    def filled(self) -> np.ndarray:
        """Which of these slots hold a layer, `[R, N]`."""
        return (self.layers_RCQ >= 0).reshape(len(self.layers_RCQ), -1)


def layout(model: ModelConfig, schedule: Schedule) -> Layout:
    """The MoE layers of every rank's chunks under a schedule."""
    stages = partition(model, schedule.n_stages)
    slots = max(map(len, stages))
    layers_RCQ = np.full((schedule.n_ranks, schedule.n_chunks, slots), -1, np.int32)
    for path in schedule.paths:
        for place, layers in zip(path, stages, strict=True):
            layers_RCQ[place.rank, place.chunk, : len(layers)] = layers
    return Layout(layers_RCQ)


# ---- Inside `jax.shard_map`, manual over all axes of the mesh


def to_ranks(
    x: jax.Array, spec: P, place: P, where: Layout, rules: ShardingRules, dtype: jnp.dtype
) -> jax.Array:
    """A stack of layers `[L, ...]` as it is stored, made this rank's own `[N, ...]`, whole as far
    as `spec` asks, in the type `dtype`."""
    mine_N = jnp.asarray(where.flat)[jax.lax.axis_index("pipe")]
    extra = sharding.added(spec, place)
    if extra is None:
        return x[mine_N].astype(dtype)
    dim, axes = extra
    inner = tuple(axis for axis in axes if axis != "pipe")
    x = x.astype(dtype)
    if inner:
        x = sharding.gather(x, spec, _with(spec, dim, inner, x.ndim), rules)
    if "pipe" not in axes:
        return x[mine_N]
    assert axes[0] == "pipe", "the outermost axis of a dimension"
    parts = jax.lax.all_to_all(x[where.flat], "pipe", split_axis=0, concat_axis=0)
    return _joined(parts, dim)


def from_ranks(
    gradient: jax.Array, spec: P, place: P, where: Layout, n_layers: int, rules: ShardingRules
) -> jax.Array:
    """This rank's gradients `[N, ...]` added up over ranks and the batch: the stored part of those
    of the stack, `[L, ...]`."""
    extra = sharding.added(spec, place)
    layer_RN = jnp.asarray(np.where(where.filled, where.flat, n_layers))
    shape = gradient.shape
    if extra is None or "pipe" not in extra[1]:
        mine_N = layer_RN[jax.lax.axis_index("pipe")]
        whole = jnp.zeros((n_layers, *shape[1:]), gradient.dtype)
        whole = whole.at[mine_N].add(gradient, mode="drop")
        return sharding.reduce(whole, spec, place, rules)
    dim, axes = extra
    assert axes[0] == "pipe", "the outermost axis of a dimension"
    n_ranks = jax.lax.axis_size("pipe")
    split = gradient.reshape(*shape[:dim], n_ranks, -1, *shape[dim + 1 :])
    parts = jax.lax.all_to_all(jnp.moveaxis(split, dim, 0), "pipe", split_axis=0, concat_axis=0)
    layers = jnp.zeros((n_layers, *parts.shape[2:]), gradient.dtype)
    layers = layers.at[layer_RN].add(parts, mode="drop")  # two at most, and a + b is b + a
    inner = tuple(axis for axis in axes if axis != "pipe")
    rest = _with(spec, dim, inner, layers.ndim)
    return sharding.reduce(layers, spec, rest, rules, TOKEN_AXES)


def _joined(parts: jax.Array, dim: int) -> jax.Array:
    """Parts `[R, N, ...]` of dimension `dim` of `[N, ...]`, put together."""
    parts = jnp.moveaxis(parts, 0, dim)
    return parts.reshape(*parts.shape[:dim], -1, *parts.shape[dim + 2 :])


def _with(spec: P, dim: int, axes: tuple[str, ...], ndim: int) -> P:
    """`spec` with these axes on a dimension as well."""
    places = [*spec, *[None] * (ndim - len(spec))]
    places[dim] = axes or None
    return P(*places)
