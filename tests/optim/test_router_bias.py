"""The router-bias rule against exact integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import router_bias as reference
from v3jax.optim.router_bias import bias_rule, find_rule, max_violation, proportional, sign

SPEED = 0.001


def updated(bias: np.ndarray, load: np.ndarray, speed: float = SPEED) -> np.ndarray:
    return np.asarray(
        jax.jit(sign)(jnp.asarray(bias), jnp.asarray(load, jnp.int32), jnp.float32(speed))
    )


@pytest.mark.parametrize("high", [3, 1000, 3_900_000])
def test_bias_moves_towards_the_mean_load(high: int) -> None:
    rng = np.random.default_rng(high)
    bias = rng.normal(size=(5, 256)).astype(np.float32)
    load = rng.integers(0, high, size=(5, 256))
    np.testing.assert_allclose(
        updated(bias, load), reference.update_bias(bias, load, SPEED), rtol=1e-6, atol=1e-7
    )


def test_exactly_balanced_expert_stays() -> None:
    load = np.array([[5, 5, 5, 5], [4, 5, 6, 5]])
    got = updated(np.zeros((2, 4), np.float32), load)
    np.testing.assert_allclose(got, [[0, 0, 0, 0], [SPEED, 0, -SPEED, 0]])


def test_loads_that_fp32_cannot_tell_apart_still_move() -> None:
    load = np.array([[20_000_001, 20_000_000, 20_000_000, 20_000_000]])  # the mean ends in .25
    got = updated(np.zeros((1, 4), np.float32), load)
    np.testing.assert_allclose(got, [[-SPEED, SPEED, SPEED, SPEED]])


def test_layers_are_balanced_one_by_one() -> None:
    got = updated(np.zeros((2, 2), np.float32), np.array([[10, 0], [1000, 3000]]))
    np.testing.assert_allclose(got, [[-SPEED, SPEED], [SPEED, -SPEED]])


def test_speed_zero_freezes_the_bias() -> None:
    bias = np.array([[0.5, -0.25]], np.float32)
    np.testing.assert_array_equal(updated(bias, np.array([[9, 1]]), 0.0), bias)


def test_bias_stays_fp32_and_keeps_small_steps() -> None:
    got = updated(np.full((1, 2), 5.0, np.float32), np.array([[0, 2]]))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [[5.001, 4.999]], rtol=1e-7)


def test_loads_must_be_integers() -> None:
    with pytest.raises(AssertionError):
        sign(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.float32(SPEED))


def test_max_violation_averages_layers() -> None:
    load = np.random.default_rng(0).integers(1, 4_000_000, size=(58, 256))
    got = float(max_violation(jnp.asarray(load, jnp.int32)))
    np.testing.assert_allclose(got, reference.max_violation(load), rtol=1e-6)


def test_max_violation_of_known_loads() -> None:
    assert float(max_violation(jnp.array([[2, 2, 2, 2], [8, 0, 0, 0]]))) == 1.5


def test_max_violation_without_tokens_or_layers_is_zero() -> None:
    assert float(max_violation(jnp.zeros((2, 4), jnp.int32))) == 0
    assert float(max_violation(jnp.zeros((0, 4), jnp.int32))) == 0


def test_the_proportional_rule_moves_by_the_violation() -> None:
    load = jnp.array([[10, 0, 20, 10], [0, 0, 0, 0]], jnp.int32)
    got = proportional(jnp.full((2, 4), 0.5), load, jnp.float32(0.1))
    np.testing.assert_allclose(got, [[0.5, 0.6, 0.4, 0.5], [0.5] * 4], rtol=1e-6)


def test_rules_are_found_by_the_name_of_their_function() -> None:
    @bias_rule
    def shrinks(bias_LE: jax.Array, load_LE: jax.Array, speed: jax.Array) -> jax.Array:
        del load_LE
        return bias_LE * (1 - speed)

    assert find_rule("shrinks") is shrinks
    assert find_rule("sign") is sign
    with pytest.raises(ValueError, match=r"balance.bias_rule: no rule 'shrink'; did you mean"):
        find_rule("shrink")
    with pytest.raises(ValueError, match="there are proportional, "):
        find_rule("xyz")
