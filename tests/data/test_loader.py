"""Batches: the mixture kept, the order resumed bit for bit."""

import json
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from tests.data import small
from tests.data.small import opened, three_sources
from v3jax.config import ExperimentConfig
from v3jax.data import loader
from v3jax.data.dataset import Dataset, open_dataset
from v3jax.data.loader import HostBatch, make_loader
from v3jax.optim.schedules import batch_plan, batch_size


def batches(cfg: ExperimentConfig, dataset: Dataset, n: int) -> list[HostBatch]:
    return list(islice(make_loader(cfg, dataset), n))


def rows_of(batch: HostBatch) -> list[bytes]:
    width = batch.tokens_MRS.shape[-1]
    return [row.tobytes() for row in batch.tokens_MRS[: batch.n_micro].reshape(-1, width)]


def test_batches_follow_the_ramp(home: Path) -> None:
    cfg, dataset = opened(home)
    cfg = replace(cfg, run=replace(cfg.run, total_tokens=300 * 32.0))
    drawn = make_loader(cfg, dataset)
    sizes, tokens = [], 0
    for expected, batch in zip(batch_plan(cfg), drawn, strict=False):
        assert batch.n_micro * 2 == expected == batch_size(cfg.batch, tokens)
        tokens += expected * cfg.data.seq_len
        sizes.append(expected)
        assert batch.tokens_MRS.shape == batch.segments_MRS.shape == (6, 2, 33)
        assert batch.tokens_MRS.dtype == batch.segments_MRS.dtype == np.int32
        assert not batch.tokens_MRS[batch.n_micro :].any()
        assert not batch.segments_MRS[batch.n_micro :].any()
        assert (batch.segments_MRS[: batch.n_micro, :, 0] == 1).all()
    assert sizes == sorted(sizes)
    assert {4, 6, 8, 10, 12} == set(sizes)


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, 1.0, 1.0), (8.0, 1.0, 0.5)])
def test_sources_are_drawn_in_the_ratio_of_their_weights(
    home: Path, weights: tuple[float, ...]
) -> None:
    cfg, dataset = opened(home, sources=three_sources(home, weights))
    source_of = {
        row.tobytes(): k for k, rows in enumerate(small.trained(dataset)) for row in rows.tokens_NS
    }
    drawn = [source_of[row] for batch in batches(cfg, dataset, 100) for row in rows_of(batch)]
    for n in (len(drawn) // 3, len(drawn)):
        counts = np.bincount(drawn[:n], minlength=3)
        assert np.abs(counts - n * np.array(weights) / sum(weights)).max() <= 2


def test_a_mixture_changes_where_it_should_and_no_row_is_drawn_twice(home: Path) -> None:
    """A source goes on where the phase before left it; one without weight waits."""
    mixture = ((40 * 32.0, (0.5, 0.5, 0.0)), (70 * 32.0, (0.1, 0.1, 0.8)), (1e9, (0.0, 0.5, 0.5)))
    cfg, dataset = opened(home, sources=three_sources(home))
    cfg = replace(cfg, data=replace(cfg.data, mixture=mixture))
    source_of = {
        row.tobytes(): k for k, rows in enumerate(small.trained(dataset)) for row in rows.tokens_NS
    }
    order = loader._mixture(cfg, dataset)
    rows = [order[i][0].tobytes() for i in range(100)]
    drawn = [source_of[row] for row in rows]
    for (first, last), counts in {(0, 40): (20, 20, 0), (40, 70): (3, 3, 24)}.items():
        assert np.abs(np.bincount(drawn[first:last], minlength=3) - counts).max() <= 1
    assert 0 not in drawn[70:]
    for k, source in enumerate(small.trained(dataset)):
        mine = [row for row, where in zip(rows, drawn, strict=True) if where == k]
        epochs = [mine[i : i + len(source)] for i in range(0, len(mine), len(source))]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    again = loader._mixture(cfg, dataset)
    assert [again[i][0].tobytes() for i in (99, 3, 55, 40, 39)] == [
        rows[i] for i in (99, 3, 55, 40, 39)
    ]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (((10.0, (1.0, 1.0)),), "give 3 weights"),
        (((10.0, (1.0, 1.0, 1.0)), (10.0, (1.0, 1.0, 1.0))), "one after the other"),
        (((10.0, (0.0, 0.0, 0.0)),), "nor all zero"),
        (((10.0, (2.0, -1.0, 0.0)),), "must not be negative"),
    ],
)
def test_a_mixture_that_cannot_be_is_one_line(home: Path, mixture: Any, message: str) -> None:
    cfg, _ = opened(home, sources=three_sources(home))
    with pytest.raises(ValueError, match=message):
        replace(cfg.data, mixture=mixture)


