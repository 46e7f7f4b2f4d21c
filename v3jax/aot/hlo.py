"""Reads a compiled HLO module: computations, instructions, sizes, and how often loops run."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

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

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    def find(self, name: str) -> Instruction | None:
        """The instruction of that name."""
        return self.by_name.get(name)

    @property
    def root(self) -> Instruction | None:
        return next((i for i in self.instructions if i.root), None)


@dataclass(frozen=True)
class Module:
    """A program: its computations by name, and which of them it starts with."""

    computations: Mapping[str, Computation]
    entry: str
    loops: "Loops"


@dataclass(frozen=True, kw_only=True)
class Loops:
    """What the training step's run-time numbers are in a balanced batch; None: not known."""

    n_micro: int | None = None
    """Micro-batches of a step; with a pipeline, its ticks."""
    expert_rows: int | None = None
    """Rows that one expert multiplies."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """How often the conditionals of a pipeline are true, by name."""


_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s.*->.*\{\s*$")
_HEAD = re.compile(r"\s+(ROOT\s+)?%?([\w.\-]+) = ")
_END = re.compile(r"\}(, execution_thread=.*)?\s*$")


def parse(text: str, loops: Loops | None = None) -> Module:
    """The module that `Compiled.as_text()` gives.

    Attributes of kernels may run over several lines, some of which start with a bracket: only a
    lone one ends a computation, and what starts no instruction goes on with the last.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    parts: list[str] = []

    def flush() -> None:
        if parts and current is not None:
            instruction = _parse_instruction(" ".join(parts))
            if instruction is not None:
                current.instructions.append(instruction)
        parts.clear()

    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if current is None or not line.startswith(" "):
            header = _HEADER.match(line)
            if header and " = " not in line.split("(")[0]:
                flush()
                current = computations.setdefault(header[2], Computation(header[2]))
                entry = header[2] if header[1] else entry
                continue
        if current is None:
            continue
        if _END.match(line):
            flush()
            current = None
        elif _HEAD.match(line):
            flush()
            parts.append(line)
        elif parts:
            parts.append(line)
    if not entry:
        raise ValueError("no ENTRY computation in this text")
    return Module(computations, entry, loops or Loops())


def _parse_instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, found, _ = rest.partition("(")
    if not found:
        return None
    end = closing(rest, len(opcode))
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(rest[len(opcode) + 1 : end]))
    return Instruction(head[2], shape, opcode, operands, rest[end + 1 :], bool(head[1]))


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()\[\]{}]", text[start:]):
        depth += 1 if match[0] in "([{" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _split(text: str) -> Iterator[str]:
    """The parts of a list between its own commas."""
    depth, start = 0, 0
    for match in re.finditer(r"[()\[\]{},]", text):
        if match[0] != ",":
            depth += 1 if match[0] in "([{" else -1
        elif depth == 0:
            yield text[start : match.start()]
            start = match.end()
    if text[start:].strip():
        yield text[start:]


# ---- Sizes


@dataclass(frozen=True)
class Array:
    """One array of a shape."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of the layout."""
        width = re.match(r"(?:bf|[a-z])(\d+)", self.dtype)
        return self.size * (8 if width is None else int(width[1])) // 8  # pred, token

    @property
    def in_main_memory(self) -> bool:
        """Whether it lies in the device's main memory: not in the host's, `S(5)`, nor in a TPU's
        faster ones, whose `S(1)` and so on stand beside a tiling `T(...)`."""
        space = re.search(r"S\(([1-9])\)", self.layout)
        return space is None or ("T(" not in self.layout and space[1] != "5")


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, in order; a tuple's are flattened."""
    return [
        Array(dtype, tuple(int(d) for d in dims.split(",") if d), layout or "")
        for dtype, dims, layout in re.findall(
            r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?", shape
        )
    ]


def shape_bytes(shape: str) -> int:
    """Size of an array or tuple, without the padding of its layout."""
    return sum(array.bytes for array in arrays(shape))


# ---- Which computations an instruction runs, and how often


@dataclass(frozen=True)
class Times:
    """How often something runs in one call of the program."""

    count: int = 1
    certain: bool = True
    """False where that is known at run time only."""
    in_unknown_loop: bool = False


def called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs; a reduction's operator is none."""
    kind = instruction.opcode.removesuffix("-start")
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


