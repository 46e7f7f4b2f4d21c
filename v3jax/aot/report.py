"""What is said of a step compiled for a target: memory, work, links, time at best."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from v3jax.aot.collectives import Collective, read_collectives
from v3jax.aot.costs import Costs, read_costs
from v3jax.aot.hlo import Loops, Module, parse
from v3jax.aot.targets import GIB, Chip, Target
from v3jax.config import ExperimentConfig
from v3jax.cost import flops_per_token
from v3jax.pipeline.plan import idle_share, plan_of, shares


@dataclass(frozen=True, kw_only=True)
class Times:
    """What a compilation took on the machine that did it."""

    lower_seconds: float
    compile_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes a device: the most held at a time, of it temporaries; and of the host's memory."""

    peak: int
    temp: int | None
    host: int | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything `python -m v3jax.aot` prints, per device as JAX counts them; None: not known.

    `flops_per_chip` are what the program computes in a step, recomputation included,
    `model_flops_per_chip` what the model asks for by `v3jax.cost`, without MTP.
    """

    exp: str
    target: str
    n_devices: int
    fits: bool
    memory_bytes_per_chip: int
    memory_limit_bytes: int
    over_bytes: int
    parameter_bytes_per_chip: int
    optimizer_bytes_per_chip: int
    ema_bytes_per_chip: int
    temp_bytes_per_chip: int | None
    host_bytes_per_chip: int | None
    flops_per_chip: float | None
    model_flops_per_chip: float
    hbm_bytes_per_chip: float | None
    estimated_step_seconds: float | None
    roofline_seconds: dict[str, float] | None
    """Least time of the matrix products at the chip's peak (`flops`), of main memory (`memory`)
    and of the busiest mesh axis (`links`), each by itself."""
    idle_share: float
    """Of a pipeline's step, the least that a rank waits; see `pipeline.plan.idle_share`."""
    mfu_bound: float | None
    tokens_per_step: int
    tokens_per_second_per_chip: float | None
    estimate_from: str | None
    """`xla` or `roofline`: where the seconds behind the last two come from."""
    collectives: list[dict[str, Any]] | None
    kernels: list[dict[str, Any]] | None
    lower_seconds: float
    compile_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    hlo_bytes: int | None
    xla: dict[str, float] | None = None
    """XLA's own `flops`, `bytes accessed` and `optimal_seconds` of one call, the body of each loop
    counted once and kernels by what they declare."""


def make_report(
    cfg: ExperimentConfig,
    target: Target,
    mesh: Any,
    held: tuple[int, int, int],
    memory: Memory,
    times: Times,
    text: str | None,
    estimated: float | None,
    over_bytes: int | None,
) -> Report:
    """Puts together what was compiled.

    Args:
      held: bytes a device of parameters, optimizer state and average.
      text: the program, or None if it did not fit into memory.
      estimated: seconds of a step by XLA.
      over_bytes: how much too much memory XLA says it needs, or None.
    """
    chip = target.chip
    tokens = cfg.batch.end * cfg.data.seq_len
    model_flops = flops_per_token(cfg.model, cfg.data.seq_len) * tokens / target.n_devices
    costs, rows, roofline = None, None, None
    if text is not None:
        module = parse(text, loops_of(cfg))
        costs = read_costs(module)
        rows, links = _collectives(module, target, mesh)
        roofline = {
            "flops": _at_peak(costs, chip),
            "memory": costs.memory_bytes / chip.memory_speed,
            "links": links,
        }
    idle = idle_share(cfg)
    bound = None if roofline is None else max(roofline.values()) / (1 - idle)
    seconds = bound if estimated is None else estimated
    slowest = None if bound is None else max(bound, estimated or 0.0)
    if over_bytes is None:  # a TPU's compiler refuses what does not fit, a GPU's compiles it
        over_bytes = max(memory.peak - chip.memory_bytes, 0) if chip.kind == "gpu" else 0
    return Report(
        exp=cfg.name,
        target=str(target),
        n_devices=target.n_devices,
        fits=over_bytes == 0 and text is not None,
        memory_bytes_per_chip=memory.peak,
        memory_limit_bytes=chip.memory_bytes,
        over_bytes=over_bytes,
        parameter_bytes_per_chip=held[0],
        optimizer_bytes_per_chip=held[1],
        ema_bytes_per_chip=held[2],
        temp_bytes_per_chip=memory.temp,
        host_bytes_per_chip=memory.host,
        flops_per_chip=None if costs is None else costs.flops,
        model_flops_per_chip=model_flops,
        hbm_bytes_per_chip=None if costs is None else costs.memory_bytes,
        estimated_step_seconds=estimated,
        roofline_seconds=roofline,
        idle_share=idle,
        mfu_bound=None if not slowest else model_flops / (chip.peak_flops * slowest),
        tokens_per_step=tokens,
        tokens_per_second_per_chip=None if not seconds else tokens / seconds / target.n_devices,
        estimate_from=None if not seconds else "roofline" if estimated is None else "xla",
        collectives=rows,
        kernels=None if costs is None else _kernels(costs),
        lower_seconds=times.lower_seconds,
        compile_seconds=times.compile_seconds,
        cpu_seconds=times.cpu_seconds,
        peak_rss_bytes=times.peak_rss_bytes,
        hlo_bytes=None if text is None else len(text.encode()),
    )


