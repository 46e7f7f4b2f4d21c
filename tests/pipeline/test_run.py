"""Gradients through a pipeline against those of the model as a whole, in FP64.

Real blocks: MLA, mixtures of experts with their exchange, the balance loss and an MTP module.
Dims: M micro-batches, R ranks, N slots of a rank, L MoE layers.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.model import small
from v3jax import objective
from v3jax.config import BatchConfig, ExperimentConfig, MeshConfig
from v3jax.objective import LossParts, Scale
from v3jax.pipeline.run import Program
from v3jax.pipeline.schedule import SCHEDULES
from v3jax.pipeline.stages import layout
from v3jax.pipeline.table import make_table
from v3jax.pipeline.ticks import lockstep
from v3jax.sharding import ShardingRules, make_mesh, rules_of

B = 2


@pytest.fixture(autouse=True)
def _fp64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def experiment(name: str, n_ranks: int, remat: Any = "none", expert: int = 1) -> ExperimentConfig:
    """With a dense layer and one MoE layer more than there are stages."""
    stages = n_ranks * (2 if name == "dualpipev" else 1)
    model = small.config(n_layers=stages + 2, n_dense_layers=1, mtp_depth=1, dim=16, vocab_size=64)
    return small.experiment(
        model,
        numerics=replace(small.numerics(compute="fp64", moments="fp32"), remat=remat),
        batch=BatchConfig(
            micro_batch=B * expert, start=B * expert, end=8 * B * expert, ramp_tokens=0.0
        ),
        mesh=MeshConfig(pipe=n_ranks, expert=expert),
    )


class Case:
    """Both sides' gradients of a step with some schedule."""

    def __init__(
        self, name: str, cfg: ExperimentConfig, n_micro: int, fb: float, flip: bool = False
    ) -> None:
        self.cfg, self.n_micro = cfg, n_micro
        model, mesh = cfg.model, cfg.mesh
        tokens, segments = small.batch(cfg, n_micro * B * mesh.expert, padding=3)
        shape = (n_micro, B * mesh.expert, -1)
        self.rows = (jnp.asarray(tokens.reshape(shape)), jnp.asarray(segments.reshape(shape)))
        self.params = jax.tree.map(jnp.asarray, small.params(model))
        self.router_state = jax.tree.map(jnp.asarray, small.router_state(model))
        mask = objective.target_mask(self.rows[1], isolate_documents=False)
        self.scale = Scale(
            n_targets=mask.sum().astype(jnp.float32),
            n_sequences=jnp.float32(n_micro * B * mesh.expert),
            mtp_weight=jnp.float32(0.3),
        )
        schedule = SCHEDULES[name](mesh.pipe, n_micro)
        self.table = make_table(lockstep(schedule, fb=fb))
        if flip:
            self.table.ranks["f_x"][:] = np.where(self.table.ranks["f_x"] >= 0, 0, -1)
        self.where = layout(model, schedule)

    def ours(self) -> tuple[Any, LossParts]:
        mesh = make_mesh(self.cfg.mesh)
        experts = P(None, ("node", "expert"))
        specs: Any = jax.tree.map(lambda _: P(), self.params)
        for group in (specs["moe_layers"], specs["mtp_layers_0"]["block"]):
            stacked = group is specs["moe_layers"]
            for matrix in group["mlp"]["experts"]:
                group["mlp"]["experts"][matrix] = experts if stacked else P(("node", "expert"))
        whole = {k: v for k, v in self.params.items() if k not in ("embed_tokens", "lm_head")}
        specs = {k: specs[k] for k in whole}
        rows = P(None, ("data", "node", "expert"))

        def rank(params: Any, embed: Any, head: Any, tokens: Any, segments: Any) -> Any:
            mine_N = jnp.asarray(self.where.flat)[jax.lax.axis_index("pipe")]
            ends = dict(params)
            layers = jax.tree.map(lambda a: a[mine_N], ends.pop("moe_layers"))
            program = Program(
                self.cfg,
                rules_of(self.cfg),
                self.table,
                self.where,
                layers,
                ends,
                embed,
                head,
                self.router_state,
                tokens,
                segments,
                self.scale,
            )
            gradients, parts = program.gradients()
            # Over the batch too: of experts, which no other device has, nothing is added.
            added = jax.tree.map(
                lambda g, spec: g if jax.tree.leaves(tuple(spec)) else jax.lax.psum(g, "expert"),
                gradients,
                {
                    "layers": specs["moe_layers"],
                    "ends": {k: v for k, v in specs.items() if k != "moe_layers"},
                    "embed": P(),
                    "head": P(),
                },
            )
            added["ends"] = jax.lax.psum(added["ends"], "pipe")
            added["layers"] = jax.tree.map(lambda a: a[None], added["layers"])
            passes = jax.lax.psum(parts.extra_passes, "pipe")  # all of a stage's devices agree
            parts = jax.lax.psum(parts, ("pipe", "expert"))
            return added, replace(parts, extra_passes=passes)

        layer_specs = jax.tree.map(lambda spec: P("pipe", *spec), specs["moe_layers"])
        ends = {k: v for k, v in specs.items() if k != "moe_layers"}
        out = {"layers": layer_specs, "ends": ends, "embed": P("pipe"), "head": P(None, "pipe")}
        run = jax.shard_map(
            rank,
            mesh=mesh,
            in_specs=(specs, P("pipe"), P(None, "pipe"), rows, rows),
            out_specs=(out, P()),
            check_vma=False,
        )
        inputs = (whole, self.params["embed_tokens"], self.params["lm_head"], *self.rows)
        with jax.set_mesh(mesh):
            gradients, parts = jax.device_get(jax.jit(run)(*inputs))
        n_layers = self.cfg.model.n_moe_layers
        stacks = jax.tree.map(lambda a: np.zeros((n_layers, *a.shape[2:])), gradients["layers"])
        for r, layers_N in enumerate(self.where.layers_RCQ.reshape(self.cfg.mesh.pipe, -1)):
            for slot, layer in enumerate(layers_N):
                if layer >= 0:
                    for total, g in zip(
                        jax.tree.leaves(stacks), jax.tree.leaves(gradients["layers"]), strict=True
                    ):
                        total[layer] += g[r, slot]
        named = {"embed_tokens": gradients["embed"], "lm_head": gradients["head"]}
        return {**gradients["ends"], **named, "moe_layers": stacks}, parts

    def wanted(self) -> tuple[Any, LossParts]:
        cfg = replace(self.cfg, mesh=MeshConfig())

        def loss(params: Any) -> Any:
            total, parts = jnp.zeros(()), []
            for m in range(self.n_micro):
                rows = (self.rows[0][m], self.rows[1][m])
                one, part = objective.loss(
                    cfg, params, self.router_state, *rows, self.scale, ShardingRules()
                )
                total += one
                parts.append(part)
            return total, jax.tree.map(lambda *a: sum(a), *parts)

        return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(self.params))


