"""What the tests of launch/ share: programs, variables, and a trainer that only pretends."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
LAUNCH = REPO / "launch"

_STUB = """#!/usr/bin/env bash
# Stands for python: "-c CODE" runs for real, "-m v3jax.train ARGUMENTS" obeys its arguments.
# Told to stop, it takes half a second to save.
[[ $1 == -m ]] || exec "{python}" "$@"
shift 2
me=${{JAX_PROCESS_ID:-0}}
told=0
trap 'told=$((told + 1)); echo "told $me"' TERM
touch "$0.$me" # now it hears
echo "process $me of ${{JAX_NUM_PROCESSES:-1}} at ${{JAX_COORDINATOR_ADDRESS:-nowhere}}: $*"
wait=''
for word in "$@"; do
  case $word in
    --workdir=*) workdir=${{word#*=}} ;;
    --fail=*)
      if [[ $me == "${{word#*=}}" ]]; then
        for ((i = 0; i < JAX_NUM_PROCESSES; i++)); do
          until [[ -e $0.$i ]]; do sleep 0.05; done
        done
        exit 7
      fi ;;
    --code=*) exit "${{word#*=}}" ;;
    --list) echo "v3_full      a line"; echo "v3_sft       a line"; exit ;;
    --wait) wait=yes ;;
    --wait-once=*) # a file a process: one that starts late is not to find the other's
      [[ -e ${{word#*=}}.$me ]] || {{ touch "${{word#*=}}.$me"; wait=yes; }} ;;
  esac
done
for ((i = 0; i < 600; i++)); do
  [[ $wait ]] || break
  sleep 0.1
  if ((told)) && [[ " $* " != *" --deaf "* ]] && ((saved++ == 5)); then
    [[ $me == 0 ]] && echo "stopped by a signal at step 3; the same command continues"
    exit 0
  fi
done
if [[ -n ${{workdir-}} && $me == 0 ]]; then mkdir -p "$workdir"; touch "$workdir/report.html"; fi
echo "done: ${{workdir-}}/report.html"
"""


def stub(folder: Path) -> Path:
    """A stand-in for the interpreter, for PYTHON; no jax, a few milliseconds."""
    file = folder / "stub-python"
    file.write_text(_STUB.format(python=sys.executable))
    file.chmod(0o755)
    return file


def run(
    *command: object, seconds: float = 60, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a script in the repository to its end."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=REPO,
        env=environment() if env is None else env,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def need(**packages: str) -> None:
    """Skips the test unless every program is here, naming the Debian packages that hold them."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = sorted({p for program, p in packages.items() if not shutil.which(program, path=path)})
    if missing:
        pytest.skip(f"apt-get install {' '.join(missing)}")


def environment(**variables: object) -> dict[str, str]:
    """This process's variables without those a launcher would take for its own or the user's."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "SBATCH", "JAX_PROCESS", "JAX_NUM", "JAX_COORD", "NCCL"))
    }
    path = f"{kept.get('PATH', '')}:/usr/sbin:/sbin"
    kept |= {"PATH": path, "PYTHON": sys.executable, "PLATFORM": "cpu"}
    return kept | {name: str(value) for name, value in variables.items()}


def wait_for(what: str, true: Callable[[], object], seconds: float) -> None:
    """Waits until `true()` holds; fails the test after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)
