"""The auxiliary-loss-free balancing rule (report section 2.1.2) and the measure of imbalance.

A rule of your own is a function in a file that is given to `--exp`:

    from v3jax.optim.router_bias import bias_rule

    @bias_rule
    def halves(bias_LE, load_LE, speed):
        ...
        return new_bias_LE

and `balance.bias_rule="halves"` in an experiment of that file.
Dims: L MoE layers (MTP modules included), E experts.
"""

import difflib
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

BiasRule = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`(bias_LE, load_LE, speed) -> bias_LE`: FP32 biases, int32 loads of the step's whole batch, and
an FP32 scalar, `balance.bias_speed` at this step."""

_RULES: dict[str, BiasRule] = {}


def bias_rule(rule: BiasRule) -> BiasRule:
    """Registers a rule under its function's name."""
    _RULES[rule.__name__] = rule
    return rule


def find_rule(name: str) -> BiasRule:
    """The rule of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in _RULES:
        near = difflib.get_close_matches(name, _RULES, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(_RULES))}"
        raise ValueError(f"balance.bias_rule: no rule {name!r}; {hint}")
    return _RULES[name]


@bias_rule
def sign(bias_LE: jax.Array, load_LE: jax.Array, speed: jax.Array) -> jax.Array:
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


@bias_rule
def proportional(bias_LE: jax.Array, load_LE: jax.Array, speed: jax.Array) -> jax.Array:
    """`bias + speed * (mean(load) - load) / mean(load)`: far from balance it moves further.

    The loss-free balancing paper's variant with the violation itself (arXiv 2408.15664, section
    4.3); that the violation is relative to the mean load is ours, so that `speed` does not depend
    on the batch.
    """
    with jax.named_scope("router_bias"):
        load_LE = load_LE.astype(jnp.float32)
        mean_L1 = jnp.mean(load_LE, axis=-1, keepdims=True)
        return bias_LE + speed * (mean_L1 - load_LE) / jnp.where(mean_L1 > 0, mean_L1, 1.0)


def max_violation(load_LE: jax.Array) -> jax.Array:
    """`(max load - mean) / mean`, averaged over layers; an FP32 scalar, 0 when nothing was routed.

    Source: the loss-free balancing paper (arXiv 2408.15664), equation 4.
    """
    load_LE = load_LE.astype(jnp.float32)
    mean_L = jnp.mean(load_LE, axis=-1)
    violation_L = (jnp.max(load_LE, axis=-1) - mean_L) / jnp.where(mean_L > 0, mean_L, 1.0)
    return jnp.sum(violation_L) / max(1, load_LE.shape[0])