def check(case: Case) -> None:
    got, parts = case.ours()
    wanted, expected = case.wanted()
    assert set(got) == set(wanted)
    for (path, w), g in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(got), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-12 * np.abs(w).max(), err_msg=name)
    np.testing.assert_array_equal(parts.load_LE, expected.load_LE)
    for name in ("main", "mtp", "balance"):
        np.testing.assert_allclose(getattr(parts, name), getattr(expected, name), rtol=1e-12)
    assert parts.dropped == expected.dropped == 0
    if case.cfg.mesh.expert == 1:
        assert parts.extra_passes == expected.extra_passes == 0
        np.testing.assert_allclose(parts.overload, expected.overload, rtol=1e-6)


MORE = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "n_ranks", "n_micro", "fb"),
    [
        ("dualpipe", 2, 4, 3.0),
        pytest.param("gpipe", 2, 3, 3.0, marks=MORE),
        pytest.param("1f1b", 2, 4, 3.0, marks=MORE),
        pytest.param("zb1p", 4, 6, 3.0, marks=MORE),
        pytest.param("dualpipe", 4, 8, 1.5, marks=MORE),
        pytest.param("dualpipev", 2, 4, 1.5, marks=MORE),
        pytest.param("dualpipe", 8, 16, 3.0, marks=MORE),
    ],
)
def test_gradients_are_those_of_the_whole_model(
    name: str, n_ranks: int, n_micro: int, fb: float
) -> None:
    check(Case(name, experiment(name, n_ranks), n_micro, fb))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["report", "full"])
def test_recomputation_changes_nothing(remat: str) -> None:
    check(Case("dualpipe", experiment("dualpipe", 2, remat), 4, 3.0))


@pytest.mark.slow
def test_experts_are_split_within_a_stage() -> None:
    check(Case("dualpipe", experiment("dualpipe", 2, expert=2), 4, 3.0))


@pytest.mark.slow
def test_the_comparison_can_fail() -> None:
    """With inputs from a wrong slot the gradients are others."""
    with pytest.raises(AssertionError):
        check(Case("dualpipe", experiment("dualpipe", 4), 8, 3.0, flip=True))
