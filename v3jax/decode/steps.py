"""The compiled programs of decoding: prefill of a chunk, the first token, a burst of steps.

Rows of a batch stand at different lengths; one that has ended is carried along and changes no more.
Dims: B rows, T new tokens, K drafted tokens, W window, S room, D model, V vocabulary, N steps.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v3jax.config import ModelConfig, NumericsConfig
from v3jax.decode import sampling
from v3jax.decode.cache import Cache, write_rows
from v3jax.decode.forward import Weights, logits, main_forward, mtp_forward
from v3jax.decode.sampling import Options

PREFILL_CHUNK = 256
"""The most tokens of a prompt that are read at once."""
BURST = 16
"""The most steps of one call, which spare the host's part of all but the first."""
_DRAW, _DRAFT, _ACCEPT = 0, 1, 2  # uses of a position's random key


@struct.dataclass
class State:
    """Where every row of a batch stands."""

    cache: Cache
    tokens_BS: jax.Array
    """All tokens so far; the newest has no row in the cache yet."""
    lengths_B: jax.Array
    """Known tokens of each row."""
    live_B: jax.Array
    """Rows that have not ended."""
    window_BWD: jax.Array
    """Hidden states of the W positions before the newest token, which MTP modules read."""


@struct.dataclass
class Draws:
    """How a call draws its tokens."""

    options: Options
    keys_B: jax.Array
    """A random key for each row."""
    ends_B: jax.Array
    """Length, prompt included, at which a row has ended."""
    eos: jax.Array
    """Id that ends a row; none if negative."""
    n_tokens: jax.Array
    """Ids that exist, int32; those above pad the vocabulary."""


@struct.dataclass
class News:
    """What a step found out."""

    tokens_BT: jax.Array
    counts_B: jax.Array
    """How many of a row's tokens are new, 0 if it had ended; the others mean nothing."""
    log_probs_BT: jax.Array
    """Of the tokens under the main model, before temperature and filters."""


@dataclass(frozen=True)
class Static:
    """What the programs are compiled for."""

    model: ModelConfig
    numerics: NumericsConfig
    mtp: bool
    absorbed: bool
    place: NamedSharding | None
    """Of the cache's layers, `[B, S, Z]`."""

    @property
    def window(self) -> int:
        """Positions the MTP modules go over again: new ones, and those they had only guessed for.

        A step makes at most depth + 1 positions known, and the deepest module rested on depth - 1
        guesses.
        """
        return 2 * self.model.mtp_depth if self.mtp else 1

    @property
    def by_row(self) -> NamedSharding | None:
        """The place of arrays with a leading axis of rows."""
        if self.place is None:
            return None
        return NamedSharding(self.place.mesh, P(*self.place.spec[:1]))


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def prefill(
    static: Static, weights: Weights, state: State, start: jax.Array, chunk: int = PREFILL_CHUNK
) -> tuple[State, jax.Array]:
    """`chunk` tokens of every prompt from `start` on; hidden states `[B, T, D]`."""
    tokens_BT = jax.lax.dynamic_slice_in_dim(state.tokens_BS, start, chunk, axis=1)
    positions_T = start + jnp.arange(chunk)
    known_BT = (positions_T < state.lengths_B[:, None]) & state.live_B[:, None]
    positions_BT = jnp.where(known_BT, positions_T, -1)
    parts = (static.model, static.numerics, weights)
    hidden_BTD, cache = main_forward(*parts, state.cache, tokens_BT, positions_BT, absorbed=False)
    h_BTD = hidden_BTD
    for depth in range(1, static.model.mtp_depth + 1 if static.mtp else 1):
        # The last positions look ahead to what is not known yet; drafting goes over them again.
        ahead_BT = jax.lax.dynamic_slice_in_dim(state.tokens_BS, start + depth, chunk, axis=1)
        h_BTD, cache = mtp_forward(
            *parts, cache, depth, h_BTD, ahead_BT, positions_BT, absorbed=False
        )
    # Keep the hidden states of the last W positions of each prompt, wherever their chunk is.
    wanted_BW = state.lengths_B[:, None] - static.window + jnp.arange(static.window)
    inside_BW = (wanted_BW >= start) & (wanted_BW < start + chunk)
    at_BW = jnp.clip(wanted_BW - start, 0, chunk - 1)
    found_BWD = jnp.take_along_axis(hidden_BTD, at_BW[..., None], axis=1)
    window_BWD = jnp.where(inside_BW[..., None], found_BWD, state.window_BWD)
    return _placed(static, replace(state, cache=cache, window_BWD=window_BWD)), hidden_BTD


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def first(static: Static, weights: Weights, state: State, draws: Draws) -> tuple[State, News]:
    """The token after each prompt, from the hidden states that prefill left."""
    logits_BV = logits(weights, state.window_BWD[:, -1], draws.n_tokens)
    return _next(static, state, logits_BV, draws)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    static: Static, weights: Weights, state: State, draws: Draws, n_steps: jax.Array
) -> tuple[State, News]:
    """Up to `n_steps` steps, of `BURST`, until all rows have ended; the news of each, `[N, ...]`.

    A plain step finds one token a row, a speculative one 1 to K + 1.
    """
    step = _speculative_step if static.mtp else _plain_step
    found = jax.tree.map(
        lambda x: jnp.zeros((BURST, *x.shape), x.dtype),
        jax.eval_shape(functools.partial(step, static), weights, state, draws)[1],
    )

    def goes_on(carry: tuple[jax.Array, State, News]) -> jax.Array:
        n, state, _ = carry
        return (n < n_steps) & jnp.any(state.live_B)

    def one(carry: tuple[jax.Array, State, News]) -> tuple[jax.Array, State, News]:
        n, state, found = carry
        state, news = step(static, weights, state, draws)
        return n + 1, state, jax.tree.map(lambda all_N, x: all_N.at[n].set(x), found, news)

    _, state, found = jax.lax.while_loop(goes_on, one, (jnp.int32(0), state, found))
    return state, found


