"""The objective of a batch: value, parts, gradients, padding and documents.

Dims: B sequences, S = T + 1 row, E experts.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from tests.reference.loss import Objective
from tests.reference.loss import objective as reference
from v3jax import objective
from v3jax.config import ExperimentConfig

LAMBDA, ALPHA = 0.7, 0.5
EXPERIMENT = small.experiment()
CFG = replace(EXPERIMENT, balance=replace(EXPERIMENT.balance, sequence_alpha=ALPHA))
# One mixture-of-experts block and one prediction module, where gradients are not the point.
BRIEF = replace(CFG, model=small.config(n_layers=1, n_dense_layers=0, mtp_depth=1))
ISOLATED = replace(BRIEF, data=replace(CFG.data, isolate_documents=True))


def scale(cfg: ExperimentConfig, segments: np.ndarray) -> objective.Scale:
    mask = objective.target_mask(
        jnp.asarray(segments), isolate_documents=cfg.data.isolate_documents
    )
    return objective.Scale(
        n_targets=mask.sum().astype(jnp.float32),
        n_sequences=jnp.float32(len(segments)),
        mtp_weight=jnp.float32(LAMBDA),
    )


def trees(cfg: ExperimentConfig) -> tuple[dict, dict]:
    return small.params(cfg.model), small.router_state(cfg.model)


_COMPILED: dict[Any, Any] = {}


def run(
    cfg: ExperimentConfig,
    tokens: np.ndarray,
    segments: np.ndarray,
    params: Any = None,
    divisors: objective.Scale | None = None,
) -> tuple[float, objective.LossParts, Any]:
    """Total, parts and gradients."""
    own, state = trees(cfg)
    if cfg not in _COMPILED:
        _COMPILED[cfg] = jax.jit(
            lambda p, r, t, s, c: jax.value_and_grad(objective.loss, argnums=1, has_aux=True)(
                cfg, p, r, t, s, c
            )
        )
    (total, parts), gradients = _COMPILED[cfg](
        small.to_jax(own if params is None else params),
        small.to_jax(state),
        jnp.asarray(tokens),
        jnp.asarray(segments),
        scale(cfg, segments) if divisors is None else divisors,
    )
    return float(total), parts, gradients


def slow(cfg: ExperimentConfig, tokens: np.ndarray, segments: np.ndarray, **kw: Any) -> Objective:
    params, state = trees(cfg)
    return reference(params, state, tokens, segments, cfg.model, LAMBDA, ALPHA, **kw)


@pytest.mark.parametrize("padding", [0, 4])
def test_total_and_parts_equal_the_reference(padding: int) -> None:
    tokens, segments = small.batch(CFG, 2, padding=padding)
    total, parts, _ = run(CFG, tokens, segments)
    wanted = slow(CFG, tokens, segments)
    assert total == pytest.approx(wanted.total, rel=1e-4)
    assert float(parts.main) == pytest.approx(wanted.main, rel=1e-4)
    assert float(parts.mtp) == pytest.approx(wanted.mtp, rel=1e-4)
    assert float(parts.balance) == pytest.approx(ALPHA * wanted.balance, rel=1e-4)


def test_gradients_equal_finite_differences_of_the_reference() -> None:
    tokens, segments = small.batch(CFG, 2, padding=3)
    params, state = trees(CFG)

    def value(p: dict) -> float:
        return reference(p, state, tokens, segments, CFG.model, LAMBDA, ALPHA).total

    small.assert_same_derivatives(run(CFG, tokens, segments)[2], value, params)


def test_without_prediction_modules_the_objective_is_next_token_and_balance() -> None:
    cfg = replace(CFG, model=small.config(n_layers=1, n_dense_layers=0, mtp_depth=0))
    tokens, segments = small.batch(cfg, 2)
    total, parts, _ = run(cfg, tokens, segments)
    wanted = slow(cfg, tokens, segments)
    assert float(parts.mtp) == 0.0
    assert total == pytest.approx(wanted.total, rel=1e-4)


def test_prediction_losses_have_fewer_terms_and_the_same_divisor() -> None:
    """With uniform predictions every term is log V, so the sums show the number of terms."""
    tokens, segments = small.batch(CFG, 2)
    params = small.params(CFG.model)
    params["lm_head"] = np.zeros_like(params["lm_head"])
    _, parts, _ = run(CFG, tokens, segments, params)
    log_v = np.log(CFG.model.vocab_size)
    assert float(parts.main) == pytest.approx(log_v, rel=1e-5)
    assert float(parts.mtp) == pytest.approx(log_v * (8 / 9 + 7 / 9) / 2, rel=1e-5)


def test_what_stands_in_the_padding_changes_nothing() -> None:
    tokens, segments = small.batch(CFG, 2, padding=4)
    other = tokens.copy()
    other[0, -4:] = (other[0, -4:] + 17) % CFG.model.vocab_size
    total, parts, gradients = run(CFG, tokens, segments)
    other_total, other_parts, other_gradients = run(CFG, other, segments)
    np.testing.assert_array_equal(parts.load_LE, other_parts.load_LE)
    assert total == pytest.approx(other_total, rel=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(other_gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def sums_over(cfg: ExperimentConfig, documents: list[np.ndarray], term: str) -> tuple[float, int]:
    """The reference's loss summed over documents that are rows of their own, and its targets."""
    total, n_targets = 0.0, 0
    for row in documents:
        alone = slow(cfg, row[None], np.ones((1, row.size), int))
        total += (row.size - 1) * getattr(alone, term)
        n_targets += row.size - 1
    return total, n_targets


