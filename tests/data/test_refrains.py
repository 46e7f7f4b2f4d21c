"""Refrains repeat words that are in no order, each a few times and no two alike."""

import pytest

from v3jax.config import SourceConfig
from v3jax.data import key_values, refrains
from v3jax.data.instructions import side_of
from v3jax.data.sources import read


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return dict(refrains.documents())


def parts(text: str) -> list[tuple[list[str], int]]:
    """The words of each refrain and how often they are said in a row."""
    lines, found = text.splitlines(), []
    while lines:
        period = next((n for n in (1, 2) if lines[n : 2 * n] == lines[:n]), None)
        assert period is not None, lines[:4]
        times = 1
        while lines[times * period : (times + 1) * period] == lines[:period]:
            times += 1
        found.append((" ".join(lines[:period]).split(), times))
        lines = lines[times * period :]
    return found


def test_documents_are_the_same_at_every_call_and_all_different(documents: dict[str, str]) -> None:
    source = SourceConfig(name="refrains", weight=1.0, max_mb=1e9)
    assert {d.name: d.text for d in read(source)} == documents
    assert len(set(documents.values())) == len(documents)


def test_a_refrain_says_its_words_three_to_six_times_in_the_same_order(
    documents: dict[str, str],
) -> None:
    seen = set()
    for text in list(documents.values())[:200]:
        for words, times in parts(text):
            assert 3 <= times <= 6
            assert 2 <= len(words) <= 16
            seen.add(tuple(words))
    assert len(seen) > 1000


def test_words_are_of_the_facts_or_made_up_and_none_is_held_out(documents: dict[str, str]) -> None:
    made = {w for text in list(documents.values())[:200] for w in text.split()}
    made -= set(key_values.WORDS)
    assert len(made) > 1000
    assert all(side_of(word) == "train" for word in made)
