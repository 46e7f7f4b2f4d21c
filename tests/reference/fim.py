"""Fill-in-the-middle of DeepSeek-V3 (arXiv 2412.19437, section 4.1), on lists of ids.

<fim_begin> f_pre <fim_hole> f_suf <fim_end> f_middle <eos>
"""

from collections.abc import Sequence
from typing import NamedTuple


class Specials(NamedTuple):
    """The four ids the form needs."""

    begin: int
    hole: int
    end: int
    eos: int


def psm(
    prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int], ids: Specials
) -> list[int]:
    """Prefix, suffix, middle with their marks."""
    return [ids.begin, *prefix, ids.hole, *suffix, ids.end, *middle, ids.eos]


def undo(sequence: Sequence[int], ids: Specials) -> tuple[list[int], list[int], list[int]] | None:
    """Prefix, middle and suffix of a sequence in this form; None if it is a plain document."""
    *body, last = sequence
    assert last == ids.eos
    marks = [i for i in body if i in ids]
    if not marks:
        return None
    assert marks == [ids.begin, ids.hole, ids.end]
    assert body[0] == ids.begin
    hole, end = body.index(ids.hole), body.index(ids.end)
    return body[1:hole], body[end + 1 :], body[hole + 1 : end]
