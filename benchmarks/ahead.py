"""Compiles a function for machines that are not here, and reads what its program sends.

    report = compile_for("benchmarks.exchange:layer", "h100:8x8", python=PYTHON, n_nodes=8)

The function named is called as `layer(devices, **arguments)` in a process of its own, since
compilers may abort, and returns a `Program`. Targets are those of `v3jax.aot` without their kind:
`v5p:2x2x4`, `h100:8x8`. PYTHON belongs to an environment with the package and its extra `tpu` or
`cuda`.
"""

import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from v3jax.aot import process, targets
from v3jax.aot.collectives import Collective, read_collectives
from v3jax.aot.devices import devices_of
from v3jax.aot.hlo import parse
from v3jax.compiler import compiler_options


@dataclass(frozen=True)
class Program:
    """What to compile: a jitted function, its abstract arguments, their mesh, and options of the
    compiler beside v3jax's own."""

    function: Any
    arguments: Sequence[Any]
    mesh: Any
    options: Mapping[str, Any] = field(default_factory=dict)


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


def compile_for(
    call: str, target: str, *, python: str = sys.executable, timeout: float = 600, **arguments: Any
) -> Report:
    """Compiles the program that `module:function` makes.

    Raises:
      RuntimeError: the target's compiler is not installed, refused the program or took too long.
      ValueError: no such target.
    """
    command = ["-m", "benchmarks.ahead", call, target, json.dumps(arguments)]
    got = process.run(command, target, python=python, timeout=timeout)
    collectives = tuple(
        Collective(**{**c, "axes": tuple(c["axes"])}) for c in got.pop("collectives")
    )
    return Report(collectives=collectives, **got)


def target_of(name: str) -> targets.Target:
    """The target of a chip and its topology."""
    kinds = {chip.name: chip.kind for chip in targets.CHIPS}
    return targets.parse(f"{kinds.get(name.partition(':')[0], '?')}:{name}")


def compile_here(program: Program, target: str) -> Report:
    """Compiles in this process, which must not have met a compiler of another kind."""
    start = time.perf_counter()
    with jax.set_mesh(program.mesh):
        traced = program.function.trace(*program.arguments)
        lowered = traced.lower(lowering_platforms=(target_of(target).platform,))
    options = {**(compiler_options(program.mesh) or {}), **program.options}
    compiled = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    found = read_collectives(parse(compiled.as_text()), dict(program.mesh.shape))
    return Report(
        target=target,
        collectives=tuple(found),
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
        program = make(devices_of(target_of(target)), **json.loads(arguments))
        report = compile_here(program, target)
    except Exception as error:
        process.answer_error(error)
    else:
        process.answer(asdict(report))


if __name__ == "__main__":
    main(*sys.argv[1:4])
