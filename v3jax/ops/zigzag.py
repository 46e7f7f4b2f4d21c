"""Which positions of a row a device has where several share it (mesh axis `context`).

A row's T positions are cut into 2C pieces for C devices; device c has pieces c and 2C-1-c, an early
and a late one. Under causal attention every device then meets the same number of keys: its pieces
see c + 1 and 2C - c pieces. Token ids and segments are small, so every device has whole rows of
those and takes its own positions of what is made of them. Where no axis `context` is in use, every
function gives back what it is given.
Dims: B sequences, S = T + 1 row, T positions, t a device's own, W looked up, D model.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from v3jax.sharding import manual_axes

AXIS = "context"


def n_devices() -> int:
    """Devices that share a row; 1 outside `jax.shard_map`."""
    return lax.axis_size(AXIS) if AXIS in manual_axes() else 1


def pieces() -> jax.Array:
    """The two pieces that this device has, numbered along the row, int32."""
    c, n = lax.axis_index(AXIS), n_devices()
    return jnp.stack([c, 2 * n - 1 - c])


def own(x_BT: jax.Array) -> jax.Array:
    """This device's positions of whole rows, `[B, T, ...] -> [B, t, ...]`."""
    n = n_devices()
    if n == 1:
        return x_BT
    batch, length = x_BT.shape[:2]
    cut = x_BT.reshape(batch, 2 * n, -1, *x_BT.shape[2:])
    return cut[:, pieces()].reshape(batch, length // n, *x_BT.shape[2:])


def positions(length: int) -> jax.Array:
    """Places in its row of each of this device's positions, `[t]`, of rows of `length`."""
    at_T = jnp.arange(length)
    return at_T if n_devices() == 1 else own(at_T[None])[0]


@dataclass(frozen=True)
class Window:
    """What a device looks up of a row: its positions, and the tokens that modules look ahead to.

    Alone it is the row as it is. Of a shared row it is each of the two pieces with the `ahead`
    tokens after it; past the row's end it begins again, where nothing counts.
    """

    length: int
    """T."""
    ahead: int

    def width(self, row: int) -> int:
        """W for rows of so many tokens."""
        n = n_devices()
        return row if n == 1 else self.length // n + 2 * self.ahead

    def tokens(self, tokens_BS: jax.Array) -> jax.Array:
        """`[B, S] -> [B, W]`."""
        n = n_devices()
        if n == 1:
            return tokens_BS
        piece = self.length // (2 * n)
        at = pieces()[:, None] * piece + jnp.arange(piece + self.ahead)
        return tokens_BS[:, at.reshape(-1) % tokens_BS.shape[1]]

    def later(self, x_BWD: jax.Array, k: int) -> jax.Array:
        """What is `k` tokens after each position, `[B, W, D] -> [B, t, D]`."""
        if n_devices() == 1:
            return (jnp.roll(x_BWD, -k, axis=1) if k else x_BWD)[:, : self.length]
        batch, width, dim = x_BWD.shape
        cut = x_BWD.reshape(batch, 2, width // 2, dim)
        return cut[:, :, k : k + width // 2 - self.ahead].reshape(batch, -1, dim)

    def filled(self, x_BtD: jax.Array, row: int) -> jax.Array:
        """The positions in a window that holds nothing else: `later`'s mirror for k = 0."""
        if n_devices() == 1:
            return jnp.pad(x_BtD, ((0, 0), (0, row - self.length), (0, 0)))
        batch, own_length, dim = x_BtD.shape
        cut = x_BtD.reshape(batch, 2, own_length // 2, dim)
        return jnp.pad(cut, ((0, 0), (0, 0), (0, self.ahead), (0, 0))).reshape(batch, -1, dim)
