"""AdamW with moments stored in a low precision, from the equations, in float64.

g = g * min(1, clip / |g|)                      |g| over all parameters
m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
direction = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * p
stored m, v = round to nearest even (m), (v)
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

Leaves = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    low_precision: bool


def step(
    s: Settings,
    count: int,
    grads: Leaves,
    mu: Leaves,
    nu: Leaves,
    params: Leaves,
    decayed: set[str],
) -> tuple[Leaves, Leaves, Leaves]:
    """One update, `count` being 1 at the first: the direction and both stored moments."""
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grads.values()))
    scale = min(1.0, s.clip_norm / norm) if norm > 0 else 1.0
    direction, new_mu, new_nu = {}, {}, {}
    for name, g in grads.items():
        g64 = g.astype(np.float64) * scale
        m = s.beta1 * mu[name].astype(np.float64) + (1 - s.beta1) * g64
        v = s.beta2 * nu[name].astype(np.float64) + (1 - s.beta2) * g64**2
        m_hat, v_hat = m / (1 - s.beta1**count), v / (1 - s.beta2**count)
        direction[name] = m_hat / (np.sqrt(v_hat) + s.eps)
        if name in decayed:
            direction[name] = direction[name] + s.weight_decay * params[name]
        new_mu[name], new_nu[name] = stored(s, m), stored(s, v)
    return direction, new_mu, new_nu


def stored(s: Settings, x: np.ndarray) -> np.ndarray:
    x32 = x.astype(np.float32)
    return x32.astype(ml_dtypes.bfloat16) if s.low_precision else x32
