"""Cross-entropy of the output head without the whole logits in memory (report section 2.2).

Dims: B batch, T time, C positions of a chunk, D features, V vocabulary, v a device's part of it.
"""

import jax
import jax.numpy as jnp

from v3jax.ops.precision import wide

_MAX_CHUNKS = 16
_MIN_ROWS = 256
"""Fewer rows make poor matrix products, and each chunk adds to the head's whole gradient (ours)."""


def logits(hidden_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """FP32 logits of the output head: `[..., D] x [D, V] -> [..., V]`."""
    return jnp.einsum(
        "...d,dv->...v",
        hidden_BTD,
        head_DV.astype(hidden_BTD.dtype),
        preferred_element_type=wide(hidden_BTD),
    )


@jax.custom_vjp
def linear_cross_entropy(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Head and softmax cross-entropy in one pass over chunks of positions.

    Returns `(loss, nll_BT)`: the sum of `weights * nll`, and every position's negative
    log-likelihood in nats for reporting, through which no gradient flows. A differentiated call
    forms the gradients of `hidden` and `head` chunk by chunk in the forward pass, so logits are
    computed once and never stored.
    """
    losses, nlls = jax.lax.map(
        lambda c: _chunk_loss(c[0], head_DV, c[1], c[2])[:2],
        _chunked(hidden_BTD, targets_BT, weights_BT),
    )
    return losses.sum(), _unchunk(nlls)


def _chunk_size(batch: int, length: int) -> int:
    """Positions of a chunk: the largest divisor of `length` up to a 16th of it, or up to what
    makes `_MIN_ROWS` rows of `batch` sequences."""
    wanted = max(-(-_MIN_ROWS // batch), -(-length // _MAX_CHUNKS))
    return next(size for size in range(min(wanted, length), 0, -1) if length % size == 0)


def _chunked(*arrays_BT: jax.Array) -> tuple[jax.Array, ...]:
    """`[B, T, ...] -> [chunks, B, C, ...]`, the batch kept whole so that its sharding stays."""
    size = _chunk_size(*arrays_BT[0].shape[:2])
    return tuple(a.reshape(a.shape[0], -1, size, *a.shape[2:]).swapaxes(0, 1) for a in arrays_BT)


def _unchunk(x: jax.Array) -> jax.Array:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def split_head_gradients(
    hidden_BTD: jax.Array,
    head_Dv: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    axis: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(nll_BT, dhidden_BTD, dhead_Dv)` of `linear_cross_entropy` where the vocabulary is split
    over a mesh axis, inside `jax.shard_map`; all but the last, which is as wide as sums are, are
    the same on all devices. `dhidden` is added up over the axis in the type of `hidden`."""
    inputs = (hidden_BTD, head_Dv, targets_BT, weights_BT)
    (_, nll_BT), (dhidden_BTD, dhead_Dv) = _gradients(*inputs, axis)
    return nll_BT, jax.lax.psum(dhidden_BTD, axis), dhead_Dv


def split_head_nll(
    hidden_BTD: jax.Array, head_Dv: jax.Array, targets_BT: jax.Array, axis: str
) -> jax.Array:
    """`split_head_gradients`' `nll_BT` alone."""
    targets_BT -= jax.lax.axis_index(axis) * head_Dv.shape[1]
    ones_BT = jnp.ones(targets_BT.shape, wide(hidden_BTD))
    nlls = jax.lax.map(
        lambda c: _chunk_loss(c[0], head_Dv, c[1], c[2], axis)[1],
        _chunked(hidden_BTD, targets_BT, ones_BT),
    )
    return _unchunk(nlls)


def _chunk_loss(
    hidden_BCD: jax.Array,
    head_DV: jax.Array,
    targets_BC: jax.Array,
    weights_BC: jax.Array,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """With a mesh axis, targets are numbered from this device's part of the vocabulary on."""
    logits_BCV = logits(hidden_BCD, head_DV)
    if axis is None:
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    else:
        top_BC = jax.lax.pmax(logits_BCV.max(-1), axis)
        sums_BC = jax.lax.psum(jnp.exp(logits_BCV - top_BC[..., None]).sum(-1), axis)
        lse_BC = top_BC + jnp.log(sums_BC)
        here_BC = (targets_BC >= 0) & (targets_BC < head_DV.shape[1])
        at_BC = jnp.where(here_BC, targets_BC, 0)
        target_BC = jnp.take_along_axis(logits_BCV, at_BC[..., None], axis=-1)[..., 0]
        target_BC = jax.lax.psum(jnp.where(here_BC, target_BC, 0), axis)
    nll_BC = lse_BC - target_BC
    return jnp.sum(jnp.where(weights_BC > 0, weights_BC * nll_BC, 0)), nll_BC, logits_BCV, lse_BC


_Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _gradients(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    axis: str | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    dtype = hidden_BTD.dtype
    if axis is not None:
        targets_BT -= jax.lax.axis_index(axis) * head_DV.shape[1]
    columns_V = jnp.arange(head_DV.shape[1])

    def one_chunk(
        carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        loss, dhead_DV = carry
        hidden_BCD, targets_BC, weights_BC = chunk
        chunk_loss, nll_BC, logits_BCV, lse_BC = _chunk_loss(
            hidden_BCD, head_DV, targets_BC, weights_BC, axis
        )
        p_BCV = jnp.exp(logits_BCV - lse_BC[..., None])
        onehot_BCV = columns_V == targets_BC[..., None]
        dlogits_BCV = ((p_BCV - onehot_BCV) * weights_BC[..., None]).astype(dtype)
        dhidden_BCD = jnp.einsum("bcv,dv->bcd", dlogits_BCV, head_DV.astype(dtype))
        dhead_DV += jnp.einsum(
            "bcd,bcv->dv", hidden_BCD, dlogits_BCV, preferred_element_type=wide(hidden_BCD)
        )
        return (loss + chunk_loss, dhead_DV), (nll_BC, dhidden_BCD)

    with jax.named_scope("linear_cross_entropy"):
        start = (jnp.zeros((), wide(hidden_BTD)), jnp.zeros(head_DV.shape, wide(hidden_BTD)))
        (loss, dhead_DV), (nlls, dhiddens) = jax.lax.scan(
            one_chunk, start, _chunked(hidden_BTD, targets_BT, weights_BT)
        )
    return (loss, _unchunk(nlls)), (_unchunk(dhiddens), dhead_DV)


def _fwd(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    outputs, (dhidden_BTD, dhead_DV) = _gradients(hidden_BTD, head_DV, targets_BT, weights_BT)
    return outputs, (dhidden_BTD, dhead_DV.astype(head_DV.dtype))


def _bwd(
    gradients: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    dhidden_BTD, dhead_DV = gradients
    g = cotangents[0]
    return (
        (dhidden_BTD * g).astype(dhidden_BTD.dtype),
        (dhead_DV * g).astype(dhead_DV.dtype),
        None,
        None,
    )


linear_cross_entropy.defvjp(_fwd, _bwd)
