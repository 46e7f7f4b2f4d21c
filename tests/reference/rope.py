"""Rotary positions on interleaved pairs, and YaRN's frequencies (report section 4.3).

T tokens, R rotated dimensions.
"""

import numpy as np

from v3jax.config import ModelConfig


def frequencies(dim: int, base: float) -> np.ndarray:
    """theta_i = base^(-2i/dim), i = 0..dim/2-1."""
    return np.array([base ** (-2 * i / dim) for i in range(dim // 2)])


def yarn_frequencies(
    dim: int, base: float, factor: float, original_len: int, beta_fast: float, beta_slow: float
) -> np.ndarray:
    """High frequencies kept, low ones divided by `factor`, a linear ramp over pairs in between."""

    def pair_turning(turns: float) -> float:
        """The (fractional) pair that makes `turns` rotations over the original length."""
        return dim * np.log(original_len / (2 * np.pi * turns)) / (2 * np.log(base))

    low, high = np.floor(pair_turning(beta_fast)), np.ceil(pair_turning(beta_slow))
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 1e-3  # released code
    theta = frequencies(dim, base)
    for i in range(dim // 2):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        theta[i] = theta[i] * (1 - ramp) + theta[i] / factor * ramp
    return theta


def model_frequencies(cfg: ModelConfig) -> np.ndarray:
    """The frequencies of a model config: plain, or YaRN's where it has one."""
    if cfg.yarn is None:
        return frequencies(cfg.rope_head_dim, cfg.rope_base)
    y = cfg.yarn
    return yarn_frequencies(
        cfg.rope_head_dim, cfg.rope_base, y.factor, y.original_seq_len, y.beta_fast, y.beta_slow
    )


def softmax_scale(cfg: ModelConfig) -> float:
    """(nope + rope)^-1/2, times the square of YaRN's temperature 0.1 mscale ln(factor) + 1."""
    scale = (cfg.nope_head_dim + cfg.rope_head_dim) ** -0.5
    if cfg.yarn is None:
        return scale
    return scale * (0.1 * cfg.yarn.mscale * np.log(cfg.yarn.factor) + 1) ** 2


def rotate(x_R: np.ndarray, position: int, theta: np.ndarray) -> np.ndarray:
    """Dimensions (2i, 2i+1) as one complex number, turned by position * theta_i."""
    out = np.empty_like(x_R, dtype=np.float64)
    for i, angle in enumerate(position * theta):
        z = complex(x_R[2 * i], x_R[2 * i + 1]) * np.exp(1j * angle)
        out[2 * i], out[2 * i + 1] = z.real, z.imag
    return out


def rotate_sequence(x_TR: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Row t turned by position t."""
    return np.stack([rotate(x, t, theta) for t, x in enumerate(x_TR)])
