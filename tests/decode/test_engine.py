"""The engine against whole passes without a cache: same tokens, same log-probabilities."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decode.small import MODEL, ROOM, Letters, Setup, prompts, setup
from v3jax.decode import Engine, Generation, sampling, steps
from v3jax.decode.cache import BLOCK, Cache, new_cache, room_for
from v3jax.decode.engine import _Row
from v3jax.decode.forward import main_forward, mtp_forward
from v3jax.decode.steps import BURST, PREFILL_CHUNK, Draws, News, State
from v3jax.weights import FP32

N_TOKENS = 12


@functools.cache
def shared() -> Setup:
    return setup()


@functools.cache
def engine(*, speculative: bool = False) -> Engine:
    return shared().engine(speculative=speculative)


def generate(
    rows: Sequence[Sequence[int]], *, speculative: bool = False, **options: Any
) -> list[Generation]:
    options = {"max_tokens": N_TOKENS, "room": ROOM} | options
    return engine(speculative=speculative).generate(rows, **options)[0]


def ids(generations: Sequence[Generation]) -> list[list[int]]:
    return [one.ids for one in generations]


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    x = logits_TV.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def assert_of_whole_passes(rows: Sequence[Sequence[int]], out: Sequence[Generation]) -> None:
    """Every token is the likeliest after all before it, with its log-probability."""
    logits = shared().logits([[*row, *one.ids] for row, one in zip(rows, out, strict=True)])
    for row, one, of_row in zip(rows, out, logits, strict=True):
        after = of_row[len(row) - 1 : -1]
        assert one.ids == after.argmax(-1).tolist()
        wanted = log_softmax(after)[np.arange(len(one.ids)), one.ids]
        np.testing.assert_allclose(one.log_probs, wanted, atol=2e-5)


ROWS = prompts(4, 30)
LONG = np.random.default_rng(5).integers(0, MODEL.vocab_size, 2 * PREFILL_CHUNK + 57).tolist()
both = pytest.mark.parametrize("speculative", [False, True])


@both
def test_greedy_tokens_are_those_of_whole_passes(speculative: bool) -> None:
    out = generate(ROWS, speculative=speculative)
    assert [len(one.ids) for one in out] == [N_TOKENS] * 4
    assert len({t for one in out for t in one.ids}) > 8, "a model that repeats itself hides errors"
    assert_of_whole_passes(ROWS, out)


def test_a_batch_gives_what_each_prompt_gives_alone() -> None:
    for row, of_batch in zip(ROWS, generate(ROWS), strict=True):
        (alone,) = generate([row])
        assert alone.ids == of_batch.ids
        np.testing.assert_allclose(alone.log_probs, of_batch.log_probs, atol=1e-5)


@pytest.mark.parametrize("speculative", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_all_prompts_begin_with_is_read_once(
    speculative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [LONG[:300] + row[:n] for n, row in zip((8, 9, 30, 12), ROWS, strict=True)]
    read = []
    prefill = steps.prefill
    monkeypatch.setattr(steps, "prefill", lambda *a: read.append(len(a[2].live_B)) or prefill(*a))
    one = engine(speculative=speculative)
    out, _ = one.generate(rows, max_tokens=N_TOKENS)
    assert read == [1, 4], "a chunk of 256 tokens once, and what is left of each"
    assert_of_whole_passes(rows, out)
    read.clear()
    assert one.generate([rows[0]], max_tokens=N_TOKENS)[0][0].ids == out[0].ids
    assert read == [1, 1]
    # The window of the last tokens is a row's own.
    assert one._alike([LONG, LONG]) == len(LONG) - one._static.window - 1
    read.clear()
    one.generate([LONG, ROWS[0]], max_tokens=N_TOKENS)
    assert read == [2, 2, 2], "nothing alike"


def test_rows_beyond_the_prompts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = generate(ROWS[:3])
    read = []
    prefill = steps.prefill
    monkeypatch.setattr(steps, "prefill", lambda *a: read.append(len(a[2].live_B)) or prefill(*a))
    found, stats = engine().generate(ROWS[:3], max_tokens=N_TOKENS, room=ROOM, width=4)
    assert [one.ids for one in found] == [one.ids for one in wanted]
    assert stats.generated == 3 * N_TOKENS
    assert read == [4]


@functools.cache
def prefilled() -> tuple[State, np.ndarray]:
    """The state after a long prompt and short ones, and the long one's hidden states."""
    one = engine(speculative=True)
    state = one._start([LONG, LONG[:5], *ROWS[:2]], ROOM)
    chunks = []
    for start in range(0, len(LONG), PREFILL_CHUNK):
        state, hidden = steps.prefill(one._static, one._weights, state, jnp.int32(start))
        chunks.append(np.asarray(hidden[0]))
    return state, np.concatenate(chunks)[: len(LONG)]


