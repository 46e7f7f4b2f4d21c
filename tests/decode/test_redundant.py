"""Redundant experts: the same text, every token at a copy of its expert, devices loaded evenly."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.decode.small import MODEL, ROOM, Setup, prompts, setup
from tests.decode.test_forward import MANY, mixture
from tests.model import small
from v3jax.config import MeshConfig
from v3jax.decode import Engine, Generation
from v3jax.decode.forward import moe, prepare
from v3jax.decode.redundant import Copies, replicas_of, with_copies
from v3jax.eplb import Placement, device_loads, imbalance, rebalance
from v3jax.ops import routing
from v3jax.sharding import ShardingRules, make_mesh
from v3jax.weights import FP32

ROWS = prompts(4, 30)
SPLIT = small.config(n_layers=2, n_experts=16)
"""A model whose experts divide over eight devices."""


def skewed(model: Any, n_replicas: int, n_nodes: int = 1, n_devices: int = 1) -> Placement:
    """A placement for loads of which a few experts have most."""
    n_layers = model.n_moe_layers + model.mtp_depth
    load_LE = np.random.default_rng(0).pareto(1.0, (n_layers, model.n_experts))
    return rebalance(load_LE, n_replicas, model.n_groups, n_nodes, n_devices)


def copies_of(placed: Placement, layer: int) -> Copies:
    return Copies(jnp.asarray(placed.log2phy[layer]), jnp.asarray(placed.copies[layer]))


def test_a_token_goes_to_a_copy_of_its_expert_and_copies_share_evenly() -> None:
    placed = skewed(MODEL, 20)
    assert placed.copies.max() > 3
    experts_NK = np.random.default_rng(1).integers(0, MODEL.n_experts, (60, 3))
    for layer, phy2log_R in enumerate(placed.phy2log):
        copies = copies_of(placed, layer)
        replicas_NK = np.asarray(replicas_of(copies, jnp.asarray(experts_NK)))
        np.testing.assert_array_equal(phy2log_R[replicas_NK], experts_NK)
        for expert in range(MODEL.n_experts):
            replicas_N1 = replicas_of(copies, jnp.full((60, 1), expert))
            count_R = np.bincount(np.ravel(replicas_N1), minlength=20)[phy2log_R == expert]
            assert len(count_R) == placed.copies[layer, expert]
            assert count_R.max() - count_R.min() <= 1


@pytest.mark.parametrize("model", [MODEL, MANY], ids=["12 experts", "64 experts"])
def test_a_mixture_gives_the_same_from_copies(model: Any) -> None:
    params, state = mixture(model)
    placed = skewed(model, model.n_experts + 9)
    copied = with_copies({"mlp": params}, placed, 0)["mlp"]
    assert copied["experts"]["down_proj"].shape[0] == model.n_experts + 9
    h_BTD = jax.random.normal(jax.random.key(0), (3, 11, model.dim))
    for split, batch, length in ((False, 1, 1), (False, 3, 4), (False, 3, 11), (True, 1, 2)):
        run = jax.jit(functools.partial(moe, model, FP32, split=split))
        got = run(copied, state, h_BTD[:batch, :length])
        wanted = run(params, state, h_BTD[:batch, :length])
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_weights_are_the_copies_of_each_layer() -> None:
    whole, placed = setup(), skewed(MODEL, 15)
    weights = prepare(MODEL, FP32, whole.params, whole.router_state, placed)
    layers = [weights.blocks[1][0], *(module["block"] for module, _ in weights.mtp)]
    logical = [jax.tree.map(lambda x: x[0], whole.params["moe_layers"])]
    logical += [whole.params[f"mtp_layers_{depth}"]["block"] for depth in range(MODEL.mtp_depth)]
    assert len(layers) == len(logical) == len(placed.phy2log) == 3
    for one, other, phy2log_R in zip(layers, logical, placed.phy2log, strict=True):
        for name, weight in one["mlp"]["experts"].items():
            np.testing.assert_array_equal(weight, other["mlp"]["experts"][name][phy2log_R])
        np.testing.assert_array_equal(one["mlp"]["gate"], other["mlp"]["gate"])


@functools.cache
def plain(model: Any = MODEL, speculative: bool = False) -> Engine:
    return setup(model).engine(speculative=speculative)


def assert_same(out: list[Generation], wanted: list[Generation]) -> None:
    assert len({token for one in wanted for token in one.ids}) > 8
    for one, other in zip(out, wanted, strict=True):
        assert one.ids == other.ids
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize("speculative", [False, True])
def test_text_is_that_of_the_engine_without_copies(speculative: bool) -> None:
    engine = setup().engine(speculative=speculative, placement=skewed(MODEL, 18))
    for temperature in (0.0, 0.9):
        found = [
            one.generate(ROWS, max_tokens=12, room=ROOM, temperature=temperature, seed=3)[0]
            for one in (engine, plain(speculative=speculative))
        ]
        assert_same(*found)


@pytest.mark.parametrize(
    "other", [{"n_experts": 16}, {"mtp_depth": 1}, {"n_layers": 3}], ids=lambda x: next(iter(x))
)
def test_a_placement_of_another_model_is_refused(other: dict[str, int]) -> None:
    placed = skewed(small.config(**{"n_layers": 2} | other), 20)
    with pytest.raises(ValueError, match=r"placement: is of \d x \d+ .* the model has 3 x 12"):
        setup().engine(placement=placed)


@functools.cache
def split() -> tuple[Setup, NamedSharding]:
    """A model with two experts on each of eight devices in two nodes, and where rows live."""
    mesh, rules = make_mesh(MeshConfig(node=2, expert=4)), ShardingRules()
    whole = setup(SPLIT)

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        names = jax.tree_util.keystr(path)
        lead = (None,) if "moe_layers" in names else ()
        spec = rules.spec(*lead, "experts") if "experts" in names.split("'") else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    params, state = jax.tree_util.tree_map_with_path(place, (whole.params, whole.router_state))
    return Setup(SPLIT, params, state), NamedSharding(mesh, rules.spec("batch"))


def device_of_rows(weight: jax.Array) -> np.ndarray:
    """The device that holds each index of the leading axis."""
    device = np.full(weight.shape[0], -1)
    for shard in weight.addressable_shards:
        device[shard.index[0]] = shard.device.id
    return device


def test_text_is_the_same_with_copies_split_over_devices() -> None:
    whole, place = split()
    placed = skewed(SPLIT, 24, n_nodes=2, n_devices=8)
    engine = whole.engine(speculative=True, place=place, placement=placed)
    weights = engine._weights
    assert weights.split_experts
    for params in (weights.blocks[-1][0], *(module["block"] for module, _ in weights.mtp)):
        for leaf in params["mlp"]["experts"].values():
            assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {3}
            assert len(set(device_of_rows(leaf))) == 8
    out, _ = engine.generate(ROWS, max_tokens=12, room=ROOM)
    wanted, _ = plain(SPLIT, True).generate(ROWS, max_tokens=12, room=ROOM)
    assert_same(out, wanted)


def test_replicas_that_devices_do_not_divide_are_refused() -> None:
    whole, place = split()
    with pytest.raises(ValueError, match="20 replicas do not divide over the 8 devices"):
        whole.engine(place=place, placement=skewed(SPLIT, 20))


def test_the_busiest_device_gets_fewer_rows() -> None:
    """Loads of one half of a batch place the experts, the other half is sent to them."""
    whole, _ = split()
    params = whole.params["mtp_layers_0"]["block"]
    bias_E = jnp.zeros(16).at[jnp.array([0, 5, 6])].set(0.3)  # some experts are favoured
    x_ND = jax.random.normal(jax.random.key(0), (4096, SPLIT.dim))
    experts_NK, _ = routing.route(
        x_ND @ params["mlp"]["gate"],
        bias_E,
        top_k=SPLIT.top_k,
        n_groups=SPLIT.n_groups,
        top_groups=SPLIT.top_groups,
        route_scale=1.0,
    )
    measured_NK, sent_NK = jnp.split(experts_NK, 2)
    load_1E = np.bincount(np.ravel(measured_NK), minlength=16)[None]
    placed = rebalance(load_1E, 24, SPLIT.n_groups, 2, 8)
    copied = with_copies(params, placed, 0)["mlp"]

    def busiest(weight: jax.Array, rows: jax.Array) -> float:
        count_P = np.bincount(device_of_rows(weight)[np.ravel(rows)], minlength=8)
        return float(count_P.max() / count_P.mean())

    before = busiest(params["mlp"]["experts"]["down_proj"], sent_NK)
    after = busiest(copied["experts"]["down_proj"], replicas_of(copied["copies"], sent_NK))
    assert after < 0.7 * before
    assert after == pytest.approx(imbalance(device_loads(load_1E, placed, 8))[0], rel=0.05)
