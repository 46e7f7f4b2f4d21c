"""Training on a prepared corpus: rows of its texts, any of them at once."""

import json
import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import corpus_on_disk, small
from v3jax import config
from v3jax.config import ExperimentConfig
from v3jax.data import fim, loader, prepared
from v3jax.data.dataset import Dataset, open_dataset
from v3jax.data.loader import make_loader
from v3jax.data.packing import pack
from v3jax.data.prepared import Quarantine, TrainingDocuments, held_out, measure
from v3jax.data.shards import Shards
from v3jax.evals import by_source

TEXTS = {
    "notes": (
        [small.text(i, 10 + 7 * i) for i in range(40)],
        [small.text(100 + i) for i in range(9)],
    ),
    "code": (small.stdlib_texts()[:6], small.stdlib_texts("d*.py")[:3]),
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    weights = {"notes": 3.0, "code": 1.0}
    return corpus_on_disk.write(tmp_path / "corpus", small.tokenizer(), TEXTS, weights=weights)


def experiment(corpus: Path, **changes: Any) -> ExperimentConfig:
    cfg = small.config(path=str(corpus), **changes)
    return replace(cfg, model=replace(cfg.model, vocab_size=600))


def opened(corpus: Path, home: Path, **changes: Any) -> tuple[ExperimentConfig, Dataset]:
    cfg = experiment(corpus, **changes)
    return cfg, open_dataset(cfg, home)


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.5, 0.0), (0.5, 0.3)], ids=str)
def test_rows_are_those_of_the_texts(
    corpus: Path, tmp_path: Path, rates: tuple[float, float]
) -> None:
    options = dict(zip(("fim_rate", "newline_split_rate"), rates, strict=True))
    cfg, dataset = opened(corpus, tmp_path / "cache", **options)
    assert dataset.weights == (3.0, 1.0)
    for (texts, _), rows in zip(TEXTS.values(), dataset.train, strict=True):
        ids = fim.encode_documents(small.tokenizer(), texts, seed=cfg.run.seed, **options)
        expected = pack(list(ids), 33, small.tokenizer().pad)
        assert len(rows) == len(expected)
        assert rows.n_tokens == expected.n_tokens
        for i in range(len(rows)):
            np.testing.assert_array_equal(rows[i], expected[i])


def test_held_out_rows_are_plain_and_from_every_source(corpus: Path, tmp_path: Path) -> None:
    _, dataset = opened(corpus, tmp_path / "cache", fim_rate=1.0)
    texts = [text for _, held in TEXTS.values() for text in held]
    ids = list(
        fim.encode_documents(small.tokenizer(), texts, seed=0, fim_rate=0.0, newline_split_rate=0.0)
    )
    expected = {row.tobytes() for row in pack(ids, 33, small.tokenizer().pad).tokens_NS}
    found = {row.tobytes() for row in dataset.heldout.tokens_NS}
    assert found <= expected
    assert len(found) == min(len(expected), experiment(corpus).run.eval_sequences)
    documents = dict(held_out(experiment(corpus).data))
    assert {n: tuple(d.text for d in some) for n, some in documents.items()} == {
        name: tuple(held) for name, (_, held) in TEXTS.items()
    }


def test_any_position_is_there_without_those_before(corpus: Path, tmp_path: Path) -> None:
    cfg, dataset = opened(corpus, tmp_path / "cache", fim_rate=0.5)
    straight = list(islice(make_loader(cfg, dataset), 12))
    for step in (1, 7, 11):
        resumed = make_loader(cfg, dataset)
        resumed.set_state({"sequences": _drawn(straight[:step]), "digest": dataset.digest})
        np.testing.assert_array_equal(next(resumed).tokens_MRS, straight[step].tokens_MRS)


def _drawn(batches: list[Any]) -> int:
    return sum(2 * batch.n_micro for batch in batches)


