"""A prepared corpus on disk: documents as token ids in ArrayRecord shards, under an index.

    index.json                  what follows, with counts, sizes and digests; written last
    tokenizer.json
    SOURCE/train-00000-of-00002.array_record    and heldout-...: one record a document
    SOURCE/train-lengths.npy                    tokens of each record in order, int32

A record is a header (format, bytes of an id, bytes of the name, number of ids, CRC-32 of all else)
and then the ids, little-endian, and the document's name. Ids end with the end-of-text token;
fill-in-the-middle and packing are the loader's. ArrayRecord reads a truncated file as one without
records and does not complain, so sizes and counts are compared with the index.
"""

import json
import struct
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from v3jax.data.packing import file_sha256
from v3jax.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
INDEX, TOKENIZER = "index.json", "tokenizer.json"
Side = Literal["train", "heldout"]
SIDES: tuple[Side, ...] = ("train", "heldout")
_RECORD = 1  # first byte of a record
_HEADER = struct.Struct("<BBHII")
_DAMAGED = "copy or prepare the corpus anew"


class CorruptRecord(ValueError):
    """A record that does not read back as it was written."""


def id_bytes(vocab_size: int) -> int:
    """Bytes of one id on disk."""
    return 2 if vocab_size <= 2**16 else 4


def encode_record(ids: Sequence[int] | np.ndarray, name: str, width: int) -> bytes:
    """A document as a record.

    Raises:
      ValueError: an id that does not fit in `width` bytes.
    """
    array = np.asarray(ids, np.int64)
    if array.size and not 0 <= array.min() <= array.max() < 2 ** (8 * width):
        raise ValueError(f"{name}: an id does not fit in {width} bytes")
    said = name.encode()[:0xFFFF]
    body = array.astype(f"<u{width}").tobytes() + said
    head = _HEADER.pack(_RECORD, width, len(said), array.size, 0)
    return (
        _HEADER.pack(_RECORD, width, len(said), array.size, zlib.crc32(body, zlib.crc32(head)))
        + body
    )


def decode_record(record: bytes, where: str) -> tuple[np.ndarray, str]:
    """The ids (int32) and the name of a record.

    Raises:
      CorruptRecord: the record is not as it was written; names `where` it lies.
    """
    if len(record) < _HEADER.size or record[0] != _RECORD:
        raise CorruptRecord(f"{where}: not a record of this format; {_DAMAGED}")
    kind, width, n_name, n_ids, crc = _HEADER.unpack_from(record)
    body = record[_HEADER.size :]
    head = _HEADER.pack(kind, width, n_name, n_ids, 0)
    if width not in (2, 4) or zlib.crc32(body, zlib.crc32(head)) != crc:
        raise CorruptRecord(f"{where}: its checksum is another; {_DAMAGED}")
    if len(body) != n_ids * width + n_name:
        raise CorruptRecord(f"{where}: its length is another; {_DAMAGED}")
    ids = np.frombuffer(body, f"<u{width}", n_ids).astype(np.int32)
    return ids, body[n_ids * width :].decode(errors="replace")


@dataclass(frozen=True)
class Shard:
    """One file of records, as the index describes it."""

    file: str
    records: int
    tokens: int
    bytes: int
    sha256: str


class Writer:
    """Writes one shard whole: under a temporary name, renamed when it is closed.

    Not closed, or left by an exception, nothing is there.
    """

    def __init__(self, file: Path, width: int) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._file, self._width = file, width
        file.parent.mkdir(parents=True, exist_ok=True)
        self._partial = file.with_name(f"{file.name}.partial")
        self._partial.unlink(missing_ok=True)
        # One record a group, so that reading one at random unpacks no other.
        self._inner = ArrayRecordWriter(str(self._partial), "group_size:1")
        self.lengths: list[int] = []

    def write(self, ids: Sequence[int] | np.ndarray, name: str) -> None:
        """Adds a document."""
        self.write_record(encode_record(ids, name, self._width))

    def write_record(self, record: bytes) -> None:
        """Adds what `encode_record` made."""
        self._inner.write(record)
        self.lengths.append(_HEADER.unpack_from(record)[3])

    def close(self) -> Shard:
        """Finishes the file, reads it back for its digest, and gives it its name."""
        self._inner.close()
        shard = Shard(
            file=self._file.name,
            records=len(self.lengths),
            tokens=sum(self.lengths),
            bytes=self._partial.stat().st_size,
            sha256=file_sha256(self._partial),
        )
        self._partial.replace(self._file)
        return shard


