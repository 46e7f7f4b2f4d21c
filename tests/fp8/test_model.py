"""The whole model with `numerics.compute=fp8`: what is in FP8, what waits in it, what comes out."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v3jax.config import Fp8Config, ModelConfig
from v3jax.model.transformer import Transformer
from v3jax.ops.fp8 import gemm, quantize

CFG = small.config(
    dim=48,
    n_layers=2,
    n_dense_layers=1,
    mtp_depth=1,
    n_heads=2,
    q_latent_dim=40,
    kv_latent_dim=24,
    nope_head_dim=16,
    rope_head_dim=8,
    v_head_dim=20,
    dense_ffn_dim=56,
    expert_ffn_dim=36,
    n_shared_experts=1,
)
TILED = Fp8Config(tile=16, block=16, promotion=16)
N_ROWS, LENGTH = 2, 13


def make_loss(compute: Any, remat: Any = "none", cfg: ModelConfig = CFG, fp8: Any = TILED) -> Any:
    """A scalar of the parameters that touches every output."""
    model = Transformer(*small.parts(cfg, compute=compute, remat=remat, fp8=fp8))
    state = small.to_jax(small.router_state(cfg))
    tokens = jnp.asarray(
        np.random.default_rng(0).integers(0, cfg.vocab_size, (N_ROWS, LENGTH + 1)), jnp.int32
    )

    def loss(params: Any) -> jax.Array:
        out = small.apply(model, {"params": params, "router_state": state}, tokens, ahead=1)
        states = jnp.concatenate([out.hidden_BTD, *out.mtp_hidden]).astype(jnp.float32)
        return jnp.sum(jnp.sin(states)) + out.stats.balance_loss.sum()

    return loss


@pytest.fixture(scope="module")
def params() -> Any:
    """Small enough that a rounding does not send tokens to other experts."""

    def smaller(path: Any, x: Any) -> Any:
        return x if "norm" in jax.tree_util.keystr(path) else x * 0.3

    return small.to_jax(jax.tree_util.tree_map_with_path(smaller, small.params(CFG)))


def gradients(loss: Any, params: Any) -> np.ndarray:
    # XLA would leave out roundings to BF16 where it merges operations, here one and there another.
    exact = {"xla_allow_excess_precision": False}
    found = jax.jit(jax.grad(loss), compiler_options=exact)(params)
    assert {g.dtype for g in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    return np.concatenate([np.asarray(g, np.float64).reshape(-1) for g in jax.tree.leaves(found)])


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_gradients_are_those_of_the_model_to_some_percents(params: Any) -> None:
    exact = gradients(make_loss("fp32"), params)
    near = apart(gradients(make_loss("bf16"), params), exact)
    ours = apart(gradients(make_loss("fp8"), params), exact)
    assert 2 * near < ours < 0.1


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param("report", marks=pytest.mark.slow),
        pytest.param("full", marks=pytest.mark.exhaustive),
    ],
)
def test_policies_give_the_same_gradients(params: Any, remat: Any) -> None:
    """What is computed again is quantised to the same codes."""
    kept = gradients(make_loss("fp8"), params)
    assert apart(gradients(make_loss("fp8", remat), params), kept) < 1e-5


def test_the_products_in_fp8_are_the_linear_maps(
    params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every block all matrices but the router's; not embedding, head and MTP's projection."""
    dense: list[Any] = []
    grouped: list[Any] = []

    def noted(where: list[Any], product: Any) -> Any:
        def run(a: Any, b: Any, *rest: Any) -> Any:
            where.append(b.codes.shape[-2:][::-1])
            return product(a, b, *rest)

        return run

    monkeypatch.setattr(gemm, "gemm_nt", noted(dense, gemm.gemm_nt))
    monkeypatch.setattr(gemm, "m_grouped_nt", noted(grouped, gemm.m_grouped_nt))
    cfg, heads = CFG, CFG.n_heads
    jax.eval_shape(make_loss("fp8"), params)
    attention = [
        (cfg.dim, cfg.q_latent_dim),
        (cfg.q_latent_dim, heads * (cfg.nope_head_dim + cfg.rope_head_dim)),
        (cfg.dim, cfg.kv_latent_dim + cfg.rope_head_dim),
        (cfg.kv_latent_dim, heads * (cfg.nope_head_dim + cfg.v_head_dim)),
        (heads * cfg.v_head_dim, cfg.dim),
    ]

    def feed_forward(width: int) -> list[Any]:
        return [(cfg.dim, 2 * width), (width, cfg.dim)]

    blocks = cfg.n_layers + cfg.mtp_depth
    moe = blocks - cfg.n_dense_layers
    wanted = attention * blocks + feed_forward(cfg.dense_ffn_dim) * cfg.n_dense_layers
    assert sorted(dense) == sorted(wanted + feed_forward(cfg.expert_ffn_dim) * moe)
    assert sorted(grouped) == sorted(feed_forward(cfg.expert_ffn_dim) * moe)


