"""Documents in which what was said before is said again, made here.

To continue them, a model must look back. Two kinds, each as short as a few lines and as long as
some thousand tokens, so that rows of any length a small model is trained on need what stands
anywhere in them:
- a table holds keys with their values and nothing else, in one form, again and again;
- a story is ordinary lines, and among them facts, a key and its value in a sentence, that other
  sentences ask for later, near and far. Nothing but the document says what a key's value is.
The DeepSeek-V3 technical report tests whether facts are found again (section 4.3, figure 8) and
does not say what taught it.
"""

import random
from collections.abc import Iterator

_DOCUMENTS = 6000
_LINES = (6, 480)
"""The fewest and the most of a document; its logarithm is drawn evenly."""
_DENSITIES = (0.1, 0.3, 0.6)
"""Shares of a story's lines that are facts; one of them for each story."""

_MOST = 100
"""Facts of a document, told or asked for. Without a limit, long documents said the same so often
that training loss fell and new documents' did not."""

FACTS = (
    "Note {key} {value}.",
    "Also {key}: {value}",
    "Here {key} = {value}",
    "And {key} is {value}",
    "The word for {key} is {value}.",
    "The name of {key} was {value}.",
    "They call {key} the {value}.",
    "Let {key} stand for {value}.",
)
"""Templates of a fact, the same for the line that asks for it again: the value ends it, and the key
stands behind a space, so that it is the same tokens everywhere."""

_TABLE = ("- {key} {value}", "- {key}: {value}", "- {key} = {value}", "- {key} is {value}")
"""Templates of a table's lines."""

ASKS = (
    "Q: the word for {key}? A: the word for {key} is {value}.",
    "What did we note on {key}? We note {key} {value}.",
    "Again {key}: {value}",
    "So {key} is {value}",
)
"""Further templates that ask."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KEYS = _words(
    """Lisbon Paris Berlin Vienna Madrid Dublin Oslo Prague Athens Cairo Delhi Tokyo Lima Quito
    Havana Boston Dallas Denver Geneva Milan Naples Turin Porto Seville Zurich Basel Bonn Bremen
    Kiel Lyon Nice Nantes"""
)

FIRST = _words(
    """amber brave calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow olive
    pale quiet rusty silent tender upper velvet warm yellow"""
)
"""First words of values."""

SECOND = _words(
    """anchor badger candle dragon eagle falcon garden hammer island jacket kettle lantern magnet
    needle onion pepper quartz ribbon saddle teapot umbrella valley walnut zebra"""
)
"""Second words of values."""

WORDS = KEYS + FIRST + SECOND
"""All of them, which `data.refrains` says again too."""

_SUBJECTS = _words(
    """child farmer teacher sailor doctor neighbour king soldier painter baker driver writer
    mother father friend stranger student worker judge guest singer hunter miller clerk"""
)
_VERBS = _words(
    """saw found left carried followed watched painted repaired opened closed sold bought kept
    lost moved cleaned counted forgot remembered shared"""
)
_OBJECTS = _words(
    """house road table letter window bridge river tree boat field door horse book chair lamp
    stone fence market train picture clock coat bottle wheel"""
)
_PLACES = _words(
    """yesterday today later again slowly alone together outside inside upstairs nearby early
    late often twice quickly"""
)
_LINKS = _words("and but while because before after although until")


def documents() -> Iterator[tuple[str, str]]:
    """Names and texts, the same at every call: 6000 documents, as many of each kind."""
    kinds = {"table": _table, "story": _story}
    for number in range(_DOCUMENTS):
        kind = tuple(kinds)[number % len(kinds)]
        draw = random.Random(number)
        fewest, most = _LINES
        n_lines = round(fewest * (most / fewest) ** draw.random())
        yield f"{kind} {number:04d}", kinds[kind](draw, n_lines)


def value(draw: random.Random) -> str:
    """A value: two words, of 576 pairs."""
    return f"{draw.choice(FIRST)} {draw.choice(SECOND)}"


def _table(draw: random.Random, n_lines: int) -> str:
    facts = (draw.choice(_TABLE),)
    return _facts(draw, min(n_lines, _MOST), density=1.0, facts=facts, asks=())


def _story(draw: random.Random, n_lines: int) -> str:
    density = min(draw.choice(_DENSITIES), _MOST / n_lines)
    return _facts(draw, n_lines, density=density, facts=FACTS, asks=ASKS)


def _facts(
    draw: random.Random,
    n_lines: int,
    *,
    density: float,
    facts: tuple[str, ...],
    asks: tuple[str, ...],
) -> str:
    told: list[tuple[str, str]] = []  # facts in the order of the line that last held them
    free = draw.sample(KEYS, len(KEYS))
    lines = []
    for _ in range(n_lines):
        if draw.random() >= density:
            lines.append(_filler(draw))
            continue
        if not told or (free and draw.random() < 0.3):
            fact, template = (free.pop(), value(draw)), draw.choice(facts)
        else:
            # Half from anywhere, half by the logarithm of the place back, which favours near ones.
            near = int(len(told) ** draw.random())
            back = draw.choice((near, draw.randint(1, len(told))))
            fact, template = told.pop(-back), draw.choice(facts + asks)
        told.append(fact)
        lines.append(template.format(key=fact[0], value=fact[1]))
    return "\n".join(lines) + "\n"


def _filler(draw: random.Random) -> str:
    def clause() -> str:
        subject, verb, thing = (draw.choice(x) for x in (_SUBJECTS, _VERBS, _OBJECTS))
        return f"the {subject} {verb} the {thing} {draw.choice(_PLACES)}"

    text = clause() if draw.random() < 0.5 else f"{clause()} {draw.choice(_LINKS)} {clause()}"
    return f"{text[0].upper()}{text[1:]}."
