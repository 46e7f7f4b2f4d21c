"""Words across scripts; case, punctuation, width and whitespace make no difference."""

import pytest

from v3jax.data.prepare.words import spaceless_share, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello,  World!\n", ["hello", "world"]),
        ("don't stop_it", ["don", "t", "stop", "it"]),
        ("x = foo(bar1)", ["x", "foo", "bar1"]),
        ("白日依山尽", list("白日依山尽")),
        ("DeepSeek模型v3", ["deepseek", "模", "型", "v3"]),
        ("\uff21\uff22 ﬁn Straße", ["ab", "fin", "strasse"]),
        ("Привет, мир", ["привет", "мир"]),
        ("ひらがな カナ", list("ひらがなカナ")),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_scripts_without_spaces_are_known() -> None:
    assert spaceless_share(words("白日依山尽\uff0c黄河入海流 v3")) > 0.9
    assert spaceless_share(words("a plain sentence")) == 0
