"""Matrix products of rows that are grouped by expert in whole blocks (see `dispatch.Blocks`).

`jax.lax.ragged_dot` multiplies every row by every expert on CPU and GPU; here a block meets only
its own expert's weight. Small problems gather one weight a block and run one batched product;
large ones loop over the experts and each one's blocks in use, so that neither memory nor work grows
with the padding, and a weight and its gradient stand still while rows pass by.
Dims: N rows, M blocks, R rows of a block, E experts, I inner and O outer features.
"""

import jax
import jax.numpy as jnp

from v3jax import kernels
from v3jax.kernels import grouped_matmul as kernel
from v3jax.kernels.grouped_matmul import Blocks
from v3jax.ops.precision import wide

_GATHER_BYTES = 32 * 2**20
"""Above this size of gathered weights the loop is used."""


@jax.custom_vjp
def grouped_matmul(x_NI: jax.Array, w_EIO: jax.Array, blocks: Blocks) -> jax.Array:
    """Each block of rows times its expert's weight: `[N, I] x [E, I, O] -> [N, O]`, in x's type.

    Products accumulate in FP32. The weight's gradient is FP32 before it is cast to w's type.
    """
    return _product(x_NI, w_EIO, blocks, transposed=False)


def _product(x: jax.Array, w_EIO: jax.Array, blocks: Blocks, *, transposed: bool) -> jax.Array:
    if kernels.platform() == "tpu" and kernel.fits(x, w_EIO, blocks):
        return kernel.grouped_matmul(x, w_EIO, blocks, transposed=transposed)
    return _forward(x, w_EIO, blocks, "mro,mio->mri" if transposed else "mri,mio->mro")


def _blocks(x_NI: jax.Array, blocks: Blocks) -> jax.Array:
    return x_NI.reshape(blocks.expert_M.shape[0], blocks.block, x_NI.shape[-1])


def _gathers(w_EIO: jax.Array, blocks: Blocks) -> bool:
    if blocks.balanced_rows is not None:
        return False
    gathered = blocks.expert_M.shape[0] * w_EIO.shape[1] * w_EIO.shape[2] * w_EIO.dtype.itemsize
    return gathered <= _GATHER_BYTES


def _forward(x_NI: jax.Array, w_EIO: jax.Array, blocks: Blocks, product: str) -> jax.Array:
    """`product` is an einsum of blocks `mri` (or `mro`) and weights `mio`."""
    x_MRI = _blocks(x_NI, blocks)
    with jax.named_scope("grouped_matmul"):
        if _gathers(w_EIO, blocks):
            y_MRO = jnp.einsum(
                product, x_MRI, w_EIO[blocks.expert_M], preferred_element_type=wide(x_NI)
            )
            return y_MRO.reshape(x_NI.shape[0], -1).astype(x_NI.dtype)
        single = product.replace("m", "")
        width = w_EIO.shape[2] if product.endswith("o") else w_EIO.shape[1]
        first_E = first_blocks(blocks, w_EIO.shape[0])

        def one_expert(e: jax.Array, y_MRO: jax.Array) -> jax.Array:
            w_IO = w_EIO[e]

            def one_block(m: jax.Array, y_MRO: jax.Array) -> jax.Array:
                y_RO = jnp.einsum(single, x_MRI[m], w_IO, preferred_element_type=wide(x_NI))
                return y_MRO.at[m].set(y_RO.astype(x_NI.dtype))

            return jax.lax.fori_loop(first_E[e], first_E[e + 1], one_block, y_MRO)

        y_MRO = jnp.zeros((*x_MRI.shape[:2], width), x_NI.dtype)
        y_MRO = jax.lax.fori_loop(0, w_EIO.shape[0], one_expert, y_MRO)
        return y_MRO.reshape(-1, width)


def first_blocks(blocks: Blocks, n_experts: int) -> jax.Array:
    """The first block of every expert and, last, the number of blocks in use: `[E + 1]`, int32."""
    used_M = jnp.arange(blocks.expert_M.shape[0]) < blocks.n_used
    before = (blocks.expert_M < jnp.arange(n_experts + 1)[:, None]) & used_M
    return jnp.sum(before, axis=1, dtype=jnp.int32)


def _weight_gradient(
    x_NI: jax.Array, dy_NO: jax.Array, w_EIO: jax.Array, blocks: Blocks
) -> jax.Array:
    if kernels.platform() == "tpu" and kernel.fits(x_NI, w_EIO, blocks):
        return kernel.grouped_weight_gradient(x_NI, dy_NO, w_EIO, blocks)
    if kernels.platform() == "tpu":  # rows without a token hold anything there
        x_NI, dy_NO = (blocks.cleared(rows) for rows in (x_NI, dy_NO))
    x_MRI, dy_MRO = _blocks(x_NI, blocks), _blocks(dy_NO, blocks)
    with jax.named_scope("grouped_matmul_weight_gradient"):
        dw_EIO = jnp.zeros(w_EIO.shape, wide(x_NI))
        if _gathers(w_EIO, blocks):
            dw_MIO = jnp.einsum("mri,mro->mio", x_MRI, dy_MRO, preferred_element_type=wide(x_NI))
            return dw_EIO.at[blocks.expert_M].add(dw_MIO, indices_are_sorted=True)

        first_E = first_blocks(blocks, w_EIO.shape[0])

        def one_expert(e: jax.Array, dw_EIO: jax.Array) -> jax.Array:
            def one_block(m: jax.Array, dw_IO: jax.Array) -> jax.Array:
                product = jnp.einsum(
                    "ri,ro->io", x_MRI[m], dy_MRO[m], preferred_element_type=wide(x_NI)
                )
                return dw_IO + product

            dw_IO = jax.lax.fori_loop(
                first_E[e], first_E[e + 1], one_block, jnp.zeros(w_EIO.shape[1:], wide(x_NI))
            )
            return dw_EIO.at[e].set(dw_IO)

        return jax.lax.fori_loop(0, w_EIO.shape[0], one_expert, dw_EIO)


_Residuals = tuple[jax.Array, jax.Array, Blocks]


def _grouped_fwd(x_NI: jax.Array, w_EIO: jax.Array, blocks: Blocks) -> tuple[jax.Array, _Residuals]:
    return grouped_matmul(x_NI, w_EIO, blocks), (x_NI, w_EIO, blocks)


def _grouped_bwd(residuals: _Residuals, dy_NO: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_NI, w_EIO, blocks = residuals
    dx_NI = _product(dy_NO, w_EIO, blocks, transposed=True)
    return dx_NI, _weight_gradient(x_NI, dy_NO, w_EIO, blocks).astype(w_EIO.dtype), None


grouped_matmul.defvjp(_grouped_fwd, _grouped_bwd)
