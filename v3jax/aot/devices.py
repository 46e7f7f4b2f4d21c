"""Devices that are not here: what compilers know of them, and how fast they send to each other."""

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from v3jax.aot import targets
from v3jax.aot.targets import Chip, Target

_LINKS_PER_DIMENSION = 2

# What XLA asks of a GPU to compile for, as an H100 SXM answers.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 patch: 1 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices_of(target: Target) -> list[Any]:
    """Descriptions of the target's devices, hosts in order.

    Raises:
      RuntimeError: the target's compiler is not installed.
      ValueError: it knows no such topology.
    """
    chip = target.chip
    package = targets.PACKAGES[chip.kind]
    if importlib.util.find_spec(package) is None:
        extra = targets.EXTRAS[chip.kind]
        raise RuntimeError(f"{sys.executable} has no {package}: pip install 'v3jax[{extra}]'")
    try:
        if chip.kind == "gpu":
            _allow_cudnn_attention()
            hosts, gpus = target.topology
            described = topologies.get_topology_desc(
                platform="cuda",
                topology_name=chip.name,
                topology=f"{hosts}x1x{gpus}",
                target_config=_H100,
            )
        else:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{chip.name}:{target.shape}"
            )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"no such topology: {str(error).splitlines()[0]}") from error
    return sorted(described.devices, key=lambda d: (getattr(d, "slice_index", 0) or 0, d.id))


def _allow_cudnn_attention() -> None:
    """cuDNN's attention asks the GPU that is there for its generation; here is none, and the one
    compiled for has it."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    setattr(cudnn, "check_compute_capability", lambda capability: True)  # noqa: B010


def along(mesh: Mesh, axes: Sequence[str]) -> list[Any]:
    """The devices that one device meets along some axes."""
    at = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    return list(mesh.devices[at].flat)


def speed(chip: Chip, devices: Sequence[Any]) -> float:
    """Bytes/s that a device sends one way to a group.

    On a TPU, two links for each dimension of the torus that the group spreads over, one up and one
    down. On GPUs, the network between hosts as soon as the group leaves its host.
    """
    if chip.kind == "gpu":
        hosts = {d.process_index for d in devices}
        return chip.link_speed if len(hosts) == 1 else chip.outer_speed
    dims = sum(len(set(places)) > 1 for places in zip(*(d.coords for d in devices), strict=True))
    return chip.link_speed * _LINKS_PER_DIMENSION * max(dims, 1)
