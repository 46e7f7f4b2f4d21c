"""Public checkpoints into the model, streamed in runs of rows.

A reader gives the tensors of a checkpoint as they are stored: `Source` out of a Hugging Face
directory, `converted.Converted` out of a conversion. What a tensor's stored numbers mean, where
they go in our layout and how they go back to a file is the same for both.
"""

import math
import os
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from v3jax.config import ModelConfig
from v3jax.hf import blocks, files, layout
from v3jax.hf import config as hf_config
from v3jax.hf.config import FP8_BLOCK, HFConfig
from v3jax.hf.layout import SCALE_SUFFIX, Tensor
from v3jax.weights import Piece

_RUN_BYTES = 64 * 2**20
"""FP32 bytes of a run of rows."""
_THREADS = min(8, os.cpu_count() or 1)
_EXPONENTS = {  # all of these bits set: NaN or infinity
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    files.DTYPES["BF16"]: (np.uint16, 0x7F80),
    blocks.FP8: (np.uint8, 0x7F),
}


class Reader(Protocol):
    """A checkpoint's tensors as they are stored."""

    @property
    def model(self) -> ModelConfig:
        """As the config says, without MTP modules if the files hold none."""
        ...

    @property
    def config(self) -> HFConfig: ...

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, in the format's order; copies only where the files have them."""
        ...

    def dtype(self, tensor: Tensor) -> np.dtype:
        """The type a tensor is stored in."""
        ...

    def rows(self, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """The tensor in runs of rows, each with the row it begins at (a multiple of 128)."""
        ...

    def scales(self, tensor: Tensor) -> np.ndarray | None:
        """FP32 scales of an FP8 tensor's blocks, else None."""
        ...


@dataclass(frozen=True)
class Source:
    """A Hugging Face directory whose config and headers agree; no data has been read."""

    directory: Path
    config: HFConfig
    model: ModelConfig
    tensors: dict[str, Tensor]
    entries: dict[str, files.Entry]

    def dtype(self, tensor: Tensor) -> np.dtype:
        return self.entries[tensor.name].dtype

    def rows(self, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        for first, last in runs(tensor):
            yield first, files.read(self.entries[tensor.name], slice(first, last))

    def scales(self, tensor: Tensor) -> np.ndarray | None:
        if self.dtype(tensor) != blocks.FP8:
            return None
        return files.read(self.entries[f"{tensor.name}{SCALE_SUFFIX}"])


def open_source(directory: str | Path) -> Source:
    """Reads config and headers and checks that they describe the same, complete model.

    Raises:
      ValueError: a config that is not supported, or a tensor that is missing, unknown or of the
        wrong shape or type; the message names tensor and file.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    config = hf_config.read(directory)
    entries = files.open_directory(directory)
    model = model_of(config, entries)
    tensors = stored_tensors(model, entries)
    for tensor in tensors.values():
        _check_header(directory, config, tensor, entries)
    scales = {f"{t}{SCALE_SUFFIX}" for t in tensors if entries[t].dtype == blocks.FP8}
    for name in sorted(entries.keys() - tensors.keys() - scales):
        raise ValueError(
            f"{entries[name].file}: {name} is no tensor of this model; see config.json"
        )
    return Source(directory, config, model, tensors, entries)


def model_of(config: HFConfig, names: Collection[str]) -> ModelConfig:
    """The config's model, without MTP modules if no tensor is named for them.

    Hugging Face's own classes save checkpoints whose config counts modules that are not there.
    """
    model = config.model
    first_mtp = f"model.layers.{model.n_layers}."
    if model.mtp_depth and not any(name.startswith(first_mtp) for name in names):
        return replace(model, mtp_depth=0)
    return model


def stored_tensors(model: ModelConfig, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint that may leave out copies: those that are not in `names`."""
    return {
        name: tensor
        for name, tensor in layout.tensors(model).items()
        if tensor.copy_of is None or name in names
    }


def _check_header(
    directory: Path, config: HFConfig, tensor: Tensor, entries: dict[str, files.Entry]
) -> None:
    entry = entries.get(tensor.name)
    if entry is None:
        raise ValueError(f"{directory}: {tensor.name} is in no file; the checkpoint is incomplete")
    if entry.shape != tensor.shape:
        raise ValueError(
            f"{entry.file}: {tensor.name} is {list(entry.shape)}, config.json gives "
            f"{list(tensor.shape)}"
        )
    if entry.dtype != blocks.FP8:
        return
    if not tensor.linear:
        raise ValueError(f"{entry.file}: {tensor.name} is FP8, which only linear weights may be")
    if not config.fp8:
        raise ValueError(
            f"{entry.file}: {tensor.name} is FP8, but config.json has no quantization_config"
        )
    name = f"{tensor.name}{SCALE_SUFFIX}"
    scale = entries.get(name)
    if scale is None:
        raise ValueError(f"{entry.file}: {name}, the scales of FP8 weights, is in no file")
    wanted = blocks.scale_shape(tensor.shape)
    if scale.shape != wanted or scale.dtype != np.float32:
        raise ValueError(
            f"{scale.file}: {name} is {scale.dtype}{list(scale.shape)}, not float32{list(wanted)}"
        )


def runs(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Runs of rows `(first, last)` of at most 64 MiB in FP32; bounds are whole FP8 blocks."""
    row_bytes = 4 * math.prod(tensor.shape[1:])
    step = max(_RUN_BYTES // row_bytes // FP8_BLOCK, 1) * FP8_BLOCK
    for first in range(0, tensor.shape[0], step):
        yield first, min(first + step, tensor.shape[0])


def check(source: Source) -> None:
    """Reads every number once, keeping none.

    Raises:
      ValueError: NaN, infinity, a scale that is not positive, or a copy that differs from what it
        repeats; the message names tensor and file.
    """
    for tensor in source.tensors.values():
        check_scales(source, tensor)
        for _, stored in source.rows(tensor):
            check_finite(source, tensor, stored)
    check_copies(source)


def check_finite(source: Source, tensor: Tensor, stored: np.ndarray) -> None:
    """Raises ValueError if rows of a tensor hold NaN or infinity."""
    unsigned, mask = _EXPONENTS[stored.dtype]
    if ((stored.view(unsigned) & unsigned(mask)) == mask).any():
        file = source.entries[tensor.name].file
        raise ValueError(f"{file}: {tensor.name} holds NaN or infinity; get the file again")


def check_scales(source: Source, tensor: Tensor) -> None:
    """Raises ValueError if a tensor's scales are not positive and finite."""
    scales = source.scales(tensor)
    if scales is not None and not (np.isfinite(scales) & (scales > 0)).all():
        name = f"{tensor.name}{SCALE_SUFFIX}"
        raise ValueError(f"{source.entries[name].file}: {name} is not positive and finite")


def check_copies(source: Source) -> None:
    """Raises ValueError if a copy differs from what it repeats."""
    for tensor in source.tensors.values():
        if tensor.copy_of is None:
            continue
        pairs = zip(source.rows(tensor), source.rows(source.tensors[tensor.copy_of]), strict=True)
        if not all(np.array_equal(copy, original) for (_, copy), (_, original) in pairs):
            file = source.entries[tensor.name].file
            raise ValueError(
                f"{file}: {tensor.name} differs from {tensor.copy_of}, which it repeats"
            )


def values_of(stored: np.ndarray, scales: np.ndarray | None, first: int) -> np.ndarray:
    """The FP32 numbers that stored rows from `first` on stand for."""
    if scales is None:
        return stored.astype(np.float32, copy=False)
    last = first + stored.shape[0]
    return blocks.dequantize(stored, scales[first // FP8_BLOCK : -(-last // FP8_BLOCK)])


def pieces(reader: Reader) -> Iterator[Piece]:
    """Every weight once, in the format's order; copies are left out.

    Rows are read in turn and made FP32 in our orientation by a few threads ahead of the caller.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        ahead: deque[Future[Piece]] = deque()
        for tensor in reader.tensors.values():
            if tensor.copy_of is not None:
                continue
            scales = reader.scales(tensor)
            for first, stored in reader.rows(tensor):
                if len(ahead) >= _THREADS:
                    yield ahead.popleft().result()
                ahead.append(pool.submit(_piece, tensor, first, stored, scales))
        while ahead:
            yield ahead.popleft().result()


def _piece(tensor: Tensor, row: int, stored: np.ndarray, scales: np.ndarray | None) -> Piece:
    """Stored rows of a tensor of the format as a piece of our array."""
    values = values_of(stored, scales, row)
    inner = [row] + [0] * (values.ndim - 1)
    if tensor.transposed:
        values, inner = np.ascontiguousarray(values.T), inner[::-1]
    if tensor.half:
        inner[-1] += tensor.shape[0]
    lead = len(tensor.index)
    return Piece(tensor.leaf, (*tensor.index, *inner), values.reshape((1,) * lead + values.shape))


def rows_of(tensor: Tensor, array: Any) -> np.ndarray:
    """A tensor of the format out of our array, in the array's type."""
    values = np.asarray(array[tensor.index] if tensor.index else array)
    if tensor.half is not None:
        width = tensor.shape[0]
        values = values[..., tensor.half * width : (tensor.half + 1) * width]
    return values.T if tensor.transposed else values
