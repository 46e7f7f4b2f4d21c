"""Fill-in-the-middle in prefix-suffix-middle order (report section 4.1).

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

Applied to whole documents before packing. The report leaves open how documents are cut: two
uniform character positions, for documents of every source, are ours. So is the plain form of a
document: its tokens and `<eos>`, without `<bos>`. A document's random choices depend on nothing but
the seed and its text.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import batched

import numpy as np

from v3jax.data.tokenizer import Tokenizer

_BATCH = 256  # documents whose encodings are held at once


def cut_points(n_characters: int, rng: np.random.Generator) -> tuple[int, int]:
    """Start and end of the middle: two uniform positions in order, either part may be empty."""
    low, high = sorted(rng.integers(0, n_characters + 1, size=2).tolist())
    return low, high


def encode_documents(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    seed: int,
    fim_rate: float,
    newline_split_rate: float,
) -> Iterator[np.ndarray]:
    """Ids of training documents, int32, each in PSM form with probability `fim_rate`.

    Punctuation+newline tokens are split at `newline_split_rate` (`Tokenizer.split_newlines`).
    """
    for batch in batched(texts, _BATCH):
        rngs = [_generator(seed, text) for text in batch]
        parts = [_parts(text, fim_rate, rng) for text, rng in zip(batch, rngs, strict=True)]
        encoded = iter(tokenizer.encode_batch([part for document in parts for part in document]))
        for document, rng in zip(parts, rngs, strict=True):
            ids = [
                tokenizer.split_newlines(next(encoded), newline_split_rate, rng) for _ in document
            ]
            yield np.array(_assemble(tokenizer, ids), np.int32)


def encode_document(
    tokenizer: Tokenizer, text: str, *, seed: int, fim_rate: float, newline_split_rate: float
) -> np.ndarray:
    """Ids of one training document; see `encode_documents`."""
    rates = {"fim_rate": fim_rate, "newline_split_rate": newline_split_rate}
    return next(encode_documents(tokenizer, [text], seed=seed, **rates))


def from_ids(
    tokenizer: Tokenizer, ids: np.ndarray, *, seed: int, fim_rate: float, newline_split_rate: float
) -> np.ndarray:
    """What `encode_document` gives for the text of these ids, `<eos>` at their end."""
    plain = ids[:-1].tolist()
    text = tokenizer.decode(plain)
    rng = _generator(seed, text)
    parts = _parts(text, fim_rate, rng)
    encoded = [plain] if len(parts) == 1 else tokenizer.encode_batch(parts)
    split = [tokenizer.split_newlines(part, newline_split_rate, rng) for part in encoded]
    return np.array(_assemble(tokenizer, split), np.int32)


def is_rearranged(seed: int, text: str, fim_rate: float) -> bool:
    """Whether a document of this text is put in PSM form."""
    return fim_rate > 0 and _generator(seed, text).random() < fim_rate


def _generator(seed: int, text: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _parts(text: str, fim_rate: float, rng: np.random.Generator) -> tuple[str, ...]:
    """The whole text, or its prefix, middle and suffix."""
    if rng.random() >= fim_rate:
        return (text,)
    low, high = cut_points(len(text), rng)
    return text[:low], text[low:high], text[high:]


def _assemble(tokenizer: Tokenizer, parts: list[list[int]]) -> list[int]:
    if len(parts) == 1:
        return [*parts[0], tokenizer.eos]
    prefix, middle, suffix = parts
    return [
        tokenizer.fim_begin,
        *prefix,
        tokenizer.fim_hole,
        *suffix,
        tokenizer.fim_end,
        *middle,
        tokenizer.eos,
    ]
