"""The latent cache: what a token leaves in it, and attention over it in both forms."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.v3 import v3_full
from tests.model import small
from v3jax.decode.cache import BLOCK, absorbable, cached_mla, new_cache, room_for, write_rows
from v3jax.model.mla import MLA

MODEL = small.config(n_layers=2)
LENGTH = 9


def test_the_report_model_keeps_576_elements_a_token_a_layer() -> None:
    model = v3_full().model
    for mtp in (False, True):
        make = functools.partial(new_cache, model, 3, BLOCK, jnp.bfloat16, mtp=mtp)
        cache: Any = jax.eval_shape(make)
        assert [x.shape for x in cache.layers] == [(3, BLOCK, 576)] * (62 if mtp else 61)
        assert {x.dtype for x in cache.layers} == {jnp.dtype(jnp.bfloat16)}
        of_a_token = sum(x.size * x.dtype.itemsize for x in cache.layers[:61]) / (3 * BLOCK)
        assert of_a_token == 70_272  # bytes; "Insights into DeepSeek-V3", table 1


def test_room_is_a_power_of_two_of_blocks() -> None:
    assert [room_for(n) // BLOCK for n in (1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK)] == [
        1,
        1,
        2,
        2,
        8,
    ]


def setup() -> tuple[Any, Any, jax.Array]:
    """Training's attention parameters, decoding's, and inputs `[2, T, D]`."""
    params = small.to_jax(small.params(MODEL)["dense_layers"]["self_attn"])
    params = jax.tree.map(lambda x: x[0], params)
    ready = {name: x for name, x in params.items() if name != "kv_b_proj"}
    x_BTD = jax.random.normal(jax.random.key(0), (2, LENGTH, MODEL.dim))
    return params, ready | absorbable(MODEL, params["kv_b_proj"]), x_BTD


@pytest.mark.parametrize("absorbed", [True, False])
def test_attention_over_the_cache_is_trainings(absorbed: bool) -> None:
    """All at once, token by token, and in pieces."""
    params, ready, x_BTD = setup()
    wanted = small.apply(
        MLA(*small.parts(MODEL)), {"params": params}, x_BTD, jnp.arange(LENGTH), None
    )
    run = jax.jit(lambda *a: cached_mla(MODEL, ready, *a, absorbed=absorbed))
    for sizes in ([LENGTH], [1] * LENGTH, [4, 1, 4]):
        (rows,), at, got = new_cache(MODEL, 2, LENGTH, jnp.float32).layers[:1], 0, []
        for size in sizes:
            positions = jnp.broadcast_to(at + jnp.arange(size), (2, size))
            out, rows = run(x_BTD[:, at : at + size], rows, positions)
            got.append(out)
            at += size
        np.testing.assert_allclose(np.concatenate(got, axis=1), wanted, atol=2e-6)


def test_a_row_is_the_normalised_latent_and_the_rotated_key() -> None:
    params, ready, x_BTD = setup()
    (rows, _) = new_cache(MODEL, 2, LENGTH, jnp.float32).layers
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    run = jax.jit(lambda rows: cached_mla(MODEL, ready, x_BTD, rows, positions, absorbed=True))
    _, rows = run(rows)
    down = np.asarray(x_BTD, np.float64) @ np.asarray(params["kv_a_proj_with_mqa"], np.float64)
    latent, key = np.split(down, [MODEL.kv_latent_dim], axis=-1)
    latent /= np.sqrt(np.mean(latent**2, axis=-1, keepdims=True) + MODEL.latent_norm_eps)
    np.testing.assert_allclose(
        rows[:, :LENGTH, : MODEL.kv_latent_dim], latent * params["kv_a_layernorm"], atol=1e-5
    )
    turned = key[..., 0::2] + 1j * key[..., 1::2]
    theta = MODEL.rope_base ** (-np.arange(0, MODEL.rope_head_dim, 2) / MODEL.rope_head_dim)
    turned = turned * np.exp(1j * np.arange(LENGTH)[:, None] * theta)
    wanted = np.stack([turned.real, turned.imag], axis=-1).reshape(key.shape)
    np.testing.assert_allclose(rows[:, :LENGTH, MODEL.kv_latent_dim :], wanted, atol=1e-5)
    assert (np.asarray(rows[:, LENGTH:]) == 0).all()


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("length", [BLOCK, 2 * BLOCK])
def test_what_lies_beyond_a_token_or_is_padding_changes_nothing(
    absorbed: bool, length: int
) -> None:
    _, ready, x_BTD = setup()
    empty = new_cache(MODEL, 2, length, jnp.float32).layers[0]
    noise = 100 * jax.random.normal(jax.random.key(1), empty.shape)
    positions = jnp.array([range(LENGTH), [*range(5), *[-1] * 4]])
    run = jax.jit(lambda rows: cached_mla(MODEL, ready, x_BTD, rows, positions, absorbed=absorbed))
    outs = []
    for rows in (empty, noise):
        out, after = run(rows)
        np.testing.assert_array_equal(after[0, LENGTH:], rows[0, LENGTH:])
        np.testing.assert_array_equal(after[1, 5:], rows[1, 5:])
        assert np.isfinite(out).all()
        outs.append(np.asarray(out))
    np.testing.assert_array_equal(outs[0][0], outs[1][0])
    np.testing.assert_array_equal(outs[0][1, :5], outs[1][1, :5])
    assert (outs[0][1, 5:] == 0).all(), "padding attends to nothing"


def test_rows_are_written_to_their_slots_alone() -> None:
    x_BSZ = jnp.zeros((2, 4, 3))
    rows_BTZ = 1 + jnp.arange(12.0).reshape(2, 2, 3)
    got = write_rows(x_BSZ, rows_BTZ, jnp.array([[3, -1], [4, 0]]))
    wanted = np.zeros((2, 4, 3))
    wanted[0, 3], wanted[1, 0] = rows_BTZ[0, 0], rows_BTZ[1, 1]
    np.testing.assert_array_equal(got, wanted)
