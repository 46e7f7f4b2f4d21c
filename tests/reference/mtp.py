"""Multi-token prediction (report section 2.2, equations 21-25).

Departs from equation 21 as the released weights do: the embedding comes first in the
concatenation, and depth 1 reads the main model's state after its final norm. Deeper modules read
the previous module's state after that module's own norm.
"""

import numpy as np

from tests.reference.mla import rms_norm


def combined_input(
    hidden_TD: np.ndarray, embed_VD: np.ndarray, row: np.ndarray, depth: int, p: dict, eps: float
) -> np.ndarray:
    """M_k [ norm(Emb(t_{i+k})) ; norm(h_i) ] for the T-k positions that have a target.

    Args:
      hidden_TD: state of the previous depth, at least T - depth positions.
      row: the T+1 token ids of the sequence.
      depth: k, from 1.
    """
    n_positions = len(row) - 1 - depth
    out = []
    for i in range(n_positions):
        ahead = rms_norm(embed_VD[row[i + depth]], p["enorm"], eps)
        here = rms_norm(hidden_TD[i], p["hnorm"], eps)
        out.append(np.concatenate([ahead, here]) @ p["eh_proj"])
    return np.array(out)


def targets(row: np.ndarray, depth: int) -> np.ndarray:
    """t_{i+k+1} for i = 1..T-k; depth 0 is the main model."""
    return np.array([row[i + depth + 1] for i in range(len(row) - 1 - depth)])
