"""The train step over meshes of eight devices against one device, in FP64.

Routing goes from even to every token on the same few experts, which takes extra passes; whatever
the mesh, loss, gradients, counts, bias and next state are those of one device.
Dims: M micro-batches, B sequences, S = T + 1 row, L MoE layers, E experts.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v3jax import objective
from v3jax.config import BatchConfig, ExperimentConfig, MeshConfig, MoEConfig
from v3jax.sharding import make_mesh, rules_of
from v3jax.state import TrainState, init_state, state_around, state_shardings
from v3jax.step import make_eval_step, make_train_step

MODEL = small.config(
    n_layers=1,
    n_dense_layers=0,
    mtp_depth=1,
    dim=16,
    n_experts=16,
    n_groups=8,
    top_groups=3,
    top_k=4,
)
MESHES = {
    "1x1x1": MeshConfig(),
    "8x1x1": MeshConfig(data=8),
    "1x1x8": MeshConfig(expert=8),
    "1x2x4": MeshConfig(node=2, expert=4),
    "2x2x2": MeshConfig(data=2, node=2, expert=2),
    "1x4x2": MeshConfig(node=4, expert=2),
}
VARIANTS = {
    "fsdp": (MeshConfig(data=2, node=2, expert=2, storage="fsdp", deterministic=True), {}),
    "whole": (MeshConfig(data=2, node=2, expert=2, storage="whole"), {}),
    "chunks": (MeshConfig(node=2, expert=2, deterministic=True), {"dispatch_chunks": 3}),
    "narrow": (MeshConfig(data=1, node=2, expert=2), {"bound_factor": 0.25}),
    "local": (MeshConfig(data=2, node=2), {"bound_factor": 0.5}),
}
ROUTINGS = ("even", "skewed", "collapsed")
M, B = 2, 8


def experiment(mesh: MeshConfig, moments: Any = "fp32", **moe: Any) -> ExperimentConfig:
    return small.experiment(
        MODEL,
        numerics=small.numerics(compute="fp64", moments=moments),
        batch=BatchConfig(micro_batch=B, start=B, end=M * B, ramp_tokens=0.0),
        mesh=mesh,
        moe=MoEConfig(**moe),
    )


def rows() -> tuple[np.ndarray, np.ndarray]:
    tokens, segments = small.batch(experiment(MeshConfig()), M * B, padding=3)
    return tokens.reshape(M, B, -1), segments.reshape(M, B, -1)


def biases(routing: str) -> Any:
    """Router biases that leave the choice to the tokens, lean, or decide it for all of them."""
    first = {"even": 0.0, "skewed": 0.5, "collapsed": 9.0}[routing]
    lean = np.where(np.arange(MODEL.n_experts) < MODEL.top_k, first, 0.0)
    return jax.tree.map(lambda b: (b + lean).astype(np.float32), small.router_state(MODEL))


@contextmanager
def in_fp64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def start(cfg: ExperimentConfig, routing: str) -> tuple[Any, TrainState]:
    mesh = make_mesh(cfg.mesh)
    params = jax.device_put(small.params(MODEL), state_shardings(cfg, mesh).params)
    return mesh, state_around(cfg, params, biases(routing), mesh)


@functools.cache
def step_of(cfg: ExperimentConfig) -> Any:
    """The compiled step."""
    with in_fp64():
        mesh, state = start(cfg, "even")
        with jax.set_mesh(mesh):
            lowered = make_train_step(cfg, mesh).lower(state, *rows(), np.int32(M))
            return lowered.compile()


@functools.cache
def stepped(cfg: ExperimentConfig, routing: str) -> tuple[TrainState, dict[str, Any]]:
    """The state after one step, and its metrics."""
    with in_fp64():
        mesh, state = start(cfg, routing)
        step = step_of(cfg)
        places = step.input_shardings[0][1:]
        with jax.set_mesh(mesh):
            batch = jax.device_put((*rows(), np.int32(M)), places)
            return jax.device_get(step(state, *batch))


def close(ours: Any, wanted: Any) -> None:
    """Every leaf within 1e-12 of its largest value."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(wanted)]
    for name, a, b in zip(names, jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype, name
        scale = np.abs(b).max(initial=0.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * scale, err_msg=name)


def check(cfg: ExperimentConfig, routing: str) -> dict[str, Any]:
    state, metrics = stepped(cfg, routing)
    wanted, expected = stepped(replace(cfg, mesh=MeshConfig(), moe=MoEConfig()), routing)
    assert jax.tree.leaves(state.params)[0].dtype == np.float64
    np.testing.assert_array_equal(metrics["load_LE"], expected["load_LE"])
    for a, b in zip(
        jax.tree.leaves(state.router_state), jax.tree.leaves(wanted.router_state), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-12, err_msg=name)
    close(state, wanted)  # first moments are a tenth of the clipped gradients
    return metrics


def some_slow(names: Iterable[str], quick: set[str], slow: set[str]) -> list[Any]:
    """The names, of which those that are in neither set are exhaustive."""

    def marked(name: str) -> Any:
        mark = pytest.mark.slow if name in slow else pytest.mark.exhaustive
        return pytest.param(name, marks=mark)

    return [name if name in quick else marked(name) for name in names]


@pytest.mark.parametrize("name", some_slow([*MESHES][1:], {"1x2x4"}, {"2x2x2", "1x4x2"}))
def test_next_state_is_that_of_one_device(name: str) -> None:
    for routing in ROUTINGS:
        metrics = check(experiment(MESHES[name]), routing)
        assert metrics["dropped_choices"] == 0
        if name in ("1x1x8", "1x2x4", "1x4x2"):
            assert (metrics["extra_passes"] > 0) >= (routing == "collapsed")
            least = {"even": 1.0, "skewed": 1.0, "collapsed": 3.9}[routing]
            assert metrics["rank_overload"] > least


@pytest.mark.parametrize("name", some_slow(VARIANTS, {"fsdp"}, {"chunks", "narrow"}))
def test_storage_chunks_and_narrow_bounds_change_nothing(name: str) -> None:
    mesh, moe = VARIANTS[name]
    metrics = check(experiment(mesh, **moe), "skewed")
    assert metrics["extra_passes"] > 0


@pytest.mark.slow
def test_the_batch_loss_is_that_of_the_whole_micro_batch() -> None:
    cfg = experiment(VARIANTS["fsdp"][0])
    balance = replace(cfg.balance, strategy="aux_loss", aux_alpha=0.3, loss_over="batch")
    metrics = check(replace(cfg, balance=balance), "even")
    assert metrics["balance_loss"] > 0.1


def test_routings_are_what_they_say() -> None:
    shares = {}
    for routing in ROUTINGS:
        load_LE = stepped(experiment(MESHES["1x1x1"]), routing)[1]["load_LE"]
        shares[routing] = load_LE[:, : MODEL.top_k].sum(1) / load_LE.sum(1)
    assert (shares["even"] < 0.4).all()
    assert ((shares["even"] < shares["skewed"]) & (shares["skewed"] < 1)).all()
    assert (shares["collapsed"] == 1).all()


@pytest.mark.slow
def test_bf16_moments_are_within_one_unit_in_the_last_place() -> None:
    found = [
        stepped(experiment(mesh, "bf16"), "skewed")[0].opt_state
        for mesh in (MESHES["1x1x1"], MESHES["2x2x2"])
    ]
    codes = [
        [leaf.view(np.int16).astype(int) for leaf in jax.tree.leaves(state) if leaf.ndim]
        for state in found
    ]
    for a, b in zip(*codes, strict=True):
        assert np.abs(a - b).max() <= 1


@pytest.mark.slow
def test_the_function_under_pjit_gives_the_same_loss_and_gradients() -> None:
    """The objective where the compiler splits the batch and only the experts are one device's."""
    found = []
    tokens, segments = (x[0] for x in rows())
    for mesh_config in (MESHES["1x1x1"], MESHES["2x2x2"]):
        cfg = experiment(mesh_config)
        with in_fp64():
            mesh, state = start(cfg, "skewed")
            one = jnp.float32(1.0)
            scale = objective.Scale(n_targets=one, n_sequences=one, mtp_weight=one)

            def loss(params: Any, cfg: Any = cfg, state: Any = state, scale: Any = scale) -> Any:
                return objective.loss(
                    cfg, params, state.router_state, tokens, segments, scale, rules_of(cfg)
                )

            with jax.set_mesh(mesh):
                (total, parts), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
                    state.params
                )
                inputs = (state.params, state.router_state, tokens, segments)
                nll = jax.jit(functools.partial(objective.eval_loss, cfg, rules=rules_of(cfg)))
                nll = (nll(*inputs), make_eval_step(cfg, mesh)(*inputs))
                counts = parts.load_LE
            found.append(jax.device_get((total, gradients, nll, counts)))
    close(found[1], found[0])


