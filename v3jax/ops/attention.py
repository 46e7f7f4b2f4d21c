"""Causal attention with distinct key and value widths (report section 2.1.1).

On TPU and on Hopper GPUs a fused kernel computes it (`kernels.attention`), elsewhere and for what
the kernels do not take, this file, in query chunks: only the scores of one chunk of queries against
the keys before its end exist at a time, and of long sequences only those of a chunk against a
chunk. The backward pass recomputes them from the saved log-sum-exp, as fused kernels do.
Dims: B batch, T time, C queries of a chunk, S keys before its end, H heads, K key dim, V value dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from v3jax import kernels
from v3jax.kernels import attention as fused
from v3jax.ops.fp8.linear import Recipe, named
from v3jax.ops.fp8.quantize import Packed, pack_e5m6, unpack_e5m6
from v3jax.ops.precision import wide, widen

_MIN_CHUNK = 128
_MAX_CHUNKS = 8
_LONG = 4096
"""Beyond this length chunks meet chunks in a loop."""
_LONG_CHUNK = 512


class Tree(NamedTuple):
    """Rows of token trees, depth first: each token comes after its parent, its subtree next."""

    positions_BT: jax.Array
    """A token's depth, which is its position."""
    ends_BT: jax.Array
    """The place after its subtree, up to which it is seen."""


def causal_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    *,
    scale: float,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """`softmax(scale q k^T) v` over earlier positions, softmax in FP32: `[B, T, H, V]`.

    With `segments_BT` a position sees its own segment only (supervised fine-tuning, report
    section 5.1); pre-training passes None (section 4.1).
    """
    with jax.named_scope("attention"):
        return _attend(q_BTHK, k_BTHK, v_BTHV, segments_BT, scale, None)[0]


def packed_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    *,
    scale: float,
    segments_BT: jax.Array | None = None,
    how: Recipe,
) -> tuple[jax.Array, Packed]:
    """The same, and the output in E5M6, `[B, T, H V]`, for the projection that takes it.

    This is also what the backward pass knows of it (report section 3.3.3), but where a fused kernel
    computes it and keeps its output as it is.
    """
    with jax.named_scope("attention"):
        out_BTHV, packed = _attend(q_BTHK, k_BTHK, v_BTHV, segments_BT, scale, how)
        return out_BTHV, packed_heads(out_BTHV, how) if packed is None else packed


def _attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    segments_BT: jax.Array | None,
    scale: float,
    how: Recipe | None,
) -> tuple[jax.Array, Packed | None]:
    platform = kernels.platform()
    if platform == "tpu" and fused.fits_tpu(q_BTHK):
        return fused.on_tpu(q_BTHK, k_BTHK, v_BTHV, segments_BT, scale), None
    if platform == "gpu" and fused.fits_gpu(q_BTHK, v_BTHV, segments_BT):
        return fused.on_gpu(q_BTHK, k_BTHK, v_BTHV, scale), None
    if q_BTHK.shape[1] <= _LONG:
        return _attention(q_BTHK, k_BTHK, v_BTHV, segments_BT, scale, how)
    return _padded(q_BTHK, k_BTHK, v_BTHV, segments_BT, scale, how)


def packed_heads(out_BTHV: jax.Array, how: Recipe) -> Packed:
    """The heads' outputs side by side, in E5M6."""
    flat = out_BTHV.reshape(*out_BTHV.shape[:-2], -1)
    return pack_e5m6(flat, how.cfg.tile, power_of_two=how.power_of_two)


def kept_output(out_BTHV: jax.Array, how: Recipe | None) -> Any:
    """What waits of the output for the backward pass, under the name of the recompute policy."""
    return named(out_BTHV if how is None else packed_heads(out_BTHV, how), "attention_out")


def restored_output(kept: Any, dout_BTHV: jax.Array, how: Recipe | None) -> jax.Array:
    """The output as the backward pass knows it, of its gradient's shape and type."""
    if how is None:
        return kept
    return unpack_e5m6(kept, how.cfg.tile, dout_BTHV.dtype).reshape(dout_BTHV.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    segments_BT: jax.Array | None,
    scale: float,
    how: Recipe | None,
) -> tuple[jax.Array, Packed | None]:
    return _attention_fwd(q_BTHK, k_BTHK, v_BTHV, segments_BT, scale, how)[0]


