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


def slow(variables: Any, tokens: list[int], n: int) -> tuple[float, bool]:
    """Log-probability of the last `n` tokens, one row at its own length."""
    network = Transformer(MODEL, FP32, ShardingRules())
    out: Any = network.apply(variables, jnp.asarray([tokens[:-1]]))
    log = jax.nn.log_softmax(head_logits(variables["params"], out.hidden_BTD[0]))[-n:]
    wanted = np.array(tokens[-n:])
    return float(log[np.arange(n), wanted].sum()), bool((log.argmax(-1) == wanted).all())


def requests(n: int = 7) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        context = rng.integers(0, MODEL.vocab_size, rng.integers(1, 50)).tolist()
        found.append((context, rng.integers(0, MODEL.vocab_size, rng.integers(1, 6)).tolist()))
    return found


@pytest.mark.parametrize("batch_tokens", [128, 4096])
def test_scores_are_those_of_single_rows(
    variables: Any, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_BATCH_TOKENS", batch_tokens)
    asked = requests()
    got = dict(Scorer(MODEL, FP32, **variables).score(asked, max_length=64))
    assert sorted(got) == list(range(len(asked)))
    for number, (context, continuation) in enumerate(asked):
        log, greedy = slow(variables, context + continuation, len(continuation))
        assert got[number].log_prob == pytest.approx(log, abs=2e-5)
        assert got[number].greedy == greedy


def test_continuations_of_one_context_are_scored_from_its_cache(
    variables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)

    def draw(n: int) -> list[int]:
        return rng.integers(0, MODEL.vocab_size, n).tolist()

    asked = []
    for length in (33, 40):  # longer than what is scored row by row
        context = draw(length)
        asked += [(context, draw(n)) for n in (1, 1, 3, 5)]
        asked.append((context, [*asked[-1][1][:-1], 3]))  # differs in the last token alone
    asked.append((draw(40), draw(5)))  # a context of its own
    counted = []
    run = Scorer._run_families
    monkeypatch.setattr(
        Scorer,
        "_run_families",
        lambda self, batch, targets: counted.append(len(batch)) or run(self, batch, targets),
    )
    got = dict(Scorer(MODEL, FP32, **variables).score(asked, max_length=80))
    assert sum(counted) == 2
    assert sorted(got) == list(range(len(asked)))
    for number, (context, continuation) in enumerate(asked):
        log, greedy = slow(variables, context + continuation, len(continuation))
        assert got[number].log_prob == pytest.approx(log, abs=2e-5)
        assert got[number].greedy == greedy
    # Where the context is cut, each pair is cut for itself.
    got = dict(Scorer(MODEL, FP32, **variables).score(asked[4:], max_length=42))
    for number, (context, continuation) in enumerate(asked[4:]):
        whole = (context + continuation)[-43:]
        log, _ = slow(variables, whole, len(continuation))
        assert got[number].log_prob == pytest.approx(log, abs=2e-5)


def test_a_greedy_continuation_is_known_as_such(variables: Any) -> None:
    context = [3, 1, 4]
    network = Transformer(MODEL, FP32, ShardingRules())
    out: Any = network.apply(variables, jnp.asarray([context]))
    best = int(head_logits(variables["params"], out.hidden_BTD[0, -1]).argmax())
    asked = [(context, [best]), (context, [(best + 1) % MODEL.vocab_size])]
    got = dict(Scorer(MODEL, FP32, **variables).score(asked, max_length=8))
    assert [got[0].greedy, got[1].greedy] == [True, False]


def test_options_of_one_token_share_a_row(variables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [([1, 2, 3], [t]) for t in range(8)] + [([1, 2], [3, 4]), ([1, 2, 3], [4, 5])]
    seen = []
    scorer = Scorer(MODEL, FP32, **variables)
    monkeypatch.setattr(scorer, "_run", lambda batch, targets: seen.append(batch) or iter(()))
    list(scorer.score(asked, max_length=8))
    ((one, two, three),) = seen
    assert (len(one.tokens), one.requests) == (4, (9,))
    # The same tokens go in, but from another position on they are scored.
    assert {(row.first, row.requests) for row in (two, three)} == {
        (2, tuple(range(8))),
        (1, (8,)),
    }


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
