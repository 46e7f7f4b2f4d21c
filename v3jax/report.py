"""`report.html`: one self-contained page of a run, drawn as inline SVG.

Loss curves, learning rate and batch size, imbalance, the experts' loads over time, baselines on
the same held-out text, samples and the needle test. Dims: S recorded steps, L MoE layers (MTP
last), E experts.
"""

import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 264, 76, 32
_FEW_POINTS = 25
_COLOURS = ("#2563a8", "#c2410c", "#15803d", "#7c3aed")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.sub { color: #5b6675; margin-top: .2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
  border-bottom: 1px solid #e3e7ed; }
  td.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #5b6675; }
.key { color: #5b6675; font-size: .85rem; } .key span { margin-right: 1.2em; white-space: nowrap; }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .4em; border: 1px solid
  #e3e7ed; vertical-align: -.1em; }
@media (max-width: 600px) { body { margin: 1rem auto; } svg text { font-size: 20px; } }
pre { background: #f5f7fa; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: .6rem 0; } figcaption { color: #5b6675; font-size: .9rem; }
"""


@dataclass(frozen=True)
class Line:
    """One curve: a name and its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Needles:
    """What the needle test found, for L lengths and D depths."""

    lengths: Sequence[int]
    """Tokens of the contexts."""
    depths: Sequence[int]
    """Percent of the haystack before the needle."""
    score_DL: Sequence[Sequence[float]]
    """Mean scores, from 1 to 10."""
    exact_DL: Sequence[Sequence[float]]
    """Shares of right answers."""
    needles: int
    """Contexts of a cell."""

    @property
    def exact_L(self) -> list[float]:
        """Share of right answers at each length."""
        return np.mean(self.exact_DL, axis=0).tolist()

    @property
    def exact(self) -> float:
        """Share of right answers in all cells."""
        return float(np.mean(self.exact_DL))

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(vars(self)) + "\n"

    @classmethod
    def from_text(cls, text: str, origin: str) -> "Needles":
        """What `to_text` gave.

        Raises:
          ValueError: the text is something else.
        """
        try:
            found = cls(**json.loads(text))
            shape = (len(found.depths), len(found.lengths))
            if np.shape(found.score_DL) == np.shape(found.exact_DL) == shape:
                return found
        except (ValueError, TypeError):
            pass
        raise ValueError(f"{origin}: damaged; delete it, and evaluate --tasks=needle again")


def line(rows: Sequence[dict[str, Any]], key: str, name: str) -> Line:
    """The curve of one metric over steps, from the rows that have a finite value."""
    kept = [r for r in rows if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
    return Line(name, [r["step"] for r in kept], [r[key] for r in kept])


def chart(lines: Sequence[Line], label: str) -> str:
    """An SVG line chart with axes, grid and legend; empty lines are left out."""
    lines = [item for item in lines if len(item.x)]
    if not lines:
        return "<p>nothing recorded</p>"
    xs = [v for item in lines for v in item.x]
    ys = [v for item in lines for v in item.y]
    x_at = _scale(min(xs), max(xs), _LEFT, _WIDTH - 10)
    low, high = _padded(min(ys), max(ys))
    y_at = _scale(low, high, _HEIGHT - _BOTTOM, 12)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    for tick in _ticks(low, high):
        y = y_at(tick)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - 10}" stroke="#e3e7ed"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _ticks(min(xs), max(xs)):
        x, y = x_at(tick), _HEIGHT - _BOTTOM + 18
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{tick:.4g}</text>')
    for i, item in enumerate(lines):
        colour = _COLOURS[i % len(_COLOURS)]
        points = " ".join(
            f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in zip(item.x, item.y, strict=True)
        )
        if len(item.x) <= _FEW_POINTS:
            for x, y in (point.split(",") for point in points.split()):
                parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>')
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
    parts.append(f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 4}" text-anchor="end">step</text></svg>')
    colours = {item.name: _COLOURS[i % len(_COLOURS)] for i, item in enumerate(lines)}
    return _key(colours) + "".join(parts)


def _key(colours: Mapping[str, str]) -> str:
    """What colours stand for, in a line that breaks where the page is narrow."""
    spans = (
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for name, colour in colours.items()
    )
    return f'<p class="key">{"".join(spans)}</p>'


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """About five round values within a range."""
    raw = (high - low) / 5 or 1.0
    power = 10 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def heat_map(steps_S: Sequence[int], load_SE: np.ndarray, title: str) -> str:
    """Relative load of each expert (1 = perfectly balanced) over steps, for one layer."""
    mean_S1 = np.maximum(load_SE.mean(1, keepdims=True), 1e-9)
    relative_SE = load_SE / mean_S1
    n_steps, n_experts = relative_SE.shape
    cell_w = (_WIDTH - _LEFT - 10) / n_steps
    cell_h = max(2.0, min(9.0, 240 / n_experts))
    bottom = 8 + cell_h * n_experts
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {bottom + 26:.0f}" role="img" '
        f'aria-label="{html.escape(title)}">'
        f'<text x="{_LEFT - 6}" y="16" text-anchor="end">0</text>'
        f'<text x="{_LEFT - 6}" y="{bottom:.0f}" text-anchor="end">{n_experts - 1}</text>'
    ]
    for s in range(n_steps):
        for e in range(n_experts):
            x, y = _LEFT + s * cell_w, 8 + e * cell_h
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell_w + 0.3:.1f}" height="{cell_h:.1f}" '
                f'fill="{_heat(float(relative_SE[s, e]))}"/>'
            )
    y = bottom + 20
    parts.append(f'<text x="{_LEFT}" y="{y:.0f}">step {steps_S[0]}</text>')
    parts.append(
        f'<text x="{_WIDTH - 10}" y="{y:.0f}" text-anchor="end">{steps_S[-1]}</text></svg>'
    )
    return "".join(parts)


