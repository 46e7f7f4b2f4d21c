"""How many of some problems a model solves, by the rule of each (report sections 5.1 and 5.2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

from v3jax.data.chat import ChatTemplate
from v3jax.data.problems import Problem
from v3jax.decode import Engine
from v3jax.decode.cache import room_for
from v3jax.models import Loaded
from v3jax.rewards.rules import rule_named

_ROWS = 64
"""Answers that are written side by side."""


@dataclass(frozen=True)
class Answer:
    """A model's answer to a problem."""

    problem: Problem
    text: str
    right: bool
    finished: bool
    """Whether the model ended its turn."""
    n_tokens: int


def pass_rate(answers: Sequence[Answer]) -> float:
    """Share of right answers."""
    return sum(answer.right for answer in answers) / max(len(answers), 1)


def by_kind(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """The answers of each kind of problem, kinds in alphabetical order."""
    kinds = sorted({answer.problem.kind for answer in answers})
    return {kind: [a for a in answers if a.problem.kind == kind] for kind in kinds}


def answers(
    loaded: Loaded,
    problems: Sequence[Problem],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_tokens: int = 128,
    system: str | None = None,
) -> list[Answer]:
    """`samples` answers to each problem in turn, in the model's chat template.

    An answer counts as right only if the model ended its turn.

    Args:
      system: a system prompt for all problems; None asks as they are.

    Raises:
      ValueError: an unknown rule, or a prompt that leaves no room in the model's context.
    """
    rules = {p.rule: rule_named(p.rule) for p in problems}
    template = ChatTemplate(loaded.chat_template, loaded.tokenizer)
    prompts = [template.encode(p.asked(system)) for p in problems]
    longest = max(map(len, prompts), default=0)
    if longest + max_tokens > loaded.context:
        raise ValueError(
            f"problems: a prompt of {longest} tokens and {max_tokens} more exceed the model's "
            f"context of {loaded.context}; lower the number of new tokens"
        )
    engine = Engine(
        loaded.model, loaded.params, loaded.router_state, loaded.tokenizer, numerics=loaded.numerics
    )
    # Prompts of like length side by side; the answers go back into the order of the problems.
    asked = [(n, i) for i, prompt in enumerate(prompts) for n in [len(prompt)] * samples]
    order = sorted(range(len(asked)), key=lambda k: asked[k][0])
    found: list[Answer | None] = [None] * len(asked)
    for batch, start in enumerate(range(0, len(order), _ROWS)):
        here = order[start : start + _ROWS]
        rows = [prompts[asked[k][1]] for k in here]
        out, _ = engine.generate(
            rows,
            max_tokens=max_tokens,
            room=room_for(longest + max_tokens),
            width=_ROWS,
            temperature=temperature,
            top_p=top_p,
            seed=(seed * 100_003 + batch) % 2**32,
        )
        for k, one in zip(here, out, strict=True):
            problem = problems[asked[k][1]]
            text = loaded.tokenizer.decode(one.ids)
            finished = one.finish == "eos"
            right = finished and rules[problem.rule](text, problem.answer)
            found[k] = Answer(problem, text, right, finished, len(one.ids))
    return [answer for answer in found if answer is not None]
