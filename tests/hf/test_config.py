"""`config.json` as released and as current transformers write it; every other one is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.v3 import v3_full
from tests.hf.small import ODD, at_most, refused
from v3jax.config import ModelConfig, YarnConfig
from v3jax.hf import config as hf_config
from v3jax.hf.config import parse, render

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
RELEASED: dict[str, Any] = {  # DeepSeek-V3's config.json
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
# DeepseekV3Config().to_dict() of transformers 5.23.0, recorded.
TO_DICT = json.loads("""{
  "_name_or_path": "", "architectures": null, "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 0, "chunk_size_feed_forward": 0, "dtype": null, "eos_token_id": 1,
  "first_k_dense_replace": 3, "head_dim": 64, "hidden_act": "silu", "hidden_size": 7168,
  "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "initializer_range": 0.02,
  "intermediate_size": 18432, "is_encoder_decoder": false, "kv_lora_rank": 512,
  "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "max_position_embeddings": 4096,
  "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "n_group": 8,
  "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
  "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
  "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "output_attentions": false,
  "output_hidden_states": false, "output_router_logits": false, "pad_token_id": null,
  "pretraining_tp": 1, "problem_type": null, "q_lora_rank": 1536, "qk_head_dim": 192,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "return_dict": true, "rms_norm_eps": 1e-06,
  "rope_interleave": true, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
  "routed_scaling_factor": 2.5, "tie_word_embeddings": false, "topk_group": 4,
  "transformers_version": "5.23.0", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280
}""")
# What the same makes of the released rope_scaling, and of FineGrainedFP8Config().
TO_DICT_YARN = {
    "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000},
    "quantization_config": {
        "quant_method": "fp8",
        "modules_to_not_convert": ["lm_head"],
        "modules_to_convert": None,
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "dequantize": False,
        "scale_fmt": "float",
        "expert_dtype": "fp8",
    },
}
V2_LITE = {  # DeepSeek-V2-Lite's config.json
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V3 = replace(  # the report's model as released: after the context extension, std a default
    v3_full().model,
    init_std=0.02,
    yarn=YarnConfig(factor=40.0, original_seq_len=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0),
)


def without(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in names}


# Both forms


def test_the_released_config_is_the_report_s_model() -> None:
    config = parse(RELEASED)
    assert config.model == V3
    assert (config.fp8, config.max_positions, config.raw) == (True, 163_840, RELEASED)


def test_what_transformers_write_is_the_same_model() -> None:
    config = parse(TO_DICT)
    assert config.model == replace(V3, yarn=None)
    assert (config.fp8, config.max_positions) == (False, 4096)
    config = parse(TO_DICT | TO_DICT_YARN)
    assert (config.model, config.fp8) == (V3, True)


def test_both_forms_of_rope_say_the_same() -> None:
    raw = without(RELEASED, "rope_scaling", "rope_theta")
    yarn = without(YARN, "type")
    base = {"rope_theta": 50_000.0}
    forms = [
        {"rope_scaling": YARN} | base,
        {"rope_scaling": YARN | {"rope_type": "yarn"}} | base,
        {"rope_scaling": yarn | {"rope_type": "yarn"}, "rope_parameters": None} | base,
        {"rope_parameters": yarn | {"rope_type": "yarn"} | base},
        {"rope_parameters": YARN | base, "rope_scaling": None} | base,
        {"rope_parameters": YARN | base, "rope_scaling": YARN | base},
        {"rope_scaling": without(YARN, "beta_fast", "beta_slow") | {"truncate": True}} | base,
        {"rope_parameters": YARN | {"attention_factor": None, "partial_rotary_factor": 1.0} | base},
    ]
    for form in forms:
        assert parse(raw | form).model == replace(V3, rope_base=50_000.0), form


def test_without_yarn_only_the_base_is_left() -> None:
    raw = without(RELEASED, "rope_scaling", "rope_theta")
    plain = replace(V3, yarn=None)
    for form in ({}, {"rope_scaling": None}, {"rope_scaling": {}}, {"rope_parameters": None}):
        assert parse(raw | form).model == plain
        assert parse(raw | form | {"rope_theta": 7}).model == replace(plain, rope_base=7.0)
    for form in ({"rope_type": "default"}, {"rope_theta": 7.0}, {"type": "default"}):
        wanted = replace(plain, rope_base=form.get("rope_theta", 10_000.0))
        assert parse(raw | {"rope_parameters": form}).model == wanted


def test_fields_with_a_default_may_be_left_out() -> None:
    names = ("num_nextn_predict_layers", "initializer_range", "scoring_func", "topk_method")
    names += ("moe_layer_freq", "hidden_act", "attention_bias", "num_key_value_heads")
    assert parse(without(RELEASED, *names)).model == replace(V3, mtp_depth=0)
    assert not parse(without(RELEASED, "quantization_config")).fp8
    assert parse(RELEASED | {"q_lora_rank": None}).model == replace(V3, q_latent_dim=None)


def test_more_dense_layers_than_layers_are_all_of_them() -> None:
    assert parse(RELEASED | {"first_k_dense_replace": 99}).model.n_dense_layers == 61


def test_fields_without_effect_are_kept_for_the_way_back() -> None:
    kept = hf_config.without_effect(RELEASED)
    assert kept.keys() == {
        *("architectures", "auto_map", "aux_loss_alpha", "bos_token_id", "eos_token_id"),
        *("ep_size", "pretraining_tp", "seq_aux", "transformers_version", "use_cache"),
    }
    assert all(RELEASED[name] == value for name, value in kept.items())


# What is refused


def test_another_model_is_refused_by_its_name_before_anything_else() -> None:
    with refused("model_type='deepseek_v2'", "'deepseek_v3'", "V2", "softmax"):
        parse(V2_LITE)
    with refused("model_type='llama'"):
        parse({"model_type": "llama", "hidden_size": -1, "rope_scaling": 3})
    with refused("model_type=None"):
        parse(without(RELEASED, "model_type"))


def test_v2_s_router_is_refused_under_v3_s_name() -> None:
    with refused("scoring_func='softmax'", "only 'sigmoid'"):
        parse(V2_LITE | {"model_type": "deepseek_v3"})
    for name, value in (("topk_method", "greedy"), ("norm_topk_prob", False)):
        with refused(f"{name}={value!r} is not supported, only"):
            parse(RELEASED | {name: value})


WRONG: list[tuple[str, Any]] = [
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("attention_bias", 0),
    ("attention_bias", None),
    ("attention_dropout", 0.1),
    ("attention_dropout", False),
    ("moe_layer_freq", 2),
    ("moe_layer_freq", True),
    ("norm_topk_prob", 1),
    ("norm_topk_prob", "true"),
    ("scoring_func", None),
    ("tie_word_embeddings", True),
    ("rope_interleave", False),
    ("is_encoder_decoder", True),
    ("num_key_value_heads", 8),
    ("num_key_value_heads", True),
    ("head_dim", 128),
    ("qk_head_dim", 128),
    ("q_lora_rank", 0),
    ("q_lora_rank", -1),
    ("max_position_embeddings", 0),
    ("max_position_embeddings", 4096.0),
    ("max_position_embeddings", None),
    ("num_nextn_predict_layers", -1),
    ("n_shared_experts", 0),
    ("vocab_size", 2**31),
    ("vocab_size", 10**400),
    ("rope_theta", 0),
    ("rope_theta", 1.0),
    ("rope_theta", -10000.0),
    ("rope_theta", True),
    ("rope_theta", "10000"),
    ("rope_theta", 10**400),
    ("rope_theta", float("nan")),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", -1e-6),
    ("rms_norm_eps", float("inf")),
    ("rms_norm_eps", False),
    ("routed_scaling_factor", None),
    ("routed_scaling_factor", float("nan")),
    ("initializer_range", "0.02"),
    ("quantization_config", []),
    ("quantization_config", True),
    ("rope_scaling", "yarn"),
    ("rope_parameters", [YARN]),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_of_another_model_or_kind_is_named(name: str, value: Any) -> None:
    with refused(f"{name}="):
        parse(RELEASED | {name: value})


SIZES = [
    *("vocab_size", "hidden_size", "num_hidden_layers", "first_k_dense_replace"),
    *("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("intermediate_size", "moe_intermediate_size", "n_shared_experts", "n_routed_experts"),
    *("num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings"),
]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_there_and_whole_and_not_negative(name: str) -> None:
    for value in (-1, 64.0, True, None, "64", [64], float("nan"), 2**31):
        with refused(f"{name}="):
            parse(RELEASED | {name: value})
    with refused(f"{name} is missing"):
        parse(without(RELEASED, name))


@pytest.mark.parametrize("name", ["routed_scaling_factor", "rms_norm_eps"])
def test_numbers_without_a_default_are_there(name: str) -> None:
    with refused(f"{name} is missing"):
        parse(without(RELEASED, name))


def test_an_unknown_field_is_named() -> None:
    with refused("unknown field n_hash_layers=3"):
        parse(RELEASED | {"n_hash_layers": 3})
    with refused(r"unknown field 'a\nb'="):
        parse(RELEASED | {"a\nb": "x" * 10_000})
    with refused("unknown field rope_scaling.low_freq_factor=1"):
        parse(RELEASED | {"rope_scaling": YARN | {"low_freq_factor": 1}})
    with refused("unknown field rope_parameters.factor=40"):
        parse(TO_DICT | {"rope_parameters": {"rope_type": "default", "factor": 40}})
    with refused("unknown field quantization_config.bits=8"):
        parse(RELEASED | {"quantization_config": FP8 | {"bits": 8}})


WRONG_YARN: list[tuple[str, Any]] = [
    ("type", "linear"),
    ("type", "dynamic"),
    ("type", None),
    ("type", []),
    ("rope_type", "default"),
    ("factor", 0.5),
    ("factor", None),
    ("factor", True),
    ("factor", "40"),
    ("factor", float("nan")),
    ("original_max_position_embeddings", 4096.0),
    ("original_max_position_embeddings", 0),
    ("original_max_position_embeddings", False),
    ("beta_fast", 0),
    ("beta_fast", 0.5),
    ("beta_slow", None),
    ("beta_slow", -1),
    ("mscale", 0.707),
    ("mscale", 0),
    ("mscale", True),
    ("mscale_all_dim", 0.5),
    ("mscale_all_dim", float("nan")),
    ("mscale_all_dim", None),
    ("attention_factor", 1.2),
    ("truncate", False),
    ("partial_rotary_factor", 0.5),
]


@pytest.mark.parametrize(("name", "value"), WRONG_YARN)
def test_yarn_of_another_kind_is_named(name: str, value: Any) -> None:
    for form in ("rope_scaling", "rope_parameters"):
        with refused(form, name):
            parse(without(RELEASED, "rope_scaling") | {form: YARN | {name: value}})


@pytest.mark.parametrize(
    "name", ["factor", "original_max_position_embeddings", "mscale", "mscale_all_dim"]
)
def test_yarn_says_all_that_changes_the_logits(name: str) -> None:
    with refused(f"rope_scaling.{name} is missing"):
        parse(RELEASED | {"rope_scaling": without(YARN, name)})


def test_two_statements_that_differ_are_refused() -> None:
    with refused("rope_theta=500.0", "10000.0"):
        parse(RELEASED | {"rope_scaling": YARN | {"rope_theta": 500.0}})
    with refused("rope_scaling and rope_parameters are not the same"):
        parse(RELEASED | {"rope_parameters": YARN | {"factor": 20}})


WRONG_FP8: list[tuple[str, Any]] = [
    ("quant_method", "gptq"),
    ("quant_method", None),
    ("fmt", "e5m2"),
    ("activation_scheme", "static"),
    ("weight_block_size", [64, 128]),
    ("weight_block_size", [128]),
    ("weight_block_size", None),
    ("weight_block_size", 128),
    ("expert_dtype", "fp4"),
]


@pytest.mark.parametrize(("name", "value"), WRONG_FP8)
def test_another_quantisation_is_named(name: str, value: Any) -> None:
    with refused(f"quantization_config.{name}={value!r} is not supported, only"):
        parse(RELEASED | {"quantization_config": FP8 | {name: value}})


def test_a_quantisation_names_its_method_and_block() -> None:
    for name in ("quant_method", "weight_block_size"):
        with refused(f"quantization_config.{name} is missing"):
            parse(RELEASED | {"quantization_config": without(FP8, name)})
    for name in ("fmt", "activation_scheme"):
        assert parse(RELEASED | {"quantization_config": without(FP8, name)}).fp8


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_group": 3}, "n_group: 3 groups do not divide 256 experts"),
        ({"topk_group": 9}, "topk_group: must be within 1..n_groups=8, got 9"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok: 129 experts do not fit"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: must be even"),
    ],
)
def test_sizes_that_do_not_fit_together_are_named_as_the_file_names_them(
    tmp_path: Path, changes: dict[str, int], named: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | changes))
    with refused(f"{tmp_path / 'config.json'}: {named}"):
        hf_config.read(tmp_path)


def test_a_model_of_more_tensors_than_can_be_listed_is_refused_at_once() -> None:
    huge = {"num_hidden_layers": 2**30, "n_routed_experts": 2**30}
    for changes in (
        huge,
        {"num_hidden_layers": 2**30},
        {"n_routed_experts": 2**30},
        {"num_nextn_predict_layers": 2**30},
    ):
        with at_most(2**20), refused("num_hidden_layers and n_routed_experts"):
            parse(RELEASED | changes)


# The file


def test_the_file_is_read_as_it_is_parsed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    assert hf_config.read(tmp_path) == parse(RELEASED)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "no JSON"),
        (b"\xff{}", "no JSON"),
        (b"[]", "not a JSON object"),
        (b'"deepseek_v3"', "not a JSON object"),
        (b"{'model_type': 'deepseek_v3'}", "no JSON"),
        (b'{"vocab_size": 1, "vocab_size": 2}', "'vocab_size' is there twice"),
        (b'{"rms_norm_eps": NaN}', "NaN is no number"),
        (b'{"rms_norm_eps": -Infinity}', "-Infinity is no number"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b" " * (hf_config.MAX_CONFIG + 1), "longer than"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: bytes, named: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with refused(tmp_path / "config.json", named):
        hf_config.read(tmp_path)


def test_a_missing_file_or_one_from_elsewhere_is_named(tmp_path: Path) -> None:
    folder, file = tmp_path / "hf", tmp_path / "hf" / "config.json"
    folder.mkdir()
    with refused(file, "missing"):
        hf_config.read(folder)
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    file.symlink_to("../config.json")
    with refused(file, "a link out of the directory"):
        hf_config.read(folder)
    file.unlink()
    os.mkfifo(file)
    with refused(file, "not a file"):
        hf_config.read(folder)


def test_a_number_too_large_for_floats_is_refused(tmp_path: Path) -> None:
    text = json.dumps(RELEASED).replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e999')
    (tmp_path / "config.json").write_text(text)
    with refused(tmp_path / "config.json", "rms_norm_eps=inf"):
        hf_config.read(tmp_path)


def mutate(rng: np.random.Generator, raw: dict[str, Any]) -> dict[str, Any]:
    """A copy with one field, perhaps of an object within, dropped, added or replaced."""
    name = str(rng.choice([*raw, "other"]))
    inner = raw.get(name)
    if isinstance(inner, dict) and inner and rng.random() < 0.7:
        return raw | {name: mutate(rng, inner)}
    if rng.random() < 0.15:
        return without(raw, name)
    if rng.random() < 0.5:
        return raw | {name: ODD[rng.integers(len(ODD))]}
    values = [2, 4, 8, 64, 0.5, 3e-5, 10_000, "yarn", "default", True, None, YARN, FP8]
    return raw | {name: values[rng.integers(len(values))]}


@pytest.mark.parametrize("good", [RELEASED, TO_DICT | TO_DICT_YARN], ids=["released", "current"])
def test_a_config_changed_at_random_is_a_model_or_one_line(
    tmp_path: Path, good: dict[str, Any]
) -> None:
    rng = np.random.default_rng(4)
    file = tmp_path / "config.json"
    n_models = 0
    for _ in range(2500):
        raw = good
        for _ in range(rng.integers(1, 4)):
            raw = mutate(rng, raw)
        file.write_text(json.dumps(raw))
        try:
            config = hf_config.read(tmp_path)
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{file}: ")
            assert len(message.splitlines()) == 1
            assert len(message) < 1500
            continue
        n_models += 1
        written = render(config.model, dtype="x", fp8=config.fp8, max_positions=8)
        assert parse(written).model == config.model
    assert 100 < n_models < 2000


# Written


def random_model(rng: np.random.Generator) -> ModelConfig:
    def size(most: int = 300) -> int:
        return int(rng.integers(1, most))

    def real(most: float) -> float:
        return float(rng.uniform(1e-9, most))

    n_groups, per_group, n_layers = size(9), size(9), size(9)
    top_groups = int(rng.integers(1, n_groups + 1))
    yarn = YarnConfig(
        factor=1 + real(64),
        original_seq_len=size(8192),
        beta_fast=1 + real(64),
        beta_slow=real(1),
        mscale=real(2),
    )
    return ModelConfig(
        vocab_size=size(),
        dim=size(),
        n_layers=n_layers,
        n_dense_layers=int(rng.integers(0, n_layers + 1)),
        n_heads=size(),
        q_latent_dim=size() if rng.random() < 0.7 else None,
        kv_latent_dim=size(),
        nope_head_dim=size(),
        rope_head_dim=2 * size(),
        v_head_dim=size(),
        dense_ffn_dim=size(),
        expert_ffn_dim=size(),
        n_shared_experts=size(4),
        n_experts=n_groups * per_group,
        top_k=int(rng.integers(1, top_groups * per_group + 1)),
        n_groups=n_groups,
        top_groups=top_groups,
        route_scale=real(10),
        mtp_depth=int(rng.integers(0, 3)),
        norm_eps=real(1e-3),
        latent_norm_eps=1e-6,
        rope_base=1 + real(1e6),
        yarn=yarn if rng.random() < 0.5 else None,
        init_std=real(1),
    )


def test_a_model_written_and_read_is_the_same_model() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        model = random_model(rng)
        fp8, positions = bool(rng.integers(2)), int(rng.integers(1, 10**6))
        raw = render(model, dtype="bfloat16", fp8=fp8, max_positions=positions)
        config = parse(json.loads(json.dumps(raw)))
        assert (config.model, config.fp8, config.max_positions) == (model, fp8, positions)


def test_v3_is_written_as_released() -> None:
    raw = render(V3, dtype="bfloat16", fp8=True, max_positions=163_840)
    assert raw | hf_config.without_effect(RELEASED) == RELEASED
    assert list(raw) == sorted(raw)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"latent_norm_eps": 1e-5}, "model.latent_norm_eps=1e-05: only 1e-06"),
        ({"router_bias": "multiplied"}, "model.router_bias=multiplied: only 'added'"),
        ({"n_shared_experts": 0}, "n_shared_experts=0"),
        ({"init_std": 0.0}, "initializer_range=0.0"),
        ({"rope_base": 1.0}, "rope_theta=1.0"),
    ],
)
def test_what_the_format_cannot_say_is_not_written(changes: dict[str, Any], named: str) -> None:
    with refused(named):
        render(replace(V3, **changes), dtype="bfloat16", fp8=False, max_positions=8)