def _heat(relative: float) -> str:
    """White at 1, blue towards 0, orange towards 3 and above."""
    if relative < 1:
        t = 1 - max(relative, 0.0)
        return f"rgb({255 - 218 * t:.0f},{255 - 156 * t:.0f},{255 - 87 * t:.0f})"
    t = min((relative - 1) / 2, 1.0)
    return f"rgb({255 - 61 * t:.0f},{255 - 190 * t:.0f},{255 - 243 * t:.0f})"


def colour_key() -> str:
    """The heat maps' colours beside the loads they stand for."""
    return _key(
        {
            f"{relative:g} x mean" + (" or more" if relative == 3 else ""): _heat(relative)
            for relative in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
        }
    )


def table(rows: Sequence[tuple[str, str]]) -> str:
    """A two-column table of names and figures."""
    cells = (
        f'<tr><td>{html.escape(name)}</td><td class="n">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table>{''.join(cells)}</table>"


def render(
    *,
    name: str,
    mtp_depth: int,
    rows: Sequence[dict[str, Any]],
    loads: Sequence[dict[str, Any]],
    figures: Sequence[tuple[str, str]],
    bits_per_byte: Sequence[tuple[str, float]],
    samples: Sequence[Sample],
    needles: Needles | None = None,
) -> str:
    """The page of a run.

    Args:
      mtp_depth: how many of the layers in `loads`, the last ones, are MTP modules.
      rows: rows of `metrics.jsonl`.
      loads: rows of `loads.jsonl`, `load` being `[L][E]` counts.
      figures: the run's closing figures.
      bits_per_byte: the model and the baselines on the same held-out text.
      samples: what the model wrote.
      needles: the needle test, if it was made.
    """
    losses = [
        line(rows, "loss", "training loss"),
        *([line(rows, "mtp_loss", "MTP loss")] if mtp_depth else []),
        line(rows, "eval_loss", "held-out loss"),
        line(rows, "eval_loss_ema", "held-out, averaged weights"),
    ]
    sections = [
        f"<h1>{html.escape(name)}</h1>",
        '<p class="sub">A v3jax run. Losses in nats a token.</p>',
        table(figures),
        "<h2>Loss</h2>",
        chart(losses, "loss over steps"),
    ]
    if bits_per_byte:
        compared = [(n, f"{value:.3f}") for n, value in bits_per_byte]
        sections += ["<h2>Held-out text, bits a byte</h2>", table(compared)]
    sections += [
        "<h2>Balance of the experts</h2>",
        "<p>Maximal violation: (largest load - mean) / mean, averaged over layers.</p>",
        chart([line(rows, "max_violation", "max violation")], "maximal violation over steps"),
        *_heat_maps(loads, mtp_depth),
        "<h2>Schedules</h2>",
        chart([line(rows, "lr", "learning rate")], "learning rate over steps"),
        chart([line(rows, "batch_size", "batch, sequences")], "batch size over steps"),
    ]
    if samples:
        sections.append("<h2>Samples</h2>")
        sections += [
            f"<pre><b>{html.escape(s.prompt)}</b>{html.escape(s.text)}</pre>" for s in samples
        ]
    page = _page(name, sections)
    return page if needles is None else with_needles(page, needles)


def with_needles(page: str, needles: Needles) -> str:
    """A run's page with the map of this needle test at its end, in place of an earlier one."""
    page = re.sub(r'<section id="needle">.*?</section>', "", page, flags=re.DOTALL)
    body, end, rest = page.rpartition("</body>")
    return f'{body}<section id="needle">{_needle_section(needles)}</section>{end}{rest}'


def needle_page(name: str, needles: Needles) -> str:
    """A page with the needle test alone (report figure 8)."""
    return _page(name, [f"<h1>{html.escape(name)}</h1>", _needle_section(needles)])


def _needle_section(needles: Needles) -> str:
    lines = [
        (f"{n:,} tokens", f"{x:.0%}") for n, x in zip(needles.lengths, needles.exact_L, strict=True)
    ]
    many = "one context" if needles.needles == 1 else f"{needles.needles} contexts"
    return (
        "<h2>Needle in a haystack</h2>"
        "<p>Mean score of each cell, 1 to 10: a key's value stands at some depth of a context, and "
        f"its end asks for it; {many} a cell. Right answers: {needles.exact:.1%}.</p>"
        + _key({f"score {score}": _score_colour(score) for score in (1, 3, 5, 7, 9, 10)})
        + needle_map(needles)
        + f"<p>Right answers by length:</p>{table(lines)}"
    )


def needle_map(needles: Needles) -> str:
    """The heat map of report figure 8: lengths from left to right, depths from top to bottom."""
    left, cell_h = _LEFT + 16, 18
    cell_w = (_WIDTH - left - 10) / len(needles.lengths)
    bottom = 4 + cell_h * len(needles.depths)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {bottom + 42}" role="img" '
        'aria-label="needle test, score by depth and length">'
    ]
    for d, depth in enumerate(needles.depths):
        y = 4 + d * cell_h
        parts.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{depth}%</text>')
        for n, length in enumerate(needles.lengths):
            score, exact = needles.score_DL[d][n], needles.exact_DL[d][n]
            parts.append(
                f'<rect x="{left + n * cell_w:.1f}" y="{y}" width="{cell_w - 1:.1f}" '
                f'height="{cell_h - 1}" fill="{_score_colour(score)}"><title>{length:,} tokens, '
                f"depth {depth}%: score {score:.1f}, right {exact:.0%}</title></rect>"
            )
    for n, length in enumerate(needles.lengths):
        x = left + (n + 0.5) * cell_w
        label = f"{length / 1024:.0f}K" if length >= 10_000 else str(length)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<text x="{left}" y="{bottom + 36}">depth of the needle downwards, tokens of the context '
        "to the right</text></svg>"
    )
    return "".join(parts)


