"""Several real processes on loopback are one run: same numbers, one writer, one end."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import mini
from tests.flags import xla_flags
from v3jax import checkpoint, processes
from v3jax.config import MeshConfig
from v3jax.metrics import read_rows
from v3jax.sharding import make_mesh

WALL_CLOCK = {"tokens_per_second", "step_seconds", "data_wait_seconds", "mfu"}
START_SECONDS = 240  # for a machine that other tests load

_FILE = """from dataclasses import replace
from tests import mini
from v3jax.config import BatchConfig
from v3jax.registry import register

@register
def processes_run():
    batch = BatchConfig(micro_batch=4, start=4, end=8, ramp_tokens=12 * 4 * 32.0)
    return replace(mini.config(total_tokens=36 * 4 * 32.0), batch=batch)
"""
_FULL_DISK = """
from v3jax import checkpoint
_write = checkpoint.write_whole

def _write_but_no_manifest(file, text):
    if file.name == "manifest.json":
        raise OSError(28, "No space left on device")
    _write(file, text)

checkpoint.write_whole = _write_but_no_manifest
"""
N_STEPS = 21


@dataclass
class Process:
    """One process of a run, and where its output goes."""

    popen: subprocess.Popen[bytes]
    log: Path

    def end(self, seconds: float = 400) -> int:
        """Its exit code; a process that does not end in time is killed, and the test fails."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            pytest.fail(f"still running after {seconds} s: {self.text}")

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def errors(self) -> list[str]:
        """The lines of our own that it left on stderr."""
        return [line for line in self.text.splitlines() if line.startswith("v3jax.")]


Launch = Callable[..., list[Process]]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts `n` processes of one run; whatever is left of them is killed at the end."""
    started: list[Process] = []

    def start(
        n: int,
        workdir: Path,
        *arguments: str,
        devices: int = 1,
        own: Sequence[Sequence[str]] = (),
        code: str = "",
        **variables: Any,
    ) -> list[Process]:
        """`own` are arguments and `variables` lists of values for each process; all run `code`."""
        file = tmp_path / "experiment.py"
        file.write_text(_FILE + code)
        address = f"127.0.0.1:{free_port()}"
        run = []
        for k in range(n):
            env = os.environ | {
                "XLA_FLAGS": xla_flags(devices),
                "V3JAX_START_SECONDS": str(START_SECONDS),
                "V3JAX_HEARTBEAT_SECONDS": "15",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(n),
                "JAX_PROCESS_ID": str(k),
                **{name: values[k] for name, values in variables.items()},
            }
            command = mini.command(f"--exp={file}", f"--workdir={workdir}", *arguments)
            log = tmp_path / f"log-{len(started)}"
            with log.open("wb") as out:
                popen = subprocess.Popen(
                    [*command, *(own[k] if own else ())],
                    cwd=mini.REPO,
                    env=env,
                    stdout=out,
                    stderr=out,
                )
            run.append(Process(popen, log))
            started.append(run[-1])
        return run

    yield start
    for process in started:
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def assert_all_end_well(run: list[Process]) -> None:
    for process in run:
        assert process.end() == 0, process.text
        assert not process.errors


def await_rows(workdir: Path, run: list[Process], n: int = 1) -> None:
    """Waits until `n` steps are recorded."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and len(read_rows(workdir / "metrics.jsonl")) < n:
        assert run[0].popen.poll() is None, run[0].text
        time.sleep(0.01)


def rows_of(workdir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in WALL_CLOCK} for row in read_rows(workdir / name)
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics, loads, data positions, biases and every float to the last bit."""
    assert rows_of(one) == rows_of(other)
    assert rows_of(one, "loads.jsonl") == rows_of(other, "loads.jsonl")
    steps = checkpoint.committed_steps(one)
    assert steps == checkpoint.committed_steps(other)
    for step in steps:
        a, b = (checkpoint.load(workdir, step).manifest for workdir in (one, other))
        assert a["data"] == b["data"]
        assert a["arrays"] == b["arrays"]
    for name in ("samples.txt", "tokenizer.json", "data_files.txt"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with two devices."""
    return one_process(tmp_path_factory.mktemp("whole"), 2, "--set", "mesh.data=2")


