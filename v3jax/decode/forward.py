"""The network over the latent cache: new tokens in, their hidden states out.

The same modules as in training but for attention and, with few tokens, the experts; parameters are
taken apart into layers so that no step copies a layer out of a stack. Dims: B rows, T new tokens,
N = B T, D model, E experts, K experts of a token, F expert width, R replicas of experts.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct

from v3jax.config import ModelConfig, NumericsConfig
from v3jax.decode.cache import Cache, absorbable, cached_mla
from v3jax.decode.redundant import check_fits, replicas_of, with_copies
from v3jax.eplb import Placement
from v3jax.model.layers import FeedForward, compute_dtype
from v3jax.model.moe import MoE
from v3jax.ops import routing
from v3jax.ops.expert_parallel import experts_here
from v3jax.ops.norm import rms_norm, swiglu
from v3jax.sharding import ShardingRules


@struct.dataclass
class Weights:
    """A model's variables, one tree a layer, in the types decoding computes with."""

    embed_VD: jax.Array
    head_DV: jax.Array
    norm_D: jax.Array
    blocks: tuple[Any, ...]
    """`(params, router_state or None)` of each layer."""
    mtp: tuple[Any, ...]
    """`(params, router_state)` of each MTP module."""
    split_experts: bool = struct.field(pytree_node=False, default=False)
    """Whether experts lie on several devices."""


_KEPT_FP32 = ("gate", "e_score_correction_bias")


def prepare(
    model: ModelConfig,
    numerics: NumericsConfig,
    params: Any,
    router_state: Any,
    placement: Placement | None = None,
) -> Weights:
    """Unstacks the layers and casts matrices to the compute type; router and norms stay FP32.

    Arrays stay on the devices and split over the axes they come with. With a `placement` experts
    are replicas `[R, ...]` of the model's.

    Raises:
      ValueError: a placement for another model, or of replicas that the devices do not divide.
    """
    blocks = []
    for name, count in (("dense_layers", model.n_dense_layers), ("moe_layers", model.n_moe_layers)):
        stack = (params.get(name), router_state.get(name))
        blocks += [_layer(model, numerics, stack, i) for i in range(count)]
    mtp = [
        _mtp_module(model, numerics, (params[name], router_state[name]["block"]))
        for name in (f"mtp_layers_{depth}" for depth in range(model.mtp_depth))
    ]
    if placement is not None:
        check_fits(model, placement)
        for layer in range(model.n_moe_layers):
            block, state = blocks[model.n_dense_layers + layer]
            blocks[model.n_dense_layers + layer] = with_copies(block, placement, layer), state
        for depth, (module, state) in enumerate(mtp):
            block = with_copies(module["block"], placement, model.n_moe_layers + depth)
            mtp[depth] = module | {"block": block}, state
    mixtures = [block for block, state in blocks if state is not None]
    dtype = compute_dtype(numerics)
    return Weights(
        embed_VD=params["embed_tokens"].astype(dtype),
        head_DV=params["lm_head"].astype(dtype),
        norm_D=params["norm"],
        blocks=tuple(blocks),
        mtp=tuple(mtp),
        split_experts=any(_is_split(block["mlp"]["experts"]) for block in mixtures),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(model: ModelConfig, numerics: NumericsConfig, stack: Any, index: jax.Array | int) -> Any:
    """One layer of a stack of `(params, router_state)`; a program for all of them."""
    params, state = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack
    )
    return _ready(model, numerics, params), _cast(numerics, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mtp_module(model: ModelConfig, numerics: NumericsConfig, module: Any) -> Any:
    params, state = module
    block = _ready(model, numerics, params["block"])
    rest = {name: x for name, x in params.items() if name != "block"}
    return _cast(numerics, rest) | {"block": block}, _cast(numerics, state)


def _ready(model: ModelConfig, numerics: NumericsConfig, block: Any) -> Any:
    """A block's parameters, `kv_b_proj` taken apart."""
    block = _cast(numerics, block)
    attention = dict(block["self_attn"])
    attention |= absorbable(model, attention.pop("kv_b_proj"))
    return block | {"self_attn": attention}


def _cast(numerics: NumericsConfig, tree: Any) -> Any:
    dtype = compute_dtype(numerics)

    def cast_leaf(path: Any, leaf: jax.Array) -> jax.Array:
        keeps = leaf.ndim < 2 or jax.tree_util.keystr(path[-1:], simple=True) in _KEPT_FP32
        return leaf.astype(jnp.float32 if keeps else dtype)

    return jax.tree_util.tree_map_with_path(cast_leaf, tree)


def _is_split(arrays: Any) -> bool:
    return not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(arrays))


