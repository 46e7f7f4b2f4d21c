"""Linear maps whose three products are of FP8 codes (report section 3.3.1, figure 6).

`y = x w`, `dx = dy w^T` and `dw = x^T dy`: x and dy are quantised in tiles `1 x 128` of a token's
channels, w in blocks of 128 x 128 from its FP32 master, and for the last product x and dy in tiles
of 128 tokens. Between the passes x waits in FP8 and is tiled anew. Outputs and gradients of inputs
have x's type, gradients of weights are FP32. Autodiff through a cast would round gradients to FP8,
so each map has its own derivative.

A caller may hand over x as it was quantised before; then that alone is used of it, and x takes its
gradient. Dims: N rows, I inner and O outer features, E experts, F hidden width.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from v3jax.config import Fp8Config
from v3jax.kernels import fp8_quantize_gpu
from v3jax.kernels.grouped_matmul import Blocks
from v3jax.ops.fp8 import backend, gemm
from v3jax.ops.fp8.quantize import (
    ACTIVATION_FLOOR,
    GRADIENT_FLOOR,
    Packed,
    Quantized,
    dequantize,
    quantize,
    transposed,
    unpack_e5m6,
)
from v3jax.ops.norm import swiglu, swiglu_gradient


@dataclass(frozen=True)
class Recipe:
    """How one linear map is quantised."""

    cfg: Fp8Config
    power_of_two: bool = False
    """Scales of x, also of its tiles of tokens."""
    power_of_two_gradient: bool = False
    """Scales of dy, also of its tiles of tokens."""

    def of(self, x: jax.Array) -> Quantized:
        """Inputs in tiles of channels."""
        return _by_rows(x, self.cfg, self.power_of_two, ACTIVATION_FLOOR)

    def of_swiglu(self, gate_up: jax.Array, gates_N: jax.Array | None = None) -> Quantized:
        """`of` the SwiGLU of rows, times their gates."""
        options = {"power_of_two": self.power_of_two, "floor": ACTIVATION_FLOOR}
        if _kernel_takes(self.cfg, gate_up.shape[-1] // 2, gate_up.size // gate_up.shape[-1]):
            flat = gate_up.reshape(-1, gate_up.shape[-1])
            codes, scales = fp8_quantize_gpu.swiglu_rows(flat, gates_N, **options)
            q = Quantized(codes, scales)
            return jax.tree.map(lambda x: x.reshape(*gate_up.shape[:-1], -1), q)
        hidden = swiglu(gate_up)
        return self.of(hidden if gates_N is None else _gated(hidden, gates_N))

    def restored(self, q: Quantized, dtype: Any) -> jax.Array:
        """What `of` gave, as numbers."""
        return dequantize(q, (self.cfg.tile,), dtype)

    def of_weight(self, w: jax.Array) -> Quantized:
        """`[..., I, O]` in blocks."""
        return quantize(w, (self.cfg.block, self.cfg.block))

    def of_gradient(self, dy_NO: jax.Array) -> Quantized:
        """Gradients of outputs, for those of inputs."""
        tile, power_of_two = self.cfg.tile, self.power_of_two_gradient
        if self.cfg.gradients == "tiles":
            return _by_rows(dy_NO, self.cfg, power_of_two, GRADIENT_FLOOR)
        q = quantize(dy_NO, (tile, tile), power_of_two=power_of_two, floor=GRADIENT_FLOOR)
        return Quantized(q.codes, jnp.repeat(q.scales, tile, axis=0)[: len(dy_NO)])

    def by_tokens(self, x_NI: jax.Array, dy_NO: jax.Array) -> tuple[Quantized, Quantized]:
        """Both in tiles of tokens, tokens last."""
        return (
            _by_columns(x_NI, self.cfg, self.power_of_two, ACTIVATION_FLOOR),
            _by_columns(dy_NO, self.cfg, self.power_of_two_gradient, GRADIENT_FLOOR),
        )


def _by_rows(x: jax.Array, cfg: Fp8Config, power_of_two: bool, floor: float) -> Quantized:
    """Tiles of a row's columns."""
    if not _kernel_takes(cfg, x.shape[-1], x.size // x.shape[-1]):
        return quantize(x, (cfg.tile,), power_of_two=power_of_two, floor=floor)
    flat = x.reshape(-1, x.shape[-1])
    q = Quantized(*fp8_quantize_gpu.rows(flat, power_of_two=power_of_two, floor=floor))
    return jax.tree.map(lambda a: a.reshape(*x.shape[:-1], -1), q)


def _by_columns(x_NI: jax.Array, cfg: Fp8Config, power_of_two: bool, floor: float) -> Quantized:
    """Tiles of a column's rows, transposed."""
    if not _kernel_takes(cfg, x_NI.shape[1], x_NI.shape[0]):
        return transposed(quantize(x_NI, (cfg.tile, 1), power_of_two=power_of_two, floor=floor))
    return Quantized(*fp8_quantize_gpu.columns(x_NI, power_of_two=power_of_two, floor=floor))


def _kernel_takes(cfg: Fp8Config, width: int, n_rows: int) -> bool:
    """Whether a kernel quantises so many rows; others are for XLA."""
    whole = width % cfg.tile == 0 and n_rows % cfg.tile == 0
    return backend.kernels_of(cfg) == "gpu" and whole


def recipe(cfg: Fp8Config, *, exact: bool = False, exact_gradient: bool = False) -> Recipe:
    """The recipe of a map whose x, or dy, the report gives scales that are powers of two."""
    every, some = cfg.power_of_two == "all", cfg.power_of_two == "report"
    return Recipe(cfg, every or (some and exact), every or (some and exact_gradient))


def named(q: Any, name: str) -> Any:
    """Arrays under the name by which a recompute policy may keep them."""
    return jax.tree.map(lambda x: checkpoint_name(x, name), q)


# ---- Dense maps


def linear(
    x: jax.Array,
    w_IO: jax.Array,
    how: Recipe,
    given: Quantized | None = None,
    cached: Packed | None = None,
) -> jax.Array:
    """`x w`, `[..., I] x [I, O] -> [..., O]`.

    Args:
      given: x quantised by `how.of`.
      cached: x in E5M6, from which the weight's gradient is computed then.
    """
    return _linear(how, x, w_IO, given, cached)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
    how: Recipe, x: jax.Array, w_IO: jax.Array, given: Quantized | None, cached: Packed | None
) -> jax.Array:
    return _linear_fwd(how, x, w_IO, given, cached)[0]


