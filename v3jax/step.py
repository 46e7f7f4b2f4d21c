"""One training step, jitted: accumulate micro-batches, update, commit all or nothing.

The number of micro-batches is a run-time value, so the whole batch-size ramp is one program. With
`mesh.pipe` > 1 micro-batches pass through a pipeline (`v3jax.pipeline`).
Dims: M micro-batches (the most a step has), B sequences of one, S = T + 1 tokens of a row,
L MoE layers (MTP modules last), E experts.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v3jax import objective, sharding
from v3jax.compiler import compiler_options
from v3jax.config import ExperimentConfig
from v3jax.objective import LossParts, Scale
from v3jax.ops.accumulate import Sink, added_up, new_sink, tapped
from v3jax.optim.adamw import adamw
from v3jax.optim.router_bias import find_rule, max_violation
from v3jax.optim.schedules import learning_rate, piecewise, tokens_of
from v3jax.pipeline import evaluation
from v3jax.pipeline.plan import Orders, Plan, plan_of
from v3jax.pipeline.run import step_gradients
from v3jax.sharding import BATCH_AXES, MESH_AXES, ShardingRules, is_stacked, rules_of
from v3jax.state import (
    TrainState,
    absorbed,
    layer_biases,
    param_specs,
    state_shardings,
    state_specs,
    with_layer_biases,
)

Metrics = dict[str, jax.Array]


def make_train_step(
    cfg: ExperimentConfig,
    mesh: Mesh | AbstractMesh | None = None,
    rules: ShardingRules | None = None,
) -> Any:
    """The jitted step `(state, tokens_MBS, segments_MBS, amount) -> (state, metrics)`.

    `state` is donated. `amount`, of `amount_of`, says how many of the M micro-batches are used;
    without a pipeline it is that number (int32 scalar). Metrics are FP32 or integer scalars and
    `load_LE`; `committed` is 0 for a step whose loss or gradient was not
    finite, which changes nothing but `bad_steps`. The average takes in the parameters before the
    step, `state.catch_up` those after it. With a mesh, call it under `jax.set_mesh(mesh)`;
    the new state is pinned to where the old one lives.

    Raises:
      ValueError: no bias rule of that name, or the experiment's pipeline cannot be built.
    """
    find_rule(cfg.balance.bias_rule)  # a name that is none is found before data is prepared
    rules = rules or rules_of(cfg)
    step = functools.partial(train_step, cfg, Parallel.over(cfg, mesh, rules))
    if mesh is None:
        return jax.jit(functools.partial(_with_average, cfg, step), donate_argnums=0)
    places = replace(state_specs(cfg, mesh, rules), ema=None)
    batch = P(None, BATCH_AXES)
    manual = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(places, batch, batch, amount_specs(cfg)),
        out_specs=(places, P()),
        check_vma=False,
    )
    pinned = (state_shardings(cfg, mesh, rules), NamedSharding(mesh, P()))
    return jax.jit(
        functools.partial(_with_average, cfg, manual),
        donate_argnums=0,
        out_shardings=pinned,
        compiler_options=compiler_options(mesh),
    )


def amount_of(cfg: ExperimentConfig, n_micro: int) -> Any:
    """How many micro-batches a step takes, as it is told: a number, or a pipeline's `Orders`."""
    plan = plan_of(cfg)
    return np.int32(n_micro) if plan is None else plan.orders(n_micro)


def amount_specs(cfg: ExperimentConfig) -> Any:
    """PartitionSpecs of what `amount_of` gives."""
    plan = plan_of(cfg)
    return P() if plan is None else plan.specs()


def abstract_amount(cfg: ExperimentConfig, mesh: Mesh | AbstractMesh) -> Any:
    """Shapes and shardings of what `amount_of` gives."""
    n_micro = cfg.batch.end // cfg.batch.micro_batch
    return jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)),
        amount_of(cfg, n_micro),
        amount_specs(cfg),
    )


