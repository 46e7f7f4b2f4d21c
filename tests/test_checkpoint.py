"""A checkpoint is whole or absent, every damage to it is named, and the last good one stays."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import mini
from v3jax import checkpoint
from v3jax.checkpoint import MAY_CHANGE, Writer
from v3jax.config import MeshConfig, flatten
from v3jax.sharding import make_mesh
from v3jax.state import TrainState

CFG = mini.config()
N_FLIPS = 4  # a file; with 100 (1,600 in all) none went unnoticed either
DATA = {"sequences": 12, "iterator": {"next_index": 3}, "digest": "rows"}


def make_state(seed: int = 0, ema: bool = True) -> TrainState:
    """A state of every number type, hard to compress, with values that are easily lost."""
    rng = np.random.default_rng(seed)
    params = {
        "w": jnp.asarray(rng.normal(size=(64, 33)), jnp.float32).at[0, 0].set(jnp.nan),
        "b": jnp.asarray(rng.normal(size=7), jnp.float32).at[1].set(-0.0),
    }
    moments = {"mu": jnp.asarray(rng.normal(size=(64, 33)), jnp.bfloat16)}
    return TrainState(
        step=jnp.asarray(5 + seed, jnp.int32),
        sequences=jnp.asarray(2**32 - 1, jnp.uint32),
        bad_steps=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=moments,
        router_state={"bias": jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)},
        ema={k: v + 1 for k, v in params.items()} if ema else None,
        averaged=jnp.asarray(4 + seed, jnp.int32),
    )


def save(workdir: Path, *steps: int, cfg: Any = CFG) -> None:
    with Writer(workdir, cfg) as writer:
        for step in steps:
            writer.save(step, make_state(step), DATA)
        writer.wait()


def found(workdir: Path) -> checkpoint.Checkpoint:
    newest = checkpoint.latest(workdir)
    assert newest is not None
    return newest


def restored(workdir: Path) -> TrainState:
    return checkpoint.restore(found(workdir), make_state())


def assert_bit_equal(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("ema", [True, False])
def test_restored_state_is_bit_equal(tmp_path: Path, ema: bool) -> None:
    state = make_state(ema=ema)
    with Writer(tmp_path, CFG) as writer:
        writer.save(3, state, DATA)
        writer.wait()
    newest = found(tmp_path)
    assert newest.step == 3
    assert newest.manifest["data"] == DATA
    assert_bit_equal(checkpoint.restore(newest, state), state)


def test_state_may_change_as_soon_as_save_returns(tmp_path: Path) -> None:
    state = make_state()
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Writer(tmp_path, CFG) as writer:
        writer.save(3, state, DATA)
        add(state)
    assert_bit_equal(restored(tmp_path), make_state())


def test_a_step_without_a_manifest_does_not_exist(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    (tmp_path / "checkpoints/20/manifest.json").unlink()
    assert found(tmp_path).step == 10
    assert_bit_equal(restored(tmp_path), make_state(10))


def test_leftovers_go_before_the_next_save_and_good_steps_stay(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    (tmp_path / "checkpoints/20/manifest.json").unlink()
    (tmp_path / "checkpoints/17").mkdir()
    before = mini.contents(tmp_path / "checkpoints/10")
    save(tmp_path, 30)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "30"]
    assert mini.contents(tmp_path / "checkpoints/10") == before


def test_a_complete_step_is_never_written_again(tmp_path: Path) -> None:
    save(tmp_path, 10)
    before = mini.contents(tmp_path)
    with Writer(tmp_path, CFG) as writer:
        writer.save(10, make_state(99), DATA)
        writer.wait()
    assert mini.contents(tmp_path) == before


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, 40)
    assert checkpoint.committed_steps(tmp_path) == [30, 40]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["30", "40"]


def test_a_failed_save_is_raised_at_the_next_step_and_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)
    before = mini.contents(tmp_path)

    def full(file: epath.Path, text: str) -> None:
        raise OSError(28, f"No space left on device: {file}, {len(text)} bytes")

    monkeypatch.setattr(checkpoint, "write_whole", full)
    with Writer(tmp_path, CFG) as writer:
        writer.save(20, make_state(20), DATA)
        assert writer._thread is not None
        writer._thread.join()
        with pytest.raises(RuntimeError, match=r"saving failed .*No space left.* untouched"):
            writer.poll()
        writer.poll()  # told once
    monkeypatch.undo()
    assert found(tmp_path).step == 10
    assert before.items() <= mini.contents(tmp_path).items()
    save(tmp_path, 20)
    assert found(tmp_path).step == 20


def test_arrays_that_cannot_be_written_make_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)
    before = mini.contents(tmp_path)

    def torn(self: Any, folder: epath.Path, **arguments: Any) -> None:
        folder.mkdir()
        (folder / "half").write_bytes(b"an array's beginning")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", torn)
    with Writer(tmp_path, CFG) as writer:
        writer.save(20, make_state(20), DATA)
        with pytest.raises(RuntimeError, match=r"saving failed .*Input/output error"):
            writer.save(30, make_state(30), DATA)
    monkeypatch.undo()
    assert (tmp_path / "checkpoints/20/state/half").exists()
    assert checkpoint.committed_steps(tmp_path) == [10]
    assert before.items() <= mini.contents(tmp_path).items()
    assert_bit_equal(restored(tmp_path), make_state(10))


def assert_refused_or_harmless(workdir: Path) -> bool:
    """Whether the damage was refused, in one line that names folder, step and remedy."""
    try:
        state = restored(workdir)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message
        assert "checkpoints/10" in message, message
        assert "step 10" in message, message
        assert "remove" in message, message
        return True
    assert_bit_equal(state, make_state(10))  # in a copy that orbax keeps but does not read
    return False


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint, step 10."""
    workdir = tmp_path_factory.mktemp("good")
    save(workdir, 10)
    return workdir


