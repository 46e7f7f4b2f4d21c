"""What a compiled program computes and moves, its loops multiplied.

FLOPs are counted as XLA's own analysis does: two for each multiply-add of a matrix product, one
for each element of other arithmetic, transcendental functions left out. Bytes of main memory are
operands and results of the instructions that run one after the other, each fusion as a whole,
without what lies in faster memory; slices, gathers and updates in place count what they touch.
Nothing is said of caches, and a fusion that reads an operand twice counts it once.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from v3jax.aot.collectives import KINDS
from v3jax.aot.hlo import Array, Computation, Instruction, Module, Times, arrays, called, calls_of
from v3jax.aot.kernels import Kernel, operand_arrays, read_kernel, target_of
from v3jax.aot.targets import Chip

_ARITHMETIC = re.compile(
    "abs|add|and|ceil|clamp|clz|compare|convert|divide|floor|is-finite|maximum|minimum|multiply|"
    "negate|not|or|popcnt|remainder|round-nearest-afz|round-nearest-even|select|shift-left|"
    "shift-right-arithmetic|shift-right-logical|sign|subtract|xor"
)
_NOTHING_MOVES = re.compile(
    "after-all|bitcast|call|call-start|conditional|constant|domain|get-tuple-element|opt-barrier|"
    "parameter|partition-id|replica-id|tuple|while|.*-done|.*-update"
)
_FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding")
_FUSIONS = ("fusion", "fusion-start")
_WINDOWS = ("slice", "dynamic-slice", "gather")
"""Read a part of their first operand, as large as their result."""


@dataclass
class Work:
    """FLOPs of all arithmetic, of it matrix products and kernels; bytes of main memory."""

    flops: float = 0.0
    matrix_flops: float = 0.0
    memory_bytes: float = 0.0

    def add(self, other: "Work", times: int = 1) -> None:
        self.flops += times * other.flops
        self.matrix_flops += times * other.matrix_flops
        self.memory_bytes += times * other.memory_bytes


@dataclass
class KernelCosts:
    """All calls of the kernels of one name."""

    declared: bool
    count: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass
class Costs(Work):
    """Work of one call of a program on one device."""

    kernels: dict[str, KernelCosts] = field(default_factory=dict)
    parts: list[tuple[int, Work]] = field(default_factory=list)
    """Computations that run as they are written, how often each does and its own work once."""

    def beyond_xla(self, chip: Chip) -> float:
        """Seconds that XLA's estimate for the program lacks, at the chip's best.

        XLA counts the body of every loop once, and nothing for a kernel that does not tell its
        cost, whose time here is its FLOPs'.
        """
        unknown = sum(k.flops for k in self.kernels.values() if not k.declared)
        loops = sum(
            (count - 1)
            * max(work.matrix_flops / chip.peak_flops, work.memory_bytes / chip.memory_speed)
            for count, work in self.parts
        )
        return unknown / chip.peak_flops + loops


def read_costs(module: Module) -> Costs:
    """Adds up a program from its entry."""
    costs = Costs()

    def visit(name: str, times: Times, part: Work | None) -> None:
        """Adds a computation's work to `part`, or to one of its own if it is not fused."""
        computation = module.computations[name]
        fused, work = part is not None, Work() if part is None else part
        if not fused:
            costs.parts.append((times.count, work))
        for instruction in computation.instructions:
            opcode = instruction.opcode
            kernel = read_kernel(computation, instruction) if opcode == "custom-call" else None
            if kernel is not None:
                once = _add_kernel(costs, kernel, times.count)
                if kernel.declared:
                    work.add(once)
                else:
                    costs.add(once, times.count)
                continue
            flops = _flops(module, computation, instruction)
            moved = 0 if fused else _moved(module, computation, instruction)
            work.add(Work(flops, flops if opcode in ("dot", "convolution") else 0.0, moved))
            for other, inner in calls_of(module, computation, instruction, times):
                if other in module.computations:
                    visit(other, inner, work if fused or opcode in _FUSIONS else None)

    visit(module.entry, Times(), None)
    for count, work in costs.parts:
        costs.add(work, count)
    return costs