def test_prefill_in_chunks_is_prefill_at_once() -> None:
    """Hidden states, and the rows that the main model and MTP modules leave."""
    state, hidden_TD = prefilled()
    weights = engine(speculative=True)._weights
    tokens = jnp.asarray([[*LONG, 0, 0]])
    positions = jnp.arange(len(LONG))[None]
    parts = (MODEL, FP32, weights)

    @jax.jit
    def at_once(cache: Cache) -> tuple[jax.Array, Cache]:
        hidden, cache = main_forward(*parts, cache, tokens[:, :-2], positions, absorbed=False)
        h = hidden
        for depth in (1, 2):
            ahead = tokens[:, depth : len(LONG) + depth]
            h, cache = mtp_forward(*parts, cache, depth, h, ahead, positions, absorbed=False)
        return hidden, cache

    wanted, cache = at_once(new_cache(MODEL, 1, len(LONG), jnp.float32, mtp=True))
    np.testing.assert_allclose(hidden_TD, wanted[0], atol=2e-5)
    for got, rows in zip(state.cache.layers, cache.layers, strict=True):
        np.testing.assert_allclose(got[0, : len(LONG)], rows[0, : len(LONG)], atol=2e-5)
    np.testing.assert_allclose(state.window_BWD[0], wanted[0, -4:], atol=2e-5)


def test_prefill_leaves_no_row_beyond_a_prompt() -> None:
    state, _ = prefilled()
    for rows in state.cache.layers:
        assert (np.asarray(rows[1, :5]) != 0).any(-1).all()
        assert (np.asarray(rows[1, 5:]) == 0).all()


def begun(one: Engine, seed: int = 0) -> tuple[State, Draws]:
    """The state after the first token, greedy."""
    state = one._start(ROWS, ROOM)
    draws = one._draws(sampling.options(), seed, state, N_TOKENS + 1)
    return one._read(state, draws, 30)[0], draws


def test_absorbed_and_expanded_attention_agree() -> None:
    one = engine()
    found = []
    for absorbed in (True, False):
        state, draws = begun(one)
        static = replace(one._static, absorbed=absorbed)
        found.append(steps.decode(static, one._weights, state, draws, jnp.int32(N_TOKENS))[1])
    assert (np.asarray(found[0].counts_B[:N_TOKENS]) == 1).all()
    np.testing.assert_array_equal(found[0].tokens_BT, found[1].tokens_BT)
    np.testing.assert_allclose(found[0].log_probs_BT, found[1].log_probs_BT, atol=1e-5)


@both
def test_prompts_of_several_chunks_are_continued_as_by_whole_passes(speculative: bool) -> None:
    rows = [LONG, LONG[:PREFILL_CHUNK], LONG[: PREFILL_CHUNK + 1], LONG[:3]]
    assert_of_whole_passes(rows, generate(rows, max_tokens=4, speculative=speculative))


@both
def test_rows_cross_from_block_to_block(speculative: bool) -> None:
    rows = [LONG[: BLOCK - 3], LONG[: 2 * BLOCK - 9], LONG[:1], LONG[: BLOCK - 6]]
    assert_of_whole_passes(rows, generate(rows, speculative=speculative))


@both
def test_draws_depend_on_the_seed_and_the_row_alone(speculative: bool) -> None:
    def drawn(rows: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        options = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "speculative": speculative}
        return ids(generate(rows, seed=seed, **options))

    once = drawn(ROWS, 1)
    assert drawn(ROWS, 1) == once
    assert all(a != b for a, b in zip(drawn(ROWS, 2), once, strict=True))
    others = prompts(4, 30, seed=9)
    mixed = drawn([ROWS[0], others[1], ROWS[2], others[3]], 1)
    assert (mixed[0], mixed[2]) == (once[0], once[2])
    options = {"temperature": 1e4, "speculative": speculative}
    assert all(len(set(row)) > 6 for row in ids(generate(ROWS, **options))), "positions draw alike"
    alike = drawn([ROWS[0]] * 4, 1)
    assert alike[0] == once[0]
    assert len({tuple(row) for row in alike}) == 4, "rows draw alike"


@both
def test_max_tokens_is_kept_to(speculative: bool) -> None:
    whole = ids(generate(ROWS))
    for n in (1, 2, 5):
        out, stats = engine(speculative=speculative).generate(ROWS, max_tokens=n, room=ROOM)
        assert ids(out) == [row[:n] for row in whole]
        assert {o.finish for o in out} == {"length"}
        assert stats.generated == 4 * n
        assert stats.new_tokens == 4 * (n - 1)


