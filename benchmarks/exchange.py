"""What the expert exchange sends: bytes on the slow network, and overlap by chunks.

    python -m benchmarks.exchange [--tpu-python=PYTHON] [--cuda-python=PYTHON] [--targets=h100]

A MoE layer of DeepSeek-V3 (width 7168, 256 experts in 8 groups, 8 of 4 groups for a token) with
4096 tokens a device on 2, 4 and 8 nodes of 8 devices, compiled ahead of time for H100 and TPU v5p
in BF16. No accelerator is used and nothing here is a time but the compiler's. The
PYTHONs belong to environments with the package and its extra `tpu` or `cuda`; this one by default.

The first table is about hop 1, over `node`. `rows` is what a device hands to the exchange on the
way out, in bytes a token, `gates` what it hands over beside them; `back` is the buffer that it
hands over on the way home, `bound_factor` times as long, of which the program sends only rows that
came. `limit` are `min(top_groups, nodes)` copies of a token, `flat` the copies of an all-to-all
that knows no nodes. `sent` are rows a token that leave a node, mean and most of any device, counted
at run time under uniform random routing, and `passes` is 1 if buffers sufficed.

The second table is forward and backward pass of the layer's routed experts on 8 nodes. `async` are
exchanges of rows, gates or numbers that the compiler starts and awaits apart, `beside` those with a
matrix product between. Passes beyond the first, which balanced routing never takes, are left out.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.ahead import Program, Report, compile_for
from v3jax import registry
from v3jax.config import MeshConfig, ModelConfig, MoEConfig
from v3jax.ops import expert_parallel, routing
from v3jax.ops.dispatch import make_layout
from v3jax.ops.exchange import make_route
from v3jax.sharding import BATCH_AXES, make_mesh

_TPU = flags.DEFINE_string("tpu-python", sys.executable, "Python of an environment with libtpu.")
_CUDA = flags.DEFINE_string("cuda-python", sys.executable, "Python of one with JAX's CUDA plugin.")
_TIMEOUT = flags.DEFINE_integer("timeout", 900, "Seconds that one compilation may take.")
_TABLES = flags.DEFINE_list("tables", ["hop", "chunks"], "Tables to print.")
_TARGETS = flags.DEFINE_list("targets", ["v5p", "h100"], "What to compile for.")
RANKS, TOKENS = 8, 4096
TARGETS = {
    2: ("v5p:2x2x4", "h100:2x8"),
    4: ("v5p:2x4x4", "h100:4x8"),
    8: ("v5p:4x4x4", "h100:8x8"),
}
CHUNKS = (1, 2, 4, 8)
_MIB = 2**20
_unavailable: set[str] = set()
"""Targets whose compiler is not installed."""


def layer(
    devices: Sequence[Any], n_nodes: int, chunks: int = 1, *, backward: bool = True
) -> Program:
    """The routed experts of one V3 layer on `n_nodes` nodes, for `benchmarks.ahead`."""
    model = registry.get("v3_full").model
    moe = MoEConfig(dispatch_chunks=chunks)
    mesh = make_mesh(MeshConfig(node=n_nodes, expert=RANKS), devices)
    rows, experts = P(BATCH_AXES), P(("node", "expert"))

    def run(
        x_ND: jax.Array,
        experts_NK: jax.Array,
        gates_NK: jax.Array,
        gate_up: jax.Array,
        down: jax.Array,
    ) -> Any:
        def forward(
            x_ND: jax.Array, gates_NK: jax.Array, gate_up: jax.Array, down: jax.Array
        ) -> jax.Array:
            return expert_parallel.routed_experts(
                model, moe, x_ND, experts_NK, gates_NK, gate_up, down
            )[0]

        if not backward:
            return forward(x_ND, gates_NK, gate_up, down)
        out_ND, pull = jax.vjp(forward, x_ND, gates_NK, gate_up, down)
        return out_ND, *pull(out_ND)

    function = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(rows, rows, rows, experts, experts),
        out_specs=(rows, rows, rows, experts, experts) if backward else rows,
        axis_names=set(mesh.axis_names),
        check_vma=False,
    )

    def abstract(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    n_tokens = TOKENS * n_nodes * RANKS
    n_experts, dim, width = model.n_experts, model.dim, model.expert_ffn_dim
    arguments = (
        abstract((n_tokens, dim), jnp.bfloat16, rows),
        abstract((n_tokens, model.top_k), jnp.int32, rows),
        abstract((n_tokens, model.top_k), jnp.float32, rows),
        abstract((n_experts, dim, 2 * width), jnp.bfloat16, experts),
        abstract((n_experts, width, dim), jnp.bfloat16, experts),
    )
    return Program(jax.jit(function), arguments, mesh)


# ---- Hop 1


@dataclass(frozen=True)
class Sent:
    """Rows a token that leave a node, counted on all devices, and the passes that it took."""

    mean: float
    most: float
    flat: float
    passes: int


def count_sent(model: ModelConfig, n_nodes: int, seed: int = 0) -> Sent:
    """Routes random tokens on `n_nodes` devices and reads their routes' sizes."""
    plan = expert_parallel.make_plan(model, MoEConfig(), TOKENS, n_nodes, RANKS)
    mesh = make_mesh(MeshConfig(node=n_nodes))
    spec = P("node")

    def one_device(logits_NE: jax.Array) -> tuple[jax.Array, jax.Array]:
        experts_NK, _ = routing.route(
            logits_NE,
            jnp.zeros(model.n_experts),
            top_k=model.top_k,
            n_groups=model.n_groups,
            top_groups=model.top_groups,
            route_scale=model.route_scale,
        )
        nodes_NH = expert_parallel.target_nodes(plan, experts_NK)
        layout = make_layout(nodes_NH, n_nodes, 1, partial=True)
        route, _ = make_route(layout.load_E, "node", n_sent=nodes_NH.size, n_blocks=plan.node_rows)
        away_C = jnp.arange(n_nodes) != lax.axis_index("node")
        node_NK = experts_NK // plan.node_experts
        sent = jnp.sum(route.out.size_C * away_C)
        flat = jnp.sum(node_NK != lax.axis_index("node"))
        arrived = jnp.sum(route.into.size_C)
        return jnp.stack([sent, flat])[None], arrived[None]

    logits = np.random.default_rng(seed).standard_normal((n_nodes * TOKENS, model.n_experts))
    count = jax.jit(
        jax.shard_map(one_device, mesh=mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False)
    )
    sent, arrived = (np.asarray(x) for x in count(logits.astype(np.float32)))
    return Sent(
        mean=float(sent[:, 0].mean() / TOKENS),
        most=float(sent[:, 0].max() / TOKENS),
        flat=float(sent[:, 1].mean() / TOKENS),
        passes=int(np.ceil(arrived.max() / plan.node_rows)),
    )


