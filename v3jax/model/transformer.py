"""The whole network: embedding, dense blocks, MoE blocks, MTP modules (report sections 2.1, 2.2).

Stops at the hidden states: the output head meets them in `ops.loss` (training) or `head_logits`.
Dims: B batch, T time, D model, V vocabulary, L layers.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from v3jax.config import ModelConfig, NumericsConfig
from v3jax.model.block import rematerialised
from v3jax.model.layers import Module, columns_of, compute_dtype, whole
from v3jax.model.moe import RouterStats
from v3jax.model.mtp import MTPModule, known
from v3jax.ops import loss, zigzag
from v3jax.ops.accumulate import Sink, tapped
from v3jax.ops.attention import Tree
from v3jax.ops.embedding import embed
from v3jax.ops.expert_parallel import no_exchange
from v3jax.ops.norm import rms_norm
from v3jax.sharding import ShardingRules, constrain, manual_axes


@struct.dataclass
class Output:
    """Hidden states ready for the shared head, and the routers' statistics."""

    hidden_BTD: jax.Array
    """Main model, after the final norm."""
    mtp_hidden: tuple[jax.Array, ...]
    """One `[B, T, D]` for each MTP depth; the last k positions of depth k hold nothing of use."""
    stats: RouterStats
    """Stacked over layers: the MoE layers in order, then the MTP modules."""


_UNROLLED = 8