@pytest.mark.parametrize("term", ["main", "mtp"])
def test_losses_of_a_padded_row_equal_those_of_the_short_row(term: str) -> None:
    tokens, segments = small.batch(CFG, 2, padding=4)
    total, n_targets = sums_over(CFG, [tokens[0, :-4], tokens[1]], term)
    got = getattr(run(CFG, tokens, segments)[1], term)
    assert float(got) == pytest.approx(total / n_targets, rel=1e-4)


def test_a_row_of_padding_adds_no_loss_no_load_and_no_gradient() -> None:
    free = replace(BRIEF, balance=replace(CFG.balance, sequence_alpha=0.0))
    tokens, segments = small.batch(free, 3)
    segments[2] = 0
    total, parts, gradients = run(free, tokens, segments)
    _, wanted_parts, wanted = run(free, tokens[:2], segments[:2])
    assert total == pytest.approx(float(wanted_parts.main + LAMBDA * wanted_parts.mtp), rel=1e-5)
    np.testing.assert_array_equal(parts.load_LE, wanted_parts.load_LE)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("term", ["main", "mtp"])
def test_isolated_documents_have_the_losses_of_the_documents_alone(term: str) -> None:
    tokens, segments = small.batch(ISOLATED, 2)
    segments[0, 6:] = 2
    total, n_targets = sums_over(ISOLATED, [tokens[0, :6], tokens[0, 6:], tokens[1]], term)
    got = getattr(run(ISOLATED, tokens, segments)[1], term)
    assert float(got) == pytest.approx(total / n_targets, rel=1e-4)


def test_pre_training_attends_and_predicts_across_documents() -> None:
    tokens, segments = small.batch(BRIEF, 2)
    many = segments + (np.arange(10) > 4)
    assert run(CFG, tokens, many)[0] == run(CFG, tokens, segments)[0]


@pytest.mark.parametrize("cfg", [BRIEF, ISOLATED], ids=["joined", "isolated"])
def test_what_is_only_seen_is_no_target_and_else_as_any_token(cfg: ExperimentConfig) -> None:
    """Of the loss the marked targets' terms are gone; what is attended to and routed stays."""
    tokens, segments = small.batch(cfg, 2, padding=3)
    marked = segments.copy()
    marked[:, 2:7] *= -1
    _, parts, _ = run(cfg, tokens, marked, divisors=scale(cfg, segments))
    np.testing.assert_array_equal(parts.load_LE, run(cfg, tokens, segments)[1].load_LE)
    everything = [-abs(segments), *(_only(segments, i) for i in range(1, segments.shape[1]))]
    alone = [
        float(run(cfg, tokens, some, divisors=scale(cfg, segments))[1].main) for some in everything
    ]
    assert alone[0] == 0.0  # exactly
    kept = [alone[i] for i in range(1, segments.shape[1]) if not 2 <= i < 7]
    assert float(parts.main) == pytest.approx(sum(kept), rel=1e-5)


def _only(segments: np.ndarray, i: int) -> np.ndarray:
    """All tokens only seen but number `i` of each row."""
    marked = -abs(segments)
    marked[:, i] *= -1
    return marked


def test_shares_of_micro_batches_add_up_to_the_batch() -> None:
    tokens, segments = small.batch(CFG, 2, padding=5)
    total, parts, gradients = run(CFG, tokens, segments)
    whole = scale(CFG, segments)
    shares = []
    for b in range(2):  # each row with a row of padding beside it, under the batch's divisors
        alone = segments.copy()
        alone[1 - b] = 0
        shares.append(run(CFG, tokens, alone, divisors=whole))
    assert shares[0][0] + shares[1][0] == pytest.approx(total, rel=1e-5)
    loads = shares[0][1].load_LE + shares[1][1].load_LE
    np.testing.assert_array_equal(loads, parts.load_LE)
    summed = jax.tree.map(jnp.add, shares[0][2], shares[1][2])
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_evaluation_counts_next_token_targets_only() -> None:
    tokens, segments = small.batch(BRIEF, 2, padding=4)
    params, state = (small.to_jax(t) for t in trees(BRIEF))
    evaluate = jax.jit(lambda t, s: objective.eval_loss(BRIEF, params, state, t, s))
    total, count = evaluate(tokens, segments)
    assert int(count) == 9 + 5
    assert float(total) / int(count) == pytest.approx(slow(BRIEF, tokens, segments).main, rel=1e-4)


@pytest.mark.parametrize(
    ("strategy", "alpha"), [("loss_free", 0.3), ("aux_loss", 0.9), ("none", 0.0)]
)
def test_each_strategy_has_its_own_strength_of_the_sequence_loss(
    strategy: Any, alpha: float
) -> None:
    balance = replace(CFG.balance, strategy=strategy, sequence_alpha=0.3, aux_alpha=0.9)
    assert objective.balance_alpha(replace(CFG, balance=balance)) == alpha
