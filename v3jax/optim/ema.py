"""Moving average of the parameters, to foresee the loss after decay (report section 3.2.3).

It covers trained parameters only, never the router bias, and moves once per committed step.
"""

from typing import Any

import jax

from v3jax.ops.precision import widen


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """`decay * ema + (1 - decay) * params`, leaf by leaf in FP32; the types of `ema` stay.

    The average starts as a copy of the first parameters, so it needs no bias correction.
    """
    with jax.named_scope("ema"):
        return jax.tree.map(lambda e, p: _lerp(e, p, decay).astype(e.dtype), ema, params)


def _lerp(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    old32 = widen(old)
    return old32 + (1 - decay) * (widen(new) - old32)
