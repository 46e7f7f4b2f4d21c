"""Text from a model: a latent cache, sampling, and speculation with the MTP modules."""

from collections.abc import Sequence
from typing import Any

from v3jax.config import ExperimentConfig
from v3jax.data.tokenizer import Tokenizer
from v3jax.decode.engine import Engine, Generation, Stats

__all__ = ["Engine", "Generation", "Stats", "generate"]


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
    """Continues each text by up to `n_tokens` ids, ending at `<eos>`.

    Prompts are encoded without special tokens; an empty one starts from `<bos>`.

    Raises:
      ValueError: a prompt has an id outside the vocabulary.
    """
    engine = Engine(cfg.model, params, router_state, tokenizer, numerics=cfg.numerics)
    rows = [tokenizer.encode(p) or [tokenizer.bos] for p in prompts]
    out, _ = engine.generate(rows, max_tokens=n_tokens, temperature=temperature, seed=seed)
    return [one.ids for one in out]