def tree_attention(
    q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHV: jax.Array, ends_BT: jax.Array, *, scale: float
) -> jax.Array:
    """As `causal_attention`, but a token sees itself and its ancestors in a `Tree` alone."""
    with jax.named_scope("attention"):
        # Heads first spares CPUs a transposition of the scores.
        q_BHTK, k_BHTK, v_BHTV = (x.swapaxes(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV))
        outs = []
        for chunk in _chunks(q_BTHK.shape[1]):
            keys = slice(0, chunk.stop)
            s_BHCS = jnp.einsum(
                "bhck,bhsk->bhcs",
                q_BHTK[:, :, chunk],
                k_BHTK[:, :, keys],
                preferred_element_type=wide(q_BHTK),
            )
            rows_C1 = jnp.arange(chunk.start, chunk.stop)[:, None]
            seen_BCS = (jnp.arange(chunk.stop) <= rows_C1) & (rows_C1 < ends_BT[:, None, keys])
            s_BHCS = jnp.where(seen_BCS[:, None], s_BHCS * scale, -jnp.inf)
            p_BHCS = jnp.exp(s_BHCS - s_BHCS.max(-1, keepdims=True))
            out_BHCV = jnp.einsum(
                "bhcs,bhsv->bhcv",
                p_BHCS.astype(v_BHTV.dtype),
                v_BHTV[:, :, keys],
                preferred_element_type=wide(v_BHTV),
            )
            outs.append(out_BHCV / p_BHCS.sum(-1, keepdims=True))
        return jnp.concatenate(outs, axis=2).swapaxes(1, 2).astype(v_BTHV.dtype)


