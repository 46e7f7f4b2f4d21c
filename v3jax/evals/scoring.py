"""Log-probabilities of given tokens under a model, for evaluations by likelihood.

What requests have in common at their beginnings goes through the model once: the options of a
question share its text, and the questions of a task the examples before them. Requests become trees
of tokens, several in a row, laid out depth first; a token attends to its ancestors alone, and its
position is its depth. Rows are all of one length, so little is padded and little is compiled.
Dims: B rows, T tokens of a row, D model, C predictions of a chunk, V vocabulary.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v3jax.config import ModelConfig, NumericsConfig
from v3jax.data.packing import best_fit
from v3jax.model.transformer import Transformer, head_logits
from v3jax.ops.attention import Tree
from v3jax.sharding import ShardingRules

_LENGTHS = (256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 3072, 4096)
"""Of rows that hold trees; the last is also how many tokens a batch has."""
_WORTH = 16
"""Requests that share fewer tokens at their beginnings need not share a row."""
_CHUNK = 256
"""Predictions whose logits exist at the same time."""


class Score(NamedTuple):
    """Of a continuation after its context."""

    log_prob: float
    """Summed over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens was the likeliest."""


class _Target(NamedTuple):
    """What a request asks of the tokens that go in for it."""

    request: int
    first: int
    """Depth of the token that predicts the first one asked for."""
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class _Path:
    """Tokens from a root down, and what is asked of them."""

    tokens: np.ndarray
    targets: tuple[_Target, ...]


@dataclass
class _Tree:
    """Paths in lexicographic order that share `shared[i]` tokens with the one before."""

    paths: list[_Path]
    shared: list[int]
    size: int


class _Row:
    """Trees side by side, depth first; see `ops.attention.Tree`."""

    def __init__(self, trees: Iterable[_Tree], length: int) -> None:
        self.tokens_T = np.zeros(length, np.int32)
        self.positions_T = np.zeros(length, np.int32)
        self.ends_T = np.arange(1, length + 1, dtype=np.int32)  # padding sees itself
        self.asked: list[tuple[int, np.ndarray, tuple[int, ...]]] = []
        """Request, places of its predictions, their targets."""
        used = 0
        for tree in trees:
            places = np.empty(0, np.int32)  # of the path in hand, by depth
            for path, shared in zip(tree.paths, tree.shared, strict=True):
                self.ends_T[places[shared:]] = used
                added = slice(used, used + len(path.tokens) - shared)
                used = added.stop
                self.tokens_T[added] = path.tokens[shared:]
                self.positions_T[added] = np.arange(shared, len(path.tokens))
                places = np.append(places[:shared], np.arange(added.start, used, dtype=np.int32))
                for request, first, tokens in path.targets:
                    self.asked.append((request, places[first : first + len(tokens)], tokens))
            self.ends_T[places] = used


class Scorer:
    """A model that scores token ids; see `models.Loaded` for its parts."""

    def __init__(
        self, model: ModelConfig, numerics: NumericsConfig, params: Any, router_state: Any
    ) -> None:
        self._model, self._numerics = model, numerics
        self._variables = {"params": params, "router_state": router_state}

    def score(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, max_length: int
    ) -> Iterator[tuple[int, Score]]:
        """Scores `(context, continuation)` pairs; yields a request's number and its score.

        A context loses tokens at its beginning where the pair exceeds `max_length` + 1 tokens.
        Pairs come out as they are done, in no particular order.

        Raises:
          ValueError: an empty context or continuation, or a continuation that does not fit.
        """
        waiting: tuple[list[_Row], list[Any]] | None = None
        for rows in self._batches(_paths(requests, max_length)):
            found = self._start(rows)
            if waiting is not None:
                yield from _scores(*waiting)
            waiting = rows, found
        if waiting is not None:
            yield from _scores(*waiting)

    def _batches(self, paths: Sequence[_Path]) -> Iterator[list[_Row]]:
        """Rows of a length, the longest requests first."""
        long = [path for path in paths if len(path.tokens) > _LENGTHS[-1]]
        for path in sorted(long, key=lambda path: -len(path.tokens)):
            length = -(-len(path.tokens) // _LENGTHS[-1]) * _LENGTHS[-1]
            yield [_Row([_Tree([path], [0], len(path.tokens))], length)]
        paths = [path for path in paths if len(path.tokens) <= _LENGTHS[-1]]
        if not paths:
            return
        length, rows = self._arranged(paths)
        at_once = _LENGTHS[-1] // length
        for start in range(0, len(rows), at_once):
            yield [_Row(trees, length) for trees in rows[start : start + at_once]]

    def _arranged(self, paths: Sequence[_Path]) -> tuple[int, list[list[_Tree]]]:
        """The length of row that costs least, and the trees of each row.

        In long rows more is shared and less is left empty, but each token meets more others.
        """
        longest = max(len(path.tokens) for path in paths)
        model = self._model
        head_dims = model.nope_head_dim + model.rope_head_dim + model.v_head_dim
        products, best = self._products(), None
        for length in (length for length in _LENGTHS if length >= longest):
            trees = _trees(paths, length)
            rows = best_fit([tree.size for tree in trees], length)
            met = model.n_layers * model.n_heads * head_dims * length  # softmax counted as much
            work = len(rows) * length * (products + met)
            if best is None or work < best[0]:
                best = work, length, [[trees[i] for i in row] for row in rows]
        assert best is not None
        return best[1:]

    def _products(self) -> float:
        """Multiplications of a token with the layers' matrices."""
        share = self._model.top_k / self._model.n_experts
        leaves = jax.tree_util.tree_leaves_with_path(
            {name: self._variables["params"].get(name) for name in ("dense_layers", "moe_layers")}
        )
        return sum(
            leaf.size * (share if "['experts']" in jax.tree_util.keystr(path) else 1)
            for path, leaf in leaves
        )

    def _start(self, rows: Sequence[_Row]) -> list[Any]:
        """Logs and hits of all that the rows are asked, in order, chunk by chunk."""
        length = len(rows[0].tokens_T)
        # The last batch may be smaller: the next power of two, so that sizes are few.
        n_rows = min(max(_LENGTHS[-1] // length, 1), 1 << (len(rows) - 1).bit_length())
        tokens_BT, positions_BT, ends_BT = (np.zeros((n_rows, length), np.int32) for _ in range(3))
        ends_BT[len(rows) :] = np.arange(1, length + 1)
        for b, row in enumerate(rows):
            tokens_BT[b], positions_BT[b], ends_BT[b] = row.tokens_T, row.positions_T, row.ends_T
        tree = Tree(*map(jnp.asarray, (positions_BT, ends_BT))) if length <= _LENGTHS[-1] else None
        hidden_BTD = _hidden(self._model, self._numerics, self._variables, tokens_BT, tree)
        places = np.concatenate(
            [b * length + places for b, row in enumerate(rows) for _, places, _ in row.asked]
        )
        targets = np.concatenate([tokens for row in rows for _, _, tokens in row.asked])
        empty = -len(places) % _CHUNK
        chunks = (np.pad(x, (0, empty)).reshape(-1, _CHUNK) for x in (places, targets))
        head = {"lm_head": self._variables["params"]["lm_head"]}
        return [_predictions(head, hidden_BTD, *chunk) for chunk in zip(*chunks, strict=True)]


def _paths(requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[_Path]:
    """The tokens that go in for the requests, each once, in lexicographic order."""
    targets: dict[tuple[int, ...], list[_Target]] = {}
    for number, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise ValueError(f"request {number}: needs a context and a continuation")
        if len(continuation) > max_length:
            raise ValueError(
                f"request {number}: {len(continuation)} tokens to score, more than "
                f"max_length={max_length}"
            )
        tokens = (*context, *continuation[:-1])[-max_length:]
        target = _Target(number, len(tokens) - len(continuation), tuple(continuation))
        targets.setdefault(tokens, []).append(target)
    return [_Path(np.array(tokens), tuple(targets[tokens])) for tokens in sorted(targets)]


def _trees(paths: Sequence[_Path], capacity: int) -> list[_Tree]:
    """Neighbours that share enough, as trees of at most `capacity` tokens."""
    trees: list[_Tree] = []
    for before, path in zip([None, *paths], paths, strict=False):
        n = len(path.tokens)
        shared = 0 if before is None else _shared(before.tokens, path.tokens)
        if shared >= _WORTH and trees[-1].size + n - shared <= capacity:
            trees[-1].paths.append(path)
            trees[-1].shared.append(shared)
            trees[-1].size += n - shared
        else:
            trees.append(_Tree([path], [0], n))
    return trees


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens are the same at the beginning."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


def _scores(rows: Sequence[_Row], found: Sequence[Any]) -> Iterator[tuple[int, Score]]:
    logs, hits = (np.concatenate(parts) for parts in zip(*jax.device_get(found), strict=True))
    at = 0
    for row in rows:
        for request, _, targets in row.asked:
            span = slice(at, at + len(targets))
            at = span.stop
            yield request, Score(float(logs[span].sum(dtype=np.float64)), bool(hits[span].all()))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden(
    model: ModelConfig,
    numerics: NumericsConfig,
    variables: Any,
    tokens_BT: jax.Array,
    tree: Tree | None,
) -> jax.Array:
    network = Transformer(model, numerics, ShardingRules())
    out: Any = network.apply(variables, tokens_BT, tree=tree)
    return out.hidden_BTD


@jax.jit
def _predictions(
    head: Any, hidden_BTD: jax.Array, places_C: jax.Array, targets_C: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target after its place among all rows' tokens, and whether it is the
    likeliest: `[C]` each."""
    hidden_CD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[places_C]
    logits_CV = head_logits(head, hidden_CD)
    wanted_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1)[:, 0]
    best_C = wanted_C == logits_CV.max(axis=1)  # an argmax takes many times as long on CPU
    return wanted_C - jax.nn.logsumexp(logits_CV, axis=1), best_C
