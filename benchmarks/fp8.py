"""What FP8 costs where it is emulated, and what its kernels ask of Hopper.

    python -m benchmarks.fp8                               # linear maps on this CPU
    python -m benchmarks.fp8 --cuda-python=PYTHON --tables=roofline

The first table is the time of a linear map forward and backward, over that of the same in BF16
taken in the same run. The second is of the products that DeepSeek-V3 has in a layer, each with the
quantisation of its input, for rows of 4096 tokens: FLOPs by the tensor-core instructions of the
compiled kernel and the tiles that it walks over, bytes by the tiles that it loads and stores, with
an L2 cache that keeps nothing and with one that keeps everything, and the least time that an H100
SXM needs by its peaks. No GPU is used. PYTHON has the package and its extra `gpu-aot`.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.kept import keep, kept, markdown
from v3jax.aot import process, targets
from v3jax.config import Fp8Config
from v3jax.host import reuse_freed_memory
from v3jax.kernels.fp8_gpu import BLOCK
from v3jax.ops.fp8 import linear

_TABLES = flags.DEFINE_list("tables", ["linear"], "Tables: linear, roofline, readme.")
_CUDA = flags.DEFINE_string("cuda-python", sys.executable, "Python of one with extra gpu-aot.")
SIZES = ((1024, 1024, 1024), (2048, 512, 1536), (4096, 512, 512), (512, 256, 256))
"""Rows, inputs and outputs of the maps that are timed."""
SHAPES = (
    ("q_a and kv_a", 2112, 7168),
    ("q_b", 24576, 1536),
    ("kv_b", 32768, 512),
    ("o", 7168, 16384),
    ("an expert's gate and up", 4096, 7168),
    ("an expert's down", 7168, 2048),
)
"""Names, outputs and inputs."""
N_ROWS = 4096
_H100 = targets.parse("gpu:h100:1x1").chip
PEAK_FLOPS, PEAK_BYTES = _H100.peak_flops * _H100.fp8_speedup, _H100.memory_speed
"""Of FP8, and of main memory."""


# ---- Emulated


def print_linear() -> list[dict[str, Any]]:
    """Times of linear maps forward and backward, with memory as `v3jax.train` has it."""
    reuse_freed_memory()
    print(f"{'rows, inputs, outputs':>24s} {'bf16':>9s} {'fp8':>9s} {'ratio':>7s}")
    found = []
    for rows, inner, outer in SIZES:
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((rows, inner)), jnp.bfloat16)
        w = jnp.asarray(rng.standard_normal((inner, outer)) * 0.02, jnp.float32)
        dy = jnp.asarray(rng.standard_normal((rows, outer)), jnp.bfloat16)
        how = linear.recipe(Fp8Config())
        maps: list[Callable[..., Any]] = [
            lambda x, w: x @ w.astype(jnp.bfloat16),
            lambda x, w, how=how: linear.linear(x, w, how),
        ]
        bf16, fp8 = _seconds([_both_ways(f) for f in maps], (x, w, dy))
        size = f"{rows}, {inner}, {outer}"
        found.append({"size": size, "bf16_ms": bf16 * 1e3, "fp8_ms": fp8 * 1e3})
        print(f"{size:>24s} {bf16 * 1e3:6.1f} ms {fp8 * 1e3:6.1f} ms {fp8 / bf16:7.2f}", flush=True)
    return found


def _both_ways(f: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(f, x, w)
        return y, *pull(dy)

    return jax.jit(run)


def _seconds(functions: Sequence[Callable[..., Any]], arguments: Any) -> list[float]:
    """The least time of each, taken in turns."""
    for f in functions:
        jax.block_until_ready(f(*arguments))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(20):
        for f, mine in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(f(*arguments))
            mine.append(time.perf_counter() - start)
    return [min(mine) for mine in times]


# ---- On Hopper


def print_roofline() -> list[dict[str, Any]]:
    """Work of the six products and of their inputs' quantisation."""
    compiled = {
        name: process.run(
            ["-m", "v3jax.aot.sass", name], "gpu:h100", python=_CUDA.value, timeout=300
        )
        for name in ("gemm_nt", "rows")
    }
    per_step = _flops_a_step(compiled["gemm_nt"])
    found = []
    for name, outer, inner in SHAPES:
        found.append({"name": name, "n": outer, "k": inner} | _work(outer, inner, per_step))
        print(found[-1], flush=True)
    return found