def loops_of(cfg: ExperimentConfig) -> Loops:
    """What is known of the step's loops before it runs."""
    tokens = cfg.batch.micro_batch * cfg.data.seq_len // cfg.mesh.token_shards
    experts = cfg.model.n_experts // cfg.mesh.expert_shards  # of a device
    plan, n_micro = plan_of(cfg), cfg.batch.end // cfg.batch.micro_batch
    return Loops(
        n_micro=n_micro if plan is None else int(plan.orders(n_micro).n_ticks),
        expert_rows=-(-tokens * cfg.model.top_k // cfg.moe.dispatch_chunks // experts),
        shares=shares(cfg),
    )


def _collectives(module: Module, target: Target, mesh: Any) -> tuple[list[dict[str, Any]], float]:
    """Collectives added up by axes and kind, and seconds of the busiest axis."""
    from v3jax.aot import devices  # brings jax, which a table need not wait for

    found = read_collectives(module, dict(mesh.shape))
    speeds = {
        axes: devices.speed(target.chip, devices.along(mesh, axes))
        for axes in {c.axes for c in found}
    }
    timed = [(c, c.count * c.sent / speeds[c.axes]) for c in found]
    rows: dict[tuple[tuple[str, ...], str, bool], dict[str, Any]] = {}
    for collective, seconds in timed:
        row = rows.setdefault(
            (collective.axes, collective.kind, collective.certain),
            {
                "axis": " x ".join(collective.axes),
                "kind": collective.kind,
                "count": 0,
                "bytes_per_chip": 0,
                "link_seconds": 0.0,
                "async": 0,
                "overlapped": 0,
                "certain": collective.certain,
            },
        )
        row["count"] += collective.count
        row["bytes_per_chip"] += collective.count * collective.sent
        row["link_seconds"] += seconds
        row["async"] += collective.count * collective.asynchronous
        row["overlapped"] += collective.count * collective.overlapped
    ordered = sorted(rows.values(), key=lambda row: -row["link_seconds"])
    return ordered, _busiest(timed)


def _busiest(seconds: Iterable[tuple[Collective, float]]) -> float:
    """Seconds in which the links of the busiest mesh axis carry what they have to."""
    by_axis: dict[str, float] = {}
    for collective, each in seconds:
        for axis in collective.axes:
            by_axis[axis] = by_axis.get(axis, 0.0) + each
    return max(by_axis.values(), default=0.0)


def _at_peak(costs: Costs, chip: Chip) -> float:
    """Seconds of the matrix products, those of FP8 kernels at the rate of FP8."""
    fp8 = sum(k.flops for name, k in costs.kernels.items() if name.startswith("fp8_"))
    return (costs.matrix_flops - fp8 + fp8 / chip.fp8_speedup) / chip.peak_flops


def _kernels(costs: Costs) -> list[dict[str, Any]]:
    return [
        {"name": name, "count": k.count, "flops": k.flops, "bytes": k.bytes}
        for name, k in sorted(costs.kernels.items(), key=lambda item: -item[1].flops)
    ]


# ---- The table


def table(report: Mapping[str, Any]) -> str:
    """A report as aligned lines of text."""
    r = report
    roofline = r["roofline_seconds"]
    rows = [
        ("experiment", r["exp"]),
        ("target", f"{r['target']}, {r['n_devices']:,} devices"),
        ("fits", "yes" if r["fits"] else f"no, {_gib(r['over_bytes'] or None)} too much"),
        (
            "memory a device",
            f"{_gib(r['memory_bytes_per_chip'])} of {_gib(r['memory_limit_bytes'])}",
        ),
        ("  parameters", _gib(r["parameter_bytes_per_chip"])),
        ("  optimizer", _gib(r["optimizer_bytes_per_chip"])),
        ("  average", _gib(r["ema_bytes_per_chip"])),
        ("  temporaries", _gib(r["temp_bytes_per_chip"])),
        ("host memory a device", _gib(r["host_bytes_per_chip"])),
        ("tokens a step", f"{r['tokens_per_step']:,}"),
        ("FLOPs a device and step", _number(r["flops_per_chip"])),
        ("  of the model", _number(r["model_flops_per_chip"])),
        ("memory traffic", _gib(r["hbm_bytes_per_chip"])),
        ("seconds of products at peak", _number(roofline and roofline["flops"])),
        ("  of memory traffic", _number(roofline and roofline["memory"])),
        ("  of the busiest links", _number(roofline and roofline["links"])),
        ("seconds a step by XLA", _number(r["estimated_step_seconds"])),
        ("  of it idle in the pipeline", f"{r['idle_share']:.1%}"),
        ("MFU at most", "unknown" if r["mfu_bound"] is None else f"{r['mfu_bound']:.1%}"),
        (
            "tokens a second and device",
            f"{_number(r['tokens_per_second_per_chip'])} ({r['estimate_from']})"
            if r["estimate_from"]
            else "unknown",
        ),
        (
            "compiled in",
            f"{r['compile_seconds']:.1f} s after {r['lower_seconds']:.1f} s of lowering",
        ),
        ("  by the processors", f"{r['cpu_seconds']:.1f} s, {_gib(r['peak_rss_bytes'])}"),
    ]
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {value}" for label, value in rows]
    if r["collectives"]:
        lines += [
            "",
            _COLLECTIVE.format("axis", "collective", "times", "GiB", "s", "async", "beside"),
        ]
        lines += [
            _COLLECTIVE.format(
                row["axis"],
                row["kind"] + ("" if row["certain"] else " (if balanced)"),
                row["count"],
                f"{row['bytes_per_chip'] / GIB:.3f}",
                f"{row['link_seconds']:.4f}",
                row["async"],
                row["overlapped"],
            )
            for row in r["collectives"]
        ]
    if r["kernels"]:
        lines += ["", _KERNEL.format("kernel", "times", "FLOPs", "GiB")]
        lines += [
            _KERNEL.format(
                row["name"], row["count"], f"{row['flops']:.4g}", f"{row['bytes'] / GIB:.3f}"
            )
            for row in r["kernels"]
        ]
    return "\n".join(lines)


_COLLECTIVE = "{:<22} {:<30} {:>8} {:>12} {:>10} {:>8} {:>8}"
_KERNEL = "{:<40} {:>8} {:>12} {:>12}"


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / GIB:,.3f} GiB"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.4g}"
