"""launch/slurm.sh on two virtual nodes: it starts, stops, continues and ends as it says."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import mini
from tests.flags import xla_flags
from tests.launch.cluster import Cluster, cluster
from tests.launch.shell import LAUNCH, REPO, environment, run, stub, wait_for

_SCRIPT = LAUNCH / "slurm.sh"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as running:
        yield running


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder to submit from, so that logs stay out of the repository."""
    (tmp_path / "launch").symlink_to(LAUNCH)
    return tmp_path


def _submit(slurm: Cluster, tree: Path, *arguments: object, **variables: object) -> str:
    """Submits a job of two nodes from `tree`, with a stub to train unless PYTHON is given."""
    script = ["bash", "-c", 'cd "$0" && exec "$@"', tree, "sbatch", "--nodes=2", "--parsable"]
    return slurm.call(*script, _SCRIPT, *arguments, **{"PYTHON": stub(tree)} | variables).strip()


def _end(slurm: Cluster, job: str, seconds: float = 60) -> str:
    """The state a job ends in."""
    active = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
    wait_for(f"job {job}", lambda: slurm.state(job) not in active, seconds)
    return slurm.state(job)


def _running(tree: Path, job: str) -> bool:
    logs = [tree / f"slurm-{job}-{task}.log" for task in (0, 1)]
    return all(log.exists() and "process " in log.read_text() for log in logs)


def test_two_nodes_make_one_run(slurm: Cluster, tree: Path) -> None:
    job = _submit(slurm, tree, "--exp=a b")
    assert _end(slurm, job) == "COMPLETED"
    for task in (0, 1):
        text = (tree / f"slurm-{job}-{task}.log").read_text()
        assert f"{task}: process {task} of 2 at 127.0.0.1:{61440 + int(job)}: --exp=a b" in text


def test_a_failure_ends_the_job_with_its_code(slurm: Cluster, tree: Path) -> None:
    job = _submit(slurm, tree, "--fail=1", "--wait")
    assert _end(slurm, job) == "FAILED"
    assert "ExitCode=7:0" in slurm.call("scontrol", "show", "job", job)


@pytest.mark.slow
def test_a_job_told_to_stop_queues_itself_and_continues(slurm: Cluster, tree: Path) -> None:
    job = _submit(slurm, tree, f"--wait-once={tree}/once", RETRY_AFTER=0)
    wait_for("start", lambda: _running(tree, job), 60)
    slurm.call("scancel", "--signal=TERM", job)  # what the time limit does: tasks only
    assert _end(slurm, job, 120) == "COMPLETED"
    assert "Restarts=1" in slurm.call("scontrol", "show", "job", job)
    log = (tree / f"slurm-{job}.log").read_text()
    assert "time is up after" in log
    assert f"start 1 of job {job}" in log
    assert "done: " in (tree / f"slurm-{job}-0.log").read_text()


def test_a_start_that_was_told_to_stop_too_soon_is_not_repeated(slurm: Cluster, tree: Path) -> None:
    job = _submit(slurm, tree, "--wait")
    wait_for("start", lambda: _running(tree, job), 60)
    slurm.call("scancel", "--signal=TERM", job)
    assert _end(slurm, job) == "FAILED"
    assert "too soon to try again" in (tree / f"slurm-{job}.log").read_text()


@pytest.mark.slow
def test_a_late_crash_is_tried_again_and_a_mistake_is_not(slurm: Cluster, tree: Path) -> None:
    job = _submit(slurm, tree, "--code=2", RETRY_AFTER=0)
    assert _end(slurm, job) == "FAILED"
    job = _submit(slurm, tree, "--code=1")
    assert _end(slurm, job) == "FAILED"  # at once: it would do so again
    job = _submit(slurm, tree, "--code=1", RETRY_AFTER=0)
    log = tree / f"slurm-{job}.log"
    wait_for("second start", lambda: log.exists() and "start 1 of" in log.read_text(), 120)
    slurm.call("scancel", job)


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Cluster, tree: Path) -> None:
    job = _submit(slurm, tree, "--wait", RETRY_AFTER=0)
    wait_for("start", lambda: _running(tree, job), 60)
    slurm.call("scancel", job)
    assert _end(slurm, job) == "CANCELLED"
    assert "stopped by a signal" in (tree / f"slurm-{job}-0.log").read_text()
    assert "queued again" not in (tree / f"slurm-{job}.log").read_text()


def test_full_sh_chains_jobs(slurm: Cluster, tree: Path) -> None:
    full = ["bash", "-c", 'cd "$0" && exec "$@"', tree, "launch/full.sh", "--launcher=slurm"]
    call = [*full, "--launch=--nodes=2", f"--runs={tree}/runs", "--exp=one", "--exp=two"]
    out = slurm.call(*call, PYTHON=stub(tree))
    assert out.count("Submitted batch job") == 2
    assert out.endswith(f"done: {tree}/runs/two\n")
    second = max(tree.glob("slurm-*-0.log"), key=lambda log: int(log.name.split("-")[1]))
    assert f"--set init_from={tree}/runs/one" in second.read_text()


def test_an_image_is_run_by_apptainer_or_pyxis(tree: Path) -> None:
    (tree / "bin").mkdir()
    tools = {
        "srun": 'echo "srun $*"',
        "scontrol": "echo n1",
        "getent": "exit 0",
    }
    for name, body in tools.items():
        (tree / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tree / "bin" / name).chmod(0o755)
    env = environment(SLURM_JOB_ID=7, SLURM_SUBMIT_DIR=tree, SLURM_JOB_NODELIST="n1")
    env |= {"SLURM_NTASKS": "1", "PYTHON": "python"}
    env["PATH"] = f"{tree}/bin:{env['PATH']}"
    (tree / "slurm-7-0.log").touch()
    sif = run(_SCRIPT, "--exp=a", env=env | {"IMAGE": "v3.sif"}).stdout
    assert "task apptainer exec --nv --bind" in sif
    assert "v3.sif python -m v3jax.train --exp=a" in sif
    pyxis = run(_SCRIPT, "--exp=a", env=env | {"IMAGE": "registry/v3:cuda"}).stdout
    assert "--container-image=registry/v3:cuda" in pyxis
    assert "task python -m v3jax.train --exp=a" in pyxis


@pytest.mark.slow
def test_v3_tiny_trains_on_two_nodes_and_a_second_job_ends_at_once(
    slurm: Cluster, tree: Path
) -> None:
    workdir = tree / "runs" / "v3_tiny"
    shorter = ["run.total_tokens=2e4", "run.eval_every=0", "optim.warmup_steps=2", "mesh.data=2"]
    sets = [f"--set={change}" for change in shorter]
    environ = {"PYTHON": mini.command()[0], "XLA_FLAGS": xla_flags(), "PYTHONPATH": REPO}
    for start in ("step 1/", "continuing from step"):
        job = _submit(slurm, tree, "--exp=v3_tiny", f"--workdir={workdir}", *sets, **environ)
        state = _end(slurm, job, 900)
        log = (tree / f"slurm-{job}-0.log").read_text()
        assert state == "COMPLETED", log
        assert start in log
        assert f"done: {workdir}/report.html" in log
    assert (workdir / "report.html").exists()
