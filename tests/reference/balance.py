"""The balance losses (report section 2.1.2, equations 17-20; section 4.5.3).

T tokens of one sequence, E experts.
"""

import numpy as np

from tests.reference.routing import best


def sequence_loss(s_TE: np.ndarray, top_k: int, valid_T: np.ndarray | None = None) -> float:
    """sum_i f_i P_i of one sequence and one layer, without its strength alpha.

    f_i counts the tokens that have expert i among the `top_k` best affinities (no bias, no groups),
    times E / (k T); P_i is the mean of the affinities normalised over all experts.
    """
    rows = [s for t, s in enumerate(s_TE) if valid_T is None or valid_T[t]]
    if not rows:
        return 0.0
    n_experts = s_TE.shape[-1]
    f_E, p_E = np.zeros(n_experts), np.zeros(n_experts)
    for s_E in rows:
        p_E += s_E / s_E.sum() / len(rows)
        for e in best(s_E, top_k):
            f_E[e] += n_experts / (top_k * len(rows))
    return float(f_E @ p_E)
