"""Shards read back as they were written, from any thread; damage of every kind is an error."""

import json
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.data import small
from v3jax.data import shards
from v3jax.data.shards import CorruptRecord, Shards, Writer

N = 40


def ids_of(i: int) -> list[int]:
    return [*np.random.default_rng(i).integers(0, 600, i % 7 * 50).tolist(), 1]


def write(folder: Path, width: int = 2) -> Path:
    """A corpus of one source: three training shards and no held-out documents."""
    (folder / "a").mkdir(parents=True)
    made = []
    for k, some in enumerate(np.array_split(np.arange(N), 3)):
        writer = Writer(folder / "a" / f"train-{k:05d}-of-00003.array_record", width)
        for i in some.tolist():
            writer.write(ids_of(i), f"document {i}")
        made.append(vars(writer.close()))
    sides = {}
    for side, lengths in (("train", [len(ids_of(i)) for i in range(N)]), ("heldout", [])):
        file = folder / "a" / f"{side}-lengths.npy"
        np.save(file, np.array(lengths, np.int32))
        named = [m | {"file": f"a/{m['file']}"} for m in made] if side == "train" else []
        about = {"file": f"a/{file.name}", "sha256": shards.file_sha256(file)}
        sides[side] = {"shards": named, "text_bytes": 0, "lengths": about}
    tokenizer = small.tokenizer()
    (folder / "tokenizer.json").write_text(tokenizer.text, encoding="utf-8")
    index = {
        "format": shards.FORMAT,
        "tokenizer": {"sha256": tokenizer.digest, "vocab_size": 600, "eos": tokenizer.eos},
        "sources": [{"name": "a", "kind": "prose", "weight": 1.0, **sides}],
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus")


@pytest.mark.parametrize("width", [2, 4])
def test_documents_read_back_in_any_order(tmp_path: Path, width: int) -> None:
    (source,) = Shards.open(write(tmp_path / "corpus", width), verify=True).sources
    assert len(source.train) == N
    assert len(source.heldout) == 0
    for i in np.random.default_rng(0).permutation(N).tolist():
        ids, name = source.train.read_named(i)
        assert ids.dtype == np.int32
        assert ids.tolist() == ids_of(i)
        assert name == f"document {i}"
        assert source.lengths_N[i] == len(ids)
    with pytest.raises(IndexError):
        source.read(N)


def test_threads_and_unpickled_copies_read_the_same(corpus: Path) -> None:
    opened = Shards.open(corpus)
    copy = pickle.loads(pickle.dumps(opened))
    with ThreadPoolExecutor(8) as pool:
        for one in (opened, copy):
            order = np.random.default_rng(1).integers(0, N, 400).tolist()
            for i, ids in zip(order, pool.map(one.sources[0].read, order), strict=True):
                assert ids.tolist() == ids_of(i)


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x.array_record", 2)
    for bad in ([70_000], [-1]):
        with pytest.raises(ValueError, match="does not fit in 2 bytes"):
            writer.write(bad, "x")
    assert not (tmp_path / "x.array_record").exists()
    assert shards.id_bytes(2**16) == 2
    assert shards.id_bytes(2**16 + 1) == 4


SHARD = "a/train-00001-of-00003.array_record"


def truncate(folder: Path) -> None:
    file = folder / SHARD
    file.write_bytes(file.read_bytes()[:-1000])


def other_count(folder: Path) -> None:
    """A whole file of the same size with fewer records: what only its count tells."""
    writer = Writer(folder / "other", 2)
    writer.write([1], "x")
    writer.close()
    raw = (folder / "other").read_bytes()
    index = (folder / "index.json").read_text()
    entry = json.loads(index)["sources"][0]["train"]["shards"][1]
    text = index.replace(f'"bytes": {entry["bytes"]}', f'"bytes": {len(raw)}')
    (folder / "index.json").write_text(text)
    for k in range(3):
        (folder / f"a/train-{k:05d}-of-00003.array_record").write_bytes(raw)


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, f"{SHARD}: 130072 bytes where index.json says 131072"),
        (other_count, "train-00000-of-00003.array_record: 1 records where index.json says 14"),
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
        (lambda folder: (folder / "index.json").unlink(), "no index.json"),
        (lambda folder: (folder / "a/train-lengths.npy").unlink(), "train-lengths.npy: missing"),
        (edit("index.json", '"format": 1', '"format": 99'), "format 99, this version reads 1"),
        (edit("index.json", '"format": 1, ', ""), "format None, this version reads 1"),
        (
            edit(
                "index.json",
                "{",
                "",
            ),
            "index.json: cannot be read",
        ),
        (edit("index.json", '"weight": 1.0, ', ""), "lacks 'weight'"),
    ],
)
def test_damage_is_an_error_of_one_line(
    corpus: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(corpus)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Shards.open(corpus)
    assert "\n" not in str(caught.value)


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def test_a_changed_byte_shows_when_verified(corpus: Path) -> None:
    flip(corpus / SHARD, 30_000)
    Shards.open(corpus)
    with pytest.raises(ValueError, match="its SHA-256 is not that"):
        Shards.open(corpus, verify=True)


def test_another_tokenizer_is_refused(corpus: Path) -> None:
    edit("tokenizer.json", '"version"', '"version" ')(corpus)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not the corpus's tokenizer"):
        Shards.open(corpus).tokenizer()


def test_a_damaged_record_is_named() -> None:
    record = shards.encode_record([1, 2, 3], "x", 2)
    assert shards.decode_record(record, "f: record 0")[0].tolist() == [1, 2, 3]
    for at in range(len(record)):
        changed = bytearray(record)
        changed[at] ^= 4
        with pytest.raises(CorruptRecord, match="f: record 0: "):
            shards.decode_record(bytes(changed), "f: record 0")
    for n in range(len(record)):
        with pytest.raises(CorruptRecord, match="f: record 0: "):
            shards.decode_record(record[:n], "f: record 0")


def test_a_record_damaged_in_its_file_is_named(corpus: Path) -> None:
    """A shard whose records are whole ArrayRecord but not ours."""
    from array_record.python.array_record_module import ArrayRecordWriter

    file = corpus / SHARD
    index = json.loads((corpus / "index.json").read_text())
    n = index["sources"][0]["train"]["shards"][1]["records"]
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for i in range(n):
        record = bytearray(shards.encode_record(ids_of(14 + i), f"document {14 + i}", 2))
        record[-1] ^= i == 3
        writer.write(bytes(record))
    writer.close()
    (source,) = Shards.open(corpus).sources
    assert source.read(16).tolist() == ids_of(16)
    with pytest.raises(CorruptRecord, match=re.escape(f"{SHARD}: record 3: its checksum")):
        source.read(17)
