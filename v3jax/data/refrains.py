"""Short documents that say words in no order a few times over, made here.

What follows a word is what followed it before, and nothing else tells: the densest lesson in
looking back. A small model learns from it to copy what it has read, which facts
(`data.key_values`), needles and instructions then build on. Some words are much more frequent than
others, as in any language: with them the model finds out how to copy, and the rare ones follow.
"""

import random
from collections.abc import Iterator
from itertools import accumulate, batched

from v3jax.data import key_values
from v3jax.data.instructions import SYLLABLES, side_of

_DOCUMENTS = 40_000
_WORDS = (2, 16)
"""The fewest and the most of a refrain."""
_TIMES = (2, 4)
"""How often it is said, at least and at most."""
_A_LINE = 10
"""Words of a line, at most."""


def documents() -> Iterator[tuple[str, str]]:
    """Names and texts, the same at every call: 40,000 refrains."""
    for number in range(_DOCUMENTS):
        yield f"{number:05d}", refrain(random.Random(f"refrain {number}"))


def refrain(draw: random.Random) -> str:
    """Words in no order, said again and again: those of `key_values`, syllables, made-up words."""
    words = [_word(draw) for _ in range(draw.randint(*_WORDS))]
    lines = [" ".join(part) for part in batched(words, _A_LINE)]
    return "\n".join(lines * draw.randint(*_TIMES)) + "\n"


def _word(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.4:
        return draw.choices(key_values.WORDS, cum_weights=_OF_WORDS)[0]
    while True:
        n_syllables = 1 if kind < 0.7 else draw.randint(2, 3)
        word = "".join(draw.choices(SYLLABLES, cum_weights=_OF_SYLLABLES, k=n_syllables))
        if side_of(word) == "train" or n_syllables == 1:
            return word


def _zipf(n: int) -> list[float]:
    """Cumulated weights of `n` words by rank."""
    return list(accumulate(1 / (rank + 5) for rank in range(n)))


_OF_WORDS, _OF_SYLLABLES = _zipf(len(key_values.WORDS)), _zipf(len(SYLLABLES))