@dataclass(frozen=True)
class Records:
    """The documents of one source on one side of the split, in a fixed order."""

    folder: Path
    source: str
    side: Side
    shards: tuple[Shard, ...]
    text_bytes: int
    """UTF-8 bytes of the documents."""
    lengths_file: str
    lengths_sha256: str
    _open: threading.local = field(default_factory=threading.local, compare=False, repr=False)

    def __len__(self) -> int:
        return sum(shard.records for shard in self.shards)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_open", "lengths_N", "_first")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _open=threading.local())

    @property
    def n_tokens(self) -> int:
        """Ids of all documents."""
        return sum(shard.tokens for shard in self.shards)

    @cached_property
    def lengths_N(self) -> np.ndarray:
        """Ids of each document, int32, mapped into memory."""
        return np.load(self.folder / self.lengths_file, mmap_mode="r", allow_pickle=False)

    @cached_property
    def _first(self) -> np.ndarray:
        """The number of each shard's first document, and of all."""
        return np.cumsum([0, *(shard.records for shard in self.shards)])

    def read(self, n: int) -> np.ndarray:
        """The ids of document `n`, int32; any thread may ask.

        Raises:
          CorruptRecord: the record is damaged; names its file and place.
          IndexError: there is no such document.
        """
        return self.read_named(n)[0]

    def read_named(self, n: int) -> tuple[np.ndarray, str]:
        """The ids and the name of document `n`; raises as `read`."""
        if not 0 <= n < len(self):
            raise IndexError(f"document {n} of {len(self)} in {self.folder}/{self.source}")
        shard = int(np.searchsorted(self._first, n, side="right")) - 1
        row = n - int(self._first[shard])
        file = self.folder / self.shards[shard].file
        where = f"{file}: record {row}"
        try:
            (record,) = self._reader(shard).read([row])
        except (IndexError, RuntimeError, ValueError) as error:
            said = str(error).split("\n")[0][:200]
            raise CorruptRecord(f"{where}: cannot be read ({said}); {_DAMAGED}") from None
        ids, name = decode_record(record, where)
        if len(ids) != self.lengths_N[n]:
            raise CorruptRecord(
                f"{where}: holds {len(ids)} ids, not {self.lengths_N[n]}; {_DAMAGED}"
            )
        return ids, name

    def _reader(self, shard: int) -> Any:
        """An open shard; each thread opens its own, since a reader is not to be shared."""
        from array_record.python.array_record_module import ArrayRecordReader

        readers: dict[int, Any] = vars(self._open).setdefault("readers", {})
        if shard not in readers:
            file = str(self.folder / self.shards[shard].file)
            readers[shard] = ArrayRecordReader(file, "readahead_buffer_size:0")
        return readers[shard]


@dataclass(frozen=True)
class ShardSource:
    """One source of a prepared corpus."""

    name: str
    kind: str
    weight: float
    train: Records
    heldout: Records

    @property
    def lengths_N(self) -> np.ndarray:
        """Ids of each training document, int32."""
        return self.train.lengths_N

    def read(self, n: int) -> np.ndarray:
        """The ids of training document `n`; see `Records.read`."""
        return self.train.read(n)


