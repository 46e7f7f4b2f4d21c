"""One transformer block, pre-norm, and what of it is recomputed in the backward pass.

Dims: B batch, T time, D model.
"""

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from v3jax.config import NumericsConfig
from v3jax.model.layers import FeedForward, Module
from v3jax.model.mla import MLA
from v3jax.model.moe import MoE, RouterStats
from v3jax.ops.norm import rms_norm

# What the report keeps (sections 3.2.3 and 3.3.3). RMSNorms, MLA up-projections and SwiGLU outputs
# are computed again from these; attention itself is not.
KEPT_BY_REPORT = (
    "q_latent",
    "kv_latent",
    "attention_out",
    "attention_lse",
    "attention_residual",
    "router_logits",
    "dispatched",  # or it would travel again
    "gate_up",
)


class Block(Module):
    """`x += MLA(norm x); x += FFN(norm x)`, the FFN dense or a mixture of experts."""

    moe: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_T: jax.Array,
        segments_BT: jax.Array | None,
        counted_BT: jax.Array | None,
        ends_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats | None]:
        cfg = self.cfg
        input_norm = self.norm_weight("input_layernorm", cfg.dim)
        post_norm = self.norm_weight("post_attention_layernorm", cfg.dim)
        parts = (cfg, self.numerics, self.rules)
        h_BTD = rms_norm(x_BTD, input_norm, cfg.norm_eps)
        x_BTD += MLA(*parts, name="self_attn")(h_BTD, positions_T, segments_BT, ends_BT)
        x_BTD = checkpoint_name(x_BTD, "attention_residual")
        h_BTD = rms_norm(x_BTD, post_norm, cfg.norm_eps)
        if self.moe:
            out_BTD, stats = MoE(*parts, name="mlp")(h_BTD, counted_BT)
        else:
            out_BTD, stats = FeedForward(*parts, cfg.dense_ffn_dim, name="mlp")(h_BTD), None
        return x_BTD + out_BTD, stats


def rematerialised(numerics: NumericsConfig, *, in_scan: bool) -> type[Block]:
    """`Block` under the recompute policy `numerics.remat`: none, the report's, or full."""
    if numerics.remat == "none":
        return Block
    if numerics.remat == "full":
        return nn.remat(Block, prevent_cse=not in_scan)
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT_BY_REPORT)
    return nn.remat(Block, prevent_cse=not in_scan, policy=policy)
