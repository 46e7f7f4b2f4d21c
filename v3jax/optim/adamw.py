"""AdamW with low-precision moments (report sections 3.3.3 and 4.2).

The moments are stored in BF16 and the arithmetic is FP32: each is widened, updated, used for the
direction at full FP32 width, and only then rounded to nearest even for storage. Master weights
and gradients stay FP32.

Left open by the report and therefore ours: the clip norm is taken over all parameters, decay
leaves out norm weights, epsilon is added outside the root, and the direction is computed before
rounding, so that a step's own gradient never loses bits.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from v3jax.config import OptimConfig
from v3jax.ops.precision import widen


def adamw(
    cfg: OptimConfig, moments: Literal["bf16", "fp32"]
) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, Adam, decoupled weight decay; without the learning rate.

    `update(gradients, state, params, grad_norm=norm)` returns the *unscaled* direction
    `m_hat / (sqrt(v_hat) + eps) + weight_decay * param` in FP32; the caller applies
    `param - lr * direction`. `grad_norm` is that of the whole gradients, of which a device may
    hold a part; without it, it is the norm of `gradients`.
    """
    chained = optax.chain(
        clip_by_global_norm(cfg.clip_norm),
        scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps, moments),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
    )
    return optax.with_extra_args_support(chained)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Scales gradients down to `max_norm`; optax's own, but for a norm that may be given."""

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        grad_norm: jax.Array | None = None,
        **_: Any,
    ) -> tuple[Any, Any]:
        del params
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        clipped = jax.tree.map(
            lambda g: jnp.where(norm < max_norm, g, (g / norm.astype(g.dtype)) * max_norm), updates
        )
        return clipped, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def decayed(params: Any) -> Any:
    """True where weight decay applies: every parameter with no "norm" on its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path).lower(), params
    )


def scale_by_adam(
    beta1: float, beta2: float, eps: float, moments: Literal["bf16", "fp32"]
) -> optax.GradientTransformation:
    """Adam's direction in FP32 with both moments stored in the type `moments`.

    optax's own takes a type for the first moment only; the state is of optax's class: `count` of
    committed updates (int32), `mu` and `nu` like the parameters.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (
            jax.tree.map(lambda p: _rounded(jnp.zeros_like(p), moments), params) for _ in range(2)
        )
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        with jax.named_scope("adam"):
            count = optax.safe_increment(state.count)
            correction1 = 1 / (1 - jnp.float32(beta1) ** count)
            correction2 = 1 / (1 - jnp.float32(beta2) ** count)
            mu32 = jax.tree.map(lambda g, m: _average(g, m, beta1), updates, state.mu)
            nu32 = jax.tree.map(lambda g, v: _average(jnp.square(g), v, beta2), updates, state.nu)
            direction = jax.tree.map(
                lambda m, v: m * correction1 / (jnp.sqrt(v * correction2) + eps), mu32, nu32
            )
            stored = optax.ScaleByAdamState(
                jnp.asarray(count),
                jax.tree.map(lambda m: _rounded(m, moments), mu32),
                jax.tree.map(lambda v: _rounded(v, moments), nu32),
            )
        return direction, stored

    return optax.GradientTransformation(init, update)


def _average(new: jax.Array, old: jax.Array, beta: float) -> jax.Array:
    return beta * widen(old) + (1 - beta) * widen(new)


def _rounded(x: jax.Array, moments: str) -> jax.Array:
    """To nearest even, which is what a conversion to BF16 does; FP32 stays what it is."""
    return x.astype(jnp.bfloat16) if moments == "bf16" else widen(x)
