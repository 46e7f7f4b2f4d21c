"""The report is one page that needs nothing else, and shows every curve, layer and sample."""

import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from tests import mini
from v3jax import report
from v3jax.metrics import read_rows


def page(**changes: Any) -> str:
    rows: list[dict[str, Any]] = [
        {
            "step": s,
            "loss": 8.0 - 0.1 * s,
            "mtp_loss": 8.5 - 0.1 * s,
            "lr": 1e-3,
            "batch_size": 8 + s,
            "max_violation": 2.0,
        }
        for s in range(20)
    ]
    rows[0] |= {"eval_loss": 8.1, "eval_loss_ema": 8.1}
    rows[-1] |= {"eval_loss": 6.3, "eval_loss_ema": 6.6}
    values: dict[str, Any] = {
        "name": "a <run>",
        "mtp_depth": 1,
        "rows": rows,
        "loads": [{"step": s, "load": [[4, 4, 4, 4], [16, 0, 0, 0]]} for s in range(20)],
        "figures": [("held-out loss", "6.3 & less")],
        "bits_per_byte": [("this model", 2.0), ("unigram", 3.0)],
        "samples": [report.Sample("def <f>", "():\n    pass")],
    }
    return report.render(**(values | changes))


def svgs(text: str) -> list[ET.Element]:
    return [ET.fromstring(s) for s in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def heat_maps(text: str) -> list[ET.Element]:
    return [s for s in svgs(text) if re.match(r"MoE|MTP", s.get("aria-label", ""))]


def test_the_page_needs_nothing_from_outside() -> None:
    for text in (page(), (mini.finished() / "report.html").read_text()):
        assert not re.search(r"<(script|link|img|iframe|object)\b|https?://|url\(|@import", text)
        assert text.count("<svg") == text.count("</svg>") == len(svgs(text))


def test_texts_are_escaped() -> None:
    text = page()
    for raw, escaped in (("a <run>", "a &lt;run&gt;"), ("def <f>", "def &lt;f&gt;")):
        assert raw not in text
        assert escaped in text
    assert "6.3 &amp; less" in text


def test_every_curve_is_drawn_and_named() -> None:
    text = page()
    for name in (
        "training loss",
        "MTP loss",
        "held-out loss",
        "held-out, averaged weights",
        "max violation",
        "learning rate",
        "batch, sequences",
    ):
        assert f"</i>{name}</span>" in text
    loss = svgs(text)[0]
    assert [len(p.get("points", "").split()) for p in loss.iter("polyline")] == [20, 20, 2, 2]


def test_points_lie_where_their_values_say() -> None:
    svg = svgs(report.chart([report.Line("a", [0, 5, 10], [1.0, 3.0, 2.0])], "a"))[0]
    points = next(svg.iter("polyline")).get("points", "").split()
    x, y = zip(*([float(v) for v in p.split(",")] for p in points), strict=True)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1])
    assert y[1] < y[2] < y[0]  # up is less
    assert y[0] - y[1] == pytest.approx(2 * (y[2] - y[1]), abs=0.2)
    for tick in svg.iter("text"):
        if tick.get("text-anchor") == "end" and tick.text == "2":
            assert float(tick.get("y", "0")) - 4 == pytest.approx(y[2], abs=0.2)
            break
    else:
        pytest.fail("no tick at 2")


def test_everything_is_inside_the_picture() -> None:
    for svg in svgs((mini.finished() / "report.html").read_text()):
        _, _, width, height = (float(v) for v in svg.get("viewBox", "").split())
        for element in svg.iter():
            x, y = float(element.get("x", "0")), float(element.get("y", "0"))
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_a_heat_map_stands_for_every_layer_and_shows_the_loads() -> None:
    maps = heat_maps(page())
    assert [s.get("aria-label") for s in maps] == ["MoE layer 0", "MTP module 0"]
    fills = [[r.get("fill") for r in s.iter("rect")] for s in maps]
    assert set(fills[0]) == {"rgb(255,255,255)"}
    assert len(fills[1]) == 80
    hot, cold = fills[1][0], fills[1][1]
    assert hot != cold
    assert fills[1] == [hot, cold, cold, cold] * 20


def test_a_long_run_has_at_most_eighty_columns() -> None:
    loads = [{"step": s, "load": [[1, 2]]} for s in range(159)]
    columns = len(list(heat_maps(page(loads=loads, mtp_depth=0))[0].iter("rect"))) / 2
    assert 40 <= columns <= 80


@pytest.mark.parametrize(("relative", "brighter"), [(0.0, 0.5), (3.0, 2.0), (2.0, 1.0)])
def test_colour_grows_with_the_distance_from_balance(relative: float, brighter: float) -> None:
    def lightness(value: float) -> float:
        return float(np.mean([int(v) for v in re.findall(r"\d+", report._heat(value))]))

    assert lightness(relative) < lightness(brighter) <= lightness(1.0) == 255


def test_steps_without_a_finite_loss_leave_the_page_whole() -> None:
    rows = [{"step": s, "loss": None if s % 2 else 5.0, "lr": float("nan")} for s in range(6)]
    text = page(rows=rows, loads=[], samples=[], bits_per_byte=[])
    assert "nan" not in text.lower()
    assert len(svgs(text)[0].findall("polyline")[0].get("points", "").split()) == 3


def test_a_run_of_one_step_has_a_page() -> None:
    rows = [{"step": 0, "loss": 5.0, "lr": 0.0, "batch_size": 8, "max_violation": 0.0}]
    assert svgs(page(rows=rows, loads=[{"step": 0, "load": [[1, 2]]}]))


def test_the_finished_page_shows_the_runs_own_numbers() -> None:
    text = (mini.finished() / "report.html").read_text()
    rows = read_rows(mini.finished() / "metrics.jsonl")
    assert f"{rows[-1]['eval_loss']:.4f}" in text
    assert f"{rows[-1]['bits_per_byte']:.3f}" in text
    for name in ("interpolated bigram", "gzip -9", "unigram", "max violation, last 20 steps"):
        assert name in text
    assert len(heat_maps(text)) == 2


def test_specialisation_is_a_map_a_layer_with_a_row_a_source() -> None:
    load_DLE = np.array([[[3, 1, 0, 0], [1, 1, 1, 1]], [[0, 0, 2, 2], [1, 1, 1, 1]]], float)
    text = report.specialisation_page("a <run>", ["prose", "package:jax"], load_DLE)
    assert "a &lt;run&gt;" in text
    first, second = heat_maps(text)
    assert [r.findtext("title") for r in first.iter("rect")][:2] == [
        "prose, expert 0: 3.00 x mean",
        "prose, expert 1: 1.00 x mean",
    ]
    assert [t.text for t in first.iter("text")][:2] == ["prose", "jax"]
    assert {r.get("fill") for r in second.iter("rect")} == {"rgb(255,255,255)"}
    assert not re.search(r"<(script|link|img|iframe|object)\b|https?://|url\(|@import", text)
