"""Tokens on their way to experts in FP8, and back in BF16 (report section 3.3.3).

Out they travel as codes and scales, and so do, in the backward pass, the gradients of what comes
back. Sums over a token's experts, both ways, are of BF16. Scales are powers of two, so that what
arrives is quantised again, for another hop or a product, without loss.
Dims: T tokens, N rows, D features.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from v3jax.ops.dispatch import Layout, combine, dispatch
from v3jax.ops.exchange import Route, exchange, exchange_back
from v3jax.ops.fp8.linear import Recipe, named
from v3jax.ops.fp8.quantize import GRADIENT_FLOOR, Quantized, quantize


def send(
    x_TD: jax.Array,
    layout: Layout,
    route: Route | None,
    how: Recipe,
    given: Quantized | None = None,
    *,
    last: bool,
) -> tuple[jax.Array, Quantized]:
    """Tokens as rows of their experts, `[N, D]`, on this device or where `route` leads.

    Args:
      given: `x_TD` quantised, which then is all that is used of it.
      last: whether the rows have arrived, and are kept under the name `dispatched`.

    Returns:
      The rows, and the same as they travelled.
    """
    return _send(how, last, x_TD, layout, route, given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send(
    how: Recipe,
    last: bool,
    x_TD: jax.Array,
    layout: Layout,
    route: Route | None,
    given: Quantized | None,
) -> tuple[jax.Array, Quantized]:
    q = how.of(x_TD) if given is None else given
    rows = jax.tree.map(lambda x: _out(x, layout, route), q)
    if last:
        rows = named(rows, "dispatched")
    return how.restored(rows, x_TD.dtype), rows


def _send_fwd(
    how: Recipe,
    last: bool,
    x_TD: jax.Array,
    layout: Layout,
    route: Route | None,
    given: Quantized | None,
) -> tuple[tuple[jax.Array, Quantized], Any]:
    return _send(how, last, x_TD, layout, route, given), (layout, route)


def _send_bwd(how: Recipe, last: bool, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    return _back(cotangents[0], *residuals), None, None, None


_send.defvjp(_send_fwd, _send_bwd)


def send_back(rows_ND: jax.Array, layout: Layout, route: Route | None, how: Recipe) -> jax.Array:
    """The sum of each token's rows, `[T, D]`, where `send` took them from."""
    return _send_back(how, rows_ND, layout, route)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send_back(how: Recipe, rows_ND: jax.Array, layout: Layout, route: Route | None) -> jax.Array:
    return _back(rows_ND, layout, route)


def _send_back_fwd(
    how: Recipe, rows_ND: jax.Array, layout: Layout, route: Route | None
) -> tuple[jax.Array, Any]:
    return _back(rows_ND, layout, route), (layout, route)


def _send_back_bwd(how: Recipe, residuals: Any, dout_TD: jax.Array) -> tuple[Any, ...]:
    layout, route = residuals
    q = quantize(
        dout_TD,
        (how.cfg.tile,),
        power_of_two=how.power_of_two_gradient,
        floor=GRADIENT_FLOOR,
    )
    rows = jax.tree.map(lambda x: _out(x, layout, route), q)
    return how.restored(rows, dout_TD.dtype), None, None


_send_back.defvjp(_send_back_fwd, _send_back_bwd)


def _out(x: jax.Array, layout: Layout, route: Route | None) -> jax.Array:
    # As bytes: XLA has few operations on FP8 that only move it.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype.itemsize == 1 else x
    rows = dispatch(bits, layout)
    if route is not None:
        rows = exchange(rows, route, False)
    return jax.lax.bitcast_convert_type(rows, x.dtype) if x.dtype.itemsize == 1 else rows


def _back(rows_ND: jax.Array, layout: Layout, route: Route | None) -> jax.Array:
    if route is not None:
        rows_ND = exchange_back(rows_ND, route, False)
    return combine(rows_ND, layout)
