"""The training program: its face, its files, its order, and what it does with bad steps."""

import json
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from etils import epath

from tests import mini
from v3jax import checkpoint, config, registry, train
from v3jax.metrics import read_rows
from v3jax.optim.schedules import batch_plan

ALWAYS = {
    "step",
    "tokens",
    "loss",
    "mtp_loss",
    "balance_loss",
    "lr",
    "grad_norm",
    "batch_size",
    "bias_speed",
    "bias_mean",
    "bias_spread",
    "max_violation",
    "tokens_per_second",
    "step_seconds",
}


def test_the_command_line_is_frozen() -> None:
    own = {f.name for f in flags.FLAGS.get_flags_for_module("v3jax.train")}
    assert own == {"exp", "workdir", "set", "list", "profile", "check", "distributed"}


def test_import_leaves_the_heavy_libraries_alone() -> None:
    code = (
        "import sys, time; t = time.monotonic(); import v3jax.train;"
        "print(f'{time.monotonic() - t:.2f}');"
        "print([m for m in ('orbax.checkpoint', 'grain', 'tensorboard', 'tokenizers') "
        "if m in sys.modules])"
    )
    done = mini.call([sys.executable, "-c", code])
    seconds, heavy = done.stdout.splitlines()
    print(f"import v3jax.train: {seconds} s (target 3)")
    assert heavy == "[]"


def test_a_run_writes_all_its_files() -> None:
    workdir = mini.finished()
    names = {p.name for p in workdir.iterdir()}
    assert names == {
        "checkpoints",
        "config.txt",
        "data_files.txt",
        "loads.jsonl",
        "metrics.jsonl",
        "report.html",
        "samples.txt",
        "tensorboard",
        "tokenizer.json",
    }
    assert (workdir / "samples.txt").read_text().strip()
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert "rows " in (workdir / "data_files.txt").read_text()


def test_a_workdir_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = mini.config(total_tokens=2 * 2 * 32.0, eval_every=0)
    result = mini.run_here(cfg, Path("runs/mini"))
    found = checkpoint.latest("runs/mini")
    assert found is not None
    assert found.step == result.step == 2
    checkpoint.verify("runs/mini", 2)


def test_every_row_has_the_promised_fields() -> None:
    cfg = mini.config()
    rows = read_rows(mini.finished() / "metrics.jsonl")
    sizes = list(batch_plan(cfg))
    assert [r["step"] for r in rows] == list(range(mini.N_STEPS)) == list(range(len(sizes)))
    assert all(row.keys() >= ALWAYS for row in rows)
    assert [r["batch_size"] for r in rows] == sizes
    assert [r["tokens"] for r in rows] == (np.cumsum(sizes) * cfg.data.seq_len).tolist()
    assert {2, 4} == set(sizes)


def test_evaluations_stand_at_step_0_at_every_interval_and_at_the_end() -> None:
    rows = read_rows(mini.finished() / "metrics.jsonl")
    for key in ("eval_loss", "eval_loss_ema", "bits_per_byte"):
        assert [r["step"] for r in rows if key in r] == [0, 10, 20, mini.N_STEPS - 1]
    assert rows[0]["eval_loss"] == pytest.approx(rows[0]["eval_loss_ema"], rel=1e-6)
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


def test_speed_figures_leave_evaluations_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(self: Any, state: Any) -> dict[str, float]:
        time.sleep(1.0)
        return {"eval_loss": 1.0}

    monkeypatch.setattr(train.Evaluation, "of", slow)
    cfg = mini.config(total_tokens=6 * 64.0, eval_every=2, checkpoint_every=0)
    mini.run_here(cfg, tmp_path)
    assert all(r["step_seconds"] < 0.9 for r in read_rows(tmp_path / "metrics.jsonl")[1:])


