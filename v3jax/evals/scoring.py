"""Log-probabilities of given tokens under a model, for evaluations by likelihood.

Requests are run in order of length, in batches of a few shapes, so that little is padded and little
is compiled. What several requests have in common is run once. A request whose context and all but
the last continued token are another's shares its row (the options of a multiple choice that are
single tokens). Where longer continuations share a context, it is read into the latent cache of
decoding, and each continuation goes on from a copy of that.
Dims: B rows, T tokens of a row, N scored tokens of a batch, V vocabulary; P contexts, O branches.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v3jax.config import ModelConfig, NumericsConfig
from v3jax.decode.cache import Cache, new_cache, room_for
from v3jax.decode.forward import Weights, main_forward, prepare
from v3jax.model.layers import compute_dtype
from v3jax.model.transformer import Transformer, head_logits
from v3jax.sharding import ShardingRules

_SHORTEST = 32
"""Rows are padded to a multiple of this at least."""
_BATCH_TOKENS = 4096
"""Tokens of a batch, unless one row is longer."""
_BRANCH = 8
"""Branches are padded to a multiple of this at least."""
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


@dataclass(frozen=True)
class _Family:
    """A context, and what goes on from it: tokens without the last, and the requests of each."""

    context: tuple[int, ...]
    branches: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest branch."""
        return max(len(tokens) for tokens, _ in self.branches)