def waiting(remat: Any, params: Any) -> list[jax.ShapeDtypeStruct]:
    """What the forward pass keeps for the backward pass, parameters left out."""
    kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(make_loss("fp8", remat), p)[1], params))
    for p in jax.tree.leaves(params):
        match = next((x for x in kept if (x.shape, x.dtype) == (p.shape, p.dtype)), None)
        if match is not None:
            kept.remove(match)
    return kept


def test_inputs_wait_in_fp8_and_attentions_output_in_e5m6(params: Any) -> None:
    for remat in ("none", "report"):
        kept = waiting(remat, params)

        def widths(kind: Any, kept: Any = kept) -> set[int]:
            return {x.shape[-1] for x in kept if x.dtype == kind and x.ndim >= 2}

        fp8, packed = widths(jnp.float8_e4m3fn), widths(jnp.uint8)
        heads = CFG.n_heads * CFG.v_head_dim
        assert packed == {heads, heads // 2}
        assert {2 * CFG.dense_ffn_dim, 2 * CFG.expert_ffn_dim} <= fp8
        assert not {CFG.dense_ffn_dim, CFG.expert_ffn_dim} & fp8
        bf16 = widths(jnp.bfloat16)
        assert not {2 * CFG.dense_ffn_dim, 2 * CFG.expert_ffn_dim, CFG.expert_ffn_dim} & bf16
        # The latents before their norms stay in BF16, what their norms give does not.
        inputs = {CFG.dim, CFG.q_latent_dim, CFG.kv_latent_dim}
        assert (fp8 & inputs == inputs) if remat == "none" else not fp8 & inputs


def test_masters_are_quantised_as_they_are(monkeypatch: pytest.MonkeyPatch, params: Any) -> None:
    """Not rounded to BF16 before, and eh_proj, embedding and head are not at all."""
    seen: list[Any] = []
    real = quantize.quantize

    def noted(x: Any, tile: Any, **options: Any) -> Any:
        if tile == (16, 16):
            seen.append((x.dtype, x.shape[-2:]))
        return real(x, tile, **options)

    monkeypatch.setattr("v3jax.ops.fp8.linear.quantize", noted)
    jax.eval_shape(make_loss("fp8"), params)
    assert {dtype for dtype, _ in seen} == {jnp.dtype(jnp.float32)}
    assert (2 * CFG.dim, CFG.dim) not in {shape for _, shape in seen}


def test_a_part_of_the_recipe_is_one_field_away(params: Any) -> None:
    """Each changes the gradients, none of them is ignored."""
    report = gradients(make_loss("fp8"), params)
    for change in (
        {"tile": 32},
        {"block": 32},
        {"power_of_two": "none"},
        {"power_of_two": "all"},
        {"gradients": "blocks"},
    ):
        other = gradients(make_loss("fp8", fp8=replace(TILED, **change)), params)
        assert 1e-2 < apart(other, report) < 0.2, change
    # Sums over 16 elements at a time are those over 128, but for the order of additions.
    wide = Fp8Config()
    one, other = (
        gradients(make_loss("fp8", fp8=f), params) for f in (wide, replace(wide, promotion=16))
    )
    assert 0 < apart(one, other) < 1e-5


def test_tokens_travel_in_fp8_without_loss(params: Any) -> None:
    """Those that travel in BF16 are quantised to the same codes when they have arrived."""
    fp8, bf16 = (replace(TILED, dispatch=kind) for kind in ("fp8", "bf16"))
    one, other = (gradients(make_loss("fp8", fp8=f), params) for f in (fp8, bf16))
    np.testing.assert_array_equal(one, other)


def test_kernels_that_are_not_there_are_asked_for_in_vain(params: Any) -> None:
    insisting = Fp8Config(backend="kernel")
    with pytest.raises(ValueError, match=r"numerics.fp8.backend=kernel: there are no FP8 kernels"):
        jax.eval_shape(make_loss("fp8", fp8=insisting), params)
    with pytest.raises(ValueError, match=r"numerics.fp8.backend: the kernels are for tile, block"):
        Fp8Config(backend="kernel", tile=64, promotion=64)
    with pytest.raises(ValueError, match=r"numerics.fp8.tile: 48 is not a power of two from 16"):
        Fp8Config(tile=48)
    with pytest.raises(ValueError, match=r"numerics.fp8.promotion: 128 is more than a scale"):
        Fp8Config(tile=64)
