"""The machines a step can be compiled for: what one device holds, computes, reads and sends.

A target is written `tpu:v5p:8x8x8` (a chip and its torus) or `gpu:h100:256x8` (hosts x GPUs).
"""

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator; every figure is for one device as JAX counts them."""

    kind: Literal["tpu", "gpu"]
    name: str
    dims: int
    """Numbers of a topology."""
    example: str
    devices_per_chip: int = 1
    memory_bytes: int
    """What a program may use."""
    peak_flops: float
    """BF16 FLOP/s without sparsity."""
    fp8_speedup: float = 1.0
    """FP8 FLOP/s over those."""
    memory_speed: float
    """Bytes/s of the main memory."""
    link_speed: float
    """Bytes/s that a device sends one way: on one ICI link, or to the GPUs of its own host."""
    outer_speed: float = 0.0
    """Bytes/s that a GPU sends to other hosts."""


# Peaks, memories and links are the vendors' data sheets: Google Cloud's pages on TPU v5p, v6e and
# TPU7x, NVIDIA's H100 SXM. What a program may use of a TPU's memory is what XLA names as its
# limit when a program does not fit. A v5p chip has 6 ICI links, a v6e 4, a TPU7x 6, each of
# 100 GB/s one way by the data sheet, of which about 90 are reached; two devices share a TPU7x chip.
CHIPS = (
    Chip(
        kind="tpu",
        name="v5p",
        dims=3,
        example="8x8x8",
        memory_bytes=int(95.74 * GIB),
        peak_flops=459e12,
        memory_speed=2.765e12,
        link_speed=90e9,
    ),
    Chip(
        kind="tpu",
        name="v6e",
        dims=2,
        example="16x16",
        memory_bytes=int(31.25 * GIB),
        peak_flops=918e12,
        memory_speed=1.638e12,
        link_speed=90e9,
    ),
    Chip(
        kind="tpu",
        name="tpu7x",
        dims=3,
        example="4x8x8",
        devices_per_chip=2,
        memory_bytes=int(94.75 * GIB),
        peak_flops=2307e12 / 2,
        fp8_speedup=2.0,
        memory_speed=7.38e12 / 2,
        link_speed=90e9 / 2,
    ),
    Chip(
        kind="gpu",
        name="h100",
        dims=2,
        example="256x8",
        memory_bytes=int(79.1 * GIB),
        peak_flops=989e12,
        fp8_speedup=2.0,
        memory_speed=3.35e12,
        link_speed=450e9,
        outer_speed=50e9,
    ),
)

PACKAGES = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}
EXTRAS = {"tpu": "tpu", "gpu": "cuda"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """So many devices of one kind, in one network."""

    chip: Chip
    topology: tuple[int, ...]
    """The torus in chips, or hosts and GPUs of a host."""

    @property
    def n_devices(self) -> int:
        return math.prod(self.topology) * self.chip.devices_per_chip

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.topology))

    @property
    def platform(self) -> str:
        """What JAX lowers for."""
        return "cuda" if self.chip.kind == "gpu" else "tpu"

    def __str__(self) -> str:
        return f"{self.chip.kind}:{self.chip.name}:{self.shape}"


def parse(text: str) -> Target:
    """The target that `kind:chip:topology` names.

    Raises:
      ValueError: an unknown kind or chip, or a topology that is not the chip's.
    """
    kind, _, rest = text.partition(":")
    name, _, shape = rest.partition(":")
    chip = next((c for c in CHIPS if (c.kind, c.name) == (kind, name)), None)
    if chip is None:
        known = [f"{c.kind}:{c.name}" for c in CHIPS]
        given = f"{kind}:{name}" if rest else kind
        close = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
        nearest = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"--target={text}: no {given}; {nearest}there are {', '.join(known)}")
    sizes = shape.split("x")
    if len(sizes) != chip.dims or not all(re.fullmatch(r"[1-9]\d*", size) for size in sizes):
        wanted = "hosts x GPUs" if kind == "gpu" else f"{chip.dims} sizes of its torus"
        raise ValueError(
            f"--target={text}: {name} takes {wanted}, as in {kind}:{name}:{chip.example}"
        )
    return Target(chip=chip, topology=tuple(map(int, sizes)))