@both
def test_a_row_ends_at_eos_and_the_others_go_on(speculative: bool) -> None:
    whole = ids(generate(ROWS))
    eos = whole[2][3]
    wanted = [row[: row.index(eos) + 1] if eos in row else row for row in whole]
    assert len({len(row) for row in wanted}) > 1
    one = shared().engine(eos=eos, speculative=speculative)
    out, _ = one.generate(ROWS, max_tokens=N_TOKENS, room=ROOM)
    assert ids(out) == wanted
    for row in out:
        assert row.finish == ("eos" if row.ids[-1] == eos else "length")
        assert len(row.log_probs) == len(row.ids)


@both
def test_a_row_that_has_ended_changes_no_more(speculative: bool) -> None:
    one = engine(speculative=speculative)
    live = np.array([True, False, True, False])
    state, draws = begun(one)
    state = replace(state, live_B=jnp.asarray(live))
    before = jax.tree.map(np.array, state)
    after, news = steps.decode(one._static, one._weights, state, draws, jnp.int32(2))
    counts_NB = np.asarray(news.counts_B)
    np.testing.assert_array_equal(counts_NB > 0, [live, live] + [[False] * 4] * (BURST - 2))
    np.testing.assert_array_equal(after.lengths_B - before.lengths_B, counts_NB.sum(0))
    pairs = [(before.tokens_BS, after.tokens_BS)]
    pairs += list(zip(before.cache.layers, after.cache.layers, strict=True))
    for old, new in pairs:
        changed = (np.asarray(new) != old).reshape(4, -1).any(1)
        np.testing.assert_array_equal(changed, live)


@both
def test_a_burst_ends_with_its_last_row(speculative: bool) -> None:
    one = engine(speculative=speculative)
    eos = ids(generate(ROWS))[1][2]
    state, draws = begun(one)
    draws = replace(draws, eos=jnp.int32(eos), ends_B=state.lengths_B + 4)
    state, news = steps.decode(one._static, one._weights, state, draws, jnp.int32(BURST))
    assert not np.asarray(state.live_B).any()
    counts_NB = np.asarray(news.counts_B)
    assert (counts_NB > 0).any(1).sum() <= 4
    for row, count in enumerate(counts_NB.sum(0)):
        new = [
            token
            for tokens, n in zip(news.tokens_BT[:, row].tolist(), counts_NB[:, row], strict=True)
            for token in tokens[:n]
        ]
        assert len(new) == count
        assert (eos in new) == (count < 4)


def test_a_refused_draft_that_is_eos_ends_no_row() -> None:
    one = engine(speculative=True)
    state, draws = begun(one)
    tokens = jnp.array([[5, 9, 0], [9, 5, 0], [5, 9, 0], [5, 5, 9]])
    news = News(tokens, jnp.array([1, 1, 2, 2]), jnp.zeros((4, 3)))
    after, _ = steps._append(one._static, state, replace(draws, eos=jnp.int32(9)), news)
    assert np.asarray(after.live_B).tolist() == [True, False, False, True]


def test_a_row_that_a_stop_text_ended_is_told_to_the_next_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    decode = steps.decode

    def spy(static: Any, weights: Any, state: State, *rest: Any) -> Any:
        seen.append(np.asarray(state.live_B).tolist())
        return decode(static, weights, state, *rest)

    monkeypatch.setattr(steps, "decode", spy)
    monkeypatch.setattr("v3jax.decode.engine._PAUSE", 0.0)  # a step a burst
    whole = ids(generate(ROWS))
    seen.clear()
    out = generate(ROWS, stop=[Letters().decode(whole[1])[4:7]])
    assert len(seen) == N_TOKENS - 1
    for t, live in enumerate(seen):
        assert live == [len(one.ids) > t + 1 for one in out]


@both
def test_a_stop_text_ends_a_row_at_the_token_that_completes_it(speculative: bool) -> None:
    whole = ids(generate(ROWS))
    letters = Letters()
    stop = letters.decode(whole[1])[4:7]
    out = generate(ROWS, stop=["never\u00e9", stop], speculative=speculative)
    for one, row in zip(out, whole, strict=True):
        at = letters.decode(row).find(stop)
        assert one.ids == (row if at < 0 else row[: at + 3])
        assert one.finish == ("length" if at < 0 else "stop")
    assert {one.finish for one in out} == {"length", "stop"}


class _Pairs:
    """Ids 0 to 3 are the bytes of an e with an accent and a b; the others spell nothing."""

    vocab_size, eos = 9, 8

    def decode(self, ids: Iterable[int]) -> str:
        raw = {0: b"\xc3", 1: b"\xa9", 2: b"b"}
        return b"".join(raw.get(i, b"") for i in ids).decode(errors="replace")


