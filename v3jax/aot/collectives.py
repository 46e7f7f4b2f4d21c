"""What a compiled program sends between devices: kinds, mesh axes, bytes, loops, overlap."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from v3jax.aot.hlo import (
    Computation,
    Instruction,
    Module,
    Times,
    called,
    calls_of,
    closing,
    shape_bytes,
)

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which the devices of a group differ."""
    bytes: int
    """Size of the operand that a device hands over, each time."""
    sent: int
    """Bytes that a device sends through its links, each time; see `sent_bytes`."""
    count: int
    """Times a call of the program runs it, loops multiplied."""
    certain: bool
    """False where that is known at run time only."""
    asynchronous: bool
    """Started and awaited by two instructions with something between."""
    overlapped: bool
    """A matrix product, or a loop with one, runs between the two."""


def read_collectives(module: Module, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives that one device's program runs, in the program's order.

    Args:
      module: what `hlo.parse` gives.
      mesh_shape: sizes of the mesh's axes, whose row-major order numbers the devices.
    """
    found: list[Collective] = []

    def visit(name: str, times: Times, asynchronous: bool, overlapped: bool) -> None:
        computation = module.computations[name]
        for position, instruction in enumerate(computation.instructions):
            kind = instruction.opcode.removesuffix("-start")
            started = instruction.opcode.endswith("-start")
            if kind in KINDS:
                groups = groups_of(instruction.attributes, mesh_shape)
                axes = group_axes(groups, mesh_shape)
                if not axes:
                    continue  # groups of one device
                kind, size = _kind_and_size(computation, instruction, kind)
                alone = '"is_sync":true' in instruction.attributes
                found.append(
                    Collective(
                        kind=kind,
                        axes=axes,
                        bytes=size,
                        sent=sent_bytes(
                            kind, len(groups[0]), size, _target_size(computation, instruction)
                        ),
                        count=times.count,
                        certain=times.certain,
                        asynchronous=asynchronous or (started and not alone),
                        overlapped=overlapped
                        or (started and _overlapped(module, computation, position)),
                    )
                )
                continue
            inside = calls_of(module, computation, instruction, times)
            if not inside:
                continue
            beside = overlapped or (started and _overlapped(module, computation, position))
            for other, inner in inside:
                if other in module.computations and inner.count:
                    visit(other, inner, asynchronous or started, beside)

    visit(module.entry, Times(), False, False)
    return found


# ---- Bytes


def sent_bytes(kind: str, n_devices: int, operand: int, target: int) -> int:
    """Bytes that a device of a group of n sends, by ring algorithms, for an operand of so many.

    A ragged exchange's buffers have room for more than a balanced batch brings: on average neither
    side can move more than the smaller of its operand and its `target`.
    """
    n = n_devices
    match kind:
        case "all-gather":  # (n - 1) / n of the output
            return (n - 1) * operand
        case "reduce-scatter" | "all-to-all":
            return (n - 1) * operand // n
        case "all-reduce":
            return 2 * (n - 1) * operand // n
        case "ragged-all-to-all":
            return (n - 1) * min(operand, target) // n
        case _:
            return operand


def _kind_and_size(
    computation: Computation, instruction: Instruction, kind: str
) -> tuple[str, int]:
    """What a collective really is, and the size of its operand.

    A TPU's reduce-scatter is a fused all-reduce of the padded operand and a slice of its result. A
    ragged exchange's other operands are its target and offsets.
    """
    operands = instruction.operands[:1] if kind == "ragged-all-to-all" else instruction.operands
    sources = [computation.find(name) for name in operands]
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
        sources = [
            computation.find(s.operands[0]) if s is not None and s.opcode == "pad" else s
            for s in sources
        ]
    return kind, sum(shape_bytes(source.shape) for source in sources if source is not None)


def _target_size(computation: Computation, instruction: Instruction) -> int:
    """Size of a second operand, which is a ragged exchange's target."""
    target = computation.find(instruction.operands[1]) if len(instruction.operands) > 1 else None
    return 0 if target is None else shape_bytes(target.shape)


# ---- Overlap


def _overlapped(module: Module, computation: Computation, start: int) -> bool:
    """Whether heavy work lies between a start and its done."""
    names = {computation.instructions[start].name}
    for instruction in computation.instructions[start + 1 :]:
        if names & set(instruction.operands):
            if instruction.opcode.endswith("-done"):
                return False
            names.add(instruction.name)  # an update: still under way
        elif _heavy(module, instruction):
            return True
    return False


def _heavy(module: Module, instruction: Instruction) -> bool:
    """A matrix product, a kernel, or something that runs one."""
    if instruction.opcode in ("dot", "convolution"):
        return True
    if instruction.opcode == "custom-call":
        return bool(re.search(r'target="(tpu_custom_call|__|mosaic)', instruction.attributes))
    return any(
        _heavy(module, inner)
        for name in called(instruction)
        if name in module.computations
        for inner in module.computations[name].instructions
    )


# ---- Groups of devices


def groups_of(attributes: str, mesh_shape: Mapping[str, int]) -> list[list[int]]:
    """The groups of devices that exchange, from whichever way HLO writes them; all if none."""
    everyone = [list(range(math.prod(mesh_shape.values())))]
    pairs = re.search(r"source_target_pairs=(\{.*?\}\}|\{\})", attributes)
    if pairs:
        return _braces(pairs[1])
    value = re.search(r"replica_groups=(.*)", attributes)
    if value is None:
        return everyone
    text = value[1]
    if text.startswith("{"):
        return _braces(text[: closing(text, 0) + 1]) or everyone
    if text.startswith("["):
        return _iota(text).tolist()
    return _mesh_groups(text)


def _braces(text: str) -> list[list[int]]:
    return [[int(i) for i in re.findall(r"\d+", g)] for g in re.findall(r"\{([\d, ]+)\}", text)]


def _iota(text: str) -> np.ndarray:
    """`[2,8]<=[8,2]T(1,0)`: 0, 1, ... in the right shape, transposed, in the left shape."""
    match = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"cannot read replica_groups={text[:60]}")
    shape, source = ([int(d) for d in match[i].split(",")] for i in (1, 2))
    ids = np.arange(math.prod(source)).reshape(source)
    if match[3]:
        ids = ids.transpose([int(d) for d in match[3].split(",")])
    return ids.reshape(shape)


