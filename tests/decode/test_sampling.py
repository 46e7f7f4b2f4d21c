"""Temperature, top-k and top-p against NumPy; the rejection rule against the exact distribution."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decode.small import chi_square_is_small
from v3jax.decode import sampling

LOGITS = np.random.default_rng(0).normal(0, 2, (3, 11)).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(logits_V: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities of one row, token by token from the likeliest on."""
    p = softmax(logits_V / temperature)
    order = np.argsort(-p)
    kept = [v for v in order if not top_k or p[v] >= p[order[min(top_k, len(p)) - 1]]]
    of_kept = p[kept] / p[kept].sum()
    nucleus, total = [], 0.0
    for v, share in zip(kept, of_kept, strict=True):
        if top_p < 1 and total >= top_p and share < of_kept[len(nucleus) - 1]:
            break
        nucleus.append(v)
        total += share
    out = np.zeros_like(p)
    out[nucleus] = p[nucleus] / p[nucleus].sum()
    return out


@jax.jit
def _distribution(logits_BV: jax.Array, chosen: sampling.Options) -> jax.Array:
    return jax.nn.softmax(sampling.scaled(logits_BV, chosen), axis=-1)


def distribution(logits_BV: np.ndarray, **options: Any) -> np.ndarray:
    return np.asarray(_distribution(jnp.asarray(logits_BV), sampling.options(**options)))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (4, 1.0), (50, 1.0), (0, 0.5), (0, 0.95), (5, 0.6)]
)
def test_distribution_is_the_references(temperature: float, top_k: int, top_p: float) -> None:
    wanted = [reference(row, temperature, top_k, top_p) for row in LOGITS]
    got = distribution(LOGITS, temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert ((got > 0) == (np.array(wanted) > 0)).all()


def test_equals_at_a_filters_edge_all_stay() -> None:
    row = np.log(np.array([[0.1, 0.3, 0.2, 0.2, 0.2]], np.float32))
    for options in ({"top_k": 2}, {"top_k": 3}, {"top_p": 0.4}, {"top_p": 0.6}):
        got = distribution(row, temperature=1.0, **options)[0]
        np.testing.assert_allclose(got, [0, 1 / 3, 2 / 9, 2 / 9, 2 / 9], atol=1e-6)
    got = distribution(row, temperature=1.0, top_p=0.3)[0]
    np.testing.assert_allclose(got, [0, 1, 0, 0, 0], atol=1e-6)


def test_no_token_is_lost_to_rounding_when_the_share_is_whole() -> None:
    logits = np.random.default_rng(1).normal(0, 4, (4, 5000)).astype(np.float32)
    kept = np.asarray(sampling.scaled(jnp.asarray(logits), sampling.options(1.0, top_k=4999)))
    assert np.isfinite(kept).sum(-1).tolist() == [4999] * 4


def test_ids_that_are_ruled_out_stay_out() -> None:
    logits = LOGITS.copy()
    logits[:, 6:] = -np.inf
    for options in ({}, {"top_k": 9}, {"top_p": 0.99}, {"top_k": 8, "top_p": 0.5}):
        got = distribution(logits, temperature=1.5, **options)
        assert (got[:, 6:] == 0).all()
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = np.array([[0, 3, 3, 1], [5, 1, 2, 5]], np.float32)
    tokens, same = sampling.choose(jnp.asarray(logits), sampling.options(0.0, top_k=2), keys(2))
    assert np.asarray(tokens).tolist() == [1, 0]
    np.testing.assert_array_equal(same, logits)


def test_greedy_makes_no_pass_for_probabilities() -> None:
    """Sorting, random bits and exponentials are for a temperature that is not 0."""
    arguments = (jnp.asarray(LOGITS), sampling.options(), keys(3))
    jaxpr = jax.make_jaxpr(sampling.choose)(*arguments)
    assert [str(e.primitive) for e in jaxpr.eqns if str(e.primitive) in ("sort", "exp")] == []
    (cond,) = [e for e in jaxpr.eqns if str(e.primitive) == "cond"]
    greedy, drawn = (str(branch) for branch in cond.params["branches"])
    assert "sort" in drawn
    assert not any(word in greedy for word in ("sort", "random", "exp", "log"))


def test_draws_follow_the_distribution() -> None:
    n = 20_000
    options = sampling.options(0.8, top_k=6)
    rows = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (n, LOGITS.shape[1]))
    tokens, scaled = sampling.choose(rows, options, keys(n))
    counts = np.bincount(np.asarray(tokens), minlength=LOGITS.shape[1])
    assert chi_square_is_small(counts, reference(LOGITS[0], 0.8, 6, 1.0))
    assert not chi_square_is_small(counts, reference(LOGITS[0], 0.9, 6, 1.0)), "no power"
    np.testing.assert_allclose(jax.nn.softmax(scaled[0]), reference(LOGITS[0], 0.8, 6, 1), 1e-5)