def _linear_fwd(
    how: Recipe, x: jax.Array, w_IO: jax.Array, given: Quantized | None, cached: Packed | None
) -> tuple[jax.Array, Any]:
    q = how.of(x) if given is None else given
    y_NO = _product(how, _flat(q), w_IO, x.dtype)
    kept = q if cached is None else cached
    return y_NO.reshape(*x.shape[:-1], -1), (kept, w_IO, jnp.zeros((), x.dtype))


def _linear_bwd(how: Recipe, residuals: Any, dy: jax.Array) -> tuple[Any, ...]:
    kept, w_IO, typed = residuals
    if isinstance(kept, Packed):
        x = unpack_e5m6(kept, how.cfg.tile, typed.dtype)
    else:
        x = how.restored(kept, typed.dtype)
    dy_NO = dy.reshape(-1, dy.shape[-1])
    dx_NI = _input_gradient(how, dy_NO, w_IO, typed.dtype)
    dw_IO = _weight_gradient(how, x.reshape(-1, x.shape[-1]), dy_NO)
    return dx_NI.reshape(x.shape), dw_IO.astype(w_IO.dtype), None, None


_linear.defvjp(_linear_fwd, _linear_bwd)


def _flat(q: Quantized) -> Quantized:
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), q)


def _product(how: Recipe, x: Quantized, w_IO: jax.Array, dtype: Any) -> jax.Array:
    return gemm.gemm_nt(x, transposed(how.of_weight(w_IO)), how.cfg, dtype)


