"""The whole network for one sequence: blocks, final norm, prediction modules.

T tokens, D model, E experts, K chosen.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.reference.mla import attention, rms_norm
from tests.reference.moe import moe, swiglu
from tests.reference.mtp import combined_input
from v3jax.config import ModelConfig


@dataclass
class RouterStats:
    """What one MoE layer's router did to one sequence."""

    scores_TE: np.ndarray
    chosen_TK: np.ndarray


@dataclass
class Forward:
    """States after the final norm: `hidden` [T, D] and, per prediction depth k, [T-k, D]."""

    hidden: np.ndarray
    mtp_hidden: list[np.ndarray] = field(default_factory=list)
    stats: list[RouterStats] = field(default_factory=list)
    mtp_stats: list[RouterStats] = field(default_factory=list)


def take_layer(tree: Any, index: int) -> Any:
    """One layer of a stacked tree."""
    if isinstance(tree, dict):
        return {name: take_layer(sub, index) for name, sub in tree.items()}
    return tree[index]


def block(
    x_TD: np.ndarray,
    p: dict,
    bias_E: np.ndarray | None,
    cfg: ModelConfig,
    segments_T: np.ndarray | None,
) -> tuple[np.ndarray, list[RouterStats]]:
    """x += MLA(norm(x)); x += FFN(norm(x)). A None bias makes the FFN dense: no statistics."""
    x_TD = x_TD + attention(
        rms_norm(x_TD, p["input_layernorm"], cfg.norm_eps), p["self_attn"], cfg, segments_T
    )
    u_TD = rms_norm(x_TD, p["post_attention_layernorm"], cfg.norm_eps)
    if bias_E is None:
        return x_TD + swiglu(u_TD, p["mlp"]["gate_up_proj"], p["mlp"]["down_proj"]), []
    out_TD, scores_TE, chosen_TK = moe(u_TD, p["mlp"], bias_E, cfg)
    return x_TD + out_TD, [RouterStats(scores_TE, chosen_TK)]


def forward(
    params: dict,
    router_state: dict,
    row: np.ndarray,
    cfg: ModelConfig,
    segments_T: np.ndarray | None = None,
) -> Forward:
    """Runs the network over one row of T+1 token ids.

    Args:
      segments_T: documents of the T inputs; attention stays within one. None attends across.
    """
    x_TD = params["embed_tokens"][row[:-1]].astype(np.float64)
    stats: list[RouterStats] = []
    for i in range(cfg.n_dense_layers):
        x_TD, _ = block(x_TD, take_layer(params["dense_layers"], i), None, cfg, segments_T)
    for i in range(cfg.n_layers - cfg.n_dense_layers):
        bias_E = router_state["moe_layers"]["mlp"]["e_score_correction_bias"][i]
        x_TD, layer_stats = block(
            x_TD, take_layer(params["moe_layers"], i), bias_E, cfg, segments_T
        )
        stats += layer_stats
    out = Forward(rms_norm(x_TD, params["norm"], cfg.norm_eps), stats=stats)
    previous = out.hidden
    for k in range(1, cfg.mtp_depth + 1):
        name = f"mtp_layers_{k - 1}"
        p = params[name]
        x_TD = combined_input(previous, params["embed_tokens"], row, k, p, cfg.norm_eps)
        bias_E = router_state[name]["block"]["mlp"]["e_score_correction_bias"]
        segments = None if segments_T is None else segments_T[: len(x_TD)]
        x_TD, layer_stats = block(x_TD, p["block"], bias_E, cfg, segments)
        previous = rms_norm(x_TD, p["shared_head_norm"], cfg.norm_eps)
        out.mtp_hidden.append(previous)
        out.mtp_stats += layer_stats
    return out
