"""A training step through a pipeline against the same step on one device, in FP64.

Real blocks: MLA, mixtures of experts with their exchange, the balance loss and MTP modules. Next
state, loss, counts and held-out loss have to be the same, whatever the schedule, the number of
micro-batches and what is recomputed. Dims: M micro-batches, B sequences, S = T + 1 row.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests.model import small
from v3jax import sharding, state
from v3jax.config import BatchConfig, ExperimentConfig, MeshConfig, PipelineConfig
from v3jax.model.block import Block
from v3jax.model.layers import Module, type_of
from v3jax.model.transformer import Transformer
from v3jax.pipeline.plan import Orders
from v3jax.pipeline.stage import Stage
from v3jax.sharding import make_mesh
from v3jax.state import state_around, state_shardings
from v3jax.step import amount_of, amount_specs, make_eval_step, make_train_step

B = 2


@pytest.fixture(autouse=True)
def _fp64_and_small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also small parameters are stored in parts."""

    def forget() -> None:
        for cached in (state.param_specs, state.state_specs, stepped):
            cached.cache_clear()

    monkeypatch.setattr(sharding, "_SMALL", 64)
    forget()
    with jax.enable_x64(True):
        yield
    forget()


def experiment(
    name: Any = "dualpipe",
    n_ranks: int = 2,
    n_micro: int = 4,
    *,
    mode: Any = "branches",
    pair_time: float = 3.0,
    most_waiting: int | None = None,
    remat: Any = "none",
    storage: Any = "zero1",
    deterministic: bool = False,
    data: int = 1,
    node: int = 1,
    expert: int = 1,
    compute: Any = "fp64",
    **changes: Any,
) -> ExperimentConfig:
    """By default with a dense layer and as many MoE layers as there are stages."""
    stages = n_ranks * (2 if name == "dualpipev" else 1)
    sizes = {"n_layers": stages + 1, "n_dense_layers": 1, "mtp_depth": 1, "dim": 16}
    model = small.config(**{**sizes, "vocab_size": 64, **changes})
    batch = B * data * node * expert
    return small.experiment(
        model,
        numerics=replace(small.numerics(compute=compute, moments="fp32"), remat=remat),
        batch=BatchConfig(
            micro_batch=batch,
            start=max(n_micro - 1, 1) * batch,
            end=n_micro * batch,
            ramp_tokens=0.0,
        ),
        mesh=MeshConfig(
            pipe=n_ranks,
            data=data,
            node=node,
            expert=expert,
            storage=storage,
            deterministic=deterministic,
        ),
        pipeline=PipelineConfig(
            schedule=name, mode=mode, pair_time=pair_time, most_waiting=most_waiting
        ),
    )


@functools.cache
def stepped(
    cfg: ExperimentConfig, counts: tuple[int, ...], flip: bool = False
) -> list[tuple[Any, Any, Any]]:
    """The state after a step of so many micro-batches, its metrics, and the held-out loss of the
    parameters before it, for each count. With `flip` inputs are read from a wrong slot."""
    n_micro, found = cfg.batch.end // cfg.batch.micro_batch, []
    mesh = make_mesh(cfg.mesh)
    tokens, segments = small.batch(cfg, cfg.batch.end, padding=3)
    if cfg.data.isolate_documents:
        segments[:, segments.shape[1] // 2 :] *= 2
    shape = (n_micro, cfg.batch.micro_batch, -1)
    rows = tokens.reshape(shape), segments.reshape(shape)
    with jax.set_mesh(mesh):
        step, evaluate = make_train_step(cfg, mesh), make_eval_step(cfg, mesh)
        for count in counts:
            params, router = small.params(cfg.model), small.router_state(cfg.model)
            if cfg.numerics.compute != "fp64":
                params = small.to_jax(params)
            params = jax.device_put(params, state_shardings(cfg, mesh).params)
            placed = state_around(cfg, params, small.to_jax(router), mesh)
            nll = evaluate(placed.params, placed.router_state, tokens, segments)
            amount = amount_of(cfg, count)
            if flip:
                assert isinstance(amount, Orders)
                f_x = np.where(amount.ranks["f_x"] >= 0, 0, -1)
                amount = replace(amount, ranks=amount.ranks | {"f_x": f_x})
            places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), amount_specs(cfg))
            after = step(placed, *rows, jax.device_put(amount, places))
            found.append(jax.device_get((*after, nll)))
    return found


