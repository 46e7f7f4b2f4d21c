"""Gradients added up over micro-batches where they arise, without a second copy of them.

A micro-batch's gradient that leaves the backward pass as a whole is as large as the sum it is added
to. A `Sink` holds the sum in mutable arrays instead: parameters that `tapped` hands out add their
gradient to it, layer by layer inside the backward pass of a scan, and report none.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Sink:
    """Where the gradients of a tree of parameters add up."""

    refs: Any
    """A tree of `jax.Ref`, like the parameters."""
    probe: jax.Array
    """A scalar: differentiating by it runs the backward pass, though its gradient is 0."""

    def __getitem__(self, name: str) -> "Sink":
        """The sink of a subtree."""
        return Sink(self.refs[name], self.probe)


def new_sink(params: Any) -> Sink:
    """Zeros for each parameter."""
    refs = jax.tree.map(lambda p: jax.new_ref(jnp.zeros(p.shape, p.dtype)), params)
    return Sink(refs, jnp.zeros(()))


def added_up(sink: Sink) -> Any:
    """What the sink holds; it cannot be used afterwards."""
    return jax.tree.map(jax.freeze, sink.refs)


def tapped(params: Any, sink: Sink | None, layer: jax.Array | None = None) -> Any:
    """The same values, whose gradient goes into the sink if there is one.

    With `layer` they are that layer's part of the stacked parameters that the sink has.
    """
    if sink is None:
        return params
    return jax.tree.map(lambda p, ref: _tap(p, ref, layer, sink.probe), params, sink.refs)


@jax.custom_vjp
def _tap(p: jax.Array, ref: Any, layer: jax.Array | None, probe: jax.Array) -> jax.Array:
    return p


def _tap_fwd(
    p: jax.Array, ref: Any, layer: jax.Array | None, probe: jax.Array
) -> tuple[jax.Array, tuple[Any, jax.Array | None]]:
    return p, (ref, layer)


def _tap_bwd(
    residuals: tuple[Any, jax.Array | None], gradient: jax.Array
) -> tuple[None, None, None, jax.Array]:
    ref, layer = residuals
    at = ... if layer is None else layer
    ref[at] = ref[at] + gradient
    return None, None, None, jnp.zeros(())


_tap.defvjp(_tap_fwd, _tap_bwd)
