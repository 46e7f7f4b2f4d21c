"""The training objective: next token + MTP + balance (report sections 2.1.2, 2.2 and 4.2).

    L = L_main + (lambda / D) sum_k L_MTP^k + alpha sum_layers L_Bal

Cross-entropies are sums divided by the number of targets of the *whole* batch, so that
micro-batches add up to exactly the batch's loss. MTP-k has T - k terms but the same divisor
(eq. 24).
Dims: B sequences, S = T + 1 row, T positions, D model, L layers, E experts.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct

from v3jax.config import ExperimentConfig
from v3jax.model.moe import RouterStats
from v3jax.model.transformer import Output, Transformer, head_weight
from v3jax.ops import zigzag
from v3jax.ops.accumulate import Sink
from v3jax.ops.loss import linear_cross_entropy
from v3jax.sharding import ShardingRules, rules_of


@struct.dataclass
class Scale:
    """What a micro-batch's sums are divided by and weighted with; FP32 scalars."""

    n_targets: jax.Array
    n_sequences: jax.Array
    mtp_weight: jax.Array


@struct.dataclass
class LossParts:
    """One micro-batch's share of each term; shares of a batch add up."""

    main: jax.Array
    """Cross-entropy of the next token, nats a token."""
    mtp: jax.Array
    """Mean over depths of the MTP cross-entropies, before the weight lambda."""
    balance: jax.Array
    """Balance loss summed over layers, times alpha."""
    load_LE: jax.Array
    """Tokens sent to each expert, int32; MTP's routers last."""
    overload: jax.Array
    """Rows of the fullest device over the mean, averaged over layers and sequences."""
    extra_passes: jax.Array
    """Passes beyond the first that tokens took to their experts, int32, summed over layers."""
    dropped: jax.Array
    """Choices dropped in capacity mode, int32, summed over layers."""


def make_model(cfg: ExperimentConfig, rules: ShardingRules | None = None) -> Transformer:
    """The network of an experiment."""
    return Transformer(cfg.model, cfg.numerics, rules or rules_of(cfg))


def apply_model(
    cfg: ExperimentConfig,
    params: Any,
    router_state: Any,
    tokens_BS: jax.Array,
    rules: ShardingRules | None = None,
    **inputs: Any,
) -> Output:
    """Runs `Transformer.__call__` on a run's variables; `inputs` are its keyword arguments."""
    variables = {"params": params, "router_state": router_state}
    return cast(Output, make_model(cfg, rules).apply(variables, tokens_BS, **inputs))


def balance_alpha(cfg: ExperimentConfig) -> float:
    """Strength of the balance loss under the experiment's strategy."""
    return {
        "loss_free": cfg.balance.sequence_alpha,
        "aux_loss": cfg.balance.aux_alpha,
        "none": 0.0,
    }[cfg.balance.strategy]


def target_mask(segments_BS: jax.Array, *, isolate_documents: bool) -> jax.Array:
    """Positions `[B, T]` whose next token is a target: no padding, nothing that is only seen, no
    new document if asked."""
    mask_BT = segments_BS[..., 1:] > 0
    if isolate_documents:
        mask_BT &= segments_BS[..., 1:] == abs(segments_BS[..., :-1])
    return mask_BT


def isolated(segments_BT: jax.Array, *, isolate_documents: bool) -> jax.Array | None:
    """What attention is confined to: the document of each token, 0 for padding; None for the row.

    Tokens that are no targets but are seen have their document's number negated.
    """
    return abs(segments_BT) if isolate_documents else None


def positions(segments_BT: jax.Array, *, isolate_documents: bool) -> jax.Array:
    """Each token's place in what it can see: in the row, `[T]`, or in its document, `[B, T]`; of
    rows that devices share, of a device's own tokens."""
    if not isolate_documents:
        return zigzag.positions(segments_BT.shape[1])
    index_T = jnp.arange(segments_BT.shape[1])
    document_BT = abs(segments_BT)
    begins_BT = document_BT != jnp.roll(document_BT, 1, axis=1)
    start_BT = jax.lax.cummax(jnp.where(begins_BT, index_T, 0), axis=1)
    return zigzag.own(index_T - start_BT)


def forward(
    cfg: ExperimentConfig,
    params: Any,
    router_state: Any,
    tokens_BS: jax.Array,
    segments_BS: jax.Array,
    rules: ShardingRules | None = None,
    sink: Sink | None = None,
) -> Output:
    """Runs the network over training rows of T + 1 tokens."""
    inputs_BT = segments_BS[:, :-1]
    return apply_model(
        cfg,
        params,
        router_state,
        tokens_BS,
        rules,
        ahead=1,
        positions_T=positions(inputs_BT, isolate_documents=cfg.data.isolate_documents),
        segments_BT=isolated(inputs_BT, isolate_documents=cfg.data.isolate_documents),
        counted_BS=segments_BS != 0,
        sink=sink,
    )


