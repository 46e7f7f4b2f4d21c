"""RMSNorm and SwiGLU."""

import jax.numpy as jnp
import numpy as np

from tests.reference.mla import rms_norm
from tests.reference.moe import swiglu
from v3jax.ops import norm as ops


def test_rms_norm_equals_the_reference() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(3, 4, 7)), rng.normal(size=7)
    got = ops.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), 0.3)
    np.testing.assert_allclose(got, rms_norm(x, weight, 0.3), rtol=1e-5, atol=1e-6)


def test_rms_norm_of_bf16_takes_its_statistics_in_fp32() -> None:
    x = jnp.full((1, 4096), 0.1, jnp.bfloat16)
    got = ops.rms_norm(x, jnp.ones(4096), 1e-6)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), 1.0, atol=4e-3)


def test_swiglu_applies_silu_to_the_first_half() -> None:
    rng = np.random.default_rng(0)
    x, w, identity = rng.normal(size=(5, 4)), rng.normal(size=(4, 6)), np.eye(3)
    got = ops.swiglu(jnp.asarray(x @ w, jnp.float32))
    np.testing.assert_allclose(got, swiglu(x, w, identity), rtol=1e-5, atol=1e-6)
