"""Attention of a block of queries to a block of keys, to be joined with that to other blocks.

Of each query the output is that of a softmax over this block's keys alone, and the log-sum-exp of
its scores says how much of the whole that is. Gradients start from the output and the log-sum-exp
over all blocks. On TPU and on Hopper GPUs a fused kernel computes both, elsewhere this file, where
only the scores of a chunk of queries against a chunk of keys exist at a time.
Dims: B batch, P positions of a block, C of a chunk, N chunks, H heads, K key dim, V value dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from v3jax import kernels
from v3jax.kernels import attention as fused
from v3jax.kernels.attention import Attended, Segments
from v3jax.ops.precision import wide, widen

_CHUNK = 512


def attend(
    q_BPHK: jax.Array,
    k_BPHK: jax.Array,
    v_BPHV: jax.Array,
    segments: Segments,
    scale: float,
    *,
    causal: bool,
) -> Attended:
    """The output, as wide as sums are where no kernel says otherwise, and the log-sum-exp.

    `causal`: both are the same positions, of which later ones are not seen; else all are.
    """
    arrays = (q_BPHK, k_BPHK, v_BPHV)
    platform, ids = kernels.platform(), None if segments is None else segments[0]
    with jax.named_scope(_scope(causal)):
        if platform == "tpu" and fused.fits_tpu(q_BPHK):
            return fused.block_on_tpu(*arrays, segments, scale, causal=causal)
        if platform == "gpu" and fused.fits_gpu(q_BPHK, v_BPHV, ids):
            return fused.block_on_gpu(*arrays, scale, causal=causal)
        return _attend(*arrays, segments, scale, causal)


def gradients(
    q_BPHK: jax.Array,
    k_BPHK: jax.Array,
    v_BPHV: jax.Array,
    segments: Segments,
    done: Attended,
    dout_BPHV: jax.Array,
    scale: float,
    *,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What this block adds to the gradients of queries, and those of its keys and values.

    Args:
      done: over all blocks.
    """
    arrays, given = (q_BPHK, k_BPHK, v_BPHV), (done, dout_BPHV, scale)
    platform, ids = kernels.platform(), None if segments is None else segments[0]
    with jax.named_scope(_scope(causal)):
        if platform == "tpu" and fused.fits_tpu(q_BPHK):
            return fused.block_gradients_on_tpu(*arrays, segments, *given, causal=causal)
        if platform == "gpu" and fused.fits_gpu(q_BPHK, v_BPHV, ids):
            return fused.block_gradients_on_gpu(*arrays, *given, causal=causal)
        return _gradients(*arrays, segments, *given, causal)


def _scope(causal: bool) -> str:
    """A name by which `v3jax.aot` knows how much of a block's scores a kernel computes."""
    return "causal_block" if causal else "whole_block"


def merged(one: Attended, other: Attended) -> Attended:
    """Of both blocks' keys together."""
    lse_BHP = jnp.logaddexp(one[1], other[1])
    safe_BHP = jnp.where(jnp.isfinite(lse_BHP), lse_BHP, 0)  # nothing seen yet: weights are 0

    def weighed(part: Attended) -> jax.Array:
        share_BPH1 = jnp.exp(part[1] - safe_BHP).swapaxes(1, 2)[..., None]
        return part[0].astype(share_BPH1.dtype) * share_BPH1

    return weighed(one) + weighed(other), lse_BHP


# ---- Chunks


def _chunk(length: int) -> int:
    """The largest part that divides a block, up to `_CHUNK`."""
    return next(size for size in range(min(length, _CHUNK), 0, -1) if length % size == 0)


def _chunked(x_BPHK: jax.Array) -> jax.Array:
    """`[B, P, H, K] -> [N, B, H, C, K]`."""
    batch, length, n_heads, dim = x_BPHK.shape
    return x_BPHK.reshape(batch, -1, _chunk(length), n_heads, dim).transpose(1, 0, 3, 2, 4)


def _joined(x_NBHCK: jax.Array) -> jax.Array:
    """`_chunked`'s mirror."""
    n, batch, n_heads, size, dim = x_NBHCK.shape
    return x_NBHCK.transpose(1, 0, 3, 2, 4).reshape(batch, n * size, n_heads, dim)


def _seen(
    segments: Segments, size: int, i: jax.Array, j: jax.Array, causal: bool
) -> jax.Array | None:
    """Which keys of chunk j queries of chunk i see, `[B, 1, C, C]` or `[C, C]`; None: all."""
    at_C = jnp.arange(size)
    seen = (i * size + at_C)[:, None] >= j * size + at_C if causal else None
    if segments is None:
        return seen
    rows_BC, keys_BC = (
        lax.dynamic_slice_in_dim(of, n * size, size, axis=1)
        for of, n in zip(segments, (i, j), strict=True)
    )
    same = rows_BC[:, :, None] == keys_BC[:, None, :]
    return (same if seen is None else same & seen)[:, None]


def _scores(
    q_BHCK: jax.Array, k_BHCK: jax.Array, seen: jax.Array | None, scale: float
) -> jax.Array:
    s_BHCC = jnp.einsum("bhck,bhsk->bhcs", q_BHCK, k_BHCK, preferred_element_type=wide(q_BHCK))
    return s_BHCC * scale if seen is None else jnp.where(seen, s_BHCC * scale, -jnp.inf)


