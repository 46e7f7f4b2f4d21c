"""Logical axes -> mesh axes, in one table. All contact with Flax's partitioning boxes is here.

The mesh always has the axes `pipe, data, node, expert`, of size 1 when unused. The batch lives on
`(data, node, expert)`, experts on `(node, expert)` (report sections 2.1.2 and 3.2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v3jax.config import MeshConfig

MESH_AXES = ("pipe", "data", "node", "expert")
MeshAxis = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Which mesh axis each logical axis is split over; None keeps it whole."""

    batch: MeshAxis = ("data", "node", "expert")
    seq: MeshAxis = None
    embed: MeshAxis = None
    vocab: MeshAxis = None
    heads: MeshAxis = None
    latent: MeshAxis = None
    ffn: MeshAxis = None
    experts: MeshAxis = ("node", "expert")
    layers: MeshAxis = None

    def spec(self, *logical: str | None) -> P:
        """The PartitionSpec of an array whose dimensions carry these logical names.

        Raises:
          ValueError: an unknown name, or one mesh axis on two dimensions.
        """
        known = {f.name for f in fields(self)}
        for name in logical:
            if name is not None and name not in known:
                raise ValueError(
                    f"no logical axis {name!r}; the rules have {', '.join(sorted(known))}"
                )
        axes = tuple(None if name is None else getattr(self, name) for name in logical)
        flat = jax.tree.leaves(axes)
        if len(set(flat)) != len(flat):
            raise ValueError(f"{logical} puts one mesh axis on two dimensions: {axes}")
        return P(*axes)

    def init(self, initializer: Callable[..., Any], *logical: str | None) -> Callable[..., Any]:
        """Wraps a parameter's initializer so that `specs` can read where the parameter lives."""
        return nn.with_partitioning(initializer, tuple(self.spec(*logical)))


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of real devices with the axes of `MESH_AXES`.

    Raises:
      ValueError: the machine has fewer devices than the config asks for.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < cfg.n_devices:
        raise ValueError(
            f"mesh: needs {cfg.n_devices} devices, found {len(devices)}; set mesh.* to fit"
        )
    shape = tuple(getattr(cfg, axis) for axis in MESH_AXES)
    return jax.make_mesh(
        shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices[: cfg.n_devices]
    )


def abstract_mesh(cfg: MeshConfig) -> AbstractMesh:
    """The same mesh without devices, to lower a program for a machine that is not here."""
    shape = tuple(getattr(cfg, axis) for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def specs(boxed: Any) -> Any:
    """PartitionSpecs of a tree that `Module.init` made, with the tree's structure unboxed."""
    return nn.get_partition_spec(boxed)


def unbox(boxed: Any) -> Any:
    """The arrays of a tree that `Module.init` made."""
    return nn.unbox(boxed)


def shardings(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedShardings of a tree that `Module.init` made."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(boxed))


def constrain(x: jax.Array, rules: ShardingRules, *logical: str | None) -> jax.Array:
    """Pins `x` to where its logical axes live on the mesh of `jax.set_mesh`; no-op without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(*logical))
