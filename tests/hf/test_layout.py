"""The table of names: the released list of tensors, and each of our numbers stored exactly once."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.v3 import v3_full
from tests.hf import generated
from v3jax import hf
from v3jax.config import ModelConfig
from v3jax.hf import config as hf_config
from v3jax.hf import export, layout
from v3jax.hf.layout import Tensor
from v3jax.weights import abstract_variables, names

# The release (DeepSeek-V3's checkpoint listing): tensor, shape, whether it is FP8 with scales.
TABLE = [
    ("model.embed_tokens.weight", (129280, 7168), False),
    ("model.norm.weight", (7168,), False),
    ("lm_head.weight", (129280, 7168), False),
]
EVERY_LAYER = [
    ("input_layernorm.weight", (7168,), False),
    ("post_attention_layernorm.weight", (7168,), False),
    ("self_attn.q_a_proj.weight", (1536, 7168), True),
    ("self_attn.q_a_layernorm.weight", (1536,), False),
    ("self_attn.q_b_proj.weight", (24576, 1536), True),
    ("self_attn.kv_a_proj_with_mqa.weight", (576, 7168), True),
    ("self_attn.kv_a_layernorm.weight", (512,), False),
    ("self_attn.kv_b_proj.weight", (32768, 512), True),
    ("self_attn.o_proj.weight", (7168, 16384), True),
]
DENSE = [
    ("mlp.gate_proj.weight", (18432, 7168), True),
    ("mlp.up_proj.weight", (18432, 7168), True),
    ("mlp.down_proj.weight", (7168, 18432), True),
]
ROUTER = [("mlp.gate.weight", (256, 7168), False)]
BIAS = "mlp.gate.e_score_correction_bias"
EXPERT = [
    ("gate_proj.weight", (2048, 7168), True),
    ("up_proj.weight", (2048, 7168), True),
    ("down_proj.weight", (7168, 2048), True),
]
MTP = [
    ("embed_tokens.weight", (129280, 7168), False),
    ("enorm.weight", (7168,), False),
    ("hnorm.weight", (7168,), False),
    ("eh_proj.weight", (7168, 14336), False),
    ("shared_head.norm.weight", (7168,), False),
    ("shared_head.head.weight", (129280, 7168), False),
]


def released() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of the release."""
    rows = list(TABLE)
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(62):
        own = EVERY_LAYER + (DENSE if layer < 3 else ROUTER) + (MTP if layer == 61 else [])
        rows += [(f"model.layers.{layer}.{name}", shape, fp8) for name, shape, fp8 in own]
        if layer < 3:
            continue
        out[f"model.layers.{layer}.{BIAS}"] = ("F32", (256,))
        for expert in [*(f"experts.{i}" for i in range(256)), "shared_experts"]:
            prefix = f"model.layers.{layer}.mlp.{expert}"
            rows += [(f"{prefix}.{name}", shape, fp8) for name, shape, fp8 in EXPERT]
    for name, shape, fp8 in rows:
        out[name] = ("F8_E4M3" if fp8 else "BF16", shape)
        if fp8:
            out[f"{name}_scale_inv"] = ("F32", tuple(math.ceil(n / 128) for n in shape))
    return out


N_BYTES = 688_574_839_360
WIDTH = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


def test_the_table_is_the_release() -> None:
    table = released()
    assert len(table) == 91_991
    assert sum(math.prod(shape) for _, shape in table.values()) == 684_531_386_000
    scales = [math.prod(shape) for name, (_, shape) in table.items() if "_scale_inv" in name]
    assert sum(scales) == 41_540_496
    n_bytes = sum(WIDTH[kind] * math.prod(shape) for kind, shape in table.values())
    assert f"{n_bytes / 2**30:.2f}" == "641.29"
    assert n_bytes == N_BYTES
    assert table["model.layers.5.self_attn.kv_a_proj_with_mqa.weight_scale_inv"][1] == (5, 56)


def planned(model: ModelConfig, kind: str) -> list[Any]:
    return [part for _, parts in export.plan(model, kind) for part in parts]


def test_v3_full_is_written_with_the_tensors_of_the_release() -> None:
    plan = planned(v3_full().model, "fp8")
    types = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
    assert {part.name: (types[str(part.dtype)], part.shape) for part in plan} == released()
    assert len(plan) == 91_991, "each one once"
    assert sum(part.n_bytes for part in plan) == N_BYTES


def test_other_types_change_no_name_or_shape_and_never_the_bias() -> None:
    main = {name: shape for name, (_, shape) in released().items() if "_scale_inv" not in name}
    for kind, dtype in (("bf16", "bfloat16"), ("fp32", "float32")):
        plan = planned(v3_full().model, kind)
        assert {part.name: part.shape for part in plan} == main
        others = {str(part.dtype) for part in plan if not part.name.endswith(BIAS)}
        assert others == {dtype}
        assert {str(p.dtype) for p in plan if p.name.endswith(BIAS)} == {"float32"}


def test_the_copies_are_those_of_embedding_and_head() -> None:
    copies = {n: t.copy_of for n, t in layout.tensors(v3_full().model).items() if t.copy_of}
    assert copies == {
        "model.layers.61.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight": "lm_head.weight",
    }


MODELS = {
    "as released": {},
    "no q latent": {"q_lora_rank": None, "n_shared_experts": 3},
    "all dense": {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0},
    "no dense layer": {"first_k_dense_replace": 0},
    "two MTP modules": {"num_nextn_predict_layers": 2, "num_hidden_layers": 4},
}


