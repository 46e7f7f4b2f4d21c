"""Scores of continuations against the reference model, however requests are batched."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decode.small import MODEL, setup
from v3jax.evals import scoring
from v3jax.evals.scoring import Scorer
from v3jax.model.transformer import Transformer, head_logits
from v3jax.sharding import ShardingRules
from v3jax.weights import FP32


@pytest.fixture(scope="module")
def variables() -> Any:
    found = setup()
    return {"params": found.params, "router_state": found.router_state}


@jax.jit
def logits(variables: Any, tokens_T: jax.Array) -> jax.Array:
    out: Any = Transformer(MODEL, FP32, ShardingRules()).apply(variables, tokens_T[None])
    return head_logits(variables["params"], out.hidden_BTD[0])


def slow(variables: Any, tokens: list[int], n: int) -> tuple[float, bool]:
    """Log-probability of the last `n` tokens, in a row that nothing shares."""
    row_T = jnp.asarray(np.pad(tokens[:-1], (0, 128 - len(tokens))))
    log = jax.nn.log_softmax(logits(variables, row_T))[len(tokens) - 1 - n : len(tokens) - 1]
    wanted = np.array(tokens[-n:])
    return float(log[np.arange(n), wanted].sum()), bool((log.argmax(-1) == wanted).all())


def requests(n: int = 7) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        context = rng.integers(0, MODEL.vocab_size, rng.integers(1, 50)).tolist()
        found.append((context, rng.integers(0, MODEL.vocab_size, rng.integers(1, 6)).tolist()))
    return found


@pytest.mark.parametrize("lengths", [(64,), (16,)])
def test_scores_are_those_of_single_rows(
    variables: Any, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 16, most requests are longer than rows of trees and have rows of their own."""
    monkeypatch.setattr(scoring, "_LENGTHS", lengths)
    check(variables, requests(), 64)


def test_requests_that_begin_alike_share_tokens(
    variables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)

    def draw(n: int) -> list[int]:
        return rng.integers(0, MODEL.vocab_size, n).tolist()

    asked = []
    examples = draw(20)
    for length in (33, 40):
        context = examples + draw(length)
        asked += [(context, draw(n)) for n in (1, 1, 3, 5)]
        asked.append((context, [*asked[-1][1][:-1], 3]))  # differs in the last token alone
        asked.append((context, asked[-1][1][:2]))  # ends inside another
    asked.append((draw(40), draw(5)))  # has nothing in common
    monkeypatch.setattr(scoring, "_LENGTHS", (256,))
    seen = []
    start = Scorer._start
    monkeypatch.setattr(Scorer, "_start", lambda self, rows: seen.extend(rows) or start(self, rows))
    check(variables, asked, 100)
    (row,) = seen
    n_tokens = 20 + 33 + 40 + 2 * (2 + 4) + 44
    np.testing.assert_array_equal(row.ends_T[n_tokens:], np.arange(n_tokens, 256) + 1)
    assert (row.ends_T[:n_tokens] <= n_tokens).all()
    assert row.positions_T[:n_tokens].max() == 63
    # Where contexts are cut, each pair is cut for itself.
    check(variables, asked, 42)


def check(variables: Any, asked: list[tuple[list[int], list[int]]], max_length: int) -> None:
    got = dict(Scorer(MODEL, FP32, **variables).score(asked, max_length=max_length))
    assert sorted(got) == list(range(len(asked)))
    for number, (context, continuation) in enumerate(asked):
        whole = (context + continuation)[-(max_length + 1) :]
        log, greedy = slow(variables, whole, len(continuation))
        assert got[number].log_prob == pytest.approx(log, abs=2e-5)
        assert got[number].greedy == greedy


def test_trees_hold_no_more_than_a_row() -> None:
    asked = [([*range(30), 100 + i], [200]) for i in range(9)]
    trees = scoring._trees(scoring._paths(asked, 64), 34)
    assert [len(tree.paths) for tree in trees] == [4, 4, 1]
    assert [tree.size for tree in trees] == [34, 34, 31]
    # Beginnings that are hardly the same are packed where there is room.
    asked = [([*range(scoring._WORTH - 1), 100 + i], [200]) for i in range(3)]
    assert len(scoring._trees(scoring._paths(asked, 64), 64)) == 3


def test_a_greedy_continuation_is_known_as_such(variables: Any) -> None:
    context = [3, 1, 4]
    best = int(logits(variables, jnp.asarray(context))[-1].argmax())
    asked = [(context, [best]), (context, [(best + 1) % MODEL.vocab_size])]
    got = dict(Scorer(MODEL, FP32, **variables).score(asked, max_length=8))
    assert [got[0].greedy, got[1].greedy] == [True, False]


def test_options_of_one_token_go_in_once() -> None:
    asked = [([1, 2, 3], [t]) for t in range(8)] + [([1, 2], [3, 4]), ([1, 2, 3], [4, 5])]
    paths = scoring._paths(asked, 8)
    assert [path.tokens.tolist() for path in paths] == [[1, 2, 3], [1, 2, 3, 4]]
    # The same tokens, but from another position on they are scored.
    assert {(t.request, t.first) for t in paths[0].targets} == {*((i, 2) for i in range(8)), (8, 1)}


def test_contexts_lose_their_beginning(variables: Any) -> None:
    ((_, got),) = Scorer(MODEL, FP32, **variables).score([([9] * 30 + [1, 2], [3])], max_length=2)
    assert got.log_prob == pytest.approx(slow(variables, [1, 2, 3], 1)[0], abs=1e-5)


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (([], [1]), "needs a context"),
        (([1], []), "needs a context and a continuation"),
        (([1], [1] * 9), "9 tokens to score, more than max_length=8"),
    ],
)
def test_requests_that_cannot_be_scored_are_named(
    variables: Any, request_: tuple[list[int], list[int]], named: str
) -> None:
    with pytest.raises(ValueError, match=f"request 1: .*{named}"):
        list(Scorer(MODEL, FP32, **variables).score([([1], [2]), request_], max_length=8))
