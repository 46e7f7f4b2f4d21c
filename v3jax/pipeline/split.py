"""A layer's backward pass in two: gradients of its input now, of its weights later.

Report section 3.2.1, after zero-bubble pipelining (arXiv 2401.10241). The backward pass is traced
once and its operations are dealt out: those that the input's gradient rests on run in the first
half, what is left in the second, which reads what the forward pass saved and what the first half
found on its way. Only what depends on the weights alone, such as their reshaping, is done again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core

_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "vjp_node")
"""Primitives that only group operations."""

Shapes = list[jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Split:
    """The passes of a function `f(params, x, *others) -> (outputs, report)`.

    `outputs` are differentiated in `params` and `x`, the `report` is not. What lies between the
    passes are lists of arrays, whose shapes are `saved` and `found`.
    """

    forward: Callable[..., tuple[Any, Any, list[jax.Array]]]
    """`(params, x, *others) -> (outputs, report, saved)`; nothing that parameters alone give."""
    inputs: Callable[..., tuple[Any, list[jax.Array]]]
    """`(params, saved, gradients of outputs) -> (gradient of x, found)`."""
    weights: Callable[..., Any]
    """`(params, saved, found) -> gradients of params`."""
    saved: Shapes
    found: Shapes
    programs: tuple[Any, ...]
    """The forward and the whole backward pass as they were traced."""


def split(f: Callable[..., tuple[Any, Any]], params: Any, x: Any, *others: Any) -> Split:
    """`f`'s passes for arguments of these shapes, which may be arrays or `ShapeDtypeStruct`s.

    Loops and custom derivatives are operations like any other: what they compute for the input and
    for the weights at once is computed in the first half.
    """
    flat, x_leaves = jax.tree.leaves(params), jax.tree.leaves(x)
    tree: Any = None

    def run(params: Any, x: Any, *others: Any) -> tuple[Any, Any, list[Any]]:
        nonlocal tree
        outputs, pull, report = jax.vjp(lambda p, x: f(p, x, *others), params, x, has_aux=True)
        leaves, tree = jax.tree.flatten(pull)
        return outputs, report, leaves

    traced, (outputs, _, kept) = jax.make_jaxpr(run, return_shape=True)(params, x, *others)
    kept = traced.jaxpr.outvars[len(traced.jaxpr.outvars) - len(kept) :]
    varying = _touched(traced.jaxpr.eqns, traced.jaxpr.invars[len(flat) :])
    slots: dict[Any, int] = {}  # of what has to be saved
    for var in kept:
        if not isinstance(var, core.Literal) and var in varying:
            slots.setdefault(var, len(slots))
    first = [kept.index(var) for var in slots]
    constant = [
        i for i, var in enumerate(kept) if isinstance(var, core.Literal) or var not in slots
    ]
    from_params = _program(
        traced,
        traced.jaxpr.invars[: len(flat)],
        [kept[i] for i in constant],
        _needed(traced.jaxpr.eqns, [kept[i] for i in constant]),
    )

    def forward(params: Any, x: Any, *others: Any) -> tuple[Any, Any, list[jax.Array]]:
        outputs, report, arrays = run(params, x, *others)
        return outputs, report, [arrays[i] for i in first]

    def backward(flat: Sequence[Any], saved: Sequence[Any], gradients: Any) -> tuple[Any, Any]:
        arrays = dict(zip(constant, from_params(*flat), strict=True))
        arrays |= {i: saved[slots[var]] for i, var in enumerate(kept) if i not in arrays}
        pull = jax.tree.unflatten(tree, [arrays[i] for i in range(len(kept))])
        of_params, of_x = pull(gradients)
        return jax.tree.leaves(of_x), jax.tree.leaves(of_params)

    saved = _shapes(slots)
    program = _inlined(jax.make_jaxpr(backward)(flat, saved, outputs))
    jaxpr = program.jaxpr
    for_x, for_params = jaxpr.outvars[: len(x_leaves)], jaxpr.outvars[len(x_leaves) :]
    changing = _touched(jaxpr.eqns, jaxpr.invars[len(flat) :])
    early = _needed(jaxpr.eqns, for_x)
    done = {var: None for eqn in early for var in eqn.outvars if var in changing}
    # What depends on parameters alone is made again rather than kept.
    late = _needed([e for e in jaxpr.eqns if not any(v in done for v in e.outvars)], for_params)
    asked = _variables([*(v for eqn in late for v in eqn.invars), *for_params])
    given = jaxpr.invars[: len(flat) + len(saved)]
    between = [var for var in (*jaxpr.invars[len(given) :], *done) if var in asked]
    first_half = _program(program, jaxpr.invars, [*for_x, *between], early)
    second_half = _program(program, [*given, *between], for_params, late)
    x_tree, params_tree = jax.tree.structure(x), jax.tree.structure(params)

    def inputs(params: Any, saved: Sequence[Any], gradients: Any) -> tuple[Any, list[jax.Array]]:
        out = first_half(*jax.tree.leaves(params), *saved, *jax.tree.leaves(gradients))
        return jax.tree.unflatten(x_tree, out[: len(for_x)]), out[len(for_x) :]

    def weights(params: Any, saved: Sequence[Any], found: Sequence[Any]) -> Any:
        out = second_half(*jax.tree.leaves(params), *saved, *found)
        return jax.tree.unflatten(params_tree, out)

    return Split(forward, inputs, weights, saved, _shapes(between), (traced.jaxpr, jaxpr))


def _needed(eqns: Sequence[Any], outputs: Iterable[Any]) -> list[Any]:
    """The operations that outputs rest on, in order."""
    wanted = _variables(outputs)
    kept = []
    for eqn in reversed(eqns):
        if any(var in wanted for var in eqn.outvars):
            kept.append(eqn)
            wanted |= _variables(eqn.invars)
    return kept[::-1]


def _touched(eqns: Sequence[Any], inputs: Iterable[Any]) -> set[Any]:
    """Inputs and all that depends on them."""
    found = set(inputs)
    for eqn in eqns:
        if any(var in found for var in _variables(eqn.invars)):
            found |= set(eqn.outvars)
    return found


def _variables(atoms: Iterable[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}


def _shapes(variables: Iterable[Any]) -> Shapes:
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]


def _program(
    whole: Any, inputs: Sequence[Any], outputs: Sequence[Any], eqns: Sequence[Any]
) -> Callable[..., list[Any]]:
    """Some of a program's operations as a function."""
    jaxpr = whole.jaxpr.replace(
        invars=list(inputs),
        outvars=list(outputs),
        eqns=list(eqns),
        debug_info=whole.jaxpr.debug_info.with_unknown_names(),
    )
    return core.jaxpr_as_fun(whole.replace(jaxpr=jaxpr))


def _inlined(program: Any) -> Any:
    """The same program without calls that only group operations."""

    def run(*inputs: Any) -> list[Any]:
        return _run(program, program.jaxpr, program.consts, inputs)

    return jax.make_jaxpr(run)(*_shapes(program.jaxpr.invars))


def _run(whole: Any, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else values[var]

    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr") if eqn.primitive.name in _CALLS else None
        if inner is not None:  # of `remat2` it is open, without constants
            arrays = [read(v) for v in eqn.invars]
            out = _run(whole, getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), arrays)
        else:
            operands = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal)))
            alone = whole.replace(jaxpr=whole.jaxpr.replace(constvars=[]), consts=[])
            out = _program(alone, operands, eqn.outvars, [eqn])(*(read(v) for v in operands))
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]
