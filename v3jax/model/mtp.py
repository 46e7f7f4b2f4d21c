"""Multi-token prediction: the module that predicts one token further (report section 2.2, eq. 21).

The concatenation puts the embedding first, as the released weights do (eq. 21 prints the hidden
state first), and the hidden state comes after the main model's final norm, which is what every
public implementation of the released weights reads; both only permute or rescale the input of a
learned projection. Dims: B batch, T time, D model.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from v3jax.model.block import rematerialised
from v3jax.model.layers import Module
from v3jax.model.moe import RouterStats
from v3jax.ops.norm import rms_norm


class MTPModule(Module):
    """Depth k: from `h^(k-1)` of position i and the embedding of token i+k to `h^k`."""

    @nn.compact
    def __call__(
        self,
        hidden_BTD: jax.Array,
        embedded_BTD: jax.Array,
        positions_T: jax.Array,
        segments_BT: jax.Array | None,
        counted_BT: jax.Array | None,
    ) -> tuple[jax.Array, RouterStats]:
        """`h^k` after the module's own norm, ready for the shared head, and router statistics."""
        cfg = self.cfg
        enorm, hnorm = self.norm_weight("enorm", cfg.dim), self.norm_weight("hnorm", cfg.dim)
        eh_proj = self.matrix("eh_proj", (2 * cfg.dim, cfg.dim), None, "embed")
        head_norm = self.norm_weight("shared_head_norm", cfg.dim)
        joined = jnp.concatenate(
            [
                rms_norm(embedded_BTD, enorm, cfg.norm_eps),
                rms_norm(hidden_BTD, hnorm, cfg.norm_eps),
            ],
            axis=-1,
        )
        block = rematerialised(self.numerics, in_scan=False)(
            cfg, self.numerics, self.rules, moe=True, name="block"
        )
        x_BTD, stats = block(joined @ eh_proj, positions_T, segments_BT, counted_BT)
        assert stats is not None
        return rms_norm(x_BTD, head_norm, cfg.norm_eps), stats


def known(counted_BS: jax.Array, depth: int) -> jax.Array:
    """Positions `[B, T]` that count for module `depth` in rows of T + 1 tokens.

    They and the token looked ahead to do; the last `depth` have no target, and what wraps around
    there counts nowhere.
    """
    length = counted_BS.shape[1] - 1
    both_BT = (counted_BS & jnp.roll(counted_BS, -depth, axis=1))[:, :length]
    return both_BT & (jnp.arange(length) < length - depth)
