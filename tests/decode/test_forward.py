"""Decoding's forward pass against training's modules."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decode.small import MODEL, setup
from tests.model import small
from v3jax.decode.cache import new_cache
from v3jax.decode.forward import each_choice, every_expert, logits, main_forward, moe, prepare
from v3jax.model.moe import MoE
from v3jax.weights import FP32

MANY = small.config(n_experts=64, top_k=3)
TIMES = small.config(n_experts=64, top_k=3, router_bias="multiplied")


def mixture(model: Any) -> tuple[Any, Any]:
    """One layer's `mlp` parameters and router state."""
    params, state = (
        small.params(model)["moe_layers"]["mlp"],
        small.router_state(model)["moe_layers"],
    )
    return jax.tree.map(lambda x: small.to_jax(x[0]), (params, state["mlp"]))


@pytest.mark.parametrize("model", [MODEL, MANY, TIMES], ids=["12", "64", "multiplied"])
def test_a_mixture_is_trainings_for_any_number_of_tokens(model: Any) -> None:
    params, state = mixture(model)
    h_BTD = jax.random.normal(jax.random.key(0), (3, 11, model.dim))
    variables = {"params": params, "router_state": state}
    trained = jax.jit(lambda h: small.apply(MoE(*small.parts(model)), variables, h, None)[0])
    wanted = np.asarray(trained(h_BTD))
    ours = jax.jit(lambda h: moe(model, FP32, params, state, h))
    for batch, length in ((1, 1), (2, 1), (3, 2), (3, 10), (3, 11)):
        got = ours(h_BTD[:batch, :length])
        np.testing.assert_allclose(got, wanted[:batch, :length], atol=1e-5)
    split = jax.jit(lambda h: moe(model, FP32, params, state, h, split=True))
    np.testing.assert_allclose(split(h_BTD[:1, :2]), wanted[:1, :2], atol=1e-5)


def test_both_ways_to_run_few_tokens_agree() -> None:
    params, _ = mixture(MODEL)
    x_ND = jax.random.normal(jax.random.key(0), (7, MODEL.dim))
    experts = np.random.default_rng(0).permuted(np.tile(np.arange(12), (7, 1)), axis=1)[:, :3]
    gates_NK = jax.random.uniform(jax.random.key(1), (7, 3))
    one, other = (
        run(params["experts"], x_ND, jnp.asarray(experts), gates_NK)
        for run in (each_choice, every_expert)
    )
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_weights_are_the_variables_layer_by_layer() -> None:
    whole = setup()
    weights = prepare(MODEL, FP32, whole.params, whole.router_state)
    assert [state is None for _, state in weights.blocks] == [True, False]
    mlp = weights.blocks[1][0]["mlp"]
    np.testing.assert_array_equal(mlp["gate"], whole.params["moe_layers"]["mlp"]["gate"][0])
    bf16 = small.numerics(compute="bf16")
    cast = prepare(MODEL, bf16, whole.params, whole.router_state)
    params, state = cast.blocks[1]
    assert params["mlp"]["gate"].dtype == state["mlp"]["e_score_correction_bias"].dtype == "float32"
    assert params["input_layernorm"].dtype == "float32"
    kinds = {str(x.dtype) for x in jax.tree.leaves(params) if x.ndim > 1}
    assert kinds == {"bfloat16", "float32"}
    assert cast.head_DV.dtype == cast.mtp[0][0]["eh_proj"].dtype == "bfloat16"


def test_bf16_computes_in_bf16_and_stays_near_fp32() -> None:
    whole = setup()
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, MODEL.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    found = []
    for compute, dtype in (("fp32", jnp.float32), ("bf16", jnp.bfloat16)):
        numerics = small.numerics(compute=compute)
        weights = prepare(MODEL, numerics, whole.params, whole.router_state)
        run = jax.jit(functools.partial(main_forward, MODEL, numerics, absorbed=True))
        hidden, cache = run(weights, new_cache(MODEL, 2, 8, dtype), tokens, positions)
        assert hidden.dtype == cache.layers[0].dtype == dtype
        out = logits(weights, hidden, MODEL.vocab_size)
        assert out.dtype == jnp.float32
        found.append(np.asarray(out))
    scale = np.abs(found[0]).max()
    assert 1e-4 * scale < np.abs(found[0] - found[1]).max() < 0.1 * scale
