"""The sizes of an exchange, who travels where, and capacity; equality is in tests/test_parallel.

Dims: N tokens, K choices, H hops.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.v3 import v3_full
from v3jax.config import MeshConfig, ModelConfig, MoEConfig
from v3jax.ops import expert_parallel as ops
from v3jax.ops.routing import route
from v3jax.sharding import make_mesh

V3 = v3_full().model


def plan(model: ModelConfig = V3, nodes: int = 8, ranks: int = 8, **moe: Any) -> ops.Plan:
    return ops.make_plan(model, MoEConfig(**moe), 4096, nodes, ranks)


@pytest.mark.parametrize(("nodes", "hops"), [(1, 1), (2, 2), (4, 4), (8, 4), (16, 8)])
def test_a_token_travels_to_top_groups_nodes_at_most(nodes: int, hops: int) -> None:
    """16 nodes cut groups in two, so that only the eight experts bound the nodes."""
    assert plan(nodes=nodes, ranks=4).hops == hops


def test_buffers_are_as_long_as_the_bound_says_and_never_longer_than_the_worst() -> None:
    full = plan()
    assert full.node_rows == 8 * 4096  # twice four copies a token, which is all eight nodes
    assert full.fan_rows == full.rank_rows == 2 * 8 * 4096
    assert full.max_passes == 16  # all 64 devices' tokens on one device's four experts
    assert plan(bound_factor=100.0).max_passes == 1
    assert plan(bound_factor=100.0).rank_rows == 64 * 4096 * 4
    assert plan(nodes=1, ranks=8).node_rows == 4096


def test_the_last_pass_always_fits() -> None:
    for factor in (0.01, 0.3, 1.0, 2.0, 5.0):
        for nodes, ranks in ((8, 8), (2, 4), (1, 8), (4, 1)):
            found = plan(nodes=nodes, ranks=ranks, bound_factor=factor)
            tokens = -(-4096 // found.max_passes)
            assert tokens * nodes <= found.node_rows
            assert tokens * nodes * min(8, 256 // nodes) <= found.fan_rows
            assert tokens * nodes * ranks * min(8, 256 // (nodes * ranks)) <= found.rank_rows


def test_each_node_is_named_once_and_all_are_named() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(500, 256)), jnp.float32)
    chosen, _ = route(logits, jnp.zeros(256), top_k=8, n_groups=8, top_groups=4, route_scale=2.5)
    for nodes in (2, 4, 8):
        found = np.asarray(ops.target_nodes(plan(nodes=nodes), chosen))
        for ours, experts in zip(found, np.asarray(chosen), strict=True):
            wanted = sorted({int(e) // (256 // nodes) for e in experts})
            assert ours.tolist() == wanted + [nodes] * (found.shape[1] - len(wanted))


def test_passes_are_as_many_as_the_fullest_buffer_needs() -> None:
    """16 tokens on each of 4 devices; all choose the 2 experts of one device, then all the same."""
    model = replace(V3, n_experts=8, top_k=2, n_groups=4, top_groups=2)
    mesh = make_mesh(MeshConfig(node=2, expert=2))

    def passes(experts_NK: np.ndarray, factor: float) -> tuple[int, float]:
        def one(experts_NK: jax.Array) -> Any:
            sizes = ops.make_plan(model, MoEConfig(bound_factor=factor), 16, 2, 2)
            return jax.tree.map(lambda x: x[None], ops._agree(sizes, experts_NK))

        split = P(("node", "expert"))
        run = jax.shard_map(one, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        found, overload = jax.device_get(jax.jit(run)(experts_NK))
        assert len(set(found.tolist())) == 1, "all devices agree"
        return int(found[0]), float(overload[0])

    one_device = np.tile(np.array([[4, 5]], np.int32), (64, 1))
    assert passes(one_device, 4.0) == (1, 4.0)  # 128 rows land on one of four devices
    assert passes(one_device, 2.0) == (2, 4.0)
    assert passes(one_device, 0.5) == (8, 4.0)
    even = np.stack([2 * (np.arange(64) % 4), 2 * (np.arange(64) % 4) + 1], axis=1)
    assert passes(even.astype(np.int32), 1.0) == (1, 1.0)


def test_capacity_keeps_the_first_choices_of_each_expert() -> None:
    experts = jnp.array([[0, 1], [0, 2], [0, 1], [3, 0]])
    kept, dropped = ops.drop_beyond_capacity(experts, 4, 1.0)
    assert kept.tolist() == [[0, 1], [0, 2], [4, 1], [3, 4]]
    assert int(dropped) == 2
    assert int(ops.drop_beyond_capacity(experts, 4, 2.0)[1]) == 0
