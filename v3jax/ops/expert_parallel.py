"""Routed experts spread over devices: two hops out, the experts, two hops back, none dropped.

Report section 3.2.2. Hop 1 crosses `node`, the slow network: a token travels once to each node
that hosts one of its experts, to the device at its own place there. Hop 2 fans out over the
fast network, `expert` and `context` together, one row for each choice, landing in expert order. On
the way back a node's results of a token are added up before they cross the slow network.

Shapes are static: receive buffers are `bound_factor` times as long as a balanced batch needs. When
routing is so uneven that rows would not fit, all devices agree to take the tokens in several
passes, every 2nd, 4th, ... at a time. The first pass keeps what its gradient needs, further ones
run again for theirs; where nothing is kept (full recompute) one loop runs them all.

`routed_experts` runs inside `jax.shard_map`, manual over `node`, `context` and `expert` at least.
Dims: N tokens of a device, D model, K choices, E experts, G nodes, H hops of a token over `node`,
Q classes of tokens, X devices (node x context x expert), L experts of a device, F expert width.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from v3jax import kernels
from v3jax.config import Fp8Config, ModelConfig, MoEConfig
from v3jax.kernels.grouped_matmul import Blocks
from v3jax.ops.dispatch import (
    Layout,
    block_rows,
    combine,
    dispatch,
    dispatch_gates,
    make_layout,
    n_blocks_for,
)
from v3jax.ops.exchange import Axis, Route, exchange, exchange_back, make_route
from v3jax.ops.fp8 import linear, wire
from v3jax.ops.fp8.quantize import Quantized
from v3jax.ops.gemm import grouped_matmul
from v3jax.ops.norm import swiglu
from v3jax.ops.precision import widen


@struct.dataclass
class ExchangeStats:
    """How the exchange of one layer and micro-batch went, seen from one group of devices that have
    all experts together."""

    extra_passes: jax.Array
    """Passes beyond the first, int32."""
    overload: jax.Array
    """Most rows that arrived at a device over the mean; FP32, 1 when balanced."""
    dropped: jax.Array
    """Choices dropped on this device in capacity mode, int32."""


def no_exchange() -> ExchangeStats:
    """The statistics of a device that has all experts."""
    zero = jnp.zeros((), jnp.int32)
    return ExchangeStats(extra_passes=zero, overload=jnp.ones(()), dropped=zero)


@dataclass(frozen=True)
class Plan:
    """Static sizes of one exchange."""

    n_tokens: int
    n_experts: int
    top_k: int
    n_nodes: int
    n_ranks: int
    """Devices of a node."""
    hops: int
    """Most nodes that a token travels to."""
    node_rows: int
    """Rows that hop 1 can bring to a device."""
    fan_rows: int
    """Rows that hop 2 can take from a device."""
    rank_rows: int
    """Rows that hop 2 can bring to a device."""
    max_passes: int
    """Passes after which the worst routing has gone through; a power of two."""
    fp8: Fp8Config | None = None
    """How experts multiply in FP8; None: in the type of their tokens."""

    @property
    def node_experts(self) -> int:
        return self.n_experts // self.n_nodes

    @property
    def rank_experts(self) -> int:
        return self.node_experts // self.n_ranks


def make_plan(
    model: ModelConfig,
    moe: MoEConfig,
    n_tokens: int,
    n_nodes: int,
    n_ranks: int,
    fp8: Fp8Config | None = None,
) -> Plan:
    """Sizes for `n_tokens` a device on `n_nodes` nodes of `n_ranks` devices.

    A token needs at most `top_groups` nodes if no node hosts part of a group only.
    """
    top_k, n_experts = model.top_k, model.n_experts
    whole_groups = model.n_groups % n_nodes == 0
    hops = min(top_k, n_nodes, model.top_groups if whole_groups else n_nodes)
    per_node = min(top_k, n_experts // n_nodes)
    per_rank = min(top_k, n_experts // (n_nodes * n_ranks))

    def bound(balanced: int, worst_of_one: int) -> int:
        """At least what one token of every device can need, never more than all can."""
        wanted = int(np.ceil(moe.bound_factor * balanced))
        return int(np.clip(wanted, worst_of_one, n_tokens * worst_of_one))

    node_rows = bound(n_tokens * hops, n_nodes) if n_nodes > 1 else n_tokens
    fan_rows = bound(n_tokens * top_k, n_nodes * per_node)
    rank_rows = bound(n_tokens * top_k, n_nodes * n_ranks * per_rank)
    passes = 1
    while passes < n_tokens:
        tokens = -(-n_tokens // passes)
        if (
            tokens * n_nodes <= node_rows
            and tokens * n_nodes * per_node <= fan_rows
            and tokens * n_nodes * n_ranks * per_rank <= rank_rows
        ):
            break
        passes *= 2
    return Plan(
        n_tokens=n_tokens,
        n_experts=n_experts,
        top_k=top_k,
        n_nodes=n_nodes,
        n_ranks=n_ranks,
        hops=hops,
        node_rows=node_rows,
        fan_rows=fan_rows,
        rank_rows=rank_rows,
        max_passes=passes,
        fp8=fp8,
    )


def routed_experts(
    model: ModelConfig,
    moe: MoEConfig,
    x_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    gate_up_LDF: jax.Array,
    down_LFD: jax.Array,
    *,
    fp8: Fp8Config | None = None,
    keep: bool = True,
    halves: bool = False,
) -> tuple[jax.Array, ExchangeStats]:
    """The gated sum of each token's experts, `[N, D]`, wherever they are.

    Args:
      x_ND: this device's tokens.
      experts_NK: their experts, int32, over all devices; each token's are distinct.
      gate_up_LDF, down_LFD: this device's experts, the `L` from `L * (node * ranks + rank)` on.
      fp8: how experts multiply in FP8, and tokens travel; else both in the tokens' type.
      keep: whether the first pass keeps what its gradient needs.
      halves: whether gradients of the experts' weights can be computed apart from the others, at
        the price of running extra passes forward for each.
    """
    n_nodes, n_ranks = lax.axis_size("node"), lax.axis_size(_fast())
    dropped = jnp.zeros((), jnp.int32)
    if moe.capacity_factor is not None:
        experts_NK, dropped = drop_beyond_capacity(experts_NK, model.n_experts, moe.capacity_factor)
    n_tokens, dim = x_ND.shape
    x_ND = x_ND.reshape(n_tokens, *row_shape(dim))
    chunks = np.array_split(np.arange(n_tokens), moe.dispatch_chunks)
    outs, stats = [], []
    for chunk in chunks:
        if not chunk.size:
            continue
        part = slice(int(chunk[0]), int(chunk[-1]) + 1)
        plan = make_plan(model, moe, chunk.size, n_nodes, n_ranks, fp8)
        out, stat = _all_passes(
            plan, keep, halves, x_ND[part], experts_NK[part], gates_NK[part], gate_up_LDF, down_LFD
        )
        outs.append(out)
        stats.append(stat)
    together = ExchangeStats(
        extra_passes=sum((s.extra_passes for s in stats), start=jnp.zeros((), jnp.int32)),
        overload=sum((s.overload for s in stats), start=jnp.zeros(())) / len(stats),
        dropped=dropped,
    )
    return jnp.concatenate(outs).reshape(n_tokens, dim), together


def _fast() -> Axis:
    """The mesh axes of hop 2."""
    axes = tuple(a for a in ("context", "expert") if lax.axis_size(a) > 1)
    return axes if len(axes) > 1 else (axes or ("expert",))[0]


def row_shape(dim: int) -> tuple[int, ...]:
    """The shape that a row of `D` numbers travels in.

    On TPU it is a whole number of tiles of memory, 8 x 128 each, so that rows lie one after the
    other: gathered and sent as they are, where rows of a matrix would be copied to this form.
    """
    tiled = kernels.platform() == "tpu" and dim % 1024 == 0
    return (8, dim // 8) if tiled else (dim,)


def drop_beyond_capacity(
    experts_NK: jax.Array, n_experts: int, factor: float
) -> tuple[jax.Array, jax.Array]:
    """Choices beyond an expert's capacity made choices of none (`n_experts`), and their number.

    The capacity is `factor` times the even share of a device's tokens; the first in order stay.
    """
    capacity = max(1, int(factor * experts_NK.size / n_experts))
    row_NK = make_layout(experts_NK, n_experts, 1).row_TK
    load_E = jnp.bincount(experts_NK.reshape(-1), length=n_experts)
    rank_NK = row_NK - (jnp.cumsum(load_E) - load_E)[experts_NK]
    kept_NK = rank_NK < capacity
    return jnp.where(kept_NK, experts_NK, n_experts), jnp.sum(~kept_NK, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _all_passes(
    plan: Plan,
    keep: bool,
    halves: bool,
    x_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    gate_up_LDF: jax.Array,
    down_LFD: jax.Array,
) -> tuple[jax.Array, ExchangeStats]:
    arrays = (x_ND, experts_NK, gates_NK, gate_up_LDF, down_LFD)
    return _all_passes_fwd(plan, keep, halves, *arrays)[0]


def _all_passes_fwd(
    plan: Plan,
    keep: bool,
    halves: bool,
    x_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    gate_up_LDF: jax.Array,
    down_LFD: jax.Array,
) -> tuple[tuple[jax.Array, ExchangeStats], Any]:
    n_passes, overload = _agree(plan, experts_NK)
    floats = (x_ND, gates_NK, gate_up_LDF, down_LFD)

    def one(p: jax.Array | int) -> Any:
        return _pass(plan, experts_NK, n_passes, p)

    pull = None
    if keep or plan.max_passes == 1:
        out_ND, pull = jax.vjp(one(0), *floats)
    else:
        out_ND = jnp.zeros_like(x_ND)
    if plan.max_passes > 1:
        out_ND = lax.fori_loop(
            0 if pull is None else 1, n_passes, lambda p, out_ND: out_ND + one(p)(*floats), out_ND
        )
    stats = ExchangeStats(
        extra_passes=n_passes - 1, overload=overload, dropped=jnp.zeros((), jnp.int32)
    )
    return (out_ND, stats), (pull, n_passes, experts_NK, floats)


def _all_passes_bwd(
    plan: Plan, keep: bool, halves: bool, residuals: Any, cotangents: Any
) -> tuple[Any, ...]:
    pull, n_passes, experts_NK, floats = residuals
    dout_ND = cotangents[0]
    gradients = jax.tree.map(jnp.zeros_like, floats) if pull is None else pull(dout_ND)

    def later_passes(which: slice) -> Any:
        def again(p: jax.Array, total: Any) -> Any:
            _, pull_again = jax.vjp(_pass(plan, experts_NK, n_passes, p), *floats)
            return jax.tree.map(jnp.add, total, pull_again(dout_ND)[which])

        return lax.fori_loop(0 if pull is None else 1, n_passes, again, gradients[which])

    if plan.max_passes > 1:
        parts = (slice(2), slice(2, None)) if halves else (slice(None),)
        gradients = tuple(g for part in parts for g in later_passes(part))
    dx_ND, dgates_NK, dgate_up_LDF, ddown_LFD = gradients
    return dx_ND, None, dgates_NK, dgate_up_LDF, ddown_LFD


_all_passes.defvjp(_all_passes_fwd, _all_passes_bwd)


def _agree(plan: Plan, experts_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many passes all devices that have the experts together take, and their overload.

    Passes are tried in powers of two: in `q` passes, pass `p` has the tokens `n` with `n % q == p`.
    """
    with jax.named_scope("agree_on_passes"):
        n_classes, n_devices = plan.max_passes, plan.n_nodes * plan.n_ranks
        device_NK = experts_NK // plan.rank_experts
        hits_NX = jnp.sum(device_NK[:, :, None] == jnp.arange(n_devices), axis=1, dtype=jnp.int32)
        padding = -plan.n_tokens % n_classes
        hits_NX = jnp.pad(hits_NX, ((0, padding), (0, 0)))
        choices_NG = hits_NX.reshape(hits_NX.shape[0], plan.n_nodes, -1).sum(-1)
        counts_N3 = jnp.concatenate(
            [(choices_NG > 0).astype(jnp.int32), choices_NG, hits_NX], axis=-1
        )
        counts_Q3 = counts_N3.reshape(-1, n_classes, counts_N3.shape[-1]).sum(0)
        # What meets at a device's place in each node, and what the places of a node bring together.
        if plan.n_nodes > 1:
            counts_Q3 = lax.psum(counts_Q3, "node")
        counts_RQ3 = lax.all_gather(counts_Q3, _fast())
        g = plan.n_nodes
        to_node, to_fan = counts_RQ3[..., :g], counts_RQ3[..., g : 2 * g]
        to_rank = counts_RQ3[..., 2 * g :].sum(0)

        def most(counts: jax.Array, passes: int) -> jax.Array:
            """The largest count of any pass, device and destination."""
            lead = counts.shape[:-2]
            folded = counts.reshape(*lead, n_classes // passes, passes, counts.shape[-1])
            return folded.sum(-3).max()

        tried = [2**i for i in range(n_classes.bit_length())]
        fits = jnp.stack(
            [
                (most(to_node, q) <= plan.node_rows)
                & (most(to_fan, q) <= plan.fan_rows)
                & (most(to_rank, q) <= plan.rank_rows)
                for q in tried
            ]
        )
        n_passes = jnp.array(tried, jnp.int32)[jnp.argmax(fits.at[-1].set(True))]
        rows_X = to_rank.sum(0).astype(jnp.float32)
        return n_passes, rows_X.max() / jnp.maximum(rows_X.mean(), 1e-9)


def _pass(plan: Plan, experts_NK: jax.Array, n_passes: jax.Array, p: jax.Array | int) -> Any:
    """The exchange and the experts of the tokens of one pass, a function of the float arrays."""
    mine_N1 = (jnp.arange(plan.n_tokens) % n_passes == p)[:, None]
    chosen_NK = jnp.where(mine_N1, experts_NK, plan.n_experts)

    def run(
        x_ND: jax.Array, gates_NK: jax.Array, gate_up_LDF: jax.Array, down_LFD: jax.Array
    ) -> jax.Array:
        rows = Rows(x_ND)
        if plan.n_nodes == 1:
            return _within_node(plan, rows, chosen_NK, gates_NK, gate_up_LDF, down_LFD)
        # ---- Hop 1: one row a token and node
        node_NH = target_nodes(plan, chosen_NK)
        layout = make_layout(node_NH, plan.n_nodes, 1, partial=True)
        route, _ = make_route(layout.load_E, "node", n_sent=node_NH.size, n_blocks=plan.node_rows)
        rows = _send(rows, layout, route, plan.fp8)
        gates_MK = exchange(dispatch(gates_NK, layout), route)
        # 0 on rows where nothing arrived: numbers travel one higher.
        chosen_MK = exchange(dispatch(chosen_NK + 1, layout), route) - 1
        first = lax.axis_index("node") * plan.node_experts
        local_MK = chosen_MK - first
        here_MK = (chosen_MK >= first) & (local_MK < plan.node_experts)
        local_MK = jnp.where(here_MK, local_MK, plan.node_experts)
        out_MD = _within_node(plan, rows, local_MK, gates_MK, gate_up_LDF, down_LFD)
        return _send_back(out_MD, layout, route, plan.fp8)

    return run


def target_nodes(plan: Plan, chosen_NK: jax.Array) -> jax.Array:
    """The distinct nodes of each token's experts, `[N, H]` rising; `n_nodes` fills up."""
    node_NK = chosen_NK // plan.node_experts
    hit_NG = jnp.any(node_NK[:, :, None] == jnp.arange(plan.n_nodes), axis=1)
    best_NH = lax.top_k(jnp.where(hit_NG, plan.n_nodes - jnp.arange(plan.n_nodes), 0), plan.hops)[0]
    return plan.n_nodes - best_NH


@struct.dataclass
class Rows:
    """Tokens on their way to experts."""

    x: jax.Array
    q: Quantized | None = None
    """What travels in place of `x`, which then only takes the gradient."""


def _send(
    rows: Rows, layout: Layout, route: Route | None, fp8: Fp8Config | None, *, last: bool = False
) -> Rows:
    """To the rows of their experts, on this device or where `route` leads; `last` if they stay."""
    if fp8 is not None and fp8.dispatch == "fp8":
        x, q = wire.send(rows.x, layout, route, _wire_recipe(fp8), rows.q, last=last)
        return Rows(x, q)
    x = dispatch(rows.x, layout)
    if route is not None:
        x = exchange(x, route, False)
    return Rows(checkpoint_name(x, "dispatched") if last else x)


def _send_back(
    out: jax.Array, layout: Layout, route: Route | None, fp8: Fp8Config | None
) -> jax.Array:
    """The mirror of `_send`: each token's rows added up."""
    if fp8 is not None and fp8.dispatch == "fp8":
        return wire.send_back(out, layout, route, _wire_recipe(fp8))
    return combine(out if route is None else exchange_back(out, route, False), layout)


def _wire_recipe(fp8: Fp8Config) -> linear.Recipe:
    return linear.recipe(fp8, exact=True, exact_gradient=True)


def _within_node(
    plan: Plan,
    rows: Rows,
    local_MK: jax.Array,
    gates_MK: jax.Array,
    gate_up_LDF: jax.Array,
    down_LFD: jax.Array,
) -> jax.Array:
    """Rows to the experts of this node, numbered from 0, and their weighted sums back."""
    block = block_rows(plan.n_tokens * plan.top_k, plan.rank_experts)
    if plan.fp8 is not None:
        block = plan.fp8.tile  # rows that share scales
    if plan.n_ranks == 1:
        layout = make_layout(
            local_MK, plan.node_experts, block, partial=True, max_choices=plan.rank_rows
        )
        gates = dispatch_gates(gates_MK, layout)
        sent = _send(rows, layout, None, plan.fp8)
        out = _experts(sent, gates, gate_up_LDF, down_LFD, layout.blocks, plan.fp8)
        return _send_back(out, layout, None, plan.fp8)
    # ---- Hop 2: one row a choice, landing in expert order
    layout = make_layout(local_MK, plan.node_experts, 1, partial=True, max_choices=plan.fan_rows)
    route, blocks = make_route(
        layout.load_E,
        _fast(),
        n_sent=layout.token_N.shape[0],
        n_blocks=n_blocks_for(plan.rank_rows, plan.rank_experts, block),
        block=block,
        balanced_rows=plan.n_tokens * plan.top_k,
    )
    sent = _send(rows, layout, route, plan.fp8, last=True)
    gates = exchange(dispatch_gates(gates_MK, layout), route)
    out = _experts(sent, gates, gate_up_LDF, down_LFD, blocks, plan.fp8)
    return _send_back(out, layout, route, plan.fp8)


def _experts(
    rows: Rows,
    gates_N: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    blocks: Blocks,
    fp8: Fp8Config | None,
) -> jax.Array:
    """Two grouped products with the gated SwiGLU between them."""
    shape = rows.x.shape
    x_ND, q = jax.tree.map(lambda x: x.reshape(shape[0], -1), (rows.x, rows.q))
    if fp8 is not None:
        to, back = linear.recipe(fp8, exact=True), linear.recipe(fp8, exact_gradient=True)
        hidden = linear.grouped_linear(x_ND, gate_up, blocks, to, q)
        return linear.grouped_swiglu_linear(hidden, gates_N, down, blocks, back).reshape(shape)
    hidden = grouped_matmul(x_ND, gate_up, blocks)
    hidden = swiglu(checkpoint_name(hidden, "gate_up"))
    hidden = (widen(hidden) * gates_N[:, None]).astype(x_ND.dtype)
    return grouped_matmul(hidden, down, blocks).reshape(shape)


def experts_here(
    n_experts: int,
    x_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    gate_up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    fp8: Fp8Config | None = None,
    partial: bool = False,
) -> jax.Array:
    """As `routed_experts` where all experts are on this device."""
    block = None if fp8 is None else fp8.tile
    layout = make_layout(experts_NK, n_experts, block, partial=partial)
    gates_N = dispatch_gates(gates_NK, layout)
    sent = _send(Rows(x_ND), layout, None, fp8)
    out = _experts(sent, gates_N, gate_up_EDF, down_EFD, layout.blocks, fp8)
    return _send_back(out, layout, None, fp8)