def test_states_are_stored_in_parts_and_collectives_are_explicit() -> None:
    cfg = experiment(MESHES["2x2x2"])
    with in_fp64():
        _, state = start(cfg, "even")
        head = state.params["lm_head"]
        mixture = state.params["moe_layers"]["mlp"]["experts"]["gate_up_proj"]
        moments = state.opt_state[1].mu["moe_layers"]["mlp"]["experts"]["gate_up_proj"]
    text = str(step_of(cfg).as_text())
    assert mixture.sharding == moments.sharding
    assert mixture.addressable_shards[0].data.shape[1] == MODEL.n_experts // 4
    assert "collective-permute" not in text
    assert head.sharding.is_fully_replicated  # small; the next test has large ones


def test_large_parameters_are_split_over_the_whole_group() -> None:
    model = replace(MODEL, vocab_size=2048, dim=64, expert_ffn_dim=32)
    for storage in ("zero1", "fsdp", "whole"):
        cfg = replace(
            experiment(MeshConfig(data=2, node=2, expert=2, storage=storage)), model=model
        )
        state = init_state(cfg, make_mesh(cfg.mesh))
        head = state.params["lm_head"]
        parts = 1 if storage == "whole" else 8
        assert head.addressable_shards[0].data.size == head.size // parts
        experts = state.params["moe_layers"]["mlp"]["experts"]["gate_up_proj"]
        parts = 4 if storage == "whole" else 8
        assert experts.addressable_shards[0].data.size == experts.size // parts
        assert state.opt_state[1].nu["lm_head"].sharding == head.sharding
        if storage != "whole":
            with jax.set_mesh(make_mesh(cfg.mesh)):
                step = make_train_step(cfg, make_mesh(cfg.mesh))
                text = step.lower(state, *rows(), np.int32(M)).as_text()
            assert "reduce_scatter" in text
            assert "all_gather" in text


@pytest.mark.slow
def test_capacity_mode_drops_and_counts() -> None:
    dropped = {}
    for name in ("1x1x1", "1x2x4"):
        metrics = stepped(experiment(MESHES[name], capacity_factor=0.5), "collapsed")[1]
        dropped[name] = int(metrics["dropped_choices"])
        kept = int(metrics["load_LE"].sum()) - dropped[name]
        assert dropped[name] > kept > 0
        assert np.isfinite(metrics["loss"])
    assert stepped(experiment(MESHES["1x2x4"]), "collapsed")[1]["dropped_choices"] == 0
