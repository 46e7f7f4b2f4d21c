"""Causal attention with distinct key and value widths, in query chunks (report section 2.1.1).

Only the scores of one chunk of queries against the keys before its end exist at a time; the
backward pass recomputes them from the saved log-sum-exp, as fused kernels do.
Dims: B batch, T time, C queries of a chunk, S keys before its end, H heads, K key dim, V value dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from v3jax.ops.precision import wide, widen

_MIN_CHUNK = 128
_MAX_CHUNKS = 8


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
        return _attention(q_BTHK, k_BTHK, v_BTHV, segments_BT, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    segments_BT: jax.Array | None,
    scale: float,
) -> jax.Array:
    return _forward(q_BTHK, k_BTHK, v_BTHV, segments_BT, scale)[0]


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


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


def _attention_fwd(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    segments_BT: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, _Residuals]:
    out_BTHV, lse_BHT = _forward(q_BTHK, k_BTHK, v_BTHV, segments_BT, scale)
    out_BTHV = checkpoint_name(out_BTHV, "attention_out")
    lse_BHT = checkpoint_name(lse_BHT, "attention_lse")
    return out_BTHV, (q_BTHK, k_BTHK, v_BTHV, segments_BT, out_BTHV, lse_BHT)


def _attention_bwd(
    scale: float, residuals: _Residuals, dout_BTHV: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTHK, k_BTHK, v_BTHV, segments_BT, out_BTHV, lse_BHT = residuals
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
