"""Whole runs through a pipeline: the losses of a run without one, continued bit for bit."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import mini
from v3jax import checkpoint
from v3jax.metrics import read_rows

PIPED = ("--set", "mesh.pipe=2", "--set", "mesh.data=2", "--set", "numerics.compute=fp64")
ALONE = ("--set", "numerics.compute=fp64")
LOSSES = ("loss", "mtp_loss", "balance_loss", "grad_norm", "eval_loss", "eval_loss_ema")
HALF = ("--set", f"run.total_tokens={12 * 4 * 32}")


def trained(workdir: Path, *arguments: str) -> list[dict[str, float]]:
    done = mini.call(mini.train_command(workdir, *arguments))
    assert done.returncode == 0, done.stderr
    return read_rows(workdir / "metrics.jsonl")


def assert_same_losses(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    """The end of a shorter run was evaluated too, which the longer does not know."""
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        for name in set(LOSSES) & set(theirs):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9, err_msg=name)


@pytest.mark.slow
def test_runs_through_a_pipeline_and_checkpoints_between_them(tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", *ALONE)
    piped = trained(tmp_path / "piped", *PIPED)
    assert_same_losses(piped, alone)

    # Half of it, continued with the pipeline and, from the same checkpoint, without.
    half = trained(tmp_path / "again", *PIPED, *HALF)
    assert len(half) < len(piped)
    shutil.copytree(tmp_path / "again", tmp_path / "less")
    trained(tmp_path / "again", *PIPED)
    ends = [checkpoint.load(tmp_path / name, mini.N_STEPS).manifest for name in ("piped", "again")]
    assert ends[0]["arrays"] == ends[1]["arrays"]
    assert ends[0]["data"] == ends[1]["data"]
    assert_same_losses(trained(tmp_path / "less", *ALONE), alone)
