"""Ablations: real runs of seconds, kept and continued; intervals against known ones."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import mini
from v3jax import ablation, train
from v3jax.ablation import ablate, closing, difference, estimate, verdict

VARIANTS = {"loss_free": [], "none": ["balance.strategy=none"]}
SHORT = ["run.total_tokens=512", "run.eval_every=0", "run.checkpoint_every=0"]


def runs(folder: Path, **options: Any) -> dict[str, list[ablation.Run]]:
    return ablate(mini.config(), VARIANTS, folder=folder, seeds=(0, 1), settings=SHORT, **options)


@pytest.mark.slow
def test_every_variant_runs_on_every_seed_and_is_kept(tmp_path: Path) -> None:
    log = io.StringIO()
    found = runs(tmp_path, log=log)
    assert log.getvalue().count("done: ") == 4
    assert {n: [r.seed for r in some] for n, some in found.items()} == {
        "loss_free": [0, 1],
        "none": [0, 1],
    }
    for name, some in found.items():
        for run in some:
            assert run.folder == tmp_path / name / str(run.seed)
            steps, loss = run.curve("loss")
            assert (np.diff(steps) == 1).all()
            assert np.isfinite(loss).all()
            assert run.loads[0]["load"]
            assert run.cfg.balance.strategy == name
    # One seed is one order of data and one start: the first step's loss is the same.
    first = [[run.curve("loss")[1][0] for run in some] for some in found.values()]
    np.testing.assert_allclose(first[0], first[1], rtol=1e-6)
    assert first[0][0] != first[0][1]

    again = runs(tmp_path)
    assert [r.rows for r in again["none"]] == [r.rows for r in found["none"]]
    text = ablation.table(found, {"MaxViolation": closing("max_violation", 3)})
    assert text.splitlines()[0].split() == ["variant", "MaxViolation"]
    assert "±" in text.splitlines()[1]


def test_a_stopped_run_stops_the_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = train.Result(3, False, None, None)
    monkeypatch.setattr(train, "run", lambda cfg, folder: stopped)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
        runs(tmp_path)


@pytest.mark.parametrize("name", ["", "a/b", "..", "."])
def test_a_variant_is_named_like_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="usable as a folder's name"):
        ablate(mini.config(), {name: []}, folder=tmp_path)


def test_a_wrong_setting_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean loss_free"):
        ablate(mini.config(), {"x": [], "y": ["balance.strategy=lossfree"]}, folder=tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_interval_is_students() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (found.low, found.high) == (2.0 - found.half, 2.0 + found.half)
    assert str(found) == "2 ± 2.5"
    assert str(estimate([0.5])) == "0.5"
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_a_difference_is_taken_seed_by_seed(tmp_path: Path) -> None:
    def run(seed: int) -> ablation.Run:
        return ablation.Run("x", seed, tmp_path, mini.config())

    both = {"a": [run(10), run(20)], "b": [run(9), run(19)]}
    found = difference(both, lambda r: float(r.seed), "a", "b")
    assert (found.mean, found.half) == (1.0, 0.0)


def test_a_relative_difference_is_of_smoothed_losses(tmp_path: Path) -> None:
    """As of one tenth of what is new each step; one outlier fades, a gap stays."""
    losses = {"a": [4.0, 4.0, 3.0, 3.0, 3.0], "b": [2.0, 2.0, 2.0, 2.0, 2.0]}
    made = {}
    for name, values in losses.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": i, "loss": v}) for i, v in enumerate(values)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        made[name] = ablation.Run(name, 0, tmp_path / name, mini.config())
    got = ablation.relative_difference(made["a"], made["b"])
    np.testing.assert_allclose(got, [1, 1, 0.95, 0.905, 0.8645])
    np.testing.assert_allclose(ablation.relative_difference(made["a"], made["a"]), np.zeros(5))


@pytest.mark.slow
def test_runs_beside_each_other_are_the_same_runs(tmp_path: Path) -> None:
    alone = runs(tmp_path / "alone")
    beside = runs(tmp_path / "beside", workers=2, held_out=True)
    for name in VARIANTS:
        for one, other in zip(alone[name], beside[name], strict=True):
            np.testing.assert_array_equal(one.curve("loss")[1], other.curve("loss")[1])
            assert (other.folder / "by_source.json").exists()
            assert (other.folder / "acceptance.json").exists()
            assert other.sources[0].tokens > 0
            assert 0 <= ablation.accepted(other) <= 1
            assert ablation.global_violation(other) >= 0
            assert math.isnan(ablation.specialisation(other))  # of a single source


@pytest.mark.slow
def test_a_run_that_fails_ends_the_others(tmp_path: Path) -> None:
    variants = {"good": [], "bad": ["data.path=/nowhere"]}
    with pytest.raises(ValueError, match="/nowhere"):
        ablate(mini.config(), variants, folder=tmp_path, settings=SHORT, workers=2)


@pytest.mark.slow
def test_workers_know_the_rules_of_the_experiments_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from tests import mini\n"
        "from v3jax.optim.router_bias import bias_rule\n"
        "from v3jax.registry import register\n"
        "@bias_rule\n"
        "def still(bias_LE, load_LE, speed):\n"
        "    return bias_LE + 0.5\n"
        "@register\n"
        "def mine():\n"
        "    return mini.config()\n"
    )
    found = ablate(
        str(file),
        {"a": ["balance.bias_rule=still"], "b": []},
        folder=tmp_path,
        seeds=(0,),
        settings=SHORT,
        workers=2,
    )
    (run,) = found["a"]
    assert run.curve("bias_mean")[1][0] == pytest.approx(0.5)


def test_cores_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 5, 7})
    assert ablation._shares(2) == [[0, 2, 7], [1, 5]]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3})
    assert ablation._shares(2) == [[3], [3]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([-0.2, -0.21, -0.19], "lower"),
        ([0.2, 0.21, 0.19], "higher"),
        ([-0.2, 0.21, 0.1], "no difference beyond chance"),
        ([-0.2], "one seed says nothing of chance"),
    ],
)
def test_a_verdict_is_the_intervals(values: list[float], said: str) -> None:
    text = verdict(estimate(values), "loss, a - b")
    assert text.startswith("loss, a - b: ")
    assert text.endswith(f": {said}")
