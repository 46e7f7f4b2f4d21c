"""What a run takes on a cluster: days, device hours, money, and what moves them.

A plan starts from a speed: the throughput that the DeepSeek-V3 technical report measured (section
1), or what `v3jax.aot` read from the compiled step, which is a lower bound on the time of a step.
`sensitivity` says how many days it becomes with another utilisation, with time lost to pipeline
bubbles, and with experts that are unevenly loaded.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v3jax.config import ExperimentConfig

REPORT_HOURS = {  # report table 1, H800 hours
    "pre-training": 2_664_000.0,
    "context extension": 119_000.0,
    "post-training": 5_000.0,
}
REPORT_BUBBLE = 2.06 / 19.926
"""Idle share of a step on 2048 GPUs, "Insights into DeepSeek-V3" (arXiv 2505.09343), table 4."""
_UTILISATIONS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
_OVERLOADS = (1.1, 1.25, 1.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One experiment at one speed."""

    source: str
    """Where the speed comes from."""
    n_devices: int
    device_hours: float
    days: float
    dollars: float
    mfu: float
    """Model FLOPs over the devices' peak."""
    tokens_per_second: float
    """Of one device."""
    bubble: float
    """Idle share of a step that is in it already."""


def plan(
    cfg: ExperimentConfig,
    *,
    source: str,
    n_devices: int,
    device_seconds_per_token: float,
    mfu: float,
    bubble: float,
    price: float,
) -> Plan:
    """A run of `cfg.run.total_tokens` tokens at one speed and `price` dollars a device hour."""
    hours = device_seconds_per_token * cfg.run.total_tokens / 3600
    return Plan(
        source=source,
        n_devices=n_devices,
        device_hours=hours,
        days=hours / n_devices / 24,
        dollars=hours * price,
        mfu=mfu,
        tokens_per_second=1 / device_seconds_per_token,
        bubble=bubble,
    )


def from_program(cfg: ExperimentConfig, program: Mapping[str, Any], price: float) -> Plan:
    """A plan from the JSON of `v3jax.aot`: at most so fast.

    Raises:
      ValueError: the program is of another experiment or does not fit its devices.
    """
    if program["exp"] != cfg.name:
        raise ValueError(f"--aot: the program is {program['exp']}'s, not {cfg.name}'s")
    if not program["fits"]:
        raise ValueError(
            f"--aot: {program['exp']} does not fit {program['target']}; it needs "
            f"{program['over_bytes'] / 2**30:.1f} GiB more a device"
        )
    speed = program["tokens_per_second_per_chip"]
    return plan(
        cfg,
        source=f"compiled for {program['target']}, a lower bound by {program['estimate_from']}",
        n_devices=program["n_devices"],
        device_seconds_per_token=1 / speed,
        mfu=program["mfu_bound"],
        bubble=0.0,
        price=price,
    )


def read_program(file: Path) -> dict[str, Any]:
    """What `v3jax.aot --json` printed into a file.

    Raises:
      ValueError: no such file, or something else in it.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--aot: {file} cannot be read as JSON ({error})") from None
    if not isinstance(found, dict) or "tokens_per_second_per_chip" not in found:
        raise ValueError(f"--aot: {file} is no report of v3jax.aot --json")
    return found


def compile_program(exp: str, target: str, settings: list[str]) -> dict[str, Any]:
    """Runs `v3jax.aot` for a target, which takes minutes and its extra.

    Raises:
      ValueError: the compilation's one-line error.
    """
    command = [sys.executable, "-m", "v3jax.aot", f"--exp={exp}", f"--target={target}", "--json"]
    command += [f"--set={setting}" for setting in settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        line = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ValueError(f"--target={target}: {line}") from None


def bubbles(cfg: ExperimentConfig) -> dict[str, float]:
    """Idle share of a step by pipeline schedule (report table 2), at a full batch.

    In units of a chunk's forward pass: F = 1, B = 2, of which W = 1, F&B = 3. Empty without a
    pipeline, or with a batch that is no multiple of two micro-batches.
    """
    ranks, n_micro = cfg.mesh.pipe, cfg.batch.end // cfg.batch.micro_batch
    if ranks == 1:
        return {}
    idle = {
        "1F1B": (ranks - 1) * (1 + 2),
        "ZB1P": (ranks - 1) * (1 + 2 - 2),
        "DualPipe": (ranks / 2 - 1) * (3 + 2 - 3),
    }
    work = 3 * n_micro
    return {name: units / (units + work) for name, units in idle.items()}


def routed_share(cfg: ExperimentConfig, flops_per_token: float) -> float:
    """Share of a token's FLOPs in routed experts: what an uneven load stretches."""
    model = cfg.model
    weights = model.n_moe_layers * model.top_k * 3 * model.dim * model.expert_ffn_dim
    return 6 * weights / flops_per_token


def sensitivity(
    cfg: ExperimentConfig, base: Plan, flops_per_token: float
) -> list[tuple[str, float]]:
    """Days under other conditions, each changed alone.

    A bubble adds idle time to the plan's busy time; an overload of o makes every step wait for a
    device with o times the mean rows, for the share of the FLOPs that routed experts have.
    """
    rows = []
    for mfu in _UTILISATIONS:
        known = "" if mfu <= base.mfu else ", above this plan's"
        rows.append((f"MFU {mfu:.0%}{known}", base.days * base.mfu / mfu))
    busy = base.days * (1 - base.bubble)
    named = bubbles(cfg)
    idle = {f"bubble of {name}, {share:.1%}": share for name, share in named.items()}
    idle = idle or {f"bubble {share:.0%}": share for share in (0.05, 0.1, 0.2)}
    rows += [(label, busy / (1 - share)) for label, share in idle.items()]
    share = routed_share(cfg, flops_per_token)
    for overload in _OVERLOADS:
        rows.append(
            (f"fullest device at {overload:g} x the mean", base.days * (1 + share * (overload - 1)))
        )
    return rows