def test_the_last_row_is_evaluated_when_a_checkpoint_falls_on_the_last_step(
    tmp_path: Path,
) -> None:
    cfg = mini.config(checkpoint_every=mini.N_STEPS // 2)
    assert mini.run_here(cfg, tmp_path).finished
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert "eval_loss" in rows[-1]
    assert checkpoint.committed_steps(tmp_path) == [15, mini.N_STEPS]


def test_a_finished_run_started_again_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(mini.finished(), workdir)
    before = mini.contents(workdir)
    result = mini.run_here(mini.config(), workdir)
    assert (result.step, result.finished) == (mini.N_STEPS, True)
    after = mini.contents(workdir)
    assert {k for k in before if before[k] != after[k]} == set()
    assert {k for k in after if k not in before and "tfevents" not in k} == set()
    assert f"continuing from step {mini.N_STEPS}" in capsys.readouterr().out


def without_numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose first and last 20 say null wherever a float could have been NaN."""
    spoilt = {*rows[0], "max_violation"} - {"step", "tokens", "batch_size", "committed"}
    ends = [row["step"] for row in (rows[0], *rows[-20:])]
    return [row | dict.fromkeys(spoilt) if row["step"] in ends else row for row in rows]


@pytest.mark.parametrize("change", [without_numbers, lambda rows: rows[5:], lambda rows: []])
def test_a_finished_run_gets_its_report_whatever_its_rows_lack(tmp_path: Path, change: Any) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(mini.finished(), workdir)
    rows = change(read_rows(workdir / "metrics.jsonl"))
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (workdir / "report.html").unlink()
    assert mini.run_here(mini.config(), workdir).finished
    assert "held-out loss, averaged weights" in (workdir / "report.html").read_text()
    assert read_rows(workdir / "metrics.jsonl") == rows


def test_a_run_may_be_made_longer_and_its_rhythm_changed(tmp_path: Path) -> None:
    short = mini.config(total_tokens=6 * 64.0, eval_every=0)
    assert mini.run_here(short, tmp_path).step == 6
    longer = mini.config(total_tokens=8 * 64.0, eval_every=4)
    assert mini.run_here(longer, tmp_path).step > 6
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(len(rows)))


@pytest.mark.parametrize("name", registry.names())
def test_config_txt_gives_every_experiment_back(name: str) -> None:
    cfg = registry.get(name)
    assert config.from_text(config.to_text(cfg)) == cfg


def test_list_shows_every_experiment() -> None:
    done = mini.call(mini.command("--list"))
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == registry.names()


def test_check_builds_everything_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = mini.run_here(mini.config(), tmp_path / "run", check=True)
    assert not (tmp_path / "run").exists()
    assert (result.step, result.finished) == (0, False)
    shown = capsys.readouterr().out
    for name in (
        "mesh",
        "processes",
        "data digest",
        "temporaries a device",
        "disk free",
        "checkpoints kept",
    ):
        assert name in shown
    assert f"{mini.N_STEPS}\n" in shown


def test_check_refuses_a_disk_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "free_bytes", lambda workdir: 10**6)
    with pytest.raises(ValueError, match=r"free space or lower run.keep_checkpoints"):
        mini.run_here(mini.config(), tmp_path / "run", check=True)


def test_profile_writes_a_trace_also_when_the_run_ends_inside_it(tmp_path: Path) -> None:
    cfg = mini.config(total_tokens=6 * 64.0, eval_every=0, checkpoint_every=0)
    mini.run_here(cfg, tmp_path, profile=(3, 99))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    mini.run_here(cfg, tmp_path, profile=(2, 3))  # already done: nothing to trace


@pytest.mark.parametrize(
    ("start", "end", "traced"),
    [(0, 9, [3, 4, 5]), (4, 9, [4, 5]), (7, 9, []), (0, 2, []), (0, 5, [3, 4])],
)
def test_the_trace_holds_its_steps_wherever_the_process_started(
    monkeypatch: pytest.MonkeyPatch, start: int, end: int, traced: list[int]
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    trace, seen = train.Trace(epath.Path("profile"), (3, 6)), []
    for step in range(start, end):
        trace.before(step)
        seen += [step] if calls and calls[-1] == "start" else []
        trace.after(step + 1, {})
    trace.close()
    assert seen == traced
    assert calls == (["start", "stop"] if traced else [])


@pytest.mark.parametrize(
    ("text", "steps"), [("3:5", (3, 5)), (None, None), ("5:3", ""), ("3", ""), ("a:b", "")]
)
def test_profile_takes_a_range(text: str | None, steps: Any) -> None:
    if steps == "":
        with pytest.raises(ValueError, match="write A:B"):
            train._profile_range(text)
    else:
        assert train._profile_range(text) == steps


def poisoned_at(bad: set[int]) -> Any:
    """A `make_train_step` whose calls numbered in `bad` see an embedding of NaN."""

    def make(*arguments: Any) -> Any:
        step, calls = make_train_step(*arguments), iter(range(10**6))

        def poisoned(state: Any, *batch: Any) -> Any:
            if next(calls) not in bad:
                return step(state, *batch)
            with jax.transfer_guard("allow"):
                kept = jax.device_get(state)
                nan = state.params | {"embed_tokens": state.params["embed_tokens"] * jnp.nan}
                new, metrics = step(state.replace(params=nan), *batch)
                assert np.isnan(np.asarray(new.params["embed_tokens"])).all()
                places = jax.tree.map(lambda x: x.sharding, new)
                clean = jax.device_put(kept.replace(bad_steps=np.asarray(new.bad_steps)), places)
                return clean, metrics

        return poisoned

    make_train_step = train.make_train_step
    return make


def test_a_bad_step_commits_nothing_is_recorded_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = mini.config(total_tokens=8 * 64.0, eval_every=0, checkpoint_every=1, keep_checkpoints=20)
    monkeypatch.setattr(train, "make_train_step", poisoned_at({4, 5}))
    assert mini.run_here(cfg, tmp_path).finished
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [r["committed"] for r in rows] == [1, 1, 1, 1, 0, 0] + [1] * (len(rows) - 6)
    assert [rows[4][k] for k in ("loss", "bad_steps", "first_sequence")] == [None, 1, 8]
    assert rows[5]["bad_steps"] == 2
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[4], parse_constant=pytest.fail)
    digests = [checkpoint.load(tmp_path, s).manifest["arrays"] for s in range(3, 8)]
    changed = [{k for k in b if a[k] != b[k]} for a, b in pairwise(digests)]
    assert changed[1] == changed[2] == {"bad_steps"}
    assert {"step", "sequences", "params.embed_tokens"} <= changed[0] & changed[3]
    shown = capsys.readouterr().out
    for step, sequences in ((4, "8..9"), (5, "10..11")):
        line = f"step {step}: loss or gradient not finite, nothing committed"
        assert f"{line} (sequences {sequences})\n" in shown


def test_training_stops_after_so_many_bad_steps_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = mini.config(eval_every=0, checkpoint_every=4, max_bad_steps=3)
    monkeypatch.setattr(train, "make_train_step", poisoned_at(set(range(6, 99))))
    with pytest.raises(RuntimeError, match="step 8: 3 steps in a row without a finite loss"):
        mini.run_here(cfg, tmp_path)
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == list(range(9))
    checkpoint.verify(tmp_path, 8 if 8 in checkpoint.committed_steps(tmp_path) else 4)


def test_fp64_is_fp64_in_the_program_too(tmp_path: Path) -> None:
    """jax makes FP32 of FP64 in silence unless it is told not to."""
    changes = ("numerics.compute=fp64", "numerics.moments=fp32", "run.total_tokens=64")
    arguments = [word for change in changes for word in ("--set", change)]
    done = mini.call(mini.train_command(tmp_path / "run", *arguments))
    assert done.returncode == 0, done.stderr
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    arrays = found.manifest["arrays"]
    kinds = {a["dtype"] for name, a in arrays.items() if name.split(".")[0] in ("params", "ema")}
    kinds |= {a["dtype"] for name, a in arrays.items() if ".mu." in name or ".nu." in name}
    assert kinds == {"float64"}


@pytest.mark.slow
def test_an_absurd_learning_rate_ends_with_one_line(tmp_path: Path) -> None:
    done = mini.call(
        mini.train_command(tmp_path / "run", "--set", "optim.phases.0.lr=1e30", "--set",
                           "optim.warmup_steps=0")
    )  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "3 steps in a row without a finite loss; lower the learning rate" in done.stderr


def test_metrics_are_read_after_the_next_step_is_dispatched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    make_train_step, write = train.make_train_step, train.Recorder.write

    def make(*arguments: Any) -> Any:
        step, calls = make_train_step(*arguments), iter(range(99))

        def dispatch(*values: Any) -> Any:
            order.append(f"dispatch {next(calls)}")
            return step(*values)

        return dispatch

    def logged(self: Any, row: dict[str, Any], load_LE: Any) -> None:
        order.append(f"read {row['step']}")
        write(self, row, load_LE)

    monkeypatch.setattr(train, "make_train_step", make)
    monkeypatch.setattr(train.Recorder, "write", logged)
    mini.run_here(mini.config(total_tokens=4 * 64.0, eval_every=0, checkpoint_every=3), tmp_path)
    assert order == [
        "dispatch 0",
        "dispatch 1",
        "read 0",
        "dispatch 2",
        "read 1",
        "read 2",  # a checkpoint waits for the step before it
        "dispatch 3",
        "read 3",
    ]


def test_a_failed_save_ends_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Writer, "_save", full)
    cfg = mini.config(eval_every=0, checkpoint_every=4)
    with pytest.raises(RuntimeError, match=r"saving failed .*No space left"):
        mini.run_here(cfg, tmp_path)
    assert len(read_rows(tmp_path / "metrics.jsonl")) < 8, "raised at a step, not at the next save"


def test_a_second_signal_ends_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from v3jax.train import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.requested\n"
        "    print('asked', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=mini.REPO, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (128 + 15, "asked\n")
