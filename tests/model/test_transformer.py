"""The whole network, prediction modules included, against the reference."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from tests.reference import mtp
from tests.reference.transformer import Forward, forward
from v3jax.config import ModelConfig
from v3jax.model.transformer import Output, Transformer, head_logits
from v3jax.sharding import unbox

SHAPES = {
    "dense_and_moe": {},
    "no_dense": {"n_dense_layers": 0, "mtp_depth": 1},
    "dense_only": {"n_dense_layers": 3, "mtp_depth": 0},
    "three_mtp": {"n_layers": 2, "mtp_depth": 3},
}


def rows(cfg: ModelConfig, n: int = 2, length: int = 10) -> np.ndarray:
    return np.random.default_rng(5).integers(0, cfg.vocab_size, (n, length)).astype(np.int32)


@functools.cache
def compiled(cfg: ModelConfig, compute: str, ahead: int) -> Callable[..., Output]:
    model = Transformer(*small.parts(cfg, compute=compute))
    return jax.jit(lambda v, t, s: model.apply(v, t, ahead=ahead, segments_BT=s))


def run(
    cfg: ModelConfig,
    tokens: np.ndarray,
    ahead: int = 1,
    segments: np.ndarray | None = None,
    compute: str = "fp32",
) -> Output:
    variables = {
        "params": small.to_jax(small.params(cfg)),
        "router_state": small.to_jax(small.router_state(cfg)),
    }
    return compiled(cfg, compute, ahead)(variables, tokens, segments)


@functools.cache
def reference_rows(shape: str) -> list[Forward]:
    """The reference's outputs for the rows of one of `SHAPES`."""
    cfg = small.config(**SHAPES[shape])
    return [forward(small.params(cfg), small.router_state(cfg), r, cfg) for r in rows(cfg)]


@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_of_every_depth_equal_the_reference(shape: str) -> None:
    cfg = small.config(**SHAPES[shape])
    out = run(cfg, rows(cfg))
    assert len(out.mtp_hidden) == cfg.mtp_depth
    for b, wanted in enumerate(reference_rows(shape)):
        np.testing.assert_allclose(out.hidden_BTD[b], wanted.hidden, rtol=1e-3, atol=1e-4)
        for got, hidden in zip(out.mtp_hidden, wanted.mtp_hidden, strict=True):
            np.testing.assert_allclose(got[b, : len(hidden)], hidden, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_loads_are_stacked_by_layer_with_the_prediction_modules_last(shape: str) -> None:
    cfg = small.config(**SHAPES[shape])
    loads = np.zeros((cfg.n_moe_layers + cfg.mtp_depth, cfg.n_experts), int)
    for out in reference_rows(shape):
        for layer, stats in enumerate(out.stats + out.mtp_stats):
            loads[layer] += np.bincount(stats.chosen_TK.ravel(), minlength=cfg.n_experts)
    got = run(cfg, rows(cfg)).stats.load_E
    np.testing.assert_array_equal(got, loads)
    lengths = [9] * cfg.n_moe_layers + [9 - k for k in range(1, cfg.mtp_depth + 1)]
    np.testing.assert_array_equal(got.sum(-1), 2 * cfg.top_k * np.array(lengths))


def test_a_packed_row_with_segments_equals_its_documents_run_alone() -> None:
    cfg = small.config(n_layers=1, n_dense_layers=0, mtp_depth=0)
    tokens = rows(cfg, 1, 12)
    segments = np.array([[1] * 5 + [2] * 7])
    packed = run(cfg, tokens, ahead=0, segments=segments).hidden_BTD[0]
    for document in (slice(0, 5), slice(5, 12)):
        alone = run(cfg, tokens[:, document], ahead=0).hidden_BTD[0]
        np.testing.assert_allclose(packed[document], alone, rtol=1e-3, atol=1e-4)
    joined = run(cfg, tokens, ahead=0).hidden_BTD[0]
    assert np.abs(np.asarray(joined - packed))[5:].max() > 0.1


def test_inference_runs_the_same_main_model_without_prediction_modules() -> None:
    cfg = small.config()
    tokens = rows(cfg)
    training, inference = run(cfg, tokens), run(cfg, tokens[:, :-1], ahead=0)
    np.testing.assert_allclose(training.hidden_BTD, inference.hidden_BTD, atol=1e-5)
    assert inference.mtp_hidden == ()
    assert inference.stats.load_E.shape[0] == cfg.n_moe_layers


def test_a_prediction_module_sees_exactly_the_tokens_up_to_its_depth_ahead() -> None:
    cfg = small.config()
    tokens = rows(cfg)
    before = run(cfg, tokens)
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % cfg.vocab_size
    after = run(cfg, changed)
    for depth, (a, b) in enumerate(
        zip(
            (before.hidden_BTD, *before.mtp_hidden),
            (after.hidden_BTD, *after.mtp_hidden),
            strict=True,
        )
    ):
        moved = np.abs(np.asarray(a - b)).max((0, 2))
        assert (moved[: 6 - depth] < 1e-6).all()
        assert moved[6 - depth] > 1e-3


def test_targets_of_the_reference_lie_one_further_for_each_depth() -> None:
    row = np.arange(100, 106)  # t_1 .. t_6, so T = 5
    np.testing.assert_array_equal(mtp.targets(row, 0), [101, 102, 103, 104, 105])
    np.testing.assert_array_equal(mtp.targets(row, 1), [102, 103, 104, 105])
    np.testing.assert_array_equal(mtp.targets(row, 2), [103, 104, 105])


def init(cfg: ModelConfig) -> Any:
    """Fresh variables without their partitioning boxes."""
    model = Transformer(*small.parts(cfg))
    return unbox(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), ahead=1))


