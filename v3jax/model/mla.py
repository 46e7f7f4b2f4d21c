"""Multi-head latent attention, expanded form for training (report section 2.1.1, eq. 1-11).

Queries and keys have a part without position and a rotary part; the rotary key is one vector a
token, shared by all heads. Both latents are normalised between down- and up-projection, which the
report's text has and its equations omit. Dims: B batch, T time, D model, H heads, N nope, R rope,
V value, K = N + R.
"""

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from v3jax.model.layers import Module
from v3jax.ops import rope
from v3jax.ops.attention import causal_attention
from v3jax.ops.norm import rms_norm


class MLA(Module):
    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_T: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        """Attention output `[B, T, D]`; `segments_BT` confines attention to its own segment."""
        cfg = self.cfg
        chex.assert_shape(x_BTD, (None, None, cfg.dim))
        batch, length, _ = x_BTD.shape
        n_heads, nope, rot = cfg.n_heads, cfg.nope_head_dim, cfg.rope_head_dim
        kv_a = self.matrix(
            "kv_a_proj_with_mqa", (cfg.dim, cfg.kv_latent_dim + rot), "embed", "latent"
        )
        kv_b = self.matrix(
            "kv_b_proj", (cfg.kv_latent_dim, n_heads * (nope + cfg.v_head_dim)), "latent", "heads"
        )
        o = self.matrix("o_proj", (n_heads * cfg.v_head_dim, cfg.dim), "heads", "embed")
        kv_norm = self.norm_weight("kv_a_layernorm", cfg.kv_latent_dim)

        kv_latent_BTL = checkpoint_name(x_BTD @ kv_a, "kv_latent")
        kv_latent_BTL, k_rope_BTR = jnp.split(kv_latent_BTL, [cfg.kv_latent_dim], axis=-1)

        q_BTHK = self._queries(x_BTD).reshape(batch, length, n_heads, nope + rot)
        kv_BTH = rms_norm(kv_latent_BTL, kv_norm, cfg.latent_norm_eps) @ kv_b
        kv_BTH = kv_BTH.reshape(batch, length, n_heads, nope + cfg.v_head_dim)

        theta_P = rope.frequencies(cfg)
        q_nope_BTHN, q_rope_BTHR = jnp.split(q_BTHK, [nope], axis=-1)
        k_nope_BTHN, v_BTHV = jnp.split(kv_BTH, [nope], axis=-1)
        q_rope_BTHR = rope.rotate(q_rope_BTHR, positions_T, theta_P)
        k_rope_BTR = rope.rotate(k_rope_BTR, positions_T, theta_P)
        k_rope_BTHR = jnp.broadcast_to(k_rope_BTR[:, :, None], (batch, length, n_heads, rot))
        out_BTHV = causal_attention(
            jnp.concatenate([q_nope_BTHN, q_rope_BTHR], axis=-1),
            jnp.concatenate([k_nope_BTHN, k_rope_BTHR], axis=-1),
            v_BTHV,
            scale=rope.softmax_scale(cfg),
            segments_BT=segments_BT,
        )
        return out_BTHV.reshape(batch, length, -1) @ o

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        """All heads' queries side by side, `[B, T, H K]`, through their latent if there is one."""
        cfg = self.cfg
        width = cfg.n_heads * (cfg.nope_head_dim + cfg.rope_head_dim)
        if cfg.q_latent_dim is None:
            return x_BTD @ self.matrix("q_proj", (cfg.dim, width), "embed", "heads")
        q_a = self.matrix("q_a_proj", (cfg.dim, cfg.q_latent_dim), "embed", "latent")
        q_b = self.matrix("q_b_proj", (cfg.q_latent_dim, width), "latent", "heads")
        q_norm = self.norm_weight("q_a_layernorm", cfg.q_latent_dim)
        q_latent_BTL = checkpoint_name(x_BTD @ q_a, "q_latent")
        return rms_norm(q_latent_BTL, q_norm, cfg.latent_norm_eps) @ q_b
