"""Where each tensor of the public checkpoint format lives in ours: the one table of names.

The format keeps a matrix as `[out, in]`, one tensor an expert, gate and up apart. Ours are
`[in, out]`, stacked over layers (and experts), gate and up side by side. MTP modules count as
layers after the main model's and carry copies of the embedding and the head.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from v3jax.config import ModelConfig

SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True)
class Tensor:
    """One tensor of the format.

    `leaf` is the name of our array, `index` the place along its stacked axes. `half` is 0 for the
    gate and 1 for the up projection, which are halves of our last axis. `linear` tensors are FP8
    where the checkpoint is; `bias` ones stay FP32 always. A copy repeats another tensor.
    """

    name: str
    shape: tuple[int, ...]
    leaf: str
    index: tuple[int, ...] = ()
    half: int | None = None
    transposed: bool = False
    linear: bool = False
    bias: bool = False
    copy_of: str | None = None


def tensors(model: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of `model` by name, scales left out, in the format's order."""
    return {tensor.name: tensor for tensor in _tensors(model)}


def _tensors(model: ModelConfig) -> Iterator[Tensor]:
    table = (model.vocab_size, model.dim)
    yield Tensor("model.embed_tokens.weight", table, "params.embed_tokens")
    for layer in range(model.n_layers):
        moe = layer >= model.n_dense_layers
        stack = "params.moe_layers" if moe else "params.dense_layers"
        index = (layer - model.n_dense_layers if moe else layer,)
        yield from _block(model, f"model.layers.{layer}", stack, index, moe=moe)
    yield Tensor("model.norm.weight", (model.dim,), "params.norm")
    yield Tensor("lm_head.weight", table, "params.lm_head", transposed=True)
    for depth in range(model.mtp_depth):
        name = f"model.layers.{model.n_layers + depth}"
        leaf = f"params.mtp_layers_{depth}"
        yield Tensor(
            f"{name}.embed_tokens.weight",
            table,
            "params.embed_tokens",
            copy_of="model.embed_tokens.weight",
        )
        for norm in ("enorm", "hnorm"):
            yield Tensor(f"{name}.{norm}.weight", (model.dim,), f"{leaf}.{norm}")
        yield Tensor(
            f"{name}.eh_proj.weight",
            (model.dim, 2 * model.dim),
            f"{leaf}.eh_proj",
            transposed=True,
        )
        yield from _block(model, name, f"{leaf}.block", (), moe=True)
        norm = f"{name}.shared_head.norm.weight"
        yield Tensor(norm, (model.dim,), f"{leaf}.shared_head_norm")
        yield Tensor(
            f"{name}.shared_head.head.weight",
            table,
            "params.lm_head",
            transposed=True,
            copy_of="lm_head.weight",
        )


def _block(
    model: ModelConfig, name: str, leaf: str, index: tuple[int, ...], *, moe: bool
) -> Iterator[Tensor]:
    def linear(of: str, n_out: int, n_in: int, to: str) -> Tensor:
        place = f"{leaf}.{to}"
        return Tensor(
            f"{name}.{of}.weight", (n_out, n_in), place, index, transposed=True, linear=True
        )

    def norm(of: str, width: int, to: str) -> Tensor:
        return Tensor(f"{name}.{of}.weight", (width,), f"{leaf}.{to}", index)

    query = model.n_heads * (model.nope_head_dim + model.rope_head_dim)
    key_value = model.n_heads * (model.nope_head_dim + model.v_head_dim)
    attention = "self_attn"
    yield norm("input_layernorm", model.dim, "input_layernorm")
    yield norm("post_attention_layernorm", model.dim, "post_attention_layernorm")
    if model.q_latent_dim is None:
        yield linear(f"{attention}.q_proj", query, model.dim, f"{attention}.q_proj")
    else:
        latent = model.q_latent_dim
        yield linear(f"{attention}.q_a_proj", latent, model.dim, f"{attention}.q_a_proj")
        yield norm(f"{attention}.q_a_layernorm", latent, f"{attention}.q_a_layernorm")
        yield linear(f"{attention}.q_b_proj", query, latent, f"{attention}.q_b_proj")
    latent = model.kv_latent_dim
    down = f"{attention}.kv_a_proj_with_mqa"
    yield linear(down, latent + model.rope_head_dim, model.dim, down)
    yield norm(f"{attention}.kv_a_layernorm", latent, f"{attention}.kv_a_layernorm")
    yield linear(f"{attention}.kv_b_proj", key_value, latent, f"{attention}.kv_b_proj")
    width = model.n_heads * model.v_head_dim
    yield linear(f"{attention}.o_proj", model.dim, width, f"{attention}.o_proj")
    if not moe:
        yield from _ffn(model.dim, model.dense_ffn_dim, f"{name}.mlp", f"{leaf}.mlp", index)
        return
    yield Tensor(
        f"{name}.mlp.gate.weight",
        (model.n_experts, model.dim),
        f"{leaf}.mlp.gate",
        index,
        transposed=True,
    )
    state = leaf.replace("params", "router_state", 1)
    yield Tensor(
        f"{name}.mlp.gate.e_score_correction_bias",
        (model.n_experts,),
        f"{state}.mlp.e_score_correction_bias",
        index,
        bias=True,
    )
    for expert in range(model.n_experts):
        of, to = f"{name}.mlp.experts.{expert}", f"{leaf}.mlp.experts"
        yield from _ffn(model.dim, model.expert_ffn_dim, of, to, (*index, expert))
    if model.n_shared_experts:
        width = model.n_shared_experts * model.expert_ffn_dim
        of, to = f"{name}.mlp.shared_experts", f"{leaf}.mlp.shared_experts"
        yield from _ffn(model.dim, width, of, to, index)


def _ffn(dim: int, width: int, name: str, leaf: str, index: tuple[int, ...]) -> Iterator[Tensor]:
    for half, projection in enumerate(("gate_proj", "up_proj")):
        yield Tensor(
            f"{name}.{projection}.weight",
            (width, dim),
            f"{leaf}.gate_up_proj",
            index,
            half=half,
            transposed=True,
            linear=True,
        )
    yield Tensor(
        f"{name}.down_proj.weight",
        (dim, width),
        f"{leaf}.down_proj",
        index,
        transposed=True,
        linear=True,
    )
