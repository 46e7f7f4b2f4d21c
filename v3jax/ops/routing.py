"""Which experts a token goes to, with what gate, and how balanced that is (report section 2.1.2).

Dims: T tokens, E experts, G groups (one a node), K experts of a token, B sequences, S positions.
"""

import jax
import jax.numpy as jnp

from v3jax.ops.precision import widen


def route(
    logits_TE: jax.Array,
    bias_E: jax.Array,
    *,
    top_k: int,
    n_groups: int,
    top_groups: int,
    route_scale: float,
    multiplied: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Node-limited top-k choice by biased affinity, gates from the unbiased one (eq. 12-16).

    Groups are ranked by the sum of their two highest biased affinities; experts of other groups
    are masked with -inf. The bias decides who is chosen and never enters a gate; no gradient
    flows through the choice.

    Args:
      logits_TE: router logits, FP32.
      bias_E: router bias, FP32.
      multiplied: whether affinities are ranked times `1 + bias` instead of plus it.

    Returns:
      `(experts_TK, gates_TK)`: int32 indices and FP32 gates that sum to `route_scale`.
    """
    with jax.named_scope("route"):
        affinity_TE = jax.nn.sigmoid(widen(logits_TE))
        ranking_TE = jax.lax.stop_gradient(affinity_TE)
        ranking_TE = ranking_TE * (1 + bias_E) if multiplied else ranking_TE + bias_E
        experts_TK = choose(ranking_TE, top_k=top_k, n_groups=n_groups, top_groups=top_groups)
        chosen_TK = jnp.take_along_axis(affinity_TE, experts_TK, axis=-1)
        gates_TK = route_scale * chosen_TK / (chosen_TK.sum(-1, keepdims=True) + 1e-20)
        return experts_TK, gates_TK


def choose(ranking_TE: jax.Array, *, top_k: int, n_groups: int, top_groups: int) -> jax.Array:
    """Indices `[T, K]` of the highest-ranked experts inside the `top_groups` best groups."""
    if top_groups < n_groups:
        ranking_TGE = ranking_TE.reshape(ranking_TE.shape[0], n_groups, -1)
        best_TG = jnp.sum(jax.lax.top_k(ranking_TGE, min(2, ranking_TGE.shape[-1]))[0], axis=-1)
        threshold_TM = jax.lax.top_k(best_TG, top_groups)[1]
        kept_TG = jnp.any(threshold_TM[:, :, None] == jnp.arange(n_groups), axis=1)
        ranking_TGE = jnp.where(kept_TG[:, :, None], ranking_TGE, -jnp.inf)
        ranking_TE = ranking_TGE.reshape(ranking_TE.shape)
    return jax.lax.top_k(ranking_TE, top_k)[1].astype(jnp.int32)


def expert_load(
    experts_TK: jax.Array, n_experts: int, counted_T: jax.Array | None = None
) -> jax.Array:
    """How many tokens chose each expert, int32 `[E]`, of those with `counted_T` true."""
    hits_TE = jnp.any(experts_TK[:, :, None] == jnp.arange(n_experts), axis=1)
    if counted_T is not None:
        hits_TE &= counted_T[:, None]
    return jnp.sum(hits_TE, axis=0, dtype=jnp.int32)


def sequence_balance_loss(
    logits_BSE: jax.Array,
    *,
    top_k: int,
    counted_BS: jax.Array | None = None,
    axes: tuple[str, ...] = (),
) -> jax.Array:
    """`sum_i f_i P_i` of each sequence, `[B]` (eq. 17-20, before the factor alpha).

    `P_i` is the mean over positions of the affinity normalised over *all* experts; `f_i` counts,
    as printed in the report, the top-k of the unbiased affinity without group limit, times
    `E / (K S)`. Gradient flows through `P` only; perfect balance gives 1. Positions with
    `counted_BS` false (padding) are left out of both. With `axes`, names of mesh axes inside
    `jax.shard_map` over which the sequences' positions are split, a device's share of it: shares
    add up, and a device's gradient is that of its own positions.
    """
    with jax.named_scope("sequence_balance_loss"):
        f_BE, p_BE = _hits_and_shares(logits_BSE, top_k, counted_BS, axes)
        return jnp.sum(jax.lax.stop_gradient(f_BE) * p_BE, axis=-1)


def batch_balance_loss(
    logits_BSE: jax.Array,
    *,
    top_k: int,
    counted_BS: jax.Array | None = None,
    axes: tuple[str, ...] = (),
    parts: int = 1,
) -> jax.Array:
    """The same over all positions of a micro-batch as one (section 4.5.3), times its sequences.

    So it compares with the sum of `sequence_balance_loss`. A scalar; with `axes`, names of mesh
    axes inside `jax.shard_map` over which the batch is split, a device's share of it. `parts` are
    those that each sequence is split into over them.
    """
    with jax.named_scope("batch_balance_loss"):
        f_BE, p_BE = _hits_and_shares(logits_BSE, top_k, counted_BS)
        shape = logits_BSE.shape[:2]
        counted_BS = jnp.ones(shape, bool) if counted_BS is None else counted_BS
        n_B = jnp.sum(counted_BS, axis=1, dtype=jnp.float32)

        def over_devices(x: jax.Array) -> jax.Array:
            return jax.lax.psum(x, axes) if axes else x

        n_sequences = over_devices(jnp.float32(shape[0] / parts))
        n_counted = jnp.maximum(over_devices(jnp.sum(n_B)), 1)
        f_E = over_devices(jax.lax.stop_gradient(jnp.einsum("b,be->e", n_B, f_BE))) / n_counted
        return n_sequences * jnp.sum(f_E * jnp.einsum("b,be->e", n_B, p_BE)) / n_counted


def _hits_and_shares(
    logits_BSE: jax.Array,
    top_k: int,
    counted_BS: jax.Array | None,
    axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """`f` and `P` of every sequence, `[B, E]`, as in `sequence_balance_loss`; of `P` a device's
    share, if positions are split over mesh axes."""
    affinity_BSE = jax.nn.sigmoid(widen(logits_BSE))
    share_BSE = affinity_BSE / affinity_BSE.sum(-1, keepdims=True)
    n_experts = affinity_BSE.shape[-1]
    best_BSK = jax.lax.top_k(jax.lax.stop_gradient(affinity_BSE), top_k)[1]
    hits_BSE = jnp.any(best_BSK[..., None] == jnp.arange(n_experts), axis=2)
    hits_BSE = hits_BSE.astype(affinity_BSE.dtype)
    if axes:
        ones_BS = jnp.ones(hits_BSE.shape[:2], bool)
        counted_BS = ones_BS if counted_BS is None else counted_BS
        n_B1 = jnp.maximum(jax.lax.psum(counted_BS.sum(-1, keepdims=True), axes), 1)
        # Counts are whole numbers, whose sum is the same in any order.
        hits_BE = jax.lax.psum(jnp.einsum("bs,bse->be", counted_BS, hits_BSE), axes)
        p_BE = jnp.einsum("bs,bse->be", counted_BS / n_B1, share_BSE)
        return hits_BE / n_B1 * (n_experts / top_k), p_BE
    if counted_BS is None:
        return hits_BSE.mean(1) * (n_experts / top_k), share_BSE.mean(1)
    weight_BS = counted_BS / jnp.maximum(counted_BS.sum(-1, keepdims=True), 1)
    f_BE = jnp.einsum("bs,bse->be", weight_BS, hits_BSE) * (n_experts / top_k)
    return f_BE, jnp.einsum("bs,bse->be", weight_BS, share_BSE)