def _flops_a_step(kernel: dict[str, Any]) -> float:
    """Of both warpgroups over 128 elements of the contraction: the loop has each instruction once,
    and every one says what it multiplies, such as QGMMA.64x128x32."""
    (operation,) = {op.split(".")[1] for op in kernel["matrix_operations"]}
    m, n, k = (int(part) for part in operation.split("x"))
    return 2.0 * m * n * k * kernel["operations"]["QGMMA"] * 2


def _work(outer: int, inner: int, per_step: float) -> dict[str, float]:
    """FLOPs, bytes and least seconds of one product and the quantisation of its input."""
    m, n, k = N_ROWS // BLOCK, -(-outer // BLOCK), inner // BLOCK
    flops = m * n * k * per_step
    tile, scale = BLOCK * BLOCK, 4 * BLOCK
    loaded = m * n * k * (2 * tile + scale + 4)
    once = m * k * (tile + scale) + n * k * (tile + 4)
    stored = m * n * 2 * tile
    quantised = N_ROWS * inner * 3 + N_ROWS * k * 4
    least = max(flops / PEAK_FLOPS, (once + stored) / PEAK_BYTES)
    return {
        "flops": flops,
        "useful": 2.0 * N_ROWS * outer * inner / flops,
        "bytes_from_l2": loaded + stored,
        "bytes_at_least": once + stored,
        "quantise_bytes": quantised,
        "least_us": least * 1e6,
        "quantise_us": quantised / PEAK_BYTES * 1e6,
        "bf16_us": max(
            2.0 * N_ROWS * outer * inner / _H100.peak_flops,
            2 * (N_ROWS * inner + outer * inner + N_ROWS * outer) / PEAK_BYTES,
        )
        * 1e6,
    }


# ---- The README's tables


def print_readme() -> None:
    """The kept figures as Markdown."""
    rows = [
        [r["size"], f"{r['bf16_ms']:.1f} ms", f"{r['fp8_ms'] / r['bf16_ms']:.2f}"]
        for r in kept("fp8_linear")["rows"]
    ]
    print(markdown(["rows, inputs, outputs", "BF16", "FP8 over it"], rows))
    print()
    rows = [
        [
            f"{r['name']}: {r['n']} x {r['k']}",
            f"{r['flops'] / 1e9:.0f} GFLOP",
            f"{r['useful']:.1%}",
            f"{r['bytes_from_l2'] / 1e6:,.0f} / {r['bytes_at_least'] / 1e6:,.0f} MB",
            f"{r['least_us']:.0f} us",
            f"{r['quantise_us']:.0f} us",
            f"{r['bf16_us']:.0f} us",
        ]
        for r in kept("fp8_roofline")["rows"]
    ]
    head = ["product of 4096 rows", "work", "useful", "moved: by tiles / at least"]
    print(markdown([*head, "at peak", "quantising x", "BF16 at peak"], rows))


def main(argv: list[str]) -> None:
    del argv
    if "linear" in _TABLES.value:
        keep("fp8_linear", "python -m benchmarks.fp8", {"rows": print_linear()})
    if "roofline" in _TABLES.value:
        command = "python -m benchmarks.fp8 --cuda-python=PYTHON --tables=roofline"
        keep("fp8_roofline", command, {"rows": print_roofline()})
    if "readme" in _TABLES.value:
        print_readme()


if __name__ == "__main__":
    app.run(main)
