"""Multi-head latent attention (report section 2.1.1, equations 1-11), with both latent norms.

T tokens, D model, Q query latent, C key/value latent, N nope, R rope, V value dimensions of a head.
"""

import numpy as np

from tests.reference.rope import model_frequencies, rotate_sequence, softmax_scale
from v3jax.config import ModelConfig


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def visible(t: int, segments_T: np.ndarray | None) -> list[int]:
    """Positions that position `t` attends to: itself and earlier, of its own document if asked."""
    return [j for j in range(t + 1) if segments_T is None or segments_T[j] == segments_T[t]]


def _latents(
    x_TD: np.ndarray, p: dict, cfg: ModelConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries of all heads before rotation, normalised latent, rotated shared key."""
    if cfg.q_latent_dim is None:
        q_T = x_TD @ p["q_proj"]
    else:
        c_q_TQ = rms_norm(x_TD @ p["q_a_proj"], p["q_a_layernorm"], cfg.latent_norm_eps)
        q_T = c_q_TQ @ p["q_b_proj"]
    down_T = x_TD @ p["kv_a_proj_with_mqa"]
    c_kv_TC = rms_norm(down_T[:, : cfg.kv_latent_dim], p["kv_a_layernorm"], cfg.latent_norm_eps)
    k_rope_TR = rotate_sequence(down_T[:, cfg.kv_latent_dim :], model_frequencies(cfg))
    return q_T, c_kv_TC, k_rope_TR


def _head_queries(q_T: np.ndarray, head: int, cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    width = cfg.nope_head_dim + cfg.rope_head_dim
    q = q_T[:, head * width : (head + 1) * width]
    rope = rotate_sequence(q[:, cfg.nope_head_dim :], model_frequencies(cfg))
    return q[:, : cfg.nope_head_dim], rope


def attention(
    x_TD: np.ndarray, p: dict, cfg: ModelConfig, segments_T: np.ndarray | None = None
) -> np.ndarray:
    """Expanded form: every head's keys and values are written out.

    Args:
      x_TD: normalised block input of one sequence.
      p: the `self_attn` tree.
      segments_T: documents of the tokens; attention stays within one. None attends across.
    """
    q_T, c_kv_TC, k_rope_TR = _latents(x_TD, p, cfg)
    scale, outs = softmax_scale(cfg), []
    for head in range(cfg.n_heads):
        q_nope_TN, q_rope_TR = _head_queries(q_T, head, cfg)
        width = cfg.nope_head_dim + cfg.v_head_dim
        kv_T = c_kv_TC @ p["kv_b_proj"][:, head * width : (head + 1) * width]
        k_nope_TN, v_TV = kv_T[:, : cfg.nope_head_dim], kv_T[:, cfg.nope_head_dim :]
        q_T_all = np.concatenate([q_nope_TN, q_rope_TR], axis=-1)
        k_T_all = np.concatenate([k_nope_TN, k_rope_TR], axis=-1)
        out_TV = np.zeros((len(x_TD), cfg.v_head_dim))
        for t in range(len(x_TD)):
            past = visible(t, segments_T)
            out_TV[t] = softmax(scale * k_T_all[past] @ q_T_all[t]) @ v_TV[past]
        outs.append(out_TV)
    return np.concatenate(outs, axis=-1) @ p["o_proj"]


def absorbed_attention(
    x_TD: np.ndarray, p: dict, cfg: ModelConfig, segments_T: np.ndarray | None = None
) -> np.ndarray:
    """Absorbed form: one shared key and value of latent width; must equal `attention`."""
    q_T, c_kv_TC, k_rope_TR = _latents(x_TD, p, cfg)
    scale, outs = softmax_scale(cfg), []
    for head in range(cfg.n_heads):
        q_nope_TN, q_rope_TR = _head_queries(q_T, head, cfg)
        width = cfg.nope_head_dim + cfg.v_head_dim
        w_C = p["kv_b_proj"][:, head * width : (head + 1) * width]
        w_k_CN, w_v_CV = w_C[:, : cfg.nope_head_dim], w_C[:, cfg.nope_head_dim :]
        out_TV = np.zeros((len(x_TD), cfg.v_head_dim))
        for t in range(len(x_TD)):
            past = visible(t, segments_T)
            q_latent_C = w_k_CN @ q_nope_TN[t]
            scores = c_kv_TC[past] @ q_latent_C + k_rope_TR[past] @ q_rope_TR[t]
            out_TV[t] = (softmax(scale * scores) @ c_kv_TC[past]) @ w_v_CV
        outs.append(out_TV)
    return np.concatenate(outs, axis=-1) @ p["o_proj"]