def _with_average(
    cfg: ExperimentConfig, step: Any, state: TrainState, *batch: jax.Array
) -> tuple[TrainState, Metrics]:
    """A step beside which the average takes in the parameters that the step starts from."""
    new, metrics = step(replace(state, ema=None), *batch)
    if state.ema is not None:
        new = replace(new, ema=absorbed(state, cfg.optim.ema_decay or 0.0), averaged=state.step)
    return new, metrics


def make_eval_step(
    cfg: ExperimentConfig,
    mesh: Mesh | AbstractMesh | None = None,
    rules: ShardingRules | None = None,
) -> Any:
    """The jitted `(params, router_state, tokens_BS, segments_BS) -> (nll sum in nats, targets)`.

    With a mesh, the parameters live where a state keeps them; call it under `jax.set_mesh(mesh)`.
    A pipeline is the busier, the more micro-batches the rows are.
    """
    rules = rules or rules_of(cfg)
    parallel = Parallel.over(cfg, mesh, rules)

    def step(params: Any, router_state: Any, tokens_BS: jax.Array, segments_BS: jax.Array) -> Any:
        if parallel.plan is not None:
            return parallel.total(
                evaluation.nll(
                    cfg,
                    rules,
                    parallel.specs,
                    parallel.places,
                    params,
                    router_state,
                    tokens_BS,
                    segments_BS,
                )
            )
        params = parallel.gather(params)
        nll = objective.eval_loss(cfg, params, router_state, tokens_BS, segments_BS, rules)
        return parallel.total(nll)

    if mesh is None:
        return jax.jit(step)
    batch = P(BATCH_AXES)
    manual = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(parallel.places, P(), batch, batch),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(manual, compiler_options=compiler_options(mesh))


@dataclass(frozen=True)
class Parallel:
    """What one device's program does together with the others; alone, each is the identity."""

    rules: ShardingRules
    specs: Any = None
    """Where each parameter is computed with; None: on one device."""
    places: Any = None
    """Where each parameter is stored."""
    shards: int = 1
    """Parts of the batch."""
    plan: Plan | None = None
    """Of the pipeline, if there is one."""

    @classmethod
    def over(
        cls, cfg: ExperimentConfig, mesh: Mesh | AbstractMesh | None, rules: ShardingRules
    ) -> "Parallel":
        """For a device of `mesh`."""
        if mesh is None:
            return cls(rules)
        specs, places = param_specs(cfg, mesh, rules)
        shards = math.prod(mesh.shape[a] for a in BATCH_AXES)
        return cls(rules, specs, places, shards, plan_of(cfg))

    def gather(self, params: Any) -> Any:
        """The parameters to compute with; `fsdp` gathers them later, where they are used."""
        if self.specs is None or self.rules.storage == "fsdp":
            return params
        return jax.tree.map(
            lambda p, spec, place: sharding.gather(p, spec, place, self.rules),
            params,
            self.specs,
            self.places,
        )

    def reduce(self, gradients: Any) -> Any:
        """Gradients of the whole batch, as the parameters are stored."""
        if self.specs is None:
            return gradients
        at = self.places if self.rules.storage == "fsdp" else self.specs
        return jax.tree.map(
            lambda g, spec, place: sharding.reduce(g, spec, place, self.rules),
            gradients,
            at,
            self.places,
        )

    def total(self, tree: Any, axes: tuple[str, ...] = MESH_AXES) -> Any:
        """Sums over devices: over the parts of the batch and a pipeline's ranks, or over `axes`."""
        if self.specs is None:
            return tree
        return jax.tree.map(lambda x: sharding.add_up(x, axes, self.rules), tree)

    def norm(self, gradients: Any) -> jax.Array:
        """The global norm of reduced gradients."""
        if self.specs is None:
            return optax.tree.norm(gradients)
        squares: dict[tuple[str, ...], jax.Array] = {}
        for g, place in zip(jax.tree.leaves(gradients), jax.tree.leaves(self.places), strict=True):
            held = set(jax.tree.leaves(tuple(place)))
            axes = tuple(a for a in MESH_AXES if a in held)
            squares[axes] = squares.get(axes, jnp.zeros((), g.dtype)) + jnp.sum(jnp.square(g))
        return jnp.sqrt(sum(self.total(x, axes) for axes, x in squares.items()))