def test_log_probs_are_those_of_the_unfiltered_softmax() -> None:
    tokens = [3, 0, 10]
    wanted = np.log(softmax(LOGITS))[np.arange(3), tokens]
    got = sampling.log_prob(jnp.asarray(LOGITS), jnp.array(tokens))
    np.testing.assert_allclose(got, wanted, 1e-5)


def test_keys_differ_by_seed_row_position_and_use() -> None:
    positions = jnp.array([3, 3, 4, 5])
    seen = set()
    for seed in (0, 1):
        rows = sampling.row_keys(jnp.uint32(seed), 4)
        alone = sampling.row_keys(jnp.uint32(seed), 2)
        np.testing.assert_array_equal(jax.random.key_data(rows)[:2], jax.random.key_data(alone))
        for moved in (positions, positions + 3):
            for use in (0, 1, 2):
                found = jax.random.key_data(sampling.keys_at(rows, moved, use))
                seen |= {tuple(key) for key in np.asarray(found).tolist()}
    assert len(seen) == 2 * 2 * 3 * 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": float("nan")}, "top_p=nan"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        sampling.options(**options)
    assert "\n" not in str(caught.value)


# The rejection rule over many independent rows. Targets and drafts may depend on the tokens before
# them, as they do in a model.
VOCAB, ROWS = 6, 60_000


def random_tables(seed: int, depth: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`[V, ..., V]` target and draft distributions of the token that follows each history."""
    rng = np.random.default_rng(seed)
    targets = [rng.dirichlet(np.ones(VOCAB), (VOCAB,) * d) for d in range(depth + 1)]
    drafts = [rng.dirichlet(np.ones(VOCAB), (VOCAB,) * d) for d in range(depth)]
    for table in (*targets, *drafts):
        table[..., seed % VOCAB] = 0  # ruled out by a filter
    drafts[0][(seed + 1) % VOCAB] = 0  # never drafted
    for table in (*targets, *drafts):
        table /= table.sum(-1, keepdims=True)
    return targets, drafts


def run_rule(
    targets: list[np.ndarray], drafts: list[np.ndarray], depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """`(n_kept [B], tokens [B, K + 1])`; a token past the last is -1."""
    rng = np.random.default_rng(7)
    drafted = np.zeros((ROWS, depth), np.int64)
    q, p = [], []
    for k in range(depth):
        history = tuple(drafted[:, :k].T)
        q.append(np.broadcast_to(drafts[k][history], (ROWS, VOCAB)))
        p.append(np.broadcast_to(targets[k][history], (ROWS, VOCAB)))
        edges = q[-1].cumsum(-1)
        drafted[:, k] = (rng.random((ROWS, 1)) * edges[:, -1:] >= edges).sum(-1)
    p.append(targets[depth][tuple(drafted.T)])
    kept, last = sampling.accept(
        jnp.asarray(drafted, jnp.int32),
        jnp.asarray(np.stack(q, 1), jnp.float32),
        jnp.asarray(np.stack(p, 1), jnp.float32),
        jnp.asarray(rng.random((ROWS, depth)), jnp.float32),
        keys(ROWS),
    )
    kept = np.asarray(kept)
    tokens = np.concatenate([drafted, np.full((ROWS, 1), -1)], axis=1)
    tokens[np.arange(ROWS), kept] = np.asarray(last)
    tokens[np.arange(depth + 1) > kept[:, None]] = -1
    return kept, tokens


@pytest.mark.parametrize("depth", [1, 2])
def test_rejection_rule_keeps_the_targets_distribution(depth: int) -> None:
    targets, drafts = random_tables(depth, depth)
    kept, tokens = run_rule(targets, drafts, depth)
    assert set(kept.tolist()) == set(range(depth + 1))
    counts = np.bincount(tokens[:, 0], minlength=VOCAB)
    assert chi_square_is_small(counts, targets[0])
    assert not chi_square_is_small(counts, drafts[0]), "no power"
    for k in range(1, depth + 1):  # each further token, given those before it
        reached = tokens[kept >= k]
        for history in np.ndindex(*(VOCAB,) * k):
            of_history = reached[(reached[:, :k] == history).all(1), k]
            counts = np.bincount(of_history, minlength=VOCAB)
            if counts.sum() > 200:
                assert chi_square_is_small(counts, targets[k][history]), (k, history)


def test_rejection_rule_keeps_as_many_drafts_as_can_be() -> None:
    """The share kept is 1 less the distance of the two distributions."""
    targets, drafts = random_tables(3, 1)
    kept, _ = run_rule(targets, drafts, 1)
    wanted = np.minimum(targets[0], drafts[0]).sum()
    assert abs(kept.mean() - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / ROWS)


def test_equal_distributions_keep_every_draft() -> None:
    targets, _ = random_tables(4, 2)
    kept, _ = run_rule(targets, targets[:2], 2)
    assert (kept == 2).all()
