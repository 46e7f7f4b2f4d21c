"""The latent cache of decoding and attention over it (report section 2.1.1).

A token leaves one row a layer: its normalised latent and its rotated key, `kv_latent_dim +
rope_head_dim` elements (576 in the report's model), whatever the number of heads. Decoding attends
to those rows as they are: the up-projection of keys is absorbed into the query and that of values
into the output. Prefill expands keys and values from them, which is less work for many queries.
Both go over the cache in blocks up to the longest sequence, with a running softmax, so work follows
what is there and not the room. Dims: B rows, T new tokens, S room, C latent, R rotary, Z = C + R,
H heads, N nope, V value, K = N + R.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from v3jax.config import ModelConfig
from v3jax.ops import rope
from v3jax.ops.norm import rms_norm

BLOCK = 256
"""Cache positions attended to at a time; the room is a multiple of it."""

KeysValues = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@struct.dataclass
class Cache:
    """Latents of every layer, the main model's and then the MTP modules'."""

    layers: tuple[jax.Array, ...]
    """Each `[B, S, Z]` in the compute type."""

    @property
    def room(self) -> int:
        """Positions of a row."""
        return self.layers[0].shape[1]


def room_for(length: int) -> int:
    """Room that holds `length` tokens: a power of two of blocks, so that few sizes are compiled."""
    return BLOCK << (max(-(-length // BLOCK), 1) - 1).bit_length()


def new_cache(
    model: ModelConfig,
    n_rows: int,
    length: int,
    dtype: Any,
    *,
    mtp: bool = False,
    place: Any = None,
) -> Cache:
    """An empty cache with room for `length` tokens a row, rounded up to whole blocks."""
    room = -(-length // BLOCK) * BLOCK
    shape = (n_rows, room, model.kv_latent_dim + model.rope_head_dim)
    n_layers = model.n_layers + (model.mtp_depth if mtp else 0)
    return Cache(tuple(jnp.zeros(shape, dtype, device=place) for _ in range(n_layers)))


def absorbable(model: ModelConfig, kv_b_proj: jax.Array) -> dict[str, jax.Array]:
    """`kv_b_proj` `[C, H (N + V)]` taken apart into what either form multiplies with."""
    kv_b_CHK = kv_b_proj.reshape(model.kv_latent_dim, model.n_heads, -1)
    up_k_CHN, up_v_CHV = jnp.split(kv_b_CHK, [model.nope_head_dim], axis=-1)
    return {"up_k_HNC": up_k_CHN.transpose(1, 2, 0), "up_v_HCV": up_v_CHV.transpose(1, 0, 2)}


def cached_mla(
    model: ModelConfig,
    params: Any,
    x_BTD: jax.Array,
    cache_BSZ: jax.Array,
    positions_BT: jax.Array,
    *,
    absorbed: bool,
) -> tuple[jax.Array, jax.Array]:
    """MLA of new tokens over the cache, and the cache with their rows in it.

    `positions_BT` places each token in its sequence; a negative one is padding that leaves no row.
    A token sees the cache up to its own position, so rows beyond are never read. `params` are a
    layer's `self_attn` with `absorbable` in the place of `kv_b_proj`.
    """
    batch, length, _ = x_BTD.shape
    q_BTHK = _queries(model, params, x_BTD).reshape(batch, length, model.n_heads, -1)
    down_BTZ = x_BTD @ params["kv_a_proj_with_mqa"]
    c_BTC, k_rope_BTR = jnp.split(down_BTZ, [model.kv_latent_dim], axis=-1)
    c_BTC = rms_norm(c_BTC, params["kv_a_layernorm"], model.latent_norm_eps)
    theta_P = rope.frequencies(model)
    k_rope_BTR = rope.rotate(k_rope_BTR, positions_BT, theta_P)
    q_nope_BTHN, q_rope_BTHR = jnp.split(q_BTHK, [model.nope_head_dim], axis=-1)
    q_rope_BTHR = rope.rotate(q_rope_BTHR, positions_BT, theta_P)

    rows_BTZ = jnp.concatenate([c_BTC, k_rope_BTR], axis=-1).astype(cache_BSZ.dtype)
    cache_BSZ = write_rows(cache_BSZ, rows_BTZ, positions_BT)

    scale = rope.softmax_scale(model)
    if absorbed:
        q_BTHC = jnp.einsum("bthn,hnc->bthc", q_nope_BTHN, params["up_k_HNC"])
        q_BTHZ = jnp.concatenate([q_BTHC, q_rope_BTHR], axis=-1)
        # A row is key and value at once; what the sum has of rotary keys is dropped.
        z_BTHZ = attend(q_BTHZ, cache_BSZ, positions_BT, _rows_as_they_are, scale)
        z_BTHC = z_BTHZ[..., : model.kv_latent_dim]
        out_BTHV = jnp.einsum("bthc,hcv->bthv", z_BTHC, params["up_v_HCV"])
    else:

        def expanded(rows_BSZ: jax.Array) -> tuple[jax.Array, jax.Array]:
            c_BSC, k_BSR = jnp.split(rows_BSZ, [model.kv_latent_dim], axis=-1)
            k_BSHN = jnp.einsum("bsc,hnc->bshn", c_BSC, params["up_k_HNC"])
            k_BSHR = jnp.broadcast_to(k_BSR[:, :, None], (*k_BSHN.shape[:3], k_BSR.shape[-1]))
            v_BSHV = jnp.einsum("bsc,hcv->bshv", c_BSC, params["up_v_HCV"])
            return jnp.concatenate([k_BSHN, k_BSHR], axis=-1), v_BSHV

        q_BTHK = jnp.concatenate([q_nope_BTHN, q_rope_BTHR], axis=-1)
        out_BTHV = attend(q_BTHK, cache_BSZ, positions_BT, expanded, scale)
    return out_BTHV.reshape(batch, length, -1) @ params["o_proj"], cache_BSZ


def write_rows(x_BSZ: jax.Array, rows_BTZ: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """`x` with each new row in its slot; a slot that is not there takes none."""
    slots_BT = jnp.where(slots_BT < 0, x_BSZ.shape[1], slots_BT)  # negative ones would wrap
    return jax.vmap(lambda x, rows, slots: x.at[slots].set(rows, mode="drop"))(
        x_BSZ, rows_BTZ, slots_BT
    )


def _queries(model: ModelConfig, params: Any, x_BTD: jax.Array) -> jax.Array:
    if model.q_latent_dim is None:
        return x_BTD @ params["q_proj"]
    latent = rms_norm(x_BTD @ params["q_a_proj"], params["q_a_layernorm"], model.latent_norm_eps)
    return latent @ params["q_b_proj"]


def _rows_as_they_are(rows_BSZ: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rows_BSZ[:, :, None], rows_BSZ[:, :, None]


def attend(
    q_BTHK: jax.Array,
    cache_BSZ: jax.Array,
    positions_BT: jax.Array,
    keys_values: KeysValues,
    scale: float,
) -> jax.Array:
    """Softmax attention over the cache's blocks up to the last position, FP32 statistics.

    `keys_values` turns rows of the cache into keys `[B, S, H or 1, K]` and values.
    """
    room = cache_BSZ.shape[1]
    q_BHTK = q_BTHK.swapaxes(1, 2)

    def block(i: jax.Array | int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak_BHT, total_BHT, out_BHTV = carry
        rows_BSZ = jax.lax.dynamic_slice_in_dim(cache_BSZ, i * BLOCK, BLOCK, axis=1)
        k_BSHK, v_BSHV = keys_values(rows_BSZ)
        s_BHTS = _scores(q_BHTK, k_BSHK) * scale
        visible_BTS = i * BLOCK + jnp.arange(BLOCK) <= positions_BT[..., None]
        s_BHTS = jnp.where(visible_BTS[:, None], s_BHTS, -jnp.inf)
        higher_BHT = jnp.maximum(peak_BHT, s_BHTS.max(-1))
        p_BHTS = jnp.exp(s_BHTS - higher_BHT[..., None])
        shrink_BHT = jnp.exp(peak_BHT - higher_BHT)
        total_BHT = total_BHT * shrink_BHT + p_BHTS.sum(-1)
        out_BHTV = out_BHTV * shrink_BHT[..., None] + _mix(p_BHTS.astype(v_BSHV.dtype), v_BSHV)
        return higher_BHT, total_BHT, out_BHTV

    value_dim = jax.eval_shape(keys_values, cache_BSZ)[1].shape[-1]
    shape = q_BHTK.shape[:-1]
    carry = (  # a finite floor: padding sees nothing and must not make NaN
        jnp.full(shape, -1e30, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, value_dim), jnp.float32),
    )
    if room == BLOCK:
        carry = block(0, carry)
    else:
        n_blocks = jnp.minimum(positions_BT.max(), room - 1) // BLOCK + 1
        carry = jax.lax.fori_loop(0, n_blocks, block, carry)
    _, total_BHT, out_BHTV = carry
    out_BHTV /= jnp.maximum(total_BHT, 1e-30)[..., None]
    return out_BHTV.swapaxes(1, 2).astype(q_BTHK.dtype)


def _scores(q_BHTK: jax.Array, k_BSHK: jax.Array) -> jax.Array:
    if k_BSHK.shape[2] == 1:  # one key for all heads: one product of H x T queries
        return jnp.einsum(
            "bhtk,bsk->bhts", q_BHTK, k_BSHK[:, :, 0], preferred_element_type=jnp.float32
        )
    return jnp.einsum("bhtk,bshk->bhts", q_BHTK, k_BSHK, preferred_element_type=jnp.float32)


def _mix(p_BHTS: jax.Array, v_BSHV: jax.Array) -> jax.Array:
    if v_BSHV.shape[2] == 1:
        return jnp.einsum(
            "bhts,bsv->bhtv", p_BHTS, v_BSHV[:, :, 0], preferred_element_type=jnp.float32
        )
    return jnp.einsum("bhts,bshv->bhtv", p_BHTS, v_BSHV, preferred_element_type=jnp.float32)
