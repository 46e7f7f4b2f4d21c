"""Line ends, control characters, composition and repair; program text is left as it is."""

import unicodedata

import pytest

from v3jax.data.prepare.unicode import lost, normalise

pytest.importorskip("ftfy", reason="needs the extra data: ftfy")

SAMPLES = [
    "plain ascii\n",
    "a\r\nb\rc\u2028d\x85e",
    "Cafe\u0301 ﬁn \u00e9",
    "donâ€™t schÃ¶n &amp; gut",
    "中文\u3000标点\uff0c。ﾊﾝｶｸ",
    "a\x00b\x07c\ufeffd\te\x0cf",
    "\u202ftight\u200b",
]


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("code", [True, False])
def test_normalising_again_changes_nothing(text: str, code: bool) -> None:
    once = normalise(text, code=code)
    assert normalise(once, code=code) == once


@pytest.mark.parametrize("text", SAMPLES)
def test_prose_comes_out_composed_with_one_line_end(text: str) -> None:
    found = normalise(text, code=False)
    assert unicodedata.is_normalized("NFC", found)
    assert not set(found) & set("\r\x00\x07\x85\u2028\ufeff")


def test_wrongly_decoded_text_is_repaired() -> None:
    assert normalise("donâ€™t schÃ¶n &amp; gut", code=False) == "don\u2019t schön & gut"


def test_quotes_ligatures_and_wide_characters_stay() -> None:
    text = "\u201cﬁn\u201d \uff21\uff22\uff0c中\u3000文"
    assert normalise(text, code=False) == text


def test_programs_keep_every_character_but_their_line_ends() -> None:
    program = 's = "donâ€™t &amp; e\u0301\x07"\n'
    assert normalise("\ufeff" + program.replace("\n", "\r\n"), code=True) == program


def test_a_document_that_lost_characters_is_known() -> None:
    assert lost("a\ufffd" * 10)
    assert not lost("a" * 200 + "\ufffd")
