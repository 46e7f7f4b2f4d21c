"""Records tiny random checkpoints and logits from Hugging Face transformers 5.23.0 (CPU torch).

    python tests/hf/make_oracle.py tests/hf/oracle [CASE ...]

Run it in an environment with `torch` and `transformers==5.23.0`; the tests only read what it wrote.
Router biases are random and partly far below zero, so that masking groups with 0 instead of -inf
would choose other experts. The case `mtp` has two MTP modules under the names of the release; they
are loaded and run by transformers' own `MtpModel`.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

BASE = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 14,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_shared_experts": 1,
    "n_routed_experts": 12,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 7,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "num_nextn_predict_layers": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CASES = {
    "plain": {},
    "yarn": {"rope_parameters": YARN},
    "no_q_latent": {"q_lora_rank": None, "n_shared_experts": 2},
    "one_group": {"n_group": 1, "topk_group": 1, "n_routed_experts": 6, "num_experts_per_tok": 2},
    "many_experts": {
        "n_routed_experts": 40,
        "n_group": 8,
        "topk_group": 3,
        "num_experts_per_tok": 6,
        "routed_scaling_factor": 1.0,
    },
    "yarn_wide": {
        "rope_parameters": YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "qk_rope_head_dim": 10,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
        "kv_lora_rank": 20,
        "rms_norm_eps": 1e-3,
    },
    "all_moe": {"first_k_dense_replace": 0, "num_hidden_layers": 2},
    "bf16": {"rope_parameters": YARN | {"rope_theta": 50000.0}, "dtype": "bfloat16"},
    "mtp": {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 20,
        "moe_intermediate_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 8,
        "rope_parameters": YARN,
        "num_nextn_predict_layers": 2,
    },
}
LENGTHS = {"mtp": 16}


def main(root: Path, names: list[str]) -> None:
    for seed, (name, changes) in enumerate(CASES.items()):
        if not names or name in names:
            record(root / name, seed, dict(changes), LENGTHS.get(name, 45))


def record(folder: Path, seed: int, changes: dict[str, Any], length: int) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    dtype = getattr(torch, changes.pop("dtype", "float32"))
    config = DeepseekV3Config(**BASE | changes)
    model = DeepseekV3ForCausalLM(config).eval()
    scramble(model)
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if config.num_mtp_layers:
        add_mtp(folder, model)
    model = DeepseekV3ForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    tokens = rng.integers(0, config.vocab_size, (2, length))
    with torch.no_grad():
        recorded = {"logits": model(torch.tensor(tokens)).logits.numpy()}
        if config.num_mtp_layers:
            recorded |= mtp_logits(model, torch.tensor(tokens))
    assert all(np.isfinite(array).all() for array in recorded.values())
    np.savez_compressed(folder / "expected.npz", tokens=tokens, **recorded)


def scramble(model: torch.nn.Module) -> None:
    """Norm weights away from 1, router biases away from 0."""
    for key, value in model.state_dict().items():
        if "layernorm" in key or key.endswith("norm.weight"):
            value.copy_(1 + 0.3 * torch.randn_like(value))
        elif key.endswith("e_score_correction_bias"):
            value.copy_(torch.randn_like(value) - 1.5)


def add_mtp(folder: Path, main_model: DeepseekV3ForCausalLM) -> None:
    """Writes random MTP modules into the saved checkpoint, named as in the release."""
    n_layers, n_modules = main_model.config.num_hidden_layers, main_model.config.num_mtp_layers
    # Where the class expects them: its own pattern names layer 61 alone.
    patterns = [rf"model\.layers\.{n_layers + k}.*" for k in range(n_modules)]
    DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = patterns
    modules = MtpModel(main_model, n_modules)
    with torch.no_grad():  # the class does not initialise the experts by itself
        for value in modules.layers.parameters():
            value.normal_(std=main_model.config.initializer_range)
    scramble(modules.layers)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for k, module in enumerate(modules.layers):
        name = f"model.layers.{n_layers + k}"
        tensors[f"{name}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{name}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        for key, value in module.state_dict().items():
            for public, part in released(key, value):
                tensors[f"{name}.{public}"] = part.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)


def released(key: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter of `MtpLayer` under the release's names, experts apart."""
    key = key.replace("post_norm", "shared_head.norm").removeprefix("mtp_block.")
    if key == "mlp.experts.gate_up_proj":
        for expert, both in enumerate(value):
            gate, up = both.chunk(2)
            yield f"mlp.experts.{expert}.gate_proj.weight", gate
            yield f"mlp.experts.{expert}.up_proj.weight", up
    elif key == "mlp.experts.down_proj":
        for expert, down in enumerate(value):
            yield f"mlp.experts.{expert}.down_proj.weight", down
    else:
        yield key, value


def mtp_logits(model: DeepseekV3ForCausalLM, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Logits of every MTP module over the whole rows, and tokens of `generate(use_mtp=True)`.

    Module k at position i reads the token k further on; its last k positions have none.
    """
    modules = MtpModel.from_pretrained(model).eval()
    hidden = model.model(tokens).last_hidden_state
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    found = {}
    for k in range(1, model.config.num_mtp_layers + 1):
        hidden = modules.forward_layer(
            k - 1, hidden[:, :-1], positions[:, k:], None, input_ids=tokens[:, k:]
        )
        found[f"mtp_logits_{k}"] = modules._project_to_logits(hidden).numpy()
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None}
    drafted = model.generate(tokens[:1], use_mtp=True, **options)
    assert torch.equal(drafted, model.generate(tokens[:1], **options))
    return found | {"generated": drafted[0, tokens.shape[1] :].numpy()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
