"""Pictures of ablations, with their uncertainty, and of schedules (extra `notebooks`).

Most functions take runs as `ablation.ablate` returns them; all give a matplotlib figure. A line of
runs is the mean over seeds, the band around it the two-sided 95% interval of that mean by Student's
t.
Dims: S steps, E experts, D sources, N runs of a variant.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from v3jax.ablation import Figure, Run, by_variant, difference, estimate
from v3jax.pipeline.schedule import Schedule, Simulation, Span, simulate
from v3jax.report import Needles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

Runs = Mapping[str, Sequence[Run]]


def curves(
    runs: Runs, metric: str, *, label: str, window: int = 20, log: bool = False
) -> "Picture":
    """A metric over the steps, one line a variant.

    Args:
      window: each point is the mean of so many recorded values, so that variants can be told apart.
    """
    picture, axes = _picture(8, 4)
    for name, some in runs.items():
        steps_S, values_NS = _smoothed(some, metric, window)
        mean_S, half_S = _bands(values_NS)
        axes.plot(steps_S, mean_S, label=name, linewidth=1.4)
        axes.fill_between(steps_S, mean_S - half_S, mean_S + half_S, alpha=0.15)
    if log:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=label)
    axes.legend(fontsize="small", ncols=2)
    return picture


def against(
    runs: Runs,
    x: Figure,
    y: Figure,
    *,
    labels: tuple[str, str],
    beside: str | None = None,
    log: bool = False,
) -> "Picture":
    """Two figures of each variant, each with its interval.

    Args:
      beside: a variant whose `y` is taken off the others', seed by seed: what they owe to a seed
        drops out, and intervals are those of the differences.
      log: a logarithmic axis for `x`.
    """
    picture, axes = _picture(8, 5)
    across, up = by_variant(runs, x), by_variant(runs, y)
    if beside is not None:
        up = {name: difference(runs, y, name, beside) for name in runs}
        axes.axhline(0, color="grey", linewidth=0.8)
    for name in runs:
        a, b = across[name], up[name]
        axes.errorbar(
            a.mean, b.mean, xerr=_bar(a.half), yerr=_bar(b.half), fmt="o", capsize=3, label=name
        )
        axes.annotate(
            name, (a.mean, b.mean), (5, 5), textcoords="offset points", fontsize="x-small"
        )
    axes.set(xlabel=labels[0], ylabel=labels[1], xscale="log" if log else "linear")
    return picture


def bars(runs: Runs, figure: Figure, *, label: str) -> "Picture":
    """One figure of each variant with its interval."""
    picture, axes = _picture(8, 0.35 * len(runs) + 1.2)
    found = by_variant(runs, figure)
    names = list(reversed(list(runs)))
    axes.barh(
        names, [found[n].mean for n in names], xerr=[_bar(found[n].half) for n in names], capsize=3
    )
    axes.set(xlabel=label)
    return picture


def load_over_time(runs: Runs, *, layer: int = 0) -> "Picture":
    """Relative load of each expert of one MoE layer over the steps, in each variant's first run."""
    picture, grid = _grid(len(runs), 3.0)
    image = None
    for axes, (name, some) in zip(grid, runs.items(), strict=True):
        load_SE = np.array([row["load"][layer] for row in some[0].loads], float)
        relative_SE = load_SE / np.maximum(load_SE.mean(axis=1, keepdims=True), 1e-9)
        steps = [row["step"] for row in some[0].loads]
        image = axes.imshow(
            relative_SE.T,
            aspect="auto",
            vmin=0,
            vmax=3,
            cmap="viridis",
            extent=(steps[0], steps[-1] + 1, load_SE.shape[1] - 0.5, -0.5),
        )
        axes.set(title=name, xlabel="step")
    grid[0].set_ylabel("expert")
    _key(picture, image, grid, "load / mean")
    return picture


def load_by_source(runs: Runs, *, layer: int = 0, seed: int = 0) -> "Picture":
    """Relative expert load by source in one MoE layer (report section 4.5.3, figure 9)."""
    picture, grid = _grid(len(runs), 2.4)
    image = None
    for axes, (name, some) in zip(grid, runs.items(), strict=True):
        figures = some[seed].sources
        relative_DE = np.stack([f.relative_load[layer] for f in figures])
        image = axes.imshow(relative_DE, aspect="auto", vmin=0, vmax=3, cmap="viridis")
        axes.set(title=name, xlabel="expert")
        axes.set_yticks(range(len(figures)), [f.name for f in figures], fontsize="small")
    for axes in grid[1:]:
        axes.set_yticklabels([])
    _key(picture, image, grid, "load / mean")
    return picture


def needle_maps(found: Mapping[str, Needles]) -> "Picture":
    """Scores of the needle test by depth and length (report figure 8), one map a name."""
    picture, grid = _grid(len(found), 3.0)
    image = None
    for axes, (name, one) in zip(grid, found.items(), strict=True):
        image = axes.imshow(one.score_DL, aspect="auto", vmin=1, vmax=10, cmap="RdYlGn")
        axes.set(title=name, xlabel="tokens", ylabel="depth, %")
        axes.set_xticks(range(len(one.lengths))[::2], map(str, one.lengths[::2]), rotation=90)
        axes.set_yticks(range(len(one.depths))[::2], map(str, one.depths[::2]))
    _key(picture, image, grid, "score")
    return picture


