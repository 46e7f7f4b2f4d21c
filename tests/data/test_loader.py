"""Rows and batches: nothing lost or leaked, the mixture kept, the order resumed bit for bit."""

import json
import re
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import small
from v3jax.config import ExperimentConfig
from v3jax.data import loader
from v3jax.data.loader import Dataset, HostBatch, make_loader, open_dataset
from v3jax.data.packing import Rows
from v3jax.optim.schedules import batch_plan, batch_size

N_TEXTS = 150


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of texts, long and short, and a cache."""
    root = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, (3, N_TEXTS)).tolist()
    for k, name in enumerate("abc"):
        texts = (small.text(1000 * k + i, n) for i, n in enumerate(lengths[k]))
        small.write(root / name, texts)
    return root


def three_sources(home: Path, weights: tuple[float, ...] = (0.5, 0.3, 0.2)) -> tuple:
    return tuple(
        small.source(name, home / name, weight=w) for name, w in zip("abc", weights, strict=True)
    )


def opened(home: Path, seed: int = 0, **changes: Any) -> tuple[ExperimentConfig, Dataset]:
    cfg = small.config(seed, **{"sources": three_sources(home)} | changes)
    return cfg, open_dataset(cfg, home / "cache")


def documents_in(rows: Rows, dataset: Dataset) -> list[str]:
    """Texts of the documents in `rows`; those cut into several rows are left out."""
    assert dataset.tokenizer is not None
    found = []
    for tokens, segments in zip(rows.tokens_NS, rows.segments_NS, strict=True):
        for s in range(1, segments.max() + 1):
            ids = tokens[segments == s]
            if ids[-1] == dataset.tokenizer.eos and (ids == dataset.tokenizer.eos).sum() == 1:
                found.append(dataset.tokenizer.decode(ids))
    return found


def texts_of(home: Path) -> set[str]:
    return {file.read_text() for file in home.glob("[abc]/*.txt")}


def test_rows_hold_the_training_documents(home: Path) -> None:
    cfg, dataset = opened(home, seq_len=1023)
    hashes = {h for _, _, h in dataset.files}
    assert len(hashes) == 3 * N_TEXTS
    found = [text for rows in dataset.train for text in documents_in(rows, dataset)]
    held = documents_in(dataset.heldout, dataset)
    assert sorted(found + held) == sorted(texts_of(home))
    assert 0.2 < len(held) / (3 * N_TEXTS) < 0.4
    assert [s.documents for s in dataset.sources] == [
        len(documents_in(rows, dataset)) for rows in dataset.train
    ]
    assert dataset.train[0].tokens_NS.shape[1] == cfg.data.seq_len + 1


def numbers_in(rows: Rows, dataset: Dataset) -> set[int]:
    """Which documents some word of `rows` comes from."""
    assert dataset.tokenizer is not None
    texts = (dataset.tokenizer.decode(row, skip_special_tokens=False) for row in rows.tokens_NS)
    return {int(n) for text in texts for n in re.findall(r"w(\d+)_", text)}


@pytest.mark.parametrize("seq_len", [32, 1023])
def test_nothing_held_out_is_trained_on(home: Path, seq_len: int) -> None:
    _, dataset = opened(home, seq_len=seq_len, fim_rate=0.5, newline_split_rate=0.5)
    trained = set().union(*(numbers_in(rows, dataset) for rows in dataset.train))
    held = numbers_in(dataset.heldout, dataset)
    assert trained.isdisjoint(held)
    missing = {1000 * k + i for k in range(3) for i in range(N_TEXTS)} - trained - held
    assert len(missing) <= 3, "only one-word documents may be cut inside their word"


def test_held_out_rows_are_plain_and_do_not_depend_on_the_training_form(home: Path) -> None:
    _, plain = opened(home)
    _, formed = opened(home, seed=1, fim_rate=1.0, newline_split_rate=1.0)
    assert (plain.heldout.tokens_NS == formed.heldout.tokens_NS).all()
    assert (plain.heldout.segments_NS == formed.heldout.segments_NS).all()
    assert formed.tokenizer is not None
    assert not np.isin(formed.heldout.tokens_NS, [formed.tokenizer.fim_begin]).any()
    assert any((rows.tokens_NS == formed.tokenizer.fim_begin).any() for rows in formed.train)


def test_held_out_bytes_are_those_of_the_predicted_text(home: Path) -> None:
    _, dataset = opened(home, seq_len=1023)
    assert dataset.tokenizer is not None
    whole = sum(len(text.encode()) for text in documents_in(dataset.heldout, dataset))
    first = [dataset.tokenizer.token_bytes[i] for i in dataset.heldout.tokens_NS[:, 0]]
    assert dataset.heldout_bytes(10**9) == whole - sum(map(len, first))
    assert len(dataset.heldout_text(10**9)) == whole
    assert 0 < dataset.heldout_bytes(1) < dataset.heldout_bytes(10**9)


def test_isolated_documents_leave_out_the_bytes_of_their_first_tokens(home: Path) -> None:
    _, dataset = opened(home, seq_len=1023, isolate_documents=True)
    assert dataset.tokenizer is not None
    expected = 0
    for text in documents_in(dataset.heldout, dataset):
        first = dataset.tokenizer.encode(text)[0]
        expected += len(text.encode()) - len(dataset.tokenizer.token_bytes[first])
    assert dataset.heldout_bytes(10**9) == expected


def test_the_report_counts_what_is_there(home: Path) -> None:
    _, dataset = opened(home)
    used = total = 0
    for source, rows, name in zip(dataset.sources, dataset.train, "abc", strict=True):
        assert (source.name, source.rows) == (name, len(rows.tokens_NS))
        assert source.tokens == np.count_nonzero(rows.segments_NS)
        used, total = used + source.tokens, total + rows.segments_NS.size
    assert dataset.fill_rate == used / total
    assert dataset.fill_rate > 0.95
    held = documents_in(opened(home, seq_len=1023)[1].heldout, dataset)
    n_bytes = sum(len(t) for t in texts_of(home)) - sum(map(len, held))
    assert sum(s.megabytes for s in dataset.sources) == pytest.approx(n_bytes / 1e6)


def batches(cfg: ExperimentConfig, dataset: Dataset, n: int) -> list[HostBatch]:
    return list(islice(make_loader(cfg, dataset), n))


def rows_of(batch: HostBatch) -> list[bytes]:
    width = batch.tokens_MBS.shape[-1]
    return [row.tobytes() for row in batch.tokens_MBS[: batch.n_micro].reshape(-1, width)]


def test_batches_follow_the_ramp(home: Path) -> None:
    cfg, dataset = opened(home)
    cfg = replace(cfg, run=replace(cfg.run, total_tokens=300 * 32.0))
    drawn = make_loader(cfg, dataset)
    sizes, tokens = [], 0
    for expected, batch in zip(batch_plan(cfg), drawn, strict=False):
        assert batch.n_micro * 2 == expected == batch_size(cfg.batch, tokens)
        tokens += expected * cfg.data.seq_len
        sizes.append(expected)
        assert batch.tokens_MBS.shape == batch.segments_MBS.shape == (6, 2, 33)
        assert batch.tokens_MBS.dtype == batch.segments_MBS.dtype == np.int32
        assert not batch.tokens_MBS[batch.n_micro :].any()
        assert not batch.segments_MBS[batch.n_micro :].any()
        assert (batch.segments_MBS[: batch.n_micro, :, 0] == 1).all()
    assert sizes == sorted(sizes)
    assert {4, 6, 8, 10, 12} == set(sizes)


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, 1.0, 1.0), (8.0, 1.0, 0.5)])
def test_sources_are_drawn_in_the_ratio_of_their_weights(
    home: Path, weights: tuple[float, ...]
) -> None:
    cfg, dataset = opened(home, sources=three_sources(home, weights))
    source_of = {row.tobytes(): k for k, rows in enumerate(dataset.train) for row in rows.tokens_NS}
    drawn = [source_of[row] for batch in batches(cfg, dataset, 100) for row in rows_of(batch)]
    for n in (len(drawn) // 3, len(drawn)):
        counts = np.bincount(drawn[:n], minlength=3)
        assert np.abs(counts - n * np.array(weights) / sum(weights)).max() <= 2


def test_an_epoch_holds_every_row_once_and_the_next_is_in_another_order(home: Path) -> None:
    cfg, dataset = opened(home, sources=three_sources(home)[:1])
    n = len(dataset.train[0].tokens_NS)
    drawn = [row for batch in batches(cfg, dataset, n) for row in rows_of(batch)]
    epochs = [drawn[k * n : (k + 1) * n] for k in range(3)]
    every = sorted(row.tobytes() for row in dataset.train[0].tokens_NS)
    assert all(sorted(epoch) == every for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def same(a: HostBatch, b: HostBatch) -> bool:
    return (
        a.n_micro == b.n_micro
        and (a.tokens_MBS == b.tokens_MBS).all()
        and (a.segments_MBS == b.segments_MBS).all()
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
    drawn = np.concatenate([b.tokens_MBS[: b.n_micro].ravel() for b in batches(cfg, dataset, 20)])
    assert (drawn.min(), drawn.max()) == (0, 399)
    counts = np.bincount(dataset.train[0].tokens_NS.ravel(), minlength=400)
    mean = counts.mean()
    assert 250 < ((counts - mean) ** 2 / mean).sum() < 550  # chi-square of 399 degrees of freedom
    assert dataset.fill_rate == 1
    assert dataset.heldout_bytes(5) == 0
    assert same(batches(cfg, dataset, 1)[0], batches(*synthetic(), 1)[0])
    assert not same(batches(cfg, dataset, 1)[0], batches(*synthetic(seed=1), 1)[0])


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was trained or encoded since."""
    done: list[str] = []
    train, encode = loader.train_tokenizer, loader.encode_documents

    def trained(*arguments: Any) -> Any:
        done.append("train")
        return train(*arguments)

    def encoded(*arguments: Any, **rates: Any) -> Any:
        done.append("encode")
        return encode(*arguments, **rates)

    monkeypatch.setattr(loader, "train_tokenizer", trained)
    monkeypatch.setattr(loader, "encode_documents", encoded)
    return done