def _score_colour(score: float) -> str:
    """Red at 1, yellow halfway, green at 10."""
    t = (min(max(score, 1.0), 10.0) - 1) / 9
    red, yellow, green = np.array([[214, 69, 65], [245, 215, 110], [46, 160, 87]], float)
    colour = red + (yellow - red) * t * 2 if t < 0.5 else yellow + (green - yellow) * (t * 2 - 1)
    return "rgb({:.0f},{:.0f},{:.0f})".format(*colour)


def specialisation_page(name: str, sources: Sequence[str], load_DLE: np.ndarray) -> str:
    """A page with each MoE layer's expert loads by source (report figure 9).

    Args:
      load_DLE: choices of each expert, for D sources in the order of their names.
    """
    mean_DL1 = np.maximum(load_DLE.mean(axis=2, keepdims=True), 1e-9)
    relative_DLE = load_DLE / mean_DL1
    sections = [
        f"<h1>{html.escape(name)}</h1>",
        '<p class="sub">Load of each expert (from left to right) by source of held-out text, over '
        "that of perfect balance.</p>",
        colour_key(),
    ]
    for layer in range(load_DLE.shape[1]):
        svg = _source_map(sources, relative_DLE[:, layer], f"MoE layer {layer}")
        sections.append(f"<figure><figcaption>MoE layer {layer}</figcaption>{svg}</figure>")
    return _page(name, sections)


