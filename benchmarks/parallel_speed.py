"""CPU train steps on eight devices against MaxText's, and what a mesh of one device costs.

    python -m benchmarks.parallel_speed                  # ours
    python -m benchmarks.parallel_speed --maxtext=DIR    # and MaxText 0.2.5, installed into DIR

The eight devices share this machine's cores and memory, so times say what the programs compute and
copy, not what a network would do to them; CPU seconds are the fairer column on a shared machine.
Shapes are those of `v3_peer`, a sequence a device. MaxText's `EP 8` computes every expert for every
token: its dropless exchange does not run on CPU. Ours is timed before and after MaxText and the two
are averaged. `gradients alone` is eight times what one device takes for the gradient of one
sequence with all experts at home, without exchange or update: what eight programs of this size
cost before they exchange anything. The second table steps `v3_tiny`, and `v3_small` cut to 2
sequences of 512, by turns with a mesh of one device and with none.
"""

import statistics
from dataclasses import replace
from pathlib import Path

import jax
from absl import app, flags

from benchmarks.step_speed import MAXTEXT, STEPS, time_maxtext
from benchmarks.timing import Timing, stepper, time_by_turns, time_gradient, time_step
from v3jax import registry
from v3jax.config import ExperimentConfig, MeshConfig
from v3jax.host import reuse_freed_memory
from v3jax.sharding import make_mesh

_PARTS = flags.DEFINE_list("parts", ["eight", "one"], "Tables to print.")
DEVICES = 8
OURS = {
    "v3jax expert=8": MeshConfig(expert=8),
    "v3jax node=2 expert=4": MeshConfig(node=2, expert=4),
    "v3jax data=8, zero1": MeshConfig(data=8),
    "v3jax data=8, fsdp": MeshConfig(data=8, storage="fsdp"),
}
THEIRS = {
    "MaxText EP 8, dense": {"ici_expert_parallelism": DEVICES, "sparse_matmul": False},
    "MaxText FSDP 8, ragged_dot": {"ici_fsdp_parallelism": DEVICES},
}


def time_ours(n_steps: int) -> dict[str, Timing]:
    """Every mesh in turn."""
    times = {}
    for name, mesh in OURS.items():
        cfg = replace(registry.get("v3_peer"), mesh=mesh)
        times[name] = time_step(cfg, n_steps, mesh=make_mesh(mesh))
    return times


def print_eight(folder: Path | None, n_steps: int) -> None:
    """Step times on eight devices."""
    cfg = registry.get("v3_peer")
    tokens = cfg.batch.end * cfg.data.seq_len
    rounds, peers = [time_ours(n_steps)], {}
    if folder is not None:
        for name, options in THEIRS.items():
            peers[name] = time_maxtext(cfg, folder, n_steps, DEVICES, **options)
        rounds.append(time_ours(n_steps))
    print(f"{cfg.name}, FP32, {tokens} tokens a step on {DEVICES} CPU devices:")
    print(f"{'':28s} {'s/step':>8s} {'CPU s':>8s} {'tokens/CPU s':>13s} {'compile s':>10s}")
    for name in OURS:
        wall = statistics.mean(times[name].wall for times in rounds)
        cpu = statistics.mean(times[name].cpu for times in rounds)
        print_row(name, tokens, Timing(wall, wall, cpu, rounds[0][name].compile_seconds))
    for name, timing in peers.items():
        print_row(name, tokens, timing)
    one = replace(cfg, batch=replace(cfg.batch, micro_batch=1, start=1, end=1))
    alone = time_gradient(one, n_steps)
    scaled = (DEVICES * alone.wall, DEVICES * alone.wall_min, DEVICES * alone.cpu)
    print_row("gradients alone", tokens, Timing(*scaled, alone.compile_seconds))


def print_row(name: str, tokens: int, timing: Timing) -> None:
    print(
        f"{name:28s} {timing.wall:8.3f} {timing.cpu:8.3f} {tokens / timing.cpu:13.0f} "
        f"{timing.compile_seconds:10.1f}",
        flush=True,
    )


def cut_small() -> ExperimentConfig:
    """`v3_small` with one micro-batch of 2 sequences of 512."""
    cfg = registry.get("v3_small")
    return replace(
        cfg,
        data=replace(cfg.data, seq_len=512),
        batch=replace(cfg.batch, micro_batch=2, start=2, end=2),
    )


def print_one(n_steps: int) -> None:
    """Throughput with a mesh of one device over that without a mesh."""
    print(f"\n{'one device':12s} {'without mesh tokens/s':>22s} {'with mesh tokens/s':>19s} ratio")
    for cfg in (registry.get("v3_tiny"), cut_small()):
        tokens = cfg.batch.end * cfg.data.seq_len
        turns = {"none": stepper(cfg), "mesh": stepper(cfg, make_mesh(cfg.mesh))}
        times = time_by_turns(turns, n_steps)
        none, mesh = times["none"].wall, times["mesh"].wall
        print(
            f"{cfg.name:12s} {tokens / none:22.0f} {tokens / mesh:19.0f} {none / mesh:5.2f}",
            flush=True,
        )


def main(argv: list[str]) -> None:
    del argv
    reuse_freed_memory()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    folder = Path(MAXTEXT.value).resolve() if MAXTEXT.value else None
    if "eight" in _PARTS.value:
        print_eight(folder, STEPS.value)
    if "one" in _PARTS.value:
        print_one(STEPS.value)


if __name__ == "__main__":
    app.run(main)
