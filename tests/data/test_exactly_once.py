"""Every row once, in one order, whoever reads: 4 processes, then 2, 3 and 1, all killed midway."""

import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import corpus_on_disk, small
from v3jax.config import BatchConfig, ExperimentConfig
from v3jax.data.dataset import Dataset, open_dataset
from v3jax.data.loader import Loader, _mixture, make_loader

TEXTS = {
    "notes": ([small.text(i, 5 + i) for i in range(25)], [small.text(99)]),
    "more": ([small.text(200 + i, 9) for i in range(9)], [small.text(98)]),
}
WEIGHTS = {"notes": 3.0, "more": 1.0}
# Processes, sequences of a micro-batch and of a batch, processes of each that read ahead. They end
# within the ramp of the first.
PHASES = ((4, 12, 24, 0), (2, 8, 8, 1), (3, 6, 18, 0), (1, 5, 10, 1))
_EVERY = 3
"""Batches between two positions that are kept, as a run's checkpoints are."""


def opened(folder: Path, micro: int = 1, size: int = 1) -> tuple[ExperimentConfig, Dataset]:
    cfg = small.config(path=str(folder / "corpus"), fim_rate=0.5, newline_split_rate=0.2)
    batch = BatchConfig(micro_batch=micro, start=micro, end=size, ramp_tokens=1500.0)
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=600), batch=batch)
    return cfg, open_dataset(cfg, folder / "cache")


def name_of(tokens: np.ndarray, segments: np.ndarray) -> str:
    return hashlib.sha256(tokens.tobytes() + segments.tobytes()).hexdigest()[:16]


def draw(folder: Path, phase: int, rank: int, state: dict[str, Any] | None, together: Any) -> None:
    """A process of a phase: notes what rows it draws until it is killed."""
    n, micro, size, workers = PHASES[phase]
    cfg, dataset = opened(folder, micro, size)
    cfg = replace(cfg, data=replace(cfg.data, workers=workers))
    rows = range(rank * micro // n, (rank + 1) * micro // n)
    loader = make_loader(cfg, dataset, rows)
    if state is not None:
        loader.set_state(state)
    with (folder / f"drawn-{phase}-{rank}").open("w") as log:
        while True:
            for _ in range(_EVERY):
                step(loader, rows, log)
            os.fsync(log.fileno())
            together.wait()  # as the steps of a run do
            if rank == 0:
                partial = folder / "partial"
                partial.write_text(json.dumps(loader.get_state()))
                partial.replace(folder / f"state-{phase}")


def step(loader: Loader, rows: Sequence[int], log: Any) -> None:
    first = loader.sequences
    batch = next(loader)
    for m in range(batch.n_micro):
        for i, row in enumerate(rows):
            place = first + m * loader.cfg.batch.micro_batch + row
            log.write(f"{place} {name_of(batch.tokens_MRS[m, i], batch.segments_MRS[m, i])}\n")
    log.flush()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("exactly_once")
    corpus_on_disk.write(found / "corpus", small.tokenizer(), TEXTS, weights=WEIGHTS)
    return found


def test_no_row_is_drawn_twice_or_lost_whoever_reads_and_whoever_is_killed(folder: Path) -> None:
    opened(folder)  # makes the plan
    server = get_context("forkserver")
    server.set_forkserver_preload([__name__])
    rng, state, kept = random.Random(0), None, dict[int, str]()
    for phase, (n, *_) in enumerate(PHASES):
        begun = 0 if state is None else state["sequences"]
        together = server.Barrier(n)
        some = [
            server.Process(target=draw, args=(folder, phase, rank, state, together))
            for rank in range(n)
        ]
        for process in some:
            process.start()
        state = _when_it_is_far_enough(folder / f"state-{phase}", begun + 60, some)
        time.sleep(rng.uniform(0, 0.1))
        for process in rng.sample(some, n):
            process.kill()
        for process in some:
            process.join()
        state = json.loads((folder / f"state-{phase}").read_text())
        drawn = [_drawn(folder / f"drawn-{phase}-{rank}") for rank in range(n)]
        for place, name in (item for one in drawn for item in one.items()):
            if begun <= place < state["sequences"]:
                assert place not in kept
                kept[place] = name

    assert state is not None
    assert sorted(kept) == list(range(state["sequences"]))
    cfg, dataset = opened(folder)
    order = _mixture(cfg, dataset)
    assert [kept[i] for i in range(len(kept))] == [name_of(*order[i]) for i in range(len(kept))]
    for rows in dataset.train:
        _assert_drawn_equally([name_of(*rows[i]) for i in range(len(rows))], kept)


def _when_it_is_far_enough(file: Path, wanted: int, some: Sequence[Any]) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert all(process.is_alive() for process in some)
        if file.exists() and (state := json.loads(file.read_text()))["sequences"] >= wanted:
            return state
        time.sleep(0.01)
    pytest.fail("no position was kept in time")


def _drawn(log: Path) -> dict[int, str]:
    """What a process noted; its last line may have been cut off."""
    *lines, _ = log.read_text().split("\n")
    return {int(place): name for place, name in map(str.split, lines)}


def _assert_drawn_equally(rows: Sequence[str], kept: dict[int, str]) -> None:
    """Epoch by epoch, all rows of a source once."""
    numbers = Counter(rows)
    mine = [kept[i] for i in range(len(kept)) if kept[i] in numbers]
    assert len(mine) > len(rows)
    for epoch in range(0, len(mine) - len(rows), len(rows)):
        assert Counter(mine[epoch : epoch + len(rows)]) == numbers
