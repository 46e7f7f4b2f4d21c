"""Text from a model by full forward passes over a fixed window, the simplest correct way.

The window is padded at the end: attention is causal and no token is ever dropped by an expert, so
what stands after a position cannot change it. Past the window's length the oldest token leaves.
Dims: P prompts, W window, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v3jax.config import ExperimentConfig
from v3jax.data.tokenizer import Tokenizer
from v3jax.model.transformer import head_logits
from v3jax.objective import apply_model


@functools.partial(jax.jit, static_argnums=0)
def next_token(
    cfg: ExperimentConfig,
    params: Any,
    router_state: Any,
    tokens_PW: jax.Array,
    lengths_P: jax.Array,
    n_tokens: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """The next token of each prompt, int32 `[P]`: the likeliest at temperature 0, else a draw.

    Ids from `n_tokens` on, which pad the vocabulary, are never chosen.
    """
    out = apply_model(cfg, params, router_state, tokens_PW)
    last_PD = jnp.take_along_axis(out.hidden_BTD, (lengths_P - 1)[:, None, None], axis=1)[:, 0]
    logits_PV = head_logits(params, last_PD)
    logits_PV = jnp.where(jnp.arange(logits_PV.shape[-1]) < n_tokens, logits_PV, -jnp.inf)
    drawn_P = jax.random.categorical(key, logits_PV / jnp.maximum(temperature, 1e-6))
    chosen_P = jnp.where(temperature > 0, drawn_P, jnp.argmax(logits_PV, axis=-1))
    return chosen_P.astype(jnp.int32)


def generate(
    cfg: ExperimentConfig,
    params: Any,
    router_state: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    n_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues each prompt by up to `n_tokens` ids, ending at `<eos>`.

    Prompts are encoded without special tokens; an empty one starts from `<bos>`.

    Raises:
      ValueError: a prompt has an id outside the vocabulary.
    """
    window = cfg.data.seq_len
    rows = [tokenizer.encode(p) or [tokenizer.bos] for p in prompts]
    starts = [len(row) for row in rows]
    if max(max(row) for row in rows) >= cfg.model.vocab_size:
        raise ValueError(f"prompt: a token id exceeds model.vocab_size={cfg.model.vocab_size}")
    done = [False] * len(rows)
    for position in range(n_tokens):
        tokens_PW = np.full((len(rows), window), tokenizer.pad, np.int32)
        lengths_P = np.array([min(len(row), window) for row in rows], np.int32)
        for p, row in enumerate(rows):
            tokens_PW[p, : lengths_P[p]] = row[-window:]
        chosen = next_token(
            cfg,
            params,
            router_state,
            jnp.asarray(tokens_PW),
            jnp.asarray(lengths_P),
            jnp.asarray(tokenizer.vocab_size, jnp.int32),
            jnp.asarray(temperature, jnp.float32),
            jax.random.fold_in(jax.random.key(seed), position),
        )
        for p, token in enumerate(np.asarray(chosen).tolist()):
            if not done[p]:
                done[p] = token == tokenizer.eos
                rows[p].append(token)
        if all(done):
            break
    return [row[start:] for row, start in zip(rows, starts, strict=True)]
