"""Facts are stated and asked for again at every distance, in sentences other than the needle's."""

import re
from collections import Counter

import numpy as np
import pytest

from v3jax.config import SourceConfig
from v3jax.data import key_values
from v3jax.data.sources import read
from v3jax.evals import needle

KEY = re.compile(rf"\b({'|'.join(key_values.KEYS)})\b")
VALUE = re.compile(rf" ((?:{'|'.join(key_values.FIRST)}) (?:{'|'.join(key_values.SECOND)}))\b")


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return dict(key_values.documents())


@pytest.fixture(scope="module")
def stories(documents: dict[str, str]) -> list[str]:
    return [text for name, text in documents.items() if name.startswith("story")]


@pytest.fixture(scope="module")
def tables(documents: dict[str, str]) -> list[str]:
    return [text for name, text in documents.items() if name.startswith("table")]


def facts(text: str) -> list[tuple[int, str, str]]:
    """Line, key and value of every line that has both."""
    found = []
    for number, line in enumerate(text.splitlines()):
        key, value = KEY.search(line), VALUE.search(line)
        assert (key is None) == (value is None), line
        if key is not None and value is not None:
            found.append((number, key[1], value[1]))
    return found


def test_documents_are_the_same_at_every_call_and_all_different(documents: dict[str, str]) -> None:
    source = SourceConfig(name="key_values", weight=1.0, max_mb=1e9)
    assert {d.name: d.text for d in read(source)} == documents
    assert len(set(documents.values())) == len(documents)


def test_there_are_as_many_documents_of_each_kind(documents: dict[str, str]) -> None:
    kinds = Counter(name.split()[0] for name in documents)
    assert kinds.keys() == {"table", "story"}
    assert max(kinds.values()) - min(kinds.values()) <= 1


def test_a_key_keeps_its_value_within_a_document_and_not_beyond(
    stories: list[str], tables: list[str]
) -> None:
    of_paris = set()
    for text in stories[:100] + tables[:100]:
        values: dict[str, str] = {}
        for _, key, value in facts(text):
            assert values.setdefault(key, value) == value
        of_paris.add(values.get("Paris"))
    assert len(of_paris) > 50


def test_facts_are_asked_for_near_and_far(stories: list[str]) -> None:
    backs = []
    for text in stories[:200]:
        last: dict[str, int] = {}
        for number, key, _ in facts(text):
            if key in last:
                backs.append(number - last[key])
            last[key] = number
    assert min(backs) == 1
    assert max(backs) > 200
    near, far = (
        np.mean([where(n) for n in backs]) for where in (lambda n: n < 8, lambda n: n > 32)
    )
    assert near > 0.2
    assert far > 0.1


def test_documents_are_of_all_lengths(stories: list[str]) -> None:
    lines = sorted(text.count("\n") for text in stories)
    assert lines[0] < 10
    assert lines[-1] > 400
    fewer = sum(n < 54 for n in lines)  # 54: between 6 and 480 by their logarithm
    assert 0.4 < fewer / len(lines) < 0.6


def test_tables_are_facts_alone_and_filler_of_stories_holds_none(
    stories: list[str], tables: list[str]
) -> None:
    assert all(KEY.search(line) for text in tables for line in text.splitlines())
    lines = "".join(stories[:100]).splitlines()
    filler = [line for line in lines if KEY.search(line) is None]
    assert 0.4 < len(filler) / len(lines) < 0.9
    words = {word for line in filler for word in re.findall(r"\w+", line)}
    assert words.isdisjoint(key_values.FIRST + key_values.SECOND)


def test_words_of_a_list_are_distinct_and_of_one_list_alone() -> None:
    words = key_values.KEYS + key_values.FIRST + key_values.SECOND
    assert len(set(words)) == len(words)


def phrases(template: str) -> set[tuple[str, ...]]:
    """All three words in a row of a template, blanks left out."""
    parts = re.split(r"\{\w+\}", template.casefold())
    words = [re.findall(r"\w+", part) for part in parts]
    return {tuple(w[i : i + 3]) for w in words for i in range(len(w) - 2)}


def test_no_template_of_the_needle_test_is_trained_on() -> None:
    trained = set().union(*map(phrases, key_values.FACTS + key_values.ASKS))
    tested = set().union(*map(phrases, (needle.NEEDLE, needle.QUESTION, needle.OPENING)))
    assert trained
    assert ("the", "treasure", "hidden") in tested
    assert trained.isdisjoint(tested)
    stated = [t.replace("{key}", "Paris").replace("{value}", "x") for t in key_values.FACTS]
    assert needle.NEEDLE.strip().format(key="Paris", value="x") not in stated


def test_a_key_is_the_same_behind_every_template() -> None:
    for template in key_values.FACTS + key_values.ASKS:
        assert " {key}" in template
        assert " {value}" in template
