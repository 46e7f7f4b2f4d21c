"""Compiles a function for machines that are not here, and reads what its program sends.

    report = compile_for("benchmarks.exchange:layer", "h100:8x8", python=PYTHON, n_nodes=8)

The function named is called as `layer(devices, **arguments)` in a process of its own, since
compilers may abort, and returns a `Program`. Targets are `v5p:2x2x4`, `v6e:4x4`, `tpu7x:2x2x2`
(a TPU and its topology) and `h100:8x8` (hosts x GPUs, one NVLink domain a host). PYTHON belongs to
an environment with the package and its extra `tpu` or `cuda`.
"""

import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
GPU_OPTIONS = {
    # XLA would turn a ragged exchange between hosts into an all-gather of its whole operand.
    "xla_gpu_unsupported_enable_ragged_all_to_all_multi_host_decomposer": False,
    "xla_gpu_enable_latency_hiding_scheduler": True,
}
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 patch: 1 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Program:
    """What to compile: a jitted function, its abstract arguments, and their mesh."""

    function: Any
    arguments: Sequence[Any]
    mesh: Any


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which the devices of a group differ."""
    bytes: int
    """Size of the operand that a device sends, each time."""
    count: int
    """Times a call of the program runs it, loops multiplied."""
    certain: bool
    """False where that is known at run time only: once a trip of such a loop, once a branch."""
    asynchronous: bool
    """Started and awaited by two instructions with something between."""
    overlapped: bool
    """A matrix product, or a loop with one, runs between the two."""


@dataclass(frozen=True)
class Report:
    """A compiled program: sizes in bytes a device."""

    target: str
    collectives: tuple[Collective, ...]
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    compile_seconds: float

    def sent(self, axis: str, kind: str = "") -> int:
        """Bytes of operands sent along an axis in one call, by collectives that surely run."""
        return sum(
            c.bytes * c.count
            for c in self.collectives
            if axis in c.axes and c.certain and kind in ("", c.kind)
        )


# ---- Compiling in a process of its own


def compile_for(
    call: str, target: str, *, python: str = sys.executable, timeout: float = 600, **arguments: Any
) -> Report:
    """Compiles the program that `module:function` makes.

    Raises:
      RuntimeError: the target's compiler is not installed, refused the program or took too long.
    """
    command = [python, "-m", "benchmarks.ahead", call, target, json.dumps(arguments)]
    flags = " ".join(f"--{k}={str(v).lower()}" for k, v in GPU_OPTIONS.items())
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | _ENVIRONMENT
    if target.startswith("h100"):
        environment["XLA_FLAGS"] = flags
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{target}: not compiled within {timeout:.0f} s") from None
    except OSError as error:
        raise RuntimeError(f"{target}: cannot run {python}: {error.strerror}") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{target}: {errors[-1][:300]}")
    got = json.loads(lines[-1])
    collectives = tuple(
        Collective(**{**c, "axes": tuple(c["axes"])}) for c in got.pop("collectives")
    )
    return Report(collectives=collectives, **got)


def devices_of(target: str) -> list[Any]:
    """Descriptions of the target's devices, hosts in order."""
    from jax.experimental import topologies

    name, _, shape = target.partition(":")
    extra, package = ("cuda", "jax_cuda13_plugin") if name == "h100" else ("tpu", "libtpu")
    if importlib.util.find_spec(package) is None:
        raise RuntimeError(f"no {package} in this environment: pip install 'v3jax[{extra}]'")
    if name == "h100":
        hosts, _, gpus = shape.partition("x")
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            topology=f"{hosts}x1x{gpus}",
            target_config=_H100,
        )
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=target)
    return sorted(described.devices, key=lambda d: (getattr(d, "slice_index", 0) or 0, d.id))


def compile_here(program: Program, target: str) -> Report:
    """Compiles in this process, which must not have met a compiler of another kind."""
    platform = "cuda" if target.startswith("h100") else "tpu"
    start = time.perf_counter()
    lowered = program.function.trace(*program.arguments).lower(lowering_platforms=(platform,))
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Report(
        target=target,
        collectives=tuple(read_collectives(compiled.as_text(), dict(program.mesh.shape))),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        compile_seconds=round(seconds, 2),
    )


def main(call: str, target: str, arguments: str) -> None:
    """The child process: prints the report as one line of JSON."""
    module, _, name = call.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
        program = make(devices_of(target), **json.loads(arguments))
        report = compile_here(program, target)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        sys.exit(kind + lines[0])
    print(json.dumps(asdict(report)), flush=True)


# ---- Reading an HLO program


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    """Names, or a constant's value."""
    attributes: str
    root: bool


