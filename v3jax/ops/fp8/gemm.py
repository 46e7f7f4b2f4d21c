"""Matrix products of FP8 codes with a scale for each tile (report sections 3.3.2 and 3.5.2).

The three products of a linear map: `gemm_nt` and, by expert, `m_grouped_nt` for outputs and for the
gradients of inputs (1 x tile by block x block), `k_grouped_nt` for the gradients of weights (tiles
of tokens on both sides). Both operands have the contraction last, as Hopper's tensor cores want
them. After every `promotion` elements of the contraction the partial sums are scaled and added up
in FP32. Codes are multiplied as BF16, which holds E4M3 exactly and which CPUs multiply fast.

On Hopper and TPU `kernels.fp8_gpu` and `kernels.fp8_tpu` compute what is written here in JAX.
Dims: M and N rows of the operands, K contraction, Q tiles along it, E experts, T tokens, G groups
of the contraction's elements, each promoted once.
"""

from typing import Any

import jax
import jax.numpy as jnp

from v3jax.config import Fp8Config
from v3jax.kernels import fp8_gpu, fp8_tpu
from v3jax.kernels.grouped_matmul import Blocks
from v3jax.ops.fp8 import backend
from v3jax.ops.fp8.quantize import E4M3, Quantized, unfused
from v3jax.ops.gemm import first_blocks

_UNROLLED = 32
"""Up to so many groups stand one after the other, more are a loop."""


def gemm_nt(a: Quantized, b: Quantized, cfg: Fp8Config, dtype: Any) -> jax.Array:
    """`[M, K] x [N, K] -> [M, N]`: `a` in tiles `1 x cfg.tile`, `b` in blocks of `cfg.block`."""
    with jax.named_scope("fp8_gemm_nt"):
        _check(a, b, (cfg.tile,), (cfg.block, cfg.block))
        if (kernels := backend.kernels_of(cfg)) is not None:
            m, n = a.codes.shape[0], b.codes.shape[0]
            a, b = _whole_tiles(a), _whole_tiles(b)
            product = {"gpu": fp8_gpu.gemm_nt, "tpu": fp8_tpu.gemm_nt}[kernels]
            return product(a.codes, a.scales, b.codes, b.scales, dtype)[:m, :n]
        return _promoted(a, _by_row(b, cfg.block), cfg, cfg.block).astype(dtype)


def m_grouped_nt(
    a: Quantized, b: Quantized, blocks: Blocks, cfg: Fp8Config, dtype: Any
) -> jax.Array:
    """Rows in whole blocks, each by its expert's matrix: `[M, K] x [E, N, K] -> [M, N]`.

    Rows of blocks that are not in use come out as anything.
    """
    # Who reads the program finds how many rows a balanced batch fills (`aot.kernels`).
    filled = blocks.expected_rows(a.codes.shape[0])
    with jax.named_scope(f"fp8_m_grouped_nt_of_{filled}"):
        _check(a, b, (cfg.tile,), (cfg.block, cfg.block))
        n_experts, n_out = b.codes.shape[:2]
        if (kernels := backend.kernels_of(cfg)) is not None and blocks.block == cfg.tile:
            used_M = jnp.arange(blocks.expert_M.shape[0]) < blocks.n_used
            expert_M = jnp.where(used_M, blocks.expert_M, -1)
            a, b = _whole_tiles(a), _whole_tiles(b)
            product = {"gpu": fp8_gpu.m_grouped_nt, "tpu": fp8_tpu.m_grouped_nt}[kernels]
            return product(a.codes, a.scales, b.codes, b.scales, expert_M, dtype)[:, :n_out]
        first_E = first_blocks(blocks, n_experts)
        parts = jax.tree.map(lambda x: x.reshape(-1, blocks.block, x.shape[-1]), a)

        def one_expert(e: jax.Array, y: jax.Array) -> jax.Array:
            weight = _by_row(Quantized(b.codes[e].astype(jnp.bfloat16), b.scales[e]), cfg.block)

            def one_block(m: jax.Array, y: jax.Array) -> jax.Array:
                rows = jax.tree.map(lambda x: x[m], parts)
                return y.at[m].set(_promoted(rows, weight, cfg, cfg.block).astype(dtype))

            return jax.lax.fori_loop(first_E[e], first_E[e + 1], one_block, y)

        y = jnp.zeros((parts.codes.shape[0], blocks.block, n_out), dtype)
        return jax.lax.fori_loop(0, n_experts, one_expert, y).reshape(-1, n_out)


