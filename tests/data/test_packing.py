"""Packing: every token once, short documents whole, the choice of the slow reference."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.reference import packing as reference
from v3jax.data.packing import (
    PlannedRows,
    Rows,
    best_fit,
    cut,
    make_plan,
    pack,
    read_rows,
    seen,
    write_rows,
)

PAD = 2


def documents(n: int, longest: int, seed: int = 0) -> list[np.ndarray]:
    """Documents of ids that occur nowhere else, from 100 up."""
    lengths = np.random.default_rng(seed).integers(0, longest + 1, n)
    return np.split(np.arange(100, 100 + lengths.sum(), dtype=np.int32), np.cumsum(lengths)[:-1])


def pieces(rows: Rows) -> list[list[int]]:
    """The tokens of every segment of every row."""
    return [
        tokens[segments == s].tolist()
        for tokens, segments in zip(rows.tokens_NS, rows.segments_NS, strict=True)
        for s in range(1, segments.max() + 1)
    ]


@pytest.mark.parametrize(("n", "longest"), [(300, 20), (300, 64), (60, 500), (1, 3), (40, 1)])
def test_every_token_appears_exactly_once(n: int, longest: int) -> None:
    given = documents(n, longest)
    rows = pack(given, 64, PAD)
    found = rows.tokens_NS[rows.segments_NS > 0]
    assert sorted(found.tolist()) == np.concatenate(given).tolist()


@pytest.mark.parametrize("longest", [20, 64, 300])
def test_a_document_is_cut_only_where_a_row_ends(longest: int) -> None:
    given = documents(200, longest)
    expected = [
        d[at : at + 64].tolist() for d in given for at in range(0, len(d), 64)
    ]  # whole rows from the start, then the rest
    assert sorted(pieces(pack(given, 64, PAD))) == sorted(expected)
    assert sorted(c.length for c in cut([len(d) for d in given], 64)) == sorted(
        reference.chunk_lengths([len(d) for d in given], 64)
    )


def test_segments_are_contiguous_and_numbered_from_one() -> None:
    rows = pack(documents(200, 40), 64, PAD)
    assert rows.tokens_NS.dtype == rows.segments_NS.dtype == np.int32
    for segments in rows.segments_NS:
        used = segments[segments > 0]
        assert used[0] == 1
        assert set(np.diff(used)) <= {0, 1}
        assert (segments[len(used) :] == 0).all()
    assert (rows.tokens_NS[rows.segments_NS == 0] == PAD).all()
    assert (rows.segments_NS == 0).any()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("capacity", [1, 7, 64, 257])
def test_the_choice_is_the_slow_references(capacity: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, capacity + 1, 250).tolist()
    if seed % 2:  # many short ones, as after cutting long documents
        lengths = np.minimum(rng.geometric(min(1.0, 4 / capacity), 250), capacity).tolist()
    bins = best_fit(lengths, capacity)
    assert sorted(i for items in bins for i in items) == list(range(250))
    left = sorted(capacity - sum(lengths[i] for i in items) for items in bins)
    assert left == reference.free_spaces(lengths, capacity)


def test_it_is_best_fit_not_first_fit_nor_worst_fit() -> None:
    bins = best_fit([2, 13, 8, 10], 20)  # the 2 completes 10 + 8; beside the 13 it comes first
    assert sorted(sorted(items) for items in bins) == [[0, 2, 3], [1]]


def test_packing_does_not_depend_on_anything_but_the_documents() -> None:
    first, second = (pack(documents(300, 90), 64, PAD) for _ in range(2))
    assert (first.tokens_NS == second.tokens_NS).all()
    assert (first.segments_NS == second.segments_NS).all()


def test_rows_of_text_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.5, 3000).astype(int) + 1
    bins = best_fit([c.length for c in cut(lengths.tolist(), 1025)], 1025)
    fill = lengths.sum() / (1025 * len(bins))
    assert fill > 0.99
    assert len(bins) >= -(-lengths.sum() // 1025)


def test_an_item_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than 10 tokens"):
        best_fit([3, 11], 10)


def test_documents_that_fit_exactly_share_no_row() -> None:
    rows = pack([np.arange(64), np.arange(64), np.arange(128)], 64, PAD)
    assert rows.tokens_NS.shape == (4, 64)
    assert (rows.segments_NS == 1).all()


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    rows = pack(documents(50, 40), 64, PAD)
    write_rows(tmp_path / "kept", {"train_0": rows, "heldout": pack(documents(5, 40), 64, PAD)})
    return tmp_path / "kept"


def test_rows_read_back_as_written(kept: Path) -> None:
    found = read_rows(kept)
    assert found is not None
    assert found.keys() == {"train_0", "heldout"}
    expected = pack(documents(50, 40), 64, PAD)
    assert (found["train_0"].tokens_NS == expected.tokens_NS).all()
    assert (found["train_0"].segments_NS == expected.segments_NS).all()
    assert not list(kept.parent.glob("*.partial"))


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["train_0_tokens.npy", "heldout_segments.npy", "rows.json"])
def test_damaged_rows_are_not_read(kept: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(kept / name)
    assert read_rows(kept) is None


def test_what_a_killed_writer_left_is_not_read_and_does_not_stay(kept: Path) -> None:
    partial = kept.with_name("new.partial")
    kept.rename(partial)
    (partial / "rows.json").unlink()
    assert read_rows(kept.with_name("new")) is None
    write_rows(kept.with_name("new"), {"heldout": pack(documents(3, 9), 64, PAD)})
    assert [p.name for p in kept.parent.iterdir()] == ["new"]
    assert read_rows(kept.with_name("new")) is not None


def test_marked_tokens_have_their_ids_and_their_segment_negated() -> None:
    given = documents(40, 90)
    rng = np.random.default_rng(1)
    marked_at = [rng.random(len(d)) < 0.5 for d in given]
    marked = [np.where(at, seen(d), d) for d, at in zip(given, marked_at, strict=True)]
    plain, rows = pack(given, 64, PAD), pack(marked, 64, PAD)
    planned = PlannedRows(marked, make_plan([len(d) for d in given], 64), 64, PAD)
    np.testing.assert_array_equal(rows.tokens_NS, plain.tokens_NS)
    np.testing.assert_array_equal(abs(rows.segments_NS), plain.segments_NS)
    found = set(rows.tokens_NS[rows.segments_NS < 0].tolist())
    assert found == set(np.concatenate(given)[np.concatenate(marked_at)].tolist())
    assert rows.n_tokens == plain.n_tokens
    for i in range(len(rows)):
        np.testing.assert_array_equal(planned[i], rows[i])
