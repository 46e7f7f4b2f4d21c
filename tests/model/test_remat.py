"""Recompute policies: same numbers, different memory and work."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v3jax.config import ModelConfig
from v3jax.model.transformer import Transformer

# One dense block, scanned, and one mixture-of-experts block, not scanned.
CFG = small.config(n_layers=1, n_dense_layers=1, mtp_depth=1, dense_ffn_dim=17)
POLICIES = ("none", "report", "full")
N_ROWS, LENGTH = 2, 13


def make_loss(remat: str, cfg: ModelConfig = CFG) -> Any:
    """A scalar of the parameters that touches every output."""
    model = Transformer(*small.parts(cfg, remat=remat))
    state = small.to_jax(small.router_state(cfg))
    tokens = jnp.asarray(
        np.random.default_rng(0).integers(0, cfg.vocab_size, (N_ROWS, LENGTH + 1)), jnp.int32
    )

    def loss(params: Any) -> jax.Array:
        out = small.apply(model, {"params": params, "router_state": state}, tokens, ahead=1)
        states = jnp.concatenate([out.hidden_BTD, *out.mtp_hidden])
        return jnp.sum(jnp.sin(states)) + out.stats.balance_loss.sum()

    return loss


def residual_shapes(remat: str, cfg: ModelConfig = CFG) -> list[tuple[int, ...]]:
    """Shapes of what the forward pass keeps for the backward pass, parameters left out."""
    params = small.to_jax(small.params(cfg))
    kept = jax.eval_shape(lambda p: jax.vjp(make_loss(remat, cfg), p)[1], params)
    own = [x.shape for x in jax.tree.leaves(params)]
    shapes = [x.shape for x in jax.tree.leaves(kept)]
    for shape in own:
        if shape in shapes:
            shapes.remove(shape)
    return shapes


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """The compiled value-and-gradient of each policy."""
    params = small.to_jax(small.params(CFG))
    return {r: jax.jit(jax.value_and_grad(make_loss(r))).lower(params).compile() for r in POLICIES}


@pytest.mark.parametrize("remat", ["report", "full"])
def test_policies_give_the_same_loss_and_gradients(remat: str, compiled: dict) -> None:
    params = small.to_jax(small.params(CFG))
    loss, gradients = compiled[remat](params)
    wanted, wanted_gradients = compiled["none"](params)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    for (path, g), w in zip(
        jax.tree.flatten_with_path(gradients)[0], jax.tree.leaves(wanted_gradients), strict=True
    ):
        size = float(jnp.abs(w).max())
        np.testing.assert_allclose(g, w, atol=1e-5 * size, err_msg=jax.tree_util.keystr(path))


def test_each_policy_keeps_less_of_a_block_than_the_one_before() -> None:
    def kept(remat: str, n_layers: int) -> int:
        cfg = small.config(n_layers=n_layers, n_dense_layers=0, mtp_depth=0)
        return sum(int(np.prod(s)) for s in residual_shapes(remat, cfg))

    block = {r: (kept(r, 5) - kept(r, 2)) / 3 for r in POLICIES}
    state = N_ROWS * LENGTH * CFG.dim  # what every block starts from
    print(block, state)
    assert state <= block["full"] < 1.2 * state
    assert block["full"] < 0.4 * block["report"]
    assert block["report"] < 0.6 * block["none"]


def test_each_policy_works_more_than_the_one_before(compiled: dict) -> None:
    work = {r: c.cost_analysis()["flops"] for r, c in compiled.items()}
    assert work["none"] < work["report"] < work["full"]


def heads(shapes: list[tuple[int, ...]]) -> set[int]:
    """Widths of the kept arrays that have batch, time and head axes."""
    return {s[-1] for s in shapes if s[-4:-1] == (N_ROWS, LENGTH, CFG.n_heads)}


def test_the_reports_policy_recomputes_up_projections_and_keeps_attention() -> None:
    key, value = CFG.nope_head_dim + CFG.rope_head_dim, CFG.v_head_dim
    assert {key, value} <= heads(residual_shapes("none"))
    assert heads(residual_shapes("report")) == {value}  # the attention's output, no key or query
    assert heads(residual_shapes("full")) == set()


def test_the_reports_policy_keeps_swiglu_inputs_and_not_its_outputs() -> None:
    widths = {s[-1] for s in residual_shapes("report") if len(s) >= 2}
    for width in (CFG.expert_ffn_dim, CFG.n_shared_experts * CFG.expert_ffn_dim, CFG.dense_ffn_dim):
        assert 2 * width in widths
    assert not {CFG.expert_ffn_dim, CFG.dense_ffn_dim} & widths
