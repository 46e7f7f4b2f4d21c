"""Byte-level BPE with DeepSeek-V3's pre-tokenizer (report section 4.1).

Trained with Hugging Face `tokenizers` on the run's own corpus, or read from a `tokenizer.json`.
Ids: three specials, bytes and merges, then the remaining specials, as in the released tokenizer.
Every added token is a control token: text that spells one is encoded as plain bytes.
"""

import codecs
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from v3jax.data.bulk import BulkEncoder, encoder_of

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_FIRST_SPECIALS = (BOS, EOS, PAD)
_LAST_SPECIALS = (FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT)

# The three splits of the released tokenizer, each run on the pieces the previous one left.
SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)

_BULK = 100_000
"""Characters from which on it pays to build the bulk encoder."""
_NOT_UNICODE = "the text is not valid Unicode; give it as UTF-8"


class Tokenizer:
    """Text to ids and back, with the special ids by name.

    Raises:
      ValueError: the file is no byte-level tokenizer that keeps every byte of a text, or lacks one
        of the special tokens a run needs.
    """

    def __init__(self, text: str, origin: str = "tokenizer.json") -> None:
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self._inner = HFTokenizer.from_str(_with_control_tokens(text))
        except Exception as error:
            raise ValueError(f"{origin}: not a tokenizer.json ({error})") from None
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        self.text = text
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1
        self.bos, self.eos, self.pad = (self._special(t, origin) for t in _FIRST_SPECIALS)
        self.fim_hole, self.fim_begin, self.fim_end = (
            self._special(t, origin) for t in (FIM_HOLE, FIM_BEGIN, FIM_END)
        )
        if self._bytes_of(_PROBE) != _PROBE.encode():
            raise ValueError(
                f"{origin}: not byte-level, or it changes the text it encodes; "
                "use a byte-level BPE without normaliser or added space"
            )

    def _special(self, token: str, origin: str) -> int:
        found = self._inner.token_to_id(token)
        if found is None:
            raise ValueError(f"{origin}: lacks the special token {token}; use another tokenizer")
        return found

    def _bytes_of(self, text: str) -> bytes | None:
        """What encoding and decoding make of `text`; None if a token stands for no bytes."""
        try:
            return b"".join(self.token_bytes[i] for i in self.encode(text))
        except KeyError:
            return None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens are never added and never recognised inside text.

        Raises:
          ValueError: the text holds half a surrogate pair, which UTF-8 cannot encode.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, encoded in parallel; much text by `bulk` where that can be."""
        if sum(map(len, texts)) < _BULK or self.bulk is None:
            return self.encode_plain(texts)
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken lets go of the interpreter
                found = list(pool.map(self.bulk.encode, texts))
        except UnicodeEncodeError:
            raise ValueError(_NOT_UNICODE) from None
        left = iter(
            self.encode_plain([t for t, ids in zip(texts, found, strict=True) if ids is None])
        )
        return [next(left) if ids is None else ids for ids in found]

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """The same by Hugging Face's tokenizers alone."""
        try:
            encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            raise ValueError(_NOT_UNICODE) from None
        return [e.ids for e in encoded]

    @cached_property
    def bulk(self) -> BulkEncoder | None:
        """The encoder for much text; None if this tokenizer is not of its kind."""
        return encoder_of(self.text, SPLITS, self.token_bytes)

    def encode_with_controls(self, text: str) -> list[int]:
        """Ids of a text whose control tokens count: for templates, never for text of others.

        Raises:
          ValueError: as `encode`.
        """
        return self.encode_pieces(self.split_controls(text))

    def split_controls(self, text: str) -> list[tuple[str, int | None]]:
        """Cuts a text at its control tokens: pieces with their ids, None for those in between.

        Raises:
          ValueError: as `encode`.
        """
        try:
            cut = self._splitter.encode(text, add_special_tokens=False)
        except TypeError:
            raise ValueError(_NOT_UNICODE) from None
        return [
            (text[low:high], self.control_ids.get(self._splitter.id_to_token(i)))
            for i, (low, high) in zip(cut.ids, cut.offsets, strict=True)
        ]

    def encode_pieces(self, pieces: Iterable[tuple[str, int | None]]) -> list[int]:
        """Ids of what `split_controls` returns; the pieces without an id are plain text."""
        pieces = list(pieces)
        plain = iter(self.encode_batch([text for text, index in pieces if index is None]))
        return [i for _, index in pieces for i in (next(plain) if index is None else [index])]

    @cached_property
    def _splitter(self) -> Any:
        """Knows the control tokens and no other: what lies between is one unknown token.

        So control tokens are found as in any Hugging Face tokenizer, their options included.
        """
        from tokenizers import Tokenizer as HFTokenizer
        from tokenizers import models

        splitter = HFTokenizer(models.WordLevel({"": 0}, unk_token=""))
        splitter.add_tokens(list(self._inner.get_added_tokens_decoder().values()))
        return splitter

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that form no UTF-8 become U+FFFD, unused ids nothing."""
        raw = self.decode_bytes(ids, skip_special_tokens=skip_special_tokens)
        return raw.decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> bytes:
        """The bytes `ids` stand for, which may begin or end within a character."""
        controls = {} if skip_special_tokens else self._controls
        return b"".join(controls.get(int(i)) or self.token_bytes[int(i)] for i in ids)

    @cached_property
    def control_ids(self) -> dict[str, int]:
        """The id of each control token, by its spelling."""
        added = self._inner.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items()}

    @cached_property
    def _controls(self) -> dict[int, bytes]:
        """The spelling of each control token."""
        return {i: spelling.encode() for spelling, i in self.control_ids.items()}

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes each id stands for; control and unused ids stand for none."""
        table = [b""] * self.vocab_size
        for token, index in self._inner.get_vocab(with_added_tokens=True).items():
            if index not in self._controls:
                table[index] = bytes(_BYTE_OF[c] for c in token)
        return tuple(table)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of each id, int64 `[vocab]`."""
        return np.array([len(b) for b in self.token_bytes], dtype=np.int64)

    @cached_property
    def newline_splits(self) -> dict[int, tuple[int, ...]]:
        """Tokens of punctuation followed by line breaks, and the ids of their two parts."""
        splits = {}
        for index, raw in enumerate(self.token_bytes):
            parts = _punctuation_and_newlines(raw)
            if parts is not None:
                splits[index] = tuple(self.encode(parts[0]) + self.encode(parts[1]))
        return splits

    def split_newlines(self, ids: list[int], rate: float, rng: np.random.Generator) -> list[int]:
        """Replaces punctuation+newline tokens by their parts with probability `rate`.

        It weakens the token-boundary bias such tokens bring (report section 4.1); the text stays.
        """
        if rate == 0:
            return ids
        array = np.asarray(ids, np.int64)
        candidates = np.flatnonzero(self._splits[array])
        chosen = candidates[rng.random(len(candidates)) < rate]
        out, last = [], 0
        for at in chosen.tolist():
            out += ids[last:at]
            out += self.newline_splits[ids[at]]
            last = at + 1
        return out + ids[last:]

    @cached_property
    def _splits(self) -> np.ndarray:
        """Whether `newline_splits` has an id, `[vocab]`."""
        table = np.zeros(self.vocab_size, bool)
        table[list(self.newline_splits)] = True
        return table


class StreamDecoder:
    """Text of ids as they come; a character whose last bytes are still to come is held back.

    What `push` and the closing `flush` return adds up to `Tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these further ids complete; perhaps none."""
        raw = self._tokenizer.decode_bytes(ids, skip_special_tokens=self._skip)
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """What is held back, as U+FFFD; the decoder is then as new."""
        return self._utf8.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """The byte each character of the byte-level alphabet stands for."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    characters = [*map(chr, printable), *(chr(256 + n) for n in range(len(others)))]
    return dict(zip(characters, printable + others, strict=True))


_BYTE_OF = _byte_alphabet()

# Text that a normaliser, an added space, an unknown token or a truncation would change.
_PROBE = (
    "A  e\u0301\ufb01\t\u4e2d\U0001f642\u200b\x00\x7f \r\n"
    + "".join(map(chr, range(32, 384)))
    + " "
)


def _with_control_tokens(text: str) -> str:
    """The same tokenizer with every added token special, so that text is never read as one."""
    spec = json.loads(text)
    if all(token["special"] for token in spec["added_tokens"]):
        return text
    for token in spec["added_tokens"]:
        token["special"] = True
    return json.dumps(spec, ensure_ascii=False)


def _punctuation_and_newlines(raw: bytes) -> tuple[str, str] | None:
    """Splits ` ?[punctuation or symbols]+[\\r\\n]+` before the breaks; None for other tokens."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    marks = text.rstrip("\r\n")
    body = marks.removeprefix(" ")
    if not body or marks == text:
        return None
    if any(unicodedata.category(c)[0] not in "PS" for c in body):
        return None
    return marks, text[len(marks) :]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains the BPE to exactly `vocab_size` ids, specials included (fewer if the text is tiny).

    Raises:
      ValueError: `vocab_size` does not hold the bytes and specials.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer

    specials = len(_FIRST_SPECIALS) + len(_LAST_SPECIALS)
    if vocab_size < 256 + specials:
        raise ValueError(f"data.tokenizer_vocab_size: needs at least {256 + specials} ids")
    inner = HFTokenizer(models.BPE())
    splits: list[Any] = [pre_tokenizers.Split(Regex(s), "isolated") for s in SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_LAST_SPECIALS),
        special_tokens=[AddedToken(t, special=True) for t in _FIRST_SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.add_special_tokens([AddedToken(t, special=True) for t in _LAST_SPECIALS])
    return Tokenizer(inner.to_str())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json`, or the one in a folder.

    Raises:
      ValueError: no such file, or not a tokenizer that can be used (see `Tokenizer`).
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file /= "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such tokenizer.json")
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file}: not a tokenizer.json ({error})") from None
    return Tokenizer(text, str(file))
