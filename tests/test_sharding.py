"""The one table from logical axes to mesh axes: it raises where Flax would replicate in silence."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v3jax import registry
from v3jax.config import MeshConfig
from v3jax.sharding import (
    MESH_AXES,
    ShardingRules,
    abstract_mesh,
    constrain,
    make_mesh,
    shardings,
    specs,
    unbox,
)

RULES = ShardingRules(embed="data", heads="pipe")


def test_logical_axes_become_mesh_axes() -> None:
    assert RULES.spec("batch", None, "heads") == P(("data", "node", "expert"), None, "pipe")
    experts = ("node", "context", "expert")
    assert RULES.spec("experts", "embed", "ffn") == P(experts, "data", None)


def test_unknown_axis_raises() -> None:
    with pytest.raises(ValueError, match=r"no logical axis 'hedas'; the rules have .*heads"):
        RULES.spec("hedas")


def test_one_mesh_axis_on_two_dimensions_raises() -> None:
    with pytest.raises(ValueError, match="puts one mesh axis on two dimensions"):
        RULES.spec("batch", "embed")
    with pytest.raises(ValueError, match="puts one mesh axis on two dimensions"):
        RULES.spec("experts", "experts")


def test_parameters_raise_where_they_are_declared() -> None:
    with pytest.raises(ValueError, match="no logical axis"):
        RULES.init(nn.initializers.zeros, "embed", "widht")


class Projection(nn.Module):
    """One parameter, split over the experts' axes."""

    @nn.compact
    def __call__(self, x_D: jax.Array) -> jax.Array:
        init = RULES.init(nn.initializers.ones, "experts", "embed")
        return x_D @ self.param("kernel", init, (8, 4))


def test_parameters_land_where_their_axes_say() -> None:
    mesh = make_mesh(MeshConfig(data=2, node=2, expert=2))
    boxed = jax.eval_shape(Projection().init, jax.random.key(0), jnp.zeros(8))
    assert specs(boxed) == {"params": {"kernel": P(("node", "context", "expert"), "data")}}
    placed = jax.jit(
        lambda: unbox(Projection().init(jax.random.key(0), jnp.zeros(8))),
        out_shardings=shardings(boxed, mesh),
    )()
    kernel = placed["params"]["kernel"]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, P(("node", "expert"), "data")), 2)
    assert kernel.addressable_shards[0].data.shape == (2, 2)


def test_mesh_has_every_axis_even_of_size_one() -> None:
    mesh = make_mesh(MeshConfig(expert=4))
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.shape == (1, 1, 1, 1, 4)


def test_mesh_asks_for_the_devices_it_lacks() -> None:
    with pytest.raises(ValueError, match="needs 16 devices, found 8; set mesh"):
        make_mesh(MeshConfig(data=16))


def test_abstract_mesh_has_the_full_runs_size_without_devices() -> None:
    mesh = abstract_mesh(registry.get("v3_full").mesh)
    assert mesh.size == 2048
    assert dict(mesh.shape) == {
        "pipe": 16,
        "data": 2,
        "node": 8,
        "context": 1,
        "expert": 8,
    }


def test_constrain_is_the_identity_without_a_mesh() -> None:
    x = jnp.arange(8.0)
    assert constrain(x, RULES, "batch") is x


def test_constrain_splits_on_the_mesh_that_is_set() -> None:
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, RULES, "batch", None))(jnp.zeros((8, 3)))
    assert y.addressable_shards[0].data.shape == (1, 3)
