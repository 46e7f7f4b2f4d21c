"""Schedules against float64, over every single step of the full run."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import schedules as reference
from v3jax import registry
from v3jax.config import BatchConfig
from v3jax.optim.schedules import (
    batch_plan,
    batch_size,
    learning_rate,
    n_steps,
    piecewise,
    tokens_of,
)

FULL = registry.get("v3_full")


@cache
def sequences_before() -> np.ndarray:
    """Sequences consumed before each step of the full run, and after the last."""
    return np.concatenate([[0], np.cumsum(list(batch_plan(FULL)))])


def tokens_on_device(sequences: np.ndarray) -> jax.Array:
    return tokens_of(jnp.asarray(sequences, jnp.uint32), FULL.data.seq_len)


def rate_at(tokens: float) -> float:
    return float(learning_rate(FULL.optim)(jnp.int32(100_000), jnp.float32(tokens)))


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (9.9e12, 2.2e-4),
        (11e12, 1.947324e-4),
        (12e12, 1.318277e-4),
        (12.15e12, 1.21e-4),
        (13e12, 6.339597e-5),
        (14e12, 2.436849e-5),
        (14.5e12, 2.2e-5),
        (14.7e12, 7.3e-6),
    ],
)
def test_learning_rate_has_the_published_values(tokens: float, rate: float) -> None:
    np.testing.assert_allclose(rate_at(tokens), rate, rtol=4e-7)


def test_learning_rate_of_every_step_of_the_full_run() -> None:
    sequences = sequences_before()
    steps = np.arange(len(sequences))
    got = jax.jit(learning_rate(FULL.optim))(
        jnp.asarray(steps, jnp.int32), tokens_on_device(sequences)
    )
    expected = reference.learning_rate(steps, sequences * float(FULL.data.seq_len))
    np.testing.assert_allclose(np.asarray(got), expected, rtol=2e-6, atol=2e-7 * 2.2e-4)


@pytest.mark.parametrize("boundary", [10e12, 14.3e12, 14.633e12])
def test_phases_change_between_the_right_two_steps(boundary: float) -> None:
    sequences = sequences_before()
    first = int(np.searchsorted(sequences * float(FULL.data.seq_len), boundary))
    around = np.arange(first - 2, first + 2)
    got = learning_rate(FULL.optim)(jnp.asarray(around), tokens_on_device(sequences[around]))
    tokens = sequences[around] * float(FULL.data.seq_len)
    assert tokens[1] < boundary <= tokens[2]
    np.testing.assert_allclose(np.asarray(got), reference.learning_rate(around, tokens), rtol=1e-6)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.0), (1, 1.1e-7), (1000, 1.1e-4), (1999, 2.1989e-4), (2000, 2.2e-4)]
)
def test_warm_up_counts_steps_from_zero(step: int, rate: float) -> None:
    got = learning_rate(FULL.optim)(jnp.int32(step), jnp.float32(step * 12_582_912.0))
    np.testing.assert_allclose(float(got), rate, rtol=1e-6, atol=1e-7 * 2.2e-4)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    optim = dataclasses.replace(FULL.optim, warmup_steps=0)
    assert float(learning_rate(optim)(jnp.int32(0), jnp.float32(0))) == pytest.approx(2.2e-4)


@pytest.mark.parametrize("schedule", [FULL.balance.bias_speed, FULL.mtp_weight])
def test_piecewise_values_of_every_step_of_the_full_run(
    schedule: tuple[tuple[float, float], ...],
) -> None:
    sequences = sequences_before()
    got = jax.jit(piecewise(schedule))(tokens_on_device(sequences))
    expected = reference.piecewise(schedule, sequences * float(FULL.data.seq_len))
    np.testing.assert_array_equal(np.asarray(got), expected.astype(np.float32))


def test_piecewise_keeps_its_last_value() -> None:
    schedule = piecewise(((10.0, 3.0), (20.0, 2.0), (30.0, 1.0)))
    got = [float(schedule(jnp.float32(t))) for t in (0, 9, 10, 19, 20, 30, 1000)]
    assert got == [3, 3, 2, 2, 1, 1, 1]


def test_piecewise_of_one_value_is_fp32() -> None:
    assert piecewise(((10.0, 1.0),))(jnp.float32(3)).dtype == jnp.float32


def test_batch_ramp_is_linear_in_tokens_to_the_sequence() -> None:
    expected = reference.ramp(3072, 15_360, 469 * 10**9, 128, 4096)
    sizes = np.diff(sequences_before())
    np.testing.assert_array_equal(sizes[: len(expected)], expected)
    assert set(sizes[len(expected) :]) == {15_360}


def test_full_run_has_the_derived_number_of_steps() -> None:
    sizes = np.diff(sequences_before())
    ramp_steps = np.searchsorted(sequences_before() * 4096.0, 469e9)
    np.testing.assert_allclose(ramp_steps, 14_997, rtol=1e-3)  # 469e9 / (4096 * 12288) * ln 5
    np.testing.assert_allclose(len(sizes) - ramp_steps, 227_785, rtol=1e-5)
    assert sizes.sum() * 4096 >= FULL.run.total_tokens > sizes[:-1].sum() * 4096


@pytest.mark.parametrize("name", registry.names())
def test_step_count_equals_the_walked_plan(name: str) -> None:
    cfg = registry.get(name)
    plan = list(batch_plan(cfg))
    assert n_steps(cfg) == len(plan)
    assert all(size % cfg.batch.micro_batch == 0 for size in plan)
    assert plan == sorted(plan)


def test_short_run_ends_inside_the_ramp() -> None:
    cfg = dataclasses.replace(FULL, run=dataclasses.replace(FULL.run, total_tokens=1e9))
    assert n_steps(cfg) == len(list(batch_plan(cfg))) == 80


def test_batch_without_a_ramp_is_full_at_once() -> None:
    cfg = BatchConfig(micro_batch=8, start=8, end=64, ramp_tokens=0.0)
    assert batch_size(cfg, 0.0) == 64


def test_largest_token_count_survives_uint32() -> None:
    sequences = int(sequences_before()[-1])
    got = float(tokens_of(jnp.uint32(sequences), 4096))
    assert got == pytest.approx(sequences * 4096, rel=6e-8)
    assert sequences > 2**31
