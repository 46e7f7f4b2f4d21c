"""Placement of experts: the published vector, an independent reference, what always holds."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import mini
from tests.reference import eplb as reference
from v3jax import eplb

LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def test_the_published_vector() -> None:
    placed = eplb.rebalance(LOADS, 16, 4, 2, 8)
    assert placed.phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert placed.copies[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert placed.log2phy.shape == (2, 12, 2)
    assert placed.log2phy[0, :6].tolist() == [[12, -1], [13, 15], [11, -1], [6, -1], [5, 7], [0, 2]]


def cases(n_cases: int, seed: int) -> Iterator[tuple[np.ndarray, int, int, int, int]]:
    """Random loads, half of them whole numbers with many ties and zeros, and sizes that divide."""
    rng = np.random.default_rng(seed)
    for _ in range(n_cases):
        n_nodes, of_node = rng.integers(1, 5, 2)
        n_groups = n_nodes * rng.integers(1, 4) if rng.random() < 0.6 else rng.integers(1, 6)
        n_experts = n_groups * rng.integers(1, 7)
        n_devices = n_nodes * of_node
        n_replicas = (-(-n_experts // n_devices) + rng.integers(3)) * n_devices
        shape = (rng.integers(1, 4), n_experts)
        load_LE = rng.integers(0, 5, shape) if rng.random() < 0.5 else rng.lognormal(0, 1.5, shape)
        yield load_LE, int(n_replicas), int(n_groups), int(n_nodes), int(n_devices)


def test_it_is_the_slow_reference_layer_by_layer() -> None:
    for load_LE, *sizes in cases(300, 0):
        phy2log_LPS = eplb.rebalance(load_LE, *sizes).phy2log.reshape(len(load_LE), sizes[-1], -1)
        wanted = [reference.rebalance(load_E.tolist(), *sizes) for load_E in load_LE]
        assert phy2log_LPS.tolist() == wanted, sizes


def test_the_three_arrays_say_the_same() -> None:
    for load_LE, *sizes in cases(100, 1):
        placed = eplb.rebalance(load_LE, *sizes)
        n_layers, n_experts = load_LE.shape
        assert placed.phy2log.shape == (n_layers, sizes[0])
        assert placed.copies.min() >= 1
        assert (placed.copies.sum(1) == sizes[0]).all()
        assert placed.log2phy.shape == (n_layers, n_experts, placed.copies.max())
        for layer, expert in np.ndindex(load_LE.shape):
            replicas = np.flatnonzero(placed.phy2log[layer] == expert).tolist()
            rest = placed.log2phy.shape[2] - len(replicas)
            assert placed.log2phy[layer, expert].tolist() == replicas + [-1] * rest
            assert placed.copies[layer, expert] == len(replicas)


def test_groups_stay_on_their_node() -> None:
    n_checked = 0
    for load_LE, n_replicas, n_groups, n_nodes, n_devices in cases(200, 2):
        if n_groups % n_nodes or n_nodes == 1:
            continue
        n_checked += 1
        placed = eplb.rebalance(load_LE, n_replicas, n_groups, n_nodes, n_devices)
        group_LNR = placed.phy2log // (load_LE.shape[1] // n_groups)
        for group_NR in group_LNR.reshape(len(load_LE), n_nodes, -1):
            of_node = [set(group_R.tolist()) for group_R in group_NR]
            assert {len(groups) for groups in of_node} == {n_groups // n_nodes}
            assert sum(map(len, of_node)) == n_groups
    assert n_checked > 50


def zipf(n_layers: int, n_experts: int, seed: int) -> np.ndarray:
    """Loads that fall with an expert's rank, ranks at random."""
    rng = np.random.default_rng(seed)
    ranks_LE = rng.permuted(np.tile(np.arange(1, n_experts + 1), (n_layers, 1)), axis=1)
    return rng.poisson(2e4 / ranks_LE**0.7)


