"""SwiGLU and the mixture of experts (report section 2.1.2, equation 12), one token at a time.

T tokens, D model, E experts, K chosen, F expert width.
"""

import numpy as np

from tests.reference.routing import route, sigmoid
from v3jax.config import ModelConfig


def swiglu(x: np.ndarray, gate_up_proj: np.ndarray, down_proj: np.ndarray) -> np.ndarray:
    """(silu(x W_gate) * (x W_up)) W_down; the gate is the first half of `gate_up_proj`."""
    half = gate_up_proj.shape[-1] // 2
    gate, up = x @ gate_up_proj[:, :half], x @ gate_up_proj[:, half:]
    return (gate * sigmoid(gate) * up) @ down_proj


def experts(x_TD: np.ndarray, chosen_TK: np.ndarray, gates_TK: np.ndarray, p: dict) -> np.ndarray:
    """Gate-weighted sum of the chosen experts' outputs, token by token."""
    out_TD = np.zeros_like(x_TD, dtype=np.float64)
    for t, x_D in enumerate(x_TD):
        for e, gate in zip(chosen_TK[t], gates_TK[t], strict=True):
            out_TD[t] += gate * swiglu(x_D, p["gate_up_proj"][e], p["down_proj"][e])
    return out_TD


def moe(
    x_TD: np.ndarray, p: dict, bias_E: np.ndarray, cfg: ModelConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shared expert plus routed experts.

    Returns:
      output [T, D] without the residual, affinities [T, E], chosen experts [T, K].
    """
    logits_TE = x_TD @ p["gate"]
    chosen_TK, gates_TK = route(
        logits_TE, bias_E, cfg.n_groups, cfg.top_groups, cfg.top_k, cfg.route_scale
    )
    out_TD = experts(x_TD, chosen_TK, gates_TK, p["experts"])
    if cfg.n_shared_experts:
        out_TD += swiglu(
            x_TD, p["shared_experts"]["gate_up_proj"], p["shared_experts"]["down_proj"]
        )
    return out_TD, sigmoid(logits_TE), chosen_TK
