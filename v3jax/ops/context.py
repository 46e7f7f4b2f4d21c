"""Causal attention over rows that several devices share (report section 4.3; the split is ours).

What travels is what a decoder would cache: of a token the normalised latent and the rotated key
that all heads share, 576 numbers where keys and values are 40,960. Every device gathers them and
makes keys and values of one piece of the row at a time; those of 128K tokens would be 10 GB.
By the order of `ops.zigzag` each device meets exactly 2C + 1 pairs of pieces, one after the other
in a loop, and in each pair chunks of queries meet chunks of keys. The backward pass makes keys,
values and scores again, from the latents and the saved log-sum-exp.

There is no ring of permutes: in a pipeline only some ranks run a layer at a time, and all devices
of a mesh would have to meet for one.
Dims: B batch, t positions of a device, P of a piece, C of a chunk, N chunks of a device (half of
them its early piece's), M of a piece, J pieces of the row, H heads, K key dim, R of it rotated,
V value dim, L latent, Y = L + R.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from v3jax.config import Fp8Config
from v3jax.ops import zigzag
from v3jax.ops.attention import kept_output, restored_output
from v3jax.ops.fp8 import linear
from v3jax.ops.fp8.quantize import Packed
from v3jax.ops.precision import wide, widen
from v3jax.sharding import reduce_scatter

_CHUNK = 512


@dataclass(frozen=True)
class Form:
    """What is fixed of an attention."""

    scale: float
    nope: int
    """Part of a key without position, which comes first of a head's columns in `kv_b`."""
    rot: int
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
    """Of the pair number s: which half of the device's queries, its piece, the keys' piece."""
    mine, early = zigzag.pieces(), zigzag.pieces()[0]
    late = s > early
    return (
        late.astype(jnp.int32),
        jnp.where(late, mine[1], early),
        jnp.where(late, s - early - 1, s),
    )


def _n_pairs() -> int:
    return 2 * zigzag.n_devices() + 1


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
    form: Form, latent_BPY: jax.Array, kv_b_LO: jax.Array, n_heads: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Keys `[M, B, H, C, K]` and values `[M, B, H, C, V]` of a piece, in chunks of `size`."""
    x_BPL, rope_BPR = jnp.split(latent_BPY, [kv_b_LO.shape[0]], axis=-1)
    kv_BPHO = _product(form, x_BPL, kv_b_LO)
    kv_BPHO = kv_BPHO.reshape(*kv_BPHO.shape[:2], n_heads, -1)
    rope_BPHR = jnp.broadcast_to(rope_BPR[:, :, None], (*kv_BPHO.shape[:3], form.rot))
    k_BPHK = jnp.concatenate([kv_BPHO[..., : form.nope], rope_BPHR], axis=-1)
    return _chunked(k_BPHK, size), _chunked(kv_BPHO[..., form.nope :], size)


def _latent_gradients(
    form: Form,
    latent_BPY: jax.Array,
    kv_b_LO: jax.Array,
    dk_MBHCK: jax.Array,
    dv_MBHCV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of a piece's latents and of `kv_b`, as wide as sums are."""
    dk_BPHK, dv_BPHV = _joined(dk_MBHCK), _joined(dv_MBHCV)
    dkv_BPHO = jnp.concatenate([dk_BPHK[..., : form.nope], dv_BPHV], axis=-1)
    dkv_BPO = dkv_BPHO.reshape(*dkv_BPHO.shape[:2], -1).astype(latent_BPY.dtype)
    x_BPL = latent_BPY[..., : kv_b_LO.shape[0]]
    dx_BPL, dkv_b_LO = _product_gradients(form, x_BPL, kv_b_LO, dkv_BPO)
    drope_BPR = dk_BPHK[..., form.nope :].sum(2)
    return jnp.concatenate([dx_BPL.astype(drope_BPR.dtype), drope_BPR], axis=-1), dkv_b_LO


# ---- Chunks of a piece


def _chunk(piece: int) -> int:
    """The largest part of a piece that divides it, up to `_CHUNK`."""
    return next(size for size in range(min(piece, _CHUNK), 0, -1) if piece % size == 0)


def _chunked(x_BTHK: jax.Array, size: int) -> jax.Array:
    """`[B, T, H, K] -> [T / C, B, H, C, K]`."""
    batch, _, n_heads, dim = x_BTHK.shape
    return x_BTHK.reshape(batch, -1, size, n_heads, dim).transpose(1, 0, 3, 2, 4)


