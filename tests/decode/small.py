"""A small random model to decode with, and what a whole pass over a text says about it."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from tests.model import small
from v3jax.config import ModelConfig
from v3jax.decode import Engine
from v3jax.decode.cache import BLOCK
from v3jax.model.transformer import Transformer, head_logits
from v3jax.weights import FP32

MODEL = small.config(n_layers=2)
ROOM = 4 * BLOCK
"""Of most requests, so that the programs for four blocks serve them all."""


@dataclass(frozen=True)
class Letters:
    """A tokenizer of single bytes: id i is the i-th character from `A` on; `eos` spells nothing."""

    vocab_size: int = MODEL.vocab_size
    eos: int = 0

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr(65 + i) for i in ids if i != self.eos)


@dataclass(frozen=True)
class Setup:
    """A model, its variables and a way to look at it without a cache."""

    model: ModelConfig
    params: Any
    router_state: Any

    def engine(self, **options: Any) -> Engine:
        """An engine whose tokens never end a row unless `eos` is one of them."""
        tokenizer = Letters(self.model.vocab_size, options.pop("eos", -1))
        return Engine(
            self.model, self.params, self.router_state, tokenizer, numerics=FP32, **options
        )

    def logits(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits `[length, V]` of whole rows in one pass without a cache."""
        logits, _ = self._whole(rows, 4 * BLOCK)  # one shape, compiled once
        return [row[: len(ids)] for row, ids in zip(logits, rows, strict=True)]

    def mtp_logits(self, rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
        """Logits `[depth, B, length, V]` of the MTP modules; depth k's last k + 1 mean nothing."""
        _, logits = self._whole(rows, length)
        return np.asarray(logits)

    def _whole(self, rows: Sequence[Sequence[int]], length: int) -> tuple[Any, Any]:
        tokens = np.zeros((len(rows), length + 1), np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        variables = {"params": self.params, "router_state": self.router_state}
        return jax.device_get(_logits(self.model, variables, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    model: ModelConfig, variables: Any, tokens_BT: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    out = small.apply(Transformer(*small.parts(model)), variables, tokens_BT, ahead=1)
    hidden = (out.hidden_BTD, *out.mtp_hidden)
    logits = [head_logits(variables["params"], h_BTD) for h_BTD in hidden]
    return logits[0], logits[1:]


def setup(model: ModelConfig = MODEL, *, foresight: bool = False) -> Setup:
    """Random weights; with `foresight` such that the MTP modules are right now and then.

    They then do to the token looked ahead to what the main model's last block does to it one
    position later; the first block and a little of the hidden state make the difference.
    """
    params, state = small.params(model), small.router_state(model)
    if foresight:
        embed_VD = params["embed_tokens"]
        embed_VD /= np.sqrt(np.mean(embed_VD**2, axis=-1, keepdims=True))
        first = params["dense_layers"]
        first["self_attn"]["o_proj"] *= 0.1
        first["mlp"]["down_proj"] *= 0.1
        for depth in range(model.mtp_depth):
            name = f"mtp_layers_{depth}"
            hidden_DD = params[name]["eh_proj"][model.dim :]
            params[name] |= {
                "enorm": np.ones(model.dim),
                "eh_proj": np.concatenate([np.eye(model.dim), 0.1 * hidden_DD]),
                "block": jax.tree.map(lambda x: x[-1], params["moe_layers"]),
                "shared_head_norm": params["norm"],
            }
            state[name]["block"] = jax.tree.map(lambda x: x[-1], state["moe_layers"])
    return Setup(model, small.to_jax(params), small.to_jax(state))


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to `longest` ids, the first and the last of these lengths included."""
    rng = np.random.default_rng(seed)
    lengths = [1, longest, *rng.integers(1, longest + 1, count)][:count]
    return [rng.integers(0, MODEL.vocab_size, length).tolist() for length in lengths]


def chi_square_is_small(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether counts fit probabilities: the statistic is within 5 deviations of its mean.

    Outcomes expected fewer than 5 times are taken together; one that cannot be fits nothing.
    """
    counts, expected = counts.ravel(), probabilities.ravel() * counts.sum()
    if counts[expected == 0].any():
        return False
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = np.sum((counts - expected) ** 2 / expected)
    freedom = len(counts) - 1
    return bool(statistic < freedom + 5 * np.sqrt(2 * freedom))