@dataclass
class Computation:
    """A named list of instructions, in the order they run."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def find(self, name: str) -> Instruction | None:
        """The instruction of that name."""
        return next((i for i in self.instructions if i.name == name), None)


def read_collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives that one device's program runs, in the program's order.

    Args:
      text: HLO as `Compiled.as_text()` gives it.
      mesh_shape: sizes of the mesh's axes, whose row-major order numbers the devices.
    """
    computations, entry = parse(text)
    found: list[Collective] = []

    def visit(name: str, count: int, certain: bool, asynchronous: bool, overlapped: bool) -> None:
        computation = computations[name]
        for position, instruction in enumerate(computation.instructions):
            kind = instruction.opcode.removesuffix("-start")
            started = instruction.opcode.endswith("-start")
            beside = started and _overlapped(computations, computation, position)
            if kind in KINDS:
                axes = group_axes(groups_of(instruction.attributes, mesh_shape), mesh_shape)
                if not axes:
                    continue  # groups of one device
                found.append(
                    Collective(
                        kind=kind,
                        axes=axes,
                        bytes=_sent_bytes(computation, instruction, kind),
                        count=count,
                        certain=certain,
                        asynchronous=asynchronous
                        or (started and '"is_sync":true' not in instruction.attributes),
                        overlapped=overlapped or beside,
                    )
                )
                continue
            trips = 1
            surely = certain and kind != "conditional"
            if kind == "while":
                known = trip_count(computations, computation, instruction)
                trips, surely = (1, False) if known is None else (known, certain)
            for called in _called(instruction, kind):
                if called in computations:
                    visit(
                        called, count * trips, surely, asynchronous or started, overlapped or beside
                    )

    visit(entry, 1, True, False, False)
    return found


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        header = re.match(r"(ENTRY\s+)?%?([\w.\-]+)\s.*->.*\{\s*$", line)
        if header and " = " not in line.split("(")[0]:
            current = computations.setdefault(header[2], Computation(header[2]))
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _parse_line(line)) is not None:
            current.instructions.append(instruction)
    if not entry:
        raise ValueError("no ENTRY computation in this text")
    return computations, entry


def _parse_line(line: str) -> Instruction | None:
    head = re.match(r"\s*(ROOT\s+)?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, found, _ = rest.partition("(")
    if not found:
        return None
    end = _closing(rest, len(opcode))
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(rest[len(opcode) + 1 : end]))
    return Instruction(head[2], shape, opcode, operands, rest[end + 1 :], bool(head[1]))


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _split(text: str) -> Iterator[str]:
    """The parts of a list between its own commas."""
    depth, start = 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    if text[start:].strip():
        yield text[start:]


def _called(instruction: Instruction, kind: str) -> list[str]:
    """Computations that an instruction runs; a reduction's operator is none."""
    if kind == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        if branches:
            return [name.strip().lstrip("%") for name in branches[1].split(",")]
        return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
    key = {
        "while": "body|condition",
        "call": "to_apply|calls",
        "fusion": "calls",
        "async": "calls",
    }.get(kind)
    return re.findall(rf"\b(?:{key})=%?([\w.\-]+)", instruction.attributes) if key else []


def _overlapped(
    computations: Mapping[str, Computation], computation: Computation, start: int
) -> bool:
    """Whether heavy work lies between a start and its done."""
    names = {computation.instructions[start].name}
    for instruction in computation.instructions[start + 1 :]:
        if names & set(instruction.operands):
            if instruction.opcode.endswith("-done"):
                return False
            names.add(instruction.name)  # an update: still under way
        elif _heavy(computations, instruction):
            return True
    return False


def _heavy(computations: Mapping[str, Computation], instruction: Instruction) -> bool:
    """A matrix product, a kernel, or something that runs one."""
    kind = instruction.opcode
    if kind in ("dot", "convolution"):
        return True
    if kind == "custom-call":
        return bool(re.search(r'target="(tpu_custom_call|__|mosaic)', instruction.attributes))
    return any(
        _heavy(computations, inner)
        for name in _called(instruction, kind)
        if name in computations
        for inner in computations[name].instructions
    )


def trip_count(
    computations: Mapping[str, Computation], computation: Computation, loop: Instruction
) -> int | None:
    """How often a while loop runs, by its annotation or by `i < n` with constants; else None."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    name = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    condition = computations.get(name[1]) if name else None
    test = next((i for i in condition.instructions if i.root), None) if condition else None
    if condition is None or test is None or "direction=LT" not in test.attributes:
        return None
    counter, limit = (condition.find(operand) for operand in test.operands)
    if counter is None or counter.opcode != "get-tuple-element":
        return None
    initial = computation.find(loop.operands[0])

    def carried(element: Instruction) -> int | None:
        """What the loop starts with in an element of its state, if a constant."""
        index = re.search(r"index=(\d+)", element.attributes)
        if index is None or initial is None or initial.opcode != "tuple":
            return None
        value = computation.find(initial.operands[int(index[1])])
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = computation.find(value.operands[0])
        return _constant(value)

    first = carried(counter)
    last = _constant(limit)
    return None if first is None or last is None else max(last - first, 0)


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    value = instruction.operands[0] if instruction.operands else ""
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def _sent_bytes(computation: Computation, instruction: Instruction, kind: str) -> int:
    """Size of what is sent; a ragged exchange's other operands are its target and offsets."""
    operands = instruction.operands[:1] if kind == "ragged-all-to-all" else instruction.operands
    sources = [computation.find(name) for name in operands]
    return sum(shape_bytes(source.shape) for source in sources if source is not None)


def shape_bytes(shape: str) -> int:
    """Size of an array or tuple, without the padding of its layout."""
    bits = 0
    for dtype, dims in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", shape):
        width = re.match(r"(?:bf|[a-z])(\d+)", dtype)
        size = 8 if width is None else int(width[1])  # pred
        bits += size * math.prod(int(d) for d in dims.split(",") if d)
    return bits // 8


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
        return _braces(text[: _closing(text, 0) + 1]) or everyone
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


if __name__ == "__main__":
    main(*sys.argv[1:4])
