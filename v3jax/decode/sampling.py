"""From logits to tokens: temperature, top-k, top-p, and the rejection rule of speculation.

All options are arrays, so one compiled program serves every setting, and work over the vocabulary
that a setting does not need is skipped. Dims: B rows, V vocabulary, K drafted tokens.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Options:
    """How the tokens of a batch are chosen; scalars."""

    temperature: jax.Array
    """0 takes the likeliest token."""
    top_k: jax.Array
    """Only the k likeliest tokens; 0 for all."""
    top_p: jax.Array
    """Only the likeliest tokens that together hold this share; 1 for all."""


def options(temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Options:
    """Checked options.

    Raises:
      ValueError: a value outside its range.
    """
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}: must be 0 or a positive number")
    if not 0 <= top_k < 2**31:
        raise ValueError(f"top_k={top_k}: must be positive, or 0 for all")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")
    return Options(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


def choose(logits_BV: jax.Array, chosen: Options, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A token a row, int32 `[B]`, and the logits `[B, V]` it was drawn from.

    At temperature 0 it is the likeliest (the first of equals), without a pass for probabilities,
    and the logits come back as they are.
    """

    def drawn() -> tuple[jax.Array, jax.Array]:
        scaled_BV = scaled(logits_BV, chosen)
        return draw(scaled_BV, keys_B), scaled_BV

    def likeliest() -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), logits_BV

    return jax.lax.cond(chosen.temperature > 0, drawn, likeliest)


def scaled(logits_BV: jax.Array, chosen: Options) -> jax.Array:
    """`[..., V]` logits over the temperature, which is not 0, with filtered-out tokens at -inf.

    The filters apply in the order temperature, top-k, top-p. Tokens as likely as the last one that
    a filter keeps stay too.
    """
    scaled_BV = logits_BV / jnp.maximum(chosen.temperature, 1e-6)
    filters = (chosen.top_k > 0) | (chosen.top_p < 1)
    return jax.lax.cond(filters, lambda: _filtered(scaled_BV, chosen), lambda: scaled_BV)


def _filtered(logits_BV: jax.Array, chosen: Options) -> jax.Array:
    vocab = logits_BV.shape[-1]
    falling_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    k = jnp.where(chosen.top_k > 0, jnp.minimum(chosen.top_k, vocab), vocab)
    kth_B1 = jax.lax.dynamic_slice_in_dim(falling_BV, k - 1, 1, axis=-1)
    within_k_BV = jnp.where(falling_BV >= kth_B1, falling_BV, -jnp.inf)
    p_BV = jax.nn.softmax(within_k_BV, axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # share of the tokens ahead of each
    kept_BV = (before_BV < chosen.top_p) & (p_BV > 0)
    last_B1 = jnp.maximum(jnp.sum(kept_BV, axis=-1, keepdims=True) - 1, 0)
    edge_B1 = jnp.take_along_axis(falling_BV, last_B1, axis=-1)
    edge_B1 = jnp.where(chosen.top_p < 1, jnp.maximum(edge_B1, kth_B1), kth_B1)
    return jnp.where(logits_BV >= edge_B1, logits_BV, -jnp.inf)


def draw(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """One token a row from the softmax of logits, int32 `[B]`, each row with its own key."""
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def log_prob(logits_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """Log-probability in nats of a token `[...]` under the softmax of logits `[..., V]`."""
    of_token_B = jnp.take_along_axis(logits_BV, tokens_B[..., None], axis=-1)[..., 0]
    return of_token_B - jax.nn.logsumexp(logits_BV, axis=-1)


def row_keys(seed: jax.Array, n_rows: int) -> jax.Array:
    """A key for each row of a batch, whatever else is in it."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(n_rows))


def keys_at(keys_B: jax.Array, positions_B: jax.Array, use: int) -> jax.Array:
    """The rows' keys for a position of each; `use`, within 0..3, tells draws there apart."""
    return jax.vmap(jax.random.fold_in)(keys_B, 4 * positions_B + use)


def accept(
    drafted_BK: jax.Array,
    drafts_BKV: jax.Array,
    targets_BKV: jax.Array,
    uniform_BK: jax.Array,
    keys_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The rejection rule: tokens whose distribution is the main model's, however good the draft.

    A drafted token is kept with probability `min(1, target / draft)`; at the first that is not,
    a token is drawn from what the target has and the draft lacks; if all are kept, one more comes
    from the last target (arXiv 2211.17192, algorithm 1).

    Args:
      drafted_BK: tokens drafted.
      drafts_BKV: probabilities they were drawn from.
      targets_BKV: `[B, K + 1, V]`, the main model's at the same places and one further.
      uniform_BK: uniform draws of `[0, 1)`.
      keys_B: keys of the last draw.

    Returns:
      `(n_kept_B, last_B)`: how many drafted tokens stay, and the token that follows them; int32.
    """
    depth = drafted_BK.shape[1]
    p_BK = _at(targets_BKV[:, :depth], drafted_BK)
    q_BK = _at(drafts_BKV, drafted_BK)
    n_kept_B = leading(uniform_BK * q_BK < p_BK)
    # Past the last draft there is nothing to take off.
    drafts_BKV = jnp.concatenate([drafts_BKV, jnp.zeros_like(targets_BKV[:, :1])], axis=1)
    target_BV, draft_BV = (
        jnp.take_along_axis(x_BKV, n_kept_B[:, None, None], axis=1)[:, 0]
        for x_BKV in (targets_BKV, drafts_BKV)
    )
    rest_BV = jnp.maximum(target_BV - draft_BV, 0)
    # Nothing left means equal distributions, told apart by rounding alone.
    rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, target_BV)
    return n_kept_B, draw(jnp.log(rest_BV), keys_B)


def leading(kept_BK: jax.Array) -> jax.Array:
    """How many of a row's values are true before the first that is not, int32 `[B]`."""
    return jnp.sum(jnp.cumprod(kept_BK.astype(jnp.int32), axis=1), axis=1)


def _at(p_BKV: jax.Array, tokens_BK: jax.Array) -> jax.Array:
    return jnp.take_along_axis(p_BKV, tokens_BK[..., None], axis=-1)[..., 0]