def _source_map(sources: Sequence[str], relative_DE: np.ndarray, title: str) -> str:
    left, cell_h = 150, 30
    n_sources, n_experts = relative_DE.shape
    cell_w = (_WIDTH - left - 10) / n_experts
    bottom = 4 + cell_h * n_sources
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {bottom + 24}" role="img" aria-label="{html.escape(title)}">'
    ]
    for d, source in enumerate(sources):
        y = 4 + d * cell_h
        label = html.escape(source.removeprefix("package:")[:14])
        parts.append(f'<text x="{left - 8}" y="{y + 21}" text-anchor="end">{label}</text>')
        for e, relative in enumerate(relative_DE[d]):
            parts.append(
                f'<rect x="{left + e * cell_w:.1f}" y="{y}" width="{cell_w + 0.3:.1f}" '
                f'height="{cell_h - 2}" fill="{_heat(float(relative))}">'
                f"<title>{html.escape(source)}, expert {e}: {relative:.2f} x mean</title></rect>"
            )
    parts.append(f'<text x="{left}" y="{bottom + 18}">expert 0</text>')
    parts.append(
        f'<text x="{_WIDTH - 10}" y="{bottom + 18}" text-anchor="end">{n_experts - 1}</text></svg>'
    )
    return "".join(parts)


def _page(title: str, sections: Sequence[str]) -> str:
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "".join(sections)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _heat_maps(loads: Sequence[dict[str, Any]], mtp_depth: int) -> list[str]:
    """The colours' key and one map a layer, with at most 80 columns."""
    if not loads or not loads[0]["load"]:
        return []
    thinned = loads[:: math.ceil(len(loads) / 80)]
    steps_S = [row["step"] for row in thinned]
    load_SLE = np.array([row["load"] for row in thinned], dtype=np.float64)
    n_moe = load_SLE.shape[1] - mtp_depth
    titles = [f"MoE layer {i}" for i in range(n_moe)] + [
        f"MTP module {k}" for k in range(mtp_depth)
    ]
    maps = [
        f"<figure><figcaption>{title}</figcaption>{heat_map(steps_S, load_SLE[:, i], title)}"
        "</figure>"
        for i, title in enumerate(titles)
    ]
    return ["<p>Load of each expert (from top to bottom) over the steps:</p>", colour_key(), *maps]


def distillation_page(
    name: str, figures: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> str:
    """A page on the loop of reasoning data (report section 5.1).

    Args:
      name: the experiment that was fine-tuned.
      figures: what `distill.loop` found.
      rows: some of the samples that were written.
    """
    made, asked = figures["distilled"], {"plain": "as it is", "reasoned": "under the system prompt"}
    solved = [
        (f"{when}, asked {asked[how]}", f"{rate:.1%} solved, {length:.0f} tokens an answer")
        for when in ("before", "after")
        for how, (rate, length) in figures[when].items()
    ]
    wrote = [
        ("problems", f"{made['problems']:,}"),
        ("answers", f"{made['answers']:,}"),
        ("right", f"{made['right'] / max(made['answers'], 1):.1%}"),
        ("problems solved, kept in two forms each", f"{made['solved']:,}"),
        ("tokens of a kept answer", f"{made['tokens_kept']:.0f}"),
        ("tokens of an original answer", f"{made['tokens_original']:.0f}"),
    ]
    samples = []
    for row in rows:
        turns = (f"<b>{m['role']}</b> {html.escape(m['content'])}" for m in row["messages"])
        samples.append("<pre>" + "\n".join(turns) + "</pre>")
    return _page(
        name,
        [
            f"<h1>{html.escape(name)}</h1>",
            '<p class="sub">Reasoning data from an expert: generated, checked by a rule, '
            "fine-tuned on.</p>",
            f"<h2>{figures['held_out_problems']:,} held-out problems</h2>",
            table(solved),
            "<h2>The expert</h2>",
            table(wrote),
            "<h2>Samples</h2>",
            *samples,
        ],
    )
