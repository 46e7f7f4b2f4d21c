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
    override,
)
from v3jax.sharding import make_mesh
from v3jax.state import TrainState, state_around, state_shardings
from v3jax.step import amount_of, amount_specs, make_eval_step, make_train_step

M, B, T = 2, 4, 16
MODEL = small.config(
    n_layers=1,
    n_dense_layers=0,
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
SLOW = {"context 4", "fsdp"}


@pytest.mark.parametrize("name", some_slow(MESHES, {"node, context, expert"}, SLOW))
def test_next_state_is_that_of_one_device(name: str) -> None:
    metrics = check(experiment(MESHES[name]))
    assert metrics["rank_overload"] >= 1


@pytest.mark.slow
def test_documents_are_isolated_and_modules_look_two_tokens_ahead() -> None:
    check(isolated(experiment(MESHES["context 4"], depth=2)))


@pytest.mark.exhaustive
def test_the_batch_loss_is_that_of_the_whole_micro_batch() -> None:
    cfg = experiment(MESHES["data, context, expert"])
    balance = replace(cfg.balance, strategy="aux_loss", aux_alpha=0.3, loss_over="batch")
    assert check(replace(cfg, balance=balance))["balance_loss"] > 0.1


@pytest.mark.exhaustive
def test_collapsed_routing_takes_extra_passes_and_changes_nothing() -> None:
    cfg = experiment(MESHES["node, context, expert"], moe=MoEConfig(dispatch_chunks=3))
    metrics = check(cfg, bias=9.0)
    assert metrics["extra_passes"] > 0
    assert metrics["rank_overload"] > 1.9


PIPES = {
    "dualpipe": (MeshConfig(pipe=2, context=2), {"most_waiting": 0, "pair_time": 2.0}),
    "1f1b": (MeshConfig(pipe=2, node=2, context=2), {"schedule": "1f1b"}),
    "masked": (MeshConfig(pipe=2, data=2, context=2), {"mode": "masked"}),
}


@pytest.mark.parametrize("name", some_slow(PIPES, {"dualpipe"}, set()))
def test_a_pipeline_computes_the_same(name: str) -> None:
    mesh, how = PIPES[name]
    cfg = experiment(mesh, pipeline=PipelineConfig(**how))
    cfg = replace(cfg, model=replace(cfg.model, n_layers=2, n_dense_layers=1))
    numerics = replace(cfg.numerics, remat="full")
    check(isolated(replace(cfg, numerics=numerics)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("remat", ["report", "full"])
def test_recomputation_changes_nothing(remat: Any) -> None:
    cfg = experiment(MESHES["context 4"])
    check(replace(cfg, numerics=replace(cfg.numerics, remat=remat)))


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["model.n_experts=24", "mesh.context=3"],
            r"mesh.context: 3 .* data.seq_len=16 into 6 equ",
        ),
        (["mesh.context=16"], r"mesh.context: 16 devices do not cut data.seq_len=16 into 32 equa"),
        (["mesh.context=5"], r"mesh: node=1 x context=5 x expert=1 devices do not divide model"),
        (["model.mtp_depth=2", "mesh.context=8"], r"mesh.context: pieces of 1 positions are short"),
        (["mesh.context=0"], r"mesh.context: must be at least 1"),
    ],
)
def test_what_devices_cannot_share_is_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(experiment(MeshConfig()), assignments)
