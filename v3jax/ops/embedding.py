"""Rows of the embedding, also where every device holds some columns of it (report section 2).

Dims: B batch, S tokens of a row, V vocabulary, D model, P devices, d columns and v rows of a
device.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def embed(
    table_VD: jax.Array, tokens_BS: jax.Array, dtype: Any, axes: tuple[str, ...] = ()
) -> jax.Array:
    """The tokens' rows in `dtype`, `[B, S, D]`; their gradient adds up in the table's type.

    With mesh axes the table holds this device's columns: all devices' tokens come together, each
    device looks up its columns for them, and these go back. That moves two bytes for each number
    of the result, where gathering the table would move the table.
    """
    with jax.named_scope("embed"):
        if not axes:
            return table_VD[tokens_BS].astype(dtype)
        tokens_PBS = lax.all_gather(tokens_BS, axes)
        rows_PBSd = table_VD[tokens_PBS].astype(dtype)
        return lax.all_to_all(rows_PBSd, axes, split_axis=0, concat_axis=3, tiled=True)[0]


def embed_split(table_vD: jax.Array, tokens_BS: jax.Array, dtype: Any, axis: str) -> jax.Array:
    """The tokens' rows, `[B, S, D]`, where each device along a mesh axis holds some rows."""
    with jax.named_scope("embed"):
        at_BS, here_BS = _own(table_vD, tokens_BS, axis)
        rows_BSD = jnp.where(here_BS[..., None], table_vD[at_BS].astype(dtype), 0)
        return lax.psum(rows_BSD, axis)


def add_to_split(
    table_vD: jax.Array, tokens_BS: jax.Array, rows_BSD: jax.Array, axis: str
) -> jax.Array:
    """This device's rows of the table, to which the tokens' rows are added: `embed_split`'s
    gradient."""
    at_BS, here_BS = _own(table_vD, tokens_BS, axis)
    at_BS = jnp.where(here_BS, at_BS, table_vD.shape[0])
    return table_vD.at[at_BS].add(rows_BSD.astype(table_vD.dtype), mode="drop")


def _own(table_vD: jax.Array, tokens_BS: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Places in this device's part of the table, and which tokens have one."""
    at_BS = tokens_BS - lax.axis_index(axis) * table_vD.shape[0]
    here_BS = (at_BS >= 0) & (at_BS < table_vD.shape[0])
    return jnp.where(here_BS, at_BS, 0), here_BS