def k_grouped_nt(
    a: Quantized, b: Quantized, cfg: Fp8Config, blocks: Blocks | None = None, n_experts: int = 1
) -> jax.Array:
    """For each expert the sum over its tokens, `[M, T] x [N, T] -> [E, M, N]`, FP32.

    Both in tiles `1 x cfg.tile` along the tokens, which lie in the experts' order in whole blocks
    of `cfg.tile`; without `blocks` all are of one expert.
    """
    length = a.codes.shape[1]
    filled = length if blocks is None else blocks.expected_rows(length)
    with jax.named_scope(f"fp8_k_grouped_nt_of_{filled}"):
        _check(a, b, (cfg.tile,), (cfg.tile,))
        if blocks is not None and blocks.block != cfg.tile:
            raise ValueError(
                f"k_grouped_nt: blocks of {blocks.block} rows are not the tile of {cfg.tile}; lay "
                "rows out in blocks of numerics.fp8.tile"
            )
        if backend.kernels_of(cfg) == "gpu":
            m, n, n_tiles = a.codes.shape[0], b.codes.shape[0], a.scales.shape[1]
            a, b = _whole_tiles(a), _whole_tiles(b)
            first_E = jnp.array([0, n_tiles], jnp.int32)
            if blocks is not None:
                first_E = first_blocks(blocks, n_experts)
            sums = fp8_gpu.k_grouped_nt(a.codes, a.scales, b.codes, b.scales, first_E)
            return sums[:, :m, :n]
        if blocks is None:
            return _promoted(a, b, cfg)[None]
        first_E, tile = first_blocks(blocks, n_experts), cfg.tile

        def one_expert(e: jax.Array, out: jax.Array) -> jax.Array:
            def one_block(m: jax.Array, sum_MN: jax.Array) -> jax.Array:
                x, y = (
                    Quantized(
                        jax.lax.dynamic_slice_in_dim(q.codes, m * tile, tile, axis=1),
                        jax.lax.dynamic_slice_in_dim(q.scales, m, 1, axis=1),
                    )
                    for q in (a, b)
                )
                return _promoted(x, y, cfg, start=sum_MN)

            nothing = jnp.zeros((a.codes.shape[0], b.codes.shape[0]), jnp.float32)
            return out.at[e].set(jax.lax.fori_loop(first_E[e], first_E[e + 1], one_block, nothing))

        out = jnp.zeros((n_experts, a.codes.shape[0], b.codes.shape[0]), jnp.float32)
        return jax.lax.fori_loop(0, n_experts, one_expert, out)


def _check(a: Quantized, b: Quantized, tile_a: tuple[int, ...], tile_b: tuple[int, ...]) -> None:
    """Raises ValueError for codes of another type, sides that do not meet, or scales that are not
    one for each tile."""
    for name, q, tile in (("a", a, tile_a), ("b", b, tile_b)):
        if q.codes.dtype != E4M3:
            raise ValueError(
                f"{name}: codes are {q.codes.dtype}, not {jnp.dtype(E4M3)}; quantize it"
            )
        shape = q.codes.shape
        sides = (1,) * (len(shape) - len(tile)) + tile
        wanted = tuple(-(-n // side) for n, side in zip(shape, sides, strict=True))
        if q.scales.shape != wanted:
            raise ValueError(
                f"{name}: scales of {list(q.scales.shape)} for codes of {list(shape)} are not "
                f"{list(wanted)}, one a tile of {' x '.join(map(str, sides[-2:]))}; quantize "
                "it with this tile"
            )
    if a.codes.shape[-1] != b.codes.shape[-1]:
        raise ValueError(
            f"a and b: {a.codes.shape[-1]} and {b.codes.shape[-1]} columns are not one "
            "contraction; give both with the contraction last"
        )


def _whole_tiles(q: Quantized) -> Quantized:
    """Rows and columns filled up to whole 128s with codes and scales of zero."""
    rows, columns = (-n % fp8_gpu.BLOCK for n in q.codes.shape[-2:])
    leading = [(0, 0)] * (q.codes.ndim - 2)
    codes = jnp.pad(q.codes, [*leading, (0, rows), (0, columns)])
    tiled = q.scales.shape[-2] != q.codes.shape[-2]
    return Quantized(codes, q.scales if tiled else jnp.pad(q.scales, [*leading, (0, rows), (0, 0)]))


def _by_row(b: Quantized, block: int) -> Quantized:
    """Blocks' scales given to each of their rows."""
    return Quantized(b.codes, jnp.repeat(b.scales, block, axis=-2)[..., : b.codes.shape[-2], :])


def _promoted(
    a: Quantized,
    b: Quantized,
    cfg: Fp8Config,
    tile_b: int | None = None,
    start: jax.Array | None = None,
) -> jax.Array:
    """`[M, K] x [N, K] -> [M, N]` in FP32, added to `start`; scales are of rows of `cfg.tile`, or
    `tile_b`, in both."""
    length = a.codes.shape[1]
    step = min(cfg.promotion, length)
    if length % step:
        a, b = (
            Quantized(jnp.pad(q.codes, [(0, 0), (0, -length % step)]), q.scales) for q in (a, b)
        )
    n_steps = -(-length // step)
    wide, of_b_QN = unfused(([q.codes.astype(jnp.bfloat16) for q in (a, b)], b.scales.T))

    def group(g: Any) -> jax.Array:
        x, y = (jax.lax.dynamic_slice_in_dim(codes, g * step, step, axis=1) for codes in wide)
        part = jax.lax.dot_general(
            x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        of_a = jax.lax.dynamic_slice_in_dim(a.scales, g * step // cfg.tile, 1, axis=1)
        of_b = jax.lax.dynamic_slice_in_dim(of_b_QN, g * step // (tile_b or cfg.tile), 1, axis=0)
        return part * (of_a * of_b)

    if n_steps > _UNROLLED:
        nothing = jnp.zeros((a.codes.shape[0], b.codes.shape[0]), jnp.float32)
        first = nothing if start is None else start
        return jax.lax.fori_loop(0, n_steps, lambda g, total: total + group(g), first)
    total = group(0) if start is None else start + group(0)
    for g in range(1, n_steps):
        total = total + group(g)
    return unfused(total)