def _attend(
    q_BPHK: jax.Array,
    k_BPHK: jax.Array,
    v_BPHV: jax.Array,
    segments: Segments,
    scale: float,
    causal: bool,
) -> Attended:
    q_NBHCK, k_NBHCK, v_NBHCV = map(_chunked, (q_BPHK, k_BPHK, v_BPHV))
    n, batch, n_heads, size, _ = q_NBHCK.shape
    kind = wide(q_BPHK)

    def one(i: jax.Array) -> Attended:
        def add(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top_BHC, sum_BHC, out_BHCV = carry
            seen = _seen(segments, size, i, j, causal)
            s_BHCC = _scores(q_NBHCK[i], k_NBHCK[j], seen, scale)
            new_BHC = jnp.maximum(top_BHC, s_BHCC.max(-1))
            # Nothing seen yet: any finite number serves, as exp(-inf) is 0.
            safe_BHC = jnp.where(jnp.isfinite(new_BHC), new_BHC, 0)
            shrink_BHC = jnp.exp(top_BHC - safe_BHC)
            p_BHCC = jnp.exp(s_BHCC - safe_BHC[..., None])
            v_BHCV = v_NBHCV[j]
            out = jnp.einsum(
                "bhcs,bhsv->bhcv", p_BHCC.astype(v_BHCV.dtype), v_BHCV, preferred_element_type=kind
            )
            sum_BHC = sum_BHC * shrink_BHC + p_BHCC.sum(-1)
            return new_BHC, sum_BHC, out_BHCV * shrink_BHC[..., None] + out

        rows = (batch, n_heads, size)
        start = (jnp.full(rows, -jnp.inf, kind), jnp.zeros(rows, kind))
        start = (*start, jnp.zeros((*rows, v_NBHCV.shape[-1]), kind))
        top_BHC, sum_BHC, out_BHCV = lax.fori_loop(0, i + 1 if causal else n, add, start)
        some_BHC = jnp.where(sum_BHC > 0, sum_BHC, 1)
        lse_BHC = jnp.where(sum_BHC > 0, top_BHC + jnp.log(some_BHC), -jnp.inf)
        return out_BHCV / some_BHC[..., None], lse_BHC

    out_NBHCV, lse_NBHC = lax.map(one, jnp.arange(n))
    lse_BHP = lse_NBHC.transpose(1, 2, 0, 3).reshape(batch, n_heads, -1)
    return _joined(out_NBHCV), lse_BHP


def _gradients(
    q_BPHK: jax.Array,
    k_BPHK: jax.Array,
    v_BPHV: jax.Array,
    segments: Segments,
    done: Attended,
    dout_BPHV: jax.Array,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    out_BPHV, lse_BHP = done
    kind = wide(q_BPHK)
    delta_BPH1 = jnp.sum(widen(dout_BPHV) * widen(out_BPHV), axis=-1, keepdims=True)
    lse_BPH1 = lse_BHP.swapaxes(1, 2)[..., None]
    q_NBHCK, k_NBHCK, v_NBHCV, dout_NBHCV, delta_NBHC1, lse_NBHC1 = map(
        _chunked, (q_BPHK, k_BPHK, v_BPHV, dout_BPHV, delta_BPH1, lse_BPH1)
    )
    n, _, _, size, _ = q_NBHCK.shape

    def one(i: jax.Array, sums: Any) -> Any:
        q_BHCK, dout_BHCV = q_NBHCK[i], dout_NBHCV[i]

        def add(j: jax.Array, sums: Any) -> Any:
            dq_BHCK, dk_NBHCK, dv_NBHCV = sums
            k_BHCK, v_BHCV = k_NBHCK[j], v_NBHCV[j]
            s_BHCC = _scores(q_BHCK, k_BHCK, _seen(segments, size, i, j, causal), scale)
            p_BHCC = jnp.exp(s_BHCC - lse_NBHC1[i])
            dp_BHCC = jnp.einsum("bhcv,bhsv->bhcs", dout_BHCV, v_BHCV, preferred_element_type=kind)
            ds_BHCC = p_BHCC * (dp_BHCC - delta_NBHC1[i]) * scale
            ds_BHCC, p_BHCC = ds_BHCC.astype(q_BHCK.dtype), p_BHCC.astype(v_BHCV.dtype)
            dq = jnp.einsum("bhcs,bhsk->bhck", ds_BHCC, k_BHCK, preferred_element_type=kind)
            dk = jnp.einsum("bhcs,bhck->bhsk", ds_BHCC, q_BHCK, preferred_element_type=kind)
            dv = jnp.einsum("bhcs,bhcv->bhsv", p_BHCC, dout_BHCV, preferred_element_type=kind)
            return dq_BHCK + dq, dk_NBHCK.at[j].add(dk), dv_NBHCV.at[j].add(dv)

        dq_NBHCK, dk_NBHCK, dv_NBHCV = sums
        start = (jnp.zeros(q_BHCK.shape, kind), dk_NBHCK, dv_NBHCV)
        dq_BHCK, *of_keys = lax.fori_loop(0, i + 1 if causal else n, add, start)
        return dq_NBHCK.at[i].set(dq_BHCK), *of_keys

    sums = tuple(jnp.zeros(x.shape, kind) for x in (q_NBHCK, k_NBHCK, v_NBHCV))
    dq, dk, dv = map(_joined, lax.fori_loop(0, n, one, sums))
    return dq, dk.astype(k_BPHK.dtype), dv.astype(v_BPHV.dtype)