def loss(
    cfg: ExperimentConfig,
    params: Any,
    router_state: Any,
    tokens_BS: jax.Array,
    segments_BS: jax.Array,
    scale: Scale,
    rules: ShardingRules | None = None,
    sink: Sink | None = None,
) -> tuple[jax.Array, LossParts]:
    """One micro-batch's share of the objective, and its parts for reporting.

    `sink` is as in `Transformer`.
    """
    out = forward(cfg, params, router_state, tokens_BS, segments_BS, rules, sink)
    depth = len(out.mtp_hidden)
    targets, weights, factors = targets_of(cfg, tokens_BS, segments_BS, scale)
    total, nll = linear_cross_entropy(
        jnp.concatenate([out.hidden_BTD, *out.mtp_hidden], axis=1),
        head_weight(cfg.model, cfg.numerics, params, rules or rules_of(cfg)),
        jnp.concatenate(targets, axis=1),
        jnp.concatenate([w * f for w, f in zip(weights, factors, strict=True)], axis=1),
    )
    nlls = shares_of(nll, weights)
    stats = out.stats
    balance = balance_alpha(cfg) * balance_of(cfg, stats).sum() / scale.n_sequences
    exchange = stats.exchange
    parts = LossParts(
        main=nlls[0],
        mtp=sum(nlls[1:], start=jnp.zeros(())) / max(depth, 1),
        balance=balance,
        load_LE=stats.load_E,
        overload=_mean(exchange.overload) * own_sequences(tokens_BS.shape[0]) / scale.n_sequences,
        extra_passes=exchange.extra_passes.sum(),
        dropped=exchange.dropped.sum(),
    )
    return total + balance, parts


def targets_of(
    cfg: ExperimentConfig, tokens_BS: jax.Array, segments_BS: jax.Array, scale: Scale
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Of the main model and each MTP module: targets and their shares `[B, T]`, and a factor.

    Where devices share rows, of a device's own positions.
    """
    targets_BT, depth = tokens_BS[:, 1:], cfg.model.mtp_depth
    mask_BT = target_mask(segments_BS, isolate_documents=cfg.data.isolate_documents)
    targets, weights = [targets_BT], [mask_BT / scale.n_targets]
    for k in range(1, depth + 1):
        targets.append(jnp.roll(targets_BT, -k, axis=1))
        weights.append(_mtp_mask(segments_BS, k, cfg.data.isolate_documents) / scale.n_targets)
    targets, weights = ([zigzag.own(x_BT) for x_BT in of] for of in (targets, weights))
    return targets, weights, [jnp.ones(())] + [scale.mtp_weight / max(depth, 1)] * depth


def own_sequences(n_rows: int) -> float:
    """How many of its rows are a device's own: its parts of those that devices share, together."""
    return n_rows / zigzag.n_devices()


def shares_of(nll_BT: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
    """The main model's cross-entropy and each module's, of `targets_of`'s weights and every
    position's likelihood, one after the other in `nll_BT`."""
    parts = jnp.split(nll_BT, len(weights), axis=1)
    return [jnp.sum(jnp.where(w > 0, w * n, 0)) for w, n in zip(weights, parts, strict=True)]


def balance_of(cfg: ExperimentConfig, stats: RouterStats) -> jax.Array:
    """Each router's balance loss of the kind that the experiment asks for, before its factor."""
    kinds = {"sequence": stats.balance_loss, "batch": stats.batch_balance_loss}
    return kinds[cfg.balance.loss_over]


def _mean(x_L: jax.Array) -> jax.Array:
    return x_L.sum() / max(x_L.shape[0], 1)


def _mtp_mask(segments_BS: jax.Array, depth: int, isolate_documents: bool) -> jax.Array:
    """Positions `[B, T]` at which MTP-`depth` has a target: token `i + depth + 1` of the row."""
    length = segments_BS.shape[1] - 1
    ahead_BT = jnp.roll(segments_BS, -(depth + 1), axis=1)[:, :length]
    mask_BT = (ahead_BT > 0) & (jnp.arange(length) < length - depth)
    if isolate_documents:
        mask_BT &= ahead_BT == abs(segments_BS[:, :length])
    return mask_BT


def eval_loss(
    cfg: ExperimentConfig,
    params: Any,
    router_state: Any,
    tokens_BS: jax.Array,
    segments_BS: jax.Array,
    rules: ShardingRules | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed next-token negative log-likelihood in nats and the number of targets, MTP left out;
    of rows that devices share, of a device's own positions."""
    inputs_BT = segments_BS[:, :-1]
    out = apply_model(
        cfg,
        params,
        router_state,
        tokens_BS[:, :-1],
        rules,
        positions_T=positions(inputs_BT, isolate_documents=cfg.data.isolate_documents),
        segments_BT=isolated(inputs_BT, isolate_documents=cfg.data.isolate_documents),
        counted_BS=inputs_BT != 0,
    )
    mask_BT = target_mask(segments_BS, isolate_documents=cfg.data.isolate_documents)
    mask_BT = zigzag.own(mask_BT)
    total, _ = linear_cross_entropy(
        out.hidden_BTD,
        head_weight(cfg.model, cfg.numerics, params, rules or rules_of(cfg)),
        zigzag.own(tokens_BS[:, 1:]),
        mask_BT.astype(jnp.float32),
    )
    return total, mask_BT.sum(dtype=jnp.int32)