def contents(dataset: Dataset) -> list[bytes]:
    rows = (*dataset.train, dataset.heldout)
    return [array.tobytes() for r in rows for array in (r.tokens_NS, r.segments_NS)]


@pytest.fixture
def own(home: Path, tmp_path: Path) -> Path:
    """The same sources with an empty cache."""
    for name in "abc":
        (tmp_path / name).symlink_to(home / name)
    return tmp_path


def test_the_second_opening_reads_the_cache(own: Path, encodings: list[str]) -> None:
    _, first = opened(own)
    assert encodings == ["train", *["encode"] * 4]
    _, second = opened(own)
    assert len(encodings) == 5
    assert contents(first) == contents(second)
    assert first.digest == second.digest
    assert [p.name for p in (own / "cache").iterdir()] == ["tokenizers", "rows"]


@pytest.mark.parametrize("folder", ["tokenizers", "rows"])
@pytest.mark.parametrize("keep", [None, 0, 1, -1])
def test_a_damaged_cache_is_made_anew(own: Path, folder: str, keep: int | None) -> None:
    _, first = opened(own)
    whole = contents(first)
    for file in (own / "cache" / folder).rglob("*.*"):
        raw = bytearray(file.read_bytes()) if file.is_file() else b""
        if not raw:
            continue
        if keep is None:
            raw[len(raw) // 2] ^= 2
        file.write_bytes(raw if keep is None else raw[:keep])
    _, second = opened(own)
    assert contents(second) == whole
    assert second.digest == first.digest


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, ["encode"] * 4),
        ({"fim_rate": 0.1}, ["encode"] * 4),
        ({"newline_split_rate": 0.1}, ["encode"] * 4),
        ({"seq_len": 64}, ["encode"] * 4),
        ({"tokenizer_vocab_size": 401}, ["train", *["encode"] * 4]),
        ({"heldout_fraction": 0.2}, ["train", *["encode"] * 4]),
        ({"isolate_documents": True}, []),
    ],
)
def test_the_cache_is_used_for_the_same_data_only(
    own: Path, encodings: list[str], changes: dict[str, Any], expected: list[str]
) -> None:
    _, before = opened(own)
    encodings.clear()
    _, after = opened(own, **changes)
    assert encodings == expected
    assert (before.digest == after.digest) is (not expected)


