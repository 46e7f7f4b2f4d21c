"""Problems with reference answers, which rules can check (report sections 5.1 and 5.2.1).

A file of them is .jsonl: `problem`, a text, or `messages` without an assistant's turn; `answer`,
the reference; if it differs from the default, `rule`, one of `rewards.rules`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v3jax.data.chat import checked


@dataclass(frozen=True)
class Problem:
    """Something to ask, and what a rule compares the answer with."""

    kind: str
    messages: tuple[dict[str, str], ...]
    """Without an assistant's turn."""
    answer: str
    """The reference: a whole reply where the rule is `exact`."""
    rule: str

    def asked(self, system: str | None = None) -> list[dict[str, Any]]:
        """The messages, under a system prompt if one is given."""
        first = [] if system is None else [{"role": "system", "content": system}]
        return [*first, *self.messages]


def read_problems(path: str | Path, rule: str) -> list[Problem]:
    """The problems in a file, in its order.

    Args:
      rule: of problems that name none.

    Raises:
      ValueError: no such file, or a line that is no problem; the message has its place.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); give a .jsonl file") from None
    found = [
        _problem(line, f"{file}:{number}", rule)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise ValueError(f"{file}: no problems; give a line of JSON for each")
    return found


def _problem(line: str, place: str, rule: str) -> Problem:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{place}: not JSON; fix or drop the line") from None
    if not isinstance(record, dict) or not isinstance(record.get("answer"), str):
        raise ValueError(f"{place}: no text field 'answer'; give the reference as a string")
    messages = record.get("messages")
    if messages is None and isinstance(record.get("problem"), str):
        messages = [{"role": "user", "content": record["problem"]}]
    if messages is None:
        raise ValueError(f"{place}: no text field 'problem', nor 'messages'; give one")
    try:
        messages = checked(messages)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{place}: an assistant's turn; leave it to the model")
    return Problem(
        str(record.get("kind", file_of(place))),
        tuple(messages),
        record["answer"],
        str(record.get("rule", rule)),
    )


def file_of(place: str) -> str:
    """The name of the file that a place lies in, without its ending."""
    return Path(place.rpartition(":")[0]).stem
