"""Attention over rows that devices share, against attention on one device, in FP64.

Dims: B batch, T positions, H heads, K key dim, V value dim, L latent, R rotary dim, Y = L + R.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from v3jax.config import Fp8Config, MeshConfig
from v3jax.ops import blocks, context, zigzag
from v3jax.ops.attention import causal_attention
from v3jax.sharding import make_mesh

B, H, NOPE, ROT, V, L = 2, 3, 6, 4, 5, 8
FORM = context.Form(0.37, NOPE, None, deterministic=False)


def inputs(length: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, length, H, NOPE + ROT))
    latent = rng.normal(size=(B, length, L + ROT))
    kv_b = rng.normal(size=(L, H * (NOPE + V)))
    return q, latent, kv_b


def documents(length: int) -> np.ndarray:
    """One row of three documents that end within pieces, one of one document and padding."""
    at = np.arange(length)
    return np.stack([1 + (at > length // 3) + (at > length // 2), 1 * (at < length - 3)])


def alone(q: Any, latent: Any, kv_b: Any, segments: Any) -> jax.Array:
    """The same by the definition."""
    x, rope = latent[..., :L], latent[..., L:]
    kv = (x @ kv_b).reshape(*x.shape[:2], H, -1)
    rope = jnp.broadcast_to(rope[:, :, None], (*kv.shape[:3], ROT))
    k = jnp.concatenate([kv[..., :NOPE], rope], axis=-1)
    return causal_attention(q, k, kv[..., NOPE:], scale=FORM.scale, segments_BT=segments)


def shared(form: context.Form, n: int, q: Any, latent: Any, kv_b: Any, segments: Any) -> jax.Array:
    """Of rows whose positions `n` devices have, put together again."""
    mesh = make_mesh(MeshConfig(context=n))
    length = q.shape[1]
    order = jnp.argsort(device_order(length, n))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(None, "context"), check_vma=False
    )
    def run(q: Any, latent: Any, kv_b: Any, segments: Any) -> jax.Array:
        own = (zigzag.own(q), zigzag.own(latent))
        return context.shared_attention(form, *own, kv_b, segments)[0]

    return run(q, latent, kv_b, segments)[:, order]


def device_order(length: int, n: int) -> jax.Array:
    """The row's positions, device by device."""
    mesh = make_mesh(MeshConfig(context=n))
    run = jax.shard_map(
        lambda: zigzag.positions(length), mesh=mesh, in_specs=(), out_specs=P("context")
    )
    return jax.jit(run)()


def test_every_device_has_an_early_and_a_late_piece() -> None:
    order = np.asarray(device_order(24, 4)).reshape(4, 2, 3)
    assert order[0].tolist() == [[0, 1, 2], [21, 22, 23]]
    assert order[3].tolist() == [[9, 10, 11], [12, 13, 14]]
    keys = (order + 1).sum((1, 2))
    assert len(set(keys.tolist())) == 1


@pytest.mark.parametrize(
    ("n", "length", "chunk", "isolate"),
    [
        (4, 32, 2, True),
        pytest.param(2, 24, 3, False, marks=pytest.mark.slow),
        pytest.param(8, 32, 512, False, marks=pytest.mark.slow),
    ],
)
def test_output_and_gradients_are_those_of_one_device(
    n: int, length: int, chunk: int, isolate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_CHUNK", chunk)
    with jax.enable_x64(True):
        arrays = inputs(length)
        segments = documents(length) if isolate else None
        weights = np.random.default_rng(1).normal(size=(B, length, H, V))

        def loss(attend: Any, *arrays: Any) -> tuple[jax.Array, jax.Array]:
            out = attend(*arrays, segments)
            return jnp.sum(out * weights), out

        found = [
            jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1, 2), has_aux=True))(
                *arrays
            )
            for f in (functools.partial(shared, FORM, n), alone)
        ]
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())


def test_keys_and_values_in_fp8_are_near() -> None:
    """Also the gradients; the output is kept in E5M6."""
    form = replace(FORM, fp8=Fp8Config(tile=16, block=16, promotion=16))
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs(32)]
    found = []
    for some in (form, FORM):

        def total(
            q: jax.Array, latent: jax.Array, kv_b: jax.Array, some: context.Form = some
        ) -> tuple[jax.Array, jax.Array]:
            out = shared(some, 4, q, latent, kv_b, None)
            return jnp.sum(jnp.square(out)), out

        found.append(jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays))
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        assert 0 < np.linalg.norm(a - b) < 0.15 * np.linalg.norm(b)
