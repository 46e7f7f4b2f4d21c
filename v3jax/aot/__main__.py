"""Compiles an experiment's training step for hardware that is not here, and says what it needs.

    python -m v3jax.aot --exp=v3_tiny --target=tpu:v5p:2x2x1 --set mesh.data=4 [--json]

Targets are `tpu:v5p:8x8x8`, `tpu:v6e:16x16`, `tpu:tpu7x:4x8x8` (a chip and its torus) and
`gpu:h100:256x8` (hosts x GPUs); the mesh of the experiment has to use all of the target's
devices. The compiler runs in a process of its own, by the Python that --python names: one with
the package and its extra `tpu` or `cuda`. Nothing is run, and no figure here was measured.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from v3jax import cli, config, registry
from v3jax.aot import process, targets
from v3jax.aot.report import table
from v3jax.aot.targets import Target
from v3jax.config import ExperimentConfig

PROGRAM = "v3jax.aot.compile"


def check(cfg: ExperimentConfig, target: Target, hlo: str | None) -> None:
    """What can be known to be wrong before anything is compiled.

    Raises:
      ValueError: the mesh is not of the target's size, or --hlo cannot be written.
    """
    mesh = cfg.mesh
    others = mesh.n_devices // mesh.data
    if mesh.n_devices != target.n_devices:
        fits = target.n_devices % others == 0
        remedy = f"--set mesh.data={target.n_devices // others}" if fits else "set mesh.* to fit"
        raise ValueError(
            f"--target={target}: {target.n_devices} devices, but mesh.* uses {mesh.n_devices} "
            f"({mesh.sizes}); {remedy}"
        )
    if hlo is not None and (Path(hlo).is_dir() or not Path(hlo).absolute().parent.is_dir()):
        raise ValueError(f"--hlo={hlo}: not a file in a folder that exists")


def compile_for(
    exp: str,
    assignments: Sequence[str],
    target: Target,
    *,
    python: str,
    timeout: float,
    estimate: bool,
    hlo: str | None,
) -> dict[str, Any]:
    """The fields of `report.Report`, from a process that compiles.

    Raises:
      ValueError, RuntimeError: as `process.run`.
    """
    request = {
        "exp": exp,
        "set": list(assignments),
        "target": str(target),
        "estimate": estimate,
        "hlo": None if hlo is None else str(Path(hlo).absolute()),
    }
    return process.run(
        ["-m", PROGRAM, json.dumps(request)], str(target), python=python, timeout=timeout
    )


def main(argv: Sequence[str]) -> int:
    """Prints the report; any mistake is one line and an exit code as in `v3jax.cli`."""
    values = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r} is no flag; see --help")
        if values.exp is None:
            raise ValueError(f"--exp: name one of {', '.join(registry.names())}")
        if values.target is None:
            examples = (f"{c.kind}:{c.name}:{c.example}" for c in targets.CHIPS)
            raise ValueError(f"--target: one like {', '.join(examples)}")
        if values.timeout <= 0:
            raise ValueError(f"--timeout={values.timeout}: must be positive")
        target = targets.parse(values.target)
        cfg = config.override(registry.get(values.exp), values.set)
        check(cfg, target, values.hlo)
        got = compile_for(
            values.exp,
            values.set,
            target,
            python=values.python,
            timeout=values.timeout,
            estimate=not values["no-estimate"].value,
            hlo=values.hlo,
        )
    except ValueError as error:
        return cli.fail("aot", error, cli.USAGE)
    except RuntimeError as error:
        return cli.fail("aot", error, cli.UNUSABLE)
    print(json.dumps(got) if values.json else table(got))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("exp", None, "A registered experiment, or path/to/file.py.")
    flags.DEFINE_multi_string("set", [], "path.to.field=value; may be repeated.")
    flags.DEFINE_string("target", None, "kind:chip:topology, as in tpu:v5p:8x8x8.")
    flags.DEFINE_string("python", sys.executable, "Python of an environment with the compiler.")
    flags.DEFINE_float("timeout", 1800, "Seconds that all compilations together may take.")
    flags.DEFINE_boolean("no-estimate", False, "Do not compile two short models for XLA's time.")
    flags.DEFINE_string("hlo", None, "File to write the compiled program's text to.")
    flags.DEFINE_boolean("json", False, "Print one JSON object.")
    cli.run("aot", main)
