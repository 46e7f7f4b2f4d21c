"""One step's gradients through a pipeline: one program, which every rank runs (report 3.2.1).

A loop over the ticks of a `Table`. In each, messages of the tick before arrive, embeddings are
looked up for what enters, every rank runs its operations, and losses are taken of what came out.
Only the operations differ between ranks; everything that all ranks take part in, messages, the
embedding and the head, whose vocabulary is split over the ranks, stands outside of what differs. A
rank's layers run in a loop over its slots. Their backward pass is in two halves (`split`); the
dense layers and the MTP modules, of which only the ends have any, run again in one.
Dims: S ticks, M micro-batches, B sequences, T positions, D model, N slots of a rank's layers, Q of
a chunk, K MTP modules, V vocabulary, v a rank's part of it, L MoE layers, E experts.
"""

from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp

from v3jax import objective
from v3jax.config import ExperimentConfig
from v3jax.model.block import Block, rematerialised
from v3jax.model.layers import compute_dtype, master_dtype
from v3jax.model.moe import RouterStats
from v3jax.model.mtp import MTPModule, known
from v3jax.objective import LossParts, Scale
from v3jax.ops.embedding import add_to_split, embed_split
from v3jax.ops.loss import split_head_gradients
from v3jax.ops.norm import rms_norm
from v3jax.pipeline.split import Split, split
from v3jax.pipeline.stages import Layout
from v3jax.pipeline.table import FORWARD, INPUTS, WEIGHTS, Table
from v3jax.sharding import ShardingRules

_AXIS = "pipe"