def ragged_over(report: Report, axis: str) -> list[int]:
    """Operand bytes of the ragged exchanges along an axis that a call surely runs, in order."""
    return [
        c.bytes
        for c in report.collectives
        if c.kind == "ragged-all-to-all" and c.axes == (axis,) and c.certain
        for _ in range(c.count)
    ]


def print_hop(model: ModelConfig) -> None:
    """Bytes a token and layer on the `node` axis, forward pass, by number of nodes."""
    row = 2 * model.dim
    print(f"Hop 1, BF16 rows of {row} bytes, {TOKENS} tokens a device, {RANKS} devices a node:")
    print(
        f"{'nodes':>5s} {'target':>10s} {'rows':>7s} {'limit':>7s} {'flat':>7s} {'gates':>6s} "
        f"{'back':>7s} {'sent':>6s} {'most':>6s} {'flat sent':>10s} {'passes':>7s}"
    )
    for n_nodes, targets in TARGETS.items():
        sent = count_sent(model, n_nodes)
        for target in targets:
            report = compiled(target, n_nodes=n_nodes, backward=False)
            if report is None:
                continue
            *out, back = ragged_over(report, "node")
            print(
                f"{n_nodes:5d} {target:>10s} {max(out) / TOKENS:7.0f} "
                f"{min(model.top_groups, n_nodes) * row:7d} {model.top_k * row:7d} "
                f"{(sum(out) - max(out)) / TOKENS:6.0f} {back / TOKENS:7.0f} "
                f"{sent.mean:6.3f} {sent.most:6.3f} {sent.flat:10.3f} {sent.passes:7d}",
                flush=True,
            )


# ---- Chunks


def print_chunks(n_nodes: int = 8) -> None:
    """Asynchronous exchanges, memory and bytes by `moe.dispatch_chunks`."""
    print(f"\nRouted experts of a layer, forward and backward, {n_nodes} nodes x {RANKS}:")
    print(
        f"{'target':>10s} {'chunks':>6s} {'exchanges':>9s} {'async':>6s} {'beside':>7s} "
        f"{'node MiB':>9s} {'expert MiB':>10s} {'other MiB':>9s} {'temp MiB':>9s} {'compile s':>9s}"
    )
    for target in TARGETS[n_nodes]:
        for chunks in CHUNKS:
            report = compiled(target, n_nodes=n_nodes, chunks=chunks)
            if report is None:
                break
            ragged = [c for c in report.collectives if c.kind == "ragged-all-to-all" and c.certain]
            node, expert = (sum(ragged_over(report, axis)) for axis in ("node", "expert"))
            other = sum(
                c.bytes * c.count for c in report.collectives if c.certain and c not in ragged
            )
            print(
                f"{target:>10s} {chunks:6d} {sum(c.count for c in ragged):9d} "
                f"{sum(c.count for c in ragged if c.asynchronous):6d} "
                f"{sum(c.count for c in ragged if c.overlapped):7d} "
                f"{node / _MIB:9.0f} {expert / _MIB:10.0f} {other / _MIB:9.2f} "
                f"{report.temp_bytes / _MIB:9.0f} {report.compile_seconds:9.1f}",
                flush=True,
            )


def compiled(target: str, **arguments: Any) -> Report | None:
    """The program for a target, or None if not asked for, or once it was said why not."""
    name = target.partition(":")[0]
    if name in _unavailable or name not in _TARGETS.value:
        return None
    try:
        return compile_for(
            "benchmarks.exchange:layer",
            target,
            python=_CUDA.value if name == "h100" else _TPU.value,
            timeout=_TIMEOUT.value,
            **arguments,
        )
    except RuntimeError as error:
        print(error, flush=True)
        if "pip install" in str(error):
            _unavailable.add(name)
        return None


def main(argv: list[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(TARGETS))
    if "hop" in _TABLES.value:
        print_hop(registry.get("v3_full").model)
    if "chunks" in _TABLES.value:
        print_chunks()


if __name__ == "__main__":
    app.run(main)