def main_forward(
    model: ModelConfig,
    numerics: NumericsConfig,
    weights: Weights,
    cache: Cache,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    absorbed: bool,
) -> tuple[jax.Array, Cache]:
    """Hidden states `[B, T, D]` after the final norm, and the cache with the tokens' rows."""
    x_BTD = weights.embed_VD[tokens_BT]
    layers = list(cache.layers)
    for i, variables in enumerate(weights.blocks):
        x_BTD, layers[i] = _block(
            model,
            numerics,
            variables,
            x_BTD,
            layers[i],
            positions_BT,
            absorbed=absorbed,
            split=weights.split_experts,
        )
    return rms_norm(x_BTD, weights.norm_D, model.norm_eps), Cache(tuple(layers))


def mtp_forward(
    model: ModelConfig,
    numerics: NumericsConfig,
    weights: Weights,
    cache: Cache,
    depth: int,
    hidden_BTD: jax.Array,
    ahead_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    absorbed: bool,
) -> tuple[jax.Array, Cache]:
    """Module `depth` (from 1) over hidden states of depth - 1 and the tokens `depth` further on."""
    params, router_state = weights.mtp[depth - 1]
    joined_BTD = jnp.concatenate(
        [
            rms_norm(weights.embed_VD[ahead_BT], params["enorm"], model.norm_eps),
            rms_norm(hidden_BTD, params["hnorm"], model.norm_eps),
        ],
        axis=-1,
    )
    layers = list(cache.layers)
    at = model.n_layers + depth - 1
    x_BTD, layers[at] = _block(
        model,
        numerics,
        (params["block"], router_state),
        joined_BTD @ params["eh_proj"],
        layers[at],
        positions_BT,
        absorbed=absorbed,
        split=weights.split_experts,
    )
    return rms_norm(x_BTD, params["shared_head_norm"], model.norm_eps), Cache(tuple(layers))


def _block(
    model: ModelConfig,
    numerics: NumericsConfig,
    variables: Any,
    x_BTD: jax.Array,
    cache_BSZ: jax.Array,
    positions_BT: jax.Array,
    *,
    absorbed: bool,
    split: bool,
) -> tuple[jax.Array, jax.Array]:
    params, router_state = variables
    h_BTD = rms_norm(x_BTD, params["input_layernorm"], model.norm_eps)
    out_BTD, cache_BSZ = cached_mla(
        model, params["self_attn"], h_BTD, cache_BSZ, positions_BT, absorbed=absorbed
    )
    x_BTD += out_BTD
    h_BTD = rms_norm(x_BTD, params["post_attention_layernorm"], model.norm_eps)
    if router_state is None:
        module = FeedForward(model, numerics, ShardingRules(), model.dense_ffn_dim)
        out_BTD = cast(jax.Array, module.apply({"params": params["mlp"]}, h_BTD))
    else:
        out_BTD = moe(model, numerics, params["mlp"], router_state["mlp"], h_BTD, split=split)
    return x_BTD + out_BTD, cache_BSZ


