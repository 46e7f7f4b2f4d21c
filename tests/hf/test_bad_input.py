"""A checkpoint that is wrong anywhere is one line that names it, and nothing of it is loaded.

What is wrong within one file's header, in an index or in a config.json is in `test_files` and
`test_config`; here whole checkpoints go through the public functions.
"""

import ast
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save_file

from tests.hf import generated
from tests.hf.small import at_most, edit, entry, refused, safetensors
from v3jax import hf
from v3jax.hf.files import DTYPES, INDEX, SINGLE
from v3jax.hf.read import open_source

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
LINEAR = "model.layers.0.mlp.down_proj.weight"  # 2 x 2 blocks, ragged
NORM = "model.layers.1.input_layernorm.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
HEAD_COPY = "model.layers.2.shared_head.head.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole FP8 checkpoint in three shards."""
    return generated.checkpoint(tmp_path_factory.mktemp("good") / "hf", "fp8")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """Its copy, to be damaged."""
    copy = tmp_path / "hf"
    copy.mkdir()
    for file in good.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def unallocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if weights are put anywhere."""

    def assemble(*_: Any) -> None:
        pytest.fail("weights were allocated")

    monkeypatch.setattr(hf, "assemble", assemble)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def load(file: Path) -> dict[str, np.ndarray]:
    """A shard's tensors; the library's own function does not know FP8."""
    return {
        name: np.frombuffer(bytes(info["data"]), DTYPES[info["dtype"]]).reshape(info["shape"])
        for name, info in deserialize(file.read_bytes())
    }


def change(folder: Path, name: str, by: Callable[[np.ndarray], np.ndarray | None]) -> Path:
    """Replaces a tensor, or drops it from file and index; returns its file."""
    file = shard_of(folder, name)
    tensors = load(file)
    changed = by(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    else:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit(folder / INDEX, weight_map={n: f for n, f in weight_map.items() if n != name})
    save_file(tensors, file)
    return file


def add(folder: Path, name: str, array: np.ndarray) -> Path:
    """Adds a tensor to the first shard and the index."""
    file = shard_of(folder, NORM)
    save_file(load(file) | {name: array}, file)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map=weight_map | {name: file.name})
    return file


def every_way_refuses(folder: Path, *named: object) -> None:
    """Asserts that the three public readers say the same line, which has `named` in it."""
    for read in (open_source, hf.load, lambda at: hf.forward(at, np.zeros((1, 2), np.int32))):
        with refused(*named):
            read(folder)


def loading_refuses(folder: Path, *named: object) -> None:
    """The same where numbers and not headers are wrong."""
    open_source(folder)
    for read in (hf.load, lambda at: hf.forward(at, np.zeros((1, 2), np.int32))):
        with refused(*named):
            read(folder)


def test_the_checkpoint_that_the_others_damage_is_good(good: Path, folder: Path) -> None:
    model, _, _ = hf.load(folder)
    assert model.mtp_depth == 1
    change(folder, LINEAR, lambda a: a)
    for name in (LINEAR, NORM, BIAS, HEAD_COPY, f"{LINEAR}_scale_inv"):
        assert generated.contents(folder)[name] == generated.contents(good)[name]
    assert np.isfinite(hf.forward(folder, np.zeros((1, 2), np.int32))).all()


# Headers


@pytest.mark.usefixtures("unallocated")
def test_a_missing_shard_is_named_with_a_tensor_of_it(folder: Path) -> None:
    file = shard_of(folder, NORM)
    file.unlink()
    every_way_refuses(folder, file, "model.", "missing", "download it")


@pytest.mark.usefixtures("unallocated")
@pytest.mark.parametrize("name", ["../a", "/etc/a", "sub/a", "a\0", "pytorch_model.bin"])
def test_an_index_that_leads_elsewhere_is_refused(folder: Path, name: str) -> None:
    target = name if name.endswith(".bin") else f"{name}.safetensors"
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map=weight_map | {NORM: target})
    every_way_refuses(folder, folder / INDEX, NORM, "no .safetensors file of this directory")


@pytest.mark.usefixtures("unallocated")
def test_a_link_out_of_the_directory_is_refused(folder: Path) -> None:
    file = shard_of(folder, NORM)
    file.rename(folder.parent / "weights")
    file.symlink_to(folder.parent / "weights")
    every_way_refuses(folder, file, "a link out of the directory")


def test_a_link_to_the_directory_is_followed(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder, target_is_directory=True)
    assert open_source(folder.parent / "link").model == open_source(folder).model


Change = Callable[[np.ndarray], np.ndarray | None]
HEADERS: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "a tensor is missing": (NORM, lambda a: None, ("incomplete",)),
    "a bias is missing": (BIAS, lambda a: None, ("incomplete",)),
    "an MTP norm is missing": ("model.layers.2.enorm.weight", lambda a: None, ("incomplete",)),
    "another shape": (NORM, lambda a: a[:-1], ("[135]", "[136]")),
    "a transposed matrix": (LINEAR, lambda a: a.T.copy(), ("[150, 136]", "[136, 150]")),
    "another rank": (NORM, lambda a: a[None], ("[1, 136]", "[136]")),
    "a scalar": (NORM, lambda a: np.array(1, BF16), ("[]", "[136]")),
    "no numbers": (NORM, lambda a: a[:0], ("[0]", "[136]")),
    "half precision": (NORM, lambda a: a.astype(np.float16), ("F16", "only F32, BF16")),
    "double precision": (NORM, lambda a: a.astype(np.float64), ("F64",)),
    "integers": (LINEAR, lambda a: a.view(np.int8), ("I8",)),
    "the other FP8": (LINEAR, lambda a: a.astype(ml_dtypes.float8_e5m2), ("F8_E5M2",)),
    "an FP8 norm": (NORM, lambda a: a.astype(FP8), ("FP8", "only linear")),
    "an FP8 head": ("lm_head.weight", lambda a: a.astype(FP8), ("FP8", "only linear")),
    "an FP8 router": (
        "model.layers.1.mlp.gate.weight",
        lambda a: a.astype(FP8),
        ("FP8", "only linear"),
    ),
    "no scales": (f"{LINEAR}_scale_inv", lambda a: None, ("scales of FP8 weights",)),
    "scales in BF16": (f"{LINEAR}_scale_inv", lambda a: a.astype(BF16), ("bfloat16", "float32")),
    "transposed scales": (
        "model.layers.0.self_attn.q_a_proj.weight_scale_inv",
        lambda a: a.T.copy(),
        ("[2, 1]", "[1, 2]"),
    ),
    "one scale": (f"{LINEAR}_scale_inv", lambda a: a[:1, :1], ("[1, 1]", "[2, 2]")),
    "flat scales": (f"{LINEAR}_scale_inv", lambda a: a.reshape(4), ("[4]", "[2, 2]")),
}


@pytest.mark.usefixtures("unallocated")
@pytest.mark.parametrize("case", HEADERS)
def test_a_tensor_of_another_shape_or_type_is_named_with_its_file(folder: Path, case: str) -> None:
    name, by, named = HEADERS[case]
    file = change(folder, name, by)
    place = folder if by(np.zeros((2, 2), np.float32)) is None else file
    every_way_refuses(folder, place, name, *named)


@pytest.mark.usefixtures("unallocated")
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.mlp.down_proj.bias",
        "model.layers.3.input_layernorm.weight",
        "model.layers.1.mlp.experts.6.down_proj.weight",
        f"{NORM}_scale_inv",
        f"{LINEAR}_scale_inv_scale_inv",
        "lm_head",
    ],
)
def test_an_unknown_tensor_is_named(folder: Path, name: str) -> None:
    file = add(folder, name, np.ones((2, 2), np.float32))
    every_way_refuses(folder, file, name, "no tensor of this model")


@pytest.mark.usefixtures("unallocated")
def test_scales_of_a_tensor_that_is_not_fp8_are_refused(folder: Path) -> None:
    change(folder, LINEAR, lambda a: a.astype(BF16))
    scales = f"{LINEAR}_scale_inv"
    every_way_refuses(folder, shard_of(folder, scales), scales, "no tensor of this model")


@pytest.mark.usefixtures("unallocated")
def test_fp8_that_the_config_does_not_announce_is_refused(folder: Path) -> None:
    edit(folder / "config.json", quantization_config=...)
    every_way_refuses(folder, folder, "weight is FP8", "quantization_config")


@pytest.mark.usefixtures("unallocated")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "deepseek_v2"}, "model_type='deepseek_v2'"),
        ({"made_up": 1}, "unknown field made_up=1"),
        ({"n_group": ...}, "n_group is missing"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"topk_group": 3}, "topk_group: must be within 1..n_groups=2"),
    ],
)
def test_a_config_that_is_not_understood_is_named(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    edit(folder / "config.json", **changes)
    every_way_refuses(folder, f"{folder / 'config.json'}: {named}")


@pytest.mark.usefixtures("unallocated")
@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"first_k_dense_replace": 0},
        {"n_routed_experts": 8},
        {"num_nextn_predict_layers": 2},
        {"hidden_size": 128},
        {"q_lora_rank": None},
        {"n_shared_experts": 2},
    ],
)
def test_a_config_of_other_sizes_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / "config.json", **changes)
    every_way_refuses(folder, folder, "model.")


def test_a_huge_damaged_file_is_refused_from_its_header(folder: Path) -> None:
    n_bytes = 2**40
    file = shard_of(folder, NORM)
    content = safetensors({NORM: entry("F32", [2**38], 0, n_bytes)})
    file.write_bytes(content)
    os.truncate(file, len(content) + n_bytes)
    edit(folder / INDEX, weight_map={NORM: file.name})
    with at_most(4 * 2**20):
        every_way_refuses(folder, "model.embed_tokens.weight", "incomplete")
    weight_map = dict.fromkeys((NORM, "model.embed_tokens.weight"), file.name)
    edit(folder / INDEX, weight_map=weight_map)
    with at_most(4 * 2**20):
        every_way_refuses(folder, file, "lacks", "model.embed_tokens.weight")


@pytest.mark.parametrize("where", ["none", "a file", "empty"])
def test_a_directory_without_a_checkpoint_is_named(tmp_path: Path, where: str) -> None:
    place = tmp_path / where
    if where == "a file":
        place.write_text("")
    if where == "empty":
        place.mkdir()
    every_way_refuses(place, place)


# Numbers


def put(value: float) -> Change:
    """Sets the last number of a tensor."""

    def by(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed.flat[-1] = value
        return changed

    return by


def put_code(code: int) -> Change:
    """Sets the bits of the last number of an FP8 tensor."""

    def by(array: np.ndarray) -> np.ndarray:
        codes = array.view(np.uint8).copy()
        codes.flat[-1] = code
        return codes.view(FP8)

    return by


NUMBERS: dict[str, tuple[str, Change]] = {
    "NaN in BF16": (NORM, put(np.nan)),
    "minus infinity in BF16": (NORM, put(-np.inf)),
    "infinity in a head": ("lm_head.weight", put(np.inf)),
    "NaN in an MTP module": ("model.layers.2.eh_proj.weight", put(np.nan)),
    "NaN in FP32": (BIAS, put(np.nan)),
    "infinity in FP32": (BIAS, put(np.inf)),
    "NaN in FP8": (LINEAR, put_code(0x7F)),
    "minus NaN in FP8": (LINEAR, put_code(0xFF)),
    "NaN in an FP8 expert": ("model.layers.1.mlp.experts.5.up_proj.weight", put_code(0x7F)),
    "NaN in scales": (f"{LINEAR}_scale_inv", put(np.nan)),
    "infinity in scales": (f"{LINEAR}_scale_inv", put(np.inf)),
    "a negative scale": (f"{LINEAR}_scale_inv", put(-1e-3)),
    "a scale of zero": (f"{LINEAR}_scale_inv", put(0)),
}


@pytest.mark.usefixtures("unallocated")
@pytest.mark.parametrize("case", NUMBERS)
def test_a_number_that_is_none_is_named_before_anything_is_allocated(
    folder: Path, case: str
) -> None:
    name, by = NUMBERS[case]
    loading_refuses(folder, change(folder, name, by), name)


@pytest.mark.parametrize(("code", "value"), [(0x7E, 448), (0xFE, -448), (0x80, -0.0), (1, 2**-9)])
def test_codes_beside_nan_are_numbers(folder: Path, code: int, value: float) -> None:
    change(folder, LINEAR, put_code(code))
    scales = load(shard_of(folder, f"{LINEAR}_scale_inv"))[f"{LINEAR}_scale_inv"]
    _, params, _ = hf.load(folder)
    got = np.asarray(params["dense_layers"]["mlp"]["down_proj"])[0, -1, -1]
    assert got == np.float32(value) * scales[-1, -1]


@pytest.mark.usefixtures("unallocated")
@pytest.mark.parametrize("name", [HEAD_COPY, "model.layers.2.embed_tokens.weight"])
def test_a_copy_that_differs_in_one_number_is_named(folder: Path, name: str) -> None:
    file = change(folder, name, put(0.125))
    loading_refuses(folder, file, name, "differs from")


@pytest.mark.parametrize("tokens", [[0, 1], [[]], [[0.5]], [[-1]], [[300]], [[[0]]], [[True]]])
def test_forward_takes_ids_of_the_vocabulary(good: Path, tokens: Any) -> None:
    with refused("tokens: "):
        hf.forward(good, tokens)


# Pickles


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


PICKLED = ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.ckpt", "weights.pkl"]


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[tuple[bytes, Path]]:
    """A pickle, and the file that is there if it was ever loaded."""
    flown = tmp_path / "flown"
    content = pickle.dumps({"model.norm.weight": Canary(flown)})
    pickle.loads(content)
    assert flown.exists(), "the canary can fly"
    flown.unlink()
    yield content, flown
    assert not flown.exists(), "a pickle was loaded"


@pytest.mark.parametrize("name", PICKLED)
def test_a_pickle_is_not_loaded_where_there_is_nothing_else(
    folder: Path, canary: tuple[bytes, Path], name: str
) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / name).write_bytes(canary[0])
    every_way_refuses(folder, folder / name, "pickled weights are never read", "safetensors")


def test_pickles_beside_safetensors_are_left_alone(
    folder: Path, canary: tuple[bytes, Path]
) -> None:
    for name in (*PICKLED, "training_args.bin", "optimizer.pt", "arrays.npy", "pytorch_model.bin"):
        (folder / name).write_bytes(canary[0])
    index = {"metadata": {}, "weight_map": {NORM: "pytorch_model.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    hf.load(folder)


@pytest.mark.parametrize("name", [SINGLE, INDEX, "config.json"])
def test_a_pickle_under_another_name_is_not_loaded(
    folder: Path, canary: tuple[bytes, Path], name: str
) -> None:
    if name == SINGLE:
        (folder / INDEX).unlink()
    (folder / name).write_bytes(canary[0])
    every_way_refuses(folder, folder / name)


def test_a_pickle_in_place_of_a_shard_is_not_loaded(
    folder: Path, canary: tuple[bytes, Path]
) -> None:
    file = shard_of(folder, NORM)
    file.write_bytes(canary[0])
    every_way_refuses(folder, file)


UNPICKLERS = {
    *("pickle", "_pickle", "cPickle", "pickletools", "cloudpickle", "dill", "joblib", "jsonpickle"),
    *("marshal", "shelve", "copyreg", "torch", "tensorflow", "pandas", "sklearn", "h5py"),
}
SAFE_YAML = {"safe_load", "SafeLoader"}  # its other loaders build any object


def unpickling(source: str) -> Iterator[str]:
    """The places of a program that could load a pickle."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = {alias.name.split(".")[0] for alias in names}
            case ast.ImportFrom(module="yaml"):
                yield "from yaml"
                continue
            case ast.ImportFrom(module=str(module)):
                found = {module.split(".")[0]}
            case ast.Attribute(value=ast.Name(id="yaml"), attr=name) if name not in SAFE_YAML:
                yield f"yaml.{name}"
                continue
            case ast.Call(keywords=keywords):
                allowed = [k for k in keywords if k.arg == "allow_pickle"]
                if any(ast.unparse(k.value) != "False" for k in allowed):
                    yield ast.unparse(node)
                continue
            case ast.Name(id=name) | ast.Attribute(attr=name):
                found = {name}
                if re.search("(?i)pickler?$", name):
                    yield name
            case ast.Constant(value=str(name)) if name in UNPICKLERS:  # import_module("pickle")
                found = {name}
            case _:
                continue
        yield from found & UNPICKLERS


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import torch.serialization",
        "from joblib import load",
        "def f():\n    from _pickle import loads",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "importlib.import_module('dill')",
        "pd.read_pickle(f)",
        "np.compat.pickle.load(f)",
        "numpy.lib.format.pickle",
        "__import__('marshal')",
        "yaml.load(f, yaml.SafeLoader)",
        "yaml.unsafe_load(f)",
        "class L(yaml.FullLoader): ...",
        "from yaml import Loader",
    ],
)
def test_the_search_for_unpickling_finds(source: str) -> None:
    assert list(unpickling(source))


def test_no_program_of_the_package_can_load_a_pickle(repo: Path) -> None:
    assert not list(unpickling("np.load(f, allow_pickle=False); 'a pickle'; import numpy"))
    sources = [*(repo / "v3jax").rglob("*.py"), *(repo / "experiments").rglob("*.py")]
    assert len(sources) > 40
    found = {str(p): list(unpickling(p.read_text(encoding="utf-8"))) for p in sources}
    assert not {file: places for file, places in found.items() if places}
