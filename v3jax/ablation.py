"""Variants of an experiment on several seeds, and figures with their uncertainty.

    runs = ablate("v3_tiny", {"loss_free": [], "none": ["balance.strategy=none"]}, folder="runs/b")
    print(table(runs, {"MaxViolation": closing("max_violation"), "loss": closing("eval_loss", 1)}))

Every run is an ordinary run directory, `folder/VARIANT/SEED`: a call that is repeated continues
what was interrupted and reads what is there. Variants of one seed see the same data in the same
order and start from the same weights, so differences are taken seed by seed.
"""

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from scipy import stats

from v3jax import config, host, registry, train
from v3jax.config import ExperimentConfig
from v3jax.evals import acceptance, by_source
from v3jax.evals.acceptance import Acceptance
from v3jax.evals.by_source import SourceFigures, max_violation_global
from v3jax.metrics import read_rows


@dataclass(frozen=True)
class Run:
    """One finished run."""

    variant: str
    seed: int
    folder: Path
    cfg: ExperimentConfig

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """`metrics.jsonl`, one mapping a step."""
        return read_rows(self.folder / "metrics.jsonl")

    @cached_property
    def loads(self) -> list[dict[str, Any]]:
        """`loads.jsonl`: tokens sent to each expert of each layer at some steps."""
        return read_rows(self.folder / "loads.jsonl")

    @cached_property
    def sources(self) -> list[SourceFigures]:
        """Held-out loss and expert loads of each source, kept in `by_source.json`."""
        found = self._kept(
            "by_source.json", lambda: [one.to_json() for one in by_source.by_source(self.folder)]
        )
        return [SourceFigures.from_json(entry) for entry in found]

    @cached_property
    def acceptance(self) -> list[Acceptance]:
        """Drafted tokens that were taken, by source, kept in `acceptance.json`."""
        found = self._kept(
            "acceptance.json", lambda: [vars(one) for one in acceptance.acceptance(self.folder)]
        )
        return [Acceptance(**entry) for entry in found]

    def take_held_out(self) -> None:
        """Makes sure that `sources` and, with MTP modules, `acceptance` are kept."""
        _ = self.sources
        if self.cfg.model.mtp_depth:
            _ = self.acceptance

    def _kept(self, name: str, take: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """A file's entries, taken and written, whole or not at all, if there is none."""
        file = self.folder / name
        if not file.exists():
            part = file.with_suffix(".part")
            part.write_text(json.dumps(take()))
            part.replace(file)
        return json.loads(file.read_text())

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps at which a metric was recorded, and its values."""
        found = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
        steps, values = zip(*found, strict=True)
        return np.array(steps), np.array(values, float)


Figure = Callable[[Run], float]


def closing(name: str, last: int = 20) -> Figure:
    """The mean of a metric's last recorded values."""
    return lambda run: float(run.curve(name)[1][-last:].mean())


def global_violation(run: Run) -> float:
    """MaxViolation of all held-out text together."""
    return max_violation_global(run.sources)


def specialisation(run: Run) -> float:
    """How differently sources of held-out text use the experts, within 0..1."""
    return by_source.specialisation(run.sources)


def accepted(run: Run) -> float:
    """Share of the MTP modules' drafts that were taken."""
    return acceptance.overall(run.acceptance)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half of its two-sided 95% interval by Student's t; NaN for one seed."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.half:.2g}" if self.n > 1 else f"{self.mean:.4g}"

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of independent values."""
    n = len(values)
    if n == 0:
        raise ValueError("an estimate needs at least one value")
    if n == 1:
        return Estimate(float(values[0]), float("nan"), 1)
    error = float(np.std(values, ddof=1)) / np.sqrt(n)
    return Estimate(float(np.mean(values)), float(stats.t.ppf(0.975, n - 1)) * error, n)


def ablate(
    exp: str | ExperimentConfig,
    variants: Mapping[str, Sequence[str]],
    *,
    folder: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    settings: Sequence[str] = (),
    log: TextIO | None = None,
    workers: int = 1,
    held_out: bool = False,
) -> dict[str, list[Run]]:
    """Trains every variant on every seed, seed by seed.

    Args:
      exp: a registered name, a file of one's own as of `--exp`, or an experiment.
      variants: assignments as of `--set` by a name that can be a folder's.
      settings: assignments of all variants.
      log: where the runs print, by default nowhere.
      workers: so many runs at once, each in a process with its share of the CPU's cores; small
        models do not fill several. Rules of one's own must stand in the file that `exp` names.
      held_out: also takes each run's `sources` and, with MTP modules, its `acceptance`.

    Raises:
      ValueError: a name or setting that cannot be used, or a folder of another experiment.
      KeyboardInterrupt: a run was told to stop; the same call continues.
    """
    base = config.override(registry.get(exp) if isinstance(exp, str) else exp, list(settings))
    for name in variants:
        if not name or name != Path(name).name or name.startswith("."):
            raise ValueError(f"variant {name!r}: must be usable as a folder's name")
    planned = [
        Run(name, seed, Path(folder) / name / str(seed), config.override(base, [*changes, *own]))
        for seed in seeds
        for name, changes in variants.items()
        for own in [[f"run.seed={seed}"]]
    ]
    if workers == 1:
        for run in planned:
            _train(run, log, held_out)
    else:
        _train_beside(planned, workers, exp if isinstance(exp, str) else None, held_out)
    return {name: [run for run in planned if run.variant == name] for name in variants}


def _train(run: Run, log: TextIO | None, held_out: bool) -> None:
    with open(os.devnull, "w") as nowhere, redirect_stdout(log or nowhere):
        result = train.run(run.cfg, run.folder)
    if not result.finished:
        raise KeyboardInterrupt(f"{run.folder}: stopped at step {result.step}")
    if held_out:
        run.take_held_out()


def _train_beside(planned: Sequence[Run], workers: int, exp: str | None, held_out: bool) -> None:
    """Runs in `workers` processes; the first one that fails ends all that have not begun."""
    spawn = multiprocessing.get_context("spawn")  # a process with jax in it must not fork
    places = spawn.SimpleQueue()
    for cores in _shares(workers):
        places.put(cores)
    with ProcessPoolExecutor(workers, spawn, _start_worker, (places, exp)) as pool:
        done = [pool.submit(_train, run, None, held_out) for run in planned]
        try:
            for one in done:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _shares(workers: int) -> list[list[int]]:
    """The cores this process may use, dealt out; all of them to each if there are too few."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [cores[i::workers] or cores for i in range(workers)]


def _start_worker(places: Any, exp: str | None) -> None:
    """Before jax looks for cores: its thread pools are as large as what it finds."""
    cores = places.get()
    if cores:
        os.sched_setaffinity(0, cores)
    host.prepare()
    if exp is not None:
        registry.get(exp)  # registers what the file brings


def by_variant(runs: Mapping[str, Sequence[Run]], figure: Figure) -> dict[str, Estimate]:
    """A figure of every variant over its seeds."""
    return {name: estimate([figure(run) for run in some]) for name, some in runs.items()}


def difference(runs: Mapping[str, Sequence[Run]], figure: Figure, a: str, b: str) -> Estimate:
    """`a` minus `b`, seed by seed: what both owe to a seed drops out."""
    pairs = zip(runs[a], runs[b], strict=True)
    return estimate([figure(one) - figure(other) for one, other in pairs])


def relative_difference(
    run: Run, other: Run, metric: str = "loss", *, decay: float = 0.9
) -> np.ndarray:
    """`run` over `other`, less one, at every step, both smoothed over steps by an exponential mean
    of this decay (report appendix B.1)."""
    smooth = [_smooth([row[metric] for row in one.rows], decay) for one in (run, other)]
    return smooth[0] / smooth[1] - 1


def _smooth(values: Sequence[float], decay: float) -> np.ndarray:
    found = [values[0]]
    for value in values[1:]:
        found.append(decay * found[-1] + (1 - decay) * value)
    return np.array(found)


def verdict(found: Estimate, what: str) -> str:
    """What an interval of a difference says, in words: `a - b: -0.02 ± 0.01: lower`."""
    if found.n < 2 or math.isnan(found.half):
        said = "one seed says nothing of chance"
    elif found.high < 0:
        said = "lower"
    elif found.low > 0:
        said = "higher"
    else:
        said = "no difference beyond chance"
    return f"{what}: {found.mean:+.4f} ± {found.half:.2g} ({found.n} seeds): {said}"


def table(runs: Mapping[str, Sequence[Run]], figures: Mapping[str, Figure]) -> str:
    """One line a variant, one column a figure, as text."""
    columns = {name: by_variant(runs, figure) for name, figure in figures.items()}
    lines = [["variant", *columns]]
    lines += [[variant, *(str(c[variant]) for c in columns.values())] for variant in runs]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
