"""Multi-head latent attention against both of its published forms."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from tests.reference import mla as reference
from v3jax.config import ModelConfig, YarnConfig
from v3jax.model.mla import MLA

YARN = YarnConfig(factor=40, original_seq_len=16, beta_fast=4, beta_slow=1, mscale=1.0)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3, 3, 3]])


def weights(cfg: ModelConfig) -> dict:
    return small.block_params(np.random.default_rng(0), cfg, (), moe=False)["self_attn"]


def draw(cfg: ModelConfig) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, 8, cfg.dim))


def run(cfg: ModelConfig, p: dict, x: np.ndarray, segments: np.ndarray | None = None) -> jax.Array:
    segs = None if segments is None else jnp.asarray(segments)
    x_BTD = jnp.asarray(x, jnp.float32)
    return small.apply(
        MLA(*small.parts(cfg)), {"params": small.to_jax(p)}, x_BTD, jnp.arange(8), segs
    )


@pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "yarn"])
def test_the_absorbed_form_of_the_reference_equals_the_expanded_one(
    yarn: YarnConfig | None,
) -> None:
    cfg = small.config(yarn=yarn)
    p, x = weights(cfg), draw(cfg)
    for row, segments in zip(x, [None, SEGMENTS[1]], strict=True):
        wanted = reference.attention(row, p, cfg, segments)
        np.testing.assert_allclose(
            reference.absorbed_attention(row, p, cfg, segments), wanted, atol=1e-12
        )


@pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "segments"])
def test_attention_equals_the_reference(
    yarn: YarnConfig | None, segments: np.ndarray | None
) -> None:
    cfg = small.config(yarn=yarn)
    p, x = weights(cfg), draw(cfg)
    wanted = [
        reference.attention(row, p, cfg, None if segments is None else segments[b])
        for b, row in enumerate(x)
    ]
    np.testing.assert_allclose(run(cfg, p, x, segments), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"q_latent_dim": None}, {"norm_eps": 0.3}, {"latent_norm_eps": 0.3}], ids=str
)
def test_attention_without_query_latent_or_with_other_eps_equals_the_reference(
    changes: dict,
) -> None:
    cfg = small.config(**changes)
    p, x = weights(cfg), draw(cfg)
    wanted = [reference.attention(row, p, cfg) for row in x]
    np.testing.assert_allclose(run(cfg, p, x), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_equal_finite_differences_of_the_reference() -> None:
    cfg = small.config()
    tree = {"x": draw(cfg), "p": weights(cfg)}
    probe = np.random.default_rng(2).normal(size=(2, 8, cfg.dim))

    def slow(t: dict) -> float:
        return sum(
            float(np.sum(w * reference.attention(row, t["p"], cfg)))
            for w, row in zip(probe, t["x"], strict=True)
        )

    def fast(t: dict) -> jax.Array:
        out = small.apply(MLA(*small.parts(cfg)), {"params": t["p"]}, t["x"], jnp.arange(8), None)
        return jnp.sum(jnp.asarray(probe, jnp.float32) * out)

    small.assert_same_derivatives(jax.jit(jax.grad(fast))(small.to_jax(tree)), slow, tree)


def test_no_position_sees_a_later_one() -> None:
    cfg = small.config()
    p, x = weights(cfg), draw(cfg)
    changed = x.copy()
    changed[:, 5:] += 1.0
    before, after = run(cfg, p, x), run(cfg, p, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.asarray(before[:, 5:]) != np.asarray(after[:, 5:])).all()


def test_only_relative_position_matters_without_a_change_of_segment() -> None:
    cfg = small.config()
    p, x = small.to_jax(weights(cfg)), jnp.asarray(draw(cfg), jnp.float32)
    attention = MLA(*small.parts(cfg))
    near = small.apply(attention, {"params": p}, x, jnp.arange(8), None)
    far = small.apply(attention, {"params": p}, x, jnp.arange(8) + 500, None)
    np.testing.assert_allclose(near, far, atol=2e-4)
    stretched = small.apply(attention, {"params": p}, x, 3 * jnp.arange(8), None)
    assert np.abs(np.asarray(near - stretched)).max() > 1e-2


def test_the_rotary_key_is_not_normalised() -> None:
    cfg = small.config()
    p, x = weights(cfg), draw(cfg)
    louder = p["kv_a_proj_with_mqa"].copy()
    louder[:, cfg.kv_latent_dim :] *= 3
    scaled = np.asarray(run(cfg, replace_leaf(p, louder), x))
    assert np.abs(scaled - np.asarray(run(cfg, p, x))).max() > 1e-2
    quieter = p["kv_a_proj_with_mqa"].copy()
    quieter[:, : cfg.kv_latent_dim] *= 3  # the latent norm takes this out again
    np.testing.assert_allclose(run(cfg, replace_leaf(p, quieter), x), run(cfg, p, x), atol=1e-4)


def replace_leaf(p: dict, kv_a: np.ndarray) -> dict:
    return p | {"kv_a_proj_with_mqa": kv_a}


def test_bf16_stays_close_to_fp32() -> None:
    cfg = replace(small.CONFIG)
    p, x = weights(cfg), draw(cfg)
    low = small.apply(
        MLA(*small.parts(cfg, compute="bf16")),
        {"params": small.to_jax(p)},
        jnp.asarray(x, jnp.bfloat16),
        jnp.arange(8),
        None,
    )
    whole = np.asarray(run(cfg, p, x))
    assert low.dtype == jnp.bfloat16
    assert np.abs(np.asarray(low, np.float32) - whole).max() < 0.05 * np.abs(whole).max()
