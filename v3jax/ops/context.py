"""Causal attention over rows that several devices share (report section 4.3; the split is ours).

What travels is what a decoder would cache: of a token the normalised latent and the rotated key
that all heads share, 576 numbers where keys and values are 40,960. Every device gathers them and
makes keys and values of one piece of the row at a time; those of 128K tokens would be 10 GB.
By the order of `ops.zigzag` each device meets exactly 2C + 1 pairs of pieces: its two with
themselves, which is causal attention, and 2C - 1 with an earlier piece, which is seen as a whole.
A fused kernel computes a pair where there is one (`kernels.attention`), and the results of a piece
of queries are joined by their log-sum-exps. The backward pass makes keys and values again.

There is no ring of permutes: in a pipeline only some ranks run a layer at a time, and all devices
of a mesh would have to meet for one.
Dims: B batch, t positions of a device, P of a piece, C of a chunk, N chunks of a piece, J pieces of
the row, H heads, K key dim, V value dim, L latent, Y = L + rotary key; 2 halves of a device, the
early and the late.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from v3jax.config import Fp8Config
from v3jax.ops import blocks, zigzag
from v3jax.ops.attention import kept_output, restored_output
from v3jax.ops.fp8 import linear
from v3jax.ops.fp8.quantize import Packed
from v3jax.ops.precision import wide
from v3jax.sharding import reduce_scatter


@dataclass(frozen=True)
class Form:
    """What is fixed of an attention."""

    scale: float
    nope: int
    """Part of a key without position, which comes first of a head's columns in `kv_b`."""
    fp8: Fp8Config | None
    """How keys and values are multiplied in FP8; the output is then kept in E5M6."""
    deterministic: bool
    """As `MeshConfig.deterministic`, of the latents' gradients."""

    @property
    def how(self) -> linear.Recipe | None:
        """How the output is kept for the backward pass."""
        return None if self.fp8 is None else linear.recipe(self.fp8, exact=True)


def shared_attention(
    form: Form,
    q_BtHK: jax.Array,
    latent_BtY: jax.Array,
    kv_b_LO: jax.Array,
    segments_BT: jax.Array | None,
) -> tuple[jax.Array, Packed | None]:
    """`ops.attention.causal_attention` of a device's own positions, `[B, t, H, V]`, and in FP8 runs
    the output as `packed_attention` has it.

    Args:
      latent_BtY: of the device's own positions, normalised and rotated.
      kv_b_LO: makes each head's key and value of a latent, as `MLA` has it.
      segments_BT: of the whole row.
    """
    with jax.named_scope("attention"):
        return _attention(form, q_BtHK, latent_BtY, kv_b_LO, segments_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    form: Form,
    q_BtHK: jax.Array,
    latent_BtY: jax.Array,
    kv_b_LO: jax.Array,
    segments_BT: jax.Array | None,
) -> tuple[jax.Array, Packed | None]:
    return _attention_fwd(form, q_BtHK, latent_BtY, kv_b_LO, segments_BT)[0]


# ---- Pieces of the row


