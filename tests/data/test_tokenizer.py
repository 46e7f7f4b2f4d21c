"""The tokenizer: V3's pre-tokenizer, every byte kept, and the random splitting of its tokens."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import small
from v3jax.config import SourceConfig
from v3jax.data.bulk import encoder_of
from v3jax.data.sources import read
from v3jax.data.tokenizer import SPLITS, Tokenizer, load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small.tokenizer()


def test_the_splits_are_the_released_tokenizers() -> None:
    digest = hashlib.sha256("\n---\n".join(SPLITS).encode()).hexdigest()
    assert (
        digest == "0c1ff45daa2787412ea451cbd53a0ec232074275cdaff026cf4f3415aebda015"
    )  # of its tokenizer.json


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello, world!\n\n", ["Hello", ",", " world", "!\n\n"]),
        ("a.\nb", ["a", ".\n", "b"]),
        ("1234567", ["123", "456", "7"]),
        ("x1234y", ["x", "123", "4", "y"]),
        ("don't", ["don", "'t"]),
        ("中文\uff0c测试。\n", ["中文", "\uff0c", "测试", "。\n"]),
        ("abc漢字def", ["abc", "漢字", "def"]),
        ("x = foo(bar);\n\n  return", ["x", " =", " foo", "(bar", ");\n\n", " ", " return"]),
        ("a  b \n c", ["a", " ", " b", " \n", " c"]),
        (" 12", [" ", "12"]),
        ("\u200cx", ["\u200cx"]),
    ],
)
def test_text_is_cut_as_the_report_says(tokenizer: Tokenizer, text: str, pieces: list[str]) -> None:
    from tokenizers import Tokenizer as HFTokenizer

    splitter = HFTokenizer.from_str(tokenizer.text).pre_tokenizer
    found = [text[low:high] for _, (low, high) in splitter.pre_tokenize_str(text)]
    assert found == pieces


def test_no_token_crosses_a_cut(tokenizer: Tokenizer) -> None:
    text = "1234567 x = foo(bar);\n\n  return 12\n中文\uff0c测试。\n" * 3
    for index in tokenizer.encode(text):
        raw = tokenizer.token_bytes[index].decode(errors="replace")
        assert len(re.findall(r"\d", raw)) <= 3
        assert not re.search(r"\d\D|\D\d|\n[^\n]|[A-Za-z][^A-Za-z]", raw), raw


def test_ids_stand_in_the_released_order(tokenizer: Tokenizer) -> None:
    names = json.loads(tokenizer.text)["model"]["vocab"]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2)
    assert sorted(tokenizer.token_bytes[3:259]) == [bytes([b]) for b in range(256)]
    assert tokenizer.vocab_size == 600
    last = (tokenizer.fim_hole, tokenizer.fim_begin, tokenizer.fim_end)
    assert last == (595, 596, 597)
    assert names["<｜begin▁of▁sentence｜>"] == 0


def sources() -> list[SourceConfig]:
    names = ("stdlib", "pydoc_topics", "package:numpy")
    return [SourceConfig(name=name, weight=1.0, max_mb=1.0) for name in names]


@pytest.mark.parametrize("source", sources(), ids=lambda s: s.name)
def test_every_source_comes_back(tokenizer: Tokenizer, source: SourceConfig) -> None:
    texts = [d.text for _, d in zip(range(40), read(source), strict=False)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", small.ODD_TEXTS, ids=lambda t: t.encode("unicode_escape")[:12])
def test_odd_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_random_text_comes_back(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    for top in (0x80, 0x3000, 0x110000):
        codes = rng.integers(0, top, 5000)
        text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_token_that_is_part_of_a_character_decodes_to_a_replacement(
    tokenizer: Tokenizer,
) -> None:
    first, *rest = tokenizer.encode("🙂")
    assert rest
    assert tokenizer.decode([first]) == "\ufffd"
    assert tokenizer.decode(np.array([first, *rest])) == "🙂"


def test_text_never_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    text = "<｜end▁of▁sentence｜><｜fim▁begin｜><｜User｜>"
    ids = tokenizer.encode(text)
    assert {0, 1, 2, *range(595, 600)}.isdisjoint(ids)
    assert tokenizer.decode([1, *ids, 596]) == text
    whole = tokenizer.decode([1, *ids, 596], skip_special_tokens=False)
    assert whole == f"<｜end▁of▁sentence｜>{text}<｜fim▁begin｜>"
    assert tokenizer.byte_lengths[[0, 1, 2, *range(595, 600)]].sum() == 0


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], Any]) -> str:
    spec = json.loads(tokenizer.text)
    change(spec)
    return json.dumps(spec)


def test_neither_do_the_control_tokens_that_a_file_calls_ordinary(tokenizer: Tokenizer) -> None:
    def make_ordinary(spec: dict[str, Any]) -> None:  # as the released file does
        for token in spec["added_tokens"][3:]:
            token["special"] = False

    released = Tokenizer(changed(tokenizer, make_ordinary))
    for text in small.ODD_TEXTS:
        assert released.encode(text) == tokenizer.encode(text)
    assert released.token_bytes == tokenizer.token_bytes


def test_training_twice_gives_the_same_tokenizer() -> None:
    texts = small.stdlib_texts("c[a-m]*.py")
    assert train_tokenizer(texts, 400).digest == train_tokenizer(iter(texts), 400).digest


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 264 ids"):
        train_tokenizer(["text"], 263)
    assert train_tokenizer(["text"], 264).decode([]) == ""


def is_punctuation_and_newlines(raw: bytes) -> bool:
    text = raw.decode(errors="replace")
    found = re.fullmatch(r" ?([^\r\n]+)[\r\n]+", text)
    return found is not None and all(unicodedata.category(c)[0] in "PS" for c in found[1])


def test_the_tokens_that_may_be_split_are_punctuation_then_newlines(tokenizer: Tokenizer) -> None:
    expected = {
        i
        for i, raw in enumerate(tokenizer.token_bytes)
        if "\ufffd" not in raw.decode(errors="replace") and is_punctuation_and_newlines(raw)
    }
    assert set(tokenizer.newline_splits) == expected
    assert len(expected) > 10
    for index, parts in tokenizer.newline_splits.items():
        raw = [tokenizer.token_bytes[i] for i in parts]
        assert b"".join(raw) == tokenizer.token_bytes[index]
        assert not any(is_punctuation_and_newlines(r) for r in raw)


def test_splitting_keeps_the_text(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    for text in [*small.ODD_TEXTS, *small.stdlib_texts("co*.py")]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.split_newlines(ids, 0.5, rng)) == text


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_tokens_are_split_at_the_rate(tokenizer: Tokenizer, rate: float) -> None:
    ids = [i for text in small.stdlib_texts() for i in tokenizer.encode(text)]
    before = sum(i in tokenizer.newline_splits for i in ids)
    split = tokenizer.split_newlines(ids, rate, np.random.default_rng(0))
    after = sum(i in tokenizer.newline_splits for i in split)
    assert before > 2000
    share = 1 - after / before
    assert abs(share - rate) <= 4 * (rate * (1 - rate) / before) ** 0.5
    assert [i for i in split if i not in tokenizer.newline_splits] != ids or rate == 0


def test_a_file_is_read_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer.text)
    for path in (file, str(file), tmp_path):
        assert load_tokenizer(path).digest == tokenizer.digest
    assert load_tokenizer(file).encode("def f():\n") == tokenizer.encode("def f():\n")


def lowercase(spec: dict[str, Any]) -> None:
    spec["normalizer"] = {"type": "Lowercase"}


def compose(spec: dict[str, Any]) -> None:
    spec["normalizer"] = {"type": "NFC"}


def add_a_space(spec: dict[str, Any]) -> None:
    spec["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


def split_on_spaces(spec: dict[str, Any]) -> None:
    spec["pre_tokenizer"] = {"type": "WhitespaceSplit"}


def lose_a_byte(spec: dict[str, Any]) -> None:
    vocab = spec["model"]["vocab"]
    vocab["zq"] = vocab.pop("z")
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "z" not in "".join(m)]


def whole_words(spec: dict[str, Any]) -> None:
    vocab = {token["content"]: token["id"] for token in spec["added_tokens"]}
    spec["model"] = {"type": "WordLevel", "vocab": vocab | {"a▁b": 9}, "unk_token": "a▁b"}


@pytest.mark.parametrize(
    "change", [lowercase, compose, add_a_space, split_on_spaces, lose_a_byte, whole_words]
)
def test_a_tokenizer_that_changes_text_is_refused(
    tokenizer: Tokenizer, change: Callable[[dict[str, Any]], None]
) -> None:
    with pytest.raises(ValueError, match=r"^mine\.json: not byte-level, or it changes the text"):
        Tokenizer(changed(tokenizer, change), "mine.json")


def test_a_truncating_tokenizer_does_not_truncate_here(tokenizer: Tokenizer) -> None:
    limit = {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    limited = Tokenizer(changed(tokenizer, lambda spec: spec.update(truncation=limit)))
    assert limited.decode(limited.encode("many words of text")) == "many words of text"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such tokenizer.json"),
        (b"", "not a tokenizer.json"),
        (b"[]", "not a tokenizer.json"),
        (b'{"added_tokens": []}', "not a tokenizer.json"),
        (b"\xff\xfe", "not a tokenizer.json"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(
    tmp_path: Path, content: bytes | None, named: str
) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=named) as error:
        load_tokenizer(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(tokenizer.text[:-100])
    with pytest.raises(ValueError, match=r"mine\.json: not a tokenizer\.json"):
        load_tokenizer(file)


def test_a_tokenizer_without_the_needed_tokens_is_named(tokenizer: Tokenizer) -> None:
    def forget(spec: dict[str, Any]) -> None:
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["id"] != 596]

    with pytest.raises(ValueError, match="lacks the special token <｜fim▁begin｜>"):
        Tokenizer(changed(tokenizer, forget))


def test_text_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("a\udc80b")


# ---- Much text


def test_much_text_has_the_ids_of_little(tokenizer: Tokenizer) -> None:
    """By tiktoken where it is installed; runs that are too long for it go the other way."""
    some = [d.text for _, d in zip(range(60), read(sources()[0]), strict=False)]
    some += ["x" * 60_000, " " * 60_000, "a b " * 40_000, ""]
    assert sum(map(len, some)) > 100_000
    assert tokenizer.encode_batch(some) == [tokenizer.encode_batch([text])[0] for text in some]
    for i, ids in enumerate(tokenizer.encode_batch(some)):
        assert tokenizer.decode(ids) == some[i]


def test_much_text_that_is_no_unicode_is_one_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode_batch(["a" * 200_000, "b\ud800"])


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}},
    ],
    ids=["normalizer", "no splits", "other splits"],
)
def test_another_kind_of_tokenizer_is_not_encoded_in_bulk(
    tokenizer: Tokenizer, change: dict[str, Any]
) -> None:
    pytest.importorskip("tiktoken", reason="needs the extra data: tiktoken")
    assert encoder_of(tokenizer.text, SPLITS, tokenizer.token_bytes) is not None
    other = json.dumps(json.loads(tokenizer.text) | change)
    assert encoder_of(other, SPLITS, tokenizer.token_bytes) is None


def test_merges_that_make_no_ascending_ids_are_not_encoded_in_bulk(tokenizer: Tokenizer) -> None:
    spec = json.loads(tokenizer.text)
    spec["model"]["merges"].reverse()
    assert encoder_of(json.dumps(spec), SPLITS, tokenizer.token_bytes) is None
