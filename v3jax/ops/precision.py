"""The type of statistics and sums: FP32, or FP64 where the data is (report section 3.3.1)."""

import jax
import jax.numpy as jnp


def wide(x: jax.Array) -> jnp.dtype:
    """FP32 for BF16 and FP32 arrays, FP64 for FP64 ones (`numerics.compute=fp64`)."""
    return jnp.promote_types(x.dtype, jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """`x` in the type of `wide`."""
    return x.astype(wide(x))
