"""Conversations as training documents: what is seen, what is learnt (report section 5.1).

A conversation is a line of a .jsonl file, an object whose `messages` are in Hugging Face's and
OpenAI's form. Its document is the JSON of its messages, so that it is deduplicated, held out and
cached as any other text is. Encoded by the chat template, the tokens of the assistant's turns are
targets, with the one that ends a turn; everything else is only seen (`packing.seen`).

The report leaves open whether prompts are targets, and what becomes of a conversation that is
longer than a row. Here prompts are none, and such a conversation is left out and counted: cut, it
would end without its answer, or begin without its question.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from v3jax.data.chat import ChatTemplate, checked
from v3jax.data.packing import seen

FIELD = "messages"


@dataclass(frozen=True)
class Encoded:
    """Documents to pack, int32, tokens that are only seen marked."""

    documents: list[np.ndarray]
    too_long: tuple[str, ...]
    """Places of the conversations that were left out, whole or in part."""


def text_of(record: Any, place: str) -> str:
    """The JSON of a row's messages.

    Args:
      record: what the row holds.
      place: the row's file and line, for errors.

    Raises:
      ValueError: not a conversation that an assistant can learn from.
    """
    messages = record.get(FIELD) if isinstance(record, dict) else None
    if messages is None:
        raise ValueError(f"{place}: no field {FIELD!r}; give a list of messages or drop the line")
    try:
        conversation = checked(messages)
        _check_learnable(conversation)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return json.dumps(conversation, ensure_ascii=False)


def _check_learnable(conversation: list[dict[str, Any]]) -> None:
    turns = [i for i, m in enumerate(conversation) if m["role"] == "assistant"]
    for i in turns:
        if not conversation[i]["content"] and "tool_calls" not in conversation[i]:
            raise ValueError(f"messages[{i}]: the assistant says nothing; drop the turn")
    if not turns:
        raise ValueError("messages: no assistant's turn to learn; drop the line")


def encode_conversations(
    template: ChatTemplate, texts: Iterable[tuple[str, str]], capacity: int
) -> Encoded:
    """Encodes conversations that fit in rows of `capacity` tokens.

    Args:
      texts: places and what `text_of` gave for them.

    Raises:
      ValueError: the template cannot write one of them; the message has its place.
    """
    documents: list[np.ndarray] = []
    too_long: list[str] = []
    for place, text in texts:
        try:
            found = template.encode_turns(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        marked = [_marked(pieces) for pieces in found]
        documents += [ids for ids in marked if len(ids) <= capacity]
        if any(len(ids) > capacity for ids in marked):
            too_long.append(place)
    return Encoded(documents, tuple(too_long))


def _marked(pieces: list[tuple[list[int], bool]]) -> np.ndarray:
    parts = [np.array(ids, np.int32) for ids, _ in pieces]
    return np.concatenate(
        [ids if said else seen(ids) for ids, (_, said) in zip(parts, pieces, strict=True)]
    )
