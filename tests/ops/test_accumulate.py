"""Gradients added up in place, against autodiff's sums. Dims: M batches, L layers, D features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v3jax.ops.accumulate import Sink, added_up, new_sink, tapped

L, D, M = 12, 256, 3


def loss(params: Any, x_D: jax.Array, sink: Sink | None = None) -> jax.Array:
    """A stack of layers in a loop and one weight after it."""
    stack, own = params["stack"], None if sink is None else sink["stack"]
    last = tapped(params["last"], None if sink is None else sink["last"])

    def layer(x_D: jax.Array, stacked: Any) -> tuple[jax.Array, None]:
        weights, n = stacked
        return jnp.tanh(x_D @ tapped(weights, own, n)["w"]), None

    x_D, _ = jax.lax.scan(layer, x_D, (stack, jnp.arange(L)))
    return jnp.sum(x_D * last)


def in_place(params: Any, x_MD: jax.Array, n: jax.Array) -> Any:
    sink = new_sink(params)

    def add(m: jax.Array, total: jax.Array) -> jax.Array:
        def tapped_loss(probe: jax.Array) -> jax.Array:
            return loss(params, x_MD[m], Sink(sink.refs, probe))

        value, nothing = jax.value_and_grad(tapped_loss)(sink.probe)
        return total + value + nothing

    return jax.lax.fori_loop(0, n, add, jnp.zeros(())), added_up(sink)


def by_sums(params: Any, x_MD: jax.Array, n: jax.Array) -> Any:
    def add(m: jax.Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, x_MD[m]))

    return jax.lax.fori_loop(0, n, add, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)))


def inputs() -> tuple[Any, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    stack = {"w": jax.random.normal(keys[0], (L, D, D)) / np.sqrt(D)}
    params = {"stack": stack, "last": jax.random.normal(keys[1], (D,))}
    return params, jax.random.normal(keys[2], (M, D)), jnp.int32(2)


def test_gradients_are_the_sums_of_the_batches_in_use() -> None:
    found, wanted = (jax.jit(run)(*inputs()) for run in (in_place, by_sums))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert np.asarray(found[1]["stack"]["w"]).any()


def test_no_second_copy_of_a_loops_gradients_is_made() -> None:
    params, *rest = inputs()
    size = params["stack"]["w"].nbytes
    temporary = {}
    for run in (in_place, by_sums):
        memory = jax.jit(run).lower(params, *rest).compile().memory_analysis()
        assert memory is not None
        temporary[run] = memory.temp_size_in_bytes
    assert temporary[in_place] < size / 2
    assert temporary[by_sums] > size
