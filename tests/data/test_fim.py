"""Fill-in-the-middle: the report's order, the rate, and nothing lost."""

from collections import Counter

import numpy as np
import pytest

from tests.data import small
from tests.reference import fim as reference
from v3jax.data.fim import cut_points, encode_document, encode_documents

RATES = {"fim_rate": 1.0, "newline_split_rate": 0.0}


@pytest.fixture(scope="module")
def ids() -> reference.Specials:
    t = small.tokenizer()
    return reference.Specials(t.fim_begin, t.fim_hole, t.fim_end, t.eos)


def texts() -> list[str]:
    return [*small.ODD_TEXTS, *(small.text(i, i) for i in range(60))]


def encoded(given: list[str], seed: int = 0, **rates: float) -> list[list[int]]:
    found = encode_documents(small.tokenizer(), given, seed=seed, **RATES | rates)
    return [sequence.tolist() for sequence in found]


@pytest.mark.parametrize("split_rate", [0.0, 0.5])
def test_the_original_document_comes_back(ids: reference.Specials, split_rate: float) -> None:
    decode = small.tokenizer().decode
    for text, sequence in zip(
        texts(), encoded(texts(), newline_split_rate=split_rate), strict=True
    ):
        parts = reference.undo(sequence, ids)
        assert parts is not None
        assert "".join(decode(part) for part in parts) == text


def test_the_form_is_prefix_suffix_middle(ids: reference.Specials) -> None:
    tokenizer = small.tokenizer()
    for text, sequence in zip(texts(), encoded(texts()), strict=True):
        parts = reference.undo(sequence, ids)
        assert parts is not None
        prefix, middle, suffix = (tokenizer.encode(tokenizer.decode(part)) for part in parts)
        assert sequence == reference.psm(prefix, middle, suffix, ids)
        assert text.startswith(tokenizer.decode(prefix))
        assert text.endswith(tokenizer.decode(suffix))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_kept(ids: reference.Specials, rate: float) -> None:
    n = 4000
    chosen = sum(
        reference.undo(s, ids) is not None
        for s in encoded([f"document {i}" for i in range(n)], fim_rate=rate)
    )
    assert abs(chosen / n - rate) < 4 * (rate * (1 - rate) / n) ** 0.5


def test_rate_zero_leaves_documents_plain() -> None:
    tokenizer = small.tokenizer()
    plain = [[*tokenizer.encode(text), tokenizer.eos] for text in texts()]
    assert encoded(texts(), fim_rate=0.0) == plain


def test_cuts_are_two_uniform_positions() -> None:
    rng = np.random.default_rng(0)
    n = 16_000
    counts = Counter(cut_points(3, rng) for _ in range(n))
    for low in range(4):
        for high in range(low, 4):
            expected = (1 if low == high else 2) / 16
            spread = 4 * (expected * (1 - expected) / n) ** 0.5
            assert abs(counts[low, high] / n - expected) < spread
    assert sum(counts.values()) == n


def test_an_empty_document_can_be_cut() -> None:
    assert cut_points(0, np.random.default_rng(0)) == (0, 0)


def test_choices_depend_on_seed_and_text_only() -> None:
    rates = {"fim_rate": 0.5, "newline_split_rate": 0.5}
    given = [*small.stdlib_texts("co*.py"), *(small.text(i) for i in range(300))]
    whole = encoded(given, seed=3, **rates)
    assert encoded(given[::-1], seed=3, **rates) == whole[::-1]
    alone = encode_document(small.tokenizer(), given[7], seed=3, **rates)
    assert alone.tolist() == whole[7]
    assert alone.dtype == np.int32
    assert encoded(given, seed=4, **rates) != whole