def _mesh_groups(text: str) -> list[list[int]]:
    """`mesh['a'=2,'b'=4], device_ids=(...) {'a','b':(1)2}`: all that differ along the last axes."""
    match = re.match(r"@?mesh[\[<]([^\]>]*)[\]>](?:, device_ids=\((.*?)\)(?= ))? \{([^}]*)\}", text)
    if match is None:
        raise ValueError(f"cannot read replica_groups={text[:60]}")
    sizes = {n: int(s) for n, s in re.findall(r"'?([\w.\-]+)'?=(\d+)", match[1])}
    ids = np.arange(math.prod(sizes.values()))
    order = match[2] or ""
    if order.startswith("["):
        ids = _iota(f"[{ids.size}]<={order}")
    elif order:
        ids = np.array([int(i) for i in order.split(",")])
    # Every axis in three: before the part named, the part, after it.
    parts = {name: (1, 1, size) for name, size in sizes.items()}
    for name, before, size in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", match[3]):
        outer, part = (int(before), int(size)) if size else (1, sizes[name])
        parts[name] = (outer, part, sizes[name] // (outer * part))
    ids = ids.reshape([d for part in parts.values() for d in part])
    inside = [3 * i + 1 for i in range(len(parts))]
    outside = [i for i in range(ids.ndim) if i not in inside]
    size = math.prod(ids.shape[i] for i in inside)
    return ids.transpose(outside + inside).reshape(-1, size).tolist()


def group_axes(groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which devices of one group differ, in the mesh's order."""
    differ = np.zeros(len(mesh_shape), bool)
    for group in groups:
        where = np.stack(np.unravel_index(np.asarray(group), tuple(mesh_shape.values())))
        differ |= (where != where[:, :1]).any(axis=1)
    return tuple(axis for axis, differs in zip(mesh_shape, differ, strict=True) if differs)
