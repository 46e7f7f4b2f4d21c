"""Languages of documents, identified offline by py3langid, which carries its model.

Identified on the beginning and the middle of a long document. What a program is written in is its
file's suffix.
"""

from functools import cache
from typing import Any

from v3jax.data.prepare.config import Kind
from v3jax.data.prepare.read import language_of_code

_PART = 2000  # characters; ours


def identify(text: str, name: str, kind: Kind) -> str:
    """ISO 639-1 code of a text, or what a program is written in."""
    if kind == "code":
        return language_of_code(name)
    middle = len(text) // 2
    sample = text if len(text) <= 2 * _PART else text[:_PART] + "\n" + text[middle : middle + _PART]
    return str(_classify()(sample)[0])


@cache
def _classify() -> Any:
    import py3langid

    return py3langid.classify
