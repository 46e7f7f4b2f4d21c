"""Times the FP8 kernels on a Hopper GPU, beside cuBLAS in BF16 and the roofline.

    python -m benchmarks.gpu [--rows=4096]

One command, no other program on the card. Every product is of DeepSeek-V3 (`benchmarks.fp8`): the
three FP8 products of a linear map, with and without the quantisation of their operands, beside
XLA's BF16 product of the same sizes; experts' products over 8 experts; each kernel's share of what
the card's data sheet allows. Times are the least of 20, after a first run that compiles.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.fp8 import PEAK_BYTES, PEAK_FLOPS, SHAPES
from v3jax.config import Fp8Config
from v3jax.kernels import fp8_gpu
from v3jax.kernels.grouped_matmul import Blocks
from v3jax.ops.fp8 import gemm, linear

_ROWS = flags.DEFINE_integer("rows", 4096, "Tokens.")
_EXPERTS = 8


def seconds(f: Callable[..., Any], *arguments: Any) -> float:
    """The least time of 20 runs."""
    run = jax.jit(f)
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def line(name: str, taken: float, flops: float, moved: float, beside: float | None = None) -> None:
    """One kernel: time, rate, share of the roofline, speed over BF16."""
    least = max(flops / PEAK_FLOPS, moved / PEAK_BYTES)
    over = "" if beside is None else f"{beside / taken:7.2f}x"
    print(
        f"{name:44s} {taken * 1e6:9.1f} us {flops / taken / 1e12:8.0f} TFLOP/s "
        f"{moved / taken / 1e9:7.0f} GB/s {least / taken:7.1%} {over:>8s}",
        flush=True,
    )


def dense(name: str, outer: int, inner: int) -> None:
    """The products of one linear map."""
    rows, rng = _ROWS.value, np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, inner)), jnp.bfloat16)
    dy = jnp.asarray(rng.standard_normal((rows, outer)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((inner, outer)) * 0.02, jnp.float32)
    cfg = Fp8Config()
    how = linear.recipe(cfg)
    flops = 2.0 * rows * inner * outer
    bf16 = {
        "y": seconds(lambda x, w: x @ w, x, w.astype(jnp.bfloat16)),
        "dx": seconds(lambda dy, w: dy @ w.T, dy, w.astype(jnp.bfloat16)),
        "dw": seconds(
            lambda x, dy: jnp.einsum("ni,no->io", x, dy, preferred_element_type=jnp.float32), x, dy
        ),
    }
    qx, qdy = jax.jit(how.of)(x), jax.jit(how.of_gradient)(dy)
    qw = jax.jit(how.of_weight)(w)
    qwt = jax.tree.map(lambda a: jnp.array(a.T), qw)
    tx, tdy = jax.jit(how.by_tokens)(x, dy)
    moved = {
        "y": rows * inner + inner * outer + 2 * rows * outer,
        "dx": rows * outer + inner * outer + 2 * rows * inner,
        "dw": rows * (inner + outer) + 4 * inner * outer,
    }

    def product(a: Any, b: Any) -> jax.Array:
        return gemm.gemm_nt(a, b, cfg, jnp.bfloat16)

    times = {
        "y": seconds(product, qx, qwt),
        "dx": seconds(product, qdy, qw),
        "dw": seconds(lambda a, b: gemm.k_grouped_nt(a, b, cfg), tx, tdy),
    }
    for of, taken in times.items():
        line(f"{name} {outer} x {inner}: {of}", taken, flops, moved[of], bf16[of])
    line("  quantise x by channels", seconds(how.of, x), 0, 3 * x.size)
    both = seconds(how.by_tokens, x, dy)
    line("  quantise x and dy by tokens", both, 0, 3 * (x.size + dy.size))

    def both_ways(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
            y, pull = jax.vjp(f, x, w)
            return y, *pull(dy)

        return run

    whole = seconds(both_ways(lambda x, w: linear.linear(x, w, how)), x, w, dy)
    other = seconds(both_ways(lambda x, w: x @ w.astype(jnp.bfloat16)), x, w, dy)
    line("  the whole map, forward and backward", whole, 3 * flops, sum(moved.values()), other)


def grouped(name: str, outer: int, inner: int) -> None:
    """The products of experts, each with an equal share of the rows."""
    rows, rng, cfg = _ROWS.value * 2, np.random.default_rng(0), Fp8Config()
    x = jnp.asarray(rng.standard_normal((rows, inner)), jnp.bfloat16)
    dy = jnp.asarray(rng.standard_normal((rows, outer)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((_EXPERTS, inner, outer)) * 0.02, jnp.float32)
    how = linear.recipe(cfg)
    n_blocks = rows // fp8_gpu.BLOCK
    expert_M = jnp.arange(n_blocks, dtype=jnp.int32) * _EXPERTS // n_blocks
    full_M = jnp.full(n_blocks, fp8_gpu.BLOCK, jnp.int32)
    blocks = Blocks(expert_M, full_M, jnp.int32(n_blocks), block=fp8_gpu.BLOCK)
    flops = 2.0 * rows * inner * outer
    weights = _EXPERTS * inner * outer
    qx, qw = jax.jit(how.of)(x), jax.jit(how.of_weight)(w)
    qwt = jax.tree.map(lambda a: jnp.array(a.swapaxes(1, 2)), qw)
    taken = seconds(lambda a, b: gemm.m_grouped_nt(a, b, blocks, cfg, jnp.bfloat16), qx, qwt)
    line(f"{name}, 8 experts: y", taken, flops, rows * inner + weights + 2 * rows * outer)
    tx, tdy = jax.jit(how.by_tokens)(x, dy)
    taken = seconds(lambda a, b: gemm.k_grouped_nt(a, b, cfg, blocks, _EXPERTS), tx, tdy)
    line(f"{name}, 8 experts: dw", taken, flops, rows * (inner + outer) + 4 * weights)


def main(argv: list[str]) -> None:
    del argv
    if not fp8_gpu.runs_here():
        print(
            f"benchmarks.gpu: this is {jax.devices()[0].device_kind}; the kernels are for Hopper "
            "GPUs (H100, H200, H800, H20), install the extra cuda there"
        )
        sys.exit(1)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {_ROWS.value} rows")
    print(f"{'':44s} {'time':>12s} {'rate':>16s} {'memory':>12s} {'roof':>7s} {'over BF16':>9s}")
    for name, outer, inner in SHAPES:
        dense(name, outer, inner)
    for name, outer, inner in SHAPES[-2:]:
        grouped(name, outer, inner)


if __name__ == "__main__":
    app.run(main)