@dataclass(frozen=True)
class Shards:
    """A prepared corpus."""

    folder: Path
    sources: tuple[ShardSource, ...]
    vocab_size: int
    eos: int
    tokenizer_digest: str
    digest: str
    """Of the whole index, and through it of every byte."""

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> "Shards":
        """Opens a folder that `v3jax.data.prepare` wrote.

        Args:
          verify: compares the SHA-256 of every file, which reads them all.

        Raises:
          ValueError: no index or one of another version, or a file that is missing or is not what
            the index says (its size and number of records; with `verify` every byte).
        """
        folder = Path(folder).expanduser()
        index = read_index(folder)
        try:
            found = cls._of_index(folder, index)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX}: lacks {error}; {_DAMAGED}") from None
        found.check(verify=verify)
        return found

    @classmethod
    def _of_index(cls, folder: Path, index: Mapping[str, Any]) -> "Shards":
        return cls(
            folder=folder,
            sources=tuple(_source(folder, one) for one in index["sources"]),
            vocab_size=index["tokenizer"]["vocab_size"],
            eos=index["tokenizer"]["eos"],
            tokenizer_digest=index["tokenizer"]["sha256"],
            digest=file_sha256(folder / INDEX),
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the ids.

        Raises:
          ValueError: it is missing or another one.
        """
        tokenizer = load_tokenizer(self.folder / TOKENIZER)
        if tokenizer.digest != self.tokenizer_digest:
            raise ValueError(f"{self.folder / TOKENIZER}: not the corpus's tokenizer; {_DAMAGED}")
        return tokenizer

    def check(self, *, verify: bool = False) -> None:
        """Raises ValueError unless the files are those of the index; see `open`."""
        if not (self.folder / TOKENIZER).is_file():
            raise ValueError(f"{self.folder / TOKENIZER}: missing; {_DAMAGED}")
        for source in self.sources:
            for records in (source.train, source.heldout):
                _check(records, verify=verify)
        if verify:
            self.tokenizer()


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a prepared corpus.

    Raises:
      ValueError: there is none, it is not JSON, or of another version.
    """
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: no {INDEX}; python -m v3jax.data.prepare writes one") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); {_DAMAGED}") from None
    version = index.get("format") if isinstance(index, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"{file}: format {version}, this version reads {FORMAT}; prepare the corpus anew"
        )
    return index


def _source(folder: Path, about: Mapping[str, Any]) -> ShardSource:
    def records(side: Side) -> Records:
        part = about[side]
        return Records(
            folder=folder,
            source=about["name"],
            side=side,
            shards=tuple(Shard(**shard) for shard in part["shards"]),
            text_bytes=part["text_bytes"],
            lengths_file=part["lengths"]["file"],
            lengths_sha256=part["lengths"]["sha256"],
        )

    return ShardSource(
        name=about["name"],
        kind=about["kind"],
        weight=about["weight"],
        train=records("train"),
        heldout=records("heldout"),
    )


def _check(records: Records, *, verify: bool) -> None:
    from array_record.python.array_record_module import ArrayRecordReader

    for shard in records.shards:
        file = records.folder / shard.file
        _check_file(file, shard.bytes, shard.sha256 if verify else None)
        try:
            n_records = ArrayRecordReader(str(file)).num_records()
        except (RuntimeError, ValueError) as error:
            said = str(error).split("\n")[0][:200]
            raise ValueError(f"{file}: no ArrayRecord file ({said}); {_DAMAGED}") from None
        if n_records != shard.records:
            raise ValueError(
                f"{file}: {n_records} records where {INDEX} says {shard.records}; {_DAMAGED}"
            )
    lengths = records.folder / records.lengths_file
    _check_file(lengths, None, records.lengths_sha256)
    if len(records.lengths_N) != len(records):
        raise ValueError(
            f"{lengths}: {len(records.lengths_N)} lengths of {len(records)} records; {_DAMAGED}"
        )


def _check_file(file: Path, size: int | None, sha256: str | None) -> None:
    if not file.is_file():
        raise ValueError(f"{file}: missing; {_DAMAGED}")
    if size is not None and file.stat().st_size != size:
        raise ValueError(
            f"{file}: {file.stat().st_size} bytes where {INDEX} says {size}; {_DAMAGED}"
        )
    if sha256 is not None and file_sha256(file) != sha256:
        raise ValueError(f"{file}: its SHA-256 is not that of {INDEX}; {_DAMAGED}")
