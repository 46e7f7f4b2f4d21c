"""launch/local.sh: processes start together, are told together, and none is left behind."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import mini
from tests.flags import xla_flags
from tests.launch.shell import LAUNCH, REPO, environment, run, stub, wait_for

_LOCAL = LAUNCH / "local.sh"


def _start(folder: Path, *arguments: object, **variables: object) -> subprocess.Popen[str]:
    env = environment(PYTHON=stub(folder), TMPDIR=folder, **variables)
    return subprocess.Popen(
        [str(_LOCAL), *(str(a) for a in arguments)],
        cwd=REPO,
        env=env,
        stdout=(folder / "out").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_hear,
    )


def _hear() -> None:
    """Takes signals, whatever the tests were started with: a shell's background job ignores SIGINT,
    what `nohup` starts SIGHUP."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _left(folder: Path) -> list[str]:
    """Processes whose command line names the stub of `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended while we looked
        if f"{folder}/stub-python" in line:
            found.append(line)
    return found


def test_processes_know_each_other(tmp_path: Path) -> None:
    process = _start(tmp_path, 3, "--", "--exp=a b")
    assert process.wait(30) == 0
    lines = sorted((tmp_path / "out").read_text().splitlines())
    started = [line for line in lines if " of 3 at 127.0.0.1:" in line]
    assert [line.split(" at ")[0] for line in started] == [
        f"[{i}] process {i} of 3" for i in range(3)
    ]
    assert len({line.split(" at ")[1] for line in started}) == 1
    assert all(line.endswith("--exp=a b") for line in started)


def test_a_failure_ends_the_others_and_is_the_result(tmp_path: Path) -> None:
    began = time.monotonic()
    process = _start(tmp_path, 3, "--fail=1", "--wait")
    assert process.wait(30) == 7
    assert time.monotonic() - began < 12
    assert "[0] told 0" in (tmp_path / "out").read_text()
    assert _left(tmp_path) == []


def test_a_deaf_process_is_killed_after_another_failed(tmp_path: Path) -> None:
    process = _start(tmp_path, 2, "--fail=1", "--wait", "--deaf")
    assert process.wait(30) == 7
    assert "1 processes did not end in time; killed" in (tmp_path / "out").read_text()
    assert _left(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_every_process_once(tmp_path: Path, number: signal.Signals) -> None:
    process = _start(tmp_path, 2, "--wait")
    wait_for("start", lambda: (tmp_path / "out").read_text().count("process ") == 2, 20)
    process.send_signal(number)
    assert process.wait(30) == 0
    text = (tmp_path / "out").read_text()
    assert (text.count("told 0"), text.count("told 1")) == (1, 1)
    assert _left(tmp_path) == []


def test_a_terminal_s_signal_to_the_group_also_comes_once(tmp_path: Path) -> None:
    process = _start(tmp_path, 2, "--wait")
    wait_for("start", lambda: (tmp_path / "out").read_text().count("process ") == 2, 20)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == 0
    text = (tmp_path / "out").read_text()
    assert (text.count("told 0"), text.count("told 1")) == (1, 1)


def test_the_time_to_save_has_a_limit(tmp_path: Path) -> None:
    process = _start(tmp_path, 2, "--wait", "--deaf", GRACE=1)
    wait_for("start", lambda: (tmp_path / "out").read_text().count("process ") == 2, 20)
    process.terminate()
    assert process.wait(30) == 137
    assert _left(tmp_path) == []


def test_gpus_are_dealt_out(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(
        '#!/usr/bin/env bash\n[[ $1 == -c ]] && echo 12345 || echo "sees $CUDA_VISIBLE_DEVICES"\n'
    )
    program.chmod(0o755)
    env = environment(PYTHON=program, CUDA_VISIBLE_DEVICES="4,5,6,7")
    done = run(_LOCAL, 2, "--exp=a", env=env)
    assert sorted(done.stdout.splitlines()) == ["[0] sees 4,5", "[1] sees 6,7"]


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path: Path) -> None:
    arguments = mini.train_command(tmp_path / "run", "--set", "mesh.data=2")[3:]
    done = run(_LOCAL, 2, "--", *arguments, seconds=600, env=environment(XLA_FLAGS=xla_flags()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"[0] done: {tmp_path}/run/report.html" in done.stdout
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == mini.N_STEPS