def _joined(x_NBHCK: jax.Array) -> jax.Array:
    """`_chunked`'s mirror."""
    n, batch, n_heads, size, dim = x_NBHCK.shape
    return x_NBHCK.transpose(1, 0, 3, 2, 4).reshape(batch, n * size, n_heads, dim)


def _scores(
    form: Form,
    q_BHCK: jax.Array,
    k_BHCK: jax.Array,
    segments_BT: jax.Array | None,
    i: jax.Array,
    j: jax.Array,
) -> jax.Array:
    """Of chunk i of the row's queries and chunk j of its keys, -inf where they do not see."""
    s_BHCC = jnp.einsum("bhck,bhsk->bhcs", q_BHCK, k_BHCK, preferred_element_type=wide(q_BHCK))
    size = q_BHCK.shape[2]
    at_C = jnp.arange(size)
    visible = (i * size + at_C)[:, None] >= j * size + at_C
    if segments_BT is not None:
        rows_BC, keys_BC = (
            lax.dynamic_slice_in_dim(segments_BT, n * size, size, axis=1) for n in (i, j)
        )
        visible = (visible & (rows_BC[:, :, None] == keys_BC[:, None, :]))[:, None]
    return jnp.where(visible, s_BHCC * form.scale, -jnp.inf)


# ---- The passes


def _attention_fwd(
    form: Form,
    q_BtHK: jax.Array,
    latent_BtY: jax.Array,
    kv_b_LO: jax.Array,
    segments_BT: jax.Array | None,
) -> tuple[tuple[jax.Array, Packed | None], Any]:
    out_BtHV, lse_NBHC = _forward(form, q_BtHK, latent_BtY, kv_b_LO, segments_BT)
    kept = kept_output(out_BtHV, form.how)
    lse_NBHC = checkpoint_name(lse_NBHC, "attention_lse")
    out = (kept, None) if form.how is None else (out_BtHV, kept)
    return out, (q_BtHK, latent_BtY, kv_b_LO, segments_BT, kept, lse_NBHC)