def test_another_split_of_the_corpus_trains_another_tokenizer(own: Path) -> None:
    tokenizers = [opened(own, heldout_fraction=f)[1].tokenizer for f in (0.3, 0.8, 0.3)]
    digests = [t.digest for t in tokenizers if t is not None]
    assert digests[0] == digests[2] != digests[1]


def test_processes_that_open_together_encode_once(own: Path, encodings: list[str]) -> None:
    found: list[list[bytes]] = []
    threads = [
        threading.Thread(target=lambda: found.append(contents(opened(own)[1]))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert encodings == ["train", *["encode"] * 4]
    assert found[0] == found[1] == found[2]


def test_a_cache_that_cannot_be_written_is_named(own: Path) -> None:
    (own / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"cache cannot be written .*; set V3JAX_CACHE") as error:
        opened(own)
    assert str(error.value).startswith(f"{own}/cache: ")


@pytest.mark.parametrize(("bad", "row"), [(4096, 3), (-1, 0), (2**31 - 1, 5)])
def test_an_id_outside_the_vocabulary_is_named_with_file_and_row(
    own: Path, monkeypatch: pytest.MonkeyPatch, bad: int, row: int
) -> None:
    pack = loader.pack

    def spoilt(*arguments: Any) -> Rows:
        rows = pack(*arguments)
        rows.tokens_NS[row, 7] = bad
        return rows

    monkeypatch.setattr(loader, "pack", spoilt)
    with pytest.raises(ValueError, match=f"row {row} holds token id {bad}, outside model.voc") as e:
        opened(own)
    assert f"{own}/cache/rows/" in str(e.value)
    assert "/train_0_tokens.npy" in str(e.value)


def test_the_largest_id_of_the_vocabulary_is_no_mistake(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = loader.pack

    def largest(*arguments: Any) -> Rows:
        rows = pack(*arguments)
        rows.tokens_NS[0, 7] = 4095
        return rows

    monkeypatch.setattr(loader, "pack", largest)
    opened(own)


def test_a_tokenizer_of_the_users_is_used(own: Path, encodings: list[str]) -> None:
    file = own / "mine.json"
    file.write_text(small.tokenizer().text)
    cfg, dataset = opened(own, tokenizer=str(file))
    assert "train" not in encodings
    assert dataset.tokenizer is not None
    assert dataset.tokenizer.digest == small.tokenizer().digest
    small_vocab = replace(
        cfg,
        model=replace(cfg.model, vocab_size=599),
        data=replace(cfg.data, tokenizer_vocab_size=400),
    )
    with pytest.raises(ValueError, match=r"mine\.json: 600 ids exceed model\.vocab_size=599"):
        open_dataset(small_vocab, own / "cache")


def test_the_cache_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V3JAX_CACHE", str(tmp_path))
    assert loader.cache_folder() == tmp_path
    monkeypatch.setenv("V3JAX_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loader.cache_folder() == tmp_path / ".cache" / "v3jax"
