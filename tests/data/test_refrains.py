"""Refrains say words in no order, each a few times; frequent words are in most of them."""

from collections import Counter

import pytest

from v3jax.config import SourceConfig
from v3jax.data import key_values, refrains
from v3jax.data.instructions import SYLLABLES, side_of
from v3jax.data.sources import read


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return dict(refrains.documents())


def refrain(text: str) -> tuple[list[str], int]:
    """The words of a refrain, and how often they are said."""
    lines = text.splitlines()
    period = next(n for n in (1, 2) if lines[n : 2 * n] == lines[:n])
    times, rest = divmod(len(lines), period)
    assert rest == 0
    assert lines == lines[:period] * times
    return " ".join(lines[:period]).split(), times


def test_documents_are_the_same_at_every_call_and_hardly_any_is_there_twice(
    documents: dict[str, str],
) -> None:
    source = SourceConfig(name="refrains", weight=1.0, max_mb=1e9)
    assert {d.name: d.text for d in read(source)} == documents
    assert len(set(documents.values())) > 0.99 * len(documents)


def test_every_document_is_one_refrain(documents: dict[str, str]) -> None:
    found = [refrain(text) for text in documents.values()]
    assert {len(words) for words, _ in found} == set(range(2, 17))
    assert {times for _, times in found} == {2, 3, 4}


def test_some_words_are_much_more_frequent_than_others(documents: dict[str, str]) -> None:
    said = Counter(word for text in documents.values() for word in refrain(text)[0])
    known = [said[word] for word in key_values.WORDS]
    assert min(known) > 0
    assert known[0] > 8 * known[-1]
    assert all(said[syllable] for syllable in SYLLABLES)


def test_made_up_words_are_none_that_is_held_out(documents: dict[str, str]) -> None:
    made = {word for text in documents.values() for word in text.split()}
    made -= set(key_values.WORDS) | set(SYLLABLES)
    assert len(made) > 10_000
    assert all(side_of(word) == "train" for word in made)
