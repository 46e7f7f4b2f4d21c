"""Small public checkpoints with random weights, written with the safetensors library alone.

Widths beyond 128 that are no multiple of it give FP8 blocks with ragged edges.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import deserialize
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 136,
    "initializer_range": 0.02,
    "intermediate_size": 150,
    "kv_lora_rank": 20,
    "max_position_embeddings": 640,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_group": 2,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 3,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 3,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 9,
    "vocab_size": 300,
}
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, from the format's description, MTP layers included."""
    c = config
    out = {
        "model.embed_tokens.weight": (c["vocab_size"], c["hidden_size"]),
        "model.norm.weight": (c["hidden_size"],),
        "lm_head.weight": (c["vocab_size"], c["hidden_size"]),
    }
    n_main, d = c["num_hidden_layers"], c["hidden_size"]
    heads, rope, latent = c["num_attention_heads"], c["qk_rope_head_dim"], c["kv_lora_rank"]
    for layer in range(n_main + c["num_nextn_predict_layers"]):
        name = f"model.layers.{layer}"
        attention = {
            "q_a_proj.weight": (c["q_lora_rank"], d),
            "q_a_layernorm.weight": (c["q_lora_rank"],),
            "q_b_proj.weight": (heads * (c["qk_nope_head_dim"] + rope), c["q_lora_rank"]),
            "kv_a_proj_with_mqa.weight": (latent + rope, d),
            "kv_a_layernorm.weight": (latent,),
            "kv_b_proj.weight": (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), latent),
            "o_proj.weight": (d, heads * c["v_head_dim"]),
        }
        out |= {f"{name}.self_attn.{k}": v for k, v in attention.items()}
        out[f"{name}.input_layernorm.weight"] = (d,)
        out[f"{name}.post_attention_layernorm.weight"] = (d,)
        if layer < c["first_k_dense_replace"]:
            out |= _feed_forward(f"{name}.mlp", d, c["intermediate_size"])
        else:
            out[f"{name}.mlp.gate.weight"] = (c["n_routed_experts"], d)
            out[f"{name}.mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
            width = c["moe_intermediate_size"]
            for expert in range(c["n_routed_experts"]):
                out |= _feed_forward(f"{name}.mlp.experts.{expert}", d, width)
            shared = c["n_shared_experts"] * width
            out |= _feed_forward(f"{name}.mlp.shared_experts", d, shared)
        if layer >= n_main:
            out[f"{name}.embed_tokens.weight"] = out["model.embed_tokens.weight"]
            out[f"{name}.enorm.weight"] = out[f"{name}.hnorm.weight"] = (d,)
            out[f"{name}.eh_proj.weight"] = (d, 2 * d)
            out[f"{name}.shared_head.norm.weight"] = (d,)
            out[f"{name}.shared_head.head.weight"] = out["lm_head.weight"]
    return out


def _feed_forward(name: str, dim: int, width: int) -> dict[str, tuple[int, ...]]:
    wide = {f"{name}.{half}_proj.weight": (width, dim) for half in ("gate", "up")}
    return wide | {f"{name}.down_proj.weight": (dim, width)}


def arrays(config: dict[str, Any], kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a checkpoint of `kind`: `bf16`, `fp32`, or `fp8` with scales."""
    rng = np.random.default_rng(seed)
    out: dict[str, np.ndarray] = {}
    for name, shape in shapes(config).items():
        values = rng.normal(size=shape).astype(np.float32) * 0.2
        if "norm" in name.split(".")[-2]:
            values += 1
        plain = np.float32 if kind == "fp32" else ml_dtypes.bfloat16
        projection = "_proj." in name or "_with_mqa." in name
        if name.endswith("e_score_correction_bias"):
            out[name] = (values - 5).astype(np.float32)
        elif kind == "fp8" and projection and "eh_proj" not in name:
            out[name] = (
                (rng.normal(size=shape) * 100).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
            )
            blocks = tuple(-(-n // 128) for n in shape)
            out[f"{name}_scale_inv"] = rng.uniform(1e-3, 3e-3, blocks).astype(np.float32)
        else:
            out[name] = values.astype(plain)
    for layer in range(config["num_nextn_predict_layers"]):
        name = f"model.layers.{config['num_hidden_layers'] + layer}"
        out[f"{name}.embed_tokens.weight"] = out["model.embed_tokens.weight"]
        out[f"{name}.shared_head.head.weight"] = out["lm_head.weight"]
    return out


def write(
    folder: Path,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any],
    *,
    n_shards: int = 1,
) -> Path:
    """Writes a checkpoint directory; the tensors are dealt to the shards in turn."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    files = [f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors" for i in range(n_shards)]
    if n_shards == 1:
        files = ["model.safetensors"]
    weight_map = {name: files[i % n_shards] for i, name in enumerate(tensors)}
    for file in files:
        own = {name: a for name, a in tensors.items() if weight_map[name] == file}
        save_file(own, folder / file)
    if n_shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def checkpoint(folder: Path, kind: str = "fp8", *, seed: int = 0, **changes: Any) -> Path:
    """A whole checkpoint of `kind` in three shards; `changes` go into its config."""
    config = CONFIG | changes
    if kind == "fp8":
        config["quantization_config"] = QUANTIZATION
    if kind == "fp32":
        config["torch_dtype"] = "float32"
    return write(folder, arrays(config, kind, seed), config, n_shards=3)


def contents(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of every tensor in a directory, read by the safetensors library."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, info in deserialize(file.read_bytes()):
            assert name not in out, f"{name} is stored twice"
            out[name] = (str(info["dtype"]), list(info["shape"]), bytes(info["data"]))
    return out