def _forward(
    form: Form,
    q_BtHK: jax.Array,
    latent_BtY: jax.Array,
    kv_b_LO: jax.Array,
    segments_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The output and the log-sum-exp of the scores `[N, B, H, C]`."""
    batch, length, n_heads, _ = q_BtHK.shape
    size = _chunk(length // 2)
    n, kind = length // 2 // size, wide(q_BtHK)
    latent_JBPY, q_NBHCK = _gathered(latent_BtY), _chunked(q_BtHK, size)
    value = kv_b_LO.shape[1] // n_heads - form.nope

    def pair(s: jax.Array, state: Any) -> Any:
        half, rows, keys = _pair(s)
        k_MBHCK, v_MBHCV = _keys_values(form, latent_JBPY[_place(keys)], kv_b_LO, n_heads, size)

        def chunk(a: jax.Array, state: Any) -> Any:
            at = half * n + a
            q_BHCK = q_NBHCK[at]

            def add(b: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                top_BHC, sum_BHC, out_BHCV = carry
                s_BHCC = _scores(form, q_BHCK, k_MBHCK[b], segments_BT, rows * n + a, keys * n + b)
                new_BHC = jnp.maximum(top_BHC, s_BHCC.max(-1))
                # Nothing visible yet: any finite number serves, as exp(-inf) is 0.
                safe_BHC = jnp.where(jnp.isfinite(new_BHC), new_BHC, 0)
                shrink_BHC = jnp.exp(top_BHC - safe_BHC)
                p_BHCC = jnp.exp(s_BHCC - safe_BHC[..., None])
                v_BHCV = v_MBHCV[b]
                out = jnp.einsum(
                    "bhcs,bhsv->bhcv",
                    p_BHCC.astype(v_BHCV.dtype),
                    v_BHCV,
                    preferred_element_type=kind,
                )
                return (
                    new_BHC,
                    sum_BHC * shrink_BHC + p_BHCC.sum(-1),
                    out_BHCV * shrink_BHC[..., None] + out,
                )

            carry = lax.fori_loop(0, n, add, tuple(x[at] for x in state))
            return tuple(x.at[at].set(y) for x, y in zip(state, carry, strict=True))

        return lax.fori_loop(0, n, chunk, state)

    rows = (2 * n, batch, n_heads, size)
    start = (jnp.full(rows, -jnp.inf, kind), jnp.zeros(rows, kind), jnp.zeros((*rows, value), kind))
    top_NBHC, sum_NBHC, out_NBHCV = lax.fori_loop(0, _n_pairs(), pair, start)
    out_NBHCV = (out_NBHCV / sum_NBHC[..., None]).astype(q_BtHK.dtype)
    return _joined(out_NBHCV), top_NBHC + jnp.log(sum_NBHC)


def _attention_bwd(
    form: Form, residuals: Any, cotangents: tuple[jax.Array, Any]
) -> tuple[Any, ...]:
    q_BtHK, latent_BtY, kv_b_LO, segments_BT, kept, lse_NBHC = residuals
    dout_BtHV = cotangents[0]
    out_BtHV = restored_output(kept, dout_BtHV, form.how)
    _, length, n_heads, _ = q_BtHK.shape
    size = _chunk(length // 2)
    n, kind = length // 2 // size, wide(q_BtHK)
    delta_BtH1 = jnp.sum(widen(dout_BtHV) * widen(out_BtHV), axis=-1, keepdims=True)
    delta_NBHC = _chunked(delta_BtH1, size)[..., 0]
    latent_JBPY = _gathered(latent_BtY)
    q_NBHCK, dout_NBHCV = _chunked(q_BtHK, size), _chunked(dout_BtHV, size)

    def pair(s: jax.Array, carry: Any) -> Any:
        dq_NBHCK, dlatent_JBPY, dkv_b_LO = carry
        half, rows, keys = _pair(s)
        latent_BPY = latent_JBPY[_place(keys)]
        k_MBHCK, v_MBHCV = _keys_values(form, latent_BPY, kv_b_LO, n_heads, size)

        def chunk(a: jax.Array, carry: Any) -> Any:
            dq_NBHCK, dk_MBHCK, dv_MBHCV = carry
            at = half * n + a
            q_BHCK, dout_BHCV = q_NBHCK[at], dout_NBHCV[at]

            def add(b: jax.Array, carry: Any) -> Any:
                dq_BHCK, dk_MBHCK, dv_MBHCV = carry
                k_BHCK, v_BHCV = k_MBHCK[b], v_MBHCV[b]
                s_BHCC = _scores(form, q_BHCK, k_BHCK, segments_BT, rows * n + a, keys * n + b)
                p_BHCC = jnp.exp(s_BHCC - lse_NBHC[at][..., None])
                dp_BHCC = jnp.einsum(
                    "bhcv,bhsv->bhcs", dout_BHCV, v_BHCV, preferred_element_type=kind
                )
                ds_BHCC = p_BHCC * (dp_BHCC - delta_NBHC[at][..., None]) * form.scale
                ds_BHCC, p_BHCC = ds_BHCC.astype(q_BHCK.dtype), p_BHCC.astype(v_BHCV.dtype)
                dq = jnp.einsum("bhcs,bhsk->bhck", ds_BHCC, k_BHCK, preferred_element_type=kind)
                dk = jnp.einsum("bhcs,bhck->bhsk", ds_BHCC, q_BHCK, preferred_element_type=kind)
                dv = jnp.einsum("bhcs,bhcv->bhsv", p_BHCC, dout_BHCV, preferred_element_type=kind)
                return dq_BHCK + dq, dk_MBHCK.at[b].add(dk), dv_MBHCV.at[b].add(dv)

            start = (dq_NBHCK[at], dk_MBHCK, dv_MBHCV)
            dq_BHCK, dk_MBHCK, dv_MBHCV = lax.fori_loop(0, n, add, start)
            return dq_NBHCK.at[at].set(dq_BHCK), dk_MBHCK, dv_MBHCV

        zeros = (jnp.zeros(x.shape, kind) for x in (k_MBHCK, v_MBHCV))
        dq_NBHCK, dk, dv = lax.fori_loop(0, n, chunk, (dq_NBHCK, *zeros))
        dlatent, dkv_b = _latent_gradients(form, latent_BPY, kv_b_LO, dk, dv)
        return dq_NBHCK, dlatent_JBPY.at[_place(keys)].add(dlatent), dkv_b_LO + dkv_b

    start = tuple(jnp.zeros(x.shape, kind) for x in (q_NBHCK, latent_JBPY, kv_b_LO))
    dq_NBHCK, dlatent_JBPY, dkv_b_LO = lax.fori_loop(0, _n_pairs(), pair, start)
    dlatent_BtY = _scattered(form, dlatent_JBPY).astype(latent_BtY.dtype)
    dq_BtHK = _joined(dq_NBHCK.astype(q_BtHK.dtype))
    return dq_BtHK, dlatent_BtY, dkv_b_LO.astype(kv_b_LO.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)
