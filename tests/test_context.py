"""The train step where devices share rows (`mesh.context`), against one device, in FP64.

Also of documents that are isolated and end within pieces, of rows with padding, and beside every
other axis. Dims: M micro-batches, B sequences, S = T + 1 row.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests.model import small
from tests.test_parallel import close, in_fp64, some_slow
from v3jax.config import (
    BatchConfig,
    ExperimentConfig,
    MeshConfig,
    MoEConfig,
    PipelineConfig,
    YarnConfig,
)
from v3jax.sharding import make_mesh
from v3jax.state import TrainState, state_around, state_shardings
from v3jax.step import amount_of, amount_specs, make_eval_step, make_train_step

M, B, T = 2, 4, 16
MODEL = small.config(
    n_layers=2,
    dim=16,
    mtp_depth=1,
    n_experts=16,
    n_groups=8,
    top_groups=3,
    top_k=4,
    vocab_size=64,
    yarn=YarnConfig(factor=4, original_seq_len=8, beta_fast=2, beta_slow=1, mscale=1.0),
)


def experiment(mesh: MeshConfig, *, depth: int = 1, **changes: Any) -> ExperimentConfig:
    cfg = small.experiment(
        replace(MODEL, mtp_depth=depth),
        seq_len=T,
        numerics=small.numerics(compute="fp64"),
        batch=BatchConfig(micro_batch=B, start=B, end=M * B, ramp_tokens=0.0),
        mesh=mesh,
    )
    return replace(cfg, **changes)


def isolated(cfg: ExperimentConfig) -> ExperimentConfig:
    return replace(cfg, data=replace(cfg.data, isolate_documents=True))


def rows(cfg: ExperimentConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rows of three documents, of different lengths in each row; the first ends in padding."""
    tokens, segments = small.batch(cfg, M * B, padding=3)
    at, row = np.arange(T + 1), np.arange(M * B)[:, None]
    segments = segments * (1 + (at > 3 + row) + (at > T // 2 + row))
    segments[1, 6:8] *= -1  # seen, but no targets
    return tokens, segments.astype(np.int32)


@functools.cache
def stepped(cfg: ExperimentConfig, bias: float) -> tuple[TrainState, dict[str, Any], Any]:
    """The state after one step, its metrics, and the held-out loss before it."""
    with in_fp64():
        mesh = make_mesh(cfg.mesh)
        params = jax.device_put(small.params(cfg.model), state_shardings(cfg, mesh).params)
        lean = np.where(np.arange(cfg.model.n_experts) < cfg.model.top_k, bias, 0.0)
        router = jax.tree.map(
            lambda b: (b + lean).astype(np.float32), small.router_state(cfg.model)
        )
        state = state_around(cfg, params, router, mesh)
        batch = rows(cfg)
        with jax.set_mesh(mesh):
            nll = make_eval_step(cfg, mesh)(state.params, state.router_state, *batch)
            places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), amount_specs(cfg))
            amount = jax.device_put(amount_of(cfg, M), places)
            cut = (x.reshape(M, B, -1) for x in batch)
            return jax.device_get((*make_train_step(cfg, mesh)(state, *cut, amount), nll))


def check(cfg: ExperimentConfig, bias: float = 0.0) -> dict[str, Any]:
    alone = replace(
        cfg,
        mesh=MeshConfig(),
        moe=MoEConfig(),
        pipeline=PipelineConfig(),
        numerics=replace(cfg.numerics, remat="none"),
    )
    (state, metrics, nll), (wanted, expected, wanted_nll) = stepped(cfg, bias), stepped(alone, bias)
    np.testing.assert_array_equal(metrics["load_LE"], expected["load_LE"])
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-12, err_msg=name)
    assert nll[1] == wanted_nll[1]
    np.testing.assert_allclose(nll[0], wanted_nll[0], rtol=1e-12)
    close(state, wanted)  # first moments are a tenth of the clipped gradients
    assert metrics["dropped_choices"] == 0
    return metrics


MESHES = {
    "context 2": MeshConfig(context=2),
    "context 4": MeshConfig(context=4),
    "context 8": MeshConfig(context=8),
    "data, context, expert": MeshConfig(data=2, context=2, expert=2),
    "node, context": MeshConfig(node=2, context=4),
    "node, context, expert": MeshConfig(node=2, context=2, expert=2),
    "fsdp": MeshConfig(data=2, context=4, storage="fsdp", deterministic=True),
    "whole": MeshConfig(data=2, node=2, context=2, storage="whole"),
}


@pytest.mark.parametrize(
    "name", some_slow(MESHES, {"node, context, expert"}, {"context 4", "fsdp"})
)
def test_next_state_is_that_of_one_device(name: str) -> None:
    metrics = check(experiment(MESHES[name]))
    np.testing.assert_array_less(0.99, metrics["rank_overload"])
