"""A small odd-sized model with random weights large enough for errors to show.

Sizes are pairwise different where the model allows it, so that a transposed or misread axis fails.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.tiny import v3_tiny
from v3jax.config import ExperimentConfig, ModelConfig, NumericsConfig
from v3jax.sharding import ShardingRules

CONFIG = ModelConfig(
    vocab_size=41,
    dim=24,
    n_layers=3,
    n_dense_layers=1,
    n_heads=3,
    q_latent_dim=10,
    kv_latent_dim=8,
    nope_head_dim=6,
    rope_head_dim=4,
    v_head_dim=5,
    dense_ffn_dim=14,
    expert_ffn_dim=7,
    n_shared_experts=2,
    n_experts=12,
    top_k=3,
    n_groups=4,
    top_groups=2,
    route_scale=2.5,
    mtp_depth=2,
    norm_eps=1e-6,
    latent_norm_eps=1e-6,
    rope_base=10_000.0,
    yarn=None,
    init_std=0.006,
)


def config(**changes: Any) -> ModelConfig:
    """`CONFIG` with some fields changed."""
    return replace(CONFIG, **changes)


def parts(cfg: ModelConfig, **changes: Any) -> tuple[ModelConfig, NumericsConfig, ShardingRules]:
    """What every module is built from: FP32, nothing recomputed, unless `changes` say otherwise."""
    return cfg, numerics(**changes), ShardingRules()


def numerics(**changes: Any) -> NumericsConfig:
    return replace(NumericsConfig(compute="fp32", moments="fp32", remat="none"), **changes)


def experiment(
    model: ModelConfig = CONFIG, *, seq_len: int = 9, **changes: Any
) -> ExperimentConfig:
    """An experiment around the small model, at full learning rate from the first step."""
    tiny = v3_tiny()
    cfg = replace(
        tiny,
        name="small",
        model=model,
        numerics=numerics(),
        data=replace(tiny.data, seq_len=seq_len, tokenizer_vocab_size=model.vocab_size),
        optim=replace(tiny.optim, warmup_steps=0),
        balance=replace(tiny.balance, bias_speed=((1e9, 0.01),), sequence_alpha=0.05),
        mtp_weight=((1e9, 0.3),),
    )
    return replace(cfg, **changes)


def batch(
    cfg: ExperimentConfig, n_rows: int, seed: int = 3, padding: int = 0
) -> tuple[np.ndarray, ...]:
    """Random rows `[n_rows, seq_len + 1]` and segments; the first row ends in `padding`."""
    rng = np.random.default_rng(seed)
    shape = (n_rows, cfg.data.seq_len + 1)
    tokens = rng.integers(0, cfg.model.vocab_size, shape).astype(np.int32)
    segments = np.ones(shape, np.int32)
    if padding:
        segments[0, -padding:] = 0
    return tokens, segments


def _matrix(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(0, 0.25, shape)


def _norm(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return 1 + rng.normal(0, 0.2, shape)


def block_params(
    rng: np.random.Generator, cfg: ModelConfig, lead: tuple[int, ...], moe: bool
) -> dict:
    """One block, or a stack of them with leading axes `lead`."""
    d, f = cfg.dim, cfg.expert_ffn_dim if moe else cfg.dense_ffn_dim
    q_head = cfg.nope_head_dim + cfg.rope_head_dim
    kv_head = cfg.nope_head_dim + cfg.v_head_dim
    latent = cfg.q_latent_dim
    if latent is None:
        queries = {"q_proj": _matrix(rng, *lead, d, cfg.n_heads * q_head)}
    else:
        queries = {
            "q_a_proj": _matrix(rng, *lead, d, latent),
            "q_a_layernorm": _norm(rng, *lead, latent),
            "q_b_proj": _matrix(rng, *lead, latent, cfg.n_heads * q_head),
        }
    attention = queries | {
        "kv_a_proj_with_mqa": _matrix(rng, *lead, d, cfg.kv_latent_dim + cfg.rope_head_dim),
        "kv_a_layernorm": _norm(rng, *lead, cfg.kv_latent_dim),
        "kv_b_proj": _matrix(rng, *lead, cfg.kv_latent_dim, cfg.n_heads * kv_head),
        "o_proj": _matrix(rng, *lead, cfg.n_heads * cfg.v_head_dim, d),
    }
    mlp: dict[str, Any] = {
        "gate_up_proj": _matrix(rng, *lead, d, 2 * f),
        "down_proj": _matrix(rng, *lead, f, d),
    }
    if moe:
        e, shared = cfg.n_experts, cfg.n_shared_experts * f
        mlp = {
            "gate": _matrix(rng, *lead, d, e),
            "experts": {
                "gate_up_proj": _matrix(rng, *lead, e, d, 2 * f),
                "down_proj": _matrix(rng, *lead, e, f, d),
            },
        }
        if shared:
            mlp["shared_experts"] = {
                "gate_up_proj": _matrix(rng, *lead, d, 2 * shared),
                "down_proj": _matrix(rng, *lead, shared, d),
            }
    return {
        "input_layernorm": _norm(rng, *lead, d),
        "post_attention_layernorm": _norm(rng, *lead, d),
        "self_attn": attention,
        "mlp": mlp,
    }


def params(cfg: ModelConfig, seed: int = 0) -> dict:
    """The whole parameter tree in float64."""
    rng = np.random.default_rng(seed)
    tree: dict[str, Any] = {
        "embed_tokens": _matrix(rng, cfg.vocab_size, cfg.dim) * 3,
        "norm": _norm(rng, cfg.dim),
        "lm_head": _matrix(rng, cfg.dim, cfg.vocab_size),
    }
    if cfg.n_dense_layers:
        tree["dense_layers"] = block_params(rng, cfg, (cfg.n_dense_layers,), moe=False)
    if cfg.n_moe_layers:
        tree["moe_layers"] = block_params(rng, cfg, (cfg.n_moe_layers,), moe=True)
    for k in range(cfg.mtp_depth):
        tree[f"mtp_layers_{k}"] = {
            "enorm": _norm(rng, cfg.dim),
            "hnorm": _norm(rng, cfg.dim),
            "eh_proj": _matrix(rng, 2 * cfg.dim, cfg.dim),
            "block": block_params(rng, cfg, (), moe=True),
            "shared_head_norm": _norm(rng, cfg.dim),
        }
    return tree


def router_state(cfg: ModelConfig, seed: int = 1) -> dict:
    """Router biases far from zero, many of them so negative that the biased score is."""
    rng = np.random.default_rng(seed)
    state: dict[str, Any] = {}
    if cfg.n_moe_layers:
        bias_LE = rng.normal(-0.4, 0.5, (cfg.n_moe_layers, cfg.n_experts))
        state["moe_layers"] = {"mlp": {"e_score_correction_bias": bias_LE}}
    for k in range(cfg.mtp_depth):
        bias_E = rng.normal(-0.4, 0.5, cfg.n_experts)
        state[f"mtp_layers_{k}"] = {"block": {"mlp": {"e_score_correction_bias": bias_E}}}
    return state


def to_jax(tree: Any) -> Any:
    """The tree as FP32 device arrays."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def apply(module: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """`module.apply`, which Flax types as if it might return the variables too."""
    return module.apply(variables, *args, **kwargs)


def to_numpy(tree: Any) -> Any:
    """The tree as float64 NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def directional_derivatives(
    f: Callable[[Any], float], tree: Any, seed: int = 2
) -> dict[str, float]:
    """Central differences of `f` along one random direction for each leaf, keyed by its path."""
    rng = np.random.default_rng(seed)
    leaves, treedef = jax.tree.flatten_with_path(tree)
    values = [leaf for _, leaf in leaves]
    derivatives = {}
    for i, (path, leaf) in enumerate(leaves):
        step = 1e-6 * rng.normal(size=leaf.shape)
        ends = []
        for sign in (1, -1):
            moved = [*values[:i], leaf + sign * step, *values[i + 1 :]]
            ends.append(f(jax.tree.unflatten(treedef, moved)))
        derivatives[jax.tree_util.keystr(path)] = (ends[0] - ends[1]) / 2e-6
    return derivatives


def along_same_directions(gradient: Any, seed: int = 2) -> dict[str, float]:
    """A gradient tree's products with the directions that `directional_derivatives` takes."""
    rng = np.random.default_rng(seed)
    return {
        jax.tree_util.keystr(path): float(
            np.sum(np.asarray(leaf, np.float64) * rng.normal(size=leaf.shape))
        )
        for path, leaf in jax.tree.flatten_with_path(gradient)[0]
    }


def assert_same_derivatives(
    gradient: Any, f: Callable[[Any], float], tree: Any, rtol: float = 2e-3
) -> None:
    """Asserts that `gradient` agrees with finite differences of the reference, leaf by leaf."""
    wanted, got = directional_derivatives(f, tree), along_same_directions(gradient)
    assert wanted.keys() == got.keys()
    size = max(abs(w) for w in wanted.values())
    for path, value in wanted.items():
        np.testing.assert_allclose(got[path], value, rtol=rtol, atol=1e-5 * size, err_msg=path)
