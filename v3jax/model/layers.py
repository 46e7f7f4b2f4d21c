"""What every module shares: typed parameters with a sharding, linear maps, SwiGLU feed-forward.

Parameters carry the names of the public checkpoint; matrices are stored `[in, out]` in FP32 and
cast to the compute type at use. Dims: D features, F hidden width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from v3jax.config import ModelConfig, NumericsConfig
from v3jax.ops.norm import swiglu
from v3jax.sharding import ShardingRules


def compute_dtype(numerics: NumericsConfig) -> jnp.dtype:
    """The type of activations and of the operands of matrix products."""
    return jnp.dtype({"bf16": jnp.bfloat16, "fp32": jnp.float32}[numerics.compute])


class Module(nn.Module):
    """A linen module with the three fields every part of the model has."""

    cfg: ModelConfig
    numerics: NumericsConfig
    rules: ShardingRules

    def matrix(self, name: str, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
        """A weight drawn from a normal of `init_std` (report section 4.2), in the compute type."""
        init = nn.initializers.normal(self.cfg.init_std)
        weight = self.param(name, self.rules.init(init, *axes), shape, jnp.float32)
        return weight.astype(compute_dtype(self.numerics))

    def norm_weight(self, name: str, dim: int) -> jax.Array:
        """The weight of an RMSNorm, ones at the start, FP32."""
        return self.param(name, self.rules.init(nn.initializers.ones, None), (dim,), jnp.float32)


class FeedForward(Module):
    """SwiGLU: `down(silu(gate x) * up x)`, no biases. `width` is the hidden width."""

    width: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dim = self.cfg.dim
        gate_up = self.matrix("gate_up_proj", (dim, 2 * self.width), "embed", "ffn")
        down = self.matrix("down_proj", (self.width, dim), "ffn", "embed")
        return swiglu(checkpoint_name(x_BTD @ gate_up, "gate_up")) @ down
