"""DeepSeekMoE: shared and routed experts, no token ever dropped (report section 2.1.2).

The gate multiplies the hidden activation of an expert instead of its output: the same product,
but neither its output nor a second copy of it has to be kept for the gradient.
Dims: B batch, T time, N = B T tokens, D model, E experts, K experts of a token, F expert width.
"""

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from v3jax.model.layers import FeedForward, Module
from v3jax.ops import routing
from v3jax.ops.dispatch import combine, dispatch, dispatch_gates, make_layout
from v3jax.ops.gemm import grouped_matmul
from v3jax.ops.norm import swiglu


@struct.dataclass
class RouterStats:
    """What a router reports of one micro-batch; scans stack a leading layer axis."""

    load_E: jax.Array
    """Tokens sent to each expert, int32; padding does not count."""
    balance_loss: jax.Array
    """Sequence-wise balance loss, summed over sequences, before its factor alpha; FP32."""


class Experts(Module):
    """The routed experts as two grouped matrix products over rows sorted by expert."""

    @nn.compact
    def __call__(self, x_ND: jax.Array, experts_NK: jax.Array, gates_NK: jax.Array) -> jax.Array:
        cfg = self.cfg
        width = cfg.expert_ffn_dim
        gate_up = self.matrix(
            "gate_up_proj", (cfg.n_experts, cfg.dim, 2 * width), "experts", "embed", "ffn"
        )
        down = self.matrix("down_proj", (cfg.n_experts, width, cfg.dim), "experts", "ffn", "embed")
        layout = make_layout(experts_NK, cfg.n_experts)
        hidden = grouped_matmul(dispatch(x_ND, layout), gate_up, layout)
        hidden = swiglu(checkpoint_name(hidden, "gate_up"))
        gates = dispatch_gates(gates_NK, layout)[:, None]
        hidden = (hidden.astype(jnp.float32) * gates).astype(x_ND.dtype)
        return combine(grouped_matmul(hidden, down, layout), layout)


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
        gate_DE = self.param(
            "gate", self.rules.init(init, "embed", None), (cfg.dim, cfg.n_experts), jnp.float32
        )
        bias_E = self.variable(
            "router_state", "e_score_correction_bias", jnp.zeros, (cfg.n_experts,), jnp.float32
        ).value
        logits_NE = jnp.dot(x_ND.astype(jnp.float32), gate_DE, precision=jax.lax.Precision.HIGHEST)
        logits_NE = checkpoint_name(logits_NE, "router_logits")
        experts_NK, gates_NK = routing.route(
            logits_NE,
            bias_E,
            top_k=cfg.top_k,
            n_groups=cfg.n_groups,
            top_groups=cfg.top_groups,
            route_scale=cfg.route_scale,
        )
        routed_ND = Experts(cfg, self.numerics, self.rules, name="experts")(
            x_ND, experts_NK, gates_NK
        )
        out_BTD = routed_ND.reshape(x_BTD.shape)
        if cfg.n_shared_experts:
            width = cfg.n_shared_experts * cfg.expert_ffn_dim
            out_BTD += FeedForward(cfg, self.numerics, self.rules, width, name="shared_experts")(
                x_BTD
            )

        balance_B = routing.sequence_balance_loss(
            logits_NE.reshape(*x_BTD.shape[:2], -1), top_k=cfg.top_k, counted_BS=counted_BT
        )
        counted_N = None if counted_BT is None else counted_BT.reshape(-1)
        load_E = routing.expert_load(experts_NK, cfg.n_experts, counted_N)
        return out_BTD, RouterStats(load_E=load_E, balance_loss=balance_B.sum())
