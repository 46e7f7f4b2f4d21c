"""Rows of the embedding, also where every device holds some columns of it (report section 2).

Dims: B batch, S tokens of a row, V vocabulary, D model, P devices, d columns of a device.
"""

from typing import Any

import jax
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
