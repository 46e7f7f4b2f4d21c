"""The training objective of one batch: main + lambda/D MTP + alpha balance (report section 2).

B sequences, T tokens. Sequences are independent, so this loops over them.
"""

from dataclasses import dataclass

import numpy as np

from tests.reference.balance import sequence_loss
from tests.reference.mtp import targets
from tests.reference.transformer import Forward, forward
from v3jax.config import ModelConfig


@dataclass
class Objective:
    """`mtp` is averaged over depths, `balance` summed over layers; neither has its strength."""

    total: float
    main: float
    mtp: float
    balance: float


def nll(logits_V: np.ndarray, target: int) -> float:
    """-log softmax(logits)[target]."""
    top = logits_V.max()
    return float(np.log(np.exp(logits_V - top).sum()) + top - logits_V[target])


def depth_nll(
    hidden_TD: np.ndarray, head_DV: np.ndarray, row: np.ndarray, segments: np.ndarray, depth: int
) -> tuple[float, int]:
    """Sum of -log P over the targets of one depth that are not padding, and their number."""
    terms = [
        nll(hidden_TD[i] @ head_DV, target)
        for i, target in enumerate(targets(row, depth))
        if segments[i + depth + 1] > 0
    ]
    return sum(terms), len(terms)


def counted(segments: np.ndarray, n_positions: int) -> np.ndarray:
    """Which of a layer's positions count: neither they nor the token they look ahead to is padding.

    Args:
      segments: documents [T+1]. n_positions: T for the main model, T - k for MTP depth k.
    """
    depth = len(segments) - 1 - n_positions
    return (segments[:n_positions] > 0) & (segments[depth : depth + n_positions] > 0)


def row_balance(out: Forward, segments: np.ndarray, cfg: ModelConfig) -> float:
    """sum f P of one sequence over every MoE layer, prediction modules included."""
    return sum(
        sequence_loss(s.scores_TE, cfg.top_k, counted(segments, len(s.scores_TE)))
        for s in out.stats + out.mtp_stats
    )


def objective(
    params: dict,
    router_state: dict,
    tokens: np.ndarray,
    segments: np.ndarray,
    cfg: ModelConfig,
    mtp_weight: float,
    alpha: float,
    mask_segments: bool = False,
) -> Objective:
    """The objective of a batch.

    Args:
      tokens: ids [B, T+1]. segments: documents [B, T+1], 0 for padding.
      mask_segments: attention stays within a document.

    Every depth's sum is divided by the number of main-model targets (T a row without padding).
    """
    main, mtp, balance, n_targets = 0.0, 0.0, 0.0, 0
    for row, segs in zip(tokens, segments, strict=True):
        out = forward(params, router_state, row, cfg, segs[:-1] if mask_segments else None)
        row_main, count = depth_nll(out.hidden, params["lm_head"], row, segs, 0)
        main, n_targets = main + row_main, n_targets + count
        for k, hidden in enumerate(out.mtp_hidden, start=1):
            mtp += depth_nll(hidden, params["lm_head"], row, segs, k)[0] / cfg.mtp_depth
        balance += row_balance(out, segs, cfg) / len(tokens)
    main, mtp = main / n_targets, mtp / n_targets
    return Objective(main + mtp_weight * mtp + alpha * balance, main, mtp, balance)