def check(cfg: ExperimentConfig, *counts: int, flip: bool = False, tolerance: float = 1e-12) -> Any:
    """Compares steps of so many micro-batches, or of all; gives the last metrics."""
    counts = counts or (cfg.batch.end // cfg.batch.micro_batch,)
    alone = replace(
        cfg,
        mesh=MeshConfig(),
        pipeline=PipelineConfig(),
        numerics=replace(cfg.numerics, remat="none"),
    )
    assert alone.mesh.n_devices == 1
    metrics = None
    for ours, theirs in zip(stepped(cfg, counts, flip), stepped(alone, counts), strict=True):
        (got, metrics, nll), (wanted, expected, wanted_nll) = ours, theirs
        np.testing.assert_array_equal(metrics["load_LE"], expected["load_LE"])
        for name in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=tolerance, err_msg=name)
        assert nll[1] == wanted_nll[1]
        np.testing.assert_allclose(nll[0], wanted_nll[0], rtol=tolerance)
        # First moments are a tenth of the clipped gradients.
        for (path, w), g in zip(
            jax.tree.leaves_with_path(wanted), jax.tree.leaves(got), strict=True
        ):
            scale = np.abs(np.asarray(w, np.float64)).max(initial=0.0)
            np.testing.assert_allclose(
                g, w, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path)
            )
    return metrics


def case(*values: Any, all_alone: bool = False, **options: Any) -> Any:
    mark = pytest.mark.exhaustive if all_alone else pytest.mark.slow
    return pytest.param(*values, options, marks=mark)


@pytest.mark.parametrize(
    ("name", "n_ranks", "n_micro", "options"),
    [
        ("dualpipe", 2, 4, {}),
        case("gpipe", 2, 3, all_alone=True),
        case("gpipe", 4, 4, all_alone=True),
        case("gpipe", 8, 8, all_alone=True),
        case("1f1b", 2, 4, all_alone=True),
        case("1f1b", 4, 5, all_alone=True),
        case("1f1b", 8, 9, all_alone=True),
        case("zb1p", 2, 4, all_alone=True),
        case("zb1p", 4, 6, all_alone=True),
        case("zb1p", 8, 9, all_alone=True),
        case("dualpipe", 4, 8, pair_time=2.0),
        case("dualpipe", 8, 16, all_alone=True),
        case("dualpipev", 2, 4, all_alone=True, pair_time=2.0),
        case("dualpipev", 4, 8, all_alone=True),
    ],
)
def test_the_next_state_is_that_of_one_device(
    name: str, n_ranks: int, n_micro: int, options: dict[str, Any]
) -> None:
    """Also with one micro-batch less, of an odd number too, and fewer than DualPipe would take."""
    metrics = check(experiment(name, n_ranks, n_micro, **options), n_micro, n_micro - 1)
    assert metrics["dropped_choices"] == metrics["extra_passes"] == 0
    np.testing.assert_allclose(metrics["rank_overload"], 1, rtol=1e-6)


EVERY = ("gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev")


def some(names: tuple[str, ...], *quick: str) -> Any:
    """Names, of which these are slow tests and the others exhaustive ones."""
    marks = {True: pytest.mark.slow, False: pytest.mark.exhaustive}
    return [pytest.param(name, marks=marks[name in quick]) for name in names]


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        pytest.param("dualpipe", "report", marks=pytest.mark.slow),
        *(
            pytest.param(name, remat, marks=pytest.mark.exhaustive)
            for name in EVERY
            for remat in ("report", "full")
            if (name, remat) != ("dualpipe", "report")
        ),
    ],
)
def test_recomputation_changes_nothing(name: str, remat: str) -> None:
    check(experiment(name, remat=remat))


@pytest.mark.parametrize("name", some(EVERY, "dualpipe"))
def test_masked_ranks_compute_the_same(name: str) -> None:
    check(experiment(name, mode="masked"), 4, 3)


@pytest.mark.parametrize("name", some(EVERY))
def test_weight_gradients_need_not_wait(name: str) -> None:
    check(experiment(name, most_waiting=0))


@pytest.mark.exhaustive
def test_experts_and_batches_are_split_within_a_stage() -> None:
    check(experiment(data=2, expert=2))
    check(experiment(node=2, expert=2, storage="whole", deterministic=True))


@pytest.mark.exhaustive
def test_experts_that_take_several_passes() -> None:
    cfg = experiment(expert=4)
    metrics = check(replace(cfg, moe=replace(cfg.moe, bound_factor=0.25)))
    assert metrics["extra_passes"] > 0