class Transformer(Module):
    @nn.compact
    def __call__(
        self,
        tokens_BS: jax.Array,
        *,
        ahead: int = 0,
        positions_T: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        counted_BS: jax.Array | None = None,
        tree: Tree | None = None,
        sink: Sink | None = None,
    ) -> Output:
        """Runs the network.

        Args:
          tokens_BS: int32 ids, `S = T + ahead`. Where devices share rows (`ops.zigzag`), these and
            the next two are of whole rows, and what comes out is of a device's own positions.
          ahead: 1 in training, where the row's last token is only looked ahead to: the MTP modules
            run. With 0 all tokens are inputs and the modules are left out.
          positions_T: of the inputs, a device's own, `[T]` or `[B, T]`; None: places in the row.
          segments_BT: confines attention to equal segments; None sees the whole row.
          counted_BS: bool; tokens that count in loads and the balance loss. None: all.
          tree: the rows hold token trees, for inference (`ahead` 0, no segments).
          sink: takes the gradients of the stacked layers, named as they are.
        """
        cfg = self.cfg
        init = nn.initializers.normal(cfg.init_std)
        if self.is_initializing():  # `head_weight` gives it to whoever needs logits
            self.parameter("lm_head", init, (cfg.dim, cfg.vocab_size), "embed", "vocab")
        final_norm = self.norm_weight("norm", cfg.dim)
        length = tokens_BS.shape[1] - ahead
        if positions_T is None:
            positions_T = zigzag.positions(length) if tree is None else tree.positions_BT
        if counted_BS is None:
            counted_BS = jnp.ones(tokens_BS.shape, bool)
        counted_BT = zigzag.own(counted_BS[:, :length])

        # One look-up serves the main model and the MTP modules, which share the embedding.
        window = zigzag.Window(length, cfg.mtp_depth if ahead else 0)
        embedded_BWD = self._embedded(window.tokens(tokens_BS))
        x_BTD = constrain(window.later(embedded_BWD, 0), self.rules, "batch", "seq", None)
        shared = (positions_T, segments_BT, counted_BT)
        if tree is not None:
            shared = (*shared, tree.ends_BT)
        stats = []
        if cfg.n_dense_layers:
            x_BTD, _ = self._layers("dense_layers", x_BTD, shared, sink)
        if cfg.n_moe_layers:
            x_BTD, moe_stats = self._layers("moe_layers", x_BTD, shared, sink)
            stats.append(moe_stats)
        hidden_BTD = rms_norm(x_BTD, final_norm, cfg.norm_eps)

        mtp_hidden = []
        h_BTD = hidden_BTD
        for depth in range(1, cfg.mtp_depth + 1 if ahead else 1):
            ahead_BTD = window.later(embedded_BWD, depth)
            known_BT = zigzag.own(known(counted_BS, depth))
            module = MTPModule(cfg, self.numerics, self.rules, name=f"mtp_layers_{depth - 1}")
            h_BTD, mtp_stats = module(h_BTD, ahead_BTD, positions_T, segments_BT, known_BT)
            mtp_hidden.append(h_BTD)
            stats.append(jax.tree.map(lambda a: a[None], mtp_stats))
        return Output(
            hidden_BTD=hidden_BTD,
            mtp_hidden=tuple(mtp_hidden),
            stats=_stack_stats(stats, cfg.n_experts),
        )

    def _embedded(self, tokens_BS: jax.Array) -> jax.Array:
        """The tokens' embeddings `[B, S, D]` in the compute type."""
        cfg, name, axes = self.cfg, "embed_tokens", ("vocab", "embed")
        shape, dtype = (cfg.vocab_size, cfg.dim), compute_dtype(self.numerics)
        if self.is_initializing() or self.rules.storage != "fsdp" or not manual_axes():
            init = nn.initializers.normal(cfg.init_std)
            return embed(self.parameter(name, init, shape, *axes), tokens_BS, dtype)
        columns = columns_of(shape, self.rules, *axes)
        return embed(self.get_variable("params", name), tokens_BS, dtype, columns)

    def _layers(
        self, name: str, x_BTD: jax.Array, shared: tuple[Any, ...], sink: Sink | None
    ) -> tuple[jax.Array, RouterStats | None]:
        """Runs stacked layers one after the other; their statistics are stacked too."""
        moe = name == "moe_layers"
        n_layers = self.cfg.n_moe_layers if moe else self.cfg.n_dense_layers
        # A few layers unrolled spare copying their activations in and out of the loop. Their
        # gradients are joined at once; in a loop each layer's goes into the sink by itself.
        unrolled = n_layers <= _UNROLLED
        block = rematerialised(self.numerics, in_scan=not unrolled)
        parts = (self.cfg, self.numerics, self.rules)
        if self.is_initializing():
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "router_state": 0},
                split_rngs={"params": True},
                in_axes=cast(Any, nn.broadcast),
                length=n_layers,
                metadata_params={nn.PARTITION_NAME: self.rules.layers},
            )
            return scanned(*parts, moe=moe, name=name)(x_BTD, *shared)
        layer = block(*parts, moe=moe, name=name, parent=None)
        variables = {kind: tree[name] for kind, tree in self.variables.items() if name in tree}
        own = None if sink is None else sink[name]
        if unrolled:
            variables["params"] = tapped(variables["params"], own)

        def one(x_BTD: jax.Array, stacked: Any) -> tuple[jax.Array, Any]:
            variables, n = stacked
            if not unrolled:
                variables = variables | {"params": tapped(variables["params"], own, n)}
            return cast(Any, layer.apply(variables, x_BTD, *shared))

        unroll = n_layers if unrolled else 1
        return jax.lax.scan(one, x_BTD, (variables, jnp.arange(n_layers)), unroll=unroll)


def _stack_stats(stats: list[RouterStats], n_experts: int) -> RouterStats:
    if not stats:
        nothing = jax.tree.map(lambda s: jnp.zeros((0,), s.dtype), no_exchange())
        return RouterStats(
            load_E=jnp.zeros((0, n_experts), jnp.int32),
            balance_loss=jnp.zeros((0,)),
            batch_balance_loss=jnp.zeros((0,)),
            exchange=nothing,
        )
    return jax.tree.map(lambda *a: jnp.concatenate(a), *stats)


def head_weight(
    cfg: ModelConfig, numerics: NumericsConfig, params: dict[str, Any], rules: ShardingRules
) -> jax.Array:
    """The output head `[D, V]` that main model and MTP modules share, whole."""
    if rules.storage != "fsdp":
        return params["lm_head"]
    shape, dtype = (cfg.dim, cfg.vocab_size), compute_dtype(numerics)
    return whole(params["lm_head"], shape, dtype, rules, "embed", "vocab")


def head_logits(params: dict[str, Any], hidden_BTD: jax.Array) -> jax.Array:
    """FP32 logits `[..., V]` of the output head."""
    return loss.logits(hidden_BTD, params["lm_head"])
