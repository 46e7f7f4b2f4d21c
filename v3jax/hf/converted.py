"""A public checkpoint as orbax parts, written a piece at a time and resumable.

    <directory>/weights.json          written last: it alone makes the conversion complete
    <directory>/source.json           what is being converted; a resumed conversion must match it
    <directory>/parts/<n>/            some runs of rows, by orbax; <n>.json holds their digests
    <directory>/hf/                   tokenizer and other files of the source, as they were

Tensors keep the types they came in, FP8 with its scales, so a conversion is as large as its source
and goes back to the same bits. A part holds some 256 MiB, so neither side is ever in memory as a
whole.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from v3jax.checkpoint import write_whole
from v3jax.config import ModelConfig
from v3jax.hf import blocks, files, read
from v3jax.hf import config as hf_config
from v3jax.hf.config import HFConfig
from v3jax.hf.layout import SCALE_SUFFIX, Tensor

FORMAT = 1
MANIFEST, SOURCE, BESIDE = "weights.json", "source.json", "hf"
CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files of a public checkpoint that go with its weights as they are."""
_PART_BYTES = 256 * 2**20


@dataclass(frozen=True)
class _Run:
    """Some rows of a tensor."""

    tensor: Tensor
    first: int
    last: int


def _parts(tensors: dict[str, Tensor], dtypes: dict[str, str]) -> Iterator[list[_Run]]:
    """The tensors cut into parts: small ones together, large ones in runs of rows."""
    part: list[_Run] = []
    room = _PART_BYTES
    for tensor in tensors.values():
        if tensor.copy_of is not None:
            continue
        row_bytes = files.DTYPES[dtypes[tensor.name]].itemsize
        for n in tensor.shape[1:]:
            row_bytes *= n
        for first, last in read.runs(tensor):
            size = (last - first) * row_bytes
            if part and size > room:
                yield part
                part, room = [], _PART_BYTES
            part.append(_Run(tensor, first, last))
            room -= size
    if part:
        yield part


def write(
    source: read.Source, directory: Path, *, report: Callable[[int, int], None] | None = None
) -> None:
    """Converts a checked source, going on where an interrupted conversion of it stopped.

    `report` is called with the parts done and all of them.

    Raises:
      ValueError: the directory holds something else, or the source has NaN, infinity, a bad scale
        or a copy that differs.
    """
    directory = directory.absolute()  # as orbax wants it
    described = _describe(source)
    if (directory / MANIFEST).exists():
        raise ValueError(f"{directory}: already holds a finished conversion; choose another one")
    if (directory / SOURCE).exists():
        if _read_json(directory / SOURCE) != described:
            raise ValueError(
                f"{directory}: holds part of another conversion; remove it or choose another one"
            )
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: already there; choose another directory")
    read.check_copies(source)
    (directory / "parts").mkdir(parents=True, exist_ok=True)
    (directory / BESIDE).mkdir(exist_ok=True)
    write_whole(epath.Path(directory / SOURCE), json.dumps(described))
    for name in CARRIED:
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, directory / BESIDE / name)
    parts = list(_parts(source.tensors, described["dtypes"]))
    for number, part in enumerate(parts):
        if not (directory / "parts" / f"{number}.json").exists():
            _write_part(directory / "parts", number, _part_arrays(source, part))
        if report is not None:
            report(number + 1, len(parts))
    manifest = {"format": FORMAT, "parts": len(parts)} | described
    write_whole(epath.Path(directory / MANIFEST), json.dumps(manifest))


def _describe(source: read.Source) -> dict[str, Any]:
    headers = {
        name: (entry.file.name, str(entry.dtype), list(entry.shape), entry.offset)
        for name, entry in source.entries.items()
    }
    digest = hashlib.sha256(json.dumps(headers, sort_keys=True).encode()).hexdigest()
    dtypes = {name: files.NAMES[source.dtype(tensor)] for name, tensor in source.tensors.items()}
    return {"config": source.config.raw, "dtypes": dtypes, "headers": digest}


