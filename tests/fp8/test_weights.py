"""Weights that travel as codes: those of the whole master, and its gradient."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.fp8.test_quantize import bits, sample
from v3jax import sharding
from v3jax.ops.fp8.quantize import quantize
from v3jax.ops.fp8.weights import joined_blocks
from v3jax.sharding import Join, ShardingRules

AXES = ("node", "expert")
CASES = [
    ((256, 384), 0),  # blocks lie whole in parts
    ((448, 256), 0),  # parts of 112 rows
    ((300, 200), 0),  # of 75, and a last block of 44
    ((130, 448), 1),
    ((4, 130, 140), 0),  # a matrix each
    ((2, 200, 300), 1),
    ((2, 200, 300), 2),
]


def gathered(shape: tuple[int, ...], dim: int, join: Join | None) -> Callable[..., jax.Array]:
    """A weight split over four devices, made whole on each."""
    mesh = jax.make_mesh((2, 2), AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    rules = ShardingRules(storage="fsdp")
    place = P(*[None] * dim, AXES)

    def run(part: jax.Array) -> jax.Array:
        return sharding.gather(part, P(), place, rules, jnp.float32, join)

    return jax.shard_map(run, mesh=mesh, in_specs=place, out_specs=P(), check_vma=False)


@pytest.mark.parametrize(("shape", "dim"), CASES, ids=str)
def test_codes_are_those_of_the_whole_weight(shape: tuple[int, ...], dim: int) -> None:
    w = jnp.asarray(sample(shape))
    found = jax.jit(gathered(shape, dim, functools.partial(joined_blocks, 128)))(w)
    wanted, again = (quantize(x, (128, 128)) for x in (w, found))
    np.testing.assert_array_equal(bits(again.codes), bits(wanted.codes))
    np.testing.assert_array_max_ulp(np.asarray(again.scales), np.asarray(wanted.scales), maxulp=1)
    assert found.dtype == jnp.float32


@pytest.mark.parametrize(("shape", "dim"), [CASES[0], CASES[2]], ids=str)
def test_gradients_are_the_masters(shape: tuple[int, ...], dim: int) -> None:
    """What a sum of products says of the weight itself, not of its codes, and in FP32."""
    w, dy = jnp.asarray(sample(shape)), jnp.asarray(sample(shape, seed=1))
    by_codes, plain = (
        jax.jit(jax.grad(lambda w, join=join: jnp.sum(gathered(shape, dim, join)(w) * dy)))(w)
        for join in (functools.partial(joined_blocks, 128), None)
    )
    assert by_codes.dtype == jnp.float32
    np.testing.assert_array_equal(by_codes, plain)


def test_what_travels_is_bytes() -> None:
    """And the magnitudes that a block's parts need of one another."""
    program = jax.jit(gathered((448, 256), 0, functools.partial(joined_blocks, 128)))
    text = program.lower(jax.ShapeDtypeStruct((448, 256), jnp.float32)).as_text()
    sent = re.findall(r'"stablehlo.all_gather".*?-> tensor<([\dx]+)x(\w+)>', text, re.DOTALL)
    sizes = {
        kind: max(np.prod([int(n) for n in s.split("x")]) for s, k in sent if k == kind)
        for kind in {kind for _, kind in sent}
    }
    assert sizes == {"ui8": 448 * 256, "f32": 448 * 2}
