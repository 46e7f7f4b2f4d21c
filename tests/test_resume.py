"""A run that is killed again and again ends bit for bit like one that never was."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import mini
from v3jax import checkpoint
from v3jax.data.dataset import open_dataset
from v3jax.data.loader import make_loader
from v3jax.metrics import read_rows

WALL_CLOCK = {"tokens_per_second", "step_seconds", "data_wait_seconds", "mfu"}
N_KILLS = 4
SEED = 20241227


def kill_after(workdir: Path, n_rows: int, delay: float) -> int:
    """Starts the run, kills it `delay` seconds after row `n_rows`; the rows there were then."""
    process = subprocess.Popen(
        mini.train_command(workdir),
        cwd=mini.REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len(read_rows(workdir / "metrics.jsonl")) >= n_rows:
            time.sleep(delay)
            break
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), errors
    return len(read_rows(workdir / "metrics.jsonl"))


def comparable(workdir: Path, name: str) -> list[dict[str, object]]:
    return [
        {k: v for k, v in row.items() if k not in WALL_CLOCK} for row in read_rows(workdir / name)
    ]


def assert_same_end(workdir: Path, whole: Path) -> None:
    """Rows, final arrays by digest, position in the data, and texts are those of `whole`."""
    for name in ("metrics.jsonl", "loads.jsonl"):
        assert comparable(workdir, name) == comparable(whole, name)
    ends = [checkpoint.load(folder, mini.N_STEPS).manifest for folder in (workdir, whole)]
    for name in ("arrays", "data", "step"):
        assert ends[0][name] == ends[1][name]
    for name in ("samples.txt", "tokenizer.json", "data_files.txt"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.faults
def test_killed_runs_end_bit_identical(tmp_path: Path) -> None:
    whole = mini.finished()
    killed = tmp_path / "killed"
    rng = random.Random(SEED)
    n_rows = restored = 0
    for _ in range(N_KILLS):
        n_rows = kill_after(killed, n_rows + rng.randrange(2, 9), rng.uniform(0, 0.05))
        steps = checkpoint.committed_steps(killed)
        print(f"seed {SEED}: killed after {n_rows} rows, complete checkpoints {steps}")
        if steps:
            checkpoint.verify(killed, steps[-1])
            restored += steps[-1] < mini.N_STEPS
    assert restored > 0, "no kill left a checkpoint to continue from"
    done = mini.call(mini.train_command(killed))
    assert done.returncode == 0, done.stderr

    assert_same_end(killed, whole)
    assert [row["step"] for row in read_rows(killed / "metrics.jsonl")] == [*range(mini.N_STEPS)]
    assert (killed / "config.txt").read_bytes() == (whole / "config.txt").read_bytes()


def test_the_data_go_on_where_they_were() -> None:
    cfg = mini.config()
    dataset = open_dataset(cfg)
    straight, first = make_loader(cfg, dataset), make_loader(cfg, dataset)
    batches = [next(straight) for _ in range(20)]
    for step in range(7):
        assert (next(first).tokens_MRS == batches[step].tokens_MRS).all()
    resumed = make_loader(cfg, dataset)
    resumed.set_state(first.get_state())
    for step in range(7, 20):
        batch = next(resumed)
        assert batch.n_micro == batches[step].n_micro
        assert (batch.tokens_MRS == batches[step].tokens_MRS).all()
        assert (batch.segments_MRS == batches[step].segments_MRS).all()


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_zero_and_the_same_command_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    workdir = tmp_path / "run"
    command = mini.train_command(workdir, "--set", "run.checkpoint_every=0")
    process = subprocess.Popen(
        command,
        cwd=mini.REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if read_rows(workdir / "metrics.jsonl"):
            break
        time.sleep(0.002)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    step = checkpoint.committed_steps(workdir)[-1]
    checkpoint.verify(workdir, step)
    assert f"stopped by a signal at step {step}" in output
    assert len(read_rows(workdir / "metrics.jsonl")) == step < mini.N_STEPS

    done = mini.call(command)
    assert done.returncode == 0, done.stderr
    assert f"continuing from step {step}" in done.stdout
    assert_same_end(workdir, mini.finished())
