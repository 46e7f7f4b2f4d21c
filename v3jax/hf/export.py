"""Weights as a public checkpoint: sharded safetensors, index, config, tokenizer files."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from v3jax.config import ModelConfig
from v3jax.hf import blocks, files, layout, read
from v3jax.hf.config import FP8_BLOCK
from v3jax.hf.files import DTYPES, Planned
from v3jax.hf.layout import SCALE_SUFFIX, Tensor
from v3jax.weights import names

KINDS = ("bf16", "fp32", "fp8")
Stored = Callable[[Tensor, np.dtype], tuple[np.ndarray, ...]]
"""Gives a tensor in a type, as it is to be stored: its numbers and, for FP8, its scales."""


def kind_of(tensor: Tensor, kind: str) -> str:
    """The safetensors type of a tensor in a checkpoint of `kind`; the release is `fp8`."""
    if tensor.bias or kind == "fp32":
        return "F32"
    return "F8_E4M3" if kind == "fp8" and tensor.linear else "BF16"


def plan(model: ModelConfig, kinds: str | Mapping[str, str]) -> list[tuple[Tensor, list[Planned]]]:
    """What is written for each tensor: itself and, if FP8, its scales.

    Args:
      kinds: one of `KINDS`, or the safetensors type of each tensor by name; a copy that is not
        named is not written.
    """
    planned = []
    for tensor in layout.tensors(model).values():
        if isinstance(kinds, str):
            dtype = DTYPES[kind_of(tensor, kinds)]
        elif tensor.name in kinds:
            dtype = DTYPES[kinds[tensor.name]]
        elif tensor.copy_of is not None:
            continue
        else:
            raise ValueError(f"export: no type is given for {tensor.name}")
        parts = [Planned(tensor.name, dtype, tensor.shape)]
        if dtype == blocks.FP8:
            scale = f"{tensor.name}{SCALE_SUFFIX}"
            parts.append(Planned(scale, np.dtype(np.float32), blocks.scale_shape(tensor.shape)))
        planned.append((tensor, parts))
    return planned


def from_variables(params: Any, router_state: Any) -> Stored:
    """Tensors out of a model's variables."""
    arrays = names({"params": params, "router_state": router_state})

    def stored(tensor: Tensor, dtype: np.dtype) -> tuple[np.ndarray, ...]:
        values = read.rows_of(tensor, arrays[tensor.leaf])
        if not np.isfinite(values).all():
            raise ValueError(f"{tensor.name}: the model holds NaN or infinity; it is not written")
        if dtype == blocks.FP8:
            return blocks.quantize(values)
        return (values.astype(dtype),)

    return stored


def from_reader(reader: read.Reader) -> Stored:
    """Tensors out of another checkpoint; one that keeps its type keeps its bits."""

    def stored(tensor: Tensor, dtype: np.dtype) -> tuple[np.ndarray, ...]:
        # A copy that the other checkpoint left out is what it repeats.
        of = reader.tensors[tensor.name if tensor.name in reader.tensors else str(tensor.copy_of)]
        known = reader.scales(of)
        same = reader.dtype(of) == dtype
        array = np.empty(tensor.shape, dtype)
        scales = np.empty(blocks.scale_shape(tensor.shape), np.float32)
        for first, rows in reader.rows(of):
            last = first + len(rows)
            if same:
                array[first:last] = rows
                continue
            values = read.values_of(rows, known, first)
            if dtype != blocks.FP8:
                array[first:last] = values.astype(dtype)
                continue
            at = slice(first // FP8_BLOCK, -(-last // FP8_BLOCK))
            array[first:last], scales[at] = blocks.quantize(values)
        if dtype != blocks.FP8:
            return (array,)
        return array, known if same and known is not None else scales

    return stored


def write(
    directory: Path,
    model: ModelConfig,
    kinds: str | Mapping[str, str],
    stored: Stored,
    *,
    config: dict[str, Any],
    beside: Mapping[str, str],
    shard_bytes: float = 5e9,
) -> list[str]:
    """Writes a checkpoint directory, whole or not at all; returns its shards' names.

    Args:
      stored: called once for each tensor, in the format's order.
      config: what `config.json` holds (`hf.config.render`).
      beside: further files by name, such as `tokenizer.json`.
      shard_bytes: the most tensor data a file holds, unless one tensor is larger.

    Raises:
      ValueError: the directory holds something.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: already there; choose another directory")
    planned = plan(model, kinds)
    shards = files.shards([p for _, parts in planned for p in parts], shard_bytes)
    arrays = _arrays(planned, stored)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for name, group in shards:
            files.write_shard(partial / name, group, arrays)
        files.write_index(partial, shards)
        for name, text in (("config.json", json.dumps(config, indent=2) + "\n"), *beside.items()):
            (partial / name).write_text(text, encoding="utf-8")
        partial.chmod(0o755)
        partial.replace(directory)  # takes the place of an empty directory
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [name for name, _ in shards]


def _arrays(planned: list[tuple[Tensor, list[Planned]]], stored: Stored) -> Iterator[np.ndarray]:
    for tensor, parts in planned:
        yield from stored(tensor, parts[0].dtype)