def test_parameters_have_the_names_and_shapes_of_the_references() -> None:
    cfg = small.config()
    variables = jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda: init(cfg)))
    assert variables["params"] == jax.tree.map(np.shape, small.params(cfg))
    assert variables["router_state"] == jax.tree.map(np.shape, small.router_state(cfg))


def test_initial_weights_have_the_configured_deviation_norms_one_and_biases_zero() -> None:
    cfg = small.config(dim=96, n_heads=9, n_dense_layers=0, n_layers=2, mtp_depth=1)
    variables = jax.jit(lambda: init(cfg))()
    for path, leaf in jax.tree.flatten_with_path(variables["params"])[0]:
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            assert (np.asarray(leaf) == 1).all(), name
        else:
            error = 4 * 0.006 / np.sqrt(2 * leaf.size)
            assert float(jnp.std(leaf)) == pytest.approx(0.006, abs=error), name
            assert abs(float(jnp.mean(leaf))) < 4 * 0.006 / np.sqrt(leaf.size), name
    assert not any(np.asarray(b).any() for b in jax.tree.leaves(variables["router_state"]))
    layers = variables["params"]["moe_layers"]["self_attn"]["q_a_proj"]
    assert not np.allclose(layers[0], layers[1])


def test_embedding_and_head_are_not_tied_and_logits_use_the_head() -> None:
    cfg = small.config()
    params = small.params(cfg)
    hidden = np.random.default_rng(0).normal(size=(2, 3, cfg.dim))
    logits = head_logits(small.to_jax(params), jnp.asarray(hidden, jnp.float32))
    np.testing.assert_allclose(logits, hidden @ params["lm_head"], rtol=1e-4, atol=1e-4)


def test_bf16_activations_stay_close_to_fp32_where_routing_agrees() -> None:
    # All experts are chosen, so that rounding cannot change a choice.
    cfg = small.config(n_layers=1, n_dense_layers=0, mtp_depth=1, top_k=12, top_groups=4)
    whole, low = run(cfg, rows(cfg)), run(cfg, rows(cfg), compute="bf16")
    for a, b in zip(
        (whole.hidden_BTD, *whole.mtp_hidden), (low.hidden_BTD, *low.mtp_hidden), strict=True
    ):
        assert b.dtype == jnp.bfloat16
        assert np.sqrt(np.mean(np.square(a - b.astype(jnp.float32)))) < 0.04
