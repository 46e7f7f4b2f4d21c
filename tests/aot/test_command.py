"""`python -m v3jax.aot`: what it prints, and one line for each mistake."""

import importlib.util
import json
import os
import signal
import sys

import jax
import pytest

from tests import mini
from v3jax.aot import compile as aot_compile
from v3jax.aot import process
from v3jax.aot.report import Memory, Report, Times, make_report, table
from v3jax.aot.targets import GIB, parse
from v3jax.sharding import make_mesh

TARGET = "--target=tpu:v5p:2x2x1"
FOUR = ("--set", "mesh.data=4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--exp: name one of v3_ablation"),
        (("--exp=v3_tiny",), "--target: one like tpu:v5p:8x8x8"),
        (("--exp=v3_tyni", TARGET), "no experiment 'v3_tyni'; did you mean v3_tiny"),
        (("--exp=v3_tiny", "--target=tpu:v5:2x2x1"), "no tpu:v5; did you mean tpu:v5p"),
        (("--exp=v3_tiny", "--target=tpu:v5p:8x8"), "v5p takes 3 sizes of its torus"),
        (("--exp=v3_full", TARGET), "4 devices, but mesh.* uses 2048 (pipe=16 x data=2 x node=8"),
        (("--exp=v3_tiny", TARGET, "--set", "mesh.date=4"), "did you mean data"),
        (("--exp=v3_tiny", TARGET, "--set", "mesh.data=3"), "do not divide batch.micro_batch=4"),
        (("--exp=v3_tiny", TARGET, *FOUR, "--hlo=/no/folder/file"), "--hlo=/no/folder/file: not a"),
        (("--exp=v3_tiny", TARGET, *FOUR, "--timeout=0"), "--timeout=0.0: must be positive"),
        (("--exp=v3_tiny", TARGET, *FOUR, "more"), "'more' is no flag"),
        (("--exp=v3_tiny", "--topology=8x8"), "Unknown command line flag 'topology'"),
    ],
)
def test_mistake_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = mini.call(mini.command(*arguments, program="aot"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("v3jax.aot: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_python_that_is_not_there_is_one_line() -> None:
    done = mini.call(
        mini.command("--exp=v3_tiny", TARGET, *FOUR, "--python=/no/python", program="aot")
    )
    assert done.returncode == 1
    assert done.stderr == (
        "v3jax.aot: tpu:v5p:2x2x1: cannot run /no/python: No such file or directory\n"
    )


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed here"
)
def test_missing_compiler_names_the_extra() -> None:
    done = mini.call(mini.command("--exp=v3_tiny", TARGET, *FOUR, program="aot"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "has no libtpu: pip install 'v3jax[tpu]'" in done.stderr


# ---- The child process


def child(code: str, timeout: float = 30) -> dict[str, object]:
    return process.run(["-c", code], "tpu:v5p:2x2x1", python=sys.executable, timeout=timeout)


def test_answer_of_a_child_is_its_last_line_of_json() -> None:
    code = "from v3jax.aot import process; print('noise'); process.answer({'n': 1})"
    assert child(code) == {"n": 1}


def test_error_of_a_child_is_one_line_of_its_kind() -> None:
    code = "from v3jax.aot import process; process.answer_error({}('first\\nsecond'))"
    with pytest.raises(ValueError, match=r"^tpu:v5p:2x2x1: first$"):
        child(code.format("ValueError"))
    with pytest.raises(RuntimeError, match=r"^tpu:v5p:2x2x1: KeyError: 'first.nsecond'$"):
        child(code.format("KeyError").replace("\\n", "_n"))
    with pytest.raises(RuntimeError, match=r": No module named 'nothing'$|ModuleNotFoundError"):
        child("import nothing")


def test_compiler_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(RuntimeError, match="not compiled within 1 s"):
        child("import time; time.sleep(60)", timeout=1)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, r"killed \(SIGKILL\), most likely because this machine ran out of memory"),
        (signal.SIGABRT, "died of SIGABRT: Check failed: window"),
    ],
)
def test_compiler_that_dies_says_how(number: signal.Signals, message: str) -> None:
    fatal = "F1126 12:00:00.0 12 emitter.cc:1] Check failed: window"
    code = f"import os, sys; print({fatal!r}, file=sys.stderr, flush=True); "
    with pytest.raises(RuntimeError, match=message):
        child(code + f"os.kill(os.getpid(), {int(number)})")


# ---- Memory


@pytest.mark.parametrize(
    ("message", "used", "over"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (100.00G) exceeds available HBM (95.75G).",
            100 * GIB,
            4.25 * GIB,
        ),
        ("Ran out of memory in memory space hbm. Used 1.5T of 96G hbm.", 1536 * GIB, 1440 * GIB),
        ("Ran out of memory in memory space hbm.", None, 0),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", None, None),
        ("INTERNAL: something else", None, None),
    ],
)
def test_memory_wanted_is_read_from_the_compilers_message(
    message: str, used: int | None, over: int | None
) -> None:
    assert aot_compile.out_of_memory(message) == (used, over)


TIMES = Times(lower_seconds=1.0, compile_seconds=2.0, cpu_seconds=3.0, peak_rss_bytes=GIB)


def test_step_that_does_not_fit_is_a_report_not_a_failure() -> None:
    cfg, target = mini.config(), parse("tpu:v5p:1x1x1")
    mesh = make_mesh(cfg.mesh, jax.devices())
    memory = Memory(peak=100 * GIB, temp=None, host=None)
    report = make_report(cfg, target, mesh, (1, 2, 3), memory, TIMES, None, None, 4 * GIB)
    assert not report.fits
    assert (report.over_bytes, report.memory_bytes_per_chip) == (4 * GIB, 100 * GIB)
    assert report.collectives is None
    assert "no, 4.000 GiB too much" in table(vars(report))


def test_gpu_program_that_needs_more_than_the_limit_does_not_fit() -> None:
    cfg, target = mini.config(), parse("gpu:h100:1x1")
    mesh = make_mesh(cfg.mesh, jax.devices())
    memory = Memory(peak=80 * GIB, temp=GIB, host=0)
    text = "ENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %x = f32[2]{0} parameter(0)\n}\n"
    report = make_report(cfg, target, mesh, (1, 2, 3), memory, TIMES, text, None, None)
    assert not report.fits
    assert report.over_bytes == 80 * GIB - int(79.1 * GIB)


# ---- A real compiler


@pytest.mark.slow
def test_tiny_step_compiles_for_a_tpu() -> None:
    python = os.environ.get("V3JAX_TPU_PYTHON", sys.executable)
    if python == sys.executable and importlib.util.find_spec("libtpu") is None:
        pytest.skip(
            "no libtpu here: pip install 'v3jax[tpu]', or name a Python that has it in "
            "V3JAX_TPU_PYTHON"
        )
    done = mini.call(
        mini.command("--exp=v3_tiny", TARGET, *FOUR, f"--python={python}", "--json", program="aot")
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert set(got) == set(Report.__dataclass_fields__)
    assert got["fits"]
    assert got["n_devices"] == 4
    assert got["tokens_per_step"] == 8 * 256
    assert got["parameter_bytes_per_chip"] < got["memory_bytes_per_chip"]
    assert 1 < got["flops_per_chip"] / got["model_flops_per_chip"] < 3
    assert got["estimate_from"] == "xla"
    assert got["estimated_step_seconds"] > max(got["roofline_seconds"].values())
    assert {row["axis"] for row in got["collectives"]} == {"data"}
