"""The loss-free balancing rule of report section 2.1.2, in Python integers and float64."""

import numpy as np


def update_bias(bias: np.ndarray, load: np.ndarray, speed: float) -> np.ndarray:
    """`bias + speed * sign(mean(load) - load)` for arrays `[layers, experts]`."""
    new = bias.astype(np.float64)
    for layer, counts in enumerate(load.tolist()):
        for expert, count in enumerate(counts):
            excess = count * len(counts) - sum(counts)
            new[layer, expert] -= speed * ((excess > 0) - (excess < 0))
    return new


def max_violation(load: np.ndarray) -> float:
    """`(max - mean) / mean` of each layer, averaged."""
    return float(np.mean([max(counts) * len(counts) / sum(counts) - 1 for counts in load.tolist()]))