def test_the_plan_is_kept_and_a_damaged_one_is_made_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = opened(corpus, tmp_path / "cache", fim_rate=0.5)
    last = [rows[len(rows) - 1] for rows in first.train]
    made = []
    make_plan = prepared.make_plan
    monkeypatch.setattr(prepared, "make_plan", lambda *a: made.append(a) or make_plan(*a))
    _, again = opened(corpus, tmp_path / "cache", fim_rate=0.5)
    assert len(made) == 1  # that of the held-out rows
    plans = sorted((tmp_path / "cache" / "plans").glob("*/document_P.npy"))
    assert len(plans) == 2
    plans[0].write_bytes(plans[0].read_bytes()[:-1] + b"\x7f")
    _, third = opened(corpus, tmp_path / "cache", fim_rate=0.5)
    assert len(made) == 3
    assert again.digest == first.digest == third.digest
    for expected, rows in zip(last, third.train, strict=True):
        np.testing.assert_array_equal(rows[len(rows) - 1], expected)


def test_what_is_measured_does_not_depend_on_processes(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "_AT_ONCE", 10)
    records = Shards.open(corpus).sources[0].train
    documents = TrainingDocuments(records, small.tokenizer(), 0, 0.5, 0.5, 600, Quarantine(0))
    alone, beside = (measure(documents, 500, n) for n in (1, 2))
    for a, b in zip(vars(alone).values(), vars(beside).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [len(documents[i]) for i in range(40)] == alone.length_N.tolist()
    assert 0 < len(alone.kept_K) < (alone.length_N > 500).sum()
    again = pickle.loads(pickle.dumps(documents))
    np.testing.assert_array_equal(again[3], documents[3])


def test_a_document_of_many_rows_is_not_encoded_again_for_each(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, dataset = opened(corpus, tmp_path / "cache", fim_rate=1.0)
    encoded = []
    from_ids = fim.from_ids
    monkeypatch.setattr(fim, "from_ids", lambda *a, **k: encoded.append(a) or from_ids(*a, **k))
    rows = dataset.train[1]
    assert len([rows[i] for i in range(len(rows))]) > 50 * len(TEXTS["code"][0])
    assert len(encoded) < len(TEXTS["code"][0])


# ---- Sources of it by name


def test_sources_are_chosen_and_weighted_on_the_command_line(corpus: Path, tmp_path: Path) -> None:
    cfg = experiment(corpus)
    told = f"data.sources={corpus}/code:0.25,{corpus}/notes:0.75"
    cfg = config.override(cfg, ["data.path=none", told])
    dataset = open_dataset(cfg, tmp_path / "cache")
    assert [source.name for source in dataset.sources] == ["code", "notes"]
    assert dataset.weights == (0.25, 0.75)
    one = config.override(cfg, [f"data.sources={corpus}/notes"])
    assert open_dataset(one, tmp_path / "cache").weights == (1.0,)
    assert open_dataset(one, tmp_path / "cache").digest != dataset.digest


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{corpus}/poems", "no source 'poems'; it has code, notes"),
        (
            "{corpus}/code,{other}",
            "is no source of .*corpus; prepare all sources of a run together",
        ),
        ("{corpus}/code:much", "write PATH:WEIGHT,PATH:WEIGHT"),
        (":2", "write PATH:WEIGHT,PATH:WEIGHT"),
        ("{corpus}/code:-1", r"weight: must be positive"),
    ],
)
def test_sources_that_are_not_there_are_one_line(
    corpus: Path, tmp_path: Path, told: str, message: str
) -> None:
    other = small.write(tmp_path / "other", [small.text(1)])
    cfg = config.override(experiment(corpus), ["data.path=none"])
    told = told.format(corpus=corpus, other=other)
    with pytest.raises(ValueError, match=message):
        open_dataset(config.override(cfg, [f"data.sources={told}"]), tmp_path / "cache")


def test_a_model_with_too_few_ids_or_a_tokenizer_of_ones_own_is_one_line(
    corpus: Path, tmp_path: Path
) -> None:
    cfg = experiment(corpus)
    with pytest.raises(ValueError, match=r"600 ids exceed model\.vocab_size=500"):
        open_dataset(replace(cfg, model=replace(cfg.model, vocab_size=500)), tmp_path)
    with pytest.raises(ValueError, match=r"brings its tokenizer; unset data\.tokenizer"):
        opened(corpus, tmp_path, tokenizer="tokenizer.json")


# ---- Damage