class Scorer:
    """A model that scores token ids; see `models.Loaded` for its parts.

    Args:
      weights: the same as `decode.forward.prepare` has them, where they exist already.
    """

    def __init__(
        self,
        model: ModelConfig,
        numerics: NumericsConfig,
        params: Any,
        router_state: Any,
        weights: Weights | None = None,
    ) -> None:
        self._model, self._numerics = model, numerics
        self._prepared = weights
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
        by_context: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
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
            branches = by_context.setdefault(whole[: -len(continuation)], {})
            branches.setdefault(tuple(continuation[:-1]), []).append(number)
        rows, families = [], []
        for context, branches in by_context.items():
            if len(branches) > 1 and len(context) >= _SHORTEST:
                several = tuple((tokens, tuple(numbers)) for tokens, numbers in branches.items())
                families.append(_Family(context, several))
            else:
                for tokens, numbers in branches.items():
                    rows.append(_Row((*context, *tokens), len(context) - 1, tuple(numbers)))
        rows.sort(key=lambda row: -len(row.tokens))
        families.sort(key=lambda family: (-_length(len(family.context)), -family.longest))
        for batch in _batches(rows):
            yield from self._run(batch, targets)
        for batch in _family_batches(families):
            yield from self._run_families(batch, targets)

    @functools.cached_property
    def _weights(self) -> Weights:
        return self._prepared or prepare(self._model, self._numerics, *self._variables.values())

    def _run_families(
        self, batch: Sequence[_Family], targets: Sequence[np.ndarray]
    ) -> Iterator[tuple[int, Score]]:
        length = _length(len(batch[0].context))
        contexts = _Grid(max(_BATCH_TOKENS // length, 1), length)
        going_on = [tokens for family in batch for tokens, _ in family.branches if tokens]
        longest = max(family.longest for family in batch)
        branches = _Grid(_padded(len(going_on)), _length(longest, _BRANCH))
        parents = np.zeros(len(branches.tokens_BT), np.int32)
        wanted: list[tuple[int, int]] = []  # place among all hidden states, target
        spans: list[tuple[int, slice]] = []
        n_contexts = contexts.tokens_BT.size
        for family in batch:
            first = contexts.add(family.context, 0)
            parent = first // length
            last = first + len(family.context) - 1
            for tokens, numbers in family.branches:
                place = 0
                if tokens:
                    place = n_contexts + branches.add(tokens, len(family.context))
                    parents[branches.used - 1] = parent
                for number in numbers:
                    start = len(wanted)
                    places = [last, *range(place, place + len(tokens))]
                    wanted += zip(places, targets[number].tolist(), strict=True)
                    spans.append((number, slice(start, len(wanted))))
        places_N2 = np.zeros((_padded(len(wanted)), 2), np.int32)
        places_N2[: len(wanted)] = wanted
        found = _after_contexts(
            self._model,
            self._numerics,
            self._weights,
            self._variables["params"],
            (contexts.tokens_BT, contexts.positions_BT),
            (branches.tokens_BT, branches.positions_BT),
            parents,
            places_N2,
        )
        yield from _scores(spans, *jax.device_get(found))

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
        found = self._forward(self._variables, tokens_BT, counted_BT, places)
        yield from _scores(spans, *jax.device_get(found))


class _Grid:
    """Token rows of one length with their positions, -1 where nothing is."""

    def __init__(self, n_rows: int, length: int) -> None:
        self.tokens_BT = np.zeros((n_rows, length), np.int32)
        self.positions_BT = np.full((n_rows, length), -1, np.int32)
        self.used = 0

    def add(self, tokens: Sequence[int], position: int) -> int:
        """Takes the next row for tokens from a position on; where they begin, rows flattened."""
        row, length = self.used, self.tokens_BT.shape[1]
        self.tokens_BT[row, : len(tokens)] = tokens
        self.positions_BT[row, : len(tokens)] = position + np.arange(len(tokens))
        self.used += 1
        return row * length


def _scores(
    spans: Sequence[tuple[int, slice]], logs_N: np.ndarray, best_N: np.ndarray
) -> Iterator[tuple[int, Score]]:
    for number, span in spans:
        yield number, Score(float(logs_N[span].sum(dtype=np.float64)), bool(best_N[span].all()))


def _length(n: int, least: int = _SHORTEST) -> int:
    """What a row of `n` tokens is padded to: a multiple of `least`, and beyond four times that at
    most a quarter too long, so that there are few lengths."""
    step = max(least, 1 << max(n.bit_length() - 3, 0))
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


def _family_batches(families: Sequence[_Family]) -> Iterator[list[_Family]]:
    """Families, longest context first, in batches of one padded context length."""
    batch: list[_Family] = []
    for family in families:
        if batch:
            length = _length(len(batch[0].context))
            full = len(batch) == max(_BATCH_TOKENS // length, 1)
            every = [*batch, family]
            longest = max(f.longest for f in every)
            room = sum(len(f.branches) for f in every) * _length(longest, _BRANCH)
            if full or room > 2 * _BATCH_TOKENS or _length(len(family.context)) != length:
                yield batch
                batch = []
        batch.append(family)
    if batch:
        yield batch


@functools.partial(jax.jit, static_argnums=(0, 1))
def _after_contexts(
    model: ModelConfig,
    numerics: NumericsConfig,
    weights: Weights,
    params: Any,
    contexts_PT: tuple[jax.Array, jax.Array],
    branches_OT: tuple[jax.Array, jax.Array],
    parents_O: jax.Array,
    places_N2: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As `_predictions`, of contexts and of branches that go on from them.

    `contexts_PT` and `branches_OT` are tokens and positions; places count the hidden states of all
    contexts and then of all branches.
    """
    n_contexts, length = contexts_PT[0].shape
    room = room_for(length + branches_OT[0].shape[1])
    cache = new_cache(model, n_contexts, room, compute_dtype(numerics))
    forward = functools.partial(main_forward, model, numerics, weights, absorbed=False)
    hidden_PTD, cache = forward(cache, *contexts_PT)
    cache = Cache(tuple(layer_PSZ[parents_O] for layer_PSZ in cache.layers))
    hidden_OTD, _ = forward(cache, *branches_OT)
    flat = [hidden.reshape(-1, model.dim) for hidden in (hidden_PTD, hidden_OTD)]
    hidden_ND = jnp.concatenate(flat)[places_N2[:, 0]]
    return _of_hidden(params, hidden_ND, places_N2[:, 1])


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
    return _of_hidden(variables["params"], hidden_ND, places_N3[:, 2])


def _of_hidden(
    params: Any, hidden_ND: jax.Array, target_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def of_some(some: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_CD, target_C = some
        logits_CV = head_logits(params, hidden_CD)
        wanted_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=1)[:, 0]
        best_C = wanted_C == logits_CV.max(axis=1)  # an argmax takes many times as long on CPU
        return wanted_C - jax.nn.logsumexp(logits_CV, axis=1), best_C

    # Not all at once: a whole batch's logits over 129,280 ids would take 2 GB.
    n, dim = hidden_ND.shape
    size = min(n, _CHUNK)
    chunks = (hidden_ND.reshape(-1, size, dim), target_N.reshape(-1, size))
    logs_XC, best_XC = jax.lax.map(of_some, chunks)
    return logs_XC.reshape(n), best_XC.reshape(n)
