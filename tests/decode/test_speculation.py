"""Speculative decoding changes nothing but the time it takes: greedy tokens and distributions.

The models' MTP modules are made to foresee some of the next tokens and to miss others.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decode.small import MODEL, ROOM, Setup, chi_square_is_small, prompts, setup
from v3jax.decode import Engine, Stats, sampling, steps
from v3jax.decode.cache import BLOCK

N_PROMPTS, ROWS, N_TOKENS = 200, 4, 16


@functools.cache
def shared(depth: int) -> Setup:
    """The same main model for every depth."""
    return setup(replace(MODEL, mtp_depth=depth), foresight=True)


def generate(
    engine: Engine, rows: Sequence[Sequence[int]], n_tokens: int
) -> tuple[list[list[int]], Stats]:
    """Greedy tokens of all prompts, a few at a time."""
    out, stats = [], Stats()
    for i in range(0, len(rows), ROWS):
        some, one = engine.generate(rows[i : i + ROWS], max_tokens=n_tokens, room=ROOM)
        out += [row.ids for row in some]
        stats += one
    return out, stats


@functools.cache
def plain() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and a few more tokens after each than speculation is asked for."""
    rows = prompts(N_PROMPTS, 60, seed=1)
    return rows, generate(shared(2).engine(), rows, N_TOKENS + 3)[0]


def expected_stats(depth: int) -> tuple[int, int]:
    """Steps of the main model and accepted drafts, from MTP modules run over the whole texts."""
    rows, out = plain()
    texts = [[*row, *new] for row, new in zip(rows, out, strict=True)]
    drafts = shared(depth).mtp_logits(texts, 80).argmax(-1)
    n_steps = n_accepted = 0
    for i, (prompt, text) in enumerate(zip(rows, texts, strict=True)):
        known = len(prompt) + 1
        while known < len(prompt) + N_TOKENS:
            hits = [drafts[k, i, known - 2] == text[known + k] for k in range(depth)]
            kept = hits.index(False) if False in hits else depth
            n_steps, n_accepted, known = n_steps + 1, n_accepted + kept, known + kept + 1
    return n_steps, n_accepted


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_greedy_speculation_gives_plain_greedy_tokens(depth: int) -> None:
    rows, wanted = plain()
    assert len({len(row) for row in rows}) > 40
    assert len({tuple(new) for new in wanted}) > N_PROMPTS / 2
    got, stats = generate(shared(depth).engine(speculative=True), rows, N_TOKENS)
    assert got == [new[:N_TOKENS] for new in wanted]
    assert 0.3 < stats.acceptance_rate < 0.9
    assert 1.3 < stats.tokens_per_step < 1 + depth
    # No draft is worse than the modules make it.
    assert (stats.main_steps, stats.accepted) == expected_stats(depth)


PROMPT, TOP_K, TEMPERATURE = [7, 3, 25, 11, 30], 4, 0.7


def drawn(n_rows: int, *, speculative: bool) -> tuple[np.ndarray, float]:
    """Three tokens `[n, 3]` after the prompt, each row with its own draws, and drafts kept."""
    engine = shared(2).engine(speculative=speculative)
    parts = (engine._static, engine._weights)
    state, _ = steps.prefill(*parts, engine._start([PROMPT] * ROWS, ROOM), jnp.int32(0))
    one = jax.tree.map(lambda x: x[:1, :BLOCK] if x.ndim > 1 else x[:1], state)
    options = sampling.options(TEMPERATURE, TOP_K)
    found, kept = [], []
    for seed in range(3):
        state = jax.tree.map(lambda x: jnp.repeat(x, n_rows, axis=0), one)
        draws = engine._draws(options, seed, state, 99)
        state, _ = steps.first(*parts, state, draws)
        state, news = steps.decode(*parts, state, draws, jnp.int32(2))
        kept.append(np.asarray(news.counts_B)[:2] - 1)
        found.append(np.asarray(state.tokens_BS[:, len(PROMPT) : len(PROMPT) + 3]))
    return np.concatenate(found), float(np.mean(kept))


def exact() -> dict[tuple[int, ...], float]:
    """The probability of each three tokens that can follow the prompt."""
    shares: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        texts = list(shares)
        padded = [[*PROMPT, *text] for text in texts + texts[:1] * (-len(texts) % ROWS)]
        found: dict[tuple[int, ...], float] = {}
        for i in range(0, len(texts), ROWS):
            logits = shared(2).logits(padded[i : i + ROWS])
            for text, row in zip(texts[i : i + ROWS], logits, strict=False):
                best = np.argsort(-row[-1])[:TOP_K]
                p = np.exp((row[-1, best] - row[-1, best[0]]).astype(np.float64) / TEMPERATURE)
                for token, share in zip(best.tolist(), p / p.sum(), strict=True):
                    found[*text, token] = shares[text] * share
        shares = found
    return shares


@pytest.mark.parametrize("speculative", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sampled_tokens_follow_the_main_models_distribution(speculative: bool) -> None:
    wanted = exact()
    shares = np.array(list(wanted.values()))
    assert len(shares) == TOP_K**3
    tokens, kept = drawn(2048, speculative=speculative)
    if speculative:
        assert 0.3 < kept < 1.8, "drafts must be kept now and then, and refused"
    index = {text: i for i, text in enumerate(wanted)}
    counts = np.bincount([index[tuple(row)] for row in tokens.tolist()], minlength=len(shares))
    assert chi_square_is_small(counts, shares)
    flatter = shares**0.8 / (shares**0.8).sum()
    assert not chi_square_is_small(counts, flatter), "too few draws to tell"
