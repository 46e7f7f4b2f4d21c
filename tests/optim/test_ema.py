"""The parameters' moving average against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np

from v3jax.optim.ema import update_ema


def test_ema_is_the_weighted_sum_of_all_parameters_seen() -> None:
    decay, n = 0.9, 30
    seen = np.random.default_rng(0).normal(size=(n, 2, 5)).astype(np.float32)
    ema = {"a": jnp.asarray(seen[0, 0]), "b": {"c": jnp.asarray(seen[0, 1])}}
    update = jax.jit(lambda e, p: update_ema(e, p, decay))
    for x in seen[1:]:
        ema = update(ema, {"a": jnp.asarray(x[0]), "b": {"c": jnp.asarray(x[1])}})
    weights = (1 - decay) * decay ** np.arange(n - 1, -1, -1.0)
    weights[0] = decay ** (n - 1)
    expected = np.einsum("n,nij->ij", weights, seen.astype(np.float64))
    np.testing.assert_allclose(ema["a"], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ema["b"]["c"], expected[1], rtol=1e-5, atol=1e-6)


def test_ema_of_unchanged_parameters_is_bit_for_bit_the_same() -> None:
    x = {"w": jnp.asarray(np.random.default_rng(1).normal(size=1000), jnp.float32)}
    np.testing.assert_array_equal(update_ema(x, x, 0.999)["w"], x["w"])
