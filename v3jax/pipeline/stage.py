"""What a stage computes: its MoE layers' passes, and the dense layers and MTP modules of the ends.

Dims: B sequences, S = T + 1 row, T positions, W looked up of a row (`ops.zigzag`), D model, N slots
of a rank's layers, K MTP modules.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend import core

from v3jax import objective
from v3jax.config import ExperimentConfig
from v3jax.model.block import Block, rematerialised
from v3jax.model.layers import compute_dtype, master_dtype
from v3jax.model.moe import RouterStats
from v3jax.model.mtp import MTPModule, known
from v3jax.objective import LossParts, Scale
from v3jax.ops import zigzag
from v3jax.ops.norm import rms_norm
from v3jax.pipeline.split import Split, split
from v3jax.sharding import ShardingRules

Slot = tuple[jax.Array, jax.Array]
"""Where a layer lies among a rank's own, and which of the model's MoE layers it is."""


class Stage:
    """The computations of a rank's chunks, for rows of one shape.

    Args:
      layers_N: the rank's MoE layers, stacked, in the types they are computed with.
      rows: shape `[B, S]` of a micro-batch's tokens.
    """

    def __init__(
        self,
        cfg: ExperimentConfig,
        rules: ShardingRules,
        layers_N: Any,
        router_state: Any,
        rows: tuple[int, ...],
    ) -> None:
        self.cfg, self.rules, self.router_state = cfg, rules, router_state
        self.layers_N = layers_N
        self.window = zigzag.Window(rows[1] - 1, cfg.model.mtp_depth)
        self._segments = jax.ShapeDtypeStruct(rows, jnp.int32)
        shape = (rows[0], (rows[1] - 1) // zigzag.n_devices(), cfg.model.dim)
        self._x = jax.ShapeDtypeStruct(shape, compute_dtype(cfg.numerics))
        width = self.window.width(rows[1])
        self._row = jax.ShapeDtypeStruct((rows[0], width, cfg.model.dim), self._x.dtype)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of what passes between stages, and of what is looked up of a row."""
        return self._x.shape, self._row.shape

    @cached_property
    def layer(self) -> Split:
        """A MoE layer's passes."""
        return split(self._layer, *self._layer_shapes)

    @property
    def _layer_shapes(self) -> tuple[Any, ...]:
        def shape(a: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(a.shape[1:], a.dtype)

        params = jax.tree.map(shape, self.layers_N)
        bias = jax.tree.map(shape, self.router_state["moe_layers"])
        return params, self._x, bias, self._segments

    def _layer(self, params: Any, x_BTD: jax.Array, bias_E: Any, segments_BS: jax.Array) -> Any:
        """A MoE layer: `((output, balance loss), statistics)`."""
        cfg = self.cfg
        block = rematerialised(cfg.numerics, in_scan=True)(
            cfg.model, cfg.numerics, self.rules, moe=True, parent=None
        )
        variables = {"params": params, "router_state": bias_E}
        y_BTD, stats = cast(Any, block).apply(variables, x_BTD, *self._shared(segments_BS))
        return (y_BTD, objective.balance_of(cfg, stats)), stats

    def _shared(self, segments_BS: jax.Array) -> tuple[Any, ...]:
        """Positions, segments and what counts, as a block takes them."""
        inputs_BT = segments_BS[:, :-1]
        isolate = self.cfg.data.isolate_documents
        isolated = objective.isolated(inputs_BT, isolate_documents=isolate)
        positions_T = objective.positions(inputs_BT, isolate_documents=isolate)
        return positions_T, isolated, zigzag.own(inputs_BT != 0)

    def _of(self, slot: Slot) -> tuple[Any, Any]:
        """A layer's parameters and router bias."""
        place, layer = slot
        params = jax.tree.map(lambda a: a[place], self.layers_N)
        return params, jax.tree.map(lambda a: a[layer], self.router_state["moe_layers"])

    def forward(self, slot: Slot, x_BTD: jax.Array, segments_BS: jax.Array) -> tuple[Any, ...]:
        """`(output, balance loss, statistics, saved)` of a layer."""
        params, bias_E = self._of(slot)
        (y_BTD, balance), stats, saved = self.layer.forward(params, x_BTD, bias_E, segments_BS)
        return y_BTD, balance, stats, saved

    def forward_alone(
        self, slot: Slot, x_BTD: jax.Array, segments_BS: jax.Array
    ) -> tuple[jax.Array, jax.Array, RouterStats]:
        """The same with nothing saved."""
        params, bias_E = self._of(slot)
        (y_BTD, balance), stats = self._layer(params, x_BTD, bias_E, segments_BS)
        return y_BTD, balance, stats

    def inputs(self, slot: Slot, saved: Any, gradients: Any) -> tuple[jax.Array, Any]:
        """`(gradient of a layer's input, found)` from those of its output and balance loss."""
        return self.layer.inputs(self._of(slot)[0], saved, gradients)

    def weights(self, slot: Slot, saved: Any, found: Any) -> Any:
        """Gradients of a layer's parameters."""
        return self.layer.weights(self._of(slot)[0], saved, found)

    def dense(self, ends: Any, x_BTD: jax.Array, segments_BS: jax.Array) -> jax.Array:
        """The dense layers."""
        cfg = self.cfg
        block = Block(cfg.model, cfg.numerics, self.rules, moe=False, parent=None)
        for i in range(cfg.model.n_dense_layers):
            params = jax.tree.map(lambda a, i=i: a[i], ends["dense_layers"])
            x_BTD, _ = cast(Any, block).apply({"params": params}, x_BTD, *self._shared(segments_BS))
        return x_BTD

    def out(
        self, ends: Any, x_BTD: jax.Array, ahead_BWD: jax.Array, segments_BS: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], list[RouterStats]]:
        """What the head reads, `[1 + K, B, T, D]`, and the MTP modules' balance loss and
        statistics. `ahead_BWD` is what was looked up of the row; without modules anything."""
        cfg = self.cfg
        positions_T, isolated, _ = self._shared(segments_BS)
        h_BTD = rms_norm(x_BTD, ends["norm"], cfg.model.norm_eps)
        hidden, stats = [h_BTD], []
        for k in range(1, cfg.model.mtp_depth + 1):
            known_BT = zigzag.own(known(segments_BS != 0, k))
            name = f"mtp_layers_{k - 1}"
            module = MTPModule(cfg.model, cfg.numerics, self.rules, parent=None)
            variables = {"params": ends[name], "router_state": self.router_state[name]}
            ahead_BTD = self.window.later(ahead_BWD, k)
            h_BTD, stat = cast(Any, module).apply(
                variables, h_BTD, ahead_BTD, positions_T, isolated, known_BT
            )
            hidden.append(h_BTD)
            stats.append(stat)
        zero = jnp.zeros((), master_dtype(cfg.numerics))
        balance = sum((objective.balance_of(cfg, s) for s in stats), start=zero)
        return (jnp.stack(hidden), balance), stats

    def counted(
        self, parts: LossParts, scale: Scale, router: jax.Array | int, stats: RouterStats
    ) -> LossParts:
        """The loss's parts with a router's statistics in them, its loss excepted."""
        model, exchange = self.cfg.model, stats.exchange
        n_routers = model.n_moe_layers + model.mtp_depth
        overload = exchange.overload / n_routers
        overload *= objective.own_sequences(self._x.shape[0]) / scale.n_sequences
        return replace(
            parts,
            load_LE=parts.load_LE.at[router].add(stats.load_E),
            overload=parts.overload + overload,
            extra_passes=parts.extra_passes + exchange.extra_passes.astype(jnp.int32),
            dropped=parts.dropped + exchange.dropped.astype(jnp.int32),
        )

    def check(self, ends: Any) -> None:
        """Raises ValueError if a layer has a collective that waits for ever where some ranks do not
        run it: over `pipe`, or a collective permute, for which all devices of a mesh meet."""
        dense = jax.make_jaxpr(self.dense)(ends, self._x, self._segments).jaxpr
        last = jax.make_jaxpr(self.out)(ends, self._x, self._row, self._segments).jaxpr
        layer = (jax.make_jaxpr(self._layer)(*self._layer_shapes).jaxpr,)
        programs = (*(self.layer.programs if self.rules.halves else layer), dense, last)
        for name, axes in (found for program in programs for found in collectives(program)):
            if name == "ppermute" or "pipe" in axes:
                raise ValueError(
                    f"pipeline: a layer has {name} over {' and '.join(axes)}, which ranks at "
                    "another operation would not join; set pipeline.mode=masked, or use all_to_all "
                    "or all_gather over other axes"
                )


_COLLECTIVES = frozenset(
    [
        "psum",
        "psum_invariant",
        "pmax",
        "pmin",
        "ppermute",
        "all_to_all",
        "ragged_all_to_all",
        "all_gather",
        "all_gather_invariant",
        "reduce_scatter",
        "pbroadcast",
    ]
)


def collectives(jaxpr: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names and mesh axes of the collectives in a program and all that it calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _COLLECTIVES:
            axes = eqn.params.get("axis_name", eqn.params.get("axes", ()))
            named = axes if isinstance(axes, tuple) else (axes,)
            yield eqn.primitive.name, tuple(a for a in named if isinstance(a, str))
        for inner in core.jaxprs_in_params(eqn.params):
            yield from collectives(inner)