def _input_gradient(how: Recipe, dy_NO: jax.Array, w_IO: jax.Array, dtype: Any) -> jax.Array:
    return gemm.gemm_nt(how.of_gradient(dy_NO), how.of_weight(w_IO), how.cfg, dtype)


def _weight_gradient(how: Recipe, x_NI: jax.Array, dy_NO: jax.Array) -> jax.Array:
    return gemm.k_grouped_nt(*how.by_tokens(x_NI, dy_NO), how.cfg)[0]


def swiglu_linear(gate_up: jax.Array, w_FO: jax.Array, how: Recipe) -> jax.Array:
    """`swiglu(gate_up) w`, `[..., 2F] x [F, O] -> [..., O]`.

    Of it only `gate_up` waits for the backward pass, in FP8, and the rest is computed again from
    that (report section 3.3.3).
    """
    return _swiglu_linear(how, gate_up, w_FO)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu_linear(how: Recipe, gate_up: jax.Array, w_FO: jax.Array) -> jax.Array:
    return _swiglu_linear_fwd(how, gate_up, w_FO)[0]


def _swiglu_linear_fwd(how: Recipe, gate_up: jax.Array, w_FO: jax.Array) -> tuple[jax.Array, Any]:
    kept = named(Recipe(how.cfg).of(gate_up), "gate_up")
    y_NO = _product(how, _flat(how.of_swiglu(gate_up)), w_FO, gate_up.dtype)
    return y_NO.reshape(*gate_up.shape[:-1], -1), (kept, w_FO, jnp.zeros((), gate_up.dtype))


def _swiglu_linear_bwd(how: Recipe, residuals: Any, dy: jax.Array) -> tuple[Any, ...]:
    kept, w_FO, typed = residuals
    gate_up = how.restored(kept, typed.dtype)
    hidden = swiglu(gate_up)
    dy_NO = dy.reshape(-1, dy.shape[-1])
    dhidden = _input_gradient(how, dy_NO, w_FO, typed.dtype).reshape(hidden.shape)
    dw_FO = _weight_gradient(how, hidden.reshape(-1, hidden.shape[-1]), dy_NO)
    return swiglu_gradient(gate_up, dhidden), dw_FO.astype(w_FO.dtype)


_swiglu_linear.defvjp(_swiglu_linear_fwd, _swiglu_linear_bwd)


# ---- Experts' maps


