"""Acceptance of drafts by source, against the engine's own count."""

from dataclasses import replace
from typing import Any

import pytest

from tests import mini
from v3jax.data.corpus import load_corpus
from v3jax.decode import Engine
from v3jax.evals import acceptance as module
from v3jax.evals.acceptance import Acceptance, acceptance, overall
from v3jax.models import load_run


@pytest.mark.slow
def test_the_rate_is_the_engines_on_held_out_beginnings() -> None:
    run = mini.finished()
    (found,) = acceptance(run, n_prompts=4, prompt_tokens=8, new_tokens=12)
    cfg, params, router_state, tokenizer = load_run(run)
    engine = Engine(
        cfg.model, params, router_state, tokenizer, numerics=cfg.numerics, speculative=True
    )
    (documents,) = load_corpus(cfg.data).heldout
    prompts = [tokenizer.encode(d.text)[:8] for d in documents[:4]]
    _, stats = engine.generate(prompts, max_tokens=12)
    assert (found.name, found.drafted, found.accepted) == ("user", stats.drafted, stats.accepted)
    assert found.rate == stats.acceptance_rate
    assert found.tokens_per_step == stats.tokens_per_step >= 1


def test_overall_is_of_all_drafts() -> None:
    found = [Acceptance("a", 10, 9, 1.9), Acceptance("b", 30, 3, 1.1)]
    assert overall(found) == pytest.approx(12 / 40)
    assert overall([Acceptance("none", 0, 0, 1.0)]) == 0


def test_a_model_without_modules_drafts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(ckpt: Any, *, ema: bool) -> Any:
        cfg, *rest = load_run(ckpt, ema=ema)
        return replace(cfg, model=replace(cfg.model, mtp_depth=0)), *rest

    monkeypatch.setattr(module, "load_run", without)
    with pytest.raises(ValueError, match="drafts nothing"):
        acceptance(mini.finished())