@pytest.mark.parametrize(
    ("n_experts", "sizes", "at_most"),
    [
        (256, (288, 8, 4, 32), 0.4),  # the report's prefill: 32 redundant experts, section 3.4.1
        (256, (320, 8, 40, 320), 0.1),  # its decoding: one expert a device, section 3.4.2
        (256, (256, 8, 4, 32), 0.85),
        (16, (24, 4, 2, 8), 0.55),
    ],
)
def test_the_busiest_device_gets_less(
    n_experts: int, sizes: tuple[int, int, int, int], at_most: float
) -> None:
    load_LE, n_devices = zipf(20, n_experts, 0), sizes[-1]
    placed = eplb.rebalance(load_LE, *sizes)
    before = eplb.imbalance(eplb.contiguous_loads(load_LE, n_devices))
    after_LP = eplb.device_loads(load_LE, placed, n_devices)
    after = eplb.imbalance(after_LP)
    assert (after <= before).all()
    assert after.mean() < at_most * before.mean()
    np.testing.assert_allclose(after_LP.sum(1), load_LE.sum(1))


def test_ties_go_to_the_lower_index() -> None:
    placed = eplb.rebalance(np.full((1, 4), 7), 6, 1, 1, 2)
    assert placed.phy2log.tolist() == [[2, 0, 0, 3, 1, 1]]
    assert eplb.rebalance(np.zeros((1, 4)), 4, 1, 1, 4).phy2log.tolist() == [[0, 1, 2, 3]]


def test_layers_without_load_are_placed_too() -> None:
    placed = eplb.rebalance(np.zeros((2, 6)), 8, 2, 2, 4)
    assert placed.copies.min() == 1
    loads_LP = eplb.device_loads(np.zeros((2, 6)), placed, 4)
    assert eplb.imbalance(loads_LP).tolist() == [1.0, 1.0]
    assert eplb.overall(loads_LP) == 1.0


def test_before_is_successive_experts_and_overall_weighs_layers_by_load() -> None:
    load_LE = np.array([[1, 2, 3, 4], [40, 0, 0, 0]])
    loads_LP = eplb.contiguous_loads(load_LE, 2)
    assert loads_LP.tolist() == [[3, 7], [40, 0]]
    assert eplb.imbalance(loads_LP).tolist() == [1.4, 2.0]
    assert eplb.overall(loads_LP) == 47 / 25
    assert eplb.contiguous_loads(load_LE, 3).tolist() == [[3, 3, 4], [40, 0, 0]]


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((15, 4, 2, 8), "replicas=15: must be a multiple of the 8 devices"),
        ((8, 4, 2, 8), "replicas=8: must be at least the 12 experts"),
        ((16, 5, 2, 8), "groups=5: do not divide the 12 experts"),
        ((16, 4, 3, 8), "devices=8: must be a multiple of the 3 nodes"),
        ((16, 4, 0, 8), "nodes=0: must be at least 1"),
    ],
)
def test_sizes_that_do_not_divide_are_named(sizes: tuple[int, int, int, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        eplb.rebalance(LOADS, *sizes)


@pytest.mark.parametrize(
    ("load", "named"),
    [
        ([1, 2], r"\[layers, experts\]"),
        ([[]], r"\[layers, experts\]"),
        ([[1, -1]], "not negative"),
        ([[1, float("nan")]], "finite"),
    ],
)
def test_loads_that_are_none_are_refused(load: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        eplb.rebalance(np.array(load), 4, 1, 1, 2)


@pytest.mark.parametrize(
    ("phy2log", "named"),
    [([[0, 1, 1]], "expert 2 of layer 0 has no replica"), ([[0, 1, 3]], "within 0..2")],
)
def test_a_placement_holds_every_expert(phy2log: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        eplb.placement(np.array(phy2log), 3)


def run_dir(folder: Path, *rows: str) -> Path:
    (folder / "loads.jsonl").write_text("\n".join(rows))
    return folder


def test_loads_are_the_sum_of_the_last_rows(tmp_path: Path) -> None:
    rows = [json.dumps({"step": s, "load": [[10**s, 0], [1, 2]]}) for s in range(4)]
    run = run_dir(tmp_path, *rows, '{"step": 4, "lo')
    assert eplb.loads_of(run, last=2).tolist() == [[1100, 0], [2, 4]]
    assert eplb.loads_of(run, last=9).tolist() == [[1111, 0], [4, 8]]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], "holds no expert loads"),
        (['{"step": 0}'], "must be"),
        (["[]"], "must be"),
        (['{"step": 0, "load": []}'], "must be"),
        (['{"step": 0, "load": [[1, 2], [3]]}'], "must be"),
        (['{"step": 0, "load": [[1]]}', '{"step": 1, "load": [[1, 2]]}'], "the same in every"),
        (['{"step": 0, "load": [[1, -2]]}'], "must not be negative"),
    ],
)
def test_loads_that_cannot_be_used_are_named(tmp_path: Path, rows: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=rf"loads\.jsonl: .*{named}"):
        eplb.loads_of(run_dir(tmp_path, *rows), last=3)