def model_of(changes: dict[str, Any]) -> ModelConfig:
    return hf_config.parse(generated.CONFIG | changes).model


def place(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    """The part of our array that a tensor is, as a view, from what `Tensor` says of it."""
    part = array[tensor.index]
    if tensor.half is not None:
        part = np.split(part, 2, axis=-1)[tensor.half]
    return part.T if tensor.transposed else part


@pytest.mark.parametrize("name", MODELS)
def test_each_of_our_numbers_has_one_place_in_the_format(name: str) -> None:
    model = model_of(MODELS[name])
    ours = names(abstract_variables(model))
    written = {leaf: np.zeros(array.shape, np.int32) for leaf, array in ours.items()}
    copied = {leaf: np.zeros(array.shape, np.int32) for leaf, array in ours.items()}
    for tensor in layout.tensors(model).values():
        part = place(tensor, (written if tensor.copy_of is None else copied)[tensor.leaf])
        assert part.shape == tensor.shape, tensor
        part += 1
    assert {leaf: set(count.flat) for leaf, count in written.items()} == {
        leaf: {1} for leaf in ours
    }
    assert {leaf for leaf, count in copied.items() if count.any()} <= {
        "params.embed_tokens",
        "params.lm_head",
    }
    assert all(set(count.flat) in ({0}, {model.mtp_depth}) for count in copied.values())


@pytest.mark.parametrize("name", ["as released", "all dense", "two MTP modules"])
def test_the_names_and_shapes_are_those_of_the_format(name: str) -> None:
    wanted = generated.shapes(generated.CONFIG | MODELS[name])
    assert {n: t.shape for n, t in layout.tensors(model_of(MODELS[name])).items()} == wanted


def test_without_a_q_latent_one_projection_takes_the_place_of_three_tensors() -> None:
    both = [set(layout.tensors(model_of(MODELS[name]))) for name in ("as released", "no q latent")]
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn"
        assert f"{prefix}.q_proj.weight" in both[1] - both[0]
    assert len(both[0] - both[1]) == 9
    assert len(both[1] - both[0]) == 3


def numbered(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """FP32 tensors of a checkpoint whose every number but those of copies is another integer."""
    out: dict[str, np.ndarray] = {}
    next_free = 0
    for name, shape in generated.shapes(config).items():
        n = math.prod(shape)
        out[name] = np.arange(next_free, next_free + n, dtype=np.float32).reshape(shape)
        next_free += n
    assert next_free < 2**24, "integers that FP32 holds"
    for layer in range(config["num_nextn_predict_layers"]):
        name = f"model.layers.{config['num_hidden_layers'] + layer}"
        out[f"{name}.embed_tokens.weight"] = out["model.embed_tokens.weight"]
        out[f"{name}.shared_head.head.weight"] = out["lm_head.weight"]
    return out


def test_each_number_of_a_checkpoint_is_loaded_once_into_its_place(tmp_path: Path) -> None:
    config = generated.CONFIG | MODELS["two MTP modules"]
    file = numbered(config)
    model, params, router_state = hf.load(generated.write(tmp_path / "hf", file, config))
    assert (model.n_layers, model.n_dense_layers, model.mtp_depth) == (4, 1, 2)
    tree = {"params": params, "router_state": router_state}
    ours = {leaf: np.asarray(array) for leaf, array in names(tree).items()}
    once = np.concatenate([a for n, a in file.items() if not is_copy(n)], axis=None)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(ours.values()), axis=None)), once)

    assert ours.keys() == names(abstract_variables(model)).keys()
    for leaf, array in ours.items():
        np.testing.assert_array_equal(array, wanted(leaf, file, model), err_msg=leaf)


def wanted(leaf: str, file: dict[str, np.ndarray], model: ModelConfig) -> np.ndarray:
    """What one of our arrays is, from the names the format has for it: matrices transposed, gate
    beside up, layers and experts stacked."""
    _, top, *path = leaf.split(".")
    if top in ("dense_layers", "moe_layers"):
        n_dense = model.n_dense_layers
        layers = range(n_dense) if top == "dense_layers" else range(n_dense, model.n_layers)
        return np.stack([in_layer(f"model.layers.{i}", path, file) for i in layers])
    if top.startswith("mtp_layers_"):
        layer = f"model.layers.{model.n_layers + int(top.removeprefix('mtp_layers_'))}"
        if path[0] == "block":
            return in_layer(layer, path[1:], file)
        return file[f"{layer}.{path[0].replace('head_norm', 'head.norm')}.weight"].T
    if top == "embed_tokens":
        return file["model.embed_tokens.weight"]
    return file[{"norm": "model.norm.weight", "lm_head": "lm_head.weight"}[top]].T


def in_layer(layer: str, path: list[str], file: dict[str, np.ndarray]) -> np.ndarray:
    if path[1:2] == ["experts"]:
        one = [path[0], "experts.{}", path[2]]
        return np.stack([in_layer(layer, [p.format(i) for p in one], file) for i in range(6)])
    *within, last = [layer, *path]
    if last == "gate_up_proj":
        halves = [file[".".join([*within, half, "weight"])].T for half in ("gate_proj", "up_proj")]
        return np.concatenate(halves, axis=1)
    bias = last == "e_score_correction_bias"
    return file[".".join([*within, *(["gate", last] if bias else [last, "weight"])])].T


def is_copy(name: str) -> bool:
    return name.endswith(("head.head.weight", "embed_tokens.weight")) and ".layers." in name