def _plain_step(static: Static, weights: Weights, state: State, draws: Draws) -> tuple[State, News]:
    newest_B1 = _newest(state)
    hidden_BTD, cache = main_forward(
        static.model,
        static.numerics,
        weights,
        state.cache,
        _tokens_at(state.tokens_BS, newest_B1),
        jnp.where(state.live_B[:, None], newest_B1, -1),
        absorbed=static.absorbed,
    )
    logits_BV = logits(weights, hidden_BTD[:, 0], draws.n_tokens)
    return _next(static, replace(state, cache=cache), logits_BV, draws)


def _next(static: Static, state: State, logits_BV: jax.Array, draws: Draws) -> tuple[State, News]:
    """Draws and appends one token a row."""
    keys_B = sampling.keys_at(draws.keys_B, state.lengths_B, _DRAW)
    tokens_B, _ = sampling.choose(logits_BV, draws.options, keys_B)
    logs_B = sampling.log_prob(logits_BV, tokens_B)
    news = News(tokens_B[:, None], jnp.ones_like(state.lengths_B), logs_B[:, None])
    return _append(static, state, draws, news)


def _speculative_step(
    static: Static, weights: Weights, state: State, draws: Draws
) -> tuple[State, News]:
    """Drafts K tokens and verifies them in one run of the main model."""
    n_drafts = static.model.mtp_depth
    drafted_BK, drafts_BKV, cache = _draft(static, weights, state, draws)
    newest_B1 = _newest(state)
    hidden_BTD, cache = main_forward(
        static.model,
        static.numerics,
        weights,
        cache,
        jnp.concatenate([_tokens_at(state.tokens_BS, newest_B1), drafted_BK], axis=1),
        jnp.where(state.live_B[:, None], newest_B1 + jnp.arange(n_drafts + 1), -1),
        absorbed=static.absorbed,
    )
    logits_BTV = logits(weights, hidden_BTD, draws.n_tokens)

    def sampled() -> tuple[jax.Array, jax.Array]:
        uniform_BK = jax.vmap(lambda key: jax.random.uniform(key, (n_drafts,)))(
            sampling.keys_at(draws.keys_B, state.lengths_B, _ACCEPT)
        )
        return sampling.accept(
            drafted_BK,
            jax.nn.softmax(drafts_BKV, axis=-1),
            jax.nn.softmax(sampling.scaled(logits_BTV, draws.options), axis=-1),
            uniform_BK,
            sampling.keys_at(draws.keys_B, state.lengths_B, _DRAW),
        )

    def greedy() -> tuple[jax.Array, jax.Array]:
        best_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
        n_kept_B = sampling.leading(drafted_BK == best_BT[:, :-1])
        return n_kept_B, _tokens_at(best_BT, n_kept_B[:, None])[:, 0]

    n_kept_B, last_B = jax.lax.cond(draws.options.temperature > 0, sampled, greedy)
    padded_BT = jnp.pad(drafted_BK, ((0, 0), (0, 1)))
    is_last_BT = jnp.arange(n_drafts + 1) == n_kept_B[:, None]
    tokens_BT = jnp.where(is_last_BT, last_B[:, None], padded_BT)
    # The window moves on by the tokens that became known.
    seen_BWD = jnp.concatenate([state.window_BWD, hidden_BTD], axis=1)
    at_BW = n_kept_B[:, None] + 1 + jnp.arange(static.window)
    window_BWD = jnp.take_along_axis(seen_BWD, at_BW[..., None], axis=1)
    news = News(tokens_BT, n_kept_B + 1, sampling.log_prob(logits_BTV, tokens_BT))
    return _append(static, replace(state, cache=cache, window_BWD=window_BWD), draws, news)


