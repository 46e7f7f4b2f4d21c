"""Routing: sigmoid affinity, biased and group-limited choice, unbiased gates.

Report section 2.1.2, equations 12-16. T tokens, E experts, K chosen.
"""

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def best(values: np.ndarray, k: int) -> list[int]:
    """Indices of the k largest, largest first, the lower index first among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def kept_groups(routing_E: np.ndarray, n_groups: int, top_groups: int) -> list[int]:
    """The groups with the largest sums of their two best routing scores."""
    groups = routing_E.reshape(n_groups, -1)
    return best(np.array([np.sort(g)[-2:].sum() for g in groups]), top_groups)


def route_token(
    logits_E: np.ndarray,
    bias_E: np.ndarray,
    n_groups: int,
    top_groups: int,
    top_k: int,
    scale: float,
) -> tuple[list[int], list[float]]:
    """Chosen experts of one token and their gates."""
    s_E = sigmoid(logits_E)
    r_E = s_E + bias_E
    size = len(s_E) // n_groups
    groups = kept_groups(r_E, n_groups, top_groups)
    allowed = [e for e in range(len(s_E)) if e // size in groups]
    chosen = [allowed[i] for i in best(r_E[allowed], top_k)]
    total = sum(s_E[e] for e in chosen)
    return chosen, [scale * s_E[e] / total for e in chosen]


def route(
    logits_TE: np.ndarray,
    bias_E: np.ndarray,
    n_groups: int,
    top_groups: int,
    top_k: int,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """`route_token` for every row: experts [T, K], gates [T, K]."""
    rows = [route_token(l, bias_E, n_groups, top_groups, top_k, scale) for l in logits_TE]
    return np.array([r[0] for r in rows]), np.array([r[1] for r in rows])


def load(chosen_TK: np.ndarray, n_experts: int, valid_T: np.ndarray | None = None) -> np.ndarray:
    """How many tokens each expert received, padding left out."""
    load_E = np.zeros(n_experts, dtype=np.int64)
    for t, chosen in enumerate(chosen_TK):
        if valid_T is None or valid_T[t]:
            for e in chosen:
                load_E[e] += 1
    return load_E
