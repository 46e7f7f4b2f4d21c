"""Fused causal attention with 192-wide keys and 128-wide values on accelerators.

On TPU it is JAX's splash attention (Pallas), on Hopper GPUs cuDNN's; neither forms the scores of
a whole sequence. Dims: B batch, T time, H heads, K key dim, V value dim.
"""

import functools
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from v3jax.kernels import device_kind

_BLOCK = 1024
_BLOCK_BACKWARD = 512


def on_tpu(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    segments_BT: jax.Array | None,
    scale: float,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `ops.attention.causal_attention`, for lengths of whole 128s."""
    kernel = _splash(*q_BTHK.shape[1:3], causal=True, interpret=interpret)
    q_BTHK = (q_BTHK.astype(jnp.float32) * scale).astype(q_BTHK.dtype)

    def one(q: jax.Array, k: jax.Array, v: jax.Array, segments_T: jax.Array | None) -> jax.Array:
        ids = None if segments_T is None else splash.SegmentIds(segments_T, segments_T)
        return cast(jax.Array, kernel(q, k, v, segment_ids=ids))

    q, k, v = (x.swapaxes(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV))
    return jax.vmap(one)(q, k, v, segments_BT).swapaxes(1, 2)


def _splash(
    length: int, n_heads: int, *, causal: bool, interpret: bool, residuals: bool = False
) -> splash.SplashAttentionKernel:
    """The kernel of so many queries and keys; `residuals`: with the log-sum-exp."""
    kind = masks.CausalMask if causal else masks.FullMask
    mask = masks.MultiHeadMask([kind((length, length))] * n_heads)
    forward, backward = (_block(length, most) for most in (_BLOCK, _BLOCK_BACKWARD))
    sizes = splash.BlockSizes(
        block_q=forward,
        block_kv=forward,
        block_kv_compute=_block(forward, _BLOCK_BACKWARD),
        block_q_dkv=backward,
        block_kv_dkv=backward,
        block_kv_dkv_compute=backward,
        block_q_dq=backward,
        block_kv_dq=backward,
    )
    return splash.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=None if residuals else "attention_out",
        save_residuals=residuals,
        interpret=interpret,
    )


def fits_tpu(q_BTHK: jax.Array) -> bool:
    """Whether the kernel takes this length and type."""
    return q_BTHK.shape[1] % 128 == 0 and q_BTHK.dtype == jnp.bfloat16


def _block(length: int, most: int) -> int:
    """The largest part of `length` up to `most` that divides it, in whole 128s."""
    return next(size for size in range(min(most, length), 0, -128) if length % size == 0)


def fits_gpu(q_BTHK: jax.Array, v_BTHV: jax.Array, segments_BT: jax.Array | None) -> bool:
    """Whether cuDNN takes these shapes and this type on the target; older GPUs lack the kernel for
    values narrower than keys."""
    key, value = q_BTHK.shape[-1], v_BTHV.shape[-1]
    shaped = key % 8 == 0 and value % 8 == 0 and max(key, value) <= 256
    newer = re.search(r"\bG?(H20|H100|H200|H800|B100|B200|B300)\b", device_kind()) is not None
    return newer and shaped and segments_BT is None and q_BTHK.dtype == jnp.bfloat16


def on_gpu(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHV: jax.Array, scale: float) -> jax.Array:
    """As `ops.attention.causal_attention` without segments, by cuDNN 9.10 or later on Hopper."""
    # `jax.nn.dot_product_attention` refuses values narrower than keys; what it calls does not.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    out_BTHV = cudnn.dot_product_attention(
        q_BTHK, k_BTHK, v_BTHV, scale=scale, mask_type=cudnn.MaskType.CAUSAL
    )
    return cast(jax.Array, out_BTHV)


# ---- Blocks of longer rows, as `ops.blocks` has them. The derivative that JAX gives a kernel is of
# one block alone; here the backward pass starts from the output and the log-sum-exp over all
# blocks, so its kernels are called by what that derivative itself calls.

Segments = tuple[jax.Array, jax.Array] | None
"""Of the queries and of the keys, `[B, P]`: a query sees keys of its own; None: all."""
Attended = tuple[jax.Array, jax.Array]
"""The output `[B, P, H, V]` and the log-sum-exp `[B, H, P]`, FP32 at least."""


def block_on_tpu(
    q_BPHK: jax.Array,
    k_BPHK: jax.Array,
    v_BPHV: jax.Array,
    segments: Segments,
    scale: float,
    *,
    causal: bool,
    interpret: bool = False,
) -> Attended:
    """As `ops.blocks.attend`."""
    kernel = _splash(*q_BPHK.shape[1:3], causal=causal, interpret=interpret, residuals=True)

    def one(q: jax.Array, k: jax.Array, v: jax.Array, ids: Segments) -> Any:
        return kernel(q, k, v, segment_ids=None if ids is None else splash.SegmentIds(*ids))

    q, k, v = _heads_first(_scaled(q_BPHK, scale), k_BPHK, v_BPHV)
    out_BHPV, (lse_BHP,) = jax.vmap(one)(q, k, v, segments)
    return out_BHPV.swapaxes(1, 2), lse_BHP


def block_gradients_on_tpu(
    q_BPHK: jax.Array,
    k_BPHK: jax.Array,
    v_BPHV: jax.Array,
    segments: Segments,
    done: Attended,
    dout_BPHV: jax.Array,
    scale: float,
    *,
    causal: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `ops.blocks.gradients`."""
    kernel = _splash(*q_BPHK.shape[1:3], causal=causal, interpret=interpret)
    names = ("mask_value", "is_mqa", "block_sizes", "mask_function", "attn_logits_soft_cap")
    fixed: dict[str, Any] = {name: kernel.kwargs[name] for name in (*names, "interpret")}
    backward = functools.partial(
        splash._splash_attention_bwd, save_residuals=False, residual_checkpoint_name=None, **fixed
    )

    def one(q: jax.Array, k: jax.Array, v: jax.Array, ids: Segments, *rest: jax.Array) -> Any:
        out, lse, dout = rest
        segment_ids = None if ids is None else splash.SegmentIds(*ids)
        residuals = (q, k, v, segment_ids, None, out, lse)
        return backward(res=(*residuals, kernel.dq_mask_info, kernel.dkv_mask_info), do=dout)[3:6]

    q, k, v, out, dout = _heads_first(_scaled(q_BPHK, scale), k_BPHK, v_BPHV, done[0], dout_BPHV)
    found = jax.vmap(one)(q, k, v, segments, out.astype(dout.dtype), done[1], dout)
    dq, dk, dv = _heads_first(*found)
    return dq.astype(jnp.float32) * scale, dk, dv


def _scaled(q_BPHK: jax.Array, scale: float) -> jax.Array:
    return (q_BPHK.astype(jnp.float32) * scale).astype(q_BPHK.dtype)


def _heads_first(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x.swapaxes(1, 2) for x in arrays)


def block_on_gpu(
    q_BPHK: jax.Array, k_BPHK: jax.Array, v_BPHV: jax.Array, scale: float, *, causal: bool
) -> Attended:
    """As `ops.blocks.attend` without segments."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    out_BPHV, lse_BHP = cudnn._dot_product_attention_fwd_p_wrapper.bind(
        *(q_BPHK, k_BPHK, v_BPHV, *_absent(q_BPHK)),
        **_cudnn_options(scale, causal),
        is_training=True,
    )
    return out_BPHV, lse_BHP


def block_gradients_on_gpu(
    q_BPHK: jax.Array,
    k_BPHK: jax.Array,
    v_BPHV: jax.Array,
    done: Attended,
    dout_BPHV: jax.Array,
    scale: float,
    *,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `ops.blocks.gradients` without segments."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    dq, dk, dv = cudnn._dot_product_attention_bwd_p_wrapper.bind(
        *(q_BPHK, k_BPHK, v_BPHV, *_absent(q_BPHK)),
        *(done[1], done[0].astype(dout_BPHV.dtype), dout_BPHV),
        **_cudnn_options(scale, causal),
    )
    return dq, dk, dv


def _absent(q_BPHK: jax.Array) -> list[jax.Array]:
    """Bias, lengths, offsets and page tables, which there are not."""
    return [jnp.zeros(0, q_BPHK.dtype)] * 7


def _cudnn_options(scale: float, causal: bool) -> dict[str, Any]:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    kind = cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK
    return {
        "scale": scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": kind,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
        "score_mod": None,
    }
