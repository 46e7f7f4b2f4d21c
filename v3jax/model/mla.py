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

from v3jax import kernels
from v3jax.model.layers import Module, fp8_of
from v3jax.ops import rope, zigzag
from v3jax.ops.attention import causal_attention, packed_attention, tree_attention
from v3jax.ops.context import Form, shared_attention
from v3jax.ops.fp8 import linear
from v3jax.ops.fp8.quantize import Packed
from v3jax.ops.norm import rms_norm


class MLA(Module):
    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_T: jax.Array,
        segments_BT: jax.Array | None,
        ends_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Attention output `[B, T, D]`; `segments_BT` confines attention to its own segment,
        `ends_BT` to a token's ancestors (`ops.attention.Tree`).

        Where devices share rows, T are a device's own positions but in `segments_BT`, which is of
        the whole row.
        """
        cfg = self.cfg
        chex.assert_shape(x_BTD, (None, None, cfg.dim))
        n_heads, nope, rot = cfg.n_heads, cfg.nope_head_dim, cfg.rope_head_dim
        kv_a = self.weight(
            "kv_a_proj_with_mqa", (cfg.dim, cfg.kv_latent_dim + rot), "embed", "latent"
        )
        kv_b = self.weight(
            "kv_b_proj", (cfg.kv_latent_dim, n_heads * (nope + cfg.v_head_dim)), "latent", "heads"
        )
        o = self.weight("o_proj", (n_heads * cfg.v_head_dim, cfg.dim), "heads", "embed")
        kv_norm = self.norm_weight("kv_a_layernorm", cfg.kv_latent_dim)

        kv_latent_BTL = checkpoint_name(self.product(x_BTD, kv_a), "kv_latent")
        kv_latent_BTL, k_rope_BTR = jnp.split(kv_latent_BTL, [cfg.kv_latent_dim], axis=-1)
        kv_latent_BTL = rms_norm(kv_latent_BTL, kv_norm, cfg.latent_norm_eps)

        theta_P = rope.frequencies(cfg)
        q_nope_BTHN, q_rope_BTHR = self._by_head(*self._queries(x_BTD), (nope, rot))
        q_rope_BTHR = rope.rotate(q_rope_BTHR, positions_T, theta_P)
        k_rope_BTR = rope.rotate(k_rope_BTR, positions_T, theta_P)
        q_BTHK = jnp.concatenate([q_nope_BTHN, q_rope_BTHR], axis=-1)
        scale = rope.softmax_scale(cfg)
        fp8 = fp8_of(self.numerics)
        if zigzag.n_devices() > 1:
            assert ends_BT is None, "trees are for inference"
            form = Form(scale, nope, fp8, self.rules.deterministic)
            latent_BTY = jnp.concatenate([kv_latent_BTL, k_rope_BTR], axis=-1)
            out_BTHV, cached = shared_attention(form, q_BTHK, latent_BTY, kv_b, segments_BT)
            return self._out(out_BTHV, o, cached)
        k_nope_BTHN, v_BTHV = self._by_head(kv_latent_BTL, kv_b, (nope, cfg.v_head_dim))
        k_rope_BTHR = jnp.broadcast_to(k_rope_BTR[:, :, None], q_rope_BTHR.shape)
        k_BTHK = jnp.concatenate([k_nope_BTHN, k_rope_BTHR], axis=-1)
        cached = None
        if ends_BT is not None:
            assert segments_BT is None, "segments and trees exclude each other"
            out_BTHV = tree_attention(q_BTHK, k_BTHK, v_BTHV, ends_BT, scale=scale)
        elif fp8 is None:
            out_BTHV = causal_attention(
                q_BTHK, k_BTHK, v_BTHV, scale=scale, segments_BT=segments_BT
            )
        else:
            how = linear.recipe(fp8, exact=True)
            out_BTHV, cached = packed_attention(
                q_BTHK, k_BTHK, v_BTHV, scale=scale, segments_BT=segments_BT, how=how
            )
        return self._out(out_BTHV, o, cached)

    def _out(self, out_BTHV: jax.Array, o_OD: jax.Array, cached: Packed | None) -> jax.Array:
        """The output projection, in FP8 runs of what is `cached` of its input."""
        fp8, (*batch_time, n_heads, _) = fp8_of(self.numerics), out_BTHV.shape
        if fp8 is None:
            return jnp.einsum("bthv,hvd->btd", out_BTHV, o_OD.reshape(n_heads, -1, o_OD.shape[1]))
        out_BTO = out_BTHV.reshape(*batch_time, -1)
        return linear.linear(out_BTO, o_OD, linear.recipe(fp8, exact=True), cached=cached)

    def _queries(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the queries are projected from, through their latent if there is one, and the
        matrix that does it, `[..., H K]`."""
        cfg = self.cfg
        width = cfg.n_heads * (cfg.nope_head_dim + cfg.rope_head_dim)
        if cfg.q_latent_dim is None:
            return x_BTD, self.weight("q_proj", (cfg.dim, width), "embed", "heads")
        q_a = self.weight("q_a_proj", (cfg.dim, cfg.q_latent_dim), "embed", "latent")
        q_b = self.weight("q_b_proj", (cfg.q_latent_dim, width), "latent", "heads")
        q_norm = self.norm_weight("q_a_layernorm", cfg.q_latent_dim)
        q_latent_BTL = checkpoint_name(self.product(x_BTD, q_a), "q_latent")
        return rms_norm(q_latent_BTL, q_norm, cfg.latent_norm_eps), q_b

    def _by_head(
        self, x_BTL: jax.Array, w_LO: jax.Array, widths: tuple[int, int]
    ) -> tuple[jax.Array, jax.Array]:
        """Projects to the two parts that each head's columns consist of, `[B, T, H, width]`.

        On TPU the heads come first in memory, where its attention kernel reads them; XLA for CPU
        has no product of BF16 for what would follow from that.
        """
        n_heads = self.cfg.n_heads
        if fp8_of(self.numerics) is not None:
            y_BTO = self.product(x_BTL, w_LO)
            y_BTHK = y_BTO.reshape(*y_BTO.shape[:2], n_heads, -1)
            return y_BTHK[..., : widths[0]], y_BTHK[..., widths[0] :]
        w_LHK = w_LO.reshape(w_LO.shape[0], n_heads, sum(widths))
        on_tpu = kernels.platform() == "tpu"

        def project(w_LHK: jax.Array) -> jax.Array:
            if on_tpu:
                return jnp.einsum("btl,lhk->bhtk", x_BTL, w_LHK).swapaxes(1, 2)
            return jnp.einsum("btl,lhk->bthk", x_BTL, w_LHK)

        first, second = jnp.split(w_LHK, [widths[0]], axis=-1)
        return project(first), project(second)