_COLOURS = {  # of a rank's two chunks
    "F": ("#fbd7a5", "#f0a13c"),
    "B": ("#9fd49b", "#5aa655"),
    "I": ("#d3ecce", "#a8d59f"),
    "W": ("#b5cdec", "#7ba3d6"),
}
_KINDS = {"F": "forward", "B": "backward", "I": "for the input", "W": "for the weights"}


def gantt(schedule: Schedule, simulation: Simulation | None = None) -> "Picture":
    """A pipeline schedule over time, a line a rank (report section 3.2.1, figure 5).

    Numbers are micro-batches; a rank's second chunk is darker; a pair that overlaps is one box of
    two halves.

    Args:
      simulation: of this schedule; of durations 1, 2, 1 and 3 if not given.
    """
    simulation = simulation or simulate(schedule)
    width = min(0.2 * simulation.makespan + 1.5, 24)
    return _charts({schedule.name: simulation.spans}, width)


def gantts(steps: Mapping[str, Sequence[Span]], *, width: float = 12) -> "Picture":
    """Charts as `gantt` draws them, below one another over a common time.

    Args:
      steps: the spans of each chart by its title, such as a simulation has.
      width: of the picture, in inches.
    """
    return _charts(steps, width)


def _charts(steps: Mapping[str, Sequence[Span]], width: float) -> "Picture":
    ranks = [1 + max(span.rank for span in spans) for spans in steps.values()]
    end = max(span.end for spans in steps.values() for span in spans)
    picture, rows = _pyplot().subplots(
        len(steps),
        1,
        figsize=(width, sum(0.4 * n + 0.6 for n in ranks) + 0.4),
        sharex=True,
        squeeze=False,
        height_ratios=[n + 1 for n in ranks],
        layout="constrained",
    )
    n_boxes = sum(end * n for n in ranks)
    for axes, (title, spans), n_ranks in zip(rows[:, 0], steps.items(), ranks, strict=True):
        axes.grid(alpha=0.25)
        _boxes(axes, spans, numbers=n_boxes < 2000)  # numbers of more would be too small to read
        axes.set(ylabel="rank", xlim=(0, end))
        axes.set_yticks(range(n_ranks))
        axes.set_ylim(n_ranks - 0.5, -0.5)
        axes.set_title(title, loc="left", fontsize="medium")
    rows[-1, 0].set_xlabel("time")
    used = {op.kind for spans in steps.values() for span in spans for op in span.instruction}
    keys = [
        rows[0, 0].bar(0, 0, color=_COLOURS[kind][0], label=_KINDS[kind])
        for kind in "FBIW"
        if kind in used
    ]
    rows[0, 0].legend(
        handles=keys, fontsize="x-small", ncols=len(keys), loc="lower right", bbox_to_anchor=(1, 1)
    )
    return picture


def _boxes(axes: "Axes", spans: Sequence[Span], *, numbers: bool) -> None:
    for span in spans:
        height = 0.9 / len(span.instruction)
        for i, op in enumerate(span.instruction):
            bottom = span.rank - 0.45 + i * height
            axes.broken_barh(
                [(span.start, span.end - span.start)],
                (bottom, height),
                facecolors=_COLOURS[op.kind][min(op.chunk, 1)],
                edgecolors="black",
                linewidth=0.4,
            )
            if numbers:
                middle = (span.start + span.end) / 2, bottom + height / 2
                axes.text(*middle, str(op.micro), ha="center", va="center", fontsize=6)


def lines(
    xs: Sequence[float],
    ys: Mapping[str, Sequence[float]],
    *,
    labels: tuple[str, str],
    dashed: Mapping[str, Sequence[float]] | None = None,
) -> "Picture":
    """Figures over what they depend on, one line a name; those that are not a number are left out.

    Args:
      dashed: other values for some of the names, such as a formula's, in the same colours.
    """
    picture, axes = _picture(8, 4)
    for name, values in ys.items():
        (line,) = axes.plot(xs, values, label=name, linewidth=1.4, marker=".")
        if dashed and name in dashed:
            axes.plot(xs, dashed[name], "--", color=line.get_color(), linewidth=1)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.legend(fontsize="small")
    return picture


def _smoothed(some: Sequence[Run], metric: str, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Last steps `[S]` of the windows and their means `[N, S]`."""
    found = [run.curve(metric) for run in some]
    n = min(len(values) for _, values in found)
    window = max(min(window, n), 1)
    ends_S = np.arange(window, n + 1, window)
    means = [[values[end - window : end].mean() for end in ends_S] for _, values in found]
    return found[0][0][ends_S - 1], np.array(means)


def _bands(values_NS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means `[S]` and half intervals, 0 for a single run."""
    found = [estimate(column) for column in values_NS.T]
    return np.array([f.mean for f in found]), np.nan_to_num(np.array([f.half for f in found]))


def _bar(half: float) -> float:
    return 0.0 if np.isnan(half) else half


def _picture(width: float, height: float) -> "tuple[Picture, Axes]":
    picture, axes = _pyplot().subplots(figsize=(width, height), layout="constrained")
    axes.grid(alpha=0.25)
    return picture, axes


def _grid(n: int, height: float) -> "tuple[Picture, list[Axes]]":
    """`n` axes side by side."""
    picture, grid = _pyplot().subplots(
        1, n, figsize=(min(3.2 * n + 1, 14), height), squeeze=False, layout="constrained"
    )
    return picture, list(grid[0])


def _key(picture: "Picture", image: Any, grid: "list[Axes]", label: str) -> None:
    picture.colorbar(image, ax=grid, label=label)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ValueError(
            "plots need matplotlib; pip install -c constraints.txt -e '.[notebooks]'"
        ) from None
    return pyplot
