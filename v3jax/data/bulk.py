"""Bulk encoding by tiktoken, with the ids of Hugging Face's tokenizers (`benchmarks.encoding`).

V3's pre-tokenizer is three splits, each of which runs on all the pieces that those before made;
here they are one regular expression. The first two take digits and ideographs, so the third's
classes occur in two forms: beyond ideographs, where no match runs into them or into digits and "no
more text" holds before both, and among ideographs. What no alternative matches is a piece of its
own, which tiktoken would drop.
"""

import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

_DIGIT, _RANGES = r"\p{N}", "一-龥぀-ゟ゠-ヿ"


def _pieces(here: str) -> tuple[str, str, str]:
    """Letters with what may lead them, marks, and the rest, of characters where `here` holds."""
    letter, mark = rf"{here}[\p{{L}}\p{{M}}]", rf"{here}[\p{{P}}\p{{S}}]"
    lead = rf"{here}[^\r\n\p{{L}}\p{{P}}\p{{S}}{_DIGIT}]"
    other = rf"(?:{here}[^\s\p{{L}}\p{{M}}\p{{P}}\p{{S}}{_DIGIT}])"
    return (
        f"(?:{lead})?(?:{letter})+",
        f"(?:{mark})+",
        f"{other}+(?={other}{letter})|{other}+",
    )


_WORDS, _MARKS, _OTHERS = _pieces(f"(?![{_RANGES}])")
PATTERN = "|".join(
    [
        f"{_DIGIT}{{1,3}}",
        *_pieces(f"(?=[{_RANGES}])"),
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        _WORDS,
        rf" ?{_MARKS}[\r\n]*",
        r"\s*[\r\n]+",
        rf"\s+(?=[{_DIGIT}{_RANGES}])",
        r"\s+(?!\S)",
        r"\s+",
        _OTHERS,
    ]
)
"""V3's three splits as one."""
_NO_NORMALIZER = {"type": "Sequence", "normalizers": []}


_LONG = 50_000
"""Characters of a run, of spaces or others, at which tiktoken's regular expressions might panic."""
_LONG_SPACES = re.compile(rf"\s{{{_LONG}}}")


class BulkEncoder:
    """Texts to ids by a byte-level BPE with V3's splits."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        import tiktoken

        ranks = {raw: index for index, raw in enumerate(token_bytes) if raw}
        self._inner = tiktoken.Encoding(
            "v3jax", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int] | None:
        """Ids of `text`; None if it is nothing for tiktoken.

        Raises:
          UnicodeEncodeError: half a surrogate pair.
        """
        if len(text) >= _LONG and _has_long_run(text):
            return None
        text.encode()  # tiktoken would put a question mark there
        return self._inner.encode_ordinary(text)


def _has_long_run(text: str) -> bool:
    return max(map(len, text.split()), default=0) >= _LONG or bool(_LONG_SPACES.search(text))


def encoder_of(
    spec: str, splits: Sequence[str], token_bytes: Sequence[bytes]
) -> BulkEncoder | None:
    """The bulk encoder of a `tokenizer.json`; None if it is not V3's kind or tiktoken is missing.

    tiktoken joins any two tokens that make a third, earlier ones first, and knows no list of
    merges: a vocabulary is taken only if each merge makes the next id.
    """
    if importlib.util.find_spec("tiktoken") is None:
        return None
    described: dict[str, Any] = json.loads(spec)
    if _splits_of(described) != list(splits) or not _in_order(described):
        return None
    return BulkEncoder(token_bytes)


def _splits_of(described: dict[str, Any]) -> list[str]:
    """The regular expressions of a pre-tokenizer that only isolates their matches."""
    steps = (described.get("pre_tokenizer") or {}).get("pretokenizers", [])
    if not steps or described.get("normalizer") not in (None, _NO_NORMALIZER):
        return []
    *cuts, last = steps
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    isolating = all(
        cut.get("type") == "Split" and cut.get("behavior") == "Isolated" and not cut.get("invert")
        for cut in cuts
    )
    if not plain or last.get("use_regex", True) or not isolating:
        return []
    return [cut["pattern"].get("Regex", "") for cut in cuts]


def _in_order(described: dict[str, Any]) -> bool:
    """Whether merges make ascending ids, each of them once, and all that is no single byte."""
    model = described["model"]
    if model.get("type") != "BPE" or model.get("ignore_merges") or model.get("dropout"):
        return False
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    made = [model["vocab"].get("".join(pair)) for pair in pairs]
    if any(index is None for index in made):
        return False
    return all(a < b for a, b in itertools.pairwise(made))
