"""Text as it is kept: one line ending, no control characters, composed and repaired.

Program sources keep every other character, since their literals may mean what they say. Prose is
repaired with ftfy (text that was decoded twice or wrongly, HTML entities left in) and composed
(NFC). A document that lost many characters before it came here is dropped.
"""

import re
import unicodedata

_LINE_ENDS = re.compile("\r\n?|\x85|\u2028|\u2029")
_CODE_LINE_ENDS = re.compile("\r\n?")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_CODE_CONTROLS = re.compile("[\x00\ufeff]")
_MAX_LOST = 0.01  # share of U+FFFD in a document; ours


def normalise(text: str, *, code: bool) -> str:
    """The text as it is kept; the same when normalised again."""
    if code:
        return _CODE_LINE_ENDS.sub("\n", _CODE_CONTROLS.sub("", text))
    text = _LINE_ENDS.sub("\n", _repaired(text))
    return unicodedata.normalize("NFC", _CONTROLS.sub("", text))


def _repaired(text: str) -> str:
    if text.isascii() and "&" not in text:
        return text
    import ftfy

    return ftfy.fix_text(
        text,
        normalization=None,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        max_decode_length=len(text) + 1,
    )


def lost(text: str) -> bool:
    """Whether too many characters are U+FFFD, what a decoder leaves of bytes it cannot read."""
    return text.count("\ufffd") > _MAX_LOST * len(text)