def test_gradients_of_experts_do_not_wait_with_what_input_gradients_find(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though tokens may take several passes, whose gradients add up in a loop."""
    found: list[tuple[int, ...]] = []

    def kept(self: Stage, ends: Any) -> None:
        if self.rules.halves:  # of a step, not of an evaluation
            found.extend(shape.shape for shape in self.layer.found)
            raise ValueError("enough")

    monkeypatch.setattr(Stage, "check", kept)
    cfg = experiment(expert=4)
    with pytest.raises(ValueError, match="enough"):
        stepped(replace(cfg, moe=replace(cfg.moe, bound_factor=0.25)), (4,))
    model = cfg.model
    experts, width = model.n_experts // 4, model.expert_ffn_dim
    assert found
    assert not {(experts, model.dim, 2 * width), (experts, width, model.dim)} & set(found)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "changes",
    [{"mtp_depth": 0, "n_dense_layers": 2}, {"mtp_depth": 2, "n_dense_layers": 0}],
    ids=str,
)
def test_ends_of_other_models(changes: dict[str, Any]) -> None:
    """A dense layer or a module may be all that a stage has."""
    check(experiment(n_ranks=4, n_layers=5, **changes), 4, 3)


@pytest.mark.exhaustive
def test_a_stage_without_moe_layers() -> None:
    cfg = experiment(n_ranks=4, n_micro=2, n_layers=3)
    assert cfg.model.n_moe_layers == 2
    check(cfg, 2, 1)


@pytest.mark.exhaustive
def test_documents_are_isolated_and_the_batch_is_balanced() -> None:
    cfg = experiment(mtp_depth=2)
    check(
        replace(
            cfg,
            data=replace(cfg.data, isolate_documents=True),
            balance=replace(cfg.balance, strategy="aux_loss", aux_alpha=0.3, loss_over="batch"),
        )
    )


@pytest.mark.slow
def test_bf16_is_as_near_as_bf16_is() -> None:
    """The order of sums differs, and every step's signs do where gradients are nearly zero."""
    cfg = experiment(compute="bf16")
    exact = stepped(replace(cfg, mesh=MeshConfig(), numerics=experiment().numerics), (4,))[0]
    near = {}
    for name, some in (("one device", replace(cfg, mesh=MeshConfig())), ("pipeline", cfg)):
        with jax.enable_x64(False):
            moments = stepped(some, (4,))[0][0].opt_state[1].mu
        near[name] = [
            np.linalg.norm(m - e) / np.linalg.norm(e)
            for m, e in zip(
                jax.tree.leaves(moments), jax.tree.leaves(exact[0].opt_state[1].mu), strict=True
            )
        ]
    assert max(near["pipeline"]) < 1.5 * max(near["one device"])
    assert max(near["pipeline"]) < 0.1


@pytest.mark.slow
def test_the_comparison_can_fail() -> None:
    """With inputs from a wrong slot the gradients are others."""
    with pytest.raises(AssertionError):
        check(experiment(n_ranks=4, n_micro=8), flip=True)


@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_weights_travel_in_the_types_that_modules_compute_with(
    compute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`type_of` knows by name what each module asks for."""
    numerics = small.numerics(compute=compute)
    asked: dict[str, Any] = {}
    parameter = Module.parameter

    def noted(
        self: Module, name: str, *rest: Any, dtype: Any = None, join: Any = None
    ) -> jax.Array:
        asked[name] = jnp.dtype(dtype or jnp.float32)
        return parameter(self, name, *rest, dtype=dtype, join=join)

    monkeypatch.setattr(Module, "parameter", noted)
    model = small.config()
    boxed = jax.eval_shape(
        lambda: Transformer(*small.parts(model, compute=compute)).init(
            jax.random.key(0), jnp.zeros((1, 9), jnp.int32), ahead=1
        )
    )
    names = {p[-1].key for p, _ in jax.tree.leaves_with_path(sharding.unbox(boxed)["params"])}
    # These two are cast where they are used: by the look-up and by the head.
    by_use = {"embed_tokens", "lm_head"}
    assert names == set(asked)
    for name in names - by_use:
        assert type_of(f"['moe_layers']['{name}']", numerics) == asked[name], name
    assert asked["gate"] == asked["norm"] == jnp.float32
    assert asked["eh_proj"] == jnp.bfloat16
    assert asked["o_proj"] == (jnp.float32 if compute == "fp8" else jnp.bfloat16)


@pytest.mark.parametrize("collective", ["ppermute over expert", "psum over pipe"])
def test_collectives_that_would_wait_for_ever_are_refused(
    collective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = experiment(expert=2)
    name, _, axis = collective.split()
    call = Block.__call__

    def exchanging(self: Block, x_BTD: jax.Array, *rest: Any) -> Any:
        if jax.sharding.get_abstract_mesh().manual_axes:
            pairs = {"perm": [(0, 1), (1, 0)]} if name == "ppermute" else {}
            x_BTD = getattr(jax.lax, name)(x_BTD, axis, **pairs)
        return call(self, x_BTD, *rest)

    monkeypatch.setattr(Block, "__call__", exchanging)
    with pytest.raises(ValueError, match=f"pipeline: a layer has {collective}, which ranks at"):
        stepped(cfg, (4,))


def test_what_a_pipeline_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"mesh.pipe: 3 ranks are odd and dualpipe"):
        experiment(n_ranks=3)
    with pytest.raises(ValueError, match=r"mesh.pipe: 6 stages of 1f1b, .* cut into 5 at most"):
        experiment("1f1b", n_ranks=6, n_layers=4)
    with pytest.raises(ValueError, match=r"mesh.pipe: a pipeline passes through MoE layers"):
        experiment(n_layers=2, n_dense_layers=2)
    with pytest.raises(ValueError, match=r"mesh.pipe: 4 ranks do not divide model.vocab_size=41"):
        experiment(n_ranks=4, vocab_size=41)
    with pytest.raises(ValueError, match=r"mesh.storage: fsdp gathers a layer where it is used"):
        experiment(storage="fsdp")
    with pytest.raises(ValueError, match=r"pipeline.pair_time: must be within 2..3"):
        experiment(pair_time=3.5)
