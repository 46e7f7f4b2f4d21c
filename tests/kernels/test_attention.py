"""Fused attention of the accelerators: interpreted on TPU's side, lowered on the GPU's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3jax.kernels import attention as kernel
from v3jax.kernels import platform
from v3jax.ops import blocks
from v3jax.ops.attention import causal_attention

B, T, H, K, V = 2, 256, 2, 192, 128
SCALE = 0.07


def arrays() -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H, V)
    return [jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes]


@pytest.mark.parametrize("with_segments", [False, True])
def test_splash_attention_equals_the_plain_form(with_segments: bool) -> None:
    q, k, v, probe = arrays()
    segments = jnp.asarray(np.arange(B * T).reshape(B, T) // 100) if with_segments else None

    def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return kernel.on_tpu(q, k, v, segments, SCALE, interpret=True)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        return causal_attention(*wide, scale=SCALE, segments_BT=segments)

    out, pull = jax.vjp(fused, q, k, v)
    wanted, pull_plain = jax.vjp(plain, q, k, v)
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, atol=2e-2)
    gradients, wanted_gradients = pull(probe), pull_plain(probe.astype(jnp.float32))
    for g, w in zip(gradients, wanted_gradients, strict=True):
        g, w = (np.asarray(x, np.float32) for x in (g, w))
        assert np.linalg.norm(g - w) < 1e-2 * np.linalg.norm(w)


@pytest.mark.parametrize("with_segments", [False, True])
def test_splash_blocks_joined_equal_attention_to_the_whole_row(with_segments: bool) -> None:
    """The second half's queries meet the first half's keys, then their own."""
    q, k, v, probe = arrays()
    segments = jnp.asarray(np.arange(B * T).reshape(B, T) // 100) if with_segments else None
    half = T // 2
    queries, earlier, later = slice(half, T), slice(half), slice(half, T)

    def ids(keys: slice) -> tuple[jax.Array, jax.Array] | None:
        return None if segments is None else (segments[:, queries], segments[:, keys])

    parts = [(earlier, False), (later, True)]
    done = blocks.merged(
        *(
            kernel.block_on_tpu(
                q[:, queries], k[:, at], v[:, at], ids(at), SCALE, causal=causal, interpret=True
            )
            for at, causal in parts
        )
    )
    found = [
        kernel.block_gradients_on_tpu(
            *(q[:, queries], k[:, at], v[:, at], ids(at), done, probe[:, queries], SCALE),
            causal=causal,
            interpret=True,
        )
        for at, causal in parts
    ]
    dq = sum(np.asarray(f[0], np.float32) for f in found)
    dk, dv = (np.concatenate([np.asarray(f[i], np.float32) for f in found], 1) for i in (1, 2))

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        return causal_attention(*wide, scale=SCALE, segments_BT=segments)[:, queries]

    wanted, pull = jax.vjp(plain, q, k, v)
    np.testing.assert_allclose(done[0], wanted, atol=2e-2)
    of_q, *of_keys = (
        np.asarray(x, np.float32) for x in pull(probe[:, queries].astype(jnp.float32))
    )
    for g, w in zip((dq, dk, dv), (of_q[:, queries], *of_keys), strict=True):
        assert np.linalg.norm(g - w) < 1e-2 * np.linalg.norm(w)


def test_blocks_divide_the_length() -> None:
    for length in (128, 256, 1024, 4096, 4224, 8192, 131_072):
        block = kernel._block(length, 1024)
        assert length % block == 0
        assert block % 128 == 0
        assert block <= 1024


def test_this_machine_is_what_the_mesh_says() -> None:
    mesh = jax.make_mesh((1,), ("x",))
    with jax.set_mesh(mesh):
        assert platform() == jax.default_backend()
    assert platform(mesh) == jax.default_backend()


@pytest.mark.parametrize(
    ("device", "fits"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H800", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA B200", True),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA GeForce RTX 4090", False),
    ],
)
def test_gpus_before_hopper_are_left_to_the_plain_form(
    device: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, _, v, _ = arrays()
    monkeypatch.setattr(kernel, "device_kind", lambda: device)
    assert kernel.fits_gpu(q, v, None) == fits
    assert not kernel.fits_gpu(q.astype(jnp.float32), v, None)
    assert not kernel.fits_gpu(q, v, jnp.ones((B, T), jnp.int32))
    assert not kernel.fits_gpu(q[..., :100], v, None)