def calls_of(
    module: Module, computation: Computation, instruction: Instruction, here: Times
) -> list[tuple[str, Times]]:
    """The computations that an instruction runs and how often each, if it itself runs `here`."""
    times, names = times_of(module, computation, instruction, here), called(instruction)
    scope = re.search(r'op_name="[^"]*pipeline_(\w+)/cond"', instruction.attributes)
    share = module.loops.shares.get(scope[1]) if scope else None
    if instruction.opcode != "conditional" or share is None or len(names) != 2:
        return [(name, times) for name in names]
    yes = round(here.count * share)
    counts = [here.count - yes, yes]  # branches are numbered: the first is that of 0, false
    if "true_computation" in instruction.attributes:
        counts.reverse()
    return [
        (name, Times(count, here.certain, here.in_unknown_loop))
        for name, count in zip(names, counts, strict=True)
    ]


def times_of(
    module: Module, computation: Computation, instruction: Instruction, here: Times
) -> Times:
    """How often what an instruction calls runs, if the instruction itself runs `here`.

    Of loops without a known number of trips, v3jax has three kinds. The outermost walks the
    micro-batches. Where no kernel multiplies an expert's rows, a loop walks its blocks. The others
    are passes of the expert exchange, of which a balanced batch takes one: `first .. n` is taken to
    end at 1. A loop whose start is unknown too counts once, as does each branch of a conditional.
    """
    if instruction.opcode == "conditional":
        return Times(here.count, False, here.in_unknown_loop)
    if instruction.opcode != "while":
        return here
    first, trips = _trips(module, computation, instruction)
    if trips is not None:
        return Times(here.count * trips, here.certain, here.in_unknown_loop)
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    name, loops = found[1] if found else "", module.loops
    over_batches = not here.in_unknown_loop and re.fullmatch(_OVER_BATCHES, name)
    if loops.n_micro is not None and over_batches:
        return Times(here.count * loops.n_micro, here.certain)
    blocks = None
    if loops.expert_rows is not None and re.search(_OVER_BLOCKS, name):
        blocks = _blocks(instruction, loops.expert_rows)
    if blocks is None:
        blocks = 1 if first is None else max(1 - first, 0)
    return Times(here.count * blocks, False, True)


# The step's own loop stands directly under its function, those over blocks in `ops.gemm`.
_OVER_BATCHES = r"jit\([^)]*\)(/shard_map)?/while"
_OVER_BLOCKS = r"grouped_matmul[^/]*/while/.*while$"


def _blocks(loop: Instruction, rows: int) -> int | None:
    """How many blocks hold so many rows; the state has two arrays `[blocks, rows, width]`."""
    found = Counter(a.dims[:2] for a in arrays(loop.shape) if len(a.dims) == 3)
    blocks = [dims for dims, n in found.items() if n >= 2]
    if len(blocks) != 1:
        return None
    n_blocks, block = blocks[0]
    return min(n_blocks, -(-rows // block))


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a while loop runs, by its annotation or by `i < n` with constants; else None."""
    return _trips(module, computation, loop)[1]


def _trips(
    module: Module, computation: Computation, loop: Instruction
) -> tuple[int | None, int | None]:
    """The first value of a loop's counter and the number of trips, where they are known."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return None, int(known[1])
    name = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    condition = module.computations.get(name[1]) if name else None
    test = condition.root if condition else None
    if condition is None or test is None:
        return None, None
    if test.opcode == "fusion":  # GPUs and CPUs fuse the comparison
        inside = module.computations[called(test)[0]]
        inner, names = inside.root, dict(zip(_parameters(inside), test.operands, strict=True))
        if inner is None:
            return None, None
        sides = [inside.find(operand) for operand in inner.operands]
        sides = [condition.find(names[s.name]) if s and s.name in names else s for s in sides]
        test = inner
    else:
        sides = [condition.find(operand) for operand in test.operands]
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None, None
    counter, limit = sides
    if counter is None or counter.opcode != "get-tuple-element":
        return None, None
    initial = computation.find(loop.operands[0])

    def carried(element: Instruction | None) -> int | None:
        """What the loop starts with in an element of its state, if a constant."""
        index = re.search(r"index=(\d+)", element.attributes) if element else None
        if index is None or initial is None or initial.opcode != "tuple":
            return None
        value = computation.find(initial.operands[int(index[1])])
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = computation.find(value.operands[0])
        return _constant(value)

    first, last = carried(counter), _constant(limit)
    return first, None if first is None or last is None else max(last - first, 0)


def _parameters(computation: Computation) -> list[str]:
    """Names of a computation's parameters, in order."""
    found = [i for i in computation.instructions if i.opcode == "parameter"]
    return [i.name for i in sorted(found, key=lambda i: int(i.operands[0]))]


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    value = instruction.operands[0] if instruction.operands else ""
    return int(value) if re.fullmatch(r"-?\d+", value) else None
