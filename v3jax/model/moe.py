"""DeepSeekMoE: shared and routed experts, no token ever dropped (report section 2.1.2).

The gate multiplies the hidden activation of an expert instead of its output: the same product,
but neither its output nor a second copy of it has to be kept for the gradient.
Dims: B batch, T time, N = B T tokens, D model, E experts, K experts of a token, F expert width.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from v3jax.model.layers import FeedForward, Module, fp8_of
from v3jax.ops import routing, zigzag
from v3jax.ops.expert_parallel import (
    ExchangeStats,
    drop_beyond_capacity,
    experts_here,
    no_exchange,
    routed_experts,
)
from v3jax.ops.precision import widen
from v3jax.sharding import TOKEN_AXES, manual_axes


@struct.dataclass
class RouterStats:
    """What a router reports of one micro-batch; scans stack a leading layer axis."""

    load_E: jax.Array
    """Tokens sent to each expert, int32; padding does not count."""
    balance_loss: jax.Array
    """Sequence-wise balance loss, summed over sequences, before its factor alpha; FP32. Of
    sequences that devices share (`ops.zigzag`) this device's share."""
    batch_balance_loss: jax.Array
    """The same over the micro-batch as one; on a mesh this device's share."""
    exchange: ExchangeStats


class Experts(Module):
    """The routed experts as two grouped matrix products over rows sorted by expert.

    On a mesh that splits batch or experts every device runs its own experts on the tokens that
    are sent to it, as its own program: the caller's, inside `jax.shard_map`, or one made here.
    """

    @nn.compact
    def __call__(
        self, x_ND: jax.Array, experts_NK: jax.Array, gates_NK: jax.Array
    ) -> tuple[jax.Array, ExchangeStats]:
        cfg = self.cfg
        width = cfg.expert_ffn_dim
        gate_up = self.weight(
            "gate_up_proj", (cfg.n_experts, cfg.dim, 2 * width), "experts", "embed", "ffn"
        )
        down = self.weight("down_proj", (cfg.n_experts, width, cfg.dim), "experts", "ffn", "embed")
        arrays = (x_ND, experts_NK, gates_NK, gate_up, down)
        mesh = jax.sharding.get_abstract_mesh()
        sizes = {axis: mesh.shape.get(axis, 1) for axis in TOKEN_AXES}
        shards = sizes["node"] * sizes["context"] * sizes["expert"]
        if self.is_initializing() or all(size == 1 for size in sizes.values()):
            return self._on_this_device(1, *arrays)
        if manual_axes():
            return self._on_this_device(shards, *arrays)

        def run(*arrays: jax.Array) -> tuple[jax.Array, ExchangeStats]:
            out, stats = self._on_this_device(shards, *arrays)
            return out, jax.tree.map(lambda s: s[None], stats)

        experts = self.rules.spec("experts")
        rows = P(TOKEN_AXES)
        out_ND, stats = jax.shard_map(
            run,
            in_specs=(rows, rows, rows, experts, experts),
            out_specs=(rows, rows),
            axis_names=set(mesh.axis_names),
            check_vma=False,
        )(*arrays)
        return out_ND, ExchangeStats(
            extra_passes=stats.extra_passes.sum() // shards,
            overload=stats.overload.mean(),
            dropped=stats.dropped.sum(),
        )

    def _on_this_device(
        self,
        expert_shards: int,
        x_ND: jax.Array,
        experts_NK: jax.Array,
        gates_NK: jax.Array,
        gate_up: jax.Array,
        down: jax.Array,
    ) -> tuple[jax.Array, ExchangeStats]:
        cfg, moe = self.cfg, self.rules.moe
        if expert_shards > 1:
            halves = self.rules.halves
            return routed_experts(
                *(cfg, moe, x_ND, experts_NK, gates_NK, gate_up, down),
                fp8=fp8_of(self.numerics),
                keep=halves or self.numerics.remat != "full",
                halves=halves,
            )
        stats, capped = no_exchange(), moe.capacity_factor is not None
        if moe.capacity_factor is not None:
            experts_NK, dropped = drop_beyond_capacity(
                experts_NK, cfg.n_experts, moe.capacity_factor
            )
            stats = dataclasses.replace(stats, dropped=dropped)
        out_ND = experts_here(
            *(cfg.n_experts, x_ND, experts_NK, gates_NK, gate_up, down),
            fp8=fp8_of(self.numerics),
            partial=capped,
        )
        return out_ND, stats


class MoE(Module):
    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, counted_BT: jax.Array | None
    ) -> tuple[jax.Array, RouterStats]:
        """The layer's output `[B, T, D]` and its router's statistics over `counted_BT`."""
        cfg = self.cfg
        chex.assert_shape(x_BTD, (None, None, cfg.dim))
        x_ND = x_BTD.reshape(-1, cfg.dim)
        # The router works in FP32, its weights too (report section 3.3.1).
        init = nn.initializers.normal(cfg.init_std)
        gate_DE = self.parameter("gate", init, (cfg.dim, cfg.n_experts), "embed", None)
        bias_E = self.variable(
            "router_state", "e_score_correction_bias", jnp.zeros, (cfg.n_experts,), jnp.float32
        ).value
        logits_NE = jnp.dot(widen(x_ND), gate_DE, precision=jax.lax.Precision.HIGHEST)
        logits_NE = checkpoint_name(logits_NE, "router_logits")
        experts_NK, gates_NK = routing.route(
            logits_NE,
            bias_E,
            top_k=cfg.top_k,
            n_groups=cfg.n_groups,
            top_groups=cfg.top_groups,
            route_scale=cfg.route_scale,
            multiplied=cfg.router_bias == "multiplied",
        )
        routed_ND, exchange = Experts(cfg, self.numerics, self.rules, name="experts")(
            x_ND, experts_NK, gates_NK
        )
        out_BTD = routed_ND.reshape(x_BTD.shape)
        if cfg.n_shared_experts:
            width = cfg.n_shared_experts * cfg.expert_ffn_dim
            out_BTD += FeedForward(cfg, self.numerics, self.rules, width, name="shared_experts")(
                x_BTD
            )

        logits_BTE = logits_NE.reshape(*x_BTD.shape[:2], -1)
        n_parts = zigzag.n_devices()
        balance_B = routing.sequence_balance_loss(
            logits_BTE,
            top_k=cfg.top_k,
            counted_BS=counted_BT,
            axes=(zigzag.AXIS,) if n_parts > 1 else (),
        )
        axes = tuple(axis for axis in TOKEN_AXES if axis in manual_axes())
        batch_balance = routing.batch_balance_loss(
            logits_BTE, top_k=cfg.top_k, counted_BS=counted_BT, axes=axes, parts=n_parts
        )
        counted_N = None if counted_BT is None else counted_BT.reshape(-1)
        load_E = routing.expert_load(experts_NK, cfg.n_experts, counted_N)
        return out_BTD, RouterStats(
            load_E=load_E,
            balance_loss=balance_B.sum(),
            batch_balance_loss=batch_balance,
            exchange=exchange,
        )
