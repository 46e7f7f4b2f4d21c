"""The auxiliary-loss-free balancing rule (report section 2.1.2) and the measure of imbalance.

Dims: L MoE layers (MTP modules included), E experts.
"""

import chex
import jax
import jax.numpy as jnp


def update_bias(bias_LE: jax.Array, load_LE: jax.Array, speed: jax.Array) -> jax.Array:
    """`bias + speed * sign(mean(load) - load)`, once per committed step.

    `load` is the int32 count of tokens each expert received over the whole global batch, `speed`
    an FP32 scalar. The sign is taken in integers, so it is exact for any load, and it is 0 for an
    exactly balanced expert. A layer's loads must sum to less than 2**31 (the full run: 5.0e8).
    As in the report, the mean of the bias is left to drift: only differences choose experts.
    """
    chex.assert_equal_shape([bias_LE, load_LE])
    chex.assert_type(load_LE, jnp.int32)
    with jax.named_scope("router_bias"):
        n_experts = load_LE.shape[-1]
        floor_L1, rest_L1 = jnp.divmod(jnp.sum(load_LE, axis=-1, keepdims=True), n_experts)
        # mean = floor + rest / n_experts: an expert at the floor is below the mean if rest > 0.
        at_floor_LE = load_LE == floor_L1
        sign_LE = jnp.where(at_floor_LE, jnp.sign(rest_L1), jnp.sign(floor_L1 - load_LE))
        return bias_LE + speed * sign_LE.astype(jnp.float32)


def max_violation(load_LE: jax.Array) -> jax.Array:
    """`(max load - mean) / mean`, averaged over layers; an FP32 scalar, 0 when nothing was routed.

    Source: the loss-free balancing paper (arXiv 2408.15664), equation 4.
    """
    load_LE = load_LE.astype(jnp.float32)
    mean_L = jnp.mean(load_LE, axis=-1)
    violation_L = (jnp.max(load_LE, axis=-1) - mean_L) / jnp.where(mean_L > 0, mean_L, 1.0)
    return jnp.sum(violation_L) / max(1, load_LE.shape[0])