def program(*arguments: str) -> Any:
    return mini.call(mini.command(*arguments, program="eplb"))


SIZES = ("--replicas=12", "--devices=4", "--nodes=2")


def test_the_program_plans_for_a_run(tmp_path: Path) -> None:
    run, out = f"--run={mini.finished()}", tmp_path / "placement.json"
    done = program(run, *SIZES, "--last=5", f"--out={out}")
    assert done.returncode == 0, done.stderr
    load_LE = eplb.loads_of(mini.finished(), last=5)
    assert load_LE.shape == (2, 8), "one MoE layer and one MTP module"
    placed = eplb.rebalance(load_LE, 12, mini.config().model.n_groups, 2, 4)
    found = eplb.read_placement(out)
    assert found.phy2log.tolist() == placed.phy2log.tolist()
    assert found.log2phy.tolist() == placed.log2phy.tolist()
    lines = done.stdout.splitlines()
    assert len(lines) == 5, "sizes, names of columns, two layers, overall"
    before, after = (float(text) for text in lines[-1].split()[1:])
    assert after == pytest.approx(eplb.overall(eplb.device_loads(load_LE, placed, 4)), abs=6e-4)
    assert after < before
    printed = program(run, *SIZES, "--last=5", "--json")
    assert printed.stdout == out.read_text()
    plan = json.loads(printed.stdout)
    assert plan["hierarchical"]
    assert len(plan["before"]) == len(plan["after"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ([], 2, "--run is missing"),
        (["--run=nowhere"], 2, "--replicas is missing"),
        (["--run=nowhere", *SIZES], 1, "nowhere/loads.jsonl: not found"),
        (["--run=nowhere", *SIZES, "--last=0"], 2, "last"),
        (["--run=nowhere", *SIZES, "more"], 2, "'more' is no flag"),
        (["--run=nowhere", "--replicas=many"], 2, "replicas"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], code: int, named: str) -> None:
    done = program(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert named in done.stderr


def test_mistakes_about_a_run_are_one_line(tmp_path: Path) -> None:
    run = f"--run={mini.finished()}"
    moved = tmp_path / "run"
    shutil.copytree(mini.finished(), moved)
    (moved / "config.txt").write_text("model.n_groups = 4\n")
    for arguments, code, named in (
        ((run, "--replicas=13", "--devices=4"), 2, "--replicas=13: must be a multiple of the 4"),
        ((run, *SIZES, f"--out={tmp_path}"), 1, "--out: "),
        ((f"--run={moved}", *SIZES), 1, "config.txt: "),
    ):
        done = program(*arguments)
        assert (done.returncode, done.stdout) == (code, "")
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert named in done.stderr


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "no placement"),
        ('{"n_experts": 2}', "no placement"),
        ("[]", "no placement"),
        ('{"n_experts": 2, "phy2log": [[0, 1], [0]]}', "no placement"),
        ('{"n_experts": 2, "phy2log": [0, 1]}', "whole numbers"),
        ('{"n_experts": 2, "phy2log": [[0, 0.5]]}', "whole numbers"),
        ('{"n_experts": 2, "phy2log": [[0, 0]]}', "expert 1 of layer 0 has no replica"),
        ('{"n_experts": 2, "phy2log": [[]]}', "whole numbers"),
    ],
)
def test_files_that_hold_no_placement_are_named(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=rf"p\.json: .*{named}"):
        eplb.read_placement(tmp_path / "p.json")