def grouped_linear(
    x_NI: jax.Array, w_EIO: jax.Array, blocks: Blocks, how: Recipe, given: Quantized | None = None
) -> jax.Array:
    """Each row by its expert's weight, `[N, I] x [E, I, O] -> [N, O]`; rows lie in whole blocks of
    `how.cfg.tile`."""
    return _grouped_linear(how, x_NI, w_EIO, blocks, given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_linear(
    how: Recipe, x_NI: jax.Array, w_EIO: jax.Array, blocks: Blocks, given: Quantized | None
) -> jax.Array:
    return _grouped_linear_fwd(how, x_NI, w_EIO, blocks, given)[0]


def _grouped_linear_fwd(
    how: Recipe, x_NI: jax.Array, w_EIO: jax.Array, blocks: Blocks, given: Quantized | None
) -> tuple[jax.Array, Any]:
    kept = how.of(x_NI) if given is None else given
    y_NO = _grouped_product(how, kept, w_EIO, blocks, x_NI.dtype)
    return y_NO, (kept, w_EIO, blocks, jnp.zeros((), x_NI.dtype))


def _grouped_linear_bwd(how: Recipe, residuals: Any, dy_NO: jax.Array) -> tuple[Any, ...]:
    kept, w_EIO, blocks, typed = residuals
    x_NI = how.restored(kept, typed.dtype)
    dx_NI = _grouped_input_gradient(how, dy_NO, w_EIO, blocks, typed.dtype)
    dw_EIO = _grouped_weight_gradient(how, x_NI, dy_NO, w_EIO, blocks)
    return dx_NI, dw_EIO, None, None


_grouped_linear.defvjp(_grouped_linear_fwd, _grouped_linear_bwd)


def _grouped_product(
    how: Recipe, x: Quantized, w_EIO: jax.Array, blocks: Blocks, dtype: Any
) -> jax.Array:
    w = transposed(how.of_weight(w_EIO))
    return gemm.m_grouped_nt(x, w, blocks, how.cfg, dtype)


def _grouped_input_gradient(
    how: Recipe, dy_NO: jax.Array, w_EIO: jax.Array, blocks: Blocks, dtype: Any
) -> jax.Array:
    return gemm.m_grouped_nt(how.of_gradient(dy_NO), how.of_weight(w_EIO), blocks, how.cfg, dtype)


def _grouped_weight_gradient(
    how: Recipe, x_NI: jax.Array, dy_NO: jax.Array, w_EIO: jax.Array, blocks: Blocks
) -> jax.Array:
    # A row without a token may hold anything, and would spoil its tile.
    x_NI, dy_NO = blocks.cleared(x_NI), blocks.cleared(dy_NO)
    dw_EIO = gemm.k_grouped_nt(*how.by_tokens(x_NI, dy_NO), how.cfg, blocks, len(w_EIO))
    return dw_EIO.astype(w_EIO.dtype)


def grouped_swiglu_linear(
    gate_up: jax.Array, gates_N: jax.Array, w_EFO: jax.Array, blocks: Blocks, how: Recipe
) -> jax.Array:
    """`gate * swiglu(gate_up) w` of each row's expert, `[N, 2F] x [E, F, O] -> [N, O]`; keeps what
    `swiglu_linear` keeps."""
    return _grouped_swiglu_linear(how, gate_up, gates_N, w_EFO, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_swiglu_linear(
    how: Recipe, gate_up: jax.Array, gates_N: jax.Array, w_EFO: jax.Array, blocks: Blocks
) -> jax.Array:
    return _grouped_swiglu_linear_fwd(how, gate_up, gates_N, w_EFO, blocks)[0]


def _grouped_swiglu_linear_fwd(
    how: Recipe, gate_up: jax.Array, gates_N: jax.Array, w_EFO: jax.Array, blocks: Blocks
) -> tuple[jax.Array, Any]:
    kept = named(Recipe(how.cfg).of(gate_up), "gate_up")
    hidden = how.of_swiglu(gate_up, gates_N)
    y_NO = _grouped_product(how, hidden, w_EFO, blocks, gate_up.dtype)
    return y_NO, (kept, gates_N, w_EFO, blocks, jnp.zeros((), gate_up.dtype))


def _grouped_swiglu_linear_bwd(how: Recipe, residuals: Any, dy_NO: jax.Array) -> tuple[Any, ...]:
    kept, gates_N, w_EFO, blocks, typed = residuals
    gate_up = how.restored(kept, typed.dtype)
    hidden = swiglu(gate_up)
    dgated = _grouped_input_gradient(how, dy_NO, w_EFO, blocks, typed.dtype)
    dgates_N = jnp.sum(dgated.astype(jnp.float32) * hidden.astype(jnp.float32), axis=-1)
    dw_EFO = _grouped_weight_gradient(how, _gated(hidden, gates_N), dy_NO, w_EFO, blocks)
    dgate_up = swiglu_gradient(gate_up, _gated(dgated, gates_N))
    return dgate_up, dgates_N.astype(gates_N.dtype), dw_EFO, None


_grouped_swiglu_linear.defvjp(_grouped_swiglu_linear_fwd, _grouped_swiglu_linear_bwd)


def _gated(hidden: jax.Array, gates_N: jax.Array) -> jax.Array:
    return (hidden.astype(jnp.float32) * gates_N[:, None]).astype(hidden.dtype)
