"""Rows on disk: nothing lost or leaked, made once, whole or made anew."""

import hashlib
import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import small
from tests.data.small import N_TEXTS, opened
from v3jax.data import dataset as module
from v3jax.data.dataset import Dataset, open_dataset
from v3jax.data.packing import Rows


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
    found = [text for rows in small.trained(dataset) for text in documents_in(rows, dataset)]
    held = documents_in(dataset.heldout, dataset)
    assert sorted(found + held) == sorted(texts_of(home))
    assert 0.2 < len(held) / (3 * N_TEXTS) < 0.4
    assert [s.documents for s in dataset.sources] == [
        len(documents_in(rows, dataset)) for rows in small.trained(dataset)
    ]
    assert small.trained(dataset)[0].tokens_NS.shape[1] == cfg.data.seq_len + 1


def numbers_in(rows: Rows, dataset: Dataset) -> set[int]:
    """Which documents some word of `rows` comes from."""
    assert dataset.tokenizer is not None
    texts = (dataset.tokenizer.decode(row, skip_special_tokens=False) for row in rows.tokens_NS)
    return {int(n) for text in texts for n in re.findall(r"w(\d+)_", text)}


@pytest.mark.parametrize("seq_len", [32, 1023])
def test_nothing_held_out_is_trained_on(home: Path, seq_len: int) -> None:
    _, dataset = opened(home, seq_len=seq_len, fim_rate=0.5, newline_split_rate=0.5)
    trained = set().union(*(numbers_in(rows, dataset) for rows in small.trained(dataset)))
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
    assert any(
        (rows.tokens_NS == formed.tokenizer.fim_begin).any() for rows in small.trained(formed)
    )


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
    for source, rows, name in zip(dataset.sources, small.trained(dataset), "abc", strict=True):
        assert (source.name, source.rows) == (name, len(rows.tokens_NS))
        assert source.tokens == np.count_nonzero(rows.segments_NS)
        used, total = used + source.tokens, total + rows.segments_NS.size
    assert dataset.fill_rate == used / total
    assert dataset.fill_rate > 0.95
    held = documents_in(opened(home, seq_len=1023)[1].heldout, dataset)
    n_bytes = sum(len(t) for t in texts_of(home)) - sum(map(len, held))
    assert sum(s.megabytes for s in dataset.sources) == pytest.approx(n_bytes / 1e6)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was trained or encoded since."""
    done: list[str] = []
    train, encode = module.train_tokenizer, module.encode_documents

    def trained(*arguments: Any) -> Any:
        done.append("train")
        return train(*arguments)

    def encoded(*arguments: Any, **rates: Any) -> Any:
        done.append("encode")
        return encode(*arguments, **rates)

    monkeypatch.setattr(module, "train_tokenizer", trained)
    monkeypatch.setattr(module, "encode_documents", encoded)
    return done


def contents(dataset: Dataset) -> list[bytes]:
    rows = (*small.trained(dataset), dataset.heldout)
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
    pack = module.pack

    def spoilt(*arguments: Any) -> Rows:
        rows = pack(*arguments)
        rows.tokens_NS[row, 7] = bad
        return rows

    monkeypatch.setattr(module, "pack", spoilt)
    with pytest.raises(ValueError, match=f"row {row} holds token id {bad}, outside model.voc") as e:
        opened(own)
    assert f"{own}/cache/rows/" in str(e.value)
    assert "/train_0_tokens.npy" in str(e.value)


def test_the_largest_id_of_the_vocabulary_is_no_mistake(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = module.pack

    def largest(*arguments: Any) -> Rows:
        rows = pack(*arguments)
        rows.tokens_NS[0, 7] = 4095
        return rows

    monkeypatch.setattr(module, "pack", largest)
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
    assert module.cache_folder() == tmp_path
    monkeypatch.setenv("V3JAX_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.cache_folder() == tmp_path / ".cache" / "v3jax"


@pytest.fixture
def prepared(own: Path) -> Path:
    """A cached folder copied to another place; the corpus, the tokenizer and the cache are gone."""
    _, dataset = opened(own)
    assert dataset.folder is not None
    copied = own / "copied"
    shutil.copytree(dataset.folder, copied)
    shutil.rmtree(own / "cache")
    for name in "abc":
        (own / name).unlink()
    return copied


def test_prepared_rows_need_no_corpus(
    home: Path, prepared: Path, encodings: list[str], tmp_path: Path
) -> None:
    _, first = opened(home)
    encodings.clear()
    _, found = opened(tmp_path, sources=(), path=str(prepared))
    assert encodings == []
    assert found.folder == prepared
    assert contents(found) == contents(first)
    assert (found.digest, found.weights, found.sources) == (
        first.digest,
        (0.5, 0.3, 0.2),
        first.sources,
    )
    assert {(s, h) for s, _, h in found.files} == {(s, h) for s, _, h in first.files}
    assert found.tokenizer is not None
    assert first.tokenizer is not None
    assert found.tokenizer.digest == first.tokenizer.digest
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 64}, r"prepared with seq_len=32, not 64; --set data\.seq_len=32"),
        ({"fim_rate": 0.5}, r"prepared with fim_rate=0\.0, not 0\.5; --set data\.fim_rate=0\.0"),
        ({"newline_split_rate": 0.5}, r"prepared with newline_split_rate=0\.0, not 0\.5"),
        ({"tokenizer": "mine.json"}, r"bring their tokenizer; unset data\.tokenizer"),
    ],
)
def test_prepared_rows_of_another_form_are_refused(
    prepared: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        opened(prepared.parent, path=str(prepared), **changes)
    assert str(error.value).startswith(str(prepared))


@pytest.mark.parametrize(
    "name", ["train_1_tokens.npy", "heldout_segments.npy", "tokenizer.json", "dataset.json"]
)
def test_damaged_prepared_rows_are_refused(prepared: Path, name: str) -> None:
    raw = bytearray((prepared / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (prepared / name).write_bytes(raw)
    with pytest.raises(ValueError, match=r"copied: .* incomplete or damaged; copy them anew"):
        opened(prepared.parent, path=str(prepared))


def test_prepared_rows_without_what_made_them_are_refused(prepared: Path) -> None:
    (prepared / "dataset.json").write_text(json.dumps({"seq_len": 32}))
    digests = json.loads((prepared / "rows.json").read_text())
    digests["dataset.json"] = hashlib.sha256((prepared / "dataset.json").read_bytes()).hexdigest()
    (prepared / "rows.json").write_text(json.dumps(digests))
    with pytest.raises(ValueError, match="incomplete or damaged"):
        opened(prepared.parent, path=str(prepared))


def test_the_same_texts_elsewhere_are_listed_where_they_are(own: Path, tmp_path: Path) -> None:
    opened(own)
    moved = tmp_path / "moved"
    shutil.copytree(own / "a", moved)
    sources = (small.source("a", moved, weight=0.5), *small.three_sources(own)[1:])
    _, found = opened(own, sources=sources)
    names = [name for source, name, _ in found.files if source == "a"]
    assert names
    assert all(name.startswith(str(moved)) for name in names)
