"""The needle test: where the needle lies, how long a context is, what an answer scores."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import mini
from v3jax import report, summary
from v3jax.data import key_values
from v3jax.data.chat import DEFAULT_TEMPLATE, ChatTemplate
from v3jax.decode import Engine
from v3jax.decode.engine import Generation, Stats
from v3jax.evals import needle
from v3jax.models import Loaded, open_model

PROSE = [
    f"Sentence {n} says this. It has another one!\nAnd a line {n} behind it.\n" for n in range(40)
]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return open_model(mini.finished())


@pytest.fixture(scope="module")
def contexts(loaded: Loaded) -> needle.Contexts:
    return needle.Contexts(loaded.tokenizer, loaded.tokenizer.encode_batch(PROSE))


def test_lengths_are_the_reports_where_the_context_is() -> None:
    in_k = [2, 11, 20, 29, 38, 47, 56, 65, 74, 83, 92, 101, 110, 119, 128]
    assert [n / 1024 for n in needle.lengths(128 * 1024)] == in_k
    assert needle.lengths(1024)[:3] == (128, 192, 256)
    assert needle.lengths(4096)[-1] == 4096
    with pytest.raises(ValueError, match="128 tokens are too short to hide anything"):
        needle.lengths(128)


@pytest.mark.parametrize("depth", needle.DEPTHS)
def test_a_needle_lies_at_its_depth_on_a_boundary(
    contexts: needle.Contexts, loaded: Loaded, depth: int
) -> None:
    cell = contexts.cell(1500, depth, "a", "b")
    text = loaded.tokenizer.decode(cell.prompt)
    before, hidden, after = text.partition("The treasure hidden in ")
    assert hidden
    said = re.match(r"(\w+) is (\w+ \w+)\.\n(.*)", after, re.DOTALL)
    assert said is not None
    key, value, hay = said.groups()
    assert key in key_values.KEYS
    assert value == cell.value
    question = f"\nWhat is the treasure hidden in {key}? The treasure hidden in {key} is"
    assert hay.endswith(question)
    hay = hay.removesuffix(question)
    assert depth in (0, 100) or before.strip()[-1] in ".!"
    n_hay = len(before) + len(hay)
    assert abs(len(before) / n_hay - depth / 100) < 0.02
    if depth in (0, 100):
        assert (before if depth == 0 else hay).strip() == ""


def test_prompt_and_answer_have_exactly_the_length(contexts: needle.Contexts) -> None:
    for length in (300, 301, 777):
        made = {
            len(contexts.cell(length, depth, f"{depth}", "b").prompt) for depth in needle.DEPTHS
        }
        assert made == {length - contexts.answer}
    with pytest.raises(ValueError, match="a context of 60 tokens has no room for the question"):
        contexts.cell(60, 0, "a", "b")


def test_every_value_fits_in_the_room_of_the_answer(
    contexts: needle.Contexts, loaded: Loaded
) -> None:
    for first, second in ((f, s) for f in key_values.FIRST for s in key_values.SECOND[::9]):
        assert len(loaded.tokenizer.encode(f" {first} {second}")) < contexts.answer


def test_cells_are_drawn_from_their_seeds_alone(contexts: needle.Contexts) -> None:
    assert contexts.cell(500, 50, "a", "b") == contexts.cell(500, 50, "a", "b")
    assert contexts.cell(500, 50, "c", "b").value != contexts.cell(500, 50, "a", "b").value
    one, other = (contexts.cell(500, 0, "a", seed).prompt for seed in "bc")
    assert one != other


def test_no_key_of_the_haystack_is_asked_for(loaded: Loaded) -> None:
    documents = [" ".join(key_values.KEYS[:-1]) + ".\n"] * 9
    maker = needle.Contexts(loaded.tokenizer, loaded.tokenizer.encode_batch(documents))
    for seed in "abc":
        text = loaded.tokenizer.decode(maker.cell(600, 50, seed, "b").prompt)
        assert f"hidden in {key_values.KEYS[-1]} is" in text


def test_in_a_chat_the_haystack_is_the_users_and_the_opening_the_assistants(loaded: Loaded) -> None:
    chat = ChatTemplate(DEFAULT_TEMPLATE, loaded.tokenizer)
    maker = needle.Contexts(loaded.tokenizer, loaded.tokenizer.encode_batch(PROSE), chat)
    cell = maker.cell(600, 50, "a", "b")
    assert len(cell.prompt) == 600 - maker.answer
    text = loaded.tokenizer.decode(cell.prompt, skip_special_tokens=False)
    head, user, rest = text.partition("<｜User｜>")
    asked, assistant, opening = rest.partition("<｜Assistant｜>")
    assert user
    assert assistant
    assert "Sentence" not in head
    assert f" is {cell.value}." in asked
    assert re.search(r"\nWhat is the treasure hidden in \w+\?$", asked)
    assert re.fullmatch(r"The treasure hidden in \w+ is", opening)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" amber falcon", 10),
        (" Amber falcon. And", 10),
        (" amber falcons", 5.5),
        (" amber", 5.5),
        (" falcon amber", 1),
        (" the amber falcon", 1),
        ("", 1),
    ],
)
def test_a_score_counts_words_that_are_right_from_the_first(answer: str, expected: float) -> None:
    assert needle.score("amber falcon", answer) == expected


def oracle(found: Any, *, knows: int) -> Any:
    """An engine that copies the value of contexts of at most so many tokens, read or not."""

    def generate(self: Engine, prompts: list[list[int]], *, max_tokens: int, **_: Any) -> Any:
        made = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            value = text.partition("The treasure hidden in ")[2].partition(" is ")[2][:40]
            ids = found.encode(f" {value}")[:max_tokens] if len(prompt) < knows else [0]
            made.append(Generation(ids=ids))
        return made, Stats()

    return generate


def test_cells_are_scored_where_they_belong(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "generate", oracle(loaded.tokenizer, knows=500))
    seen = []
    found = needle.needle(loaded, longest=600, n_needles=2, progress=lambda *row: seen.append(row))
    short = np.array(found.lengths) < 500
    assert 0 < short.sum() < 15
    assert np.shape(found.score_DL) == np.shape(found.exact_DL) == (15, 15)
    np.testing.assert_array_equal(found.score_DL, np.tile(np.where(short, 10.0, 1.0), (15, 1)))
    assert found.exact_L == [float(x) for x in short]
    assert found.exact == short.mean()
    assert seen == [
        (n, 10.0 if x else 1.0, float(x)) for n, x in zip(found.lengths, short, strict=True)
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"longest": 100}, "too short to hide anything"),
        ({}, "contexts of 32 tokens are too short.*--max-length"),
        ({"longest": 300, "n_needles": 0}, "at least one"),
    ],
)
def test_what_cannot_be_made_is_said(loaded: Loaded, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needle.needle(loaded, **changes)


def test_prose_comes_before_programs_and_facts_never(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    from v3jax.data.sources import Document

    def held(data: Any) -> Any:
        texts = {
            "code": "x[0] += f(1, 2)\n",
            "key_values": "Note Rome x.\n",
            "prose": "Words are here.\n",
        }
        return [(name, (Document(name, "a", text * 9),)) for name, text in texts.items()]

    monkeypatch.setattr(needle, "held_out", held)
    few, many = (needle.haystack(loaded, n) for n in (10, 10_000))
    assert ["Words" in loaded.tokenizer.decode(ids) for ids in few] == [True]
    assert ["x[0]" in loaded.tokenizer.decode(ids) for ids in many] == [False, True]


def test_public_weights_get_the_language_reference(loaded: Loaded) -> None:
    documents = needle.haystack(replace(loaded, data=None), 1000)
    assert sum(map(len, documents)) > 100_000


def test_yarn_is_the_reports_or_off(loaded: Loaded) -> None:
    on = needle.with_yarn(loaded, 40.0).model.yarn
    assert on is not None
    assert (on.factor, on.beta_fast, on.beta_slow, on.mscale) == (40, 32, 1, 1)
    assert on.original_seq_len == loaded.context
    longer = replace(needle.with_yarn(loaded, 40.0), context=999)
    again = needle.with_yarn(longer, 8.0).model.yarn
    assert again is not None
    assert again.original_seq_len == loaded.context
    assert needle.with_yarn(longer, None).model.yarn is None


MAP = report.Needles(
    (128, 1024), (0, 50, 100), [[1, 10], [5.5, 10], [1, 1]], [[0, 1], [0, 1], [0, 0]], 2
)


def test_the_map_shows_every_cell_from_red_to_green() -> None:
    page = report.needle_page("a <run>", MAP)
    assert "a &lt;run&gt;" in page
    titles = re.findall(r"<title>([^<]*score[^<]*)</title>", page)
    assert titles[:2] == [
        "128 tokens, depth 0%: score 1.0, right 0%",
        "1,024 tokens, depth 0%: score 10.0, right 100%",
    ]
    assert len(titles) == 6
    fills = re.findall(r'<rect[^>]*fill="(rgb[^"]*)"', page)
    assert fills[0] == fills[4] == "rgb(214,69,65)"
    assert fills[1] == "rgb(46,160,87)"
    assert fills[2] == "rgb(245,215,110)"
    assert "Right answers: 33.3%" in page
    assert not re.search(r"<(script|link|img|iframe|object)\b|https?://|url\(|@import", page)


def test_a_runs_page_keeps_one_map_through_a_new_report(tmp_path: Path) -> None:
    from etils import epath

    folder = epath.Path(tmp_path)
    assert not summary.keep_needles(folder, MAP)  # no page yet
    assert not list(tmp_path.iterdir())
    (tmp_path / "report.html").write_text((mini.finished() / "report.html").read_text())
    for _ in range(2):
        assert summary.keep_needles(folder, MAP)
    page = (tmp_path / "report.html").read_text()
    assert page.count('<section id="needle">') == 1
    assert page.count("</body>") == 1
    assert summary._needles(folder) == report.Needles(**json.loads(MAP.to_text()))


@pytest.mark.parametrize("text", ["", "{}", '{"lengths": 3}', MAP.to_text().replace("5.5", "[2]")])
def test_a_damaged_map_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"RUN/needle\.json: damaged; delete it"):
        report.Needles.from_text(text, "RUN/needle.json")