def test_a_stop_text_is_seen_across_tokens_that_spell_parts_or_nothing() -> None:
    row = _Row(_Pairs(), 100, ["b\u00e9"])
    tokens = [0, 1, *[2] * 30, 0, *[5] * 20, 1, 2, 2]
    assert row.take(tokens, [0.0] * len(tokens)) == tokens[:-2]
    assert row.out.finish == "stop"
    assert len(row._spelling) == 6, "the newest bytes alone are looked at"


@both
def test_streamed_ids_are_the_ids_returned(speculative: bool) -> None:
    seen: list[list[int]] = [[] for _ in ROWS]
    calls = []

    def on_tokens(row: int, new: list[int]) -> None:
        assert new
        seen[row].extend(new)
        calls.append(row)

    options = {"stop": ["AB"], "temperature": 1.0, "speculative": speculative}
    assert ids(generate(ROWS, on_tokens=on_tokens, **options)) == seen
    assert calls[:4] == [0, 1, 2, 3]


def programs() -> int:
    """Compiled programs so far."""
    jitted: tuple[Any, ...] = (steps.prefill, steps.first, steps.decode)
    return sum(program._cache_size() for program in jitted)


@both
def test_no_request_of_as_many_rows_compiles_anything_new(speculative: bool) -> None:
    one = engine(speculative=speculative)
    lengths = [520, 600, 777, 900, 1000]
    one.generate(prompts(4, ROOM - 6), max_tokens=6)
    before = programs()
    for longest in lengths:
        one.generate(prompts(4, longest, seed=longest), max_tokens=6)
    rows = prompts(4, 700)
    one.generate(rows, max_tokens=3, temperature=0.7)
    one.generate(rows, max_tokens=3, temperature=1.2, top_k=3, top_p=0.5, seed=11)
    one.generate(rows, max_tokens=3, stop=["A"], seed=3)
    one.generate(ROWS, max_tokens=40, room=ROOM)
    assert programs() == before


def test_lengths_share_a_program_for_each_power_of_two_of_blocks() -> None:
    rooms = {room_for(length) for length in range(1, 9 * BLOCK)}
    assert rooms == {BLOCK << k for k in range(5)}
    assert engine()._start([[1]], 5 * BLOCK - 3).cache.room == 5 * BLOCK


@both
def test_a_room_that_just_holds_the_text_is_enough(speculative: bool) -> None:
    rows = [np.resize(LONG, ROOM - 4).tolist(), LONG[:7], LONG[:2], LONG[:1]]
    assert engine(speculative=speculative)._start(rows, ROOM).cache.room == ROOM
    assert_of_whole_passes(rows, generate(rows, max_tokens=4, speculative=speculative))


@pytest.mark.parametrize(
    ("rows", "options", "named"),
    [
        ([], {}, "no prompt given"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, 41]], {}, "prompt 1 holds id 41, outside the vocabulary of 41"),
        ([[-1]], {}, "prompt 0 holds id -1"),
        ([[1] * 90], {"room": 100}, "a prompt of 90 tokens and 12 more exceed .* room of 100"),
        ([[1] * 500], {"room": 256}, "a prompt of 500 tokens and 12 more exceed"),
        ([[1]], {"max_tokens": 0}, "max_tokens=0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"top_k": -2}, "top_k=-2"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], {"seed": -1}, "seed=-1"),
        ([[1]], {"stop": ["a", ""]}, "stop: an empty text"),
    ],
)
def test_mistakes_are_named_in_a_line(rows: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        generate(rows, **options)
    assert "\n" not in str(caught.value)


@both
def test_ids_that_only_pad_the_vocabulary_are_refused_and_never_drawn(speculative: bool) -> None:
    whole = shared()
    parts = (MODEL, whole.params, whole.router_state, Letters(30, -1))
    short = Engine(*parts, numerics=FP32, speculative=speculative)
    with pytest.raises(ValueError, match="holds id 30, outside the vocabulary of 30"):
        short.generate([[30]], max_tokens=1)
    rows = [[t % 30 for t in row] for row in ROWS]
    for temperature in (0.0, 3.0):
        out, _ = short.generate(rows, max_tokens=30, temperature=temperature, room=ROOM)
        assert max(max(row) for row in ids(out)) < 30


def test_speculation_needs_mtp_modules() -> None:
    plain = setup(replace(MODEL, mtp_depth=0))
    with pytest.raises(ValueError, match="needs MTP modules"):
        plain.engine(speculative=True)


def test_stats_of_calls_add_up() -> None:
    one, two = (engine(speculative=True).generate(ROWS, max_tokens=n, room=ROOM)[1] for n in (5, 7))
    both = one + two
    assert both.generated == 4 * (5 + 7)
    assert both.drafted == MODEL.mtp_depth * both.main_steps == one.drafted + two.drafted
    assert 1 <= both.tokens_per_step <= 1 + MODEL.mtp_depth
