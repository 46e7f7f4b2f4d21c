"""Short documents that say words in no order a few times over, made here.

What follows a word is what followed it before, and nothing else tells: the densest lesson in
looking back. A small model that meets it learns within a million or two tokens to copy what it has
read, which facts (`data.key_values`), needles and instructions then build on.
"""

import random
from collections.abc import Iterator
from itertools import batched

from v3jax.data import key_values
from v3jax.data.instructions import made_up

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
    """Words of `key_values`, and made-up ones, in no order, said again and again."""
    n_words = draw.randint(*_WORDS)
    n_known = draw.randint(0, n_words)
    words = draw.sample(key_values.WORDS, n_known)
    words += (made_up(draw) for _ in range(n_words - n_known))
    draw.shuffle(words)
    lines = [" ".join(part) for part in batched(words, _A_LINE)]
    return "\n".join(lines * draw.randint(*_TIMES)) + "\n"
