"""Layers find their ranks and gradients their way back."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.v3 import v3_full
from tests.model import small
from v3jax.config import MeshConfig
from v3jax.pipeline.placement import from_ranks, layout, partition, to_ranks
from v3jax.pipeline.schedule import SCHEDULES
from v3jax.sharding import ShardingRules, make_mesh

MODEL = small.config(n_layers=8, n_dense_layers=1, mtp_depth=1)  # seven MoE layers


def test_the_reports_layers_over_its_ranks() -> None:
    """61 blocks and the MTP module's are 62 layers: 4 or 3 of them on each of 16 stages."""
    model = v3_full().model
    stages = partition(model, 16)
    assert [layer for stage in stages for layer in stage] == list(range(58))
    counts = [len(stage) for stage in stages]
    assert counts == [1, *[4] * 13, 3, 2]
    assert max(counts) == 4
    load = [counts[0] + 3, *counts[1:-1], counts[-1] + 1]
    assert sum(load) == 62
    assert set(load) == {3, 4}


@pytest.mark.parametrize("n_stages", range(1, 10))
def test_every_stage_has_something_to_do(n_stages: int) -> None:
    """The dense layers or the MTP modules may be all that the first or the last one has."""
    stages = partition(MODEL, n_stages)
    assert [layer for stage in stages for layer in stage] == list(range(7))
    counts = list(map(len, stages))
    assert min(counts[1:-1], default=1) >= 1
    counts[0] += MODEL.n_dense_layers
    counts[-1] += MODEL.mtp_depth
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    many_dense = replace(MODEL, n_layers=27, n_dense_layers=20)
    assert min(list(map(len, partition(many_dense, n_stages)))[1:-1], default=1) >= 1


@pytest.mark.parametrize(("dense", "mtp", "most"), [(1, 1, 9), (0, 1, 8), (1, 0, 8), (0, 0, 7)])
def test_more_stages_than_parts_are_refused(dense: int, mtp: int, most: int) -> None:
    model = replace(MODEL, n_layers=7 + dense, n_dense_layers=dense, mtp_depth=mtp)
    assert len(partition(model, most)) == most
    with pytest.raises(ValueError, match=f"{most + 1} stages, but the model has 7 MoE layers"):
        partition(model, most + 1)


def test_ranks_hold_the_stages_of_both_directions() -> None:
    both = layout(MODEL, SCHEDULES["dualpipe"](2, 4)).layers_RCQ
    assert both.tolist() == [[[0, 1, 2, 3], [4, 5, 6, -1]], [[4, 5, 6, -1], [0, 1, 2, 3]]]
    folded = layout(MODEL, SCHEDULES["dualpipev"](2, 4)).layers_RCQ
    assert sorted(folded[folded >= 0].tolist()) == list(range(7))
    first, last = folded[0, 0], folded[0, 1]
    assert first.max() < folded[1, 0].max() < folded[1, 1].max() < last.max() == 6


CASES = {
    "split over pipe and data": (P(None, None, None), P(None, None, ("pipe", "data"))),
    "split over pipe alone": (P(None, None, None), P(None, "pipe")),
    "split over data alone": (P(None, None, None), P(None, None, "data")),
    "whole": (P(None, None, None), P(None, None, None)),
    "experts split too": (P(None, ("node", "expert"), None), P(None, ("node", "expert"), "pipe")),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_layers_go_to_their_ranks_and_gradients_come_back(
    name: str, case: str, deterministic: bool
) -> None:
    spec, place = CASES[case]
    wide = MeshConfig(pipe=2, expert=4) if "experts" in case else MeshConfig(pipe=2, data=4)
    mesh = make_mesh(wide)
    rules = ShardingRules(storage="zero1", deterministic=deterministic)
    schedule = SCHEDULES[name](2, 4)
    where = layout(MODEL, schedule)
    n_layers, rows, columns = 7, 8, 16
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n_layers, rows, columns)).astype(np.float32)
    n = where.flat.shape[1]
    # Gradients of every device: of its rank's slots, and of its own part of the batch.
    devices = (2, 4)
    held = rows // 4 if "experts" in case else rows
    g = rng.normal(size=(*devices, n, held, columns)).astype(np.float32)

    def run(x: jax.Array, g: jax.Array) -> Any:
        mine = to_ranks(x, spec, place, where, rules, jnp.dtype(jnp.bfloat16))
        back = from_ranks(g[0, 0], spec, place, where, n_layers, rules)
        return mine[None, None], back

    outer = ("data", "node", "expert")
    both = P("pipe", outer)
    with jax.set_mesh(mesh):
        mine, back = jax.jit(
            jax.shard_map(
                run,
                mesh=mesh,
                in_specs=(place, both),
                out_specs=(both, place),
                check_vma=False,
            )
        )(jax.device_put(x, NamedSharding(mesh, place)), g)
    assert mine.dtype == jnp.bfloat16
    whole = np.asarray(jnp.asarray(x, jnp.bfloat16))
    wanted = np.zeros((n_layers, rows, columns))
    for rank, layers_N in enumerate(where.layers_RCQ.reshape(2, -1)):
        for part in range(4):
            rows_here = slice(part * held, (part + 1) * held) if held < rows else slice(None)
            for slot, layer in enumerate(layers_N):
                if layer >= 0:
                    got = np.asarray(mine[rank, part, slot])
                    np.testing.assert_array_equal(got, whole[layer, rows_here])
                    wanted[layer, rows_here] += g[rank, part, slot]
    np.testing.assert_allclose(back, wanted, atol=1e-5)
