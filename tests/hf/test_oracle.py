"""Logits equal to Hugging Face transformers', in one pass and token by token through the cache."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v3jax import hf
from v3jax.config import ModelConfig
from v3jax.decode.cache import Cache, new_cache
from v3jax.decode.forward import Weights, logits, main_forward, mtp_forward, prepare
from v3jax.model.transformer import Transformer, head_logits
from v3jax.weights import FP32

ORACLE = Path(__file__).parent / "oracle"
CASES = sorted(p.name for p in ORACLE.iterdir() if p.is_dir())
TOLERANCE = 2e-5  # of the largest logit
CACHED = 20  # tokens of the passes through the cache


@pytest.fixture(autouse=True, scope="module")
def _few_optimizations() -> Iterator[None]:
    """Compiles in half the time what runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(ORACLE / name / "expected.npz") as recorded:
        return dict(recorded)


@functools.cache
def loaded(name: str) -> tuple[ModelConfig, Any, Any]:
    return hf.load(ORACLE / name)


@functools.cache
def prepared(name: str) -> tuple[ModelConfig, Weights]:
    model, params, router_state = loaded(name)
    return model, prepare(model, FP32, params, router_state)


def assert_equal(got: Any, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    assert np.abs(wanted).max() > 0.5, "logits near zero would hide an error"
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_the_cases_cover_what_the_format_varies() -> None:
    assert len(CASES) >= 6
    models = {name: hf.open_source(ORACLE / name).model for name in CASES}
    assert {m.yarn is None for m in models.values()} == {True, False}
    assert {m.q_latent_dim is None for m in models.values()} == {True, False}
    assert len({m.n_groups for m in models.values()}) > 2
    assert len({m.norm_eps for m in models.values()}) > 1
    assert len({m.n_dense_layers for m in models.values()}) > 1
    assert {m.mtp_depth for m in models.values()} == {0, 2}


@pytest.mark.parametrize("name", CASES)
def test_one_pass_gives_their_logits(name: str) -> None:
    assert_equal(hf.forward(ORACLE / name, expected(name)["tokens"]), expected(name)["logits"])


@functools.partial(jax.jit, static_argnums=0)
def token_by_token(
    static: tuple[ModelConfig, bool], weights: Weights, cache: Cache, tokens_BT: jax.Array
) -> jax.Array:
    """Logits `[B, T, V]`, a token a step."""
    model, absorbed = static

    def step(cache: Cache, at: tuple[jax.Array, jax.Array]) -> tuple[Cache, jax.Array]:
        tokens_B, t = at
        positions_B1 = jnp.full((len(tokens_B), 1), t)
        hidden_B1D, cache = main_forward(
            model, FP32, weights, cache, tokens_B[:, None], positions_B1, absorbed=absorbed
        )
        return cache, logits(weights, hidden_B1D[:, 0], model.vocab_size)

    length = tokens_BT.shape[1]
    _, logits_TBV = jax.lax.scan(step, cache, (tokens_BT.T, jnp.arange(length)))
    return logits_TBV.swapaxes(0, 1)


@pytest.mark.parametrize(
    ("name", "absorbed"),
    [*((name, True) for name in CASES), ("yarn_wide", False), ("no_q_latent", False)],
)
def test_token_by_token_through_the_cache_gives_their_logits(name: str, absorbed: bool) -> None:
    tokens, wanted = (expected(name)[key][:, :CACHED] for key in ("tokens", "logits"))
    model, weights = prepared(name)
    cache = new_cache(model, len(tokens), CACHED, jnp.float32)
    got = token_by_token((model, absorbed), weights, cache, jnp.asarray(tokens))
    assert_equal(got, wanted)


def test_mtp_modules_of_training_give_their_logits() -> None:
    recorded = expected("mtp")
    tokens = recorded["tokens"]
    model, params, router_state = loaded("mtp")

    @jax.jit
    def run(variables: Any) -> list[jax.Array]:
        out = small.apply(Transformer(*small.parts(model)), variables, tokens, ahead=1)
        return [head_logits(params, h_BTD) for h_BTD in (out.hidden_BTD, *out.mtp_hidden)]

    main, *modules = run({"params": params, "router_state": router_state})
    assert_equal(main, recorded["logits"][:, :-1])
    for depth, got in enumerate(modules, start=1):
        # Module k at position i reads token i + k, which the last positions lack.
        assert_equal(got[:, : tokens.shape[1] - depth], recorded[f"mtp_logits_{depth}"])


@pytest.mark.parametrize("absorbed", [True, False])
def test_mtp_modules_of_decoding_give_their_logits(absorbed: bool) -> None:
    """In two pieces, the second over the cache that the first left."""
    recorded = expected("mtp")
    tokens = jnp.asarray(recorded["tokens"])
    model, weights = prepared("mtp")
    batch, length = tokens.shape

    @jax.jit
    def run(cache: Cache) -> list[jax.Array]:
        found = []
        for piece in (slice(0, 7), slice(7, length)):
            positions = jnp.broadcast_to(jnp.arange(length)[piece], tokens[:, piece].shape)
            parts = (model, FP32, weights)
            h, cache = main_forward(*parts, cache, tokens[:, piece], positions, absorbed=absorbed)
            hidden = [h]
            for depth in (1, 2):
                ahead = jnp.roll(tokens, -depth, axis=1)[:, piece]
                h, cache = mtp_forward(*parts, cache, depth, h, ahead, positions, absorbed=absorbed)
                hidden.append(h)
            found.append(hidden)
        whole = [jnp.concatenate(pieces, axis=1) for pieces in zip(*found, strict=True)]
        return [logits(weights, h, model.vocab_size) for h in whole]

    main, *modules = run(new_cache(model, batch, length, jnp.float32, mtp=True))
    assert_equal(main, recorded["logits"])
    for depth, got in enumerate(modules, start=1):
        assert_equal(got[:, : length - depth], recorded[f"mtp_logits_{depth}"])


def test_a_wrong_router_bias_would_be_seen() -> None:
    tokens, wanted = (expected("plain")[key][:, :CACHED] for key in ("tokens", "logits"))
    model, weights = prepared("plain")
    params, state = weights.blocks[1]
    bias = state["mlp"]["e_score_correction_bias"]
    changed = ((params, {"mlp": {"e_score_correction_bias": jnp.zeros_like(bias)}}),)
    weights = replace(weights, blocks=weights.blocks[:1] + changed + weights.blocks[2:])
    cache = new_cache(model, len(tokens), CACHED, jnp.float32)
    got = np.asarray(token_by_token((model, True), weights, cache, jnp.asarray(tokens)))
    assert np.abs(got - wanted).max() > 0.01 * np.abs(wanted).max()