def train_step(
    cfg: ExperimentConfig,
    parallel: Parallel,
    state: TrainState,
    tokens_MBS: jax.Array,
    segments_MBS: jax.Array,
    amount: jax.Array | Orders,
) -> tuple[TrainState, Metrics]:
    """The step as one device's program: its rows, and its part of the state; see
    `make_train_step`."""
    tokens = tokens_of(state.sequences, cfg.data.seq_len)
    lr = learning_rate(cfg.optim)(state.step, tokens)
    mtp_weight = piecewise(cfg.mtp_weight)(tokens)
    bias_speed = _bias_speed(cfg, tokens)

    n_micro = amount.n_micro if isinstance(amount, Orders) else amount
    scale = _scale(cfg, parallel, segments_MBS, n_micro, mtp_weight)
    gradients, parts = _gradients(cfg, parallel, state, tokens_MBS, segments_MBS, amount, scale)
    gradients = _without(cfg.optim.frozen, gradients)
    # Devices that exchange tokens take their passes together.
    passes = parallel.total(parts.extra_passes, ("pipe", "data"))
    parts = replace(parallel.total(parts), extra_passes=passes)
    grad_norm = parallel.norm(gradients)
    committed = jnp.isfinite(parts.main + parts.mtp + parts.balance) & jnp.isfinite(grad_norm)

    direction, opt_state = adamw(cfg.optim, cfg.numerics.moments).update(
        gradients, state.opt_state, state.params, grad_norm=grad_norm
    )
    params = jax.tree.map(lambda p, d: p - lr * d, state.params, direction)
    params |= {name: state.params[name] for name in cfg.optim.frozen}
    new = TrainState(
        step=state.step + 1,
        sequences=state.sequences + scale.n_sequences.astype(jnp.uint32),
        bad_steps=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=opt_state,
        router_state=_moved_biases(cfg, state.router_state, parts.load_LE, bias_speed),
        ema=None,
        averaged=state.averaged,
    )
    kept = replace(state, bad_steps=state.bad_steps + 1)
    new = jax.tree.map(lambda a, b: jnp.where(committed, a, b), new, kept)
    bias_mean, bias_spread = _bias_drift(new.router_state)
    metrics = {
        "loss": parts.main,
        "mtp_loss": parts.mtp,
        "balance_loss": parts.balance,
        "lr": lr,
        "grad_norm": grad_norm,
        "bias_speed": bias_speed,
        "bias_mean": bias_mean,
        "bias_spread": bias_spread,
        "mtp_weight": mtp_weight,
        "max_violation": max_violation(parts.load_LE),
        "committed": committed.astype(jnp.int32),
        "bad_steps": new.bad_steps,
        "step": new.step,
        "sequences": new.sequences,
        "load_LE": parts.load_LE,
        "rank_overload": parts.overload,
        "extra_passes": parts.extra_passes,
        "dropped_choices": parts.dropped,
    }
    return new, metrics


def _without(frozen: tuple[str, ...], gradients: Any) -> Any:
    """Gradients with zeros for the groups of parameters that stay as they are."""
    return gradients | {name: jax.tree.map(jnp.zeros_like, gradients[name]) for name in frozen}


def _bias_speed(cfg: ExperimentConfig, tokens: jax.Array) -> jax.Array:
    """Speed of the router bias; 0 unless the strategy is the loss-free one."""
    if cfg.balance.strategy != "loss_free":
        return jnp.zeros(())
    return piecewise(cfg.balance.bias_speed)(tokens)


