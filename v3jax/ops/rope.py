"""Rotary position embedding on interleaved pairs, and YaRN (report sections 2.1.1 and 4.3).

Dims: B batch, T time, H heads, R rotary dim (even), P = R/2 pairs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from v3jax.config import ModelConfig
from v3jax.ops.precision import wide, widen


def frequencies(cfg: ModelConfig) -> np.ndarray:
    """Angle a position turns each pair by, `[P]` FP64: `base^(-2i/R)`, changed by YaRN if it is on.

    With YaRN, pairs that turn more than `beta_fast` times over the original length stay, pairs
    that turn less than `beta_slow` times are divided by `factor`, and a linear ramp joins them.
    """
    dim = cfg.rope_head_dim
    theta_P = cfg.rope_base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    yarn = cfg.yarn
    if yarn is None:
        return theta_P

    def pair_turning(turns: float) -> float:
        length = yarn.original_seq_len / (turns * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(cfg.rope_base))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    ramp_P = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    return theta_P * (1 - ramp_P) + theta_P / yarn.factor * ramp_P


def softmax_scale(cfg: ModelConfig) -> float:
    """`(nope + rope)^-1/2`, times the square of YaRN's temperature `0.1 mscale ln(factor) + 1`."""
    scale = (cfg.nope_head_dim + cfg.rope_head_dim) ** -0.5
    if cfg.yarn is None or cfg.yarn.factor <= 1:
        return scale
    return scale * (0.1 * cfg.yarn.mscale * math.log(cfg.yarn.factor) + 1) ** 2


def rotate(x_BTHR: jax.Array, positions_T: jax.Array, theta_P: np.ndarray) -> jax.Array:
    """Turns pairs (0,1), (2,3), ... of the last axis by `position * theta`, in FP32.

    `positions_T` is `[T]` or `[B, T]`; `x` may lack the head axis (`[B, T, R]`).
    """
    angle = positions_T[..., None].astype(wide(x_BTHR)) * jnp.asarray(theta_P, wide(x_BTHR))
    if x_BTHR.ndim == 4:
        angle = angle[..., None, :]
    cos, sin = (jnp.repeat(f(angle), 2, axis=-1) for f in (jnp.cos, jnp.sin))
    x32_BTHR = widen(x_BTHR)
    # A product with ones and zeros, exact: TPUs have no way to swap neighbours but slow copies.
    swap_RR = jnp.asarray(_swap(x_BTHR.shape[-1]), x32_BTHR.dtype)
    swapped_BTHR = jnp.matmul(x32_BTHR, swap_RR, precision=jax.lax.Precision.HIGHEST)
    return (x32_BTHR * cos + swapped_BTHR * sin).astype(x_BTHR.dtype)


def _swap(width: int) -> np.ndarray:
    """The matrix that takes pairs `(a, b)` to `(-b, a)`."""
    pairs = np.arange(0, width, 2)
    swap_RR = np.zeros((width, width))
    swap_RR[pairs + 1, pairs], swap_RR[pairs, pairs + 1] = -1, 1
    return swap_RR
