"""A needle in a haystack (report section 4.3, figure 8): one fact, anywhere in a long context.

A sentence that gives a key its value stands at some depth of a text that has nothing to do with it,
and the end asks for it. 15 lengths by 15 depths, as in the report: depths in percent, lengths from
2K to 128K in even steps, scaled to the model's context. The report shows scores of 1 to 10 and says
neither the text, nor the needle, nor how an answer becomes a score. Ours: the haystack is the run's
own held-out documents, or the language reference of Python where there are none; key and value are
words of `data.key_values`, whose templates are others; the value is continued greedily, and scores
10 if it is right, else 1 and 9 times the share of its words that are right from the first on.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from v3jax.config import SourceConfig, YarnConfig
from v3jax.data import key_values, sources
from v3jax.data.chat import ChatTemplate
from v3jax.data.prepared import held_out
from v3jax.data.tokenizer import Tokenizer
from v3jax.decode import Engine
from v3jax.models import Loaded
from v3jax.report import Needles

DEPTHS = (0, 7, 14, 21, 29, 36, 43, 50, 57, 64, 71, 79, 86, 93, 100)
"""Percent of the haystack before the needle (report figure 8)."""
_LENGTHS = 15
_LEAST = 128
"""Tokens of the shortest context: some lines around the needle."""
_AT_ONCE = 2**17
"""Tokens of the contexts that are read together."""

NEEDLE = "\nThe treasure hidden in {key} is {value}.\n"
QUESTION = "\nWhat is the treasure hidden in {key}?"
OPENING = " The treasure hidden in {key} is"
"""How the answer begins; the model goes on with the value."""

Progress = Callable[[int, float, float], None]
"""Called with a length, its mean score and its share of right answers."""


@dataclass(frozen=True)
class Cell:
    """One context and the value that it hides."""

    prompt: list[int]
    value: str
    before: int
    """Tokens of the haystack before the needle."""


def lengths(longest: int) -> tuple[int, ...]:
    """Tokens of the contexts: from 1/64 of the longest, but 128 at least, up to it, evenly.

    Raises:
      ValueError: no room for two lengths.
    """
    least = max(longest // 64, _LEAST)
    if longest <= least:
        raise ValueError(
            f"needle: contexts of {longest} tokens are too short to hide anything in; give "
            f"--max-length more than {least}"
        )
    return tuple(np.linspace(least, longest, _LENGTHS).round().astype(int).tolist())


def score(value: str, answer: str) -> float:
    """10 if `answer` begins with `value`, else 1 + 9 x the share of its words right from the first.

    Case and punctuation do not count.
    """
    wanted, got = (re.findall(r"\w+", text.casefold()) for text in (value, answer))
    right = 0
    while right < len(wanted) and wanted[right : right + 1] == got[right : right + 1]:
        right += 1
    return 1 + 9 * right / len(wanted)


def needle(
    loaded: Loaded,
    *,
    longest: int | None = None,
    n_needles: int = 4,
    seed: int = 0,
    chat: bool = False,
    progress: Progress | None = None,
) -> Needles:
    """Mean score and share of right answers in every cell.

    Args:
      longest: tokens of the longest context; None for what the model was made for. More is allowed.
      n_needles: contexts of a cell, each with a haystack, a key and a value of its own.
      seed: of all that is drawn.
      chat: asks in the model's chat template.

    Raises:
      ValueError: a context too short, a corpus that is not at hand, or no needle.
    """
    if n_needles < 1:
        raise ValueError(f"needle: {n_needles} needles a cell; take at least one")
    every = lengths(longest or loaded.context)
    maker = Contexts(loaded.tokenizer, haystack(loaded, every[-1]), _template(loaded, chat=chat))
    engine = Engine(
        loaded.model,
        loaded.params,
        loaded.router_state,
        loaded.tokenizer,
        numerics=loaded.numerics,
    )
    n_rows = max(1, min(len(DEPTHS) * n_needles, _AT_ONCE // every[-1]))
    found_LDN = np.zeros((len(every), len(DEPTHS), n_needles))
    for number, length in enumerate(every):
        cells = [
            maker.cell(length, depth, f"{seed} {length} {depth} {n}", f"{seed} {length} {n}")
            for depth in DEPTHS
            for n in range(n_needles)
        ]
        scores = []
        for start in range(0, len(cells), n_rows):
            some = cells[start : start + n_rows]
            made, _ = engine.generate(
                [cell.prompt for cell in some],
                max_tokens=maker.answer,
                room=every[-1],
                width=n_rows,
            )
            texts = [loaded.tokenizer.decode(one.ids) for one in made]
            scores += [score(cell.value, text) for cell, text in zip(some, texts, strict=True)]
        found_LDN[number] = np.reshape(scores, (len(DEPTHS), n_needles))
        if progress is not None:
            progress(
                length, float(found_LDN[number].mean()), float((found_LDN[number] == 10).mean())
            )
    return Needles(
        lengths=every,
        depths=DEPTHS,
        score_DL=found_LDN.mean(2).T.tolist(),
        exact_DL=(found_LDN == 10).mean(2).T.tolist(),
        needles=n_needles,
    )


def with_yarn(loaded: Loaded, factor: float | None) -> Loaded:
    """The same weights with the report's YaRN of this factor (section 4.3), or with None without.

    Lengths are extended from what YaRN was made for where the model has it, else from its context.

    Raises:
      ValueError: a factor below 1.
    """
    if factor is None:
        return replace(loaded, model=replace(loaded.model, yarn=None))
    own = loaded.model.yarn
    yarn = YarnConfig(
        factor=factor,
        original_seq_len=loaded.context if own is None else own.original_seq_len,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
    )
    return replace(loaded, model=replace(loaded.model, yarn=yarn))


def haystack(loaded: Loaded, at_least: int) -> list[list[int]]:
    """Ids of documents that together have so many tokens, those of sources like prose first.

    Of a run they are held-out ones, but for those of sources that are made, which hold facts and
    refrains of their own.

    Raises:
      ValueError: a run's corpus is not at hand.
    """
    if loaded.data is None:
        prose = SourceConfig(name="pydoc_topics", weight=1.0, max_mb=1.0)
        by_source = [[document.text for document in sources.read(prose)]]
    else:
        held = held_out(loaded.data)
        by_source = [[d.text for d in some] for name, some in held if name not in sources.MADE]
        by_source.sort(key=_letters, reverse=True)
    found: list[list[int]] = []
    for texts in by_source:
        if sum(map(len, found)) < at_least:
            found += loaded.tokenizer.encode_batch([f"{text.strip()}\n" for text in texts])
    if not found:
        raise ValueError("needle: the run holds out no text that was not made; add a source")
    return found


def _letters(texts: Sequence[str]) -> float:
    """Letters among what is no space: more of them in prose than in programs."""
    text = "".join(texts)
    return sum(map(str.isalpha, text)) / max(1, len(text) - sum(map(str.isspace, text)))


def _template(loaded: Loaded, *, chat: bool) -> ChatTemplate | None:
    return ChatTemplate(loaded.chat_template, loaded.tokenizer) if chat else None


class Contexts:
    """Makes contexts of exact lengths."""

    def __init__(
        self, tokenizer: Tokenizer, documents: Sequence[list[int]], chat: ChatTemplate | None = None
    ) -> None:
        self._tokenizer, self._documents, self._chat = tokenizer, documents, chat
        ends = [tokenizer.token_bytes[i] for i in range(tokenizer.vocab_size)]
        self._is_end = np.array(
            [end.rstrip(b" ")[-1:] in (b"\n", b".", b"?", b"!") for end in ends]
        )
        text = tokenizer.decode([i for document in documents for i in document])
        self._keys = [k for k in key_values.KEYS if k not in text] or key_values.KEYS
        words = (key_values.FIRST, key_values.SECOND)
        longest = (max(len(tokenizer.encode(f" {word}")) for word in some) for some in words)
        self.answer = sum(longest) + 1
        """Tokens that every value fits in, and one that shows where its last word ends."""

    def cell(self, length: int, depth: float, seed: str, haystack_seed: str) -> Cell:
        """A context whose prompt and answer have `length` tokens together.

        Args:
          depth: percent of the haystack before the needle, up to the nearest end of a line or
            sentence.

        Raises:
          ValueError: no room for question and needle.
        """
        draw = random.Random(seed)
        key, value = draw.choice(self._keys), key_values.value(draw)
        hidden = self._tokenizer.encode(NEEDLE.format(key=key, value=value))
        head, tail = self._frame(key)
        room = length - len(head) - len(tail) - len(hidden) - self.answer
        if room < 1:
            raise ValueError(
                f"needle: a context of {length} tokens has no room for the question; raise it"
            )
        hay = self._hay(room, random.Random(haystack_seed))
        at = self._boundary(hay, depth)
        prompt = [*head, *hay[:at].tolist(), *hidden, *hay[at:].tolist(), *tail]
        return Cell(prompt, value, at)

    def _frame(self, key: str) -> tuple[list[int], list[int]]:
        """Ids before the haystack and behind it."""
        question, opening = QUESTION.format(key=key), OPENING.format(key=key)
        if self._chat is None:
            return [], self._tokenizer.encode(question + opening)
        asked, other = (
            self._chat.encode([{"role": "user", "content": text}]) for text in (question, "x")
        )
        alike = next(i for i, (a, b) in enumerate(zip(asked, other, strict=False)) if a != b)
        return asked[:alike], [*asked[alike:], *self._tokenizer.encode(opening.strip())]

    def _hay(self, n_tokens: int, draw: random.Random) -> np.ndarray:
        """So many tokens of documents in a drawn order."""
        order = draw.sample(range(len(self._documents)), len(self._documents))
        found: list[int] = []
        while len(found) < n_tokens:
            for document in order:
                found += self._documents[document]
        return np.array(found[:n_tokens])

    def _boundary(self, hay: np.ndarray, depth: float) -> int:
        """The place nearest to a depth where a line or a sentence ends, or the haystack does."""
        ends = np.flatnonzero(self._is_end[hay]) + 1
        places = np.concatenate([[0], ends, [len(hay)]])
        return int(places[np.abs(places - len(hay) * depth / 100).argmin()])