def test_a_damaged_record_is_left_out_counted_and_named(corpus: Path, tmp_path: Path) -> None:
    _, whole = opened(corpus, tmp_path / "cache")
    undamaged = [[rows[i] for i in range(len(rows))] for rows in whole.train]
    file = corpus_on_disk.damage(corpus, "notes", 1)
    _, dataset = opened(corpus, tmp_path / "cache")
    assert dataset.quarantine is not None
    dataset.quarantine.keep_in(tmp_path / "run" / "quarantine-0.jsonl")
    lost = 0
    for expected, rows in zip(undamaged, dataset.train, strict=True):
        assert len(rows) == len(expected)
        for i in range(len(rows)):
            tokens, segments = rows[i]
            _, said = expected[i]
            lost += int((said > 0).sum() - (segments > 0).sum())
            np.testing.assert_array_equal(tokens[segments > 0], expected[i][0][segments > 0])
    assert lost > 0
    (row,) = map(json.loads, (tmp_path / "run" / "quarantine-0.jsonl").read_text().splitlines())
    assert row["source"] == "notes"
    assert (row["side"], row["document"]) == ("train", 7)
    assert f"{file}: record 0" in row["reason"]


def test_what_was_damaged_before_a_file_was_named_is_written_too(
    corpus: Path, tmp_path: Path
) -> None:
    """The same document number on the other side of the split is another document."""
    (source, _) = Shards.open(corpus).sources
    file = tmp_path / "quarantine-0.jsonl"
    first = Quarantine(2)
    first.add(source.train, 3, "bad")
    first.add(source.heldout, 3, "bad")
    first.keep_in(file)
    again = Quarantine(2)
    again.keep_in(file)
    again.add(source.train, 3, "bad")
    assert len(file.read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="3 documents cannot be read"):
        again.add(source.train, 4, "worse")
    assert len(file.read_text().splitlines()) == 3


def test_what_a_copy_finds_is_counted_and_written_by_the_run(corpus: Path, tmp_path: Path) -> None:
    """A process that reads ahead has a copy; the budget and the file are the run's."""
    for shard in (0, 3):
        corpus_on_disk.damage(corpus, "notes", shard)
    cfg, dataset = opened(corpus, tmp_path / "cache", max_corrupt=1)
    mine = make_loader(cfg, dataset)
    source = loader._MicroBatches(mine._order, 2, [0, 1], 0, dataset.quarantine)
    there = pickle.loads(pickle.dumps(source))
    found = [one for i in range(200) for one in there[i][2]]
    assert len(found) == len({one.key for one in found}) == 2
    assert dataset.quarantine is not None
    assert not dataset.quarantine.taken()
    file = tmp_path / "run" / "quarantine-0.jsonl"
    dataset.quarantine.keep_in(file)
    dataset.quarantine.add_all(found[:1])
    with pytest.raises(ValueError, match=r"2 documents cannot be read, data\.max_corrupt is 1"):
        dataset.quarantine.add_all(found)
    assert len(file.read_text().splitlines()) == 2


def test_a_mixture_of_other_sources_is_one_line(corpus: Path, tmp_path: Path) -> None:
    cfg, dataset = opened(corpus, tmp_path / "cache", mixture=((1e9, (1.0, 1.0, 1.0)),))
    with pytest.raises(ValueError, match="3 weights for 2 sources; give one a source"):
        make_loader(cfg, dataset)


def test_beyond_the_budget_the_run_stops(corpus: Path, tmp_path: Path) -> None:
    for shard in (0, 3):
        corpus_on_disk.damage(corpus, "notes", shard)
    cfg, dataset = opened(corpus, tmp_path / "cache", max_corrupt=1)
    with pytest.raises(ValueError, match=r"2 documents cannot be read, data\.max_corrupt is 1"):
        list(islice(make_loader(cfg, dataset), 200))


def test_an_id_outside_the_vocabulary_is_quarantined(corpus: Path) -> None:
    records = Shards.open(corpus).sources[0].train
    quarantine = Quarantine(1)
    documents = TrainingDocuments(records, small.tokenizer(), 0, 0.0, 0.0, 300, quarantine)
    assert len(documents[0]) == 0
    with pytest.raises(ValueError, match="outside the vocabulary of 300"):
        documents[1]
    assert len(documents[0]) == 0  # the same again is no other


def test_held_out_figures_by_source_are_of_the_prepared_text(corpus: Path) -> None:
    cfg = experiment(corpus)
    found = by_source._held_out_rows(cfg.data, small.tokenizer(), 5)
    assert [(name, n) for name, n, _ in found] == [("notes", 9), ("code", 3)]
