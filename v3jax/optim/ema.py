"""Moving average of the parameters, to foresee the loss after decay (report section 3.2.3).

It covers trained parameters only, never the router bias, and moves once per committed step. As in
the report it lies in the host's memory and is updated beside the training, not after it: a step
begins with the average still one update behind, and takes in the parameters that it starts from
while its forward and backward passes run. On TPU and GPU the arrays are in pinned host memory and
cross to the device and back in copies that the compiler lays beside the products; on CPU, whose
memory is the host's, the threads of XLA do it with the rest. `catch_up` makes up the one update.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from v3jax import kernels
from v3jax.ops.precision import widen


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """`decay * ema + (1 - decay) * params`, leaf by leaf in FP32; the types of `ema` stay.

    The average starts as a copy of the first parameters, so it needs no bias correction.
    """
    with jax.named_scope("ema"):
        return jax.tree.map(lambda e, p: _lerp(e, p, decay).astype(e.dtype), ema, params)


def absorb(ema: Any, params: Any, due: jax.Array, decay: float) -> Any:
    """`update_ema` if `due`, else `ema`; read from and written to the memory it lies in."""
    in_host = memory(jax.sharding.get_abstract_mesh()) is not None

    def one(e: jax.Array, p: jax.Array) -> jax.Array:
        if in_host:
            e = jax.device_put(e, jax.memory.Space.Device)
        new = jnp.where(due, _lerp(e, p, decay).astype(e.dtype), e)
        return jax.device_put(new, jax.memory.Space.Host) if in_host else new

    with jax.named_scope("ema"):
        return jax.tree.map(one, ema, params)


def memory(mesh: Mesh | AbstractMesh) -> str | None:
    """The kind of memory that the average lies in on a mesh's devices; None: their own, as it is
    without a mesh."""
    return "pinned_host" if not mesh.empty and kernels.platform(mesh) in ("tpu", "gpu") else None


def _lerp(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    old32 = widen(old)
    return old32 + (1 - decay) * (widen(new) - old32)
