"""Questions and answers on numbers, made here: a domain unlike code and prose.

Of the kind of DM Mathematics, one of the domains on which the DeepSeek-V3 technical report looks at
its experts (section 4.5.3): sums, products, equations, fractions, remainders, sequences.
"""

import math
import random
from collections.abc import Callable, Iterator

_DOCUMENTS, _QUESTIONS = 4000, 24

Ask = Callable[[random.Random], tuple[str, int | str]]


def documents() -> Iterator[tuple[str, str]]:
    """Names and texts, the same at every call: 4000 documents, some 3 MB."""
    for number in range(_DOCUMENTS):
        draw = random.Random(number)
        asked = (draw.choice(_KINDS)(draw) for _ in range(_QUESTIONS))
        text = "\n".join(f"{question}\n{answer}" for question, answer in asked)
        yield f"{number:04d}", text + "\n"


def _sum(draw: random.Random) -> tuple[str, int]:
    a, b = draw.randint(-999, 999), draw.randint(0, 999)
    return draw.choice(
        [(f"Calculate {a} + {b}.", a + b), (f"What is {b} less than {a}?", a - b)],
    )


def _product(draw: random.Random) -> tuple[str, int]:
    a, b = draw.randint(-99, 99), draw.randint(2, 99)
    return f"Multiply {a} and {b}.", a * b


def _equation(draw: random.Random) -> tuple[str, int]:
    a, x, b = draw.randint(2, 30), draw.randint(-20, 20), draw.randint(1, 200)
    name = draw.choice("acdkmnpqxyz")
    return f"Solve {a}*{name} + {b} = {a * x + b} for {name}.", x


def _fraction(draw: random.Random) -> tuple[str, str]:
    a, b, factor = draw.randint(1, 40), draw.randint(2, 40), draw.randint(2, 12)
    common = math.gcd(a, b)
    answer = f"{a // common}/{b // common}" if b > common else str(a // common)
    return f"Simplify {a * factor}/{b * factor}.", answer


def _remainder(draw: random.Random) -> tuple[str, int]:
    a, b = draw.randint(10, 9999), draw.randint(2, 60)
    return f"Calculate the remainder when {a} is divided by {b}.", a % b


def _sequence(draw: random.Random) -> tuple[str, int]:
    first, step = draw.randint(-50, 50), draw.randint(-15, 15)
    shown = ", ".join(str(first + step * i) for i in range(4))
    return f"What is next in {shown}?", first + 4 * step


_KINDS: tuple[Ask, ...] = (_sum, _product, _equation, _fraction, _remainder, _sequence)
