"""Text from a model: prefill in chunks, decode over the latent cache, draft with MTP if asked.

Three compiled programs serve every request: prefill of one chunk, the first token, a burst of steps
(plain or speculative). They depend on the number of rows, the cache's room and the size of a chunk;
the last two are powers of two, and a request that names its room has chunks of one size. Prompts of
different lengths share a batch; a row that has ended is carried along until all have. Greedy
speculation gives plain greedy tokens; with sampling the rejection rule keeps the main model's
distribution. Dims: B rows, T new tokens, N steps.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from v3jax.config import ModelConfig, NumericsConfig
from v3jax.decode import sampling, steps
from v3jax.decode.cache import Cache, new_cache, room_for
from v3jax.decode.forward import prepare
from v3jax.decode.sampling import Options
from v3jax.decode.steps import BURST, PREFILL_CHUNK, Draws, News, State, Static
from v3jax.eplb import Placement
from v3jax.model.layers import compute_dtype

OnTokens = Callable[[int, list[int]], None]
_LEAST_CHUNK = 32
_PAUSE = 0.05
"""Seconds that a burst of steps should take at most, so that text keeps coming."""


class Vocabulary(Protocol):
    """What the engine asks of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos(self) -> int: ...

    def decode(self, ids: Iterable[int]) -> str: ...


@dataclass
class Generation:
    """What a row became."""

    ids: list[int] = field(default_factory=list)
    """New tokens, the one that ended the row included."""
    log_probs: list[float] = field(default_factory=list)
    """Of each new token under the main model, before temperature and filters; nats."""
    finish: str = "length"
    """`length`, `eos` or `stop`."""


