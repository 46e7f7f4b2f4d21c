"""Options of XLA that a program for a pod is compiled with, by platform.

They travel with the jitted function, so a launch script needs no XLA_FLAGS.
"""

from jax.sharding import AbstractMesh, Mesh

from v3jax import kernels

_OPTIONS: dict[str, dict[str, bool | int]] = {
    "tpu": {
        # A gather over a torus stays one, where XLA would make a sum of zeros and parts of it.
        "xla_tpu_prefer_async_allgather_to_allreduce": True,
        # Gathers of weights and scatters of gradients run on the SparseCores beside the products;
        # without these flags all of them are synchronous.
        "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    },
    "gpu": {
        # XLA would turn a ragged exchange between hosts into an all-gather of its whole operand.
        "xla_gpu_unsupported_enable_ragged_all_to_all_multi_host_decomposer": False,
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # With one exchange under way at a time, most of a pipeline's pair wait for each other.
        "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
    },
}


def compiler_options(mesh: Mesh | AbstractMesh | None) -> dict[str, bool | int] | None:
    """Options for `jax.jit` of a program on this mesh."""
    return None if mesh is None else _OPTIONS.get(kernels.platform(mesh))
