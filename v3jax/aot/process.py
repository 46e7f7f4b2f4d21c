"""Runs a compiler in a process of its own, since compilers may abort, and reads what it prints."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
"""No accelerator is asked for, or waited for; several compilers may run at a time."""


def run(arguments: Sequence[str], target: str, *, python: str, timeout: float) -> dict[str, Any]:
    """The JSON object that `python arguments...` prints as its last line, by `answer`.

    Raises:
      ValueError: what the child was asked for is wrong.
      RuntimeError: the compiler is not installed, refused the program, died or took too long.
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | _ENVIRONMENT
    try:
        done = subprocess.run(
            [python, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{target}: not compiled within {timeout:.0f} s") from None
    except OSError as error:
        raise RuntimeError(f"{target}: cannot run {python}: {error.strerror}") from None
    if done.returncode < 0:
        raise RuntimeError(f"{target}: {_death(-done.returncode, done.stderr)}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{target}: {python}: {errors[-1][:300]}")
    got = json.loads(lines[-1])
    if "error" in got:
        kind = ValueError if got["usage"] else RuntimeError
        raise kind(f"{target}: {got['error']}")
    return got


def _death(number: int, errors: str) -> str:
    """How a signal ended the compiler, in one line."""
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return (
            f"the compiler was killed ({name}), most likely because this machine ran out of memory"
        )
    fatal = re.findall(r"^F\d{4} .*?\] (.*)$", errors, re.MULTILINE)
    return f"the compiler died of {name}{': ' + fatal[0][:300] if fatal else ''}"


def answer(value: dict[str, Any]) -> None:
    """Prints the child's result for `run`."""
    print(json.dumps(value), flush=True)


def answer_error(error: Exception) -> None:
    """Prints why there is none: the first line of a mistake, with its type if it is no message."""
    line = (str(error).strip().splitlines() or [""])[0]
    plain = type(error) in (RuntimeError, ValueError)
    answer(
        {
            "error": (line if plain else f"{type(error).__name__}: {line}")[:400],
            "usage": isinstance(error, ValueError),
        }
    )
    sys.exit(1)