def _draft(
    static: Static, weights: Weights, state: State, draws: Draws
) -> tuple[jax.Array, jax.Array, Cache]:
    """One token from each MTP module in turn, each from the hidden states of the one before.

    Module k reads position i and the token k further on. It runs over the last W positions again,
    since the rows it left there last time rest on drafts that may have been refused. Returns tokens
    `[B, K]`, the logits `[B, K, V]` they were drawn from, and the cache.
    """
    # The window ends before the newest token, whose hidden state is not known yet. Before the
    # sequence's beginning there is only padding.
    positions_BW = _newest(state) - static.window + jnp.arange(static.window)
    live_BW = jnp.where(state.live_B[:, None], positions_BW, -1)
    tokens_BS, cache = state.tokens_BS, state.cache
    h_BWD = state.window_BWD
    drafted, drafts = [], []
    for depth in range(1, static.model.mtp_depth + 1):
        h_BWD, cache = mtp_forward(
            static.model,
            static.numerics,
            weights,
            cache,
            depth,
            h_BWD,
            _tokens_at(tokens_BS, jnp.maximum(positions_BW + depth, 0)),
            live_BW,
            absorbed=static.absorbed,
        )
        at_B = state.lengths_B + depth - 1
        logits_BV = logits(weights, h_BWD[:, -1], draws.n_tokens)
        token_B, logits_BV = sampling.choose(
            logits_BV, draws.options, sampling.keys_at(draws.keys_B, at_B, _DRAFT)
        )
        tokens_BS = write_rows(tokens_BS, token_B[:, None], at_B[:, None])
        drafted.append(token_B)
        drafts.append(logits_BV)
    return jnp.stack(drafted, axis=1), jnp.stack(drafts, axis=1), cache


def _newest(state: State) -> jax.Array:
    """Position `[B, 1]` of each row's last known token."""
    return state.lengths_B[:, None] - 1


def _tokens_at(tokens_BS: jax.Array, slots_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(tokens_BS, slots_BT, axis=1)


def _append(static: Static, state: State, draws: Draws, news: News) -> tuple[State, News]:
    """Writes what is new behind the known tokens of each row that has not ended."""
    counts_B = jnp.where(state.live_B, news.counts_B, 0)
    offsets_T = jnp.arange(news.tokens_BT.shape[1])
    is_new_BT = offsets_T < counts_B[:, None]
    slots_BT = jnp.where(is_new_BT, state.lengths_B[:, None] + offsets_T, -1)
    lengths_B = state.lengths_B + counts_B
    is_eos_B = jnp.any(is_new_BT & (news.tokens_BT == draws.eos), axis=1)
    state = replace(
        state,
        tokens_BS=write_rows(state.tokens_BS, news.tokens_BT, slots_BT),
        lengths_B=lengths_B,
        live_B=state.live_B & ~is_eos_B & (lengths_B < draws.ends_B),
    )
    return _placed(static, state), replace(news, counts_B=counts_B)


def _placed(static: Static, state: State) -> State:
    """The state pinned to where it lives, else the compiler may move it."""
    if static.place is None or static.by_row is None:
        return state

    def pin(place: NamedSharding) -> Any:
        return lambda x: jax.lax.with_sharding_constraint(x, place)

    rows = jax.tree.map(pin(static.by_row), replace(state, cache=Cache(())))
    return replace(rows, cache=jax.tree.map(pin(static.place), state.cache))
