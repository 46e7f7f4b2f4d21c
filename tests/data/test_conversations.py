"""Conversations as training documents: what is learnt, what is only seen, what is refused."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import small
from v3jax.config import SourceConfig
from v3jax.data import instructions
from v3jax.data.chat import DEFAULT_TEMPLATE, ChatTemplate
from v3jax.data.conversations import encode_conversations, text_of
from v3jax.data.packing import seen
from v3jax.data.sources import read
from v3jax.data.tokenizer import EOS

Message = dict[str, Any]


def said(role: str, content: str | None, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


CALL = {"function": {"name": "f", "arguments": "{}"}}
# A template of no tool tokens, which the little tokenizer lacks: `tools` is written as text.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<｜Assistant｜>"
    "{{ m.content or '' }}{% if m.tool_calls %}calls {{ m.tool_calls[0].function.name }}"
    "{% endif %}{{ eos_token }}{% else %}{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


def template(source: str = DEFAULT_TEMPLATE) -> ChatTemplate:
    return ChatTemplate(source, small.tokenizer())


def encoded(messages: list[Message], source: str = DEFAULT_TEMPLATE) -> list[np.ndarray]:
    return encode_conversations(template(source), [("here", json.dumps(messages))], 10**6).documents


def learnt(ids: np.ndarray) -> str:
    """The targets of a document as text."""
    return small.tokenizer().decode(ids[ids >= 0].tolist(), skip_special_tokens=False)


def whole(ids: np.ndarray) -> str:
    plain = np.where(ids < 0, ~ids, ids).tolist()
    return small.tokenizer().decode(plain, skip_special_tokens=False)


CONVERSATION = [
    said("system", "Be brief."),
    said("user", "Who?"),
    said("assistant", "I."),
    said("user", "Really?"),
    said("assistant", "Yes, I."),
]


def test_what_the_assistant_says_is_learnt_with_the_token_that_ends_it() -> None:
    (ids,) = encoded(CONVERSATION)
    assert learnt(ids) == f"I.{EOS}Yes, I.{EOS}"
    assert whole(ids) == template().render(CONVERSATION, add_generation_prompt=False)


def test_an_answer_is_encoded_behind_its_prompt_as_it_is_when_the_model_is_asked() -> None:
    (ids,) = encoded(CONVERSATION)
    tokenizer = small.tokenizer()
    for turns in (2, 4):
        prompt = template().encode(CONVERSATION[:turns])
        answer = [*tokenizer.encode(CONVERSATION[turns]["content"]), tokenizer.eos]
        at = len(prompt)
        np.testing.assert_array_equal(np.where(ids < 0, ~ids, ids)[:at], prompt)
        np.testing.assert_array_equal(ids[at : at + len(answer)], answer)
        assert ids[at - 1] < 0, "the token that opens the turn is given"


def test_turns_after_the_last_answer_are_left_out() -> None:
    (ids,) = encoded([*CONVERSATION, said("user", "Why?")])
    np.testing.assert_array_equal(ids, encoded(CONVERSATION)[0])


def test_control_tokens_that_a_user_spells_are_plain_text() -> None:
    (ids,) = encoded([said("user", f"a{EOS}<｜Assistant｜>b"), said("assistant", "c")])
    eos = small.tokenizer().eos
    assert (np.where(ids < 0, ~ids, ids) == eos).sum() == 1
    assert learnt(ids) == f"c{EOS}"


def test_reasoning_is_learnt_where_it_stands_and_not_kept_in_what_follows() -> None:
    first, second = "<think>Hm.</think>I.", "<think>Well.</think>Yes."
    messages = [said("user", "Who?"), said("assistant", first)]
    messages += [said("user", "Really?"), said("assistant", second)]
    documents = encoded(messages)
    assert [learnt(ids) for ids in documents] == [f"{first}{EOS}", f"{second}{EOS}"]
    assert "Hm." not in whole(documents[1])
    prompt = template().encode(messages[:3])
    np.testing.assert_array_equal(documents[1][: len(prompt)], seen(np.array(prompt)))


def test_calls_of_tools_are_learnt_and_their_outputs_only_seen() -> None:
    messages = [
        said("user", "Look."),
        said("assistant", "So: ", tool_calls=[CALL]),
        said("tool", "7"),
        said("assistant", "It is 7."),
    ]
    (ids,) = encoded(messages, PLAIN)
    assert learnt(ids) == f"So: calls f{EOS}It is 7.{EOS}"
    assert "tool: 7" in whole(ids)


def test_a_template_that_leaves_out_words_beside_calls_is_refused() -> None:
    bad = PLAIN.replace("{{ m.content or '' }}{% if m.tool", "{% if m.tool")
    messages = [said("user", "q"), said("assistant", "So: ", tool_calls=[CALL])]
    with pytest.raises(ValueError, match=r"here: chat template: leaves out .* messages\[1\] says"):
        encoded(messages, bad)


def test_a_template_that_opens_turns_in_two_ways_is_refused() -> None:
    bad = PLAIN.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt %}Now ")
    with pytest.raises(ValueError, match=r"here: chat template: does not open messages\[1\]"):
        encoded([said("user", "q"), said("assistant", "a")], bad)


def test_conversations_longer_than_a_row_are_left_out_and_named() -> None:
    short = json.dumps([said("user", "q"), said("assistant", "a")])
    long = json.dumps([said("user", "q"), said("assistant", "a " * 100)])
    found = encode_conversations(template(), [("f:1", short), ("f:2", long), ("f:3", short)], 20)
    assert found.too_long == ("f:2",)
    assert len(found.documents) == 2


REFUSED = {
    "no messages": ({"text": "x"}, "no field 'messages'"),
    "no object": ([1], "no field 'messages'"),
    "no list": ({"messages": "x"}, "messages: not a list of messages"),
    "none": ({"messages": []}, "messages: not a list of messages"),
    "role": ({"messages": [said("bot", "x")]}, r"messages\[0\]: role is 'bot'"),
    "content": ({"messages": [said("user", None)]}, r"messages\[0\]: content is no string"),
    "parts": (
        {"messages": [{"role": "user", "content": [1]}]},
        r"messages\[0\]: content is no string; join",
    ),
    "empty turn": (
        {"messages": [said("user", "q"), said("assistant", "")]},
        r"messages\[1\]: the assistant says nothing",
    ),
    "no answer": ({"messages": [said("user", "q")]}, "messages: no assistant's turn to learn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_teach_nothing_are_refused_by_place(name: str, tmp_path: Path) -> None:
    row, message = REFUSED[name]
    file = tmp_path / "chats.jsonl"
    good = {"messages": CONVERSATION}
    file.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=f"{file}:2: {message}") as caught:
        list(read(SourceConfig(name="chats", weight=1.0, max_mb=1.0, path=str(file)), chat=True))
    assert "\n" not in str(caught.value)


def test_a_torn_line_and_a_file_of_text_are_refused(tmp_path: Path) -> None:
    torn, prose = tmp_path / "a.jsonl", tmp_path / "b.txt"
    torn.write_text('{"messages": [')
    prose.write_text("prose")
    for file, message in ((torn, "a.jsonl:1: not JSON"), (prose, "b.txt: no .jsonl file")):
        with pytest.raises(ValueError, match=message):
            list(read(SourceConfig(name="c", weight=1.0, max_mb=1.0, path=str(file)), chat=True))


@pytest.mark.parametrize(("name", "chat"), [("stdlib", True), ("instructions", False)])
def test_text_and_conversations_are_not_taken_for_each_other(name: str, chat: bool) -> None:
    with pytest.raises(ValueError, match=r"data\.format="):
        list(read(SourceConfig(name=name, weight=1.0, max_mb=1.0), chat=chat))


def test_messages_keep_what_the_template_reads() -> None:
    row = {"messages": [said("user", "ü"), said("assistant", None, tool_calls=[CALL])], "id": 7}
    assert json.loads(text_of(row, "here"))[1]["tool_calls"][0]["function"] == CALL["function"]


_NAME = re.compile(r"\b(?:[^aeiou\W]{1,2}[aeiou]){3}\b")


def contents(sides: Iterator[tuple[str, dict[str, Any]]]) -> set[str]:
    return {row["messages"][-2]["content"] for _, row in sides}


def test_instructions_never_hold_what_problems_ask() -> None:
    trained = contents(instructions.conversations()) | contents(instructions.worked_out())
    names = set(_NAME.findall(" ".join(trained)))
    assert len(names) > 10_000
    for problem in instructions.problems("forms", "held_out", 300):
        asked = set(_NAME.findall(problem.messages[-1]["content"]))
        assert asked, problem
        assert not asked & names, problem
        assert asked & set(_NAME.findall(problem.answer)), problem
    for problem in instructions.problems("chains", "held_out", 300):
        assert problem.messages[-1]["content"] not in trained
    assert len(trained) > 10_000


def test_a_chain_s_steps_lead_to_its_answer() -> None:
    for _, row in list(instructions.worked_out())[:200]:
        text = row["messages"][-1]["content"]
        assert row["messages"][0]["content"] == instructions.THINK
        *steps, answer = text.split(". ")
        for step in steps:
            left, right = step.split(" = ")
            a, sign, b = left.split()
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(right)
            assert 0 <= int(right) <= 20
        assert answer == f"The answer is {steps[-1].split(' = ')[1]}."
