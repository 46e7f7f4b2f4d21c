"""Training steps in FP8 on meshes and in a pipeline: as near to exact as on one device."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from tests.model import small
from tests.pipeline.test_run import experiment, stepped
from v3jax import sharding, state
from v3jax.config import ExperimentConfig, Fp8Config, MeshConfig, PipelineConfig

TILED = Fp8Config(tile=16, block=16, promotion=16)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also small parameters are stored in parts; weights do not blow a rounding up."""
    params = small.params

    def smaller(path: Any, x: np.ndarray) -> np.ndarray:
        return x if "norm" in jax.tree_util.keystr(path) else x * 0.3

    monkeypatch.setattr(
        small, "params", lambda cfg: jax.tree_util.tree_map_with_path(smaller, params(cfg))
    )

    def forget() -> None:
        for cached in (state.param_specs, state.state_specs, stepped):
            cached.cache_clear()

    monkeypatch.setattr(sharding, "_SMALL", 64)
    forget()
    yield
    forget()


def fp8(cfg: ExperimentConfig) -> ExperimentConfig:
    return replace(cfg, numerics=replace(cfg.numerics, compute="fp8", fp8=TILED))


def alone(cfg: ExperimentConfig) -> ExperimentConfig:
    return replace(cfg, mesh=MeshConfig(), pipeline=PipelineConfig())


def moments(cfg: ExperimentConfig) -> tuple[np.ndarray, Any]:
    """First moments after a step, a tenth of the clipped gradients, and the step's metrics."""
    after, metrics, _ = stepped(cfg, (cfg.batch.end // cfg.batch.micro_batch,))[0]
    leaves = jax.tree.leaves(after.opt_state[1].mu)
    return np.concatenate([np.asarray(m, np.float64).reshape(-1) for m in leaves]), metrics


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"n_ranks": 1, "node": 2, "expert": 2}, marks=pytest.mark.exhaustive),
        pytest.param({"n_ranks": 1, "data": 2, "storage": "fsdp"}, marks=pytest.mark.slow),
        pytest.param({"n_ranks": 2, "remat": "report", "expert": 2}, marks=pytest.mark.exhaustive),
    ],
    ids=["experts", "fsdp", "pipeline"],
)
def test_a_step_is_as_near_as_on_one_device(mesh: dict[str, Any]) -> None:
    """Token tiles lie otherwise, the order of sums differs; scales and codes are the same."""
    cfg = fp8(experiment(n_micro=2, compute="fp32", dim=32, expert_ffn_dim=24, **mesh))
    wide = replace(cfg, numerics=small.numerics(compute="fp32", moments="fp32"))
    exact, _ = moments(alone(wide))
    one, expected = moments(alone(cfg))
    got, metrics = moments(cfg)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-3)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=5e-2)
    assert 1e-2 < apart(one, exact) < 0.3
    assert apart(got, exact) < 1.3 * apart(one, exact)
