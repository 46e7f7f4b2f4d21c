"""The child process of `v3jax.aot`: compiles the training step for a target, prints a report.

    python -m v3jax.aot.compile '{"exp": "v3_tiny", "set": [], "target": "tpu:v5p:2x2x1", ...}'

The fields of the request are those of `__main__.compile_for`.
"""

import json
import re
import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v3jax import config, registry
from v3jax.aot import process, targets
from v3jax.aot.costs import read_costs
from v3jax.aot.devices import devices_of
from v3jax.aot.hlo import parse
from v3jax.aot.report import Memory, Report, Times, loops_of, make_report
from v3jax.aot.targets import Target
from v3jax.config import ExperimentConfig
from v3jax.sharding import BATCH_AXES, make_mesh
from v3jax.state import TrainState, abstract_state
from v3jax.step import abstract_amount, make_train_step


@dataclass(frozen=True)
class Compiled:
    """A compiled step."""

    text: str
    memory: Memory
    analysis: dict[str, float]
    """XLA's figures for one call, the body of a loop once; empty where it gives none."""
    times: Times

    @property
    def optimal_seconds(self) -> float | None:
        seconds = self.analysis.get("optimal_seconds", 0.0)
        return seconds if seconds > 0 else None


@dataclass(frozen=True)
class TooLarge:
    """XLA found that the step does not fit into a device's memory."""

    used_bytes: int | None
    over_bytes: int
    times: Times


def compile_step(cfg: ExperimentConfig, mesh: Mesh, target: Target) -> Compiled | TooLarge:
    """Compiles the step that `v3jax.train` runs, with the most micro-batches a step has."""
    n_micro = cfg.batch.end // cfg.batch.micro_batch
    start, cpu = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        shape = (n_micro, cfg.batch.micro_batch, cfg.data.seq_len + 1)
        batch = jax.ShapeDtypeStruct(
            shape, np.int32, sharding=NamedSharding(mesh, P(None, BATCH_AXES))
        )
        amount = abstract_amount(cfg, mesh)
        traced = make_train_step(cfg, mesh).trace(abstract_state(cfg, mesh), batch, batch, amount)
        lowered = traced.lower(lowering_platforms=(target.platform,))
    middle = time.perf_counter()
    compiled, refusal = None, ""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = str(error)
    times = Times(
        lower_seconds=round(middle - start, 2),
        compile_seconds=round(time.perf_counter() - middle, 2),
        cpu_seconds=round(time.process_time() - cpu, 2),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    if compiled is None:
        used, over = out_of_memory(refusal)
        if over is None:
            raise RuntimeError(f"XLA refused the step: {refusal.splitlines()[0]}")
        return TooLarge(used, over, times)
    return Compiled(
        text=compiled.as_text(),
        memory=_memory(compiled.memory_analysis()),
        analysis=_analysis(compiled),
        times=times,
    )


def _analysis(compiled: Any) -> dict[str, float]:
    found = compiled.cost_analysis()
    found = (found[0] if isinstance(found, list) else found) or {}
    names = ("flops", "bytes accessed", "optimal_seconds")
    return {name: found[name] for name in names if name in found}


def _memory(found: Any) -> Memory:
    """XLA's figures; of a compiler that gives no peak, the sum of what it counts."""
    together = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )
    host = (
        found.host_argument_size_in_bytes
        + found.host_output_size_in_bytes
        - found.host_alias_size_in_bytes
        + found.host_temp_size_in_bytes
    )
    return Memory(
        peak=found.peak_memory_in_bytes or together, temp=found.temp_size_in_bytes, host=host
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def out_of_memory(message: str) -> tuple[int | None, int | None]:
    """Bytes needed and bytes too many, from XLA's message: None and 0 if it tells no numbers, None
    twice if it is about something else."""
    if not re.search(r"ran out of memory (on|in memory space) hbm", message, re.IGNORECASE):
        return None, None
    size = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"\({size}\) exceeds available HBM \({size}\)", message)
    found = found or re.search(rf"Used {size} of {size} hbm", message)
    if found is None:
        return None, 0
    used, most = (round(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
    return used, max(used - most, 0)


# ---- The estimate


def estimate(cfg: ExperimentConfig, mesh: Mesh, target: Target) -> float | None:
    """Seconds of a step by XLA's own cost model, or None where it has none.

    The step of one micro-batch is compiled with one and with two MoE layers, which unrolls them;
    the difference is a layer, what is left the ends. Every micro-batch is taken to cost the whole
    of that, the optimizer's update too. What XLA leaves out is added (`Costs.beyond_xla`). Not of a
    pipeline.
    """
    if not cfg.model.n_moe_layers or cfg.mesh.pipe > 1:  # with stages there is no such difference
        return None
    one, two = (_seconds(cfg, mesh, target, n_layers) for n_layers in (1, 2))
    if one is None or two is None:
        return None
    layer = two - one
    n_micro = cfg.batch.end // cfg.batch.micro_batch
    return n_micro * (one - layer + cfg.model.n_moe_layers * layer)


def _seconds(cfg: ExperimentConfig, mesh: Mesh, target: Target, n_moe_layers: int) -> float | None:
    micro = cfg.batch.micro_batch
    small = replace(
        cfg,
        model=replace(cfg.model, n_layers=cfg.model.n_dense_layers + n_moe_layers),
        batch=replace(cfg.batch, start=micro, end=micro),
    )
    done = compile_step(small, mesh, target)
    if isinstance(done, TooLarge) or done.optimal_seconds is None:
        return None
    costs = read_costs(parse(done.text, loops_of(small)))
    return done.optimal_seconds + costs.beyond_xla(target.chip)


# ---- The process


def state_bytes(state: TrainState) -> tuple[int, int, int]:
    """Bytes a device of the parameters, the optimizer's state and the average."""

    def held(tree: Any) -> int:
        return sum(
            int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )

    return held(state.params), held(state.opt_state), held(state.ema)


def report(request: dict[str, Any]) -> Report:
    """Does what the parent asked for."""
    target = targets.parse(request["target"])
    cfg = config.override(registry.get(request["exp"]), request["set"])
    mesh = make_mesh(cfg.mesh, devices_of(target))
    with jax.set_mesh(mesh):
        held = state_bytes(abstract_state(cfg, mesh))
    done = compile_step(cfg, mesh, target)
    if isinstance(done, TooLarge):
        used = done.used_bytes or target.chip.memory_bytes + done.over_bytes
        memory = Memory(peak=used, temp=None, host=None)
        return make_report(cfg, target, mesh, held, memory, done.times, None, None, done.over_bytes)
    if request["hlo"]:
        Path(request["hlo"]).write_text(done.text)
    seconds = None
    if request["estimate"] and done.optimal_seconds is not None:
        seconds = estimate(cfg, mesh, target)
    got = make_report(cfg, target, mesh, held, done.memory, done.times, done.text, seconds, None)
    return replace(got, xla=done.analysis or None)


def main(request: str) -> None:
    """Prints the report, or why there is none, as one line of JSON."""
    try:
        result = report(json.loads(request))
    except Exception as error:
        process.answer_error(error)
        return
    process.answer(asdict(result))


if __name__ == "__main__":
    main(sys.argv[1])
