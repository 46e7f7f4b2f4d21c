"""Rows of a prepared corpus: packed, mixed, read and resumed, beside what `v3_tiny` eats.

    python -m benchmarks.loader --corpus=DIR [--sources=NAME,NAME] [--workers=2]

The corpus is one of `python -m v3jax.data.prepare` or of `python -m benchmarks.prepare --keep`. Its
documents are packed at 4K by best fit and, for comparison, laid end to end and cut; a million
documents of the same lengths are packed for time. Then `v3_tiny` trains a few steps on its own
corpus, and the loader reads rows for it of this one, with fill-in-the-middle, as fast as it can.
Figures go to results/loader.json.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.kept import called, keep, markdown
from v3jax import host, registry
from v3jax.config import ExperimentConfig, SourceConfig
from v3jax.data.dataset import Dataset, open_dataset
from v3jax.data.loader import _mixture, make_loader
from v3jax.data.packing import make_plan
from v3jax.data.shards import Shards
from v3jax.metrics import read_rows
from v3jax.train import run

_CORPUS = flags.DEFINE_string("corpus", None, "A prepared corpus.", required=True)
_SOURCES = flags.DEFINE_list("sources", [], "Sources of it that are read; all if none is named.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Processes that read ahead, in the second figure.")

_ROW = 4096 + 1
_STEPS = 60
_BATCHES = 400
_HEAD = ("", "figure")


def main(argv: list[str]) -> None:
    del argv
    shards = Shards.open(_CORPUS.value)
    found: dict[str, Any] = packing(shards)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["V3JAX_CACHE"] = folder  # which holds no plan yet
        cfg = _experiment(shards)
        dataset, seconds = _timed(lambda: open_dataset(cfg))
        found |= {"documents": sum(s.documents for s in dataset.sources), "first open, s": seconds}
        found["open again, s"] = _timed(lambda: open_dataset(cfg))[1]
        found |= mixing(cfg, dataset) | resuming(cfg, dataset)
        found |= speeds(cfg, dataset, Path(folder))
    print(markdown(_HEAD, [(name, _said(value)) for name, value in found.items()]))
    keep("loader", called("loader"), found)


def packing(shards: Shards) -> dict[str, Any]:
    """Padding and cut documents by best fit and by cutting the text every row."""
    length_N = np.concatenate([np.asarray(source.lengths_N) for source in shards.sources])
    plan = make_plan(length_N, _ROW)
    rows, total = len(plan.first_N) - 1, int(length_N.sum())
    long = float((length_N > _ROW).mean())
    start_N = np.cumsum(length_N) - length_N
    cut = start_N // _ROW != (start_N + length_N - 1) // _ROW
    rng = np.random.default_rng(0)
    million = rng.choice(length_N, 1_000_000)
    return {
        "best fit: padding": 1 - total / (rows * _ROW),
        "best fit: documents cut": long,
        "best fit: documents cut that fit a row": 0.0 if _whole(plan, length_N) else 1.0,
        "end to end: documents cut": float(cut.mean()),
        "end to end: documents cut that fit a row": float((cut & (length_N <= _ROW)).mean()),
        "1M documents packed, s": _timed(lambda: make_plan(million, _ROW))[1],
    }


def _whole(plan: Any, length_N: np.ndarray) -> bool:
    """Whether every document that fits a row is one piece."""
    pieces_N = np.bincount(plan.document_P, minlength=len(length_N))
    return bool((pieces_N[length_N <= _ROW] == 1).all())


def _experiment(shards: Shards) -> ExperimentConfig:
    """v3_tiny on the corpus."""
    cfg = registry.get("v3_tiny")
    names = _SOURCES.value or [source.name for source in shards.sources]
    sources = tuple(
        SourceConfig(name=name, weight=1.0, path=str(shards.folder / name), max_mb=math.inf)
        for name in names
    )
    data = replace(cfg.data, sources=sources)
    model = replace(cfg.model, vocab_size=max(cfg.model.vocab_size, shards.vocab_size))
    run = replace(cfg.run, eval_every=0, checkpoint_every=0)
    return replace(cfg, data=data, model=model, run=run)


def mixing(cfg: ExperimentConfig, dataset: Dataset) -> dict[str, Any]:
    """How far the sources' shares of the first 20,000 rows are from their weights."""
    weights = np.arange(1.0, len(dataset.train) + 1)
    cfg = replace(cfg, data=replace(cfg.data, mixture=((float("inf"), tuple(weights)),)))
    order = _mixture(cfg, dataset)
    selected = [order._selected[0][i][0] for i in range(20_000)]
    shares = np.bincount(selected, minlength=len(weights)) / len(selected)
    return {
        "mixture: largest distance from its weight": abs(shares - weights / weights.sum()).max()
    }


def resuming(cfg: ExperimentConfig, dataset: Dataset) -> dict[str, Any]:
    """The first batch after a jump to anywhere in 14.8T tokens."""
    rng = np.random.default_rng(0)
    seconds = []
    for sequences in rng.integers(0, int(14.8e12 / cfg.data.seq_len), 10):
        with closing(make_loader(cfg, dataset)) as loader:
            state = {"sequences": int(sequences), "digest": loader.digest}
            loader.set_state(state)
            seconds.append(_timed(lambda loader=loader: next(loader))[1])
    return {"resume at any position, s, the slowest of 10": max(seconds)}


def speeds(cfg: ExperimentConfig, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Tokens a second: trained, and read by a thread and by processes."""
    tiny = registry.get("v3_tiny")
    tokens = _STEPS * tiny.batch.start * tiny.data.seq_len
    length = replace(tiny.run, total_tokens=float(tokens), eval_every=0, checkpoint_every=0)
    run(replace(tiny, run=length), folder / "run")
    rows = read_rows(folder / "run" / "metrics.jsonl")[5:]
    eaten = statistics.median(row["tokens_per_second"] for row in rows)
    waited = [row["data_wait_seconds"] for row in rows]
    found = {
        "v3_tiny trains, tokens/s": eaten,
        "waits for data, s a step, median": statistics.median(waited),
        "waits for data, s a step, longest": max(waited),
    }
    for name, n in (("a thread", 0), (f"{_WORKERS.value} processes", _WORKERS.value)):
        rate = _rate(replace(cfg, data=replace(cfg.data, workers=n)), dataset)
        found |= {f"{name} reads, tokens/s": rate, f"{name}, times what is trained": rate / eaten}
    return found


def _rate(cfg: ExperimentConfig, dataset: Dataset) -> float:
    with closing(make_loader(cfg, dataset)) as loader:
        batches: Iterator[Any] = iter(loader)
        list(islice(batches, _BATCHES if cfg.data.workers else 50))  # until processes are up
        before, begun = loader.sequences, time.perf_counter()
        list(islice(batches, _BATCHES))
        return (loader.sequences - before) * cfg.data.seq_len / (time.perf_counter() - begun)


def _timed(work: Any) -> tuple[Any, float]:
    begun = time.perf_counter()
    found = work()
    return found, time.perf_counter() - begun


def _said(value: float) -> str:
    return f"{value:,.0f}" if value > 100 else f"{value:.4f}"


if __name__ == "__main__":
    host.prepare()
    app.run(main)