def _chunks(length: int) -> list[slice]:
    size = max(_MIN_CHUNK, -(-length // _MAX_CHUNKS))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(
    q_BCHK: jax.Array, k_BSHK: jax.Array, segments_BT: jax.Array | None, chunk: slice, scale: float
) -> jax.Array:
    s_BHCS = (
        jnp.einsum("bchk,bshk->bhcs", q_BCHK, k_BSHK, preferred_element_type=wide(q_BCHK)) * scale
    )
    rows_C, columns_S = jnp.arange(chunk.start, chunk.stop), jnp.arange(chunk.stop)
    visible = rows_C[:, None] >= columns_S[None, :]
    if segments_BT is not None:
        same_BCS = segments_BT[:, chunk, None] == segments_BT[:, None, : chunk.stop]
        visible = (visible & same_BCS)[:, None]
    return jnp.where(visible, s_BHCS, -jnp.inf)


def _forward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    segments_BT: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The output and the log-sum-exp of the scores `[B, H, T]`."""
    outs, lses = [], []
    for chunk in _chunks(q_BTHK.shape[1]):
        s_BHCS = _scores(q_BTHK[:, chunk], k_BTHK[:, : chunk.stop], segments_BT, chunk, scale)
        lse_BHC = jax.nn.logsumexp(s_BHCS, axis=-1)
        p_BHCS = jnp.exp(s_BHCS - lse_BHC[..., None]).astype(v_BTHV.dtype)
        outs.append(jnp.einsum("bhcs,bshv->bchv", p_BHCS, v_BTHV[:, : chunk.stop]))
        lses.append(lse_BHC)
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=-1)


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, Any, jax.Array]


def _attention_fwd(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    segments_BT: jax.Array | None,
    scale: float,
    how: Recipe | None,
) -> tuple[tuple[jax.Array, Packed | None], _Residuals]:
    out_BTHV, lse_BHT = _forward(q_BTHK, k_BTHK, v_BTHV, segments_BT, scale)
    kept = kept_output(out_BTHV, how)
    lse_BHT = checkpoint_name(lse_BHT, "attention_lse")
    out = (kept, None) if how is None else (out_BTHV, kept)
    return out, (q_BTHK, k_BTHK, v_BTHV, segments_BT, kept, lse_BHT)


def _attention_bwd(
    scale: float, how: Recipe | None, residuals: _Residuals, cotangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTHK, k_BTHK, v_BTHV, segments_BT, kept, lse_BHT = residuals
    dout_BTHV = cotangents[0]
    out_BTHV = restored_output(kept, dout_BTHV, how)
    delta_BTH = jnp.sum(widen(dout_BTHV) * widen(out_BTHV), axis=-1)
    dqs: list[jax.Array] = []
    dk_BTHK, dv_BTHV = (jnp.zeros(x.shape, wide(x)) for x in (k_BTHK, v_BTHV))
    for chunk in _chunks(q_BTHK.shape[1]):
        q_BCHK, k_BSHK, v_BSHV = q_BTHK[:, chunk], k_BTHK[:, : chunk.stop], v_BTHV[:, : chunk.stop]
        dout_BCHV = dout_BTHV[:, chunk]
        s_BHCS = _scores(q_BCHK, k_BSHK, segments_BT, chunk, scale)
        p_BHCS = jnp.exp(s_BHCS - lse_BHT[:, :, chunk, None])
        dp_BHCS = jnp.einsum(
            "bchv,bshv->bhcs", dout_BCHV, v_BSHV, preferred_element_type=wide(q_BTHK)
        )
        delta_BHC = delta_BTH[:, chunk].swapaxes(1, 2)
        ds_BHCS = (p_BHCS * (dp_BHCS - delta_BHC[..., None]) * scale).astype(q_BTHK.dtype)
        p_BHCS = p_BHCS.astype(v_BTHV.dtype)
        dqs.append(jnp.einsum("bhcs,bshk->bchk", ds_BHCS, k_BSHK))
        dk = jnp.einsum("bhcs,bchk->bshk", ds_BHCS, q_BCHK, preferred_element_type=wide(q_BTHK))
        dv = jnp.einsum("bhcs,bchv->bshv", p_BHCS, dout_BCHV, preferred_element_type=wide(q_BTHK))
        dk_BTHK = dk_BTHK.at[:, : chunk.stop].add(dk)
        dv_BTHV = dv_BTHV.at[:, : chunk.stop].add(dv)
    dq_BTHK = jnp.concatenate(dqs, axis=1)
    return dq_BTHK, dk_BTHK.astype(k_BTHK.dtype), dv_BTHV.astype(v_BTHV.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)


# ---- Long sequences: chunks of queries against chunks of keys, in loops.
# Dims as above, with N chunks of C positions in place of T; `i` counts chunks of queries, `j` of
# keys.


def _padded(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    segments_BT: jax.Array | None,
    scale: float,
    how: Recipe | None,
) -> tuple[jax.Array, Packed | None]:
    """Fills the last chunk with positions that no earlier one sees."""
    length = q_BTHK.shape[1]
    extra = -length % _LONG_CHUNK

    def chunked(x_BT: jax.Array) -> jax.Array:
        x_BT = jnp.pad(x_BT, [(0, 0), (0, extra), *[(0, 0)] * (x_BT.ndim - 2)])
        return x_BT.reshape(x_BT.shape[0], -1, _LONG_CHUNK, *x_BT.shape[2:]).swapaxes(0, 1)

    segments_NBC = None if segments_BT is None else chunked(segments_BT)
    q_NBCHK, k_NBCHK, v_NBCHV = (chunked(x) for x in (q_BTHK, k_BTHK, v_BTHV))
    out = _long(q_NBCHK, k_NBCHK, v_NBCHV, segments_NBC, scale, how)

    def whole(x_NBC: jax.Array) -> jax.Array:
        return x_NBC.swapaxes(0, 1).reshape(x_NBC.shape[1], -1, *x_NBC.shape[3:])[:, :length]

    return jax.tree.map(whole, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _long(
    q_NBCHK: jax.Array,
    k_NBCHK: jax.Array,
    v_NBCHV: jax.Array,
    segments_NBC: jax.Array | None,
    scale: float,
    how: Recipe | None,
) -> tuple[jax.Array, Packed | None]:
    return _long_fwd(q_NBCHK, k_NBCHK, v_NBCHV, segments_NBC, scale, how)[0]


def _block_scores(
    q_BCHK: jax.Array,
    k_BCHK: jax.Array,
    segments_NBC: jax.Array | None,
    i: jax.Array,
    j: jax.Array,
    scale: float,
) -> jax.Array:
    s_BHCC = jnp.einsum("bchk,bshk->bhcs", q_BCHK, k_BCHK, preferred_element_type=wide(q_BCHK))
    position_C = jnp.arange(q_BCHK.shape[1])
    visible = (i * position_C.size + position_C)[:, None] >= j * position_C.size + position_C
    if segments_NBC is not None:
        same_BCC = segments_NBC[i][:, :, None] == segments_NBC[j][:, None, :]
        visible = (visible & same_BCC)[:, None]
    return jnp.where(visible, s_BHCC * scale, -jnp.inf)


def _long_fwd(
    q_NBCHK: jax.Array,
    k_NBCHK: jax.Array,
    v_NBCHV: jax.Array,
    segments_NBC: jax.Array | None,
    scale: float,
    how: Recipe | None,
) -> tuple[tuple[jax.Array, Packed | None], _Residuals]:
    def one_chunk(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_BCHK = q_NBCHK[i]

        def add(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top_BHC, sum_BHC, out_BHCV = carry
            s_BHCC = _block_scores(q_BCHK, k_NBCHK[j], segments_NBC, i, j, scale)
            new_BHC = jnp.maximum(top_BHC, s_BHCC.max(-1))
            # Nothing visible yet: any finite number serves, as exp(-inf) is 0.
            safe_BHC = jnp.where(jnp.isfinite(new_BHC), new_BHC, 0)
            shrink_BHC = jnp.exp(top_BHC - safe_BHC)
            p_BHCC = jnp.exp(s_BHCC - safe_BHC[..., None])
            v_BCHV = v_NBCHV[j]
            out = jnp.einsum(
                "bhcs,bshv->bhcv",
                p_BHCC.astype(v_BCHV.dtype),
                v_BCHV,
                preferred_element_type=wide(v_BCHV),
            )
            return (
                new_BHC,
                sum_BHC * shrink_BHC + p_BHCC.sum(-1),
                out_BHCV * shrink_BHC[..., None] + out,
            )

        batch, size, n_heads, _ = q_BCHK.shape
        rows = (batch, n_heads, size)
        kind = wide(q_BCHK)
        start = (jnp.full(rows, -jnp.inf, kind), jnp.zeros(rows, kind))
        start = (*start, jnp.zeros((*rows, v_NBCHV.shape[-1]), kind))
        top_BHC, sum_BHC, out_BHCV = jax.lax.fori_loop(0, i + 1, add, start)
        out_BCHV = (out_BHCV / sum_BHC[..., None]).swapaxes(1, 2).astype(v_NBCHV.dtype)
        return out_BCHV, top_BHC + jnp.log(sum_BHC)

    out_NBCHV, lse_NBHC = jax.lax.map(one_chunk, jnp.arange(q_NBCHK.shape[0]))
    kept = kept_output(out_NBCHV, how)
    lse_NBHC = checkpoint_name(lse_NBHC, "attention_lse")
    out = (kept, None) if how is None else (out_NBCHV, kept)
    return out, (q_NBCHK, k_NBCHK, v_NBCHV, segments_NBC, kept, lse_NBHC)


def _long_bwd(
    scale: float, how: Recipe | None, residuals: _Residuals, cotangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_NBCHK, k_NBCHK, v_NBCHV, segments_NBC, kept, lse_NBHC = residuals
    dout_NBCHV = cotangents[0]
    out_NBCHV = restored_output(kept, dout_NBCHV, how)
    kind = wide(q_NBCHK)
    delta_NBHC = jnp.einsum("nbchv,nbchv->nbhc", widen(dout_NBCHV), widen(out_NBCHV))

    def one_chunk(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dq_NBCHK, dk_NBCHK, dv_NBCHV = carry
        q_BCHK, dout_BCHV = q_NBCHK[i], dout_NBCHV[i]

        def add(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq_BCHK, dk_NBCHK, dv_NBCHV = carry
            k_BCHK, v_BCHV = k_NBCHK[j], v_NBCHV[j]
            s_BHCC = _block_scores(q_BCHK, k_BCHK, segments_NBC, i, j, scale)
            p_BHCC = jnp.exp(s_BHCC - lse_NBHC[i][..., None])
            dp_BHCC = jnp.einsum("bchv,bshv->bhcs", dout_BCHV, v_BCHV, preferred_element_type=kind)
            ds_BHCC = p_BHCC * (dp_BHCC - delta_NBHC[i][..., None]) * scale
            ds_BHCC, p_BHCC = ds_BHCC.astype(q_BCHK.dtype), p_BHCC.astype(v_BCHV.dtype)
            dq = jnp.einsum("bhcs,bshk->bchk", ds_BHCC, k_BCHK, preferred_element_type=kind)
            dk = jnp.einsum("bhcs,bchk->bshk", ds_BHCC, q_BCHK, preferred_element_type=kind)
            dv = jnp.einsum("bhcs,bchv->bshv", p_BHCC, dout_BCHV, preferred_element_type=kind)
            return dq_BCHK + dq, dk_NBCHK.at[j].add(dk), dv_NBCHV.at[j].add(dv)

        start = (jnp.zeros(q_BCHK.shape, kind), dk_NBCHK, dv_NBCHV)
        dq_BCHK, dk_NBCHK, dv_NBCHV = jax.lax.fori_loop(0, i + 1, add, start)
        return dq_NBCHK.at[i].set(dq_BCHK.astype(q_BCHK.dtype)), dk_NBCHK, dv_NBCHV

    start = (
        jnp.zeros_like(q_NBCHK),
        jnp.zeros(k_NBCHK.shape, kind),
        jnp.zeros(v_NBCHV.shape, kind),
    )
    dq, dk, dv = jax.lax.fori_loop(0, q_NBCHK.shape[0], one_chunk, start)
    return dq, dk.astype(k_NBCHK.dtype), dv.astype(v_NBCHV.dtype), None


_long.defvjp(_long_fwd, _long_bwd)