@dataclass
class Stats:
    """What calls of `Engine.generate` took; those of several calls add up."""

    prefill_seconds: float = 0.0
    """Reading the prompts and drawing the first token of each row."""
    decode_seconds: float = 0.0
    generated: int = 0
    """All new tokens."""
    new_tokens: int = 0
    """New tokens after the first of each row."""
    main_steps: int = 0
    """Runs of the main model after prefill, times rows that were still going."""
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: "Stats") -> "Stats":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Stats)}
        return Stats(**sums)

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that the main model took."""
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a run of the main model gave a row."""
        return self.new_tokens / max(self.main_steps, 1)

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together, after their first tokens."""
        return self.new_tokens / max(self.decode_seconds, 1e-9)


class Engine:
    """A model ready to generate.

    Args:
      params: as training and `hf.load` have them; on a mesh, they stay split as they are.
      numerics: `compute` is the type of the cache and of matrix products.
      speculative: drafts with the MTP modules, as many tokens a step as there are modules.
      absorbed: decodes over the latents as they are; False expands keys and values from them.
      place: sharding of the cache, `[rows, room, latent]`, on the mesh that the weights are on;
        None lets jax decide. Rows are padded to a multiple of its shards.
      placement: experts and their copies in each MoE layer, MTP's last, as `v3jax.eplb.rebalance`
        has them; None for one of each in order. What is generated does not depend on it.

    Raises:
      ValueError: speculation with a model without MTP modules, or a placement that does not fit
        the model or the devices its experts are split over.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        router_state: Any,
        tokenizer: Vocabulary,
        *,
        numerics: NumericsConfig,
        speculative: bool = False,
        absorbed: bool = True,
        place: NamedSharding | None = None,
        placement: Placement | None = None,
    ) -> None:
        if speculative and not model.mtp_depth:
            raise ValueError("speculative decoding needs MTP modules; this model has none")
        self._static = Static(model, numerics, mtp=speculative, absorbed=absorbed, place=place)
        self._n_tokens = min(tokenizer.vocab_size, model.vocab_size)
        self._weights = prepare(model, numerics, params, router_state, placement)
        self.tokenizer = tokenizer

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        room: int | None = None,
        width: int = 1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_tokens: OnTokens | None = None,
    ) -> tuple[list[Generation], Stats]:
        """Continues prompts of ids by up to `max_tokens` each.

        Args:
          room: the most tokens a row may have, prompt included; None for what this call needs.
            That and the prompts' length are rounded up to powers of two so that calls share their
            compiled programs. Beginnings that all prompts have in common are then read once.
          width: the least rows to run, so that calls with fewer prompts share their programs too.
          seed: of the draws, within 0..2^32; a row's depend on it, its place and its tokens alone.
          stop: texts that end a row; the ids that spell one are kept.
          on_tokens: called with a row and its new ids as they come, some 50 ms of steps at a time.

        Raises:
          ValueError: no prompt, an empty one, ids outside the vocabulary, a prompt that leaves no
            room, or an option outside its range.
        """
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed}: must be within 0..2^32 - 1")
        if not all(stop):
            raise ValueError("stop: an empty text would end every row at once")
        options = sampling.options(temperature, top_k, top_p)
        longest = self._check(prompts, max_tokens)
        if room is not None and longest + max_tokens > room:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_tokens} more exceed the cache's room of "
                f"{room}; shorten it or raise the room"
            )
        rows = [_Row(self.tokenizer, max_tokens, stop) for _ in prompts]
        stats = Stats()
        clock = time.perf_counter()
        chunk, start = PREFILL_CHUNK, 0
        if room is None:
            room = room_for(longest + max_tokens)
            chunk = min(max(_LEAST_CHUNK, 1 << (longest - 1).bit_length()), chunk)
            start = self._alike(prompts) // chunk * chunk
        begun = self._begun(prompts[0], room, start, chunk) if start else None
        state = self._start(prompts, room, width, begun)
        draws = self._draws(options, seed, state, max_tokens)
        state, news = self._read(state, draws, longest, start, chunk)
        state, _ = self._take(rows, state, news, on_tokens)
        stats.prefill_seconds = time.perf_counter() - clock
        n_steps = 1
        while not all(row.done for row in rows):
            clock = time.perf_counter()
            state, news = steps.decode(
                self._static, self._weights, state, draws, jnp.int32(n_steps)
            )
            state, counts_NB = self._take(rows, state, news, on_tokens)
            seconds = time.perf_counter() - clock
            self._count(stats, counts_NB, seconds)
            n_run = int((counts_NB > 0).any(1).sum())
            assert n_run, "rows ended in the steps that go on here"
            n_steps = int(np.clip(_PAUSE * n_run / seconds, 1, BURST))
        stats.generated = sum(len(row.out.ids) for row in rows)
        stats.new_tokens = stats.generated - len(rows)
        return [row.out for row in rows], stats

    def _alike(self, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens that all prompts begin with, without those that a row must read itself: the
        window of the last ones, and what MTP modules look ahead to."""
        if len(prompts) == 1 or _shards_of_rows(self._static.place) > 1:
            return 0
        shortest = min(map(len, prompts))
        first, *others = (np.array(prompt[:shortest]) for prompt in prompts)
        differ = np.any(np.array(others) != first, axis=0)
        alike = int(differ.argmax()) if differ.any() else shortest
        alike = min(alike - self._static.model.mtp_depth, shortest - self._static.window - 1)
        return max(alike, 0)

    def _begun(self, prompt: Sequence[int], room: int, length: int, chunk: int) -> Cache:
        """A row's cache with the first `length` tokens of a prompt."""
        one = self._start([prompt[: length + self._static.model.mtp_depth + 1]], room)
        for start in range(0, length, chunk):
            one, _ = steps.prefill(self._static, self._weights, one, jnp.int32(start), chunk)
        return one.cache

    def _read(
        self,
        state: State,
        draws: Draws,
        longest: int,
        begin: int = 0,
        chunk: int = PREFILL_CHUNK,
    ) -> tuple[State, News]:
        """The state after the prompts, whose first `begin` tokens it has, and the token behind
        each, and that as news of one step."""
        for start in range(begin, longest, chunk):
            state, _ = steps.prefill(self._static, self._weights, state, jnp.int32(start), chunk)
        state, news = steps.first(self._static, self._weights, state, draws)
        return state, jax.tree.map(lambda x: x[None], news)

    def _count(self, stats: Stats, counts_NB: np.ndarray, seconds: float) -> None:
        n_steps = int((counts_NB > 0).sum())
        stats.decode_seconds += seconds
        stats.main_steps += n_steps
        if self._static.mtp:
            stats.drafted += self._static.model.mtp_depth * n_steps
            stats.accepted += int(counts_NB.sum()) - n_steps

    def _check(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
        """The length of the longest prompt."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: must be at least 1")
        if not prompts:
            raise ValueError("no prompt given")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty; begin with <bos>")
            for token in prompt:
                if not 0 <= token < self._n_tokens:
                    raise ValueError(
                        f"prompt {i} holds id {token}, outside the vocabulary of {self._n_tokens}"
                    )
        return max(len(prompt) for prompt in prompts)

    def _start(
        self,
        prompts: Sequence[Sequence[int]],
        room: int,
        width: int = 1,
        begun: Cache | None = None,
    ) -> State:
        """The state before prefill: prompts in place, in the cache nothing or what has `begun`."""
        static = self._static
        shards = _shards_of_rows(static.place)
        n_rows = -(-max(len(prompts), width) // shards) * shards
        dtype = compute_dtype(static.numerics)
        if begun is None:
            cache = new_cache(static.model, n_rows, room, dtype, mtp=static.mtp, place=static.place)
        else:
            rows = [jnp.broadcast_to(x, (n_rows, *x.shape[1:])) for x in begun.layers]
            cache = Cache(tuple(rows))
        # Prefill reads whole chunks and ahead of them; a last burst writes beyond the end.
        tokens = np.zeros((n_rows, cache.room + 2 * PREFILL_CHUNK), np.int32)
        lengths = np.ones(n_rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        window = np.zeros((n_rows, static.window, static.model.dim), dtype)
        live = np.arange(n_rows) < len(prompts)
        return State(cache, *(self._by_row(x) for x in (tokens, lengths, live, window)))

    def _draws(self, options: Options, seed: int, state: State, max_tokens: int) -> Draws:
        """How tokens are drawn for rows that begin with `state`."""
        n_rows = len(state.lengths_B)
        return Draws(
            options,
            keys_B=self._by_row(_row_keys(n_rows, jnp.uint32(seed))),
            ends_B=self._by_row(state.lengths_B + max_tokens),
            eos=jnp.int32(self.tokenizer.eos),
            n_tokens=jnp.int32(self._n_tokens),
        )

    def _by_row(self, array: np.ndarray | jax.Array) -> jax.Array:
        place = self._static.by_row
        return jnp.asarray(array) if place is None else jax.device_put(array, place)

    def _take(
        self, rows: "list[_Row]", state: State, news: News, on_tokens: OnTokens | None
    ) -> tuple[State, np.ndarray]:
        """Hands the news `[N, ...]` of some steps to the rows that go on.

        Returns the state without rows that a stop text ended, and how many tokens `[N, B]` each
        step found for the rows that went on.
        """
        tokens_NBT, logs_NBT, counts_NB = jax.device_get(
            (news.tokens_BT, news.log_probs_BT, news.counts_B)
        )
        counts_NB = counts_NB[:, : len(rows)]
        stopped = False
        for i, row in enumerate(rows):
            if row.done:
                continue
            is_new_NT = np.arange(tokens_NBT.shape[2]) < counts_NB[:, i, None]
            new = row.take(tokens_NBT[:, i][is_new_NT].tolist(), logs_NBT[:, i][is_new_NT].tolist())
            stopped |= row.out.finish == "stop"
            if on_tokens is not None:
                on_tokens(i, new)
        if stopped and not all(row.done for row in rows):
            live = np.zeros(state.live_B.shape, bool)
            live[: len(rows)] = [not row.done for row in rows]
            state = replace(state, live_B=self._by_row(live))
        return state, counts_NB


@functools.partial(jax.jit, static_argnums=0)
def _row_keys(n_rows: int, seed: jax.Array) -> jax.Array:
    return sampling.row_keys(seed, n_rows)


def _shards_of_rows(place: NamedSharding | None) -> int:
    """Devices, or groups of them, that an array's rows are split over."""
    axes = None if place is None or not place.spec else place.spec[0]
    if place is None or axes is None:
        return 1
    axes = (axes,) if isinstance(axes, str) else axes
    return math.prod(place.mesh.shape[axis] for axis in axes)


class _Row:
    """A row's new tokens and whether it has ended."""

    def __init__(self, tokenizer: Vocabulary, max_tokens: int, stop: Sequence[str]) -> None:
        self.out = Generation()
        self.done = False
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._stop = list(stop)
        self._spelling: list[int] = []  # the newest ids that stand for bytes
        # A stop text has at most so many of them, and three more may begin its first character.
        self._tail = max((len(text.encode()) for text in self._stop), default=0) + 3

    def take(self, tokens: list[int], logs: list[float]) -> list[int]:
        """Adds tokens up to the one that ends the row; returns those added."""
        before = len(self.out.ids)
        for token, log in zip(tokens, logs, strict=True):
            self.out.ids.append(token)
            self.out.log_probs.append(log)
            self.done = self._ends(token)
            if self.done:
                break
        return self.out.ids[before:]

    def _ends(self, token: int) -> bool:
        if token == self._tokenizer.eos:
            self.out.finish = "eos"
        elif self._stop and self._stopped(token):
            self.out.finish = "stop"
        else:
            return len(self.out.ids) >= self._max_tokens
        return True

    def _stopped(self, token: int) -> bool:
        if self._tokenizer.decode([token]):
            self._spelling = [*self._spelling, token][-self._tail :]
        text = self._tokenizer.decode(self._spelling)
        return any(stop in text for stop in self._stop)
