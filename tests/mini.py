"""A run of seconds on real text, and the programs that train it, for the tests of the loop."""

import fcntl
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from experiments.tiny import v3_tiny
from v3jax.config import BatchConfig, ExperimentConfig, LrPhase
from v3jax.host import cache_folder

REPO = Path(__file__).parents[1]
N_STEPS = 30
TEXT = str(Path(os.__file__).parent / "c[a-o]*.py")

_FILE = """from tests import mini
from v3jax.registry import register

@register
def mini_run():
    return mini.config()
"""


def config(**run_changes: Any) -> ExperimentConfig:
    """One dense and one MoE layer of width 32 with an MTP module; 30 steps, every schedule on."""
    tiny = v3_tiny()
    tokens = 24 * 4 * 32.0
    return replace(
        tiny,
        name="mini_run",
        model=replace(
            tiny.model,
            vocab_size=512,
            dim=32,
            n_layers=2,
            n_heads=2,
            q_latent_dim=16,
            kv_latent_dim=16,
            nope_head_dim=8,
            rope_head_dim=8,
            v_head_dim=8,
            dense_ffn_dim=64,
            expert_ffn_dim=16,
            n_experts=8,
            top_k=2,
        ),
        data=replace(
            tiny.data, path=TEXT, seq_len=32, heldout_fraction=0.3, tokenizer_vocab_size=400
        ),
        batch=BatchConfig(micro_batch=2, start=2, end=4, ramp_tokens=tokens / 2),
        optim=replace(
            tiny.optim,
            warmup_steps=3,
            phases=(
                LrPhase(shape="constant", until_tokens=tokens / 2, lr=3e-3),
                LrPhase(shape="cosine", until_tokens=tokens, lr=3e-4),
            ),
        ),
        balance=replace(tiny.balance, bias_speed=((tokens * 0.9, 0.01), (tokens, 0.0))),
        mtp_weight=((tokens / 2, 0.3), (tokens, 0.1)),
        run=replace(
            tiny.run,
            **{
                "total_tokens": tokens,
                "eval_every": 10,
                "eval_sequences": 8,
                "checkpoint_every": 4,
                "keep_checkpoints": 2,
                "max_bad_steps": 3,
                **run_changes,
            },
        ),
    )


def run_here(cfg: ExperimentConfig, workdir: Path, **options: Any) -> Any:
    """`train.run` in this process, with the programs' compilation cache."""
    from v3jax import train  # not above: the program that imports this file is that module itself

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return train.run(cfg, workdir, **options)


def command(*arguments: str, program: str = "train") -> list[str]:
    return [sys.executable, "-m", f"v3jax.{program}", *arguments]


def train_command(workdir: Path, *arguments: str) -> list[str]:
    """The command that trains the mini run in `workdir`."""
    file = workdir.parent / "mini_experiment.py"
    file.write_text(_FILE)
    return command(f"--exp={file}", f"--workdir={workdir}", *arguments)


def call(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end."""
    return subprocess.run(arguments, cwd=REPO, capture_output=True, text=True, check=False)


def finished() -> Path:
    """A finished run directory that all tests share; copy it before changing it."""
    tests_run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = cache_folder() / f"mini-{tests_run}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            done = call(train_command(folder / "run"))
            assert done.returncode == 0, done.stderr
            (folder / "done").touch()
    return folder / "run"


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file below `folder`."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
