"""The corpus: its order, cap, duplicates and split depend on the documents' text alone."""

import hashlib
import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.data import small
from v3jax.data.corpus import Corpus, load_corpus

TEXTS = [small.text(i) for i in range(200)]


def corpus(*folders: Path, max_mb: float = 1.0, **changes: float) -> Corpus:
    sources = tuple(small.source(f.name, f, max_mb=max_mb) for f in folders)
    return load_corpus(small.data(sources=sources, **changes))


def texts(side: tuple) -> list[str]:
    return [document.text for documents in side for document in documents]


def test_every_document_is_on_one_side(tmp_path: Path) -> None:
    found = corpus(small.write(tmp_path / "a", TEXTS))
    assert sorted(texts(found.train) + texts(found.heldout)) == sorted(TEXTS)
    assert set(texts(found.train)).isdisjoint(texts(found.heldout))


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.8])
def test_the_held_out_fraction_is_kept(tmp_path: Path, fraction: float) -> None:
    n = 2000
    folder = tmp_path / "a"
    folder.mkdir()
    lines = "".join(f'{{"text": "document {i}"}}\n' for i in range(n))
    (folder / "a.jsonl").write_text(lines)
    found = corpus(folder, heldout_fraction=fraction)
    held = len(texts(found.heldout)) / n
    assert abs(held - fraction) < 4 * (fraction * (1 - fraction) / n) ** 0.5


def test_a_documents_side_does_not_change_when_the_corpus_grows(tmp_path: Path) -> None:
    small_one = corpus(small.write(tmp_path / "a", TEXTS[:100]))
    large = corpus(small.write(tmp_path / "b", TEXTS))
    assert set(texts(small_one.train)) <= set(texts(large.train))
    assert set(texts(small_one.heldout)) <= set(texts(large.heldout))


def test_order_and_digest_do_not_depend_on_names(tmp_path: Path) -> None:
    first = corpus(small.write(tmp_path / "a", TEXTS))
    second = corpus(small.write(tmp_path / "b", reversed(TEXTS), "other{i}.md"))
    assert texts(first.train) == texts(second.train)
    assert texts(first.heldout) == texts(second.heldout)
    assert (first.digest, first.train_digest) == (second.digest, second.train_digest)
    assert texts(first.train) != sorted(texts(first.train))


def test_the_cap_takes_the_same_documents_from_any_names(tmp_path: Path) -> None:
    whole = corpus(small.write(tmp_path / "a", TEXTS))
    capped = [
        corpus(tmp_path / "a", max_mb=0.02),
        corpus(small.write(tmp_path / "b", reversed(TEXTS)), max_mb=0.02),
    ]
    for found in capped:
        size = sum(len(t.encode()) for t in texts(found.train) + texts(found.heldout))
        assert 0.018e6 < size <= 0.02e6
        assert texts(found.train) == texts(whole.train)[: len(texts(found.train))]
        assert texts(found.heldout) == texts(whole.heldout)[: len(texts(found.heldout))]


def test_duplicates_are_taken_once_and_by_the_first_source(tmp_path: Path) -> None:
    first = small.write(tmp_path / "a", [*TEXTS[:50], *TEXTS[:20]])
    second = small.write(tmp_path / "b", TEXTS[40:100])
    found = corpus(first, second)
    assert sorted(texts(found.train) + texts(found.heldout)) == sorted(TEXTS[:100])
    by_source = [len(t) + len(h) for t, h in zip(found.train, found.heldout, strict=True)]
    assert by_source == [50, 50]


def test_the_files_are_listed_with_their_hashes(tmp_path: Path) -> None:
    found = corpus(small.write(tmp_path / "a", TEXTS[:30]))
    assert len(found.files) == 30
    for source, name, digest in found.files:
        assert source == "a"
        assert hashlib.sha256(Path(name).read_bytes()).hexdigest() == digest


def test_the_digest_tells_corpora_apart(tmp_path: Path) -> None:
    a = small.write(tmp_path / "a", TEXTS[:50])
    b = small.write(tmp_path / "b", TEXTS[50:100])
    c = small.write(tmp_path / "c", [*TEXTS[:49], TEXTS[49] + " "])
    d = small.write(tmp_path / "d", TEXTS[:100])
    found = [
        corpus(a), corpus(b), corpus(c), corpus(d), corpus(a, b), corpus(b, a),
        corpus(a, heldout_fraction=0.5),
    ]  # fmt: skip
    assert len({x.digest for x in found}) == len(found)
    assert found[0].train_digest != found[-1].train_digest
    assert all(x != y for x, y in pairwise([f.train_digest for f in found]))


def test_a_path_of_the_users_replaces_the_sources(tmp_path: Path) -> None:
    folder = small.write(tmp_path / "a", TEXTS)
    found = load_corpus(
        small.data(sources=(small.source("unread", tmp_path / "absent"),), path=str(folder))
    )
    assert [s.name for s in found.sources] == ["user"]
    assert len(found.files) == 200


def test_the_users_text_field_is_used(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"body": "{i}"}}\n' for i in range(30)))
    found = load_corpus(small.data(path=str(file), text_field="body"))
    assert set(texts(found.train)) <= {str(i) for i in range(30)}


def test_a_corpus_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    a, b = small.write(tmp_path / "a", TEXTS[:50]), small.write(tmp_path / "b", TEXTS[:50])
    blank = small.write(tmp_path / "blank", [" \n"])
    one = small.write(tmp_path / "one", TEXTS[60:61])
    for folders, fraction, named in [
        ((), 0.3, "data.sources: the corpus is empty"),
        ((blank,), 0.3, f"{blank}: no documents; the corpus is empty"),
        ((a, blank), 0.3, f"{blank}: no documents; the corpus is empty"),
        ((a, b), 0.3, f"{b}: all documents stand in earlier sources; the corpus is empty"),
        ((one,), 1e-6, f"{one}: no held-out documents among 1; add documents or change"),
        ((one,), 1 - 1e-9, f"{one}: no training documents among 1; add documents or change"),
        ((a, one), 1 - 1e-9, f"{a}: no training documents among 50"),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(named)}"):
            corpus(*folders, heldout_fraction=fraction)
