"""The report's reasoning data (section 5.1): an expert answers, a rule keeps what is right.

An expert, any checkpoint, answers every problem several times at high temperature under a system
prompt that asks for reflection and checks. Of the right answers to a problem the shortest is kept
(ours; the report wants them accurate and concise), and two samples are written to `chats.jsonl`:
the problem with its original answer, and system prompt and problem with the expert's. `loop`
fine-tunes on them and measures what that changed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from v3jax.config import ExperimentConfig, SourceConfig
from v3jax.data import instructions
from v3jax.data.problems import Problem, read_problems
from v3jax.evals.problems import Answer, answers, pass_rate
from v3jax.models import identity, open_model
from v3jax.report import distillation_page

EMBEDDED = ("chains", "forms")


@dataclass(frozen=True)
class Sampling:
    """How an expert is asked."""

    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    system: str


@dataclass(frozen=True)
class Distilled:
    """What came of it."""

    problems: int
    answers: int
    right: int
    solved: int
    """Problems with a right answer, of which two samples each were written."""
    tokens_kept: float
    """Mean length of the answers that were kept."""
    tokens_original: float
    """Mean length of the original ones, in the expert's tokens."""

    @property
    def pass_rate(self) -> float:
        """Share of right answers."""
        return self.right / max(self.answers, 1)


def problems_named(
    name: str, rule: str, limit: int, side: instructions.Side = "train"
) -> list[Problem]:
    """The first problems of a file, or of an embedded kind from one side of its split.

    Raises:
      ValueError: no such file or kind, or a line that is no problem.
    """
    if name == "chains" or name == "forms":
        return instructions.problems(name, side, limit)
    return read_problems(name, rule)[:limit]


def distil(expert: str, problems: Sequence[Problem], out: Path, how: Sampling) -> Distilled:
    """Asks the expert, keeps what is right in `out/chats.jsonl`; goes on with what is there.

    Raises:
      ValueError: a model that cannot be used, or an expert that solves none of the problems.
    """
    chats, about = out / "chats.jsonl", out / "distilled.json"
    what = [asdict(how), [asdict(p) for p in problems], identity(expert)]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    if about.exists() and chats.exists():
        known = json.loads(about.read_text(encoding="utf-8"))
        if known.pop("digest") == digest:
            return Distilled(**known)
    loaded = open_model(expert)
    found = answers(
        loaded,
        problems,
        samples=how.samples,
        temperature=how.temperature,
        top_p=how.top_p,
        seed=how.seed,
        max_tokens=how.max_tokens,
        system=how.system,
    )
    kept = chosen(problems, found, how.samples)
    if not kept:
        raise ValueError(
            f"{expert}: none of {len(found)} answers to {len(problems)} problems is right; take "
            "another expert or easier problems"
        )
    rows = [row for problem, answer in kept for row in sample_forms(problem, answer, how.system)]
    _write(chats, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    original = [len(loaded.tokenizer.encode(problem.answer)) for problem, _ in kept]
    made = Distilled(
        problems=len(problems),
        answers=len(found),
        right=sum(answer.right for answer in found),
        solved=len(kept),
        tokens_kept=sum(answer.n_tokens for _, answer in kept) / len(kept),
        tokens_original=sum(original) / len(kept),
    )
    _write(about, json.dumps(asdict(made) | {"digest": digest}, indent=1))
    return made


def chosen(
    problems: Sequence[Problem], found: Sequence[Answer], samples: int
) -> list[tuple[Problem, Answer]]:
    """The shortest right answer to each problem that has one, the first of equals."""
    kept = []
    for i, problem in enumerate(problems):
        right = [a for a in found[i * samples : (i + 1) * samples] if a.right]
        if right:
            kept.append((problem, min(right, key=lambda a: a.n_tokens)))
    return kept


def sample_forms(problem: Problem, answer: Answer, system: str) -> list[dict[str, Any]]:
    """The two samples of a problem: with its original answer, and with the expert's."""

    def said(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text}

    return [
        {"messages": [*problem.asked(), said(problem.answer)], "form": "original"},
        {"messages": [*problem.asked(system), said(answer.text)], "form": "reasoned"},
    ]


def with_chats(cfg: ExperimentConfig, chats: Path) -> ExperimentConfig:
    """An experiment on conversations, with more of them."""
    if cfg.data.format != "chat" or cfg.data.path is not None:
        raise ValueError(f"--then={cfg.name}: fine-tunes on no data.sources of conversations")
    more = SourceConfig(name="distilled", weight=1.0, max_mb=1e6, path=str(chats))
    return replace(cfg, data=replace(cfg.data, sources=(*cfg.data.sources, more)))


def measured(
    model: str, problems: Sequence[Problem], how: Sampling
) -> dict[str, tuple[float, float]]:
    """Greedy pass rate and mean length of answers, asked plainly and under the system prompt."""
    loaded = open_model(model)
    found = {}
    for name, system in (("plain", None), ("reasoned", how.system)):
        said = answers(loaded, problems, max_tokens=how.max_tokens, system=system)
        found[name] = (pass_rate(said), sum(a.n_tokens for a in said) / len(said))
    return found


def loop(
    cfg: ExperimentConfig,
    distilled: Distilled,
    before: str,
    test: Sequence[Problem],
    out: Path,
    how: Sampling,
) -> dict[str, Any]:
    """Fine-tunes on what was distilled and writes the report; its figures."""
    from v3jax import train  # has command-line options of its own, which are none of this program's

    first = measured(before, test, how)
    result = train.run(with_chats(cfg, out / "chats.jsonl"), out / "sft")
    if not result.finished:
        raise RuntimeError(f"{out / 'sft'}: stopped by a signal; the same command goes on")
    after = measured(str(out / "sft"), test, how)
    figures = {
        "distilled": asdict(distilled),
        "held_out_problems": len(test),
        "before": first,
        "after": after,
    }
    _write(out / "report.json", json.dumps(figures, indent=1))
    rows = [json.loads(line) for line in (out / "chats.jsonl").read_text("utf-8").splitlines()]
    _write(out / "report.html", distillation_page(cfg.name, figures, rows[:6]))
    return figures


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