def _moved_biases(
    cfg: ExperimentConfig, router_state: Any, load_LE: jax.Array, speed: jax.Array
) -> Any:
    if cfg.balance.strategy != "loss_free" or not jax.tree.leaves(router_state):
        return router_state
    rule = find_rule(cfg.balance.bias_rule)
    return with_layer_biases(router_state, rule(layer_biases(router_state), load_LE, speed))


def _bias_drift(router_state: Any) -> tuple[jax.Array, jax.Array]:
    """Mean of all router biases, and their range averaged over layers; 0 without routers."""
    if not jax.tree.leaves(router_state):
        return jnp.zeros(()), jnp.zeros(())
    bias_LE = layer_biases(router_state)
    return bias_LE.mean(), jnp.ptp(bias_LE, axis=-1).mean()


def _scale(
    cfg: ExperimentConfig,
    parallel: Parallel,
    segments_MBS: jax.Array,
    n_micro: jax.Array,
    mtp_weight: jax.Array,
) -> Scale:
    """Divisors of the whole batch: its targets and sequences over the micro-batches in use."""
    mask_MBT = objective.target_mask(segments_MBS, isolate_documents=cfg.data.isolate_documents)
    used_M = jnp.arange(segments_MBS.shape[0]) < n_micro
    n_targets = parallel.total(
        jnp.sum(mask_MBT & used_M[:, None, None], dtype=jnp.int32), BATCH_AXES
    )
    return Scale(
        n_targets=jnp.maximum(n_targets, 1).astype(jnp.float32),
        n_sequences=(n_micro * segments_MBS.shape[1] * parallel.shards).astype(jnp.float32),
        mtp_weight=mtp_weight,
    )


def _gradients(
    cfg: ExperimentConfig,
    parallel: Parallel,
    state: TrainState,
    tokens_MBS: jax.Array,
    segments_MBS: jax.Array,
    amount: jax.Array | Orders,
    scale: Scale,
) -> tuple[Any, LossParts]:
    """The batch's FP32 gradients, as parameters are stored, and this device's loss parts."""
    if isinstance(amount, Orders):
        assert parallel.plan is not None
        return step_gradients(
            cfg,
            parallel.rules,
            parallel.plan,
            parallel.specs,
            parallel.places,
            state.params,
            state.router_state,
            tokens_MBS,
            segments_MBS,
            amount,
            scale,
        )
    gradients, parts = _accumulate(cfg, parallel, state, tokens_MBS, segments_MBS, amount, scale)
    return parallel.reduce(gradients), parts


def _accumulate(
    cfg: ExperimentConfig,
    parallel: Parallel,
    state: TrainState,
    tokens_MBS: jax.Array,
    segments_MBS: jax.Array,
    n_micro: jax.Array,
    scale: Scale,
) -> tuple[Any, LossParts]:
    """This device's FP32 gradients and loss parts over the first `n_micro` micro-batches."""
    params = parallel.gather(state.params)

    def loss(params: Any, m: jax.Array | int, sink: Sink | None = None) -> Any:
        rows = (tokens_MBS[m], segments_MBS[m])
        return objective.loss(
            cfg, params, state.router_state, *rows, scale, parallel.rules, sink=sink
        )

    if tokens_MBS.shape[0] == 1:
        return jax.grad(loss, has_aux=True)(params, 0)
    sink = new_sink(params)

    def add(m: jax.Array, total: LossParts) -> LossParts:
        def tapped_loss(probe: jax.Array) -> Any:
            into = Sink(sink.refs, probe)
            loose = {k: tapped(v, into[k]) for k, v in params.items() if not is_stacked(k)}
            return loss(params | loose, m, into)

        _, parts = jax.grad(tapped_loss, has_aux=True)(sink.probe)
        return jax.tree.map(jnp.add, total, parts)

    parts = jax.eval_shape(lambda: loss(params, 0))[1]
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), parts)
    parts = jax.lax.fori_loop(0, n_micro, add, nothing)
    return added_up(sink), parts
