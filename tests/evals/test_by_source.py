"""Held-out figures by source, against the loss and loads of single documents."""

from pathlib import Path

import numpy as np
import pytest

from tests import mini
from v3jax import config
from v3jax.evals.by_source import (
    SourceFigures,
    by_source,
    max_violation_global,
    specialisation,
)
from v3jax.metrics import read_rows
from v3jax.models import load_run


def figures(load: list[list[int]]) -> SourceFigures:
    return SourceFigures("s", 1, 10, 1.0, 1.0, np.array(load))


def test_a_source_has_the_held_out_loss_of_its_run() -> None:
    run = mini.finished()
    (found,) = by_source(run)
    cfg = load_run(run)[0]
    assert found.name == "user"
    assert found.documents > 1
    assert found.load_LE.shape == (cfg.model.n_moe_layers, cfg.model.n_experts)
    # Each input position that holds a token sends it to top_k experts.
    assert found.load_LE.sum() % cfg.model.top_k == 0
    assert found.load_LE.sum() >= found.tokens * cfg.model.top_k
    (few,) = by_source(run, max_rows=3)
    assert 0 < few.tokens <= 3 * cfg.data.seq_len
    closing = read_rows(run / "metrics.jsonl")[-1]["eval_loss"]
    assert found.loss == pytest.approx(closing, rel=0.15)  # of other rows of the same documents
    assert found.bits_per_byte > 1


def test_the_average_is_evaluated_where_asked_for() -> None:
    run = mini.finished()
    assert by_source(run, ema=True, max_rows=4)[0].loss != by_source(run, max_rows=4)[0].loss


def test_relative_load_is_one_where_experts_are_used_alike() -> None:
    found = figures([[5, 5, 5, 5], [20, 0, 0, 0]])
    np.testing.assert_allclose(found.relative_load, [[1, 1, 1, 1], [4, 0, 0, 0]])


def test_sources_that_share_no_expert_are_specialised_and_equal_ones_are_not() -> None:
    one, other, third = figures([[9, 1, 0, 0]]), figures([[0, 0, 3, 3]]), figures([[18, 2, 0, 0]])
    assert specialisation([one, other]) == pytest.approx(1.0)
    assert specialisation([one, third]) == pytest.approx(0.0)
    assert specialisation([one, other, third]) == pytest.approx(2 / 3)


def test_global_violation_is_of_all_sources_together() -> None:
    found = [figures([[4, 0], [3, 1]]), figures([[0, 4], [3, 1]])]
    assert max_violation_global(found) == pytest.approx((0 + 0.5) / 2)


def test_a_run_on_synthetic_data_has_no_sources(tmp_path: Path) -> None:
    cfg = config.override(mini.config(total_tokens=4 * 32.0), ["data.synthetic=True"])
    mini.run_here(cfg, tmp_path)
    with pytest.raises(ValueError, match="trained on synthetic data"):
        by_source(tmp_path)