def _gathered(latent_BtY: jax.Array) -> jax.Array:
    """All devices' latents by piece, `[J, B, P, Y]`, in the order of `_place`."""
    batch, length, width = latent_BtY.shape
    halves = latent_BtY.reshape(batch, 2, length // 2, width).swapaxes(0, 1)
    return lax.all_gather(halves, zigzag.AXIS, tiled=True)


def _scattered(form: Form, dlatent_JBPY: jax.Array) -> jax.Array:
    """`_gathered`'s gradient: the sum over devices, of which each has its own positions."""
    axes = (zigzag.AXIS,)
    halves = reduce_scatter(dlatent_JBPY, 0, axes, form.deterministic).swapaxes(0, 1)
    return halves.reshape(halves.shape[0], -1, halves.shape[3])


def _place(piece: jax.Array) -> jax.Array:
    """Where a piece of the row lies among the gathered ones, which are by device."""
    n = zigzag.n_devices()
    return jnp.where(piece < n, 2 * piece, 2 * (2 * n - 1 - piece) + 1)


def _pair(s: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the pair number s of different pieces: the half and the piece of the queries, the piece of
    the keys."""
    mine = zigzag.pieces()
    late = s >= mine[0]
    half = late.astype(jnp.int32)
    return half, mine[half], jnp.where(late, s - mine[0], s)


def _n_earlier() -> int:
    return 2 * zigzag.n_devices() - 1


def _product(form: Form, x_BPL: jax.Array, w_LO: jax.Array) -> jax.Array:
    if form.fp8 is None:
        return x_BPL @ w_LO
    return linear.linear(x_BPL, w_LO, linear.recipe(form.fp8))


def _product_gradients(
    form: Form, x_BPL: jax.Array, w_LO: jax.Array, dy_BPO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of x, and of w as wide as sums are."""
    if form.fp8 is None:
        dx_BPL = jnp.einsum("bpo,lo->bpl", dy_BPO, w_LO)
        return dx_BPL, jnp.einsum("bpl,bpo->lo", x_BPL, dy_BPO, preferred_element_type=wide(x_BPL))
    _, pull = jax.vjp(functools.partial(_product, form), x_BPL, w_LO)
    return pull(dy_BPO)


def _keys_values(
    form: Form, latent_BPY: jax.Array, kv_b_LO: jax.Array, n_heads: int
) -> tuple[jax.Array, jax.Array]:
    """Keys `[B, P, H, K]` and values `[B, P, H, V]` of a piece."""
    x_BPL, rope_BPR = jnp.split(latent_BPY, [kv_b_LO.shape[0]], axis=-1)
    kv_BPO = _product(form, x_BPL, kv_b_LO)
    kv_BPHO = kv_BPO.reshape(*kv_BPO.shape[:2], n_heads, -1)
    rope_BPHR = jnp.broadcast_to(rope_BPR[:, :, None], (*kv_BPHO.shape[:3], rope_BPR.shape[-1]))
    return jnp.concatenate([kv_BPHO[..., : form.nope], rope_BPHR], -1), kv_BPHO[..., form.nope :]


def _latent_gradients(
    form: Form,
    latent_BPY: jax.Array,
    kv_b_LO: jax.Array,
    dk_BPHK: jax.Array,
    dv_BPHV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of a piece's latents and of `kv_b`, as wide as sums are."""
    dkv_BPHO = jnp.concatenate([dk_BPHK[..., : form.nope], dv_BPHV], axis=-1)
    dkv_BPO = dkv_BPHO.reshape(*dkv_BPHO.shape[:2], -1)
    x_BPL = latent_BPY[..., : kv_b_LO.shape[0]]
    dx_BPL, dkv_b_LO = _product_gradients(form, x_BPL, kv_b_LO, dkv_BPO)
    drope_BPR = jnp.sum(dk_BPHK[..., form.nope :], 2, dtype=wide(dk_BPHK))
    return jnp.concatenate([dx_BPL.astype(drope_BPR.dtype), drope_BPR], axis=-1), dkv_b_LO


# ---- The passes


def _halves(x_BtHK: jax.Array) -> jax.Array:
    """`[B, t, ...] -> [2, B, P, ...]`."""
    batch, length, *rest = x_BtHK.shape
    return x_BtHK.reshape(batch, 2, length // 2, *rest).swapaxes(0, 1)


def _joined(x_2BPHK: jax.Array) -> jax.Array:
    """`_halves`' mirror."""
    _, batch, length, *rest = x_2BPHK.shape
    return x_2BPHK.swapaxes(0, 1).reshape(batch, 2 * length, *rest)


def _segments(
    segments_BT: jax.Array | None, rows: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array] | None:
    """Those of two pieces."""
    if segments_BT is None:
        return None
    pieces_BJP = segments_BT.reshape(len(segments_BT), 2 * zigzag.n_devices(), -1)
    return pieces_BJP[:, rows], pieces_BJP[:, keys]


def _attention_fwd(
    form: Form,
    q_BtHK: jax.Array,
    latent_BtY: jax.Array,
    kv_b_LO: jax.Array,
    segments_BT: jax.Array | None,
) -> tuple[tuple[jax.Array, Packed | None], Any]:
    out_BtHV, lse_2BHP = _forward(form, q_BtHK, latent_BtY, kv_b_LO, segments_BT)
    kept = kept_output(out_BtHV, form.how)
    lse_2BHP = checkpoint_name(lse_2BHP, "attention_lse")
    out = (kept, None) if form.how is None else (out_BtHV, kept)
    return out, (q_BtHK, latent_BtY, kv_b_LO, segments_BT, kept, lse_2BHP)


def _forward(
    form: Form,
    q_BtHK: jax.Array,
    latent_BtY: jax.Array,
    kv_b_LO: jax.Array,
    segments_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The output and the log-sum-exp of the scores `[2, B, H, P]`."""
    n_heads, kind = q_BtHK.shape[2], wide(q_BtHK)
    q_2BPHK, own_2BPY = _halves(q_BtHK), _halves(latent_BtY)
    latent_JBPY, mine = _gathered(latent_BtY), zigzag.pieces()

    def itself(half: jax.Array) -> tuple[jax.Array, jax.Array]:
        k, v = _keys_values(form, own_2BPY[half], kv_b_LO, n_heads)
        segments = _segments(segments_BT, mine[half], mine[half])
        out, lse = blocks.attend(q_2BPHK[half], k, v, segments, form.scale, causal=True)
        return out.astype(kind), lse

    def earlier(s: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        half, rows, keys = _pair(s)
        k, v = _keys_values(form, latent_JBPY[_place(keys)], kv_b_LO, n_heads)
        segments = _segments(segments_BT, rows, keys)
        found = blocks.attend(q_2BPHK[half], k, v, segments, form.scale, causal=False)
        out, lse = blocks.merged((state[0][half], state[1][half]), found)
        return state[0].at[half].set(out), state[1].at[half].set(lse)

    state = lax.map(itself, jnp.arange(2))
    out_2BPHV, lse_2BHP = lax.fori_loop(0, _n_earlier(), earlier, state)
    return _joined(out_2BPHV.astype(q_BtHK.dtype)), lse_2BHP


def _attention_bwd(
    form: Form, residuals: Any, cotangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BtHK, latent_BtY, kv_b_LO, segments_BT, kept, lse_2BHP = residuals
    dout_BtHV = cotangents[0]
    out_2BPHV = _halves(restored_output(kept, dout_BtHV, form.how))
    n_heads, kind = q_BtHK.shape[2], wide(q_BtHK)
    q_2BPHK, dout_2BPHV = _halves(q_BtHK), _halves(dout_BtHV)
    latent_JBPY, mine = _gathered(latent_BtY), zigzag.pieces()

    def pair(half: jax.Array, rows: jax.Array, keys: jax.Array, sums: Any, *, causal: bool) -> Any:
        dq_2BPHK, dlatent_JBPY, dkv_b_LO = sums
        place = _place(keys)
        latent_BPY = latent_JBPY[place]
        k, v = _keys_values(form, latent_BPY, kv_b_LO, n_heads)
        segments = _segments(segments_BT, rows, keys)
        done = (out_2BPHV[half], lse_2BHP[half])
        dq, dk, dv = blocks.gradients(
            q_2BPHK[half], k, v, segments, done, dout_2BPHV[half], form.scale, causal=causal
        )
        dlatent, dkv_b = _latent_gradients(form, latent_BPY, kv_b_LO, dk, dv)
        dq_2BPHK = dq_2BPHK.at[half].add(dq.astype(kind))
        return dq_2BPHK, dlatent_JBPY.at[place].add(dlatent), dkv_b_LO + dkv_b

    def itself(half: jax.Array, sums: Any) -> Any:
        return pair(half, mine[half], mine[half], sums, causal=True)

    def earlier(s: jax.Array, sums: Any) -> Any:
        return pair(*_pair(s), sums, causal=False)

    sums = tuple(jnp.zeros(x.shape, kind) for x in (q_2BPHK, latent_JBPY, kv_b_LO))
    sums = lax.fori_loop(0, 2, itself, sums)
    dq_2BPHK, dlatent_JBPY, dkv_b_LO = lax.fori_loop(0, _n_earlier(), earlier, sums)
    dlatent_BtY = _scattered(form, dlatent_JBPY).astype(latent_BtY.dtype)
    dq_BtHK = _joined(dq_2BPHK.astype(q_BtHK.dtype))
    return dq_BtHK, dlatent_BtY, dkv_b_LO.astype(kv_b_LO.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)
