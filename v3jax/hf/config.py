"""`config.json` of the public checkpoint format, both ways.

Read in the form DeepSeek released (`rope_scaling` with `type`) and in the one current transformers
write (`rope_parameters` with `rope_type`). Every field is used, checked, or known to change
nothing; any other is refused by name. Written in the released form, which both read.
"""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v3jax.config import ModelConfig, YarnConfig
from v3jax.hf import files
from v3jax.hf.files import shown

FP8_BLOCK = 128
LATENT_NORM_EPS = 1e-6
"""Of the norms of both latents: the format has no field for it."""
MAX_CONFIG = 2**20
"""Bytes of a config.json; the released one has 1,660."""
MAX_EXPERTS = 2**18
"""Experts of all layers together; the release has 15,104."""

_SIZES = {  # field of the format -> field of ModelConfig, least value
    "vocab_size": ("vocab_size", 1),
    "hidden_size": ("dim", 1),
    "num_hidden_layers": ("n_layers", 1),
    "first_k_dense_replace": ("n_dense_layers", 0),
    "num_attention_heads": ("n_heads", 1),
    "q_lora_rank": ("q_latent_dim", 1),
    "kv_lora_rank": ("kv_latent_dim", 1),
    "qk_nope_head_dim": ("nope_head_dim", 1),
    "qk_rope_head_dim": ("rope_head_dim", 1),
    "v_head_dim": ("v_head_dim", 1),
    "intermediate_size": ("dense_ffn_dim", 1),
    "moe_intermediate_size": ("expert_ffn_dim", 1),
    "n_shared_experts": ("n_shared_experts", 1),
    "n_routed_experts": ("n_experts", 1),
    "num_experts_per_tok": ("top_k", 1),
    "n_group": ("n_groups", 1),
    "topk_group": ("top_groups", 1),
    "num_nextn_predict_layers": ("mtp_depth", 0),
}
_REALS = {
    "routed_scaling_factor": "route_scale",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
}
_YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_seq_len",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
# Of the fields that may be left out.
_DEFAULTS: dict[str, Any] = {
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.02,
    "rope_theta": 10_000.0,
    "beta_fast": 32,
    "beta_slow": 1,
}

# What the model is; another value is another model. Fields that are left out have this value.
_FIXED = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "is_encoder_decoder": False,
}
_FIXED_ROPE = {"truncate": True, "attention_factor": None, "partial_rotary_factor": 1.0}
_FIXED_FP8 = {
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "expert_dtype": "fp8",
}
# Whatever they say, each tensor's header says whether it is FP8, and its scales are FP32.
_FP8_WITHOUT_EFFECT = {
    "dequantize",
    "modules_to_convert",
    "modules_to_not_convert",
    "scale_fmt",
}
# What has no part in the forward pass of a checkpoint.
_WITHOUT_EFFECT = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "auto_map",
    "aux_loss_alpha",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "ep_size",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "seq_aux",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# What is read on its own.
_READ = {
    "head_dim",
    "max_position_embeddings",
    "model_type",
    "num_key_value_heads",
    "qk_head_dim",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
}


@dataclass(frozen=True)
class HFConfig:
    """What a `config.json` says."""

    model: ModelConfig
    fp8: bool
    """Linear weights are FP8 with a scale for every block of 128 x 128."""
    max_positions: int
    raw: dict[str, Any]


