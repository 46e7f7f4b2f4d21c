"""launch/full.sh: the plan, the order, what is passed over, where it stops."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import mini
from tests.flags import xla_flags
from tests.launch.shell import LAUNCH, REPO, environment, run, stub, wait_for

_FULL = LAUNCH / "full.sh"


def _full(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run(_FULL, *arguments, env=environment(PYTHON=stub(folder), TMPDIR=folder))


def test_the_plan_is_the_report_s_chain_as_far_as_it_is_registered(tmp_path: Path) -> None:
    done = _full(tmp_path, "--dry-run", "--", "--set", "run.seed=2")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "not in this tree: v3_ctx32k",
        "not in this tree: v3_ctx128k",
        "not in this tree: v3_grpo",
        f"{LAUNCH}/local.sh 1 -- --workdir=runs/v3_full --exp=v3_full --set run.seed=2",
        f"{LAUNCH}/local.sh 1 -- --workdir=runs/v3_sft --exp=v3_sft --set init_from=runs/v3_full "
        "--set run.seed=2",
    ]


def test_the_plan_of_a_cluster(tmp_path: Path) -> None:
    slurm = _full(
        tmp_path, "--dry-run", "--launcher=slurm", "--launch=--nodes=256", "--exp=v3_full"
    )
    assert slurm.stdout.startswith(
        "sbatch --wait --job-name=v3_full --dependency=singleton --nodes=256 "
    )
    xpk = _full(
        tmp_path,
        *("--dry-run", "--launcher=xpk", "--launch=--cluster=c", "--runs=gs://bucket/runs"),
        *("--exp=v3_full", "--exp=my/phase.py:last_one"),
    )
    assert f"{LAUNCH}/tpu_xpk.sh --wait --cluster=c --name=last-one" in xpk.stdout
    assert "init_from=gs://bucket/runs/v3_full" in xpk.stdout


def test_finished_phases_are_passed_over(tmp_path: Path) -> None:
    call = (f"--runs={tmp_path}/r", "--exp=one", "--exp=two.py")
    first = _full(tmp_path, *call)
    assert first.returncode == 0, first.stderr
    assert f"start: {tmp_path}/r/one" in first.stdout
    assert f"--exp=two.py --set init_from={tmp_path}/r/one" in first.stdout
    assert first.stdout.endswith(f"done: {tmp_path}/r/two\n")
    (tmp_path / "r" / "two" / "report.html").unlink()
    again = _full(tmp_path, *call)
    assert f"finished: {tmp_path}/r/one" in again.stdout
    assert f"start: {tmp_path}/r/two" in again.stdout


def test_it_stops_at_the_first_failure(tmp_path: Path) -> None:
    done = _full(tmp_path, f"--runs={tmp_path}/r", "--exp=one", "--exp=two", "--", "--code=7")
    assert done.returncode == 7
    assert "one ended with code 7; the same command starts there again" in done.stderr
    assert "two" not in done.stdout


def test_a_signal_saves_the_phase_and_stops_the_chain(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            str(_FULL),
            f"--runs={tmp_path}/r",
            "--exp=one",
            "--exp=two",
            "--launch=2",
            "--",
            "--wait",
        ],
        cwd=REPO,
        env=environment(PYTHON=stub(tmp_path), TMPDIR=tmp_path),
        stdout=out.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    wait_for("start", lambda: out.read_text().count("process ") == 2, 20)
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal does, to the group
    assert process.wait(30) == 1
    text = out.read_text()
    assert (text.count("told 0"), text.count("told 1")) == (1, 1)
    assert "one stopped before its end" in text
    assert "start: " + f"{tmp_path}/r/two" not in text


@pytest.mark.slow
def test_two_phases_train_and_the_second_starts_from_the_first(tmp_path: Path) -> None:
    mini.train_command(tmp_path / "unused")  # writes mini_experiment.py
    second = tmp_path / "second_phase.py"
    second.write_text((tmp_path / "mini_experiment.py").read_text())
    call = [f"--runs={tmp_path}/runs", f"--exp={tmp_path}/mini_experiment.py", f"--exp={second}"]
    env = environment(XLA_FLAGS=xla_flags())
    done = run(_FULL, *call, seconds=900, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"starting from the weights of {tmp_path}/runs/mini_experiment" in done.stdout
    assert done.stdout.endswith(f"done: {tmp_path}/runs/second_phase\n")
    again = run(_FULL, *call, env=env)
    assert again.stdout.count("finished: ") == 2
