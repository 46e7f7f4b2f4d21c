"""What every module shares: typed parameters with a sharding, linear maps, SwiGLU feed-forward.

Parameters carry the names of the public checkpoint; matrices are stored `[in, out]` in FP32 and
cast to the compute type at use. Dims: D features, F hidden width.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from v3jax.config import Fp8Config, ModelConfig, NumericsConfig
from v3jax.ops.fp8 import linear
from v3jax.ops.fp8.weights import joined_blocks
from v3jax.ops.norm import swiglu
from v3jax.sharding import Join, ShardingRules, added, gather, manual_axes, stored


def compute_dtype(numerics: NumericsConfig) -> jnp.dtype:
    """The type of activations and of the operands of matrix products."""
    types = {"bf16": jnp.bfloat16, "fp32": jnp.float32, "fp64": jnp.float64, "fp8": jnp.bfloat16}
    return jnp.dtype(types[numerics.compute])


def master_dtype(numerics: NumericsConfig) -> jnp.dtype:
    """The type of parameters, gradients and sums."""
    return jnp.promote_types(compute_dtype(numerics), jnp.float32)


def fp8_of(numerics: NumericsConfig) -> Fp8Config | None:
    """How linear maps multiply in FP8; None: in the compute type."""
    return numerics.fp8 if numerics.compute == "fp8" else None


def weight_dtype(numerics: NumericsConfig) -> jnp.dtype:
    """The type in which linear maps take their weights: FP8 is made of the masters."""
    fp8 = fp8_of(numerics) is not None
    return master_dtype(numerics) if fp8 else compute_dtype(numerics)


_HIGH_PRECISION = ("embed_tokens", "lm_head", "eh_proj")
"""Matrices of the compute type also in FP8 runs (report section 3.3.1)."""


def type_of(name: str, numerics: NumericsConfig) -> jnp.dtype:
    """The type that a parameter of this path is computed with: of matrices the compute type, of
    norms' weights and the router's gate the master type."""
    if "norm" in name or "gate'" in name:
        return master_dtype(numerics)
    high = any(part in name for part in _HIGH_PRECISION)
    return compute_dtype(numerics) if high else weight_dtype(numerics)


def whole(
    value: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
    rules: ShardingRules,
    *axes: str | None,
    join: Join | None = None,
) -> jax.Array:
    """A parameter of this shape and logical axes in the type it is computed with, of which a device
    holds a part under `fsdp`."""
    if rules.storage != "fsdp" or not manual_axes():
        return value.astype(dtype)
    spec = rules.spec(*axes)
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return gather(value, spec, stored(spec, shape, sizes, rules), rules, dtype, join)


def columns_of(shape: tuple[int, ...], rules: ShardingRules, *axes: str | None) -> tuple[str, ...]:
    """The mesh axes over which `fsdp` splits the columns of a table that is looked up by row."""
    spec = rules.spec(*axes)
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    extra = added(spec, stored(spec, shape, sizes, rules, columns=True))
    return () if extra is None else extra[1]


class Module(nn.Module):
    """A linen module with the three fields every part of the model has."""

    cfg: ModelConfig
    numerics: NumericsConfig
    rules: ShardingRules

    def parameter(
        self,
        name: str,
        init: Any,
        shape: tuple[int, ...],
        *axes: str | None,
        dtype: Any = None,
        join: Join | None = None,
    ) -> jax.Array:
        """A parameter, stored in the master type, in `dtype` (the master type by default).

        Inside `jax.shard_map` its experts are the device's own, and what `fsdp` stores in parts is
        gathered here, as `join` has it.
        """
        master = master_dtype(self.numerics)
        dtype = dtype or master
        if self.is_initializing() or not manual_axes():
            return self.param(name, self.rules.init(init, *axes), shape, master).astype(dtype)
        value = cast(jax.Array, self.get_variable("params", name))  # flax would ask for the whole
        return whole(value, shape, dtype, self.rules, *axes, join=join)

    def matrix(self, name: str, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
        """A weight drawn from a normal of `init_std` (report section 4.2), in the compute type."""
        init = nn.initializers.normal(self.cfg.init_std)
        return self.parameter(name, init, shape, *axes, dtype=compute_dtype(self.numerics))

    def weight(self, name: str, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
        """The same for `product` and its like: in FP8 runs the master, or what its codes say."""
        init, fp8 = nn.initializers.normal(self.cfg.init_std), fp8_of(self.numerics)
        join = None if fp8 is None else functools.partial(joined_blocks, fp8.block)
        dtype = weight_dtype(self.numerics)
        return self.parameter(name, init, shape, *axes, dtype=dtype, join=join)

    def product(self, x: jax.Array, w_IO: jax.Array) -> jax.Array:
        """`x w` of a linear map, `[..., I] x [I, O]`."""
        fp8 = fp8_of(self.numerics)
        return x @ w_IO if fp8 is None else linear.linear(x, w_IO, linear.recipe(fp8))

    def norm_weight(self, name: str, dim: int) -> jax.Array:
        """The weight of an RMSNorm, ones at the start, FP32."""
        return self.parameter(name, nn.initializers.ones, (dim,), None)


class FeedForward(Module):
    """SwiGLU: `down(silu(gate x) * up x)`, no biases. `width` is the hidden width."""

    width: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dim, fp8 = self.cfg.dim, fp8_of(self.numerics)
        gate_up = self.weight("gate_up_proj", (dim, 2 * self.width), "embed", "ffn")
        down = self.weight("down_proj", (self.width, dim), "ffn", "embed")
        hidden = self.product(x_BTD, gate_up)
        if fp8 is not None:
            return linear.swiglu_linear(hidden, down, linear.recipe(fp8))
        return swiglu(checkpoint_name(hidden, "gate_up")) @ down
