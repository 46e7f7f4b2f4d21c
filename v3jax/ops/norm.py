"""RMSNorm and SwiGLU. Dims: D features, F hidden width."""

import jax
import jax.numpy as jnp

from v3jax.ops.precision import widen


def rms_norm(x_D: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * weight` over the last axis, statistics in FP32, result in the type of `x`.

    Report section 2.1 (norms of the block and of the two latents).
    """
    with jax.named_scope("rms_norm"):
        x32_D = widen(x_D)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32_D), axis=-1, keepdims=True) + eps)
        return (x32_D * inverse * weight_D).astype(x_D.dtype)


@jax.custom_vjp
def swiglu(gate_up_2F: jax.Array) -> jax.Array:
    """`silu(gate) * up`, the gate being the first half of the input: `[..., 2F] -> [..., F]`.

    Only the input is kept for the gradient (report section 3.3.3).
    """
    gate_F, up_F = _halves(gate_up_2F)
    return (gate_F * jax.nn.sigmoid(gate_F) * up_F).astype(gate_up_2F.dtype)


def _swiglu_fwd(gate_up_2F: jax.Array) -> tuple[jax.Array, jax.Array]:
    return swiglu(gate_up_2F), gate_up_2F


def _swiglu_bwd(gate_up_2F: jax.Array, dout_F: jax.Array) -> tuple[jax.Array]:
    return (swiglu_gradient(gate_up_2F, dout_F),)


def swiglu_gradient(gate_up_2F: jax.Array, dout_F: jax.Array) -> jax.Array:
    """The gradient of `swiglu`'s input, in its type, from that of its output."""
    gate_F, up_F = _halves(gate_up_2F)
    sigmoid_F = jax.nn.sigmoid(gate_F)
    dout_F = widen(dout_F)
    dgate_F = dout_F * up_F * sigmoid_F * (1 + gate_F * (1 - sigmoid_F))
    dup_F = dout_F * gate_F * sigmoid_F
    dtype = gate_up_2F.dtype
    return jnp.concatenate([dgate_F.astype(dtype), dup_F.astype(dtype)], axis=-1)


def _halves(gate_up_2F: jax.Array) -> tuple[jax.Array, ...]:
    """Gate and up in FP32, widened one by one: XLA would hold the whole input in FP32."""
    return tuple(widen(x_F) for x_F in jnp.split(gate_up_2F, 2, axis=-1))


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)