def read(directory: Path) -> HFConfig:
    """The config of a checkpoint directory.

    Raises:
      ValueError: no config.json, or one of another model; the message names file and field.
    """
    try:
        file = files.inside(directory, "config.json", "the sizes of the model")
        raw = files.read_json(file, MAX_CONFIG)
    except OSError as error:
        raise ValueError(f"{directory}: config.json cannot be read ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object")
    try:
        return parse(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def parse(raw: dict[str, Any]) -> HFConfig:
    """The config in a decoded `config.json`.

    Raises:
      ValueError: a field is missing, of the wrong kind, unknown, or of another model.
    """
    kind = raw.get("model_type")
    if kind != "deepseek_v3":
        raise ValueError(
            f"model_type={shown(kind)} is not supported, only 'deepseek_v3': other models, V2 "
            "with its softmax router among them, compute something else"
        )
    _check_fixed(raw, _FIXED)
    known = _SIZES.keys() | _REALS.keys() | _FIXED.keys() | _WITHOUT_EFFECT | _READ
    _refuse_unknown(raw, known)
    values: dict[str, Any] = {}
    for name, (ours, least) in _SIZES.items():
        values[ours] = None
        if name != "q_lora_rank" or _field(raw, name) is not None:
            values[ours] = _size(raw, name, least)
    for name, ours in _REALS.items():
        values[ours] = _positive(raw, name)
    values["n_dense_layers"] = min(values["n_dense_layers"], values["n_layers"])
    n_layers = values["n_layers"] + values["mtp_depth"]
    if n_layers * values["n_experts"] > MAX_EXPERTS:
        raise ValueError(
            f"num_hidden_layers and n_routed_experts give {n_layers} layers of "
            f"{values['n_experts']} experts, more than {MAX_EXPERTS} together"
        )
    theta, yarn = _rope(raw)
    model = _model(values | {"rope_base": theta, "yarn": yarn})
    _check_derived(raw, model)
    return HFConfig(model, _is_fp8(raw), _size(raw, "max_position_embeddings"), raw)


def _model(values: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig(**values, latent_norm_eps=LATENT_NORM_EPS)
    except ValueError as error:  # which has our name of the field
        ours, _, remedy = str(error).removeprefix("model.").partition(": ")
        theirs = {field: name for name, (field, _) in _SIZES.items()}
        raise ValueError(f"{theirs.get(ours, ours)}: {remedy}") from None


def _refuse_unknown(raw: dict[str, Any], known: Set[str], within: str = "") -> None:
    for name in sorted(raw.keys() - known):
        label = name if name.isprintable() and len(name) < 100 else shown(name)
        raise ValueError(
            f"unknown field {within}{label}={shown(raw[name])}; drop it if it changes nothing"
        )


def _check_fixed(raw: dict[str, Any], wanted: dict[str, Any], within: str = "") -> None:
    for name, value in wanted.items():
        if name in raw and not _same(raw[name], value):
            raise ValueError(f"{within}{name}={shown(raw[name])} is not supported, only {value!r}")


def _same(value: Any, wanted: Any) -> bool:
    """Equal, and not a truth value where a number is wanted or the other way round."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _field(raw: dict[str, Any], name: str, within: str = "") -> Any:
    if name in raw:
        return raw[name]
    if name in _DEFAULTS:
        return _DEFAULTS[name]
    raise ValueError(f"{within}{name} is missing")


def _size(raw: dict[str, Any], name: str, least: int = 1, within: str = "") -> int:
    value = _field(raw, name, within)
    if type(value) is not int or not least <= value < 2**31:
        raise ValueError(
            f"{within}{name}={shown(value)} is no whole number of at least {least}, below 2^31"
        )
    return value


def _positive(raw: dict[str, Any], name: str, within: str = "") -> float:
    value = _field(raw, name, within)
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{within}{name}={shown(value)} is no positive number, below 1e30")
    return float(value)


def _check_derived(raw: dict[str, Any], model: ModelConfig) -> None:
    """Fields that repeat others must agree with them."""
    expected = {
        "num_key_value_heads": model.n_heads,
        "head_dim": model.rope_head_dim,
        "qk_head_dim": model.nope_head_dim + model.rope_head_dim,
    }
    for name, value in expected.items():
        if raw.get(name) is not None and not _same(raw[name], value):
            raise ValueError(
                f"{name}={shown(raw[name])} is not {value}, which the other fields give"
            )


def _rope(raw: dict[str, Any]) -> tuple[float, YarnConfig | None]:
    """RoPE's base and YaRN, from either form."""
    name, rope = _rope_object(raw)
    within = f"{name}."
    kinds = [rope.pop(key) for key in ("rope_type", "type") if key in rope] or ["default"]
    if kinds[0] != kinds[-1]:
        raise ValueError(f"{within}rope_type={shown(kinds[0])} is not its type={shown(kinds[-1])}")
    if kinds[0] not in ("default", "yarn"):
        raise ValueError(
            f"{within}type={shown(kinds[0])} is not supported, only 'default' and 'yarn'"
        )
    bases = [_positive(fields, "rope_theta") for fields in (rope, raw) if "rope_theta" in fields]
    base, *others = bases or [_DEFAULTS["rope_theta"]]
    if base <= 1 or others not in ([], [base]):
        raise ValueError(f"rope_theta={base} is not above 1, or not the {others} beside it")
    _check_fixed(rope, _FIXED_ROPE, within)
    known = _FIXED_ROPE.keys() | {"rope_theta"}
    if kinds[0] == "default":
        _refuse_unknown(rope, known, within)
        return base, None
    _refuse_unknown(rope, known | _YARN.keys() | {"mscale", "mscale_all_dim"}, within)
    return base, _yarn(rope, within)


def _rope_object(raw: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Which of the two forms is there, and a copy of it."""
    found = {n: raw[n] for n in ("rope_scaling", "rope_parameters") if raw.get(n) is not None}
    for name, rope in found.items():
        if not isinstance(rope, dict):
            raise ValueError(f"{name}={shown(rope)} is not an object")
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        raise ValueError("rope_scaling and rope_parameters are not the same; drop one of them")
    return next(((name, dict(rope)) for name, rope in found.items()), ("rope_parameters", {}))


def _yarn(rope: dict[str, Any], within: str) -> YarnConfig:
    """YaRN whose temperature scales all of the logits, and so neither cosines nor sines."""
    mscale, of_logits = (_positive(rope, n, within) for n in ("mscale", "mscale_all_dim"))
    if mscale != of_logits:
        raise ValueError(
            f"{within}mscale={mscale} and {within}mscale_all_dim={of_logits} are not supported: "
            "the model has but one"
        )
    fast, slow = (_positive(rope, n, within) for n in ("beta_fast", "beta_slow"))
    if fast < slow:
        raise ValueError(f"{within}beta_fast={fast} is below {within}beta_slow={slow}")
    factor = _positive(rope, "factor", within)
    if factor < 1:
        raise ValueError(f"{within}factor={factor} is below 1")
    return YarnConfig(
        factor=factor,
        original_seq_len=_size(rope, "original_max_position_embeddings", within=within),
        beta_fast=fast,
        beta_slow=slow,
        mscale=mscale,
    )


def _is_fp8(raw: dict[str, Any]) -> bool:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return False
    if not isinstance(quantization, dict):
        raise ValueError(f"quantization_config={shown(quantization)} is not an object")
    within = "quantization_config."
    for name in ("quant_method", "weight_block_size"):
        _field(quantization, name, within)
    _check_fixed(quantization, _FIXED_FP8, within)
    _refuse_unknown(quantization, _FIXED_FP8.keys() | _FP8_WITHOUT_EFFECT, within)
    return True


def without_effect(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that have no part in the model, types of weights left out."""
    kept = _WITHOUT_EFFECT - {"dtype", "torch_dtype"}
    return {name: raw[name] for name in sorted(raw.keys() & kept)}


def render(model: ModelConfig, *, dtype: str, fp8: bool, max_positions: int) -> dict[str, Any]:
    """The `config.json` of `model`, in the released form; `dtype` is that of unquantised tensors.

    Raises:
      ValueError: the model has something the format cannot say; the message names the field.
    """
    if model.latent_norm_eps != LATENT_NORM_EPS:
        raise ValueError(
            f"model.latent_norm_eps={model.latent_norm_eps}: only {LATENT_NORM_EPS} can be told"
        )
    if model.router_bias != "added":
        raise ValueError(f"model.router_bias={model.router_bias}: only 'added' can be told")
    raw: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "model_type": "deepseek_v3",
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": model.n_heads,
        "rope_scaling": None,
        "rope_theta": model.rope_base,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": dtype,
        "use_cache": True,
    }
    raw |= {name: getattr(model, ours) for name, (ours, _) in _SIZES.items()}
    raw |= {name: getattr(model, ours) for name, ours in _REALS.items()}
    if model.yarn is not None:
        yarn = model.yarn
        raw["rope_scaling"] = {"type": "yarn", "mscale": yarn.mscale, "mscale_all_dim": yarn.mscale}
        raw["rope_scaling"] |= {name: getattr(yarn, ours) for name, ours in _YARN.items()}
    if fp8:
        raw["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    parse(raw)  # what the format cannot say, such as a model without shared experts
    return dict(sorted(raw.items()))
