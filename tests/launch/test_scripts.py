"""Every script parses, passes shellcheck, and says in one line how it is called."""

from pathlib import Path

import pytest

from tests.launch.shell import LAUNCH, REPO, environment, need, run, stub

_SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda path: path.name)
def test_parses(script: Path) -> None:
    done = run("bash", "-n", script)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_finds_nothing() -> None:
    need(shellcheck="shellcheck")
    done = run("shellcheck", "-x", *(script.relative_to(REPO) for script in _SCRIPTS))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("local.sh", "'' is no number of processes"),
        ("local.sh 0 --exp=a", "'0' is no number of processes"),
        ("local.sh 2 --", "nothing to train"),
        ("slurm.sh --exp=a", "runs under SLURM"),
        ("pod.sh gpu", "usage"),
        ("pod.sh gpux --exp=a", "unknown platform 'gpux'"),
        ("full.sh --launcher=ray", "unknown option '--launcher=ray'"),
        ("full.sh --exp", "unknown option '--exp'"),
        ("tpu_xpk.sh --cluster=c", "nothing to train after --"),
        ("tpu_xpk.sh --cluster=c -- --exp=a", "--tpu-type= is missing"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(tmp_path: Path, call: str, says: str) -> None:
    script, *arguments = call.split()
    env = environment(PYTHON=stub(tmp_path))
    done = run("bash", LAUNCH / script, *arguments, env=env)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
