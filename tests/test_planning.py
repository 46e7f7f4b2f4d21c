"""Plans: the report's bill to the dollar, lower bounds from compiled steps, what moves them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from v3jax import cost, planning, registry
from v3jax.config import MeshConfig

FULL = registry.get("v3_full")
V5P = registry.get("v3_full_v5p")


def program(**changes: Any) -> dict[str, Any]:
    return {
        "exp": "v3_full_v5p",
        "target": "tpu:v5p:8x8x8",
        "fits": True,
        "over_bytes": 0,
        "n_devices": 512,
        "tokens_per_second_per_chip": 800.0,
        "mfu_bound": 0.45,
        "estimate_from": "xla",
    } | changes


def test_the_reports_bill_is_reproduced() -> None:
    assert sum(planning.REPORT_HOURS.values()) == 2_788_000
    assert "= 2,788,000 H800 hours, 5,576,000 dollars" in cost.report_total(2.0)
    found = cost.cost(FULL)
    base = cost.report_plan(FULL, found)
    assert base.device_hours == pytest.approx(planning.REPORT_HOURS["pre-training"])
    assert base.days == pytest.approx(found.days)
    assert base.dollars == pytest.approx(5.328e6)
    assert 14.8e12 / base.tokens_per_second / 3600 == pytest.approx(base.device_hours)


def test_a_compiled_step_gives_days_by_hand() -> None:
    found = planning.from_program(V5P, program(), price=3.0)
    hours = 14.8e12 / 800 / 3600
    assert found.device_hours == pytest.approx(hours)
    assert found.days == pytest.approx(hours / 512 / 24)
    assert found.dollars == pytest.approx(3 * hours)
    assert "lower bound" in found.source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp": "v3_tiny"}, "is v3_tiny's, not v3_full_v5p's"),
        ({"fits": False, "over_bytes": 2**31}, "2.0 GiB more"),
    ],
)
def test_a_program_that_is_another_or_too_large_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        planning.from_program(V5P, program(**changes), 2.0)


def test_bubbles_are_those_of_table_2() -> None:
    # 16 ranks, 120 micro-batches: 45, 15 and 14 units beside 360 of work
    found = planning.bubbles(FULL)
    expected = {"1F1B": 45 / 405, "ZB1P": 15 / 375, "DualPipe": 14 / 374}
    assert found == pytest.approx(expected)
    assert planning.bubbles(V5P) == {}


def test_what_moves_a_plan() -> None:
    base = planning.plan(
        V5P,
        source="x",
        n_devices=512,
        device_seconds_per_token=1e-3,
        mfu=0.4,
        bubble=0.0,
        price=1.0,
    )
    days = dict(planning.sensitivity(V5P, base, 250e9))
    assert days["MFU 20%"] == pytest.approx(2 * base.days)
    assert days["MFU 50%, above this plan's"] == pytest.approx(0.8 * base.days)
    assert days["bubble 20%"] == pytest.approx(1.25 * base.days)
    share = planning.routed_share(V5P, 250e9)
    assert share == pytest.approx(6 * 58 * 8 * 3 * 7168 * 2048 / 250e9)
    assert days["fullest device at 2 x the mean"] == pytest.approx((1 + share) * base.days)


def test_a_bubble_that_is_in_the_plan_is_not_counted_twice() -> None:
    cfg = replace(FULL, mesh=MeshConfig(pipe=16, data=2, node=8, expert=8))
    base = cost.report_plan(cfg, cost.cost(cfg))
    assert base.bubble == pytest.approx(0.1034, abs=1e-4)
    days = dict(planning.sensitivity(cfg, base, cost.cost(cfg).flops_per_token))
    one = next(value for label, value in days.items() if "1F1B" in label)
    assert one == pytest.approx(base.days * (1 - base.bubble) / (1 - 45 / 405))


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "v3jax.cost", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_program_plans_from_a_kept_report(repo: Path) -> None:
    kept = repo / "benchmarks" / "results" / "v3_full_v5p.json"
    done = run("--exp=v3_full_v5p", f"--aot={kept}", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    speed = json.loads(kept.read_text())["tokens_per_second_per_chip"]
    assert printed["plan"]["tokens_per_second"] == pytest.approx(speed)
    assert printed["days_if"]["bubble 10%"] > printed["plan"]["days"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--aot=nowhere.json"], "nowhere.json cannot be read"),
        (["--aot=setup.cfg"], "setup.cfg cannot be read as JSON"),
        (["--aot=a", "--target=b"], "exclude each other"),
        (["--target=tpu:v9:2x2"], "v9"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    repo: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(repo)
    done = run("--exp=v3_full_v5p", *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
