"""Both halves of a backward pass together are the whole one, to the last bits, and no more work."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v3jax.model.block import rematerialised
from v3jax.pipeline.split import Split, split
from v3jax.sharding import ShardingRules

CFG = small.config(dim=16, n_layers=2, n_dense_layers=1, mtp_depth=0)


@pytest.fixture(autouse=True)
def _fp64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def of_layer(moe: bool, remat: Any) -> tuple[Any, Any, Any]:
    """A block as a function, its parameters and its router's state, in FP64."""
    numerics = replace(small.numerics(compute="fp64"), remat=remat)
    block = rematerialised(numerics, in_scan=False)(
        CFG, numerics, ShardingRules(), moe=moe, parent=None
    )
    name = "moe_layers" if moe else "dense_layers"
    trees = (small.params(CFG)[name], small.router_state(CFG).get(name, {}))
    params, router_state = jax.tree.map(lambda a: jnp.asarray(a[0]), trees)

    def f(params: Any, x: jax.Array, router_state: Any, counted: jax.Array) -> Any:
        variables = {"params": params, "router_state": router_state}
        y, stats = cast(Any, block).apply(variables, x, jnp.arange(x.shape[1]), None, counted)
        return ((y, stats.balance_loss), stats.load_E) if moe else ((y, 0.0), ())

    return f, params, router_state


def gradients(found: Split, arguments: tuple[Any, ...], of_outputs: Any) -> tuple[Any, ...]:
    """What the three passes give, each compiled by itself."""
    outputs, report, saved = jax.jit(found.forward)(*arguments)
    of_x, between = jax.jit(found.inputs)(arguments[0], saved, of_outputs)
    of_params = jax.jit(found.weights)(arguments[0], saved, between)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*saved, *between)]
    assert shapes == [*found.saved, *found.found]
    return outputs, report, of_params, of_x


@pytest.mark.parametrize("remat", ["none", "report", "full"])
@pytest.mark.parametrize("moe", [False, True])
def test_halves_are_the_whole_for_a_block(moe: bool, remat: str) -> None:
    f, params, router_state = of_layer(moe, remat)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8, CFG.dim)))
    counted = jnp.asarray(rng.random((2, 8)) < 0.8)
    arguments = (params, x, router_state, counted)
    of_outputs = (jnp.asarray(rng.normal(size=x.shape)), jnp.asarray(0.3, jnp.float64))
    if moe:
        balance = jax.eval_shape(f, *arguments)[0][1]
        of_outputs = (of_outputs[0], of_outputs[1].astype(balance.dtype))
    else:
        f = functools.partial(_without_balance, f)
        of_outputs = of_outputs[0]
    found = split(f, *arguments)
    outputs, report, *ours = gradients(found, arguments, of_outputs)

    @jax.jit
    def whole(params: Any, x: jax.Array, of_outputs: Any) -> Any:
        out, pull, report = jax.vjp(lambda p, x: f(p, x, *arguments[2:]), params, x, has_aux=True)
        return out, report, list(pull(of_outputs))

    wanted = jax.tree.leaves(whole(params, x, of_outputs))
    for a, b in zip(jax.tree.leaves((outputs, report, ours)), wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * max(float(jnp.abs(b).max()), 1e-3))
    if remat == "full":  # the input and what the router is told; the rest is computed again
        assert sum(a.size for a in found.saved) < 1.5 * x.size


def _without_balance(f: Any, *arguments: Any) -> Any:
    (y, _), report = f(*arguments)
    return y, report


def chain(params: Any, x: jax.Array, scale: Any) -> tuple[jax.Array, jax.Array]:
    """Two matrices, one of them used twice; `unused` is not."""
    hidden = jnp.tanh(x @ params["a"]) * scale
    return jnp.tanh(hidden @ params["b"]) @ params["a"].T, hidden.sum()


def chain_arguments() -> tuple[Any, jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(rng.normal(size=(4, 4))) for name in ("a", "b", "unused")}
    return params, jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(0.7)


def test_matrix_products_are_dealt_out_and_none_is_made_twice() -> None:
    arguments = chain_arguments()
    found = split(chain, *arguments)
    outputs, _, saved = found.forward(*arguments)
    _, between = found.inputs(arguments[0], saved, outputs)

    def products(f: Any, *arrays: Any) -> int:
        return str(jax.make_jaxpr(f)(*arrays)).count("dot_general")

    assert products(found.forward, *arguments) == 3
    assert products(found.inputs, arguments[0], saved, outputs) == 3, "one for each use of a matrix"
    assert products(found.weights, arguments[0], saved, between) == 3
    whole = products(
        lambda p, x, g: jax.vjp(lambda p, x: chain(p, x, 0.7)[0], p, x)[1](g),
        *arguments[:2],
        outputs,
    )
    assert whole == 3 + 3 + 3


def test_parameters_are_not_saved_and_unused_ones_get_zeros() -> None:
    arguments = chain_arguments()
    found = split(chain, *arguments)
    assert all(a.shape != (4, 4) for a in found.saved)
    of_outputs = jnp.ones((3, 4))
    *_, of_params, _ = gradients(found, arguments, of_outputs)
    assert (of_params["unused"] == 0).all()
    wanted = jax.grad(lambda p: chain(p, *arguments[1:])[0].sum())(arguments[0])
    for name in ("a", "b"):
        np.testing.assert_allclose(of_params[name], wanted[name], rtol=1e-13)


def test_the_second_half_rests_on_what_the_first_found() -> None:
    """The comparisons above can fail: with something else in its place, gradients are others."""
    arguments = chain_arguments()
    found = split(chain, *arguments)
    *_, wanted, _ = gradients(found, arguments, jnp.ones((3, 4)))
    _, _, saved = found.forward(*arguments)
    _, between = found.inputs(arguments[0], saved, jnp.ones((3, 4)))
    for i in range(len(between)):
        wrong = [2 * a if i == j else a for j, a in enumerate(between)]
        of_params = found.weights(arguments[0], saved, wrong)
        assert any(not np.allclose(of_params[name], wanted[name]) for name in wanted)