def one_process(folder: Path, devices: int, *arguments: str) -> Path:
    (folder / "experiment.py").write_text(_FILE)
    command = [f"--exp={folder / 'experiment.py'}", f"--workdir={folder / 'run'}", *arguments]
    env = os.environ | {"XLA_FLAGS": xla_flags(devices)}
    done = subprocess.run(
        mini.command(*command), cwd=mini.REPO, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_two_processes_give_the_run_of_one_to_the_last_bit(
    launch: Launch, tmp_path: Path, whole: Path
) -> None:
    run = launch(2, tmp_path / "run", "--set", "mesh.data=2")
    assert_all_end_well(run)
    assert len(rows_of(whole)) == N_STEPS
    assert_same_run(tmp_path / "run", whole)
    assert "done: " in run[0].text
    shown = [line for line in run[1].text.splitlines() if not line.startswith("[Gloo]")]
    assert shown == [], "only the writer prints"


@pytest.mark.slow
@pytest.mark.faults
def test_one_signal_stops_all_and_one_process_continues(
    launch: Launch, tmp_path: Path, whole: Path
) -> None:
    """SIGTERM to process 1 saves once and ends both; then one process on one device goes on."""
    workdir = tmp_path / "run"
    arguments = ["--set", "run.checkpoint_every=0"]
    run = launch(2, workdir, "--set", "mesh.data=2", *arguments)
    await_rows(workdir, run)
    run[1].popen.send_signal(signal.SIGTERM)
    assert_all_end_well(run)
    (step,) = checkpoint.committed_steps(workdir)
    checkpoint.verify(workdir, step)
    assert f"stopped by a signal at step {step}" in run[0].text
    assert len(rows_of(workdir)) == step < N_STEPS
    assert rows_of(workdir)[1:] == rows_of(whole)[1:step]

    run = launch(1, workdir, *arguments)
    assert_all_end_well(run)
    assert f"continuing from step {step}" in run[0].text
    assert_same_data_nearly_same_floats(workdir, whole)


def assert_same_data_nearly_same_floats(one: Path, other: Path) -> None:
    a, b = rows_of(one), rows_of(other)
    for name in ("step", "tokens", "batch_size", "committed"):
        assert [row[name] for row in a] == [row[name] for row in b]
    losses = np.array([[row["loss"] for row in rows] for rows in (a, b)])
    np.testing.assert_allclose(*losses, rtol=2e-3)  # other rows would differ by ten times that
    ends = [checkpoint.load(workdir, N_STEPS).manifest["data"] for workdir in (one, other)]
    assert ends[0] == ends[1]


@pytest.mark.faults
def test_a_killed_process_ends_the_others(launch: Launch, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    run = launch(2, workdir, "--set", "mesh.data=2", "--set", "run.total_tokens=1e6")
    await_rows(workdir, run)
    run[1].popen.kill()
    assert run[0].end(90) != 0
    assert len(run[0].errors) <= 1


@pytest.mark.slow
@pytest.mark.faults
def test_without_the_coordinator_the_others_end(launch: Launch, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    run = launch(2, workdir, "--set", "mesh.data=2", "--set", "run.total_tokens=1e6")
    await_rows(workdir, run)
    run[0].popen.kill()
    assert run[1].end(90) != 0


def test_processes_that_disagree_all_say_so(launch: Launch, tmp_path: Path) -> None:
    run = launch(2, tmp_path / "run", own=([], ["--set", "optim.clip_norm=0.5"]))
    for k, process in enumerate(run):
        assert process.end() == 1
        assert process.text.splitlines() == [
            f"v3jax.train: process {k} of 2: the processes disagree: optim.clip_norm is 1.0 on "
            "process 0, 0.5 on process 1; start all alike"
        ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lacking", [0, 1])
def test_one_process_without_its_corpus_ends_all(
    launch: Launch, tmp_path: Path, lacking: int
) -> None:
    """Every process names the one whose home lacks the text; nothing is written."""
    homes = [tmp_path / f"home-{k}" for k in range(2)]
    for k, home in enumerate(homes):
        home.mkdir()
        if k != lacking:
            (home / "texts").mkdir()
            for i in range(30):
                (home / "texts" / f"{i}.txt").write_text(f"document {i} " + "of many words " * i)
    run = launch(
        2,
        tmp_path / "run",
        "--set",
        "data.path=~/texts",
        "--set",
        "mesh.data=2",
        HOME=[str(home) for home in homes],
    )
    cause = "~/texts: no such file"
    for k, process in enumerate(run):
        assert process.end(120) == 1
        (line,) = process.text.splitlines()
        assert cause in line
        assert line.startswith(f"v3jax.train: process {k} of 2: ")
        assert (f"process {lacking} failed: " in line) == (k != lacking)
    assert not (tmp_path / "run").exists()


def test_a_missing_coordinator_is_named(launch: Launch, tmp_path: Path) -> None:
    port = free_port()
    (process,) = launch(
        1,
        tmp_path / "run",
        JAX_COORDINATOR_ADDRESS=[f"127.0.0.1:{port}"],
        JAX_NUM_PROCESSES=["2"],
        JAX_PROCESS_ID=["1"],
        V3JAX_START_SECONDS=["2"],
    )
    assert process.end(120) == 1
    assert process.text.splitlines() == [
        f"v3jax.train: process 1 of 2: no coordinator at 127.0.0.1:{port} after 2 s; "
        "start process 0 or correct JAX_COORDINATOR_ADDRESS"
    ]


def test_a_coordinator_that_stays_alone_says_so(launch: Launch, tmp_path: Path) -> None:
    (process,) = launch(
        1,
        tmp_path / "run",
        JAX_NUM_PROCESSES=["2"],
        V3JAX_START_SECONDS=["2"],
    )
    assert process.end(120) == 1
    (line,) = process.text.splitlines()
    assert line.startswith("v3jax.train: process 0 of 2: not all 2 processes came to 127.0.0.1:")


ALL_THREE = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"JAX_NUM_PROCESSES": None}, "without JAX_NUM_PROCESSES: set all three or none"),
        ({"JAX_COORDINATOR_ADDRESS": None}, "without JAX_COORDINATOR_ADDRESS"),
        ({"JAX_PROCESS_ID": None, "JAX_NUM_PROCESSES": None}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS=10.0.0.1: write host"),
        ({"JAX_COORDINATOR_ADDRESS": "h:99999"}, "write host:port"),
        ({"JAX_NUM_PROCESSES": "many"}, "JAX_NUM_PROCESSES=many: must be a positive number"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: must be within 0..3"),
        ({"V3JAX_START_SECONDS": "soon"}, "V3JAX_START_SECONDS=soon: must be a positive number"),
    ],
)
def test_variables_that_are_missing_or_wrong_are_named(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], named: str
) -> None:
    for name, value in (ALL_THREE | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=named):
        processes.start("train")


def test_without_variables_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALL_THREE:
        monkeypatch.delenv(name, raising=False)
    processes.start("train")
    assert (processes.count(), processes.index(), processes.label()) == (1, 0, "")
    assert processes.is_writer()
    processes.agree({"a": 1})
    assert processes.decided(lambda: 3) == 3
    assert processes.StopTogether().due(0, asked=True)
    assert not processes.StopTogether().due(0, asked=False)
    processes.finish()


def test_distributed_without_a_cluster_is_refused() -> None:
    done = mini.call(mini.command("--exp=v3_tiny", "--distributed"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "--distributed: no SLURM, Kubernetes, Open MPI or TPU pod found; set JAX_" in done.stderr


class Store:
    """The key-value store of a coordinator, in this process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        assert key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [(k, v) for k, v in self.values.items() if k.startswith(prefix)]


@pytest.mark.parametrize("seed", range(40))
def test_all_stop_before_the_same_step_whoever_is_asked_whenever(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Processes at random speeds, none more than the loop allows ahead of the slowest."""
    rng = random.Random(seed)
    n, n_steps = rng.choice([2, 3, 5]), 40
    state = SimpleNamespace(num_processes=n, process_id=0, client=Store())
    monkeypatch.setattr(processes, "distributed", SimpleNamespace(global_state=state))
    monkeypatch.setattr(processes, "_rounds", iter([0] * n))
    stops = [processes.StopTogether() for _ in range(n)]
    step, ended = [0] * n, [False] * n
    asked, at = rng.randrange(n), rng.randrange(n_steps)
    while not all(ended):
        slowest = min(step)
        # Before step t a process has read step t - 2: all have dispatched that.
        free = [k for k in range(n) if not ended[k] and step[k] - 2 < slowest + (not ended[k])]
        k = rng.choice([k for k in free if step[k] <= slowest + 1])
        state.process_id = k
        ended[k] = step[k] == n_steps or stops[k].due(step[k], k == asked and step[k] >= at)
        step[k] += not ended[k]
    assert len(set(step)) == 1
    assert at < step[0] <= max(n_steps, at + 6)


@pytest.mark.parametrize(
    ("mesh", "spec", "axis"),
    [
        (MeshConfig(data=4, expert=2), P(None, ("data", "node", "expert"), None), 1),
        (MeshConfig(data=2, expert=2), P(None, ("data", "expert"), None), 1),
        (MeshConfig(data=2, expert=2), P(None, "expert", None), 1),
        (MeshConfig(data=2), P(None, None, None), 1),
    ],
)
def test_shares_make_up_the_array(mesh: MeshConfig, spec: P, axis: int) -> None:
    place = NamedSharding(make_mesh(mesh), spec)
    values = np.arange(3 * 8 * 5, dtype=np.int32).reshape(3, 8, 5)
    held = processes.held(place, values.shape, axis)
    assert held == list(range(8))
    with jax.transfer_guard("disallow"):
        made = processes.joined(place, values.shape, axis, held, values)
        whole = processes.placed(values, place)
    for array in (made, whole):
        assert array.sharding == place
        assert (np.asarray(array) == values).all()


def test_a_process_holds_the_rows_of_its_own_devices() -> None:
    """A sharding as process 1 of 2 sees it, whose devices hold rows 2, 3, 6 and 7."""
    parts = {"a": (slice(None), slice(2, 4)), "b": (slice(None), slice(6, 8))}
    place: Any = SimpleNamespace(addressable_devices_indices_map=lambda shape: parts)
    assert processes.held(place, (3, 8), 1) == [2, 3, 6, 7]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([{"a": "1"}, {"a": "1"}], None),
        ([{"a": "1"}, {"a": "1"}, {"a": "2"}], "a is 1 on process 0, 2 on process 2"),
        ([{"a": "1"}, {}], "a is 1 on process 0, None on process 1"),
        ([dict.fromkeys("abcde", "1"), dict.fromkeys("abcde", "2")], "and 2 more; start all alike"),
    ],
)
def test_the_first_differences_are_named(texts: list[dict[str, str]], said: str | None) -> None:
    found = processes._difference(texts)
    assert (found is None) == (said is None)
    assert found is None or (said is not None and said in found)


def test_an_object_that_only_the_writer_has_is_gathered_whole() -> None:
    place = NamedSharding(make_mesh(MeshConfig(data=8)), P("data"))
    tree = {"a": processes.placed(np.arange(16), place), "b": jnp.float32(2)}
    whole = processes.gathered(tree)
    assert (whole["a"] == np.arange(16)).all()
    assert whole["b"] == 2


def test_one_process_imports_nothing_for_many() -> None:
    code = (
        "import sys, v3jax.train\n"
        "print([m for m in ('jax.experimental.multihost_utils', 'orbax.checkpoint') "
        "if m in sys.modules])"
    )
    done = mini.call([sys.executable, "-c", code])
    assert done.stdout == "[]\n"


# ---- Four processes


def nearly_equal(one: Path, other: Path) -> None:
    """Counts, biases and data order equal; floats within 1e-6 of their leaf's largest value."""
    a, b = (
        checkpoint.load(workdir, checkpoint.committed_steps(workdir)[-1])
        for workdir in (one, other)
    )
    assert a.manifest["data"] == b.manifest["data"]
    names = a.manifest["arrays"]
    wanted = {name: checkpoint._abstract(entry) for name, entry in names.items()}
    left, right = checkpoint.read_arrays(a, wanted), checkpoint.read_arrays(b, wanted)
    for name, x in left.items():
        y = right[name]
        if name.startswith("router_state") or not jnp.issubdtype(x.dtype, jnp.floating):
            assert (x == y).all(), name
        else:
            apart = np.abs(x.astype(np.float64) - y.astype(np.float64)).max()
            assert apart <= 1e-6 * np.abs(x.astype(np.float64)).max(), name
    assert rows_of(one, "loads.jsonl") == rows_of(other, "loads.jsonl")


FOUR = {"data": ("mesh.data=4",), "expert": ("mesh.data=2", "mesh.expert=2")}


def settings(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


@pytest.mark.parametrize(
    ("n", "mesh"),
    [
        pytest.param(4, "expert", marks=pytest.mark.slow),
        pytest.param(4, "data", marks=pytest.mark.exhaustive),
        pytest.param(2, "expert", marks=pytest.mark.exhaustive),
    ],
)
def test_four_devices_in_order_give_the_run_of_one_process_to_the_last_bit(
    launch: Launch, tmp_path: Path, mesh: str, n: int
) -> None:
    arguments = settings(*FOUR[mesh], "mesh.deterministic=True", "run.total_tokens=1024")
    (tmp_path / "one").mkdir()
    one = one_process(tmp_path / "one", 4, *arguments)
    run = launch(n, tmp_path / "run", *arguments, devices=4 // n)
    assert_all_end_well(run)
    assert_same_run(tmp_path / "run", one)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("expert", marks=pytest.mark.slow),
        pytest.param("data", marks=pytest.mark.exhaustive),
    ],
)
def test_four_processes_give_nearly_the_run_of_one(
    launch: Launch, tmp_path: Path, mesh: str
) -> None:
    """After a step; BF16 moments would differ by a whole unit where rounding tips over."""
    arguments = settings(*FOUR[mesh], "run.total_tokens=64", "numerics.moments=fp32")
    (tmp_path / "one").mkdir()
    one = one_process(tmp_path / "one", 4, *arguments)
    assert_all_end_well(launch(4, tmp_path / "run", *arguments))
    nearly_equal(tmp_path / "run", one)


@pytest.mark.slow
def test_two_processes_then_one_then_four_see_the_same_data(
    launch: Launch, tmp_path: Path, whole: Path
) -> None:
    workdir = tmp_path / "run"
    for n, mesh, tokens in (
        (2, ("mesh.data=2",), 1024),
        (1, (), 2560),
        (4, FOUR["expert"], 36 * 4 * 32),
    ):
        arguments = settings(*mesh, f"run.total_tokens={tokens}", "run.eval_every=0")
        assert_all_end_well(launch(n, workdir, *arguments))
    assert_same_data_nearly_same_floats(workdir, whole)


@pytest.mark.slow
def test_two_processes_start_from_the_same_weights(
    launch: Launch, tmp_path: Path, whole: Path
) -> None:
    changes = ("mesh.data=2", f"init_from={whole}", "run.total_tokens=512", "run.eval_every=1")
    (tmp_path / "one").mkdir()
    one = one_process(tmp_path / "one", 2, *settings(*changes))
    assert_all_end_well(launch(2, tmp_path / "run", *settings(*changes)))
    assert_same_run(tmp_path / "run", one)
    assert rows_of(one)[0]["eval_loss"] == pytest.approx(rows_of(whole)[-1]["eval_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.faults
def test_a_failed_save_ends_every_process(launch: Launch, tmp_path: Path) -> None:
    arguments = settings("mesh.data=2", "run.total_tokens=1e6")
    run = launch(2, tmp_path / "run", *arguments, code=_FULL_DISK)
    for k, process in enumerate(run):
        assert process.end() == 1
        (line,) = process.errors
        assert line.startswith(f"v3jax.train: process {k} of 2: ")
        assert "saving failed ([Errno 28] No space left on device)" in line
        assert "the previous checkpoint is untouched" in line


def test_manifests_of_every_process_count_are_alike(whole: Path) -> None:
    """Nothing in a checkpoint says how many processes wrote it."""
    manifest = checkpoint.load(whole, N_STEPS).manifest
    own = {name: value for name, value in manifest.items() if name != "files"}  # orbax's names
    assert "process" not in json.dumps(own).replace("processes_run", "")
