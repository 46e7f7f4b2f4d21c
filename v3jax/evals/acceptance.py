"""How many tokens that the MTP modules draft the main model takes (report section 5.4.3).

The report accepts a second token in 85 to 90% of the cases "across various generation topics". Here
a topic is a source of the run's corpus: beginnings of held-out documents are continued greedily,
with as many drafts a step as the model has MTP modules.
"""

from dataclasses import dataclass

from etils import epath

from v3jax.data.prepared import held_out
from v3jax.decode import Engine
from v3jax.models import load_run


@dataclass(frozen=True)
class Acceptance:
    """Of one source's continuations."""

    name: str
    drafted: int
    accepted: int
    tokens_per_step: float
    """New tokens for each run of the main model."""

    @property
    def rate(self) -> float:
        """Share of drafted tokens that were taken."""
        return self.accepted / max(self.drafted, 1)


def acceptance(
    ckpt: epath.PathLike,
    *,
    ema: bool = False,
    n_prompts: int = 16,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
) -> list[Acceptance]:
    """Acceptance by source of the run's corpus, for sources that have held-out documents.

    Args:
      n_prompts: at most so many documents of a source, in hash order, one prompt each.

    Raises:
      ValueError: no run there, a model without MTP modules, or a corpus that is not at hand.
    """
    cfg, params, router_state, tokenizer = load_run(ckpt, ema=ema)
    if cfg.data.synthetic:
        raise ValueError(f"{ckpt}: trained on synthetic data, which has no sources")
    if not cfg.model.mtp_depth:
        raise ValueError(f"{ckpt}: a model without MTP modules (model.mtp_depth=0) drafts nothing")
    engine = Engine(
        cfg.model, params, router_state, tokenizer, numerics=cfg.numerics, speculative=True
    )
    found = []
    for name, documents in held_out(cfg.data):
        prompts = [tokenizer.encode(d.text)[:prompt_tokens] for d in documents[:n_prompts]]
        if prompts:
            _, stats = engine.generate(prompts, max_tokens=new_tokens)
            found.append(Acceptance(name, stats.drafted, stats.accepted, stats.tokens_per_step))
    return found


def overall(found: list[Acceptance]) -> float:
    """Share of all sources' drafted tokens that were taken."""
    return sum(f.accepted for f in found) / max(sum(f.drafted for f in found), 1)
