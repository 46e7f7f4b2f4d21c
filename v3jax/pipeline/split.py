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
import numpy as np
from jax.extend import core
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

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
    given = jaxpr.invars[: len(flat) + len(saved)]
    early = _needed(jaxpr.eqns, for_x)
    changing = _touched(jaxpr.eqns, jaxpr.invars[len(flat) :])
    between, early, late = _cheapest(jaxpr, early, given, for_params, changing)
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


def _cheapest(
    jaxpr: Any,
    early: Sequence[Any],
    given: Sequence[Any],
    for_params: Sequence[Any],
    changing: set[Any],
) -> tuple[list[Any], list[Any], list[Any]]:
    """What to keep for the second half, in fewest bytes, and the operations of both halves.

    `early` operations have to run in the first half. Cheap ones, elementwise or of shape alone, may
    run in either or both: what is kept is the smallest set of variables that cuts what only the
    first half can compute from what the second half needs (Ford and Fulkerson). What is not
    `changing` depends on parameters alone and is made again too.
    """
    in_first = {id(eqn) for eqn in early}
    made_by = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    numbers: dict[Any, int] = {}  # of a variable's node; the next is where it leaves from
    edges: dict[tuple[int, int], int] = {}
    source, sink, endless = 0, 1, 2**30

    def node(var: Any) -> int:
        if var not in numbers:
            numbers[var] = at = 2 + 2 * len(numbers)
            edges[at, at + 1] = max(-(-var.aval.size * var.aval.dtype.itemsize // 1024), 1)
        return numbers[var]

    seen = set(given)
    todo = list(_variables(for_params))
    edges |= {(node(var) + 1, sink): endless for var in todo}
    while todo:
        var = todo.pop()
        if var in seen:
            continue
        seen.add(var)
        eqn = made_by.get(var)
        again = eqn is not None and (eqn.primitive.name in _CHEAP or var not in changing)
        if eqn is None or (id(eqn) in in_first and not again):
            edges[source, node(var)] = endless  # only the first half has it
            continue
        for operand in _variables(eqn.invars):
            # Another operation runs in the second half, where all of its operands have to be.
            edges[node(operand) + 1, node(var) if again else sink] = endless
            todo.append(operand)
    ends, n = np.array(list(edges), np.int32).T, 2 + 2 * len(numbers)
    sizes = np.array(list(edges.values()), np.int32)
    graph = csr_array((sizes, (ends[0], ends[1])), shape=(n, n))
    left = csr_array(graph - maximum_flow(graph, source, sink).flow)
    left.data[left.data < 0] = 0
    left.eliminate_zeros()
    reached = set(breadth_first_order(left, source, return_predecessors=False).tolist())
    cut = {v for v, at in numbers.items() if at in reached and at + 1 not in reached}
    between = [v for v in (*jaxpr.invars, *made_by) if v in cut]  # in the program's order
    late = _needed([e for e in jaxpr.eqns if not cut.intersection(e.outvars)], for_params)
    done = {id(eqn) for eqn in early}
    first = [e for e in _needed(jaxpr.eqns, between) if id(e) not in done]
    position = {id(eqn): i for i, eqn in enumerate(jaxpr.eqns)}
    return between, sorted([*early, *first], key=lambda eqn: position[id(eqn)]), late


_CHEAP = frozenset(
    [
        "add",
        "add_any",
        "and",
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "div",
        "eq",
        "exp",
        "expand_dims",
        "ge",
        "gt",
        "integer_pow",
        "iota",
        "le",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "pad",
        "reshape",
        "rsqrt",
        "select_n",
        "sign",
        "slice",
        "split",
        "sqrt",
        "square",
        "squeeze",
        "stop_gradient",
        "sub",
        "transpose",
    ]
)
"""Operations that are run again rather than their results kept."""


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