class Program:
    """What a rank does, inside `jax.shard_map`, manual over all axes of the mesh.

    Args:
      layers_N: a rank's MoE layers, stacked, in the types they are computed with.
      ends: `dense_layers`, `norm` and `mtp_layers_*`, which every rank has.
      embed_vD, head_Dv: this rank's part of the vocabulary.
    """

    def __init__(
        self,
        cfg: ExperimentConfig,
        rules: ShardingRules,
        table: Table,
        where: Layout,
        layers_N: Any,
        ends: Any,
        embed_vD: jax.Array,
        head_Dv: jax.Array,
        router_state: Any,
        tokens_MBS: jax.Array,
        segments_MBS: jax.Array,
        scale: Scale,
    ) -> None:
        self.cfg, self.table, self.where = cfg, table, where
        self.rules = replace(rules, storage="whole")  # weights have been gathered for the step
        self.layers_N, self.ends = layers_N, ends
        self.embed_vD, self.head_Dv = embed_vD, head_Dv
        self.router_state, self.scale = router_state, scale
        self.tokens_MBS, self.segments_MBS = tokens_MBS, segments_MBS
        self.rank = jax.lax.axis_index(_AXIS)
        self.n_ranks = jax.lax.axis_size(_AXIS)
        self.dtype = compute_dtype(cfg.numerics)
        _, batch, length = tokens_MBS.shape
        self.x_shape = (batch, length - 1, cfg.model.dim)
        self.depth = cfg.model.mtp_depth
        self.alpha = objective.balance_alpha(cfg) / scale.n_sequences.astype(self._wide)
        self.layer = self._split_layer()

    # ---- Layers

    def _split_layer(self) -> Split:
        """A MoE layer's passes."""
        cfg = self.cfg
        block = rematerialised(cfg.numerics, in_scan=True)(
            cfg.model, cfg.numerics, self.rules, moe=True, parent=None
        )

        def f(params: Any, x_BTD: jax.Array, bias_E: Any, segments_BS: jax.Array) -> Any:
            variables = {"params": params, "router_state": bias_E}
            y_BTD, stats = cast(Any, block).apply(variables, x_BTD, *self._shared(segments_BS))
            return (y_BTD, objective.balance_of(cfg, stats)), stats

        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), self.layers_N)
        bias = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), self.router_state["moe_layers"]
        )
        x = jax.ShapeDtypeStruct(self.x_shape, self.dtype)
        segments = jax.ShapeDtypeStruct(self.segments_MBS.shape[1:], self.segments_MBS.dtype)
        return split(f, shapes, x, bias, segments)

    def _shared(self, segments_BS: jax.Array) -> tuple[Any, ...]:
        """Positions, segments and what counts, as a block takes them."""
        inputs_BT = segments_BS[:, :-1]
        isolated = inputs_BT if self.cfg.data.isolate_documents else None
        return jnp.arange(inputs_BT.shape[1]), isolated, inputs_BT > 0

    def _dense(self, ends: Any, x_BTD: jax.Array, segments_BS: jax.Array) -> jax.Array:
        """The dense layers."""
        cfg = self.cfg
        block = Block(cfg.model, cfg.numerics, self.rules, moe=False, parent=None)
        for i in range(cfg.model.n_dense_layers):
            params = jax.tree.map(lambda a, i=i: a[i], ends["dense_layers"])
            x_BTD, _ = cast(Any, block).apply({"params": params}, x_BTD, *self._shared(segments_BS))
        return x_BTD

    def _out(
        self, ends: Any, x_BTD: jax.Array, ahead_BSD: jax.Array, segments_BS: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], list[RouterStats]]:
        """What the head reads, `[1 + K, B, T, D]`, and the modules' balance loss."""
        cfg = self.cfg
        positions_T, isolated, _ = self._shared(segments_BS)
        length = len(positions_T)
        h_BTD = rms_norm(x_BTD, ends["norm"], cfg.model.norm_eps)
        hidden, stats = [h_BTD], []
        for k in range(1, self.depth + 1):
            known_BT = known(segments_BS > 0, k)
            name = f"mtp_layers_{k - 1}"
            module = MTPModule(cfg.model, cfg.numerics, self.rules, parent=None)
            variables = {"params": ends[name], "router_state": self.router_state[name]}
            ahead_BTD = jnp.roll(ahead_BSD, -k, axis=1)[:, :length]
            h_BTD, stat = cast(Any, module).apply(
                variables, h_BTD, ahead_BTD, positions_T, isolated, known_BT
            )
            hidden.append(h_BTD)
            stats.append(stat)
        balance = sum(
            (objective.balance_of(cfg, s) for s in stats), start=jnp.zeros((), self._wide)
        )
        return (jnp.stack(hidden), balance), stats

    @property
    def _wide(self) -> jnp.dtype:
        return master_dtype(self.cfg.numerics)

    # ---- The loop

    def gradients(self) -> tuple[Any, LossParts]:
        """This rank's gradients, as the arguments are, and its share of the loss's parts; shares of
        all ranks add up to the devices' own rows'."""
        fields = {
            name: jnp.take(jnp.asarray(array_SR), self.rank, axis=1)
            for name, array_SR in self.table.ranks.items()
        }
        ends = {
            name: jnp.asarray(getattr(self.table, f"{name}_SD"))
            for name in ("enter", "loss", "back", "leave")
        }

        def tick(state: Any, row: tuple[Any, Any]) -> tuple[Any, None]:
            return self._tick(state, *row), None

        state, _ = jax.lax.scan(tick, self._start(), (fields, ends))
        return state["gradients"], state["parts"]

    def _start(self) -> Any:
        slots, model = self.table.slots, self.cfg.model
        x = jnp.zeros(self.x_shape, self.dtype)
        hidden = jnp.zeros((1 + self.depth, *self.x_shape), self.dtype)
        row = jnp.zeros((*self.tokens_MBS.shape[1:], model.dim), self.dtype)
        per_chunk = self.where.layers_RCQ.shape[-1]

        def pool(n: int, shapes: Any, *lead: int) -> Any:
            return jax.tree.map(lambda a: jnp.zeros((n, *lead, *a.shape), a.dtype), shapes)

        zero = jnp.zeros((), self._wide)
        n_routers = model.n_moe_layers + model.mtp_depth
        gradients = jax.tree.map(
            lambda a: jnp.zeros(a.shape, self._wide),
            {
                "layers": self.layers_N,
                "ends": self.ends,
                "embed": self.embed_vD,
                "head": self.head_Dv,
            },
        )
        return {
            "x": pool(slots["x"] + 1, x),
            "g": pool(slots["g"] + 1, x),
            "loss": pool(slots["loss"] + 1, hidden),
            # The inputs of the first stage and of the modules go with what the layers save.
            "saved": (
                pool(slots["saved"], self.layer.saved, per_chunk),
                pool(slots["saved"], {"in": x, "out": x, "ahead": row}),
            ),
            "found": pool(slots["found"], self.layer.found, per_chunk),
            "sent_x": x,
            "sent_g": x,
            "hidden": hidden,
            "of_row": row,
            "gradients": gradients,
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

    def _tick(self, state: Any, field: Any, ends: Any) -> Any:
        state = self._arrived(state, field)
        run = field["run"]
        entering = self._looked_up(ends["enter"])
        ahead = self._looked_up(ends["loss"]) if self.depth else entering
        for bit, operation in (
            (INPUTS, self._inputs),
            (WEIGHTS, self._weights),
            (FORWARD, lambda s, e: self._forward(s, e, entering, ahead)),
        ):
            state = jax.lax.cond(run & bit > 0, operation, lambda s, e: s, state, field)
        state = self._losses(state, field, ends["loss"])
        return self._embedding_gradients(state, ends)

    def _arrived(self, state: Any, field: Any) -> Any:
        """What the neighbours have sent is put into its slots."""
        right = [(r, r + 1) for r in range(self.n_ranks - 1)]
        left = [(r + 1, r) for r in range(self.n_ranks - 1)]
        for what in "xg":
            sent = state[f"sent_{what}"]
            for side, pairs in (("left", right), ("right", left), ("here", None)):
                used = self.table.ranks[f"{what}_{side}"] >= 0
                if used.any():
                    got = sent if pairs is None else jax.lax.ppermute(sent, _AXIS, pairs)
                    slot = field[f"{what}_{side}"]
                    state = state | {what: _put(state[what], slot, got)}
        return state

    def _looked_up(self, micro_D: jax.Array) -> list[jax.Array]:
        """Embeddings `[B, S, D]` of each direction's micro-batch, zeros if there is none."""
        zeros = jnp.zeros((*self.tokens_MBS.shape[1:], self.cfg.model.dim), self.dtype)

        def look_up(micro: jax.Array) -> jax.Array:
            return embed_split(self.embed_vD, self.tokens_MBS[micro], self.dtype, _AXIS)

        return [
            jax.lax.cond(micro >= 0, look_up, lambda _: zeros, micro_D[d])
            for d, micro in enumerate(micro_D)
        ]

    def _of_end(self, rows: list[jax.Array], chunk: jax.Array) -> jax.Array:
        """The row of the direction that a chunk belongs to."""
        return rows[0] if len(rows) == 1 else jnp.where(chunk > 0, rows[1], rows[0])

    def _at(self, which: int, chunk: jax.Array) -> jax.Array:
        """Whether this rank's chunk is its direction's first (0) or last (-1) stage."""
        places = [path[which] for path in self.table.schedule.paths]
        return jnp.any(jnp.stack([(self.rank == p.rank) & (chunk == p.chunk) for p in places]))

    def _slots_of(self, chunk: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A chunk's slots, whether each is filled, and its layer: `[Q]` each."""
        layers_Q = jnp.asarray(self.where.layers_RCQ)[self.rank, chunk]
        places_Q = chunk * layers_Q.size + jnp.arange(layers_Q.size)
        return places_Q, layers_Q >= 0, jnp.maximum(layers_Q, 0)

    def _forward(
        self, state: Any, field: Any, entering: list[jax.Array], ahead: list[jax.Array]
    ) -> Any:
        chunk, micro = field["f_chunk"], field["f_micro"]
        segments_BS = self.segments_MBS[micro]
        first, last = self._at(0, chunk), self._at(-1, chunk)
        embedded_BTD = self._of_end(entering, chunk)[:, :-1]
        x_BTD = jax.lax.cond(
            first,
            lambda x: self._dense(self.ends, embedded_BTD, segments_BS),
            lambda x: x,
            _get(state["x"], field["f_x"]),
        )

        def one(x_BTD: jax.Array, slot: Any) -> Any:
            place, filled, layer = slot
            params = jax.tree.map(lambda a: a[place], self.layers_N)
            bias = jax.tree.map(lambda a: a[layer], self.router_state["moe_layers"])

            def run(x_BTD: jax.Array) -> Any:
                (y_BTD, balance), stats, saved = self.layer.forward(
                    params, x_BTD, bias, segments_BS
                )
                return y_BTD, (balance, stats, saved)

            nothing = jax.tree.map(
                lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run, x_BTD)[1]
            )
            return jax.lax.cond(filled, run, lambda x: (x, nothing), x_BTD)

        places_Q, filled_Q, layers_Q = self._slots_of(chunk)
        y_BTD, (balance_Q, stats_Q, saved) = jax.lax.scan(
            one, x_BTD, (places_Q, filled_Q, layers_Q)
        )
        row = self._of_end(ahead, chunk)
        (hidden, balance), stats = jax.lax.cond(
            last,
            lambda y: self._out(self.ends, y, row, segments_BS),
            lambda y: jax.tree.map(
                lambda a: jnp.zeros(a.shape, a.dtype),
                jax.eval_shape(lambda y: self._out(self.ends, y, row, segments_BS), y),
            ),
            y_BTD,
        )
        inputs = {"in": embedded_BTD, "out": y_BTD, "ahead": row}
        layers, inputs_pool = state["saved"]
        state = state | {
            "saved": (
                _put(layers, field["f_saved"], saved),
                _put(inputs_pool, field["f_saved"], inputs),
            ),
            "sent_x": y_BTD,
            "hidden": hidden,
        }
        parts: LossParts = state["parts"]
        # Empty slots have zeros; a stage's layers follow one another.
        load_LE = parts.load_LE.at[layers_Q].add(stats_Q.load_E)
        for k, stat in enumerate(stats):
            load_LE = load_LE.at[self.cfg.model.n_moe_layers + k].add(stat.load_E)
        exchange = [stats_Q.exchange, *(stat.exchange for stat in stats)]
        n_routers = self.cfg.model.n_moe_layers + self.depth
        overload = sum(e.overload.sum() for e in exchange) / n_routers
        parts = replace(
            parts,
            balance=parts.balance + self.alpha * (balance_Q.sum() + balance),
            load_LE=load_LE,
            overload=parts.overload + overload * self.x_shape[0] / self.scale.n_sequences,
            extra_passes=parts.extra_passes
            + sum(e.extra_passes.sum(dtype=jnp.int32) for e in exchange),
            dropped=parts.dropped + sum(e.dropped.sum(dtype=jnp.int32) for e in exchange),
        )
        return state | {"parts": parts}

    def _inputs(self, state: Any, field: Any) -> Any:
        chunk, micro = field["i_chunk"], field["i_micro"]
        segments_BS = self.segments_MBS[micro]
        first, last = self._at(0, chunk), self._at(-1, chunk)
        layers, inputs = (_get(pool, field["i_saved"]) for pool in state["saved"])
        of_balance = self.alpha

        def from_loss(gradients: Any) -> Any:
            def out(ends: Any, y: jax.Array, row: jax.Array) -> Any:
                return self._out(ends, y, row, segments_BS)[0]

            _, pull = jax.vjp(out, self.ends, inputs["out"], inputs["ahead"])
            of_hidden = _get(state["loss"], field["i_loss"])
            of_ends, g_BTD, of_row = pull((of_hidden, of_balance))
            return _added(gradients, of_ends), g_BTD, of_row

        def from_neighbour(gradients: Any) -> Any:
            return gradients, _get(state["g"], field["i_g"]), jnp.zeros_like(inputs["ahead"])

        of_ends, g_BTD, of_row = jax.lax.cond(
            last, from_loss, from_neighbour, state["gradients"]["ends"]
        )

        def one(g_BTD: jax.Array, slot: Any) -> Any:
            place, filled, saved = slot
            params = jax.tree.map(lambda a: a[place], self.layers_N)

            def run(g_BTD: jax.Array) -> Any:
                return self.layer.inputs(params, saved, (g_BTD, of_balance))

            nothing = [jnp.zeros(a.shape, a.dtype) for a in self.layer.found]
            return jax.lax.cond(filled, run, lambda g: (g, nothing), g_BTD)

        places_Q, filled_Q, _ = self._slots_of(chunk)
        g_BTD, found = jax.lax.scan(one, g_BTD, (places_Q, filled_Q, layers), reverse=True)

        def through_dense(gradients: Any, g_BTD: jax.Array) -> Any:
            _, pull = jax.vjp(
                lambda ends, x: self._dense(ends, x, segments_BS), self.ends, inputs["in"]
            )
            of_ends, of_x = pull(g_BTD)
            return _added(gradients, of_ends), of_x

        of_ends, g_BTD = jax.lax.cond(first, through_dense, lambda e, g: (e, g), of_ends, g_BTD)
        return state | {
            "found": _put(state["found"], field["i_found"], found),
            "sent_g": g_BTD,
            "of_row": of_row,
            "gradients": state["gradients"] | {"ends": of_ends},
        }

    def _weights(self, state: Any, field: Any) -> Any:
        layers = _get(state["saved"][0], field["w_saved"])
        found = _get(state["found"], field["w_found"])

        def one(gradients_N: Any, slot: Any) -> Any:
            place, filled, saved, found = slot
            params = jax.tree.map(lambda a: a[place], self.layers_N)

            def run(gradients_N: Any) -> Any:
                of_layer = self.layer.weights(params, saved, found)
                return jax.tree.map(
                    lambda total, g: total.at[place].add(g.astype(total.dtype)),
                    gradients_N,
                    of_layer,
                )

            return jax.lax.cond(filled, run, lambda g: g, gradients_N), None

        places_Q, filled_Q, _ = self._slots_of(field["w_chunk"])
        of_layers, _ = jax.lax.scan(
            one, state["gradients"]["layers"], (places_Q, filled_Q, layers, found)
        )
        return state | {"gradients": state["gradients"] | {"layers": of_layers}}

    # ---- What all ranks do together

    def _losses(self, state: Any, field: Any, micro_D: jax.Array) -> Any:
        """The loss of what has come out of the last stages, and its gradients to their slots."""
        for d, path in enumerate(self.table.schedule.paths):
            place = path[-1]

            def run(state: Any, micro: jax.Array, rank: int = place.rank) -> Any:
                mine = self.rank == rank
                hidden = jax.lax.psum(jnp.where(mine, state["hidden"], 0), _AXIS)
                targets, weights, factors = objective.targets_of(
                    self.cfg, self.tokens_MBS[micro], self.segments_MBS[micro], self.scale
                )
                joined = jnp.concatenate(list(hidden), axis=1)
                weighted = [w * f for w, f in zip(weights, factors, strict=True)]
                _, nll, of_joined, of_head = split_head_gradients(
                    joined,
                    self.head_Dv,
                    jnp.concatenate(targets, axis=1),
                    jnp.concatenate(weighted, axis=1),
                    _AXIS,
                )
                # On one rank, as all have the same.
                nlls = [jnp.where(mine, n, 0) for n in objective.shares_of(nll, weights)]
                of_hidden = jnp.stack(jnp.split(of_joined, self.depth + 1, axis=1))
                slot = jnp.where(mine, field["loss"], -1)
                gradients = state["gradients"]
                parts: LossParts = state["parts"]
                mtp = sum(nlls[1:], start=jnp.zeros(())) / max(self.depth, 1)
                return state | {
                    "loss": _put(state["loss"], slot, of_hidden),
                    "gradients": gradients | {"head": gradients["head"] + of_head},
                    "parts": replace(parts, main=parts.main + nlls[0], mtp=parts.mtp + mtp),
                }

            state = jax.lax.cond(micro_D[d] >= 0, run, lambda s, m: s, state, micro_D[d])
        return state

    def _embedding_gradients(self, state: Any, ends: Any) -> Any:
        """Gradients of the rows that entered, and of those that MTP modules looked ahead to."""
        of_entered = jnp.pad(state["sent_g"], ((0, 0), (0, 1), (0, 0)))
        of_vD = state["gradients"]["embed"]
        for d, path in enumerate(self.table.schedule.paths):
            of_vD = self._added_rows(of_vD, of_entered, path[0].rank, ends["leave"][d])
            if self.depth:
                of_vD = self._added_rows(of_vD, state["of_row"], path[-1].rank, ends["back"][d])
        return state | {"gradients": state["gradients"] | {"embed": of_vD}}

    def _added_rows(
        self, of_vD: jax.Array, rows_BSD: jax.Array, rank: int, micro: jax.Array
    ) -> jax.Array:
        """The embedding's gradient with that of a micro-batch's rows, which one rank has."""

        def run(of_vD: jax.Array) -> jax.Array:
            rows = jax.lax.psum(jnp.where(self.rank == rank, rows_BSD, 0), _AXIS)
            return add_to_split(of_vD, self.tokens_MBS[micro], rows, _AXIS)

        return jax.lax.cond(micro >= 0, run, lambda x: x, of_vD)


def _get(pool: Any, slot: jax.Array) -> Any:
    return jax.tree.map(lambda a: a[slot], pool)


def _put(pool: Any, slot: jax.Array, value: Any) -> Any:
    """The pool with a value in a slot; -1 is the last, which nobody reads."""
    return jax.tree.map(lambda a, v: a.at[slot].set(v.astype(a.dtype)), pool, value)


def _added(totals: Any, gradients: Any) -> Any:
    return jax.tree.map(lambda t, g: t + g.astype(t.dtype), totals, gradients)
