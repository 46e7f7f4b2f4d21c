"""Fused causal attention with 192-wide keys and 128-wide values on accelerators.

On TPU it is JAX's splash attention (Pallas), on Hopper GPUs cuDNN's; neither forms the scores of
a whole sequence. Dims: B batch, T time, H heads, K key dim, V value dim.
"""

import re
from typing import cast

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
    length, n_heads = q_BTHK.shape[1:3]
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * n_heads)
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
    kernel = splash.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention_out",
        interpret=interpret,
    )
    q_BTHK = (q_BTHK.astype(jnp.float32) * scale).astype(q_BTHK.dtype)

    def one(q: jax.Array, k: jax.Array, v: jax.Array, segments_T: jax.Array | None) -> jax.Array:
        ids = None if segments_T is None else splash.SegmentIds(segments_T, segments_T)
        return cast(jax.Array, kernel(q, k, v, segment_ids=ids))

    q, k, v = (x.swapaxes(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV))
    return jax.vmap(one)(q, k, v, segments_BT).swapaxes(1, 2)


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
