"""One step through a pipeline: one program, which every rank runs (report section 3.2.1).

A loop over the ticks of a step's `Orders`. In each, messages of the tick before arrive, embeddings
are looked up for what enters, every rank runs its operations, and losses are taken of what came
out. Only the operations differ between ranks; everything that all ranks take part in, messages, the
embedding and the head, whose vocabulary is split over the ranks, stands outside of what differs. A
rank's layers run in a loop over its slots, a forward and a backward pass side by side if a tick has
both, so that the exchange of tokens of one can run beside the products of the other (figure 4).
Their backward pass is in two halves (`split`); the dense layers and the MTP modules, of which only
the ends have any, run again in one.
Dims: S ticks, M micro-batches, B sequences, T positions, W looked up of a row (`ops.zigzag`),
D model, N slots of a rank's layers, Q of a chunk, K MTP modules, V vocabulary, v a rank's part of
it, L MoE layers, E experts.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from v3jax import kernels, objective, sharding
from v3jax.config import ExperimentConfig
from v3jax.model.layers import compute_dtype, master_dtype, type_of
from v3jax.objective import LossParts, Scale
from v3jax.ops.embedding import add_to_split, embed_split
from v3jax.ops.loss import split_head_gradients, split_head_nll
from v3jax.pipeline.placement import from_ranks, to_ranks
from v3jax.pipeline.plan import NAMES, Orders, Plan
from v3jax.pipeline.stage import Stage
from v3jax.pipeline.table import FORWARD, INPUTS, WEIGHTS
from v3jax.sharding import ShardingRules

_AXIS = "pipe"


@dataclass(frozen=True)
class Weights:
    """What a rank computes with, in the types of computation."""

    layers_N: Any
    """Its MoE layers, stacked."""
    ends: Any
    """`dense_layers`, `norm` and `mtp_layers_*`, which every rank has."""
    embed_vD: jax.Array
    """Its part of the vocabulary."""
    head_Dv: jax.Array


def gather(
    cfg: ExperimentConfig, rules: ShardingRules, plan: Plan, specs: Any, places: Any, params: Any
) -> Weights:
    """A rank's weights from the stored parts of all, inside `jax.shard_map`."""

    def whole(path: Any, p: jax.Array, spec: Any, place: Any) -> jax.Array:
        dtype = type_of(jax.tree_util.keystr(path), cfg.numerics)
        if path[0].key == "moe_layers":
            return to_ranks(p, spec, place, plan.layout, rules, dtype)
        return sharding.gather(p, spec, place, rules, dtype)

    found = jax.tree_util.tree_map_with_path(whole, params, specs, places)
    ends = {k: v for k, v in found.items() if k not in ("moe_layers", "embed_tokens", "lm_head")}
    return Weights(found["moe_layers"], ends, found["embed_tokens"], found["lm_head"])


def step_gradients(
    cfg: ExperimentConfig,
    rules: ShardingRules,
    plan: Plan,
    specs: Any,
    places: Any,
    params: Any,
    router_state: Any,
    tokens_MBS: jax.Array,
    segments_MBS: jax.Array,
    orders: Orders,
    scale: Scale,
) -> tuple[Any, LossParts]:
    """The batch's FP32 gradients, the stored part of them, and this device's share of the loss's
    parts, inside `jax.shard_map`, manual over all axes of the mesh.

    Args:
      specs, places: where parameters are computed with and stored, of the tree `params`.
    """
    weights = gather(cfg, rules, plan, specs, places, params)
    program = Program(
        cfg, rules, plan, weights, router_state, tokens_MBS, segments_MBS, orders, scale
    )
    found, parts = program.run()
    gradients = found["ends"] | {"embed_tokens": found["embed"], "lm_head": found["head"]}
    reduced = {
        name: jax.tree.map(
            lambda g, spec, place: sharding.reduce(g, spec, place, rules),
            gradient,
            specs[name],
            places[name],
        )
        for name, gradient in gradients.items()
    }
    n_layers = cfg.model.n_moe_layers
    reduced["moe_layers"] = jax.tree.map(
        lambda g, spec, place: from_ranks(g, spec, place, plan.layout, n_layers, rules),
        found["layers"],
        specs["moe_layers"],
        places["moe_layers"],
    )
    return reduced, parts