def _part_arrays(source: read.Source, part: list[_Run]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for run in part:
        entry = source.entries[run.tensor.name]
        stored = files.read(entry, slice(run.first, run.last))
        read.check_finite(source, run.tensor, stored)
        arrays[f"{run.tensor.name}:{run.first}"] = stored
        scales = source.scales(run.tensor) if run.first == 0 else None
        if scales is not None:
            read.check_scales(source, run.tensor)
            arrays[f"{run.tensor.name}{SCALE_SUFFIX}:0"] = scales
    return arrays


def _write_part(folder: Path, number: int, arrays: dict[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    part = folder / str(number)
    shutil.rmtree(part, ignore_errors=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(part, args=ocp.args.PyTreeSave(arrays))
    digests = {
        name: {"shape": list(a.shape), "dtype": str(a.dtype), "sha256": _digest(a)}
        for name, a in arrays.items()
    }
    write_whole(epath.Path(folder / f"{number}.json"), json.dumps(digests))


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged ({error}); convert again") from None


@dataclass(frozen=True)
class Converted:
    """A finished conversion, a reader of the checkpoint it was made from."""

    directory: Path
    config: HFConfig
    model: ModelConfig
    tensors: dict[str, Tensor]
    dtypes: dict[str, str]
    """The safetensors type of every tensor."""
    places: dict[str, list[tuple[int, int]]]
    """The runs of each tensor: part and first row."""
    _opened: dict[int, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)

    def dtype(self, tensor: Tensor) -> np.dtype:
        return files.DTYPES[self.dtypes[tensor.name]]

    def rows(self, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """As `Reader.rows`.

        Raises:
          ValueError: a part is missing or damaged.
        """
        name = tensor.copy_of or tensor.name
        for part, first in self.places[name]:
            yield first, self._part(part)[f"{name}:{first}"]

    def scales(self, tensor: Tensor) -> np.ndarray | None:
        if self.dtype(tensor) != blocks.FP8:
            return None
        name = tensor.copy_of or tensor.name
        part, _ = self.places[name][0]
        return self._part(part)[f"{name}{SCALE_SUFFIX}:0"]

    def _part(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a part, of which the last one stays in memory."""
        if number not in self._opened:
            self._opened.clear()
            self._opened[number] = _read_part(self.directory / "parts", number)
        return self._opened[number]


def open_converted(directory: Path) -> Converted:
    """A finished conversion, its parts not read yet.

    Raises:
      ValueError: the conversion is unfinished, or its manifest damaged.
    """
    directory = directory.absolute()
    file = directory / MANIFEST
    if not file.exists():
        raise ValueError(
            f"{directory}: an unfinished conversion; run the same v3jax.convert from-hf again"
        )
    manifest = _read_json(file)
    try:
        version, n_parts = manifest["format"], manifest["parts"]
        config, dtypes = hf_config.parse(manifest["config"]), manifest["dtypes"]
        model = read.model_of(config, dtypes)
        tensors = read.stored_tensors(model, dtypes)
        parts = list(_parts(tensors, dtypes))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: damaged ({error}); convert again") from None
    if version != FORMAT:
        raise ValueError(
            f"{directory}: conversion format {version}, this version reads {FORMAT}; convert again"
        )
    if n_parts != len(parts):
        raise ValueError(f"{file}: damaged ({n_parts} parts, not {len(parts)}); convert again")
    places: dict[str, list[tuple[int, int]]] = {}
    for number, part in enumerate(parts):
        for run in part:
            places.setdefault(run.tensor.name, []).append((number, run.first))
    return Converted(directory, config, model, tensors, dtypes, places)


def _read_part(folder: Path, number: int) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    part = folder / str(number)
    digests = _read_json(folder / f"{number}.json")
    try:
        like = {k: np.empty(d["shape"], np.dtype(d["dtype"])) for k, d in digests.items()}
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in digests}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            args = ocp.args.PyTreeRestore(like, restore_args=as_numpy)
            arrays = checkpointer.restore(part, args=args)
        whole = all(_digest(arrays[name]) == d["sha256"] for name, d in digests.items())
    except Exception as error:  # orbax raises many kinds for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{part}: damaged ({reason}); convert again") from None
    if not whole:
        raise ValueError(f"{part}: an array does not match its digest; convert again")
    return {name: arrays[name] for name in digests}
