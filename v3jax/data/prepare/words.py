"""Words of any script: runs of letters and digits, and single characters where none divide them.

What deduplication, decontamination and the classifier compare. Case, width, accents' encoding,
punctuation and whitespace make no difference.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

# Scripts written without spaces: kana, CJK ideographs with extensions, Thai, Lao, Khmer, Myanmar.
_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_SPACELESS = _SINGLE + "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_WORD = re.compile(f"[{_SPACELESS}]|[^\\W_{_SPACELESS}]+")


def fold(text: str) -> str:
    """The text with case, width and composition undone; characters may move."""
    return unicodedata.normalize("NFKC", text).casefold()


def words(text: str) -> list[str]:
    """The words of a text, folded."""
    return _WORD.findall(fold(text))


def spaceless_share(found: Sequence[str]) -> float:
    """Share of words that are single characters of a script without spaces."""
    return sum(len(w) == 1 and not w.isascii() for w in found) / max(len(found), 1)


_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=2**18)
def word_hash(word: str) -> int:
    """64 bits of a word, the same in every process."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())


def hashes(found: Sequence[str]) -> np.ndarray:
    """The hash of each word, uint64."""
    return np.fromiter(map(word_hash, found), np.uint64, len(found))


def run_hashes(hashed_W: np.ndarray, n: int) -> np.ndarray:
    """A hash of each run of n words, along the first axis; none if there are fewer words."""
    *_, found = growing_run_hashes(hashed_W, n)
    return found


def growing_run_hashes(hashed_W: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """`run_hashes` of 1 word, of 2 and so on to n."""
    total = hashed_W
    yield total
    for length in range(2, n + 1):
        total = total[:-1] * _MULTIPLIER + hashed_W[length - 1 :]
        yield total
