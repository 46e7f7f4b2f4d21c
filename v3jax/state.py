"""Everything a training step changes, as one value.

A step commits all of it or nothing. The state is initialised in one jitted call, every array born
in its sharded place. Dims: L MoE layers, E experts.
"""

import functools
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v3jax import sharding
from v3jax.config import ExperimentConfig
from v3jax.objective import make_model
from v3jax.optim import ema
from v3jax.optim.adamw import adamw
from v3jax.sharding import ShardingRules, rules_of


@struct.dataclass
class TrainState:
    """Counters, master weights, moments, router bias and average of one run."""

    step: jax.Array
    """Committed optimizer steps, int32."""
    sequences: jax.Array
    """Sequences of committed steps, uint32 (report's run: 3.6e9)."""
    bad_steps: jax.Array
    """Uncommitted steps since the last committed one, int32."""
    params: Any
    """Master weights, FP32."""
    opt_state: Any
    """AdamW's moments and count."""
    router_state: Any
    """Router biases, FP32; moved by their own rule, never by the optimizer."""
    ema: Any
    """Moving average of `params`, FP32, or None; in the host's memory on TPU and GPU."""
    averaged: jax.Array
    """Step whose parameters the average took in last, int32: `step` or, between steps, the one
    before (`optim.ema`)."""


def init_state(
    cfg: ExperimentConfig,
    mesh: Mesh | AbstractMesh | None = None,
    rules: ShardingRules | None = None,
) -> TrainState:
    """A fresh state from `run.seed`, sharded over `mesh` by `rules`; without a mesh, one device."""
    if mesh is None:
        return jax.jit(lambda: _create(cfg, rules))()
    places = state_shardings(cfg, mesh, rules)
    return jax.jit(lambda: _create(cfg, rules), out_shardings=places)()


def state_around(
    cfg: ExperimentConfig,
    params: Any,
    router_state: Any,
    mesh: Mesh | AbstractMesh,
    rules: ShardingRules | None = None,
) -> TrainState:
    """A state that starts from given FP32 weights, which it takes over (they are donated)."""
    places = state_shardings(cfg, mesh, rules)
    around = jax.jit(lambda p, r: _around(cfg, p, r), donate_argnums=0, out_shardings=places)
    return around(params, router_state)


def abstract_state(
    cfg: ExperimentConfig, mesh: Mesh | AbstractMesh, rules: ShardingRules | None = None
) -> TrainState:
    """Shapes, types and shardings of the state, without allocating anything."""
    shapes = jax.eval_shape(lambda: _create(cfg, rules))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        state_shardings(cfg, mesh, rules),
    )


def state_shardings(
    cfg: ExperimentConfig, mesh: Mesh | AbstractMesh, rules: ShardingRules | None = None
) -> TrainState:
    """A state of NamedShardings, as `state_specs`, the average in the host's memory."""
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), state_specs(cfg, mesh, rules or rules_of(cfg))
    )
    kind = ema.memory(mesh)
    if kind is None:
        return places
    return replace(places, ema=jax.tree.map(lambda s: s.with_memory_kind(kind), places.ema))


