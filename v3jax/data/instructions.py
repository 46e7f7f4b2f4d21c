"""Conversations made of made-up words and numbers, for small models; nothing to download.

Forms ask for names in a certain form. Chains ask for the result of a few small steps; a user gets
the result, and whoever asks under `THINK` gets the steps before it. Names and chains lie on one
side of a split by their hash: training draws from one, `problems` asks about the other, so that
what is asked there occurs in no conversation. Every call gives the same.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from v3jax.data.problems import Problem

Side = Literal["train", "held_out"]

THINK = "Work it out step by step. Check every step before you answer."
"""The system prompt that asks for reasoning, as the report's asks for reflection and checks."""

_CONVERSATIONS, _CHAINS = 24_000, 6_000
_SHARE_OF_CHAINS = 0.25
_CONSONANTS = (*"bdfghjklmnprstvwz", "ch", "sh", "th")
SYLLABLES = tuple(consonant + vowel for vowel in "aeiou" for consonant in _CONSONANTS)
"""What made-up words are made of."""
_TOP = 20
"""The largest number in a chain."""


def conversations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and rows to train on: forms, and chains with their results alone."""
    for number in range(_CONVERSATIONS):
        draw = random.Random(number)
        if draw.random() < _SHARE_OF_CHAINS:
            problem = _chain(draw, "train").problem()
        else:
            problem = _form(draw, "train")
        yield f"{number:05d}", _answered(problem, problem.answer)


def worked_out() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and rows to train an expert on: chains under `THINK`, with their steps."""
    for number in range(_CHAINS):
        chain = _chain(random.Random(number), "train")
        yield f"{number:05d}", _answered(chain.problem(think=True), chain.worked_out)


def _answered(problem: Problem, said: str) -> dict[str, Any]:
    return {"messages": [*problem.messages, {"role": "assistant", "content": said}]}


def problems(kind: Literal["forms", "chains"], side: Side, n: int) -> list[Problem]:
    """The first `n` problems of a kind."""
    found = []
    for number in range(n):
        draw = random.Random(f"{kind} {side} {number}")
        found.append(_form(draw, side) if kind == "forms" else _chain(draw, side).problem())
    return found


# ---- Forms

_FORMS: dict[str, tuple[int, Callable[..., str], Callable[..., str]]] = {
    "say": (1, "Say {}.".format, "I say {}.".format),
    "twice": (1, "Say {} twice.".format, "I say {0} and {0}.".format),
    "greet": (1, "Greet {}.".format, "Hello {}, how are you?".format),
    "ask": (1, "Ask for {}.".format, "May I have {}, please?".format),
    "count": (1, "Count with {}.".format, "One {0}, two {0}, three {0}.".format),
    "swap": (2, "Swap {} and {}.".format, "They are {1} and {0}.".format),
    "first": (3, "Which is first, {} or {} or {}?".format, "The first is {0}.".format),
    "last": (3, "Which is last, {} or {} or {}?".format, "The last is {2}.".format),
}


def _form(draw: random.Random, side: Side) -> Problem:
    kind = draw.choice(sorted(_FORMS))
    n_words, ask, answer = _FORMS[kind]
    words = [_made_up(draw, side) for _ in range(n_words)]
    return Problem(kind, _asked(ask(*words)), answer(*words), "exact")


def _made_up(draw: random.Random, side: Side) -> str:
    """A made-up word. There are a million, so that none can be learnt by heart."""
    while True:
        if side_of(name := "".join(draw.choices(SYLLABLES, k=3))) == side:
            return name


# ---- Chains


@dataclass(frozen=True)
class _Chain:
    start: int
    steps: tuple[int, ...]
    """What is added, or taken where it is negative."""

    @property
    def question(self) -> str:
        said = [f"Add {n}." if n > 0 else f"Take {-n}." for n in self.steps]
        return " ".join([f"Start with {self.start}.", *said, "What is left?"])

    @property
    def result(self) -> str:
        return f"The answer is {self.start + sum(self.steps)}."

    @property
    def worked_out(self) -> str:
        lines, at = [], self.start
        for n in self.steps:
            lines.append(f"{at} {'+' if n > 0 else '-'} {abs(n)} = {at + n}.")
            at += n
        return " ".join([*lines, self.result])

    def problem(self, *, think: bool = False) -> Problem:
        asked = _asked(self.question)
        if think:
            asked = ({"role": "system", "content": THINK}, *asked)
        return Problem("chain", asked, self.result, "final_number")


def _chain(draw: random.Random, side: Side) -> _Chain:
    while True:
        start = draw.randint(0, _TOP)
        at, steps = start, []
        for _ in range(draw.randint(2, 4)):
            to = draw.choice([n for n in range(max(at - 9, 0), min(at + 9, _TOP) + 1) if n != at])
            steps.append(to - at)
            at = to
        chain = _Chain(start, tuple(steps))
        if side_of(chain.question) == side:
            return chain


def _asked(content: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": content},)


def side_of(text: str) -> Side:
    """The side of the split on which a name or a chain's question lies."""
    return "held_out" if hashlib.sha256(text.encode()).digest()[0] % 2 else "train"
