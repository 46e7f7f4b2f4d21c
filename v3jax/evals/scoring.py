"""Log-probabilities of given tokens under a model, for evaluations by likelihood.

Requests are run in order of length, in batches of a few shapes, so that little is padded and little
is compiled. What several requests have in common is run once: a request whose context and all but
the last continued token are another's shares its row (the options of a multiple choice that are
single tokens).
Dims: B rows, T tokens of a row, N scored tokens of a batch, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v3jax.config import ModelConfig, NumericsConfig
from v3jax.model.transformer import Transformer, head_logits
from v3jax.sharding import ShardingRules

_SHORTEST = 32
"""Rows are padded to a multiple of this at least."""
_BATCH_TOKENS = 4096
"""Tokens of a batch, unless one row is longer."""
_CHUNK = 256
"""Predictions whose logits exist at the same time, a power of two."""


class Score(NamedTuple):
    """Of a continuation after its context."""

    log_prob: float
    """Summed over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens was the likeliest."""


@dataclass(frozen=True)
class _Row:
    """Tokens that go through the model once, and the requests they answer."""

    tokens: tuple[int, ...]
    first: int
    """Position of the first scored prediction: that of the token after it."""
    requests: tuple[int, ...]


class Scorer:
    """A model that scores token ids; see `models.Loaded` for its parts."""

    def __init__(
        self,
        model: ModelConfig,
        numerics: NumericsConfig,
        params: Any,
        router_state: Any,
    ) -> None:
        self._variables = {"params": params, "router_state": router_state}
        self._forward = functools.partial(_predictions, model, numerics)

    def score(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, max_length: int
    ) -> Iterator[tuple[int, Score]]:
        """Scores `(context, continuation)` pairs; yields a request's number and its score.

        A context loses tokens at its beginning where the pair exceeds `max_length` + 1 tokens.
        Pairs come out as they are done, the longest first.

        Raises:
          ValueError: an empty context or continuation, or a continuation that does not fit.
        """
        targets = []
        rows: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (context, continuation) in enumerate(requests):
            if not context or not continuation:
                raise ValueError(f"request {number}: needs a context and a continuation")
            if len(continuation) > max_length:
                raise ValueError(
                    f"request {number}: {len(continuation)} tokens to score, more than "
                    f"max_length={max_length}"
                )
            whole = (*context, *continuation)[-(max_length + 1) :]
            targets.append(np.array(continuation, np.int32))
            rows.setdefault((whole[:-1], len(continuation)), []).append(number)
        planned = [
            _Row(tokens, len(tokens) - n, tuple(numbers)) for (tokens, n), numbers in rows.items()
        ]
        planned.sort(key=lambda row: -len(row.tokens))
        for batch in _batches(planned):
            yield from self._run(batch, targets)

    def _run(
        self, batch: Sequence[_Row], targets: Sequence[np.ndarray]
    ) -> Iterator[tuple[int, Score]]:
        length = _length(len(batch[0].tokens))
        n_rows = max(_BATCH_TOKENS // length, 1)
        tokens_BT = np.zeros((n_rows, length), np.int32)
        counted_BT = np.zeros((n_rows, length), bool)
        wanted: list[tuple[int, int, int]] = []  # row, position, target
        spans: list[tuple[int, slice]] = []
        for b, row in enumerate(batch):
            tokens_BT[b, : len(row.tokens)] = row.tokens
            counted_BT[b, : len(row.tokens)] = True
            for number in row.requests:
                start = len(wanted)
                wanted += [(b, row.first + i, int(t)) for i, t in enumerate(targets[number])]
                spans.append((number, slice(start, len(wanted))))
        places = np.zeros((_padded(len(wanted)), 3), np.int32)
        places[: len(wanted)] = wanted
        logs, best = jax.device_get(self._forward(self._variables, tokens_BT, counted_BT, places))
        for number, span in spans:
            yield number, Score(float(logs[span].sum(dtype=np.float64)), bool(best[span].all()))


def _length(n: int) -> int:
    """What a row of `n` tokens is padded to: few lengths, none more than a quarter too long."""
    step = max(_SHORTEST, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def _padded(n: int) -> int:
    """The next power of two, at least `_SHORTEST`."""
    return max(_SHORTEST, 1 << (n - 1).bit_length())


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows, longest first, in batches of one padded length."""
    batch: list[_Row] = []
    for row in rows:
        if batch:
            length = _length(len(batch[0].tokens))
            full = len(batch) == max(_BATCH_TOKENS // length, 1)
            if full or _length(len(row.tokens)) != length:
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predictions(
    model: ModelConfig,
    numerics: NumericsConfig,
    variables: Any,
    tokens_BT: jax.Array,
    counted_BT: jax.Array,
    places_N3: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each wanted token at its place, and whether it is the likeliest, `[N]`."""
    out: Any = Transformer(model, numerics, ShardingRules()).apply(
        variables, tokens_BT, counted_BS=counted_BT
    )
    hidden_ND = out.hidden_BTD[places_N3[:, 0], places_N3[:, 1]]

    def of_some(some: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_CD, target_C = some
        logits_CV = head_logits(variables["params"], hidden_CD)
        wanted_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=1)[:, 0]
        return wanted_C - jax.nn.logsumexp(logits_CV, axis=1), logits_CV.argmax(axis=1) == target_C

    # Not all at once: a whole batch's logits over 129,280 ids would take 2 GB.
    n, dim = hidden_ND.shape
    chunks = (
        hidden_ND.reshape(-1, min(n, _CHUNK), dim),
        places_N3[:, 2].reshape(-1, min(n, _CHUNK)),
    )
    logs_XC, best_XC = jax.lax.map(of_some, chunks)
    return logs_XC.reshape(n), best_XC.reshape(n)