class Program:
    """What a rank does, inside `jax.shard_map`, manual over all axes of the mesh.

    Args:
      orders: the rank's own column of them.
    """

    def __init__(
        self,
        cfg: ExperimentConfig,
        rules: ShardingRules,
        plan: Plan,
        weights: Weights,
        router_state: Any,
        tokens_MBS: jax.Array,
        segments_MBS: jax.Array,
        orders: Orders,
        scale: Scale,
    ) -> None:
        self.cfg, self.plan, self.orders = cfg, plan, orders
        self.weights, self.scale = weights, scale
        self.tokens_MBS, self.segments_MBS = tokens_MBS, segments_MBS
        self.rank = jax.lax.axis_index(_AXIS)
        self.dtype = compute_dtype(cfg.numerics)
        self.wide = master_dtype(cfg.numerics)
        self.depth = cfg.model.mtp_depth
        self.alpha = objective.balance_alpha(cfg) / scale.n_sequences.astype(self.wide)
        self.on_cpu = kernels.platform() == "cpu"
        # Weights have been gathered for the step.
        own = replace(rules, storage="whole", halves=plan.backward)
        self.stage = Stage(cfg, own, weights.layers_N, router_state, segments_MBS.shape[1:])
        self.x_shape, self.row_shape = self.stage.shapes
        if not plan.masked:
            self.stage.check(weights.ends)

    def looked_up_of(self, micro: jax.Array) -> jax.Array:
        """The tokens `[B, W]` of a micro-batch that this device looks up."""
        return self.stage.window.tokens(self.tokens_MBS[micro])

    def filled(self, x_BTD: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, W, D]`."""
        return self.stage.window.filled(x_BTD, self.tokens_MBS.shape[2])

    def inputs_of(self, row_BWD: jax.Array) -> jax.Array:
        """`filled`'s mirror."""
        return self.stage.window.later(row_BWD, 0)

    # ---- The loop

    def run(self) -> tuple[Any, LossParts]:
        """This rank's gradients, `layers`, `ends`, `embed` and `head` as `Weights` has them, and
        its share of the loss's parts; shares of all ranks add up to the devices' own rows'. Of a
        plan without backward passes there are no gradients."""

        def tick(t: jax.Array, state: Any) -> Any:
            orders = self.orders
            field = {name: array_SR[t, 0] for name, array_SR in orders.ranks.items()}
            ends = {name: array_SD[t] for name, array_SD in orders.ends.items()}
            return self._tick(state, field, ends, orders.any_S[t])

        state = jax.lax.fori_loop(0, self.orders.n_ticks, tick, self._start())
        return state.get("gradients"), state["parts"]

    def _start(self) -> Any:
        slots, model = self.plan.slots, self.cfg.model
        x = jnp.zeros(self.x_shape, self.dtype)
        row = jnp.zeros(self.row_shape, self.dtype)
        hidden = jnp.zeros((1 + self.depth, *self.x_shape), self.dtype)
        per_chunk = self.plan.layout.layers_RCQ.shape[-1]
        spare = int(self.plan.masked)  # for what was computed and not asked for

        def pool(n: int, shapes: Any, *lead: int) -> Any:
            return jax.tree.map(lambda a: jnp.zeros((n, *lead, *a.shape), a.dtype), shapes)

        zero = jnp.zeros((), self.wide)
        n_routers = model.n_moe_layers + model.mtp_depth
        state = {
            "x": pool(slots["x"] + 1, x),
            "sent_x": x,
            "hidden": hidden,
            "parts": LossParts(
                main=zero,
                mtp=zero,
                balance=zero,
                load_LE=jnp.zeros((n_routers, model.n_experts), jnp.int32),
                overload=jnp.zeros(()),
                extra_passes=jnp.zeros((), jnp.int32),
                dropped=jnp.zeros((), jnp.int32),
            ),
        }
        if not self.plan.backward:
            return state
        weights = self.weights
        named = {
            "layers": weights.layers_N,
            "ends": weights.ends,
            "embed": weights.embed_vD,
            "head": weights.head_Dv,
        }
        saved = slots["saved"] + spare
        return state | {
            "g": pool(slots["g"] + 1, x),
            "loss": pool(slots["loss"] + 1, hidden),
            "saved": pool(saved, self.stage.layer.saved, per_chunk),
            # What the ends run again: the first stage from its input, the last from its output.
            "end": pool(saved, row),
            "found": pool(slots["found"] + spare, self.stage.layer.found, per_chunk),
            "sent_g": x,
            "of_row": row,
            "gradients": jax.tree.map(lambda a: jnp.zeros(a.shape, self.wide), named),
        }

    def _tick(self, state: Any, field: Any, ends: Any, together: jax.Array) -> Any:
        state, done = self._arrived(state, field)
        rows = {}
        for name in self._looks_up:
            rows[name], done = self._looked_up(self.after(done, ends[name]))
        run = self.after(done, field["run"])
        does = {bit: run & bit > 0 for bit in (FORWARD, INPUTS, WEIGHTS)}
        some = {bit: self.after(done, together) & bit > 0 for bit in does}
        here = {name: self.after(done, micro_D) for name, micro_D in ends.items()}
        side = _Side(self, field, here, does, some)
        x_BTD = side.forward_in(state, rows["enter"])
        if not self.plan.backward:
            x_BTD, parts = side.forward_alone(x_BTD, state["parts"])
            state = side.forward_out(state | {"parts": parts}, x_BTD, rows)
            return self._losses(state, field, self.after(state["hidden"], ends["loss"]))
        state, g_BTD = side.backward_in(state, rows, x_BTD)
        carried = {name: state[name] for name in ("saved", "found", "parts")}
        carried |= {"x": x_BTD, "g": g_BTD, "layers": state["gradients"]["layers"]}
        carried = side.through_layers(carried)
        gradients = state["gradients"] | {"layers": carried["layers"]}
        state |= {name: carried[name] for name in ("saved", "found", "parts")}
        state |= {"gradients": gradients}
        state = side.backward_out(state, carried["g"])
        state = side.forward_out(state, carried["x"], rows)
        state = self._losses(state, field, self.after(state["hidden"], ends["loss"]))
        done = state["gradients"]["head"]
        return self._embedding_gradients(state, {k: self.after(done, v) for k, v in ends.items()})

    def after(self, done: jax.Array, number: jax.Array) -> jax.Array:
        """An integer that cannot be read before an array has been computed.

        XLA runs what does not depend on each other at once on CPU, collectives in branches and
        loops too, and mixes up those of one kind; elsewhere they run in the program's order.
        """
        if not self.on_cpu:
            return number
        nothing = jnp.minimum(self.orders.n_micro, 0)  # which the compiler does not know to be 0
        return number + (done.ravel()[0].astype(jnp.int32) & nothing)

    @property
    def _looks_up(self) -> tuple[str, ...]:
        if not self.plan.backward:
            return ("enter",)
        return ("enter", "loss", "back") if self.depth else ("enter",)

    # ---- What all ranks do together

    def _arrived(self, state: Any, field: Any) -> tuple[Any, jax.Array]:
        """What the neighbours have sent is put into its slots; and the last of it."""
        n_ranks = self.plan.n_ranks
        pairs = {
            "left": [(r, r + 1) for r in range(n_ranks - 1)],
            "right": [(r + 1, r) for r in range(n_ranks - 1)],
        }
        done = state["sent_x"]
        for name in sorted(self.plan.sides):
            what, _, side = name.partition("_")
            got = state[f"sent_{what}"]
            if side in pairs:
                if self.on_cpu:
                    got = jnp.where(self.after(done, jnp.int32(0)) == 0, got, 0)
                got = done = jax.lax.ppermute(got, _AXIS, pairs[side])
            state = state | {what: put(state[what], field[name], got)}
        return state, done

    def _looked_up(self, micro_D: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Embeddings `[B, W, D]` of each direction's micro-batch, zeros if there is none; and the
        last of them."""
        zeros = jnp.zeros(self.row_shape, self.dtype)

        def look_up(micro: jax.Array) -> jax.Array:
            return embed_split(self.weights.embed_vD, self.looked_up_of(micro), self.dtype, _AXIS)

        rows: list[jax.Array] = []
        with jax.named_scope("pipeline_one_of"):
            for d in range(len(self.plan.paths)):
                micro = self.after(rows[-1], micro_D[d]) if rows else micro_D[d]
                rows.append(jax.lax.cond(micro >= 0, look_up, lambda _: zeros, micro))
        return rows, rows[-1]

    def _losses(self, state: Any, field: Any, micro_D: jax.Array) -> Any:
        """The loss of what has come out of the last stages, and its gradients to their slots."""
        for d, path in enumerate(self.plan.paths):
            rank = path[-1].rank

            def run(state: Any, micro: jax.Array, rank: int = rank) -> Any:
                return self._loss(state, field, micro, self.rank == rank)

            with jax.named_scope("pipeline_one_of"):
                state = jax.lax.cond(micro_D[d] >= 0, run, lambda s, m: s, state, micro_D[d])
        return state

    def _loss(self, state: Any, field: Any, micro: jax.Array, mine: jax.Array) -> Any:
        hidden = jax.lax.psum(jnp.where(mine, state["hidden"], 0), _AXIS)
        targets, weights, factors = objective.targets_of(
            self.cfg, self.tokens_MBS[micro], self.segments_MBS[micro], self.scale
        )
        joined = jnp.concatenate(list(hidden), axis=1)
        all_targets = jnp.concatenate(targets, axis=1)
        head_Dv = self.weights.head_Dv
        if self.plan.backward:
            weighted = [w * f for w, f in zip(weights, factors, strict=True)]
            nll, of_joined, of_head = split_head_gradients(
                joined, head_Dv, all_targets, jnp.concatenate(weighted, axis=1), _AXIS
            )
            of_hidden = jnp.stack(jnp.split(of_joined, self.depth + 1, axis=1))
            gradients = state["gradients"]
            state = state | {
                "loss": put(state["loss"], jnp.where(mine, field["loss"], -1), of_hidden),
                "gradients": gradients | {"head": gradients["head"] + of_head},
            }
        else:
            nll = split_head_nll(joined, head_Dv, all_targets, _AXIS)
        # On one rank, as all have the same.
        nlls = [jnp.where(mine, n, 0) for n in objective.shares_of(nll, weights)]
        mtp = sum(nlls[1:], start=jnp.zeros(())) / max(self.depth, 1)
        parts: LossParts = state["parts"]
        return state | {"parts": replace(parts, main=parts.main + nlls[0], mtp=parts.mtp + mtp)}

    def _embedding_gradients(self, state: Any, ends: Any) -> Any:
        """Gradients of the rows that entered, and of those that MTP modules looked ahead to."""
        of_entered = self.filled(state["sent_g"])
        of_vD = state["gradients"]["embed"]
        for d, path in enumerate(self.plan.paths):
            of_vD = self._added_rows(of_vD, of_entered, path[0].rank, ends["leave"][d])
            if self.depth:
                of_vD = self._added_rows(of_vD, state["of_row"], path[-1].rank, ends["back"][d])
        return state | {"gradients": state["gradients"] | {"embed": of_vD}}

    def _added_rows(
        self, of_vD: jax.Array, rows_BWD: jax.Array, rank: int, micro: jax.Array
    ) -> jax.Array:
        """The embedding's gradient with that of a micro-batch's rows, which one rank has."""

        def run(of_vD: jax.Array) -> jax.Array:
            rows = jax.lax.psum(jnp.where(self.rank == rank, rows_BWD, 0), _AXIS)
            return add_to_split(of_vD, self.looked_up_of(micro), rows, _AXIS)

        with jax.named_scope("pipeline_one_of"):
            return jax.lax.cond(micro >= 0, run, lambda x: x, of_vD)


@dataclass(frozen=True)
class _Side:
    """A rank's own operations of one tick: what may differ from the other ranks'."""

    program: Program
    field: Mapping[str, jax.Array]
    ends: Mapping[str, jax.Array]
    does: Mapping[int, jax.Array]
    """Bits of `run` that are set for this rank."""
    some: Mapping[int, jax.Array]
    """Bits that are set for any rank."""

    def branch(
        self,
        name: str,
        mine: Any,
        ours: Any,
        run: Callable[..., Any],
        skip: Callable[..., Any],
        *operands: Any,
    ) -> Any:
        """`run(True, ...)` if this rank is to, else `skip(...)`. Masked: if any rank is to,
        `run(mine, ...)`, which has to give what `skip` does where `mine` is false."""
        masked = self.program.plan.masked
        own = mine if masked else True
        with jax.named_scope(f"pipeline_{name}"):
            asked = ours if masked else mine
            return jax.lax.cond(asked, functools.partial(run, own), skip, *operands)

    def at(self, kind: str, which: int) -> tuple[jax.Array, jax.Array]:
        """Whether an operation's chunk is its direction's first (0) or last (-1) stage; on any
        rank."""
        chunk, places = self.field[f"{kind}_chunk"], [p[which] for p in self.program.plan.paths]
        rank = self.program.rank
        mine = jnp.any(jnp.stack([(rank == p.rank) & (chunk == p.chunk) for p in places]))
        name = {("f", 0): "enter", ("f", -1): "loss", ("i", -1): "back", ("i", 0): "leave"}
        return mine, jnp.any(self.ends[name[kind, which]] >= 0)

    def segments(self, kind: str) -> jax.Array:
        return self.program.segments_MBS[jnp.maximum(self.field[f"{kind}_micro"], 0)]

    def of_end(self, rows: list[jax.Array], kind: str) -> jax.Array:
        """The row of the direction that an operation's chunk belongs to."""
        if len(rows) == 1:
            return rows[0]
        return jnp.where(self.field[f"{kind}_chunk"] > 0, rows[1], rows[0])

    # ---- Forward

    def forward_in(self, state: Any, entering: list[jax.Array]) -> jax.Array:
        """The input of the chunk's MoE layers."""
        stage, ends = self.program.stage, self.program.weights.ends
        mine, ours = self.at("f", 0)
        segments_BS = self.segments("f")
        embedded_BTD = self.program.inputs_of(self.of_end(entering, "f"))
        return self.branch(
            "first_forward",
            mine & self.does[FORWARD],
            ours,
            lambda own, x: chosen(own, stage.dense(ends, embedded_BTD, segments_BS), x),
            lambda x: x,
            get(state["x"], self.field["f_x"]),
        )

    def forward_out(self, state: Any, y_BTD: jax.Array, rows: Mapping[str, Any]) -> Any:
        """What a chunk's forward pass leaves, with the MTP modules' on the last stage."""
        program = self.program
        stage, ends = program.stage, program.weights.ends
        segments_BS = self.segments("f")
        last, ours = self.at("f", -1)
        ahead = self.of_end(rows["loss"], "f") if program.depth else jnp.zeros(())

        def out(y: jax.Array) -> Any:
            return stage.out(ends, y, ahead, segments_BS)

        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(out, y_BTD))
        does = self.does[FORWARD]
        (hidden, balance), stats = self.branch(
            "last_forward",
            last & does,
            ours,
            lambda own, y: chosen(own, out(y), nothing),
            lambda y: nothing,
            y_BTD,
        )
        parts: LossParts = state["parts"]
        for k, stat in enumerate(stats):
            parts = program.stage.counted(
                parts, program.scale, program.cfg.model.n_moe_layers + k, stat
            )
        parts = replace(parts, balance=parts.balance + program.alpha * balance)
        state = state | {"parts": parts, "hidden": hidden, "sent_x": y_BTD}
        if not program.plan.backward:
            return state
        first, _ = self.at("f", 0)
        row = jnp.where(first, self.of_end(rows["enter"], "f"), program.filled(y_BTD))
        end = self.branch(
            "keep",
            does,
            self.some[FORWARD],
            lambda _, pool: put(pool, self.field["f_saved"], row),
            lambda pool: pool,
            state["end"],
        )
        return state | {"end": end}

    def forward_alone(self, x_BTD: jax.Array, parts: LossParts) -> tuple[jax.Array, LossParts]:
        """The MoE layers of a chunk without anything kept of them."""
        program = self.program

        def one(carried: Any, q: jax.Array) -> tuple[Any, None]:
            slot, filled = self._slot("f", q)

            def run(own: Any, carried: Any) -> Any:
                x_BTD, parts = carried
                y_BTD, balance, stats = program.stage.forward_alone(slot, x_BTD, self.segments("f"))
                return chosen(own, (y_BTD, self._with_layer(parts, slot, balance, stats)), carried)

            does, some = self.does[FORWARD] & filled, self.some[FORWARD]
            return self.branch("forward", does, some, run, lambda c: c, carried), None

        n_slots = program.plan.layout.layers_RCQ.shape[-1]
        return jax.lax.scan(one, (x_BTD, parts), jnp.arange(n_slots))[0]

    # ---- Backward

    def backward_in(
        self, state: Any, rows: Mapping[str, Any], x_BTD: jax.Array
    ) -> tuple[Any, jax.Array]:
        """The gradient of the output of the chunk's MoE layers, after `forward_in` has given x."""
        program = self.program
        stage, depth = program.stage, program.depth
        segments_BS = self.segments("i")
        y_BTD = program.inputs_of(get(state["end"], self.field["i_saved"]))
        ahead = self.of_end(rows["back"], "i") if depth else jnp.zeros(())
        from_neighbour = get(state["g"], self.field["i_g"])
        nothing = jnp.zeros(program.row_shape, program.dtype)

        def from_loss(own: Any, gradients: Any) -> Any:
            def out(ends: Any, y: jax.Array, row: jax.Array) -> Any:
                return stage.out(ends, y, row, segments_BS)[0]

            _, pull = jax.vjp(out, program.weights.ends, y_BTD, ahead)
            of_hidden = get(state["loss"], self.field["i_loss"])
            of_ends, g_BTD, of_row = pull((of_hidden, program.alpha))
            gradients = added(gradients, of_ends, own)
            return gradients, chosen(own, g_BTD, from_neighbour), of_row if depth else nothing

        mine, ours = self.at("i", -1)
        now = self.program.after(x_BTD, jnp.int32(0)) == 0
        mine, ours = mine & now, ours & now
        of_ends, g_BTD, of_row = self.branch(
            "last_backward",
            mine & self.does[INPUTS],
            ours,
            from_loss,
            lambda gradients: (gradients, from_neighbour, nothing),
            state["gradients"]["ends"],
        )
        gradients = state["gradients"] | {"ends": of_ends}
        return state | {"gradients": gradients, "of_row": of_row}, g_BTD

    def backward_out(self, state: Any, g_BTD: jax.Array) -> Any:
        """The gradient of the chunk's input, through the dense layers on the first stage."""
        program = self.program
        segments_BS = self.segments("i")
        x_BTD = program.inputs_of(get(state["end"], self.field["i_saved"]))

        def through_dense(own: Any, gradients: Any, g_BTD: jax.Array) -> Any:
            _, pull = jax.vjp(
                lambda ends, x: program.stage.dense(ends, x, segments_BS),
                program.weights.ends,
                x_BTD,
            )
            of_ends, of_x = pull(g_BTD)
            return added(gradients, of_ends, own), chosen(own, of_x, g_BTD)

        mine, ours = self.at("i", 0)
        of_ends, g_BTD = self.branch(
            "first_backward",
            mine & self.does[INPUTS],
            ours,
            through_dense,
            lambda e, g: (e, g),
            state["gradients"]["ends"],
            g_BTD,
        )
        gradients = state["gradients"] | {"ends": of_ends}
        return state | {"gradients": gradients, "sent_g": g_BTD}

    # ---- MoE layers

    def through_layers(self, carried: Any) -> Any:
        """The layers of the chunk that runs forward, first to last, and those of the chunk that
        runs backward, last to first, side by side."""
        n_slots = self.program.plan.layout.layers_RCQ.shape[-1]

        def one(carried: Any, q: jax.Array) -> tuple[Any, None]:
            return self._layers(carried, q, n_slots - 1 - q), None

        return jax.lax.scan(one, carried, jnp.arange(n_slots))[0]

    def _layers(self, carried: Any, q: jax.Array, back_q: jax.Array) -> Any:
        asked = []
        for bit, operation, kind, at in (
            (INPUTS, self._inputs, "i", back_q),
            (WEIGHTS, self._weights, "w", back_q),
            (FORWARD, self._forward, "f", q),
        ):
            slot, filled = self._slot(kind, at)
            asked.append((bit, self.does[bit] & filled, functools.partial(operation, slot, at)))

        def one_by_one(carried: Any) -> Any:
            for bit, does, run in asked:
                name = NAMES[bit]
                carried = self.branch(name, does, self.some[bit], run, lambda c: c, carried)
            return carried

        def side_by_side(carried: Any) -> Any:
            # Nothing of one pass rests on the other: the compiler may run them in any order.
            for _, _, run in asked:
                carried = run(True, carried)
            return carried

        exchanges = self.program.cfg.mesh.token_shards > 1
        if self.program.plan.masked or (self.program.on_cpu and exchanges):  # see `Program.after`
            return one_by_one(carried)
        every = asked[0][1] & asked[1][1] & asked[2][1]
        with jax.named_scope("pipeline_pair"):
            return jax.lax.cond(every, side_by_side, one_by_one, carried)

    def _slot(self, kind: str, q: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """Where a chunk's layer number q lies, which it is, and whether there is one."""
        layers_CQ = jnp.asarray(self.program.plan.layout.layers_RCQ)[self.program.rank]
        chunk = jnp.maximum(self.field[f"{kind}_chunk"], 0)
        layer = layers_CQ[chunk, q]
        return (chunk * layers_CQ.shape[1] + q, jnp.maximum(layer, 0)), layer >= 0

    def _forward(self, slot: Any, q: jax.Array, own: Any, carried: Any) -> Any:
        stage, x_BTD, parts = self.program.stage, carried["x"], carried["parts"]
        y_BTD, balance, stats, saved = stage.forward(slot, x_BTD, self.segments("f"))
        return carried | {
            "x": chosen(own, y_BTD, x_BTD),
            "saved": put(carried["saved"], (self.field["f_saved"], q), saved),
            "parts": chosen(own, self._with_layer(parts, slot, balance, stats), parts),
        }

    def _inputs(self, slot: Any, q: jax.Array, own: Any, carried: Any) -> Any:
        saved = get(carried["saved"], (self.field["i_saved"], q))
        outputs = (carried["g"], self.program.alpha)
        g_BTD, found = self.program.stage.inputs(slot, saved, outputs)
        return carried | {
            "g": chosen(own, g_BTD, carried["g"]),
            "found": put(carried["found"], (self.field["i_found"], q), found),
        }

    def _weights(self, slot: Any, q: jax.Array, own: Any, carried: Any) -> Any:
        saved = get(carried["saved"], (self.field["w_saved"], q))
        found = get(carried["found"], (self.field["w_found"], q))
        of_layer = self.program.stage.weights(slot, saved, found)
        place, _ = slot
        layers = jax.tree.map(
            lambda total, g: total.at[place].add(chosen(own, g.astype(total.dtype), 0)),
            carried["layers"],
            of_layer,
        )
        return carried | {"layers": layers}

    def _with_layer(self, parts: LossParts, slot: Any, balance: Any, stats: Any) -> LossParts:
        program = self.program
        parts = program.stage.counted(parts, program.scale, slot[1], stats)
        return replace(parts, balance=parts.balance + program.alpha * balance)


def get(pool: Any, slot: Any) -> Any:
    """What is in a slot."""
    return jax.tree.map(lambda a: a[slot], pool)


def put(pool: Any, slot: Any, value: Any) -> Any:
    """The pool with a value in a slot; -1 is the last, which nobody reads."""
    return jax.tree.map(lambda a, v: a.at[slot].set(v.astype(a.dtype)), pool, value)


def added(totals: Any, gradients: Any, own: Any) -> Any:
    """Sums of two trees, in the types of the first, where `own` is true."""
    return jax.tree.map(lambda t, g: t + chosen(own, g.astype(t.dtype), 0), totals, gradients)


def chosen(own: Any, new: Any, old: Any) -> Any:
    """A tree where `own` is true, or another; of a single number as well."""
    if own is True:
        return new
    if isinstance(old, int):
        return jnp.where(own, new, old)
    return jax.tree.map(lambda a, b: jnp.where(own, a, b), new, old)