def test_an_epoch_holds_every_row_once_and_the_next_is_in_another_order(home: Path) -> None:
    cfg, dataset = opened(home, sources=three_sources(home)[:1])
    n = len(small.trained(dataset)[0].tokens_NS)
    drawn = [row for batch in batches(cfg, dataset, n) for row in rows_of(batch)]
    epochs = [drawn[k * n : (k + 1) * n] for k in range(3)]
    every = sorted(row.tobytes() for row in small.trained(dataset)[0].tokens_NS)
    assert all(sorted(epoch) == every for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def same(a: HostBatch, b: HostBatch) -> bool:
    return (
        a.n_micro == b.n_micro
        and (a.tokens_MRS == b.tokens_MRS).all()
        and (a.segments_MRS == b.segments_MRS).all()
    )


@pytest.mark.parametrize("steps", [0, 1, 5, 11, 12, 30])
def test_a_resumed_loader_goes_on_bit_for_bit(home: Path, steps: int) -> None:
    cfg, dataset = opened(home, fim_rate=0.3, newline_split_rate=0.3)
    straight = batches(cfg, dataset, 40)
    first = make_loader(cfg, dataset)
    for batch in straight[:steps]:
        assert same(next(first), batch)
    state = json.loads(json.dumps(first.get_state()))
    again = make_loader(*opened(home, fim_rate=0.3, newline_split_rate=0.3))
    again.set_state(state)
    assert again.sequences == first.sequences == sum(2 * b.n_micro for b in straight[:steps])
    assert again.get_state() == state
    for batch in straight[steps:]:
        assert same(next(again), batch)
    assert straight[11].n_micro not in (straight[0].n_micro, straight[-1].n_micro), "mid-ramp"


def test_going_back_in_the_same_loader_repeats_the_batches(home: Path) -> None:
    cfg, dataset = opened(home)
    one = make_loader(cfg, dataset)
    list(islice(one, 5))
    state = one.get_state()
    ahead = list(islice(one, 10))
    one.set_state(state)
    assert all(same(a, b) for a, b in zip(ahead, islice(one, 10), strict=True))


@pytest.mark.parametrize("held", [[0], [1], [2, 3], [0, 3]])
def test_processes_read_their_rows_of_the_same_order(home: Path, held: list[int]) -> None:
    cfg, dataset = opened(home)
    cfg = replace(cfg, batch=replace(cfg.batch, micro_batch=4))
    part = make_loader(cfg, dataset, held)
    for whole in batches(cfg, dataset, 30):
        some = next(part)
        assert some.n_micro == whole.n_micro
        assert (some.tokens_MRS == whole.tokens_MRS[:, held]).all()
        assert (some.segments_MRS == whole.segments_MRS[:, held]).all()
    assert part.get_state() == {"sequences": part.sequences, "digest": dataset.digest}


def grain_mixture(cfg: ExperimentConfig, dataset: Dataset) -> Any:
    """Grain's own mixture of the same sources."""
    sources = [
        grain.MapDataset.source(rows).seed(cfg.run.seed + i).shuffle().repeat()
        for i, rows in enumerate(small.trained(dataset))
    ]
    return grain.MapDataset.mix(sources, weights=list(dataset.weights))


def test_the_order_is_that_of_the_mixture_cut_into_batches(home: Path) -> None:
    """As it was when an iterator of grain's held the position."""
    cfg, dataset = opened(home)
    stacked = iter(grain_mixture(cfg, dataset).batch(2, drop_remainder=True).to_iter_dataset())
    for batch in batches(cfg, dataset, 40):
        for m in range(batch.n_micro):
            tokens, segments = next(stacked)
            assert (batch.tokens_MRS[m] == tokens).all()
            assert (batch.segments_MRS[m] == segments).all()


def test_a_position_of_the_old_form_is_taken(home: Path) -> None:
    cfg, dataset = opened(home)
    straight = batches(cfg, dataset, 9)
    resumed = make_loader(cfg, dataset)
    n_sequences = sum(2 * batch.n_micro for batch in straight[:6])
    resumed.set_state(
        {"sequences": n_sequences, "iterator": {"next_index": 3}, "digest": dataset.digest}
    )
    for batch in straight[6:]:
        assert same(next(resumed), batch)


def test_the_state_does_not_depend_on_when_it_is_taken(home: Path) -> None:
    cfg, dataset = opened(home)
    slow, fast = make_loader(cfg, dataset), make_loader(cfg, dataset)
    for _ in range(3):
        next(slow)
        time.sleep(0.05)  # time to read ahead
        slow.get_state()
        next(fast)
    assert slow.get_state() == fast.get_state()


def test_the_order_is_the_seeds(home: Path) -> None:
    first = batches(*opened(home, seed=0), 10)
    assert all(same(a, b) for a, b in zip(first, batches(*opened(home, seed=0), 10), strict=True))
    assert not all(
        same(a, b) for a, b in zip(first, batches(*opened(home, seed=1), 10), strict=True)
    )


def test_the_position_of_other_data_is_refused(home: Path) -> None:
    state = make_loader(*opened(home)).get_state()
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"fim_rate": 0.2},
        {"seq_len": 31},
        {"heldout_fraction": 0.2},
    ]
    for other in changes:
        with pytest.raises(ValueError, match="restore the corpus or start a new workdir"):
            make_loader(*opened(home, **other)).set_state(state)


def synthetic(seed: int = 0, **changes: Any) -> tuple[ExperimentConfig, Dataset]:
    cfg = small.config(seed, synthetic=True, path="/absent", **changes)
    return cfg, open_dataset(cfg, Path("/absent"))


def test_synthetic_data_are_uniform_seeded_and_need_no_corpus() -> None:
    cfg, dataset = synthetic()
    drawn = np.concatenate([b.tokens_MRS[: b.n_micro].ravel() for b in batches(cfg, dataset, 20)])
    assert (drawn.min(), drawn.max()) == (0, 399)
    counts = np.bincount(small.trained(dataset)[0].tokens_NS.ravel(), minlength=400)
    mean = counts.mean()
    assert 250 < ((counts - mean) ** 2 / mean).sum() < 550  # chi-square of 399 degrees of freedom
    assert dataset.fill_rate == 1
    assert dataset.heldout_bytes(5) == 0
    assert same(batches(cfg, dataset, 1)[0], batches(*synthetic(), 1)[0])
    assert not same(batches(cfg, dataset, 1)[0], batches(*synthetic(seed=1), 1)[0])
