"""Decoding over a mesh of eight devices: same tokens, every array where it belongs."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.decode.small import Letters
from tests.model import small
from v3jax import hf
from v3jax.config import MeshConfig
from v3jax.decode import Engine, steps
from v3jax.decode.cache import BLOCK
from v3jax.decode.forward import moe
from v3jax.sharding import ShardingRules, make_mesh
from v3jax.weights import FP32

CHECKPOINT = Path(__file__).parents[1] / "hf" / "oracle" / "mtp"
ROWS = ("data", "node", "expert")


@functools.cache
def engine() -> Engine:
    """An engine with experts over (node, expert) and rows over all three axes."""
    mesh = make_mesh(MeshConfig(data=2, node=2, expert=2))
    rules = ShardingRules()
    model, params, router_state = hf.load(CHECKPOINT, mesh=mesh, rules=rules)
    return Engine(
        model,
        params,
        router_state,
        Letters(model.vocab_size, -1),
        numerics=FP32,
        speculative=True,
        place=NamedSharding(mesh, rules.spec("batch")),
    )


def test_experts_run_where_they_are() -> None:
    """Few choices of many experts are looked up one by one, but for experts of other devices."""
    model = small.config(n_experts=64)
    params = jax.tree.map(lambda x: small.to_jax(x[0]), small.params(model)["moe_layers"]["mlp"])
    bias = jnp.zeros(model.n_experts)
    mesh = make_mesh(MeshConfig(data=2, node=2, expert=2))
    place = NamedSharding(mesh, ShardingRules().spec("experts"))
    params["experts"] = jax.device_put(params["experts"], place)
    h_BTD = jax.device_put(jnp.ones((2, 1, model.dim)), NamedSharding(mesh, P()))
    whole = f"[{model.n_experts},{model.dim},{2 * model.expert_ffn_dim}]"
    for split in (True, False):
        run = functools.partial(moe, model, FP32, split=split)
        lowered = jax.jit(run).lower(params, {"e_score_correction_bias": bias}, h_BTD)
        assert (whole in str(lowered.compile().as_text())) != split


def recorded() -> tuple[list[int], list[int]]:
    """A prompt, and what transformers generates after it."""
    with np.load(CHECKPOINT / "expected.npz") as found:
        return found["tokens"][0].tolist(), found["generated"].tolist()


def shard_shapes(array: jax.Array) -> set[tuple[int, ...]]:
    return {shard.data.shape for shard in array.addressable_shards}


def test_experts_are_split_and_nothing_else() -> None:
    weights = engine()._weights
    assert weights.split_experts
    model = engine()._static.model
    for params in (weights.blocks[-1][0], *(module[0]["block"] for module in weights.mtp)):
        for name, leaf in params["mlp"]["experts"].items():
            assert leaf.sharding.spec[0] == ("node", "expert"), name
            assert shard_shapes(leaf) == {(model.n_experts // 4, *leaf.shape[1:])}
        for leaf in jax.tree.leaves(params["self_attn"]):
            assert leaf.sharding.is_fully_replicated
    assert len(weights.head_DV.sharding.device_set) == 8


def test_tokens_are_those_of_transformers() -> None:
    prompt, generated = recorded()
    lengths = [0, 5, 11]  # of what is known beyond the prompt
    rows = [prompt + generated[:n] for n in lengths]
    out, stats = engine().generate(rows, max_tokens=12)
    assert [row.ids for row in out] == [generated[n : n + 12] for n in lengths]
    assert stats.accepted > 0


def test_draws_depend_on_the_seed_alone() -> None:
    rows = [recorded()[0], recorded()[0][:3]]
    found = []
    for seed in (1, 1, 2):
        out, _ = engine().generate(rows, max_tokens=12, temperature=1.0, seed=seed)
        found.append([row.ids for row in out])
    assert found[0] == found[1] != found[2]


def test_the_state_stays_split_by_rows() -> None:
    one = engine()
    state = one._start([recorded()[0]] * 2, 40)
    assert state.live_B.tolist() == [True, True] + [False] * 6, "rows fill up the shards"
    draws = one._draws(steps.sampling.options(), 0, state, 40)
    state, _ = one._read(state, draws, 16)
    state, _ = steps.decode(one._static, one._weights, state, draws, jnp.int32(4))
    width = one._static.model.kv_latent_dim + one._static.model.rope_head_dim
    for rows in state.cache.layers:
        assert shard_shapes(rows) == {(1, BLOCK, width)}
    for array in (state.tokens_BS, state.lengths_B, state.live_B, state.window_BWD):
        assert shard_shapes(array) == {(1, *array.shape[1:])}
        assert array.sharding.spec[0] == ROWS


def test_a_state_from_elsewhere_is_put_in_its_place() -> None:
    one = engine()
    state = jax.device_get(one._start([recorded()[0]] * 2, 40))
    state, _ = steps.prefill(one._static, one._weights, state, jnp.int32(0))
    assert shard_shapes(state.cache.layers[0]) == {(1, *state.cache.layers[0].shape[1:])}
    assert shard_shapes(state.tokens_BS) == {(1, *state.tokens_BS.shape[1:])}


def test_no_device_gathers_the_cache() -> None:
    one = engine()
    state = one._start([recorded()[0]] * 2, 40)
    draws = one._draws(steps.sampling.options(), 0, state, 40)
    lowered = steps.decode.lower(one._static, one._weights, state, draws, jnp.int32(1))
    text = str(lowered.compile().as_text())
    assert f"[1,{BLOCK}," in text
    assert f"[8,{BLOCK}," not in text