def _add_kernel(costs: Costs, kernel: Kernel, count: int) -> Work:
    """Counts a kernel's calls; its work once."""
    if count:
        total = costs.kernels.setdefault(kernel.name, KernelCosts(kernel.declared))
        total.count += count
        total.flops += count * kernel.flops
        total.bytes += count * kernel.bytes
    return Work(kernel.flops, kernel.flops, kernel.bytes)


# ---- FLOPs


def _flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """FLOPs of one instruction, without what it calls but an operator that it applies."""
    opcode = instruction.opcode
    if _ARITHMETIC.fullmatch(opcode):
        return arrays(instruction.shape)[0].size
    match opcode:
        case "dot":
            return _dot(computation, instruction)
        case "convolution":
            return _convolution(computation, instruction)
        case "reduce":
            source, result = operand_arrays(computation, instruction)[0], arrays(instruction.shape)
            return (source.size - result[0].size) * _operator(module, instruction)
        case "reduce-window":
            window = math.prod(_numbers(instruction.attributes, "size"))
            result = arrays(instruction.shape)[0].size
            return max(window - 1, 0) * result * _operator(module, instruction)
        case "scatter":
            updates = operand_arrays(computation, instruction)[-1]
            return updates.size * _operator(module, instruction)
        case "sort":
            size = arrays(instruction.shape)[0].size
            return size * math.ceil(math.log2(max(size, 1)))
        case "all-reduce" | "all-reduce-start" | "reduce-scatter":
            return sum(a.size for a in arrays(instruction.shape))
    return 0.0


def _operator(module: Module, instruction: Instruction) -> float:
    """FLOPs of the operator that a reduction or scatter applies to two elements."""
    name = re.search(r"to_apply=%?([\w.\-]+)", instruction.attributes)
    operator = module.computations.get(name[1]) if name else None
    if operator is None:
        return 1.0
    return sum(_flops(module, operator, i) for i in operator.instructions)


