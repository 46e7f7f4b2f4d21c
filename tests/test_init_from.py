"""A run that starts from weights: a run directory, a Hugging Face directory, a conversion."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests import mini
from v3jax import checkpoint, convert, models
from v3jax.metrics import read_rows
from v3jax.sharding import make_mesh
from v3jax.state import init_state, state_around


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The mini run in each form weights may come in."""
    folder = tmp_path_factory.mktemp("sources")
    convert.to_hf(mini.finished(), folder / "hf", dtype="fp32")
    convert.from_hf(folder / "hf", folder / "converted")
    return {"run": mini.finished(), "hf": folder / "hf", "converted": folder / "converted"}


def continued(source: Path, **changes: Any) -> Any:
    tokens = 2 * 2 * 32.0
    cfg = mini.config(total_tokens=tokens, eval_every=1)
    tokenizer = str(mini.finished() / "tokenizer.json")
    return replace(
        cfg, init_from=str(source), data=replace(cfg.data, tokenizer=tokenizer), **changes
    )


@pytest.mark.parametrize("form", ["run", "hf", "converted"])
def test_training_goes_on_from_the_weights(
    sources: dict[str, Path], tmp_path: Path, form: str
) -> None:
    mini.run_here(continued(sources[form]), tmp_path / "run")
    last = read_rows(mini.finished() / "metrics.jsonl")[-1]["eval_loss"]
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["eval_loss"] == pytest.approx(last, rel=1e-6)
    assert rows[0]["step"] == 0
    assert rows[1]["eval_loss"] != rows[0]["eval_loss"]


def test_the_weights_are_those_of_the_source_and_the_rest_is_new(sources: dict[str, Path]) -> None:
    cfg = continued(sources["hf"])
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        state = state_around(cfg, *models.initial_weights(cfg, mesh), mesh)
        fresh = init_state(cfg, mesh)
    _, params, router_state, _ = models.load_run(mini.finished())
    same = jax.tree.map(
        lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), params, state.params
    )
    assert all(jax.tree.leaves(same))
    assert any(np.asarray(b).any() for b in jax.tree.leaves(state.router_state)), "biases moved"
    assert jax.tree.all(jax.tree.map(np.array_equal, router_state, state.router_state))
    assert jax.tree.all(jax.tree.map(np.array_equal, state.ema, state.params))
    assert jax.tree.all(jax.tree.map(np.array_equal, state.opt_state, fresh.opt_state))
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    assert (int(state.step), int(state.sequences)) == (0, 0)


def test_weights_land_in_the_places_of_a_sharded_run(sources: dict[str, Path]) -> None:
    cfg = continued(sources["hf"])
    batch = replace(cfg.batch, micro_batch=8, start=8, end=8)
    cfg = replace(cfg, batch=batch, mesh=replace(cfg.mesh, data=2, expert=2, node=2))
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        for form in ("run", "hf"):
            own = replace(cfg, init_from=str(sources[form]))
            params, _ = models.initial_weights(own, mesh)
            experts = params["moe_layers"]["mlp"]["experts"]["down_proj"]
            n_experts = cfg.model.n_experts
            assert experts.sharding.shard_shape(experts.shape)[1] == n_experts // 4
            state = state_around(own, params, models.initial_weights(own, mesh)[1], mesh)
            assert state.params["norm"].sharding.mesh == mesh


def test_another_models_weights_are_refused_by_field(sources: dict[str, Path]) -> None:
    cfg = continued(sources["hf"])
    other = replace(cfg, model=replace(cfg.model, dense_ffn_dim=96, mtp_depth=0))
    for form in ("run", "hf", "converted"):
        with pytest.raises(ValueError, match=r"model\.dense_ffn_dim is 64, not 96") as error:
            models.initial_weights(
                replace(other, init_from=str(sources[form])), make_mesh(cfg.mesh)
            )
        assert "mtp_depth is 1, not 0" in str(error.value)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("check", [True, False])
def test_nothing_there_is_one_line_and_leaves_nothing_behind(tmp_path: Path, check: bool) -> None:
    cfg = continued(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere: no model here"):
        mini.run_here(cfg, tmp_path / "run", check=check)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_does_not_start_from_the_weights_again(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    cfg = continued(sources["hf"])
    mini.run_here(cfg, tmp_path / "run")
    longer = replace(cfg, run=replace(cfg.run, total_tokens=3 * 2 * 32.0))
    mini.run_here(longer, tmp_path / "run")
    mini.run_here(longer, tmp_path / "whole")
    found = checkpoint.latest(tmp_path / "run")
    whole = checkpoint.latest(tmp_path / "whole")
    assert found is not None
    assert whole is not None
    assert found.step == whole.step == 3
    assert found.manifest["arrays"] == whole.manifest["arrays"]
