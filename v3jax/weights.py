"""Weights streamed into place: pieces of arrays, one at a time, each straight to its shards.

An array that is stacked over layers and experts arrives in many pieces. It is born as sharded
zeros and each piece is written into it in place, so memory beyond the result is one piece.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from v3jax import processes, sharding
from v3jax.config import MeshConfig, ModelConfig, NumericsConfig
from v3jax.model.transformer import Transformer
from v3jax.sharding import ShardingRules, make_mesh


@dataclass(frozen=True)
class Piece:
    """Part of the array named `leaf`: its values, of the array's rank, and where they begin."""

    leaf: str
    start: tuple[int, ...]
    values: np.ndarray


FP32 = NumericsConfig(compute="fp32", moments="fp32", remat="none")


def names(tree: Any) -> dict[str, Any]:
    """The leaves of a tree under names like `params.moe_layers.mlp.gate`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def abstract_variables(
    model: ModelConfig,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> dict[str, Any]:
    """Shapes, types and places of `params` and `router_state`; nothing is allocated.

    `dtype` is that of every parameter but the router's; router weights and bias stay FP32.
    """
    rules = rules or ShardingRules()
    mesh = mesh or make_mesh(MeshConfig())
    module = Transformer(model, FP32, rules)
    tokens_BS = jnp.zeros((1, model.mtp_depth + 2), jnp.int32)

    def init() -> dict[str, Any]:
        made = cast(dict[str, Any], module.init(jax.random.key(0), tokens_BS, ahead=1))
        return {"params": made["params"], "router_state": made.get("router_state", {})}

    places = sharding.shardings(jax.eval_shape(init), mesh)
    # Unboxed inside: under a mesh, unboxing shapes would try to place them.
    shapes = jax.eval_shape(lambda: sharding.unbox(init()))

    def abstract(path: Any, leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        router = jax.tree_util.keystr(path[-1:], simple=True) in ("gate", "e_score_correction_bias")
        kind = jnp.float32 if router else jnp.dtype(dtype)
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=place)

    return jax.tree_util.tree_map_with_path(abstract, shapes, places)


def assemble(like: Any, pieces: Iterable[Piece]) -> Any:
    """The tree of `like`, filled with `pieces` in the types and places it names.

    Raises:
      ValueError: an array got no piece.
    """
    targets = names(like)
    arrays: dict[str, jax.Array] = {}
    for piece in pieces:
        target = targets[piece.leaf]
        if piece.values.shape == target.shape:
            values = np.ascontiguousarray(piece.values).astype(target.dtype, copy=False)
            arrays[piece.leaf] = processes.placed(values, target.sharding)
            continue
        if piece.leaf not in arrays:
            arrays[piece.leaf] = jnp.zeros(target.shape, target.dtype, device=target.sharding)
        put = _put(target.sharding)
        start = np.array(piece.start, np.int32)
        arrays[piece.leaf] = put(arrays[piece.leaf], piece.values, start)
        arrays[piece.leaf].block_until_ready()  # else pieces pile up
    missing = sorted(targets.keys() - arrays.keys())
    if missing:
        raise ValueError(f"weights: nothing for {', '.join(missing)}")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in targets])


@functools.cache
def _put(place: Any) -> Any:
    """Writes values into an array in place, wherever its shards are."""

    def put(array: jax.Array, values: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(array, values.astype(array.dtype), tuple(start))

    return jax.jit(put, donate_argnums=0, out_shardings=place)
