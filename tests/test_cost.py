"""The derived numbers of the report, to the unit, and the program that prints them."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from v3jax import cost, registry
from v3jax.sharding import abstract_mesh
from v3jax.state import abstract_state

FULL = registry.get("v3_full")
COST = cost.cost(FULL)


@pytest.mark.parametrize(
    ("field", "count"),
    [
        ("embedding", 926_679_040),
        ("head", 926_679_040),
        ("main", 671_026_419_200),
        ("mtp", 11_610_068_224),
        ("mtp_as_stored", 13_463_426_304),
        ("active", 37_552_282_624),
        ("active_with_head", 36_625_603_584),
        ("active_body", 35_698_924_544),
    ],
)
def test_parameter_counts_of_the_full_model(field: str, count: int) -> None:
    assert getattr(cost.param_counts(FULL.model), field) == count


def n_elements(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", registry.names())
def test_counts_equal_the_shapes_the_model_declares(name: str) -> None:
    cfg = registry.get(name)
    state = abstract_state(cfg, abstract_mesh(cfg.mesh))
    counts = cost.param_counts(cfg.model)
    assert n_elements((state.params, state.router_state)) == counts.main + counts.mtp


def test_counts_follow_a_model_without_query_latent() -> None:
    cfg = registry.get("v3_tiny")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, q_latent_dim=None))
    state = abstract_state(cfg, abstract_mesh(cfg.mesh))
    counts = cost.param_counts(cfg.model)
    assert n_elements((state.params, state.router_state)) == counts.main + counts.mtp


def test_a_second_mtp_module_doubles_their_parameters() -> None:
    deeper = dataclasses.replace(FULL.model, mtp_depth=2)
    assert cost.param_counts(deeper).mtp == 2 * 11_610_068_224


def test_flops_a_token() -> None:
    assert COST.flops_per_token == pytest.approx(250.4e9, abs=0.05e9)
    assert COST.flops_per_token_non_causal == pytest.approx(281.2e9, abs=0.05e9)
    attention = 3 * 61 * 128 * (192 + 128) * 2 * 2048
    matrices = 36_625_603_584 - 61 * (2 * 7168 + 1536 + 512) - 7168
    assert COST.flops_per_token == 6 * matrices + attention


def test_mtp_adds_its_block_its_projection_and_another_pass_through_the_head() -> None:
    mtp = COST.flops_per_token_with_mtp - COST.flops_per_token
    matrices = 187_105_280 + 9 * 44_040_192 + 1_835_008 + 102_760_448 + 926_679_040
    assert mtp == 6 * matrices + 3 * 128 * (192 + 128) * 2 * 2048


def test_kv_cache_bytes_a_token() -> None:
    assert COST.kv_bytes_per_token == 70_272


def test_tokens_and_steps() -> None:
    assert COST.tokens == 14.8e12
    assert 241_000 <= COST.steps <= 243_000
    assert (COST.tokens_per_step_first, COST.tokens_per_step_last) == (12_582_912, 62_914_560)


def test_gpu_hours_and_money_of_the_report() -> None:
    assert COST.gpu_hours_per_trillion == 180_000
    assert COST.gpu_hours == pytest.approx(2_664_000)
    assert COST.days == pytest.approx(54.2, abs=0.05)
    assert COST.dollars == pytest.approx(5.328e6)
    assert COST.mfu == pytest.approx(0.3894, abs=0.003)  # published, causal


def test_price_and_speed_scale_the_cost() -> None:
    other = cost.cost(FULL, price=3.0, gpu_hours_per_trillion=100_000)
    assert other.gpu_hours == pytest.approx(1_480_000)
    assert other.dollars == pytest.approx(4.44e6)


@pytest.mark.parametrize(
    ("price", "speed", "flag"), [(-1.0, None, "--price"), (2.0, 0.0, "--gpu_hours_per_trillion")]
)
def test_impossible_prices_are_refused(price: float, speed: float | None, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        cost.cost(FULL, price, speed)


@pytest.mark.parametrize("name", registry.names())
def test_table_has_aligned_columns_for_every_experiment(name: str) -> None:
    lines = cost.table(cost.cost(registry.get(name))).splitlines()
    assert lines[0].endswith(f"  {name}")
    column = lines[0].index(name)
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)


def run(repo: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "v3jax.cost", *args],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_program_prints_one_json_object(repo: Path) -> None:
    done = run(repo, "--exp=v3_full", "--price=3", "--set", "run.total_tokens=1e12", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["params"]["main"] == 671_026_419_200
    assert printed["dollars"] == pytest.approx(540_000)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--exp=v3_ful"], "did you mean v3_full"),
        ([], "--exp: name one of"),
        (["--exp=v3_full", "--set=model.dmi=3"], "did you mean dim"),
        (["--exp=v3_full", "--price=much"], "price"),
        (["--exq=v3_full"], "exq"),
        (["v3_full"], "'v3_full' is no flag"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(
    repo: Path, args: list[str], message: str
) -> None:
    done = run(repo, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
