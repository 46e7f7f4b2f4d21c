"""Schedules of report section 4.2 in float64 and whole numbers, over arrays of steps."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def learning_rate(step: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The full run's rate: step counts from 0, tokens are those consumed before the step."""
    cosine = 2.2e-5 + 0.5 * (2.2e-4 - 2.2e-5) * (1 + np.cos(np.pi * (tokens - 10e12) / 4.3e12))
    return np.select(
        [step < 2000, tokens < 10e12, tokens < 14.3e12, tokens < 14.633e12],
        [2.2e-4 * step / 2000, 2.2e-4, cosine, 2.2e-5],
        7.3e-6,
    )


def piecewise(schedule: Sequence[tuple[float, float]], tokens: np.ndarray) -> np.ndarray:
    return np.array([next((v for u, v in schedule if t < u), schedule[-1][1]) for t in tokens])


def ramp(start: int, end: int, ramp_tokens: int, micro: int, seq_len: int) -> list[int]:
    """Batch sizes in sequences while fewer than `ramp_tokens` are consumed, in exact fractions."""
    sizes, consumed = [], 0
    while consumed < ramp_tokens:
        exact = start + Fraction((end - start) * consumed, ramp_tokens)
        sizes.append(int(exact / micro + Fraction(1, 2)) * micro)
        consumed += sizes[-1] * seq_len
    return sizes
