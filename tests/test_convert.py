"""Public checkpoints in and out: to the same bits, in any type, resumable, with averages."""

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests import mini
from tests.hf import generated
from v3jax import convert, hf, models
from v3jax.hf import config as hf_config
from v3jax.hf import converted, export, read
from v3jax.model.transformer import head_logits
from v3jax.objective import apply_model
from v3jax.weights import names

KINDS = ("bf16", "fp32", "fp8")


def assert_same_tensors(folder: Path, other: Path) -> None:
    """Every tensor of both directories has the same type, shape and bits."""
    a, b = generated.contents(folder), generated.contents(other)
    assert a.keys() == b.keys()
    differ = [name for name in a if a[name] != b[name]]
    assert not differ, differ[:5]


def flat(directory: Path) -> dict[str, np.ndarray]:
    """Every weight and router bias that `hf.load` gives."""
    _, params, router_state = hf.load(directory)
    return {k: np.asarray(v) for k, v in names({"p": params, "r": router_state}).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_in_out_and_in_again_keeps_every_bit(tmp_path: Path, kind: str) -> None:
    source = generated.checkpoint(tmp_path / "source", kind)
    convert.from_hf(source, tmp_path / "in")
    convert.to_hf(tmp_path / "in", tmp_path / "out", shard_bytes=2e5)
    assert_same_tensors(source, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    convert.from_hf(tmp_path / "out", tmp_path / "again")
    convert.to_hf(tmp_path / "again", tmp_path / "out2")
    assert_same_tensors(source, tmp_path / "out2")
    assert json.loads((tmp_path / "out2" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_come_in_several_runs_keep_every_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = generated.checkpoint(tmp_path / "source", kind)
    wanted = flat(source)
    monkeypatch.setattr(read, "_RUN_BYTES", 4 * 128 * 24)
    tensors = read.open_source(source).tensors
    assert max(len(list(read.runs(tensor))) for tensor in tensors.values()) == 3
    for name, values in flat(source).items():
        np.testing.assert_array_equal(values, wanted[name], err_msg=name)
    convert.from_hf(source, tmp_path / "in")
    convert.to_hf(tmp_path / "in", tmp_path / "out")
    assert_same_tensors(source, tmp_path / "out")
    convert.to_hf(tmp_path / "in", tmp_path / "fp8", dtype="fp8")
    monkeypatch.undo()
    convert.to_hf(source, tmp_path / "whole", dtype="fp8")
    assert_same_tensors(tmp_path / "whole", tmp_path / "fp8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_loads_as_its_source_does(tmp_path: Path, kind: str) -> None:
    source = generated.checkpoint(tmp_path / "source", kind)
    convert.from_hf(source, tmp_path / "in")
    reader = models.open_reader(tmp_path / "in")
    assert reader is not None
    mine, theirs = names(hf.load_variables(reader)), names(dict(_variables(source)))
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(theirs[name]), err_msg=name)


def _variables(directory: Path) -> dict[str, Any]:
    _, params, router_state = hf.load(directory)
    return {"params": params, "router_state": router_state}


def test_directories_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generated.checkpoint(Path("source"), "bf16")
    convert.from_hf("source", "in")
    convert.to_hf("in", "out")
    assert_same_tensors(Path("source"), Path("out"))


def test_shards_are_of_the_stated_size_and_the_index_names_them_all(tmp_path: Path) -> None:
    source = generated.checkpoint(tmp_path / "source", "bf16")
    shards = convert.to_hf(source, tmp_path / "out", shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    tensors = generated.contents(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(len(t[2]) for t in tensors.values())
    for shard in shards:
        inside = [len(tensors[n][2]) for n, file in index["weight_map"].items() if file == shard]
        assert sum(inside) <= 60_000 or len(inside) == 1
    assert len(shards) > 4


def test_other_types_hold_the_same_numbers(tmp_path: Path) -> None:
    source = generated.checkpoint(tmp_path / "source", "fp8")
    convert.to_hf(source, tmp_path / "fp32", dtype="fp32")
    convert.to_hf(source, tmp_path / "bf16", dtype="bf16")
    exact, wide, narrow = flat(source), flat(tmp_path / "fp32"), flat(tmp_path / "bf16")
    for name, values in exact.items():
        np.testing.assert_array_equal(wide[name], values, err_msg=name)
        if name.endswith("e_score_correction_bias"):
            np.testing.assert_array_equal(narrow[name], values, err_msg=name)
        else:
            rounded = values.astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(narrow[name], rounded, err_msg=name)
    kinds = {dtype for dtype, _, _ in generated.contents(tmp_path / "fp32").values()}
    assert kinds == {"F32"}
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())


def test_fp8_of_wider_weights_is_near_them_and_stable(tmp_path: Path) -> None:
    source = generated.checkpoint(tmp_path / "source", "fp32")
    convert.to_hf(source, tmp_path / "fp8", dtype="fp8")
    before, after = flat(source), flat(tmp_path / "fp8")
    for name, values in before.items():
        if name.endswith("e_score_correction_bias"):
            np.testing.assert_array_equal(after[name], values)
            continue
        error = np.abs(after[name] - values).max()
        assert error <= 2**-4 * np.abs(values).max(), name
    convert.to_hf(tmp_path / "fp8", tmp_path / "again")
    assert_same_tensors(tmp_path / "fp8", tmp_path / "again")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]


def test_the_router_bias_is_fp32_in_every_type(tmp_path: Path) -> None:
    source = generated.checkpoint(tmp_path / "source", "fp8")
    wanted = {n: t for n, t in generated.contents(source).items() if "e_score" in n}
    assert len(wanted) == 2, "one MoE layer and the MTP module's"
    for kind in KINDS:
        convert.to_hf(source, tmp_path / kind, dtype=kind)
        got = {n: t for n, t in generated.contents(tmp_path / kind).items() if "e_score" in n}
        assert got == wanted


def test_an_interrupted_conversion_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = generated.checkpoint(tmp_path / "source", "fp8")
    monkeypatch.setattr(converted, "_PART_BYTES", 100_000)
    real = converted._write_part
    written: list[int] = []

    def failing(folder: Path, number: int, arrays: Any) -> None:
        if number == 3 and 3 not in written:
            written.append(number)
            (folder / str(number)).mkdir()  # what a killed process leaves
            raise OSError("no space left on device")
        written.append(number)
        real(folder, number, arrays)

    monkeypatch.setattr(converted, "_write_part", failing)
    with pytest.raises(OSError, match="no space"):
        convert.from_hf(source, tmp_path / "in")
    with pytest.raises(ValueError, match="unfinished conversion"):
        models.open_model(tmp_path / "in")
    convert.from_hf(source, tmp_path / "in")
    assert written[:5] == [0, 1, 2, 3, 3], "finished parts are not written again"
    assert len(written) > 5
    convert.to_hf(tmp_path / "in", tmp_path / "out")
    assert_same_tensors(source, tmp_path / "out")


def test_a_conversion_never_mixes_two_sources_or_overwrites(tmp_path: Path) -> None:
    one = generated.checkpoint(tmp_path / "one", "bf16")
    other = generated.checkpoint(tmp_path / "other", "bf16", vocab_size=310)
    convert.from_hf(one, tmp_path / "in")
    with pytest.raises(ValueError, match="already holds a finished conversion"):
        convert.from_hf(other, tmp_path / "in")
    (tmp_path / "in" / converted.MANIFEST).unlink()
    with pytest.raises(ValueError, match="part of another conversion"):
        convert.from_hf(other, tmp_path / "in")
    with pytest.raises(ValueError, match="already there"):
        convert.from_hf(one, tmp_path / "other")
    with pytest.raises(ValueError, match="already there"):
        convert.to_hf(one, tmp_path / "other")


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_conversion_is_refused_by_its_part(tmp_path: Path, damage: str) -> None:
    source = generated.checkpoint(tmp_path / "source", "bf16")
    convert.from_hf(source, tmp_path / "in")
    files = [p for p in (tmp_path / "in/parts/0").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    if damage == "remove":
        largest.unlink()
    else:
        raw = bytearray(largest.read_bytes())
        raw[len(raw) // 2] ^= 1
        largest.write_bytes(raw)
    with pytest.raises(ValueError, match=r"parts/0: .*convert again"):
        convert.to_hf(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_number_stops_a_conversion_by_name(tmp_path: Path) -> None:
    tensors = generated.arrays(generated.CONFIG, "bf16")
    tensors["model.layers.1.mlp.gate.weight"][2, 3] = np.nan
    source = generated.write(tmp_path / "source", tensors, generated.CONFIG)
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers\.1\.mlp\.gate"):
        convert.from_hf(source, tmp_path / "in")
    with pytest.raises(ValueError, match="unfinished"):
        models.open_model(tmp_path / "in")


def run_logits(run: Path, tokens: np.ndarray, *, ema: bool = False) -> np.ndarray:
    cfg, params, router_state, _ = models.load_run(run, ema=ema)
    out = apply_model(cfg, params, router_state, jnp.asarray(tokens))
    return np.asarray(head_logits(params, out.hidden_BTD))


TOKENS = np.random.default_rng(0).integers(0, 400, (2, 40)).astype(np.int32)


@functools.cache
def _exported(kind: str, *, ema: bool = False) -> Path:
    folder = mini.finished().parent / f"export-{kind}-{ema}-{os.getpid()}"
    convert.to_hf(mini.finished(), folder, dtype=kind, ema=ema)
    return folder


def test_an_exported_run_gives_the_runs_logits() -> None:
    wanted = run_logits(mini.finished(), TOKENS)
    got = hf.forward(_exported("fp32"), TOKENS)
    assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_ema_exports_the_averaged_weights() -> None:
    raw = run_logits(mini.finished(), TOKENS)
    wanted = run_logits(mini.finished(), TOKENS, ema=True)
    got = hf.forward(_exported("fp32", ema=True), TOKENS)
    assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()
    assert np.abs(got - raw).max() > 1e-3 * np.abs(raw).max()


def test_an_exported_run_comes_back_with_every_bit(tmp_path: Path) -> None:
    cfg, params, router_state, _ = models.load_run(mini.finished())
    model, back, back_router = hf.load(_exported("fp32"))
    assert model == cfg.model
    mine, theirs = names([params, router_state]), names([back, back_router])
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(theirs[name]), err_msg=name)


def test_an_exported_run_has_all_that_a_checkpoint_needs() -> None:
    folder = _exported("bf16")
    assert {p.name for p in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    cfg, _, _, tokenizer = models.load_run(mini.finished())
    config = json.loads((folder / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == cfg.model.mtp_depth == 1
    assert config["eos_token_id"] == tokenizer.eos
    assert (folder / "tokenizer.json").read_text() == tokenizer.text
    loaded = models.open_model(folder)
    assert loaded.numerics.compute == "bf16"
    assert loaded.tokenizer.encode("def f(x):") == tokenizer.encode("def f(x):")


def test_transformers_computes_the_exported_runs_logits(tmp_path: Path) -> None:
    python = os.environ.get("V3JAX_ORACLE_PYTHON")
    if python is None:
        pytest.importorskip("transformers", reason="transformers (extra [oracle]) is not installed")
        python = shutil.which("python") or "python"
    np.save(tmp_path / "tokens.npy", TOKENS)
    code = (
        "import sys, numpy, torch, transformers as t;"
        "m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval();"
        "tokens = torch.tensor(numpy.load(sys.argv[2] + '/tokens.npy')).long();"
        "numpy.save(sys.argv[2] + '/logits.npy', m(tokens).logits.detach().numpy());"
        "tokenizer = t.AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(tokenizer('def f(x):\\n', add_special_tokens=False)['input_ids'])"
    )
    done = subprocess.run(
        [python, "-c", code, str(_exported("fp32")), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    wanted, got = run_logits(mini.finished(), TOKENS), np.load(tmp_path / "logits.npy")
    assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()
    tokenizer = models.load_run(mini.finished())[3]
    assert done.stdout.strip().splitlines()[-1] == str(tokenizer.encode("def f(x):\n"))


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["from-hf", "only-one"], 2, "SRC DST"),
        (["sideways", "a", "b"], 2, "from-hf SRC DST"),
        (["to-hf", "a", "b", "--dtype=int4"], 2, "--dtype=int4"),
        (["to-hf", "a", "b", "--nonsense"], 2, "nonsense"),
        (["from-hf", "/nowhere", "b"], 1, "no such directory"),
        (["to-hf", "/nowhere", "b"], 1, "no model here"),
    ],
)
def test_a_mistake_in_the_call_is_one_line(
    tmp_path: Path, arguments: list[str], code: int, named: str
) -> None:
    done = mini.call(mini.command(*arguments, program="convert"))
    assert done.returncode == code
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_command_converts_both_ways(tmp_path: Path) -> None:
    source = generated.checkpoint(tmp_path / "source", "fp8")
    there = mini.call(mini.command("from-hf", str(source), str(tmp_path / "in"), program="convert"))
    assert there.stdout.strip().splitlines()[-1] == f"done: {tmp_path / 'in'}", there.stderr
    call = ["to-hf", str(tmp_path / "in"), str(tmp_path / "out"), "--shard-gb=0.0001"]
    back = mini.call(mini.command(*call, program="convert"))
    assert back.returncode == 0, back.stderr
    assert_same_tensors(source, tmp_path / "out")


def test_options_that_do_not_fit_the_source_are_refused(tmp_path: Path) -> None:
    source = generated.checkpoint(tmp_path / "source", "bf16")
    with pytest.raises(ValueError, match="drop --ema"):
        convert.to_hf(source, tmp_path / "out", ema=True)
    with pytest.raises(ValueError, match="--dtype=same is for public weights"):
        convert.to_hf(mini.finished(), tmp_path / "out", dtype="same")
    with pytest.raises(ValueError, match="shard-gb"):
        convert.to_hf(source, tmp_path / "out", shard_bytes=0)
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    cfg, params, router_state, _ = models.load_run(mini.finished())
    params = params | {"norm": params["norm"].at[3].set(np.nan)}
    config = hf_config.render(cfg.model, dtype="float32", fp8=False, max_positions=32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: the model holds NaN"):
        export.write(
            tmp_path / "out",
            cfg.model,
            "fp32",
            export.from_variables(params, router_state),
            config=config,
            beside={},
        )
    assert not list(tmp_path.iterdir())


def test_rows_of_inverts_the_pieces(tmp_path: Path) -> None:
    source = read.open_source(generated.checkpoint(tmp_path / "source", "fp32"))
    arrays = names(_variables(tmp_path / "source"))
    for tensor in source.tensors.values():
        stored = np.concatenate([rows for _, rows in source.rows(tensor)])
        np.testing.assert_array_equal(read.rows_of(tensor, arrays[tensor.leaf]), stored)
