"""Pictures show the numbers of the runs and schedules they are given."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import mini
from v3jax.ablation import Run, closing, estimate
from v3jax.evals.by_source import SourceFigures

pytest.importorskip("matplotlib", reason="needs the extra notebooks: matplotlib")
from v3jax import plots
from v3jax.pipeline.schedule import dualpipe, gpipe, simulate
from v3jax.report import Needles


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, list[Run]]:
    """Two variants on three seeds, six steps each; no training."""
    found: dict[str, list[Run]] = {}
    for v, name in enumerate(("one", "other")):
        for seed in range(3):
            folder = tmp_path / name / str(seed)
            folder.mkdir(parents=True)
            rows = [{"step": s, "loss": 5.0 + v + seed - 0.5 * s} for s in range(6)]
            loads = [{"step": s, "load": [[1, 1, 2, 0], [4, 0, 0, 0]]} for s in range(0, 6, 2)]
            for file, entries in (("metrics", rows), ("loads", loads)):
                lines = "".join(json.dumps(entry) + "\n" for entry in entries)
                (folder / f"{file}.jsonl").write_text(lines)
            sources = [
                SourceFigures("prose", 1, 9, 2.0, 1.0, np.array([[3, 1, 0, 0], [1, 1, 1, 1]])),
                SourceFigures("code", 1, 9, 2.0, 1.0, np.array([[0, 0, 2, 2], [1, 1, 1, 1]])),
            ]
            kept = json.dumps([source.to_json() for source in sources])
            (folder / "by_source.json").write_text(kept)
            found.setdefault(name, []).append(Run(name, seed, folder, mini.config()))
    return found


@pytest.fixture(autouse=True)
def _closed() -> Any:
    yield
    plots._pyplot().close("all")


def test_curves_are_means_over_seeds_of_windows(runs: dict[str, list[Run]]) -> None:
    axes: Any = plots.curves(runs, "loss", label="loss", window=2).axes[0]
    one, other = axes.get_lines()
    np.testing.assert_array_equal(one.get_xdata(), [1, 3, 5])
    np.testing.assert_allclose(one.get_ydata(), [5.75, 4.75, 3.75])
    np.testing.assert_allclose(other.get_ydata(), [6.75, 5.75, 4.75])
    assert axes.get_ylabel() == "loss"
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    half = estimate([5.0, 6.0, 7.0]).half
    assert band.max() == pytest.approx(5.75 + half)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["one", "other"]


def test_figures_stand_against_each_other_with_intervals(runs: dict[str, list[Run]]) -> None:
    first = closing("loss", 1)
    axes: Any = plots.against(runs, first, first, labels=("x", "y")).axes[0]
    points = [(float(c[0].get_xdata()[0]), float(c[0].get_ydata()[0])) for c in axes.containers]
    assert points == [(3.5, 3.5), (4.5, 4.5)]
    assert {text.get_text() for text in axes.texts} == {"one", "other"}
    axes = plots.against(runs, first, first, labels=("x", "y"), beside="one").axes[0]
    points = [(float(c[0].get_xdata()[0]), float(c[0].get_ydata()[0])) for c in axes.containers]
    assert points == [(3.5, 0.0), (4.5, 1.0)]
    bars = axes.containers[1][2][1].get_paths()[0].vertices
    np.testing.assert_allclose(bars[:, 1], 1.0)  # the same difference on every seed


def test_bars_are_the_variants_means(runs: dict[str, list[Run]]) -> None:
    axes: Any = plots.bars(runs, closing("loss", 1), label="loss").axes[0]
    bars = zip(axes.get_yticklabels(), axes.patches, strict=True)
    widths = {label.get_text(): bar.get_width() for label, bar in bars}
    assert widths == {"one": 3.5, "other": 4.5}


def test_heat_maps_are_relative_loads(runs: dict[str, list[Run]]) -> None:
    over_time: Any = plots.load_over_time(runs, layer=1).axes[0].images[0].get_array()
    np.testing.assert_allclose(over_time[:, 0], [4, 0, 0, 0])
    assert over_time.shape == (4, 3)
    picture: Any = plots.load_by_source(runs, layer=0)
    by_source = picture.axes[0].images[0].get_array()
    np.testing.assert_allclose(by_source, [[3, 1, 0, 0], [0, 0, 2, 2]])
    assert [t.get_text() for t in picture.axes[0].get_yticklabels()] == ["prose", "code"]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install .*\[notebooks\]"):
        plots._pyplot()


def test_a_gantt_chart_has_every_operation_in_its_place() -> None:
    schedule = dualpipe(4, 8)
    axes: Any = plots.gantt(schedule).axes[0]
    spans = simulate(schedule).spans
    boxes = [c.get_paths()[0].get_extents() for c in axes.collections]
    ops = [(span, op) for span in spans for op in span.instruction]
    assert len(boxes) == len(ops) == len(axes.texts)
    for box, text, (span, op) in zip(boxes, axes.texts, ops, strict=True):
        assert (box.x0, box.x1) == (span.start, span.end)
        assert round((box.y0 + box.y1) / 2) == span.rank
        assert text.get_text() == str(op.micro)
    assert axes.get_ylim() == (3.5, -0.5), "rank 0 on top"
    names = [t.get_text() for t in axes.get_legend().get_texts()]
    assert names == ["forward", "backward", "for the input", "for the weights"]


def test_gantt_charts_below_one_another_share_their_time() -> None:
    steps = {"one": simulate(gpipe(2, 4)).spans, "other": simulate(dualpipe(4, 8)).spans}
    picture: Any = plots.gantts(steps)
    assert [axes.get_title(loc="left") for axes in picture.axes] == ["one", "other"]
    for axes, spans in zip(picture.axes, steps.values(), strict=True):
        boxes = [c.get_paths()[0].get_extents() for c in axes.collections]
        found = {(box.x0, box.x1, round((box.y0 + box.y1) / 2)) for box in boxes}
        assert found == {(span.start, span.end, span.rank) for span in spans}
        assert axes.get_xlim() == (0, max(span.end for some in steps.values() for span in some))
    names = [t.get_text() for t in picture.axes[0].get_legend().get_texts()]
    assert names == ["forward", "backward", "for the input", "for the weights"], "of all charts"


def test_lines_are_their_values_and_dashed_ones_have_their_colours() -> None:
    ys = {"one": [3.0, 4.0], "other": [float("nan"), 6.0]}
    axes: Any = plots.lines([1, 2], ys, labels=("x", "y"), dashed={"other": [7.0, 8.0]}).axes[0]
    one, other, dashed = axes.get_lines()
    for line, values in ((one, ys["one"]), (other, ys["other"]), (dashed, [7.0, 8.0])):
        np.testing.assert_array_equal(line.get_xdata(), [1, 2])
        np.testing.assert_array_equal(line.get_ydata(), values)
    assert [line.get_linestyle() for line in (one, other, dashed)] == ["-", "-", "--"]
    assert dashed.get_color() == other.get_color() != one.get_color()
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["one", "other"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "y")


def test_needle_maps_show_scores_by_depth_and_length() -> None:
    found = Needles((128, 256, 512), (0, 100), [[1, 10, 5], [4, 2, 7]], [[0, 1, 0], [0, 0, 0]], 3)
    picture: Any = plots.needle_maps({"before": found, "after": found})
    before, after, key = picture.axes
    assert (before.get_title(), after.get_title()) == ("before", "after")
    np.testing.assert_array_equal(before.get_images()[0].get_array(), found.score_DL)
    assert before.get_images()[0].get_clim() == (1, 10)
    assert [t.get_text() for t in before.get_xticklabels()] == ["128", "512"]
    assert key.get_ylabel() == "score"
