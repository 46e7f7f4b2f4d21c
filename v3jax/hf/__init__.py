"""The public checkpoint format of DeepSeek-V3 (Hugging Face), in and out."""

from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from v3jax.config import ModelConfig
from v3jax.hf.read import Reader, Source, check, open_source, pieces
from v3jax.model.transformer import Output, Transformer, head_logits
from v3jax.sharding import ShardingRules
from v3jax.weights import FP32, abstract_variables, assemble


def load(
    directory: str | Path,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[ModelConfig, Any, Any]:
    """`(model, params, router_state)` of a Hugging Face directory, streamed into their shards.

    The files are read twice: once to refuse what is damaged before anything is allocated. Memory
    beyond the result stays below a few runs of 64 MiB. Router weights and bias are FP32
    whatever `dtype` says. MTP modules come along if the files hold them.

    Raises:
      ValueError: a checkpoint that is incomplete, damaged or of another model; one line that names
        tensor and file.
    """
    source = open_source(directory)
    variables = load_variables(source, dtype=dtype, mesh=mesh, rules=rules)
    return source.model, variables["params"], variables["router_state"]


def load_variables(
    reader: Reader,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> dict[str, Any]:
    """`params` and `router_state` of an open checkpoint or conversion; as `load`."""
    if isinstance(reader, Source):  # a conversion was checked when it was made
        check(reader)
    like = abstract_variables(reader.model, dtype=dtype, mesh=mesh, rules=rules)
    return assemble(like, pieces(reader))


def forward(directory: str | Path, tokens_BT: Any) -> np.ndarray:
    """FP32 logits `[B, T, vocab]` of a Hugging Face directory, to compare with any other program.

    Raises:
      ValueError: as `load`, or token ids that are not `[B, T]` integers of the vocabulary.
    """
    tokens = np.asarray(tokens_BT)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens: {tokens.dtype}{list(tokens.shape)} is no [B, T] array of ids")
    source = open_source(directory)
    vocab = source.model.vocab_size
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(
            f"tokens: ids run from {tokens.min()} to {tokens.max()}, not 0..{vocab - 1}"
        )
    variables = load_variables(source)

    @jax.jit
    def logits(variables: Any, tokens_BT: jax.Array) -> jax.Array:
        module = Transformer(source.model, FP32, ShardingRules())
        out = cast(Output, module.apply(variables, tokens_BT))
        return head_logits(variables["params"], out.hidden_BTD)

    with jax.default_matmul_precision("highest"):
        return np.asarray(logits(variables, jnp.asarray(tokens, jnp.int32)))
