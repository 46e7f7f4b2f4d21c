"""Rotary positions and YaRN."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.v3 import v3_full
from tests.model import small
from tests.reference import rope as reference
from v3jax.config import YarnConfig
from v3jax.ops import rope

YARN = YarnConfig(factor=40, original_seq_len=4096, beta_fast=32, beta_slow=1, mscale=1.0)
FULL = v3_full().model
LONG = replace(FULL, yarn=YARN)


def test_rotation_turns_interleaved_pairs_as_complex_numbers() -> None:
    x_BTHR = np.random.default_rng(0).normal(size=(2, 7, 3, 8))
    theta = reference.frequencies(8, 10_000.0)
    wanted = np.stack(
        [[reference.rotate_sequence(row[:, h], theta) for h in range(3)] for row in x_BTHR]
    ).swapaxes(1, 2)
    got = rope.rotate(jnp.asarray(x_BTHR, jnp.float32), jnp.arange(7), theta)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_rotation_accepts_a_shared_key_without_heads_and_positions_of_each_row() -> None:
    x_BTR = np.random.default_rng(0).normal(size=(2, 5, 4))
    theta = reference.frequencies(4, 10_000.0)
    positions = np.array([[0, 1, 2, 3, 4], [7, 3, 0, 9, 100]])
    wanted = [
        [reference.rotate(x, t, theta) for x, t in zip(row, ts, strict=True)]
        for row, ts in zip(x_BTR, positions, strict=True)
    ]
    got = rope.rotate(jnp.asarray(x_BTR, jnp.float32), jnp.asarray(positions), theta)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_scores_depend_on_distance_only() -> None:
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 16)).astype(np.float32)
    theta = reference.frequencies(16, 10_000.0)

    def score(i: int, j: int) -> float:
        a = rope.rotate(jnp.asarray(q[None]), jnp.asarray([i]), theta)
        b = rope.rotate(jnp.asarray(k[None]), jnp.asarray([j]), theta)
        return float(jnp.sum(a * b))

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)
    assert abs(score(3, 1) - score(4, 1)) > 1e-2


def test_plain_frequencies_follow_the_base() -> None:
    got = rope.frequencies(FULL)
    np.testing.assert_allclose(got, reference.model_frequencies(FULL), rtol=1e-12)
    assert got[0] == 1.0
    assert got[16] == pytest.approx(0.01)
    assert len(got) == 32


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        (10, 0.0562341325),
        (11, 0.0390069266),
        (15, 0.0083345090),
        (16, 0.0055),
        (20, 0.00079056942),
        (22, 0.00017782794),
        (23, 3.3338036e-05),
        (31, 3.3338036e-06),
    ],
)
def test_yarn_frequencies_equal_hand_computed_values(pair: int, value: float) -> None:
    assert rope.frequencies(LONG)[pair] == pytest.approx(value, rel=1e-7)
    assert reference.model_frequencies(LONG)[pair] == pytest.approx(value, rel=1e-7)


def test_yarn_frequencies_equal_the_reference_at_every_pair() -> None:
    np.testing.assert_allclose(
        rope.frequencies(LONG), reference.model_frequencies(LONG), rtol=1e-12
    )
    for length in (100, 16, 4):  # the last is so short that the ramp's ends change places
        yarn = replace(YARN, factor=7, original_seq_len=length)
        odd = small.config(rope_head_dim=12, yarn=yarn)
        wanted = reference.model_frequencies(odd)
        np.testing.assert_allclose(rope.frequencies(odd), wanted, rtol=1e-12)


def test_softmax_scale_counts_both_head_parts_and_squares_yarns_temperature() -> None:
    assert rope.softmax_scale(FULL) == pytest.approx(0.0721688, abs=5e-8)
    assert rope.softmax_scale(LONG) == pytest.approx(0.1352338, abs=5e-8)
    half = replace(FULL, yarn=replace(YARN, mscale=0.707))
    assert rope.softmax_scale(half) == pytest.approx(0.0721688 * 1.2608**2, rel=1e-4)
    assert rope.softmax_scale(half) == pytest.approx(reference.softmax_scale(half), rel=1e-12)
