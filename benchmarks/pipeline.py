"""What a pipeline takes in programs compiled for machines that are not here: memory, and overlap.

    python -m benchmarks.pipeline [--tpu-python=PYTHON] [--cuda-python=PYTHON] [--tables=memory]

No accelerator is used, and no figure is a time but the compiler's. The PYTHONs belong to
environments with the package and its extra `tpu` or `cuda`; this one by default.

The first table is of the loop over ticks on eight TPU v5p, for 16 MoE layers of width 2048, rows of
1024 tokens, 24 micro-batches, and the report's recomputation. Weights in BF16 are its arguments and
gradients in FP32 its results, of which DualPipe has two of each layer; `temporaries` are what XLA
needs besides: activations above all. `scan` is the same layers as a loop over ticks through which
JAX differentiates, as pipelines in JAX are mostly written: it keeps what every tick of every rank
has saved. `waiting` is `pipeline.most_waiting`.

The second is of one MoE layer of DeepSeek-V3 forward beside one backward, on 8 nodes of 8 devices:
how many of the exchanges of rows, gates and numbers the compiler starts and awaits apart, and how
many with a matrix product between, where the two stand plainly beside each other, in a branch that
only some devices take, and one after the other.

Figures are kept in benchmarks/results; `--tables=readme` prints them as the README's tables.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import ahead
from benchmarks.ahead import Report, compile_for
from benchmarks.kept import keep, kept, markdown
from v3jax import registry
from v3jax.config import BatchConfig, ExperimentConfig, MeshConfig, MoEConfig, PipelineConfig
from v3jax.model.layers import compute_dtype, type_of
from v3jax.objective import Scale
from v3jax.ops.loss import linear_cross_entropy
from v3jax.pipeline.plan import plan_of
from v3jax.pipeline.run import Program, Weights, gather
from v3jax.pipeline.stage import Stage
from v3jax.sharding import BATCH_AXES, make_mesh, rules_of
from v3jax.state import abstract_state, param_specs
from v3jax.step import abstract_amount, amount_specs

_TPU = flags.DEFINE_string("tpu-python", sys.executable, "Python of an environment with libtpu.")
_CUDA = flags.DEFINE_string("cuda-python", sys.executable, "Python of one with JAX's CUDA plugin.")
_TIMEOUT = flags.DEFINE_integer("timeout", 900, "Seconds that one compilation may take.")
_TABLES = flags.DEFINE_list("tables", ["memory", "overlap"], "Tables: memory, overlap, readme.")
_MIB = 2**20
N_RANKS, N_MICRO = 8, 24
SCHEDULES: tuple[tuple[str, int | None], ...] = (
    ("1f1b", None),
    ("dualpipe", 0),
    ("dualpipe", None),
    ("zb1p", None),
    ("gpipe", None),
    ("dualpipev", 0),
)


# ---- Memory


def experiment(schedule: Any, most_waiting: int | None = None) -> ExperimentConfig:
    """The model of the first table on eight ranks."""
    full = registry.get("v3_full")
    return replace(
        full,
        name="pipeline_memory",
        numerics=replace(full.numerics, remat="report"),
        model=replace(
            full.model,
            vocab_size=8192,
            dim=2048,
            n_layers=16,
            n_dense_layers=0,
            mtp_depth=0,
            n_heads=16,
            q_latent_dim=768,
            expert_ffn_dim=1024,
            n_experts=16,
            top_k=4,
            n_groups=4,
            top_groups=2,
        ),
        data=replace(full.data, seq_len=1024, tokenizer_vocab_size=8192),
        batch=BatchConfig(micro_batch=1, start=N_MICRO, end=N_MICRO, ramp_tokens=0.0),
        mesh=MeshConfig(pipe=N_RANKS),
        pipeline=PipelineConfig(schedule=schedule, most_waiting=most_waiting),
    )


def gradients(
    devices: Sequence[Any], schedule: str, most_waiting: int | None = None
) -> ahead.Program:
    """What a rank computes of a step's gradients from its own weights, through a pipeline, or, as
    `scan`, through a loop that JAX differentiates; for `benchmarks.ahead`."""
    through_scan = schedule == "scan"
    cfg = experiment("1f1b" if through_scan else schedule, most_waiting)
    mesh, rules = make_mesh(cfg.mesh, devices), rules_of(cfg)
    with jax.set_mesh(mesh):
        state, amount = abstract_state(cfg, mesh), abstract_amount(cfg, mesh)
    specs, places = param_specs(cfg, mesh, rules)
    plan = plan_of(cfg)
    assert plan is not None
    by_rank, rows = P("pipe"), P(None, BATCH_AXES)

    def own_weights(params: Any) -> Any:
        weights = gather(cfg, rules, plan, specs, places, params)
        return jax.tree.map(lambda a: a[None], vars(weights))

    made = jax.shard_map(
        own_weights, mesh=mesh, in_specs=(places,), out_specs=by_rank, check_vma=False
    )
    weights = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, by_rank)),
        jax.eval_shape(made, state.params),
    )

    def run(weights: Any, router_state: Any, tokens: Any, segments: Any, orders: Any) -> Any:
        own = Weights(**jax.tree.map(lambda a: a[0], weights))
        number = jnp.float32(N_MICRO)
        scale = Scale(n_targets=number * 1024, n_sequences=number, mtp_weight=jnp.float32(0.3))
        if through_scan:
            found = _scan_gradients(cfg, rules, plan, own, router_state, tokens, segments, scale)
        else:
            program = Program(cfg, rules, plan, own, router_state, tokens, segments, orders, scale)
            found, _ = program.run()
        return jax.tree.map(lambda g: g[None].astype(jnp.float32), found)

    function = jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(by_rank, P(), rows, rows, amount_specs(cfg)),
            out_specs=by_rank,
            check_vma=False,
        )
    )
    batch = jax.ShapeDtypeStruct(
        (N_MICRO, 1, cfg.data.seq_len + 1), np.int32, sharding=NamedSharding(mesh, rows)
    )
    return ahead.Program(function, (weights, state.router_state, batch, batch, amount), mesh)


def _scan_gradients(
    cfg: ExperimentConfig,
    rules: Any,
    plan: Any,
    weights: Weights,
    router_state: Any,
    tokens_MBS: jax.Array,
    segments_MBS: jax.Array,
    scale: Scale,
) -> Any:
    """Each rank's layers in every tick, outputs to the next rank, and `jax.grad` of all that."""
    rank, n_micro = jax.lax.axis_index("pipe"), len(tokens_MBS)
    dtype, dim = compute_dtype(cfg.numerics), cfg.model.dim
    own = replace(rules, storage="whole")
    layers_RCQ = jnp.asarray(plan.layout.layers_RCQ)

    def loss(trained: Any) -> jax.Array:
        embed_VD = jax.lax.all_gather(trained["embed"], "pipe", axis=0, tiled=True)
        head_DV = jax.lax.all_gather(trained["head"], "pipe", axis=1, tiled=True)
        stage = Stage(cfg, own, trained["layers"], router_state, tokens_MBS.shape[1:])
        ahead = [(r, r + 1) for r in range(N_RANKS - 1)]

        def tick(x_BTD: jax.Array, t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            micro = jnp.clip(t - rank, 0, n_micro - 1)
            entering = embed_VD[tokens_MBS[micro, :, :-1]].astype(dtype)
            x_BTD = jnp.where(rank == 0, entering, x_BTD)

            def one(x_BTD: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
                slot = (q, layers_RCQ[rank, 0, q])
                y_BTD, balance, _ = stage.forward_alone(slot, x_BTD, segments_MBS[micro])
                return y_BTD, balance

            y_BTD, balance_Q = jax.lax.scan(one, x_BTD, jnp.arange(layers_RCQ.shape[-1]))
            works = (t >= rank) & (t - rank < n_micro)
            balance = jnp.where(works, balance_Q.sum(), 0)
            return jax.lax.ppermute(y_BTD, "pipe", ahead), (y_BTD, balance)

        start = jnp.zeros((1, cfg.data.seq_len, dim), dtype)
        _, (outputs, balances) = jax.lax.scan(tick, start, jnp.arange(n_micro + N_RANKS - 1))
        last, segments_BS = outputs[N_RANKS - 1 :, 0], segments_MBS[:, 0]
        hidden = stage.out(trained["ends"], last, jnp.zeros(()), segments_BS)
        mask = segments_MBS[:, 0, 1:] > 0
        total, _ = linear_cross_entropy(
            hidden[0][0][0], head_DV, tokens_MBS[:, 0, 1:], mask / scale.n_targets
        )
        total = jnp.where(rank == N_RANKS - 1, total, 0)
        return total + cfg.balance.sequence_alpha * balances.sum() / scale.n_sequences

    trained = {
        "layers": weights.layers_N,
        "ends": weights.ends,
        "embed": weights.embed_vD,
        "head": weights.head_Dv,
    }
    return jax.grad(loss)(trained)


def print_memory() -> list[dict[str, Any]]:
    """Temporaries of a device by schedule."""
    print(f"v5p:2x2x2, {N_RANKS} ranks, {N_MICRO} micro-batches, MiB a device:")
    found = []
    for schedule, waiting in (("scan", None), *SCHEDULES):
        report = compiled("gradients", "v5p:2x2x2", schedule=schedule, most_waiting=waiting)
        if report is None:
            break
        sizes = (report.temp_bytes, report.argument_bytes, report.output_bytes)
        mib = dict(zip(("temporaries", "weights", "gradients"), sizes, strict=True))
        found.append(
            {"schedule": schedule, "most_waiting": waiting}
            | {name: round(size / _MIB) for name, size in mib.items()}
            | {"compile_seconds": round(report.compile_seconds)}
        )
        print(found[-1], flush=True)
    return found


def _memory_table(rows: Sequence[Mapping[str, Any]]) -> str:
    first = {r["schedule"]: r["temporaries"] for r in reversed(rows)}

    def row(r: Mapping[str, Any]) -> list[str]:
        waiting = "" if r["most_waiting"] is None else f", `most_waiting={r['most_waiting']}`"
        ratios = [f"{r['temporaries'] / first[name]:.2f}" for name in ("scan", "1f1b")]
        sizes = [f"{r[name]:,}" for name in ("temporaries", "weights", "gradients")]
        return [f"`{r['schedule']}`{waiting}", sizes[0], *ratios, *sizes[1:]]

    return markdown(
        [
            "v5p:2x2x2, 8 ranks, MiB a device",
            "temporaries",
            "of `scan`",
            "of `1f1b`",
            "weights",
            "gradients",
        ],
        [row(r) for r in rows],
    )


# ---- Overlap


def pair(
    devices: Sequence[Any], where: str, options: Mapping[str, Any] | None = None
) -> ahead.Program:
    """A layer forward and another backward on 64 devices; for `benchmarks.ahead`.

    Args:
      where: `plain` beside each other, `branch` in a conditional, `loop` in a conditional of a loop
        over ticks, `apart` with the forward pass waiting for the backward pass.
      options: of the compiler, beside v3jax's own.
    """
    full = registry.get("v3_full")
    cfg = replace(
        full,
        numerics=replace(full.numerics, remat="full"),
        mesh=MeshConfig(node=8, expert=8),
        moe=MoEConfig(bound_factor=1.25),
    )
    mesh = make_mesh(cfg.mesh, devices)
    rules = replace(rules_of(cfg), storage="whole", halves=True)
    specs = param_specs(cfg, mesh, rules)[0]["moe_layers"]
    rows = (1, cfg.data.seq_len + 1)

    def staged(layers_N: Any, router_state: Any) -> Stage:
        return Stage(cfg, rules, layers_N, router_state, rows)

    def run(layers: Any, router: Any, asked: Any, x: Any, g: Any, segments: Any, saved: Any) -> Any:
        stage = staged(layers, router)
        own = [s[0] for s in saved]
        zero, one = (jnp.int32(0), jnp.int32(0)), (jnp.int32(1), jnp.int32(1))

        def both(x: jax.Array, g: jax.Array) -> Any:
            of_x, found = stage.inputs(one, own, (g, jnp.float32(1e-4)))
            of_layer = stage.weights(one, own, found)
            if where == "apart":
                x, of_x, of_layer = jax.lax.optimization_barrier((x, of_x, of_layer))
            y, balance, stats, kept = stage.forward(zero, x, segments)
            return y, of_x, of_layer, balance, stats.load_E, kept

        if where in ("plain", "apart"):
            return jax.tree.map(lambda a: a[None], both(x, g))
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(both, x, g))
        if where == "branch":
            done = jax.lax.cond(asked[0] > 0, both, lambda x, g: nothing, x, g)
            return jax.tree.map(lambda a: a[None], done)

        def tick(t: jax.Array, carried: Any) -> Any:
            x, g = carried[:2]
            return jax.lax.cond(asked[t] > 0, both, lambda x, g: carried, x, g)

        start = (x, g, *nothing[2:])
        done = jax.lax.fori_loop(0, len(asked), tick, start)
        return jax.tree.map(lambda a: a[None], done)

    devices_axis = P(("node", "expert"))

    def abstract(shape: Any, dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        state = abstract_state(cfg, mesh, rules)
    dtype = compute_dtype(cfg.numerics)

    def of(path: Any, x: Any, spec: P) -> jax.ShapeDtypeStruct:
        kind = type_of(jax.tree_util.keystr(path), cfg.numerics)
        return abstract((2, *x.shape[1:]), kind, spec)

    layers = jax.tree_util.tree_map_with_path(of, state.params["moe_layers"], specs)
    n = mesh.size
    x = abstract((n, rows[1] - 1, cfg.model.dim), dtype, devices_axis)
    segments = abstract((n, rows[1]), np.int32, devices_axis)
    asked = abstract((4,), np.int32, P())
    kept = jax.eval_shape(
        jax.shard_map(
            lambda layers, router: [
                jnp.zeros((1, *s.shape), s.dtype) for s in staged(layers, router).layer.saved
            ],
            mesh=mesh,
            in_specs=(specs, P()),
            out_specs=devices_axis,
            check_vma=False,
        ),
        layers,
        state.router_state,
    )
    saved = [abstract(s.shape, s.dtype, devices_axis) for s in kept]
    function = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(specs, P(), P(), devices_axis, devices_axis, devices_axis, devices_axis),
        out_specs=devices_axis,
        check_vma=False,
    )
    arguments = (layers, state.router_state, asked, x, x, segments, saved)
    return ahead.Program(jax.jit(function), arguments, mesh, options or {})


def print_overlap() -> list[dict[str, Any]]:
    """Exchanges that the compiler starts and awaits apart."""
    print("One V3 layer forward beside one backward, 8 x 8 devices, exchanges between devices:")
    found = []
    for target in ("v5p:4x4x4", "h100:8x8"):
        for where in ("plain", "branch", "loop", "apart"):
            report = compiled("pair", target, where=where)
            if report is None:
                break
            some = [c for c in report.collectives if c.kind == "ragged-all-to-all" and c.count]
            counts = {
                "exchanges": len(some),
                "async": sum(c.asynchronous for c in some),
                "beside": sum(c.overlapped for c in some),
            }
            gib = round(report.temp_bytes / 2**30, 1)
            found.append({"target": target, "where": where, **counts, "temporaries_gib": gib})
            print(found[-1], flush=True)
    return found


def _overlap_table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ("target", "where", "exchanges", "async", "beside")
    return markdown(names, [[str(r[name]) for name in names] for r in rows])


def compiled(function: str, target: str, **arguments: Any) -> Report | None:
    """A program's report; None, said once, where its compiler is missing."""
    python = _CUDA.value if target.startswith("h100") else _TPU.value
    try:
        return compile_for(
            f"benchmarks.pipeline:{function}",
            target,
            python=python,
            timeout=_TIMEOUT.value,
            **arguments,
        )
    except RuntimeError as error:
        print(error)
        return None


def print_readme() -> None:
    """The kept tables as the README has them."""
    print(_memory_table(kept("pipeline_memory")["rows"]))
    print()
    print(_overlap_table(kept("pipeline_overlap")["rows"]))


def main(argv: Sequence[str]) -> None:
    del argv
    for name, found in (("memory", print_memory), ("overlap", print_overlap)):
        if name in _TABLES.value and (rows := found()):
            command = f"python -m benchmarks.pipeline --tables={name} --tpu-python=PYTHON"
            if name == "overlap":
                command += " --cuda-python=PYTHON"
            keep(f"pipeline_{name}", command, {"rows": rows})
    if "readme" in _TABLES.value:
        print_readme()


if __name__ == "__main__":
    app.run(main)