def _dot(computation: Computation, instruction: Instruction) -> float:
    lhs = operand_arrays(computation, instruction)[0]
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = math.prod(lhs.dims[int(d)] for d in dims[1].split(",") if d) if dims else 1
    return 2.0 * arrays(instruction.shape)[0].size * contracted


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """Only positions where the window meets the input: a TPU writes batched products so."""
    attributes = instruction.attributes
    lhs, rhs = operand_arrays(computation, instruction)[:2]
    result = arrays(instruction.shape)[0]
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", attributes)
    if labels is None:
        raise ValueError(f"convolution {instruction.name} without dim_labels")
    of_lhs, of_rhs, of_result = (
        _labelled(labels[i], a) for i, a in enumerate((lhs, rhs, result), 1)
    )
    spatial = sorted(label for label in of_lhs if label.isdigit())
    ones = [1] * len(spatial)
    stride = _numbers(attributes, "stride") or ones
    lhs_dilate = _numbers(attributes, "lhs_dilate") or ones
    rhs_dilate = _numbers(attributes, "rhs_dilate") or ones
    found = re.search(r"[{ ]pad=([-\dx_]+)", attributes)
    pads = [int(p.split("_")[0]) for p in found[1].split("x")] if found else [0] * len(spatial)
    positions = 1
    for i, label in enumerate(spatial):
        at = (
            np.arange(of_result[label])[:, None] * stride[i]
            - pads[i]
            + np.arange(of_rhs[label])[None] * rhs_dilate[i]
        )
        meets = (at % lhs_dilate[i] == 0) & (at >= 0) & (at // lhs_dilate[i] < of_lhs[label])
        positions *= int(meets.sum())
    groups = re.search(r"feature_group_count=(\d+)", attributes)
    batches = re.search(r"batch_group_count=(\d+)", attributes)
    inputs = of_lhs["f"] // (int(groups[1]) if groups else 1)
    batch = of_lhs["b"] // (int(batches[1]) if batches else 1)
    return 2.0 * inputs * of_rhs["o"] * batch * positions


def _labelled(labels: str, array: Array) -> dict[str, int]:
    """Sizes by label."""
    return dict(zip(labels, array.dims, strict=True))


def _numbers(attributes: str, name: str) -> list[int]:
    """A window's `name=3x3`, as numbers."""
    found = re.search(rf"[{{ ]{name}=([\dx]+)", attributes)
    return [int(n) for n in found[1].split("x")] if found else []


# ---- Bytes of main memory


def _main(found: Iterable[Array]) -> int:
    return sum(array.bytes for array in found if array.in_main_memory)


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that one instruction reads and writes."""
    opcode = instruction.opcode
    if _NOTHING_MOVES.fullmatch(opcode):
        return 0
    if opcode == "custom-call" and target_of(instruction) in _FREE_CALLS:
        return 0
    results = arrays(instruction.shape)
    if opcode in ("copy-start", "dynamic-slice-start"):
        target, source = results[0], results[1]
        if opcode == "dynamic-slice-start":
            target, source = results[1], results[0]
        smaller = min(target.bytes, source.bytes)
        return smaller * (target.in_main_memory + source.in_main_memory)
    operands = operand_arrays(computation, instruction)
    if opcode in _WINDOWS:
        return _main(results) + sum(min(r.bytes, operands[0].bytes) for r in results[:1])
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _main(operands[1:2] if opcode == "dynamic-update-slice" else operands[-1:])
    if opcode == "fusion-start":  # (operands, results, context)
        results = results[len(operands) : -1]
    if opcode in _FUSIONS:
        return _fusion(module.computations[called(instruction)[0]], operands, results)
    if opcode.removesuffix("-start") in KINDS and opcode.endswith("-start"):
        results = results[len(operands) : 2 * len(operands)] or results
    return _main(operands) + _main(results)


def _fusion(inside: Computation, operands: list[Array], results: list[Array]) -> int:
    """Bytes at the boundary of a fusion."""
    parameters = [i for i in inside.instructions if i.opcode == "parameter"]
    parameters.sort(key=lambda i: int(i.operands[0]))
    users: dict[str, list[Instruction]] = {}
    for instruction in inside.instructions:
        for name in set(instruction.operands):
            users.setdefault(name, []).append(instruction)
    read = 0
    if len(parameters) == len(operands):
        for parameter, array in zip(parameters, operands, strict=True):
            if array.in_main_memory:
                read += min(_read(inside, users, parameter, array.bytes), array.bytes)
    else:  # an operand is a tuple
        read = _main(operands)
    root = inside.root
    roots = [root] if root is not None else []
    if root is not None and root.opcode == "tuple":
        roots = [inside.by_name[name] for name in root.operands]
    if len(roots) != len(results):
        return read + _main(results)
    for made, array in zip(roots, results, strict=True):
        if array.in_main_memory:
            read += _written(inside, made, array.bytes)
    return read


def _read(
    inside: Computation, users: Mapping[str, list[Instruction]], value: Instruction, whole: int
) -> int:
    """Bytes of `value` that its users touch, at most `whole`."""
    total = 0
    for user in users.get(value.name, []):
        first = user.operands[0] == value.name
        if user.opcode == "bitcast":
            total += _read(inside, users, user, whole)
        elif user.opcode in _WINDOWS and first:
            total += sum(a.bytes for a in arrays(user.shape))
        elif user.opcode in ("dynamic-update-slice", "scatter") and first:
            continue  # changed in place
        else:
            return whole
    return total


def _written(inside: Computation, made: Instruction, whole: int) -> int:
    """Bytes of a result that are written."""
    while made.opcode == "bitcast" and made.operands[0] in inside.by_name:
        made = inside.by_name[made.operands[0]]
    if made.opcode == "dynamic-update-slice":
        return operand_arrays(inside, made)[1].bytes
    if made.opcode == "scatter":
        return 2 * operand_arrays(inside, made)[-1].bytes
    return whole
