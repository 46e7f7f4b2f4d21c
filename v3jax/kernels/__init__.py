"""Pallas and library kernels for accelerators, the twins of functions of arrays in `ops`.

`ops` picks one by `platform()`; every kernel has a plain form there that defines what it computes.
"""

import jax
from jax.sharding import AbstractMesh, Mesh


def platform(mesh: Mesh | AbstractMesh | None = None) -> str:
    """What the program being traced will run on: `cpu`, `tpu` or `gpu`.

    The mesh, by default that of `jax.set_mesh`, knows, also when its devices are only compiled for.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    device = (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh).abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def device_kind() -> str:
    """The kind of device that the program being traced will run on, as its maker names it."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind
