"""The files of a public checkpoint: safetensors, read by header and never unpickled.

The headers of all files are checked before a byte of data is read, so whatever is wrong with one
is said at once and costs no memory. Data are then read some rows at a time, so a checkpoint may be
far larger than memory. They are read, not mapped: the pages of a mapping count as the process's
memory for as long as it lives, and a file that shrinks meanwhile kills the process instead of
raising an error.
"""

import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 32 * 2**20
"""Bytes of a header or index; twice what the release, 91,991 tensors, would need in one file."""
MAX_AXES = 8

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_SHORT = reprlib.Repr(maxstring=200, maxlong=200, maxother=200)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `offset` counts bytes from the start of the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def open_directory(directory: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint directory, by name.

    Raises:
      ValueError: no safetensors there, a file missing, outside the directory or damaged, or an
        index that its files do not bear out.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    try:
        return _open_directory(directory)
    except OSError as error:
        raise ValueError(f"{directory}: cannot be read ({error})") from None


def _open_directory(directory: Path) -> dict[str, Entry]:
    weight_map = _weight_map(directory)
    holds = {SINGLE: "the weights"}
    if weight_map is not None:
        holds = {name: shown(tensor) for tensor, name in weight_map.items()}
    files = [inside(directory, name, holds[name]) for name in sorted(holds)]
    entries: dict[str, Entry] = {}
    for file in files:
        for tensor, entry in _read_header(file).items():
            place = file.name if weight_map is None else weight_map.get(tensor)
            if place != file.name:
                raise ValueError(
                    f"{file}: holds {tensor}, which {INDEX} puts into {place or 'no file'}"
                )
            entries[tensor] = entry
    for tensor, name in (weight_map or {}).items():
        if tensor not in entries:
            raise ValueError(f"{directory / name}: lacks {shown(tensor)}, which {INDEX} puts there")
    return entries


def _weight_map(directory: Path) -> dict[str, str] | None:
    """The file of each tensor according to the index; None if there is but the one file."""
    single = os.path.lexists(directory / SINGLE)
    if not os.path.lexists(directory / INDEX):
        if single:
            return None
        for file in sorted(directory.iterdir()):
            if file.suffix in _PICKLED:
                raise ValueError(
                    f"{file}: pickled weights are never read; convert them to safetensors first"
                )
        raise ValueError(f"{directory}: neither {INDEX} nor {SINGLE} is there")
    index = inside(directory, INDEX, "the index")
    raw = read_json(index, MAX_HEADER)
    found = raw.get("weight_map") if isinstance(raw, dict) else None
    if not found or not isinstance(found, dict):
        raise ValueError(f"{index}: no index of a checkpoint, which has a weight_map")
    for tensor, name in found.items():
        if not isinstance(name, str) or not _is_shard(name):
            raise ValueError(
                f"{index}: {shown(tensor)} is in {shown(name)}, which is no .safetensors file of "
                "this directory; no other is ever read"
            )
    if single and SINGLE not in found.values():
        raise ValueError(f"{directory}: holds {SINGLE} and another {INDEX}; remove one of them")
    return found


def _is_shard(name: str) -> bool:
    plain = name == Path(name).name and "\\" not in name and name.isprintable()
    return plain and name.endswith(".safetensors")


def inside(directory: Path, name: str, holds: str) -> Path:
    """The file `name` of the directory and of no other place; `holds` says what it is needed for.

    Raises:
      ValueError: there is no such file, or it is a link elsewhere.
    """
    file = directory / name
    if not os.path.lexists(file):
        raise ValueError(f"{file}: this file, with {holds}, is missing; download it")
    if os.path.dirname(os.path.realpath(file)) != os.path.realpath(directory):
        raise ValueError(
            f"{file}: this file, with {holds}, is a link out of the directory; put the file "
            "itself there, as hf download --local-dir does"
        )
    if not file.is_file():
        raise ValueError(f"{file}: not a file")
    return file


def read_json(file: Path, limit: int) -> Any:
    """A JSON file of at most `limit` bytes.

    Raises:
      ValueError: it is longer, or no JSON, or names a field twice.
    """
    size = file.stat().st_size
    if size > limit:
        raise ValueError(f"{file}: {size} bytes, longer than the {limit} that are allowed")
    return _parse_json(file, file.read_bytes())


def _parse_json(file: Path, text: bytes) -> Any:
    """JSON as the standard has it, which knows no NaN; a field that comes twice is refused."""
    try:
        return json.loads(
            text.decode(), object_pairs_hook=_distinct, parse_constant=_no_such_constant
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON ({str(error)[:200]}); the file is damaged") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(twice)} is there twice")
    return fields


def _no_such_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def shown(value: Any) -> str:
    """Any decoded JSON on one short line, for a message."""
    return _SHORT.repr(value)


def _read_header(file: Path) -> dict[str, Entry]:
    with file.open("rb") as content:
        size = os.fstat(content.fileno()).st_size
        start, header = _header(file, content, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{file}: __metadata__ is no object of strings; the file is damaged")
    entries = {name: _entry(file, name, info, start) for name, info in header.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        if entry.offset != end:
            raise ValueError(
                f"{file}: {name} begins at byte {entry.offset}, what comes before it ends at "
                f"{end}; the file is damaged"
            )
        end += entry.n_bytes
    if end != size:
        raise ValueError(
            f"{file}: {size} bytes instead of {end}; the file is truncated or damaged, "
            "download it again"
        )
    return entries


def _header(file: Path, content: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and the decoded header."""
    length = int.from_bytes(content.read(8), "little")
    if size < 8:
        raise ValueError(f"{file}: {size} bytes hold no header; the file is truncated")
    if length > MAX_HEADER:
        raise ValueError(
            f"{file}: a header of {length} bytes, at most {MAX_HEADER} are allowed; "
            "the file is damaged or is no safetensors"
        )
    if length > size - 8:
        raise ValueError(
            f"{file}: a header of {length} bytes in a file of {size}; the file is truncated"
        )
    header = _parse_json(file, content.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{file}: the header is no object; the file is damaged")
    return 8 + length, header


def _entry(file: Path, name: str, info: Any, start: int) -> Entry:
    if not name.isprintable() or len(name) > 200:
        raise ValueError(f"{file}: {shown(name)} is no name of a tensor; the file is damaged")
    if not isinstance(info, dict) or not info.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{file}: {name} lacks dtype, shape or data_offsets in the header; the file is damaged"
        )
    dtype, shape, place = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{file}: {name} is {shown(dtype)}; only {', '.join(DTYPES)} are read")
    if not _are_sizes(shape) or len(shape) > MAX_AXES:
        raise ValueError(f"{file}: {name} has the shape {shown(shape)}; the file is damaged")
    if not _are_sizes(place) or len(place) != 2:
        raise ValueError(f"{file}: {name} has data_offsets {shown(place)}; the file is damaged")
    entry = Entry(file, DTYPES[dtype], tuple(shape), start + place[0])
    if place[1] - place[0] != entry.n_bytes:
        raise ValueError(
            f"{file}: {name} has {place[1] - place[0]} bytes, {dtype}{shape} takes "
            f"{entry.n_bytes}; the file is damaged"
        )
    return entry


def _are_sizes(numbers: Any) -> bool:
    """Whether this is a list of whole numbers that fit 63 bits."""
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def read(entry: Entry, rows: slice = slice(None)) -> np.ndarray:
    """A tensor, or some of its rows (no steps), in memory of its own.

    Raises:
      ValueError: the file cannot be read or ends early.
    """
    shape, offset = entry.shape, entry.offset
    if shape:
        first, last, _ = rows.indices(shape[0])
        shape = (max(last - first, 0), *shape[1:])
        offset += first * math.prod(shape[1:]) * entry.dtype.itemsize
    n_bytes = math.prod(shape) * entry.dtype.itemsize
    try:
        flat = np.fromfile(entry.file, np.uint8, n_bytes, offset=offset)
    except OSError as error:
        raise ValueError(f"{entry.file}: cannot be read ({error})") from None
    if flat.size != n_bytes:
        raise ValueError(f"{entry.file}: ends before its data do; the file changed meanwhile")
    return flat.view(entry.dtype).reshape(shape)


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards(plan: list[Planned], shard_bytes: float) -> list[tuple[str, list[Planned]]]:
    """The plan cut, in its order, into named files of at most `shard_bytes`, or one tensor."""
    groups: list[list[Planned]] = []
    size = 0
    for tensor in plan:
        if not groups or size + tensor.n_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.n_bytes
    if len(groups) == 1:
        return [(SINGLE, groups[0])]
    total = len(groups)
    return [(f"model-{i:05d}-of-{total:05d}.safetensors", g) for i, g in enumerate(groups, start=1)]


def write_shard(file: Path, plan: list[Planned], arrays: Iterator[np.ndarray]) -> None:
    """Writes the planned tensors as they come, one at a time in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in plan:
        place = [at, at + tensor.n_bytes]
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": place,
        }
        at += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in plan:
            array = next(arrays)
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(
                    f"{file}: {tensor.name} came as {array.dtype}{list(array.shape)}, "
                    f"planned was {tensor.dtype}{list(tensor.shape)}"
                )
            np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(out)


def write_index(directory: Path, files: list[tuple[str, list[Planned]]]) -> None:
    """The index of several shards; one file needs none."""
    if len(files) == 1:
        return
    weight_map = {tensor.name: name for name, group in files for tensor in group}
    total = sum(tensor.n_bytes for _, group in files for tensor in group)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
