"""Rows gathered and added up by TPU kernels, interpreted, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from v3jax.kernels import rows as kernel

N, D = 300, 128
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((N, 8, D)), jnp.bfloat16)


def test_rows_are_gathered_in_the_order_asked_for() -> None:
    index = jnp.asarray(RNG.integers(0, N, 256), jnp.int32)
    got = kernel.gather_rows(X, index, interpret=True)
    np.testing.assert_array_equal(got, X[index])


def test_an_index_past_the_end_reads_some_row() -> None:
    index = jnp.full(128, N + 7, jnp.int32)
    got = kernel.gather_rows(X, index, interpret=True)
    np.testing.assert_array_equal(got, X[jnp.full(128, N - 1)])


def test_rows_of_a_token_add_up_without_those_past_the_end() -> None:
    row_TK = jnp.asarray(RNG.integers(0, N + 40, (64, 4)), jnp.int32)
    x = X.at[N - 1].set(jnp.inf)  # what an index past the end reads must not show
    row_TK = jnp.where(row_TK == N - 1, 0, row_TK)
    got = kernel.sum_rows(x, row_TK, interpret=True)
    wanted = np.zeros((64, 8, D), np.float32)
    for t in range(64):
        for r in np.asarray(row_TK)[t]:
            wanted[t] += np.asarray(x[r], np.float32) if r < N else 0.0
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=1e-2, atol=1e-2)


def test_cost_estimates_are_the_analytic_ones() -> None:
    row_bytes = 2 * 8 * D
    index = jnp.zeros(256, jnp.int32)
    for call, flops, moved in (
        (lambda: kernel.gather_rows(X, index), 0, 2 * 256),
        (lambda: kernel.sum_rows(X, index.reshape(32, 8)), (256 - 32) * 8 * D, 256 + 32),
    ):
        (made,) = [e for e in jax.make_jaxpr(call)().eqns if e.primitive.name == "pallas_call"]
        estimate = made.params["cost_estimate"]
        assert (estimate.flops, estimate.bytes_accessed) == (flops, moved * row_bytes)
