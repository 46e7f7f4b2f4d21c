"""Routing, load counting and the sequence-wise loss. Dims as in `v3jax.ops.routing`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import balance
from tests.reference import routing as reference
from v3jax.ops import routing as ops

V3 = {"top_k": 8, "n_groups": 8, "top_groups": 4, "route_scale": 2.5}
SMALL = {"top_k": 3, "n_groups": 4, "top_groups": 2, "route_scale": 1.7}


def draw(t: int, e: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits and a bias that makes many biased scores negative."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1.5, (t, e)), rng.normal(-0.5, 0.6, e)


def both(logits: np.ndarray, bias: np.ndarray, shape: dict) -> tuple[np.ndarray, ...]:
    chosen, gates = ops.route(
        jnp.asarray(logits, jnp.float32), jnp.asarray(bias, jnp.float32), **shape
    )
    wanted, wanted_gates = reference.route(
        logits, bias, shape["n_groups"], shape["top_groups"], shape["top_k"], shape["route_scale"]
    )
    return np.asarray(chosen), np.asarray(gates), wanted, wanted_gates


@pytest.mark.parametrize(("n_experts", "shape"), [(256, V3), (12, SMALL)])
def test_choice_and_gates_equal_the_reference(n_experts: int, shape: dict) -> None:
    logits, bias = draw(64, n_experts)
    assert (reference.sigmoid(logits) + bias < 0).mean() > 0.2
    chosen, gates, wanted, wanted_gates = both(logits, bias, shape)
    np.testing.assert_array_equal(chosen, wanted)
    np.testing.assert_allclose(gates, wanted_gates, rtol=2e-6)


def test_choice_equals_the_reference_when_every_biased_score_is_negative() -> None:
    logits, bias = draw(50, 12)
    chosen, gates, wanted, wanted_gates = both(logits, bias - 5, SMALL)
    np.testing.assert_array_equal(chosen, wanted)
    np.testing.assert_allclose(gates, wanted_gates, rtol=2e-6)


def test_one_expert_a_group_and_no_group_limit_equal_the_reference() -> None:
    logits, bias = draw(40, 12)
    for n_groups, top_groups in ((12, 5), (1, 1), (4, 4)):
        shape = SMALL | {"n_groups": n_groups, "top_groups": top_groups}
        chosen, _, wanted, _ = both(logits, bias, shape)
        np.testing.assert_array_equal(chosen, wanted)


def test_groups_are_ranked_by_their_two_best_experts() -> None:
    logits = np.full((1, 12), -4.0)
    logits[0, 0] = 5.0  # the single best expert, alone in its group
    logits[0, [3, 4, 6, 7, 9, 10]] = 1.0
    logits[0, 9] = 1.1
    logits[0, 7] = 1.05
    chosen, _, _, _ = both(logits, np.zeros(12), SMALL)
    assert set(chosen[0] // 3) == {2, 3}


def test_groups_are_ranked_by_biased_scores() -> None:
    logits = np.zeros((1, 12))
    bias = np.repeat([0.0, 0.2, -0.1, 0.1], 3)
    chosen, _, _, _ = both(logits, bias, SMALL)
    assert set(chosen[0] // 3) <= {1, 3}


def test_experts_lie_within_the_kept_groups_and_are_distinct() -> None:
    logits, bias = draw(200, 256)
    chosen, _, _, _ = both(logits, bias, V3)
    assert max(len(set(row // 32)) for row in chosen) <= 4
    assert all(len(set(row)) == 8 for row in chosen)


def test_bias_changes_choice_not_weights() -> None:
    logits, bias = draw(30, 12)
    chosen, gates, _, _ = both(logits, bias, SMALL)
    free, _, _, _ = both(logits, np.zeros(12), SMALL)
    assert (np.sort(chosen) != np.sort(free)).any()
    s = reference.sigmoid(logits)
    unbiased = np.take_along_axis(s, chosen, -1)
    np.testing.assert_allclose(gates, 1.7 * unbiased / unbiased.sum(-1, keepdims=True), rtol=2e-6)
    shifted, shifted_gates, _, _ = both(logits, bias + 3.0, SMALL)
    np.testing.assert_array_equal(np.sort(shifted), np.sort(chosen))
    np.testing.assert_allclose(np.sort(shifted_gates), np.sort(gates), rtol=2e-6)


def test_gates_sum_to_the_route_scale() -> None:
    logits, bias = draw(100, 256)
    _, gates, _, _ = both(logits - 8, bias, V3)
    np.testing.assert_allclose(gates.sum(-1), 2.5, rtol=1e-5)


def test_no_gradient_reaches_the_bias_and_gates_pass_one_to_the_chosen_logits() -> None:
    logits, bias = draw(6, 12)
    probe = np.random.default_rng(3).normal(size=(6, 3))

    def f(logits: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.sum(jnp.asarray(probe, jnp.float32) * ops.route(logits, bias, **SMALL)[1])

    x, b = jnp.asarray(logits, jnp.float32), jnp.asarray(bias, jnp.float32)
    d_logits, d_bias = jax.grad(f, argnums=(0, 1))(x, b)
    assert not np.asarray(d_bias).any()

    def slow(logits: np.ndarray) -> float:
        return float(np.sum(probe * reference.route(logits, bias, 4, 2, 3, 1.7)[1]))

    for t in range(6):
        for e in range(12):
            step = np.zeros_like(logits)
            step[t, e] = 1e-6
            wanted = (slow(logits + step) - slow(logits - step)) / 2e-6
            assert float(d_logits[t, e]) == pytest.approx(wanted, abs=1e-5)


def test_loads_are_integers_that_sum_to_tokens_times_top_k() -> None:
    logits, bias = draw(77, 256)
    chosen, _, _, _ = both(logits, bias, V3)
    load = ops.expert_load(jnp.asarray(chosen), 256)
    assert load.dtype == jnp.int32
    assert int(load.sum()) == 77 * 8
    np.testing.assert_array_equal(load, reference.load(chosen, 256))


def test_padding_tokens_do_not_count_in_the_load() -> None:
    logits, bias = draw(20, 12)
    chosen, _, _, _ = both(logits, bias, SMALL)
    counted = np.random.default_rng(0).random(20) < 0.6
    load = ops.expert_load(jnp.asarray(chosen), 12, jnp.asarray(counted))
    np.testing.assert_array_equal(load, reference.load(chosen, 12, counted))


@pytest.mark.parametrize("padded", [False, True])
def test_sequence_loss_equals_the_reference_for_each_sequence(padded: bool) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (3, 17, 12))
    counted = rng.random((3, 17)) < 0.7 if padded else np.ones((3, 17), bool)
    got = ops.sequence_balance_loss(
        jnp.asarray(logits, jnp.float32),
        top_k=3,
        counted_BS=jnp.asarray(counted) if padded else None,
    )
    wanted = [
        balance.sequence_loss(reference.sigmoid(row), 3, mask)
        for row, mask in zip(logits, counted, strict=True)
    ]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_batch_loss_is_that_of_all_sequences_as_one(padded: bool) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (4, 17, 12))
    counted = rng.random((4, 17)) < 0.7 if padded else np.ones((4, 17), bool)
    args = jnp.asarray(logits, jnp.float32), jnp.asarray(counted)
    whole = ops.batch_balance_loss(args[0], top_k=3, counted_BS=args[1] if padded else None)
    scores = reference.sigmoid(logits.reshape(-1, 12))
    wanted = 4 * balance.sequence_loss(scores, 3, counted.reshape(-1))
    np.testing.assert_allclose(whole, wanted, rtol=1e-5)

    def share(logits: jax.Array, counted: jax.Array) -> jax.Array:
        return ops.batch_balance_loss(logits, top_k=3, counted_BS=counted, axes=("data",))

    devices = [x.reshape(2, 2, *x.shape[1:]) for x in args]
    shares = jax.vmap(share, axis_name="data")(*devices)
    np.testing.assert_allclose(shares.sum(), wanted, rtol=1e-5)


def test_a_batch_may_be_balanced_where_its_sequences_are_not() -> None:
    logits = np.full((2, 8, 4), -4.0)
    logits[0, :, :2] = logits[1, :, 2:] = 4.0
    x = jnp.asarray(logits, jnp.float32)
    np.testing.assert_allclose(ops.batch_balance_loss(x, top_k=2), 2.0, rtol=1e-6)
    assert (np.asarray(ops.sequence_balance_loss(x, top_k=2)) > 1.9).all()
    gradient = jax.grad(lambda x: ops.batch_balance_loss(x, top_k=2))(x)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_a_multiplied_bias_ranks_affinities_times_one_plus_it() -> None:
    logits, bias = draw(64, 12)
    chosen, gates = ops.route(
        jnp.asarray(logits, jnp.float32), jnp.asarray(bias, jnp.float32), **SMALL, multiplied=True
    )
    for t in range(64):
        affinity = reference.sigmoid(logits[t])
        as_sum = affinity * bias  # s + s b = s (1 + b)
        wanted, wanted_gates = reference.route_token(logits[t], as_sum, 4, 2, 3, 1.7)
        np.testing.assert_array_equal(chosen[t], wanted)
        np.testing.assert_allclose(gates[t], wanted_gates, rtol=2e-6)


def test_sequence_loss_is_one_at_perfect_balance() -> None:
    logits = np.full((12, 12), -1.0)
    for t in range(12):
        logits[t, [(t + i) % 12 for i in range(3)]] = 1.0
    got = ops.sequence_balance_loss(jnp.asarray(logits[None], jnp.float32), top_k=3)
    np.testing.assert_allclose(got, 1.0, rtol=1e-6)


def test_equal_affinities_still_count_top_k_experts_a_token() -> None:
    got = ops.sequence_balance_loss(jnp.zeros((1, 5, 12)), top_k=3)
    np.testing.assert_allclose(got, 1.0, rtol=1e-6)
    saturated = ops.sequence_balance_loss(jnp.full((1, 5, 12), 60.0), top_k=3)
    np.testing.assert_allclose(saturated, 1.0, rtol=1e-6)


def test_sequence_loss_of_a_sequence_of_padding_is_zero_with_zero_gradient() -> None:
    def f(logits: jax.Array) -> jax.Array:
        counted = jnp.zeros((1, 5), bool)
        return ops.sequence_balance_loss(logits, top_k=3, counted_BS=counted).sum()

    value, gradient = jax.value_and_grad(f)(jnp.ones((1, 5, 12)))
    assert float(value) == 0.0
    assert not np.asarray(gradient).any()


def test_sequence_loss_gradient_flows_through_the_mean_affinity_only() -> None:
    logits = np.random.default_rng(0).normal(0, 1.5, (1, 6, 12))
    gradient = jax.grad(lambda x: ops.sequence_balance_loss(x, top_k=3).sum())(
        jnp.asarray(logits, jnp.float32)
    )

    def slow(logits: np.ndarray) -> float:
        return balance.sequence_loss(reference.sigmoid(logits[0]), 3)

    for t, e in np.ndindex(6, 12):
        step = np.zeros_like(logits)
        step[0, t, e] = 1e-6
        wanted = (slow(logits + step) - slow(logits - step)) / 2e-6
        assert float(gradient[0, t, e]) == pytest.approx(wanted, abs=1e-5)