def damaged(good: Path, tmp_path: Path, relative: Path, change: Callable[[bytes], bytes]) -> Path:
    workdir = tmp_path / "damaged"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(good, workdir)
    file = workdir / relative
    file.write_bytes(change(file.read_bytes()))
    return workdir


def files_of(workdir: Path) -> list[Path]:
    return sorted(p.relative_to(workdir) for p in workdir.rglob("*") if p.is_file())


def test_no_flipped_bit_goes_unnoticed(good: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    refused = 0
    for relative in files_of(good):
        for _ in range(N_FLIPS):

            def flip(raw: bytes) -> bytes:
                changed = bytearray(raw)
                if changed:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
                return bytes(changed)

            workdir = damaged(good, tmp_path, relative, flip)
            refused += assert_refused_or_harmless(workdir)
    assert refused > 10


def test_no_truncation_goes_unnoticed(good: Path, tmp_path: Path) -> None:
    refused = set()
    for relative in files_of(good):
        size = (good / relative).stat().st_size
        for length in {0, min(1, size), size // 2, max(size - 1, 0)}:
            workdir = damaged(good, tmp_path, relative, lambda raw, n=length: raw[:n])
            if size > length and assert_refused_or_harmless(workdir):
                refused.add(relative.name)
    assert refused == {p.name for p in files_of(good) if (good / p).stat().st_size}


def test_a_missing_file_is_refused(good: Path, tmp_path: Path) -> None:
    workdir = damaged(good, tmp_path, Path("checkpoints/10/manifest.json"), lambda raw: raw)
    shutil.rmtree(workdir / "checkpoints/10/state/d")
    with pytest.raises(ValueError, match=r"step 10 is damaged \(the file state/d/\w+ is missing"):
        restored(workdir)


def test_arrays_of_another_step_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "20/state")
    shutil.copytree(folder / "10/state", folder / "20/state")
    with pytest.raises(ValueError, match=r"step 20 is damaged .the file state"):
        restored(tmp_path)


def test_arrays_whose_files_are_in_order_are_checked_by_digest(tmp_path: Path) -> None:
    save(tmp_path, 10)
    file = tmp_path / "checkpoints/10/manifest.json"
    arrays = json.loads(file.read_text())["arrays"]
    arrays["params.w"]["sha256"] = arrays["opt_state.mu"]["sha256"]
    edited(tmp_path, arrays=arrays)
    with pytest.raises(ValueError, match=r"array params\.w does not match its digest"):
        restored(tmp_path)


def test_a_manifest_of_another_step_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    folder = tmp_path / "checkpoints"
    shutil.copy(folder / "10/manifest.json", folder / "20/manifest.json")
    with pytest.raises(ValueError, match="manifest of step 20 is damaged"):
        checkpoint.latest(tmp_path)


def test_a_changed_manifest_is_refused(good: Path, tmp_path: Path) -> None:
    relative = Path("checkpoints/10/manifest.json")
    workdir = damaged(
        good, tmp_path, relative, lambda raw: raw.replace(b'"sequences": 12', b'"sequences": 13')
    )
    with pytest.raises(ValueError, match="the manifest of step 10 is damaged"):
        checkpoint.latest(workdir)


def test_verify_reads_everything(good: Path, tmp_path: Path) -> None:
    checkpoint.verify(good, 10)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.verify(good, 11)
    workdir = damaged(good, tmp_path, Path("checkpoints/10/state/manifest.ocdbt"), lambda _: b"")
    with pytest.raises(ValueError, match="step 10 is damaged"):
        checkpoint.verify(workdir, 10)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.replace(params=s.params | {"w": s.params["w"].T}), "params.w"),
        (lambda s: s.replace(params=s.params | {"w": s.params["w"].astype(jnp.bfloat16)}), "bfloa"),
        (lambda s: s.replace(params=s.params | {"more": jnp.zeros(3)}), "params.more"),
        (lambda s: s.replace(step=s.step.astype(jnp.int8)), "int8"),
    ],
)
def test_another_shape_or_type_is_refused(
    good: Path, change: Callable[[TrainState], TrainState], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        checkpoint.restore(found(good), change(make_state()))


def test_parameters_load_alone(good: Path) -> None:
    state = make_state(10)
    params, router_state = checkpoint.load_params(found(good), make_state())
    assert_bit_equal((params, router_state), (state.params, state.router_state))
    averaged, _ = checkpoint.load_params(found(good), make_state(), ema=True)
    assert_bit_equal(averaged, state.ema)
    with pytest.raises(ValueError, match="no averaged weights"):
        checkpoint.load_params(found(good), make_state(ema=False), ema=True)


def edited(workdir: Path, **changes: Any) -> None:
    """Changes a manifest as another version would have written it."""
    file = workdir / "checkpoints/10/manifest.json"
    manifest = json.loads(file.read_text()) | changes
    del manifest["sha256"]
    manifest["sha256"] = checkpoint._digest_json(manifest)
    file.write_text(json.dumps(manifest))


def test_every_field_that_matters_is_compared_and_named(good: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(good, workdir)
    original = found(good).manifest["config"]
    assert original.keys() == flatten(CFG).keys()
    for field in original:
        edited(workdir, config=original | {field: "'else'"})
        if field in MAY_CHANGE:
            assert checkpoint.check_workdir(workdir, CFG) is not None
        else:
            with pytest.raises(ValueError, match="another experiment") as caught:
                checkpoint.check_workdir(workdir, CFG)
            assert f"{field} was 'else', is {original[field]}" in str(caught.value)


def test_only_rhythm_length_and_devices_may_change() -> None:
    names = "total_tokens eval_every eval_sequences checkpoint_every keep_checkpoints max_bad_steps"
    mesh = {name for name in flatten(CFG) if name.startswith("mesh.")}
    assert mesh >= {"mesh.pipe", "mesh.data", "mesh.node", "mesh.expert"}
    assert mesh <= MAY_CHANGE
    others = {"moe.bound_factor", "moe.dispatch_chunks"}  # how tokens travel, not where to
    others |= {"batch.micro_batch", "data.workers"}
    others |= {name for name in flatten(CFG) if name.startswith("pipeline.")}  # and when
    assert {f"run.{name}" for name in names.split()} | mesh | others == MAY_CHANGE


def test_a_field_younger_than_a_run_stands_for_its_default(good: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(good, workdir)
    older = {k: v for k, v in found(good).manifest["config"].items() if k != "data.mixture"}
    edited(workdir, config=older)
    assert checkpoint.check_workdir(workdir, CFG) is not None
    n_sources = len(CFG.data.sources)
    mixture = ((1e9, (1.0,) * n_sources),)
    changed = mini.replace(CFG, data=mini.replace(CFG.data, mixture=mixture))
    with pytest.raises(ValueError, match=r"data\.mixture was \(\), is"):
        checkpoint.check_workdir(workdir, changed)
    edited(workdir, config={k: v for k, v in older.items() if k != "data.seq_len"})
    with pytest.raises(ValueError, match=r"data\.seq_len was absent"):
        checkpoint.check_workdir(workdir, CFG)


def test_groups_of_fields_younger_than_a_run_stand_for_their_defaults(
    good: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(good, workdir)
    older = {k: v for k, v in found(good).manifest["config"].items() if not k.startswith("moe.")}
    edited(workdir, config=older)
    assert checkpoint.check_workdir(workdir, CFG) is not None
    changed = mini.replace(CFG, moe=mini.replace(CFG.moe, capacity_factor=1.0))
    with pytest.raises(ValueError, match=r"moe.capacity_factor was None, is 1.0"):
        checkpoint.check_workdir(workdir, changed)


@pytest.mark.parametrize("spec", [P(), P("data"), P(("data", "expert"))])
def test_a_state_is_restored_on_any_mesh(good: Path, spec: P) -> None:
    place = NamedSharding(make_mesh(MeshConfig(data=2, expert=4)), spec)

    def placed(x: jax.Array) -> jax.ShapeDtypeStruct:
        fits = x.shape == (64, 33)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place if fits else whole)

    whole = NamedSharding(place.mesh, P())
    state = checkpoint.restore(found(good), jax.tree.map(placed, make_state()))
    assert_bit_equal(state, make_state(10))
    assert state.params["w"].sharding == placed(state.params["w"]).sharding


def test_another_format_is_refused(good: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(good, workdir)
    edited(workdir, format=0)
    with pytest.raises(ValueError, match="checkpoint format 0, this version reads"):
        checkpoint.check_workdir(workdir, CFG)


def test_a_run_without_a_checkpoint_is_compared_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.txt").write_text("".join(f"{k} = {v!r}\n" for k, v in flatten(CFG).items()))
    assert checkpoint.check_workdir(tmp_path, CFG) is None
    with pytest.raises(ValueError, match=r"optim.clip_norm was 1.0, is 0.5"):
        checkpoint.check_workdir(
            tmp_path, mini.replace(CFG, optim=mini.replace(CFG.optim, clip_norm=0.5))
        )


def test_an_object_store_is_written_without_a_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"renamed {arguments}")

    monkeypatch.setattr(checkpoint, "local_path", lambda path: None)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, refuse)
    checkpoint.write_whole(epath.Path(tmp_path / "manifest.json"), "{}")
    assert (tmp_path / "manifest.json").read_text() == "{}"


def test_local_and_remote_paths_are_told_apart(tmp_path: Path) -> None:
    assert checkpoint.local_path("gs://bucket/run") is None
    assert checkpoint.local_path(epath.Path("s3://bucket/run")) is None
    assert checkpoint.local_path(epath.Path(tmp_path)) == tmp_path
    assert checkpoint.free_bytes("gs://bucket/run") is None
    free = checkpoint.free_bytes(epath.Path(tmp_path / "not" / "there"))
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