def moe(
    model: ModelConfig,
    numerics: NumericsConfig,
    params: Any,
    router_state: Any,
    h_BTD: jax.Array,
    *,
    split: bool = False,
) -> jax.Array:
    """A mixture's output `[B, T, D]`: training's module, or something quicker for few tokens.

    `split` says that experts lie on several devices. Where `params` hold `copies`, experts are the
    replicas these speak of.
    """
    n_tokens = h_BTD.shape[0] * h_BTD.shape[1]
    if n_tokens > _FEW_TOKENS and "copies" not in params:
        variables = {"params": params, "router_state": router_state}
        out, _ = cast(Any, MoE(model, numerics, ShardingRules()).apply(variables, h_BTD, None))
        return out
    x_ND = h_BTD.reshape(n_tokens, -1)
    logits_NE = jnp.dot(
        x_ND.astype(jnp.float32), params["gate"], precision=jax.lax.Precision.HIGHEST
    )
    experts_NK, gates_NK = routing.route(
        logits_NE,
        router_state["e_score_correction_bias"],
        top_k=model.top_k,
        n_groups=model.n_groups,
        top_groups=model.top_groups,
        route_scale=model.route_scale,
        multiplied=model.router_bias == "multiplied",
    )
    if "copies" in params:
        experts_NK = replicas_of(params["copies"], experts_NK)
    # Where most experts are chosen, reading all of them side by side is quicker than some in turn;
    # experts of other devices can only be run where they are.
    most = split or 4 * experts_NK.size > 3 * len(params["experts"]["gate_up_proj"])
    run = every_expert if most else each_choice
    if n_tokens > _FEW_TOKENS:
        run = sorted_choices
    out_BTD = run(params["experts"], x_ND, experts_NK, gates_NK).reshape(h_BTD.shape)
    if model.n_shared_experts:
        shared = params["shared_experts"]
        out_BTD += swiglu(h_BTD @ shared["gate_up_proj"]) @ shared["down_proj"]
    return out_BTD


_FEW_TOKENS = 32
"""So many tokens are run without sorting them into blocks, which costs more than it saves."""


def sorted_choices(
    params: Any, x_ND: jax.Array, experts_NK: jax.Array, gates_NK: jax.Array
) -> jax.Array:
    """Runs the choices sorted by expert, training's way."""
    gate_up_EDF, down_EFD = params["gate_up_proj"], params["down_proj"]
    return experts_here(len(down_EFD), x_ND, experts_NK, gates_NK, gate_up_EDF, down_EFD)


def each_choice(
    params: Any, x_ND: jax.Array, experts_NK: jax.Array, gates_NK: jax.Array
) -> jax.Array:
    """Runs the choices one by one, each on its expert where that lies in memory."""
    top_k = experts_NK.shape[1]
    experts, gates = experts_NK.reshape(-1), gates_NK.reshape(-1)

    def one(i: jax.Array, out_ND: jax.Array) -> jax.Array:
        gate_up_DF, down_FD = (
            jax.lax.dynamic_index_in_dim(params[name], experts[i], keepdims=False)
            for name in ("gate_up_proj", "down_proj")
        )
        x_1D = jax.lax.dynamic_slice_in_dim(x_ND, i // top_k, 1)
        hidden_1F = swiglu(x_1D @ gate_up_DF).astype(jnp.float32) * gates[i]
        return out_ND.at[i // top_k].add((hidden_1F.astype(x_ND.dtype) @ down_FD)[0])

    return jax.lax.fori_loop(0, experts.size, one, jnp.zeros_like(x_ND))


def every_expert(
    params: Any, x_ND: jax.Array, experts_NK: jax.Array, gates_NK: jax.Array
) -> jax.Array:
    """Runs all experts on all tokens, most gates being 0."""
    n_experts = params["gate_up_proj"].shape[0]
    gates_NE = jnp.sum(jax.nn.one_hot(experts_NK, n_experts) * gates_NK[..., None], axis=1)
    x_END = jnp.broadcast_to(x_ND, (n_experts, *x_ND.shape))
    hidden_ENF = swiglu(jnp.einsum("end,edf->enf", x_END, params["gate_up_proj"]))
    hidden_ENF = (hidden_ENF.astype(jnp.float32) * gates_NE.T[..., None]).astype(x_ND.dtype)
    return jnp.einsum("enf,efd->end", hidden_ENF, params["down_proj"]).sum(0)


def logits(weights: Weights, hidden: jax.Array, n_tokens: int | jax.Array) -> jax.Array:
    """FP32 logits `[..., V]`; ids from `n_tokens` on, which pad the vocabulary, are ruled out."""
    out = jnp.einsum("...d,dv->...v", hidden, weights.head_DV, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(out.shape[-1]) < n_tokens, out, -jnp.inf)