def catch_up(cfg: ExperimentConfig, state: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
    """The state with an average of all its steps; `state` is donated. Call it before the average
    is evaluated or saved."""
    if state.ema is None:
        return state
    return _catch_up(cfg, mesh)(state)


@functools.cache
def _catch_up(cfg: ExperimentConfig, mesh: Mesh | AbstractMesh) -> Any:
    decay = cfg.optim.ema_decay or 0.0
    return jax.jit(
        lambda state: replace(state, ema=absorbed(state, decay), averaged=state.step),
        donate_argnums=0,
        out_shardings=state_shardings(cfg, mesh),
    )


def absorbed(state: TrainState, decay: float) -> Any:
    """The state's average with the state's own parameters, which it takes in once."""
    return ema.absorb(state.ema, state.params, state.averaged < state.step, decay)


@functools.lru_cache(maxsize=16)
def param_specs(
    cfg: ExperimentConfig, mesh: Mesh | AbstractMesh, rules: ShardingRules
) -> tuple[Any, Any]:
    """PartitionSpecs of the parameters: where they are computed with, where they are stored."""
    boxed = jax.eval_shape(lambda: _variables(cfg, rules))["params"]
    return sharding.specs(boxed), sharding.storage_specs(boxed, mesh, rules)


@functools.lru_cache(maxsize=16)
def state_specs(
    cfg: ExperimentConfig, mesh: Mesh | AbstractMesh, rules: ShardingRules
) -> TrainState:
    """A state of PartitionSpecs: moments and average are stored where their parameter is.

    Raises:
      ValueError: a mesh axis does not divide a parameter that the rules put on it.
    """
    variables = jax.eval_shape(lambda: _variables(cfg, rules))
    params = param_specs(cfg, mesh, rules)[1]
    router_state = sharding.specs(variables.get("router_state", {}))
    whole: Any = P()
    shapes = jax.eval_shape(
        lambda: adamw(cfg.optim, cfg.numerics.moments).init(sharding.unbox(variables["params"]))
    )
    structure = jax.tree.structure(params)

    def place(node: Any) -> Any:
        like_params = jax.tree.structure(node) == structure
        return params if like_params else jax.tree.map(lambda _: whole, node)

    opt_state = jax.tree.map(place, shapes, is_leaf=lambda n: jax.tree.structure(n) == structure)
    return TrainState(
        step=whole,
        sequences=whole,
        bad_steps=whole,
        params=params,
        opt_state=opt_state,
        router_state=router_state,
        ema=params if cfg.optim.ema_decay is not None else None,
        averaged=whole,
    )


def _variables(cfg: ExperimentConfig, rules: ShardingRules | None) -> Any:
    """The model's variables, in their partitioning boxes."""
    tokens_BS = jnp.zeros((1, cfg.model.mtp_depth + 2), jnp.int32)
    return make_model(cfg, rules).init(jax.random.key(cfg.run.seed), tokens_BS, ahead=1)


def _create(cfg: ExperimentConfig, rules: ShardingRules | None) -> TrainState:
    variables = sharding.unbox(_variables(cfg, rules))
    return _around(cfg, variables["params"], variables.get("router_state", {}))


def _around(cfg: ExperimentConfig, params: Any, router_state: Any) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        sequences=jnp.zeros((), jnp.uint32),
        bad_steps=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=adamw(cfg.optim, cfg.numerics.moments).init(params),
        router_state=router_state,
        ema=jax.tree.map(jnp.copy, params) if cfg.optim.ema_decay is not None else None,
        averaged=jnp.zeros((), jnp.int32),
    )


def layer_biases(router_state: Any) -> jax.Array:
    """Router biases stacked `[L, E]`: the MoE layers in order, then the MTP modules."""
    leaves = jax.tree.leaves(router_state)
    ordered = [leaves[i] for i in _layer_order(router_state)]
    return jnp.concatenate([b.reshape(-1, b.shape[-1]) for b in ordered])


def with_layer_biases(router_state: Any, bias_LE: jax.Array) -> Any:
    """`router_state` with the biases of `bias_LE`, the inverse of `layer_biases`."""
    leaves, start = jax.tree.leaves(router_state), 0
    for i in _layer_order(router_state):
        n_layers = leaves[i].size // leaves[i].shape[-1]
        leaves[i] = bias_LE[start : start + n_layers].reshape(leaves[i].shape)
        start += n_layers
    return jax.tree.unflatten(jax.tree.structure(router_state), leaves)


def _layer_order(router_state: Any) -> list[int]:
    """Indices of the leaves in the layers' order: `moe_layers`, `mtp_layers_0`, ..., `_10`."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.flatten_with_path(router_state)[0]]

    def natural(i: int) -> list[str | int]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", paths[i])]

    return sorted(range(len(paths)), key=natural)
