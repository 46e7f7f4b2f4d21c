"""Fine-tuning a tiny model, and reasoning data of an expert (report section 5.1).

    python -m benchmarks.fine_tuning --base=DIR [--seeds=0,1,2] [--folder=runs/fine_tuning]
        [--forms=400] [--problems=3000] [--test=200]

From `v3_tiny_ctx1k`: an expert that works chains out, and for each seed a first fine-tuning, how
often it follows an instruction whose contents no training saw, what the expert's checked answers
are, and a second fine-tuning with them; held-out problems solved before and after, asked plainly
and under the system prompt. Runs that are finished in the folder are not run again. Figures go to
results/fine_tuning.json.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.kept import called, keep, markdown
from v3jax import host, registry, train
from v3jax.config import ExperimentConfig
from v3jax.data import instructions
from v3jax.evals.problems import answers, by_kind, pass_rate
from v3jax.metrics import read_rows
from v3jax.models import open_model
from v3jax.reasoning import Sampling, distil, loop

_BASE = flags.DEFINE_string("base", None, "Run directory of the model to fine-tune.", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Values of run.seed.")
_FOLDER = flags.DEFINE_string("folder", "runs/fine_tuning", "Where the runs are.")
_FORMS = flags.DEFINE_integer("forms", 400, "Instructions that are asked.", lower_bound=1)
_PROBLEMS = flags.DEFINE_integer("problems", 3000, "Problems the expert is asked.", lower_bound=1)
_TEST = flags.DEFINE_integer("test", 200, "Held-out problems.", lower_bound=1)


def main(argv: list[str]) -> None:
    del argv
    host.prepare()
    folder = Path(_FOLDER.value)
    expert = folder / "expert"
    seconds = {"expert": _train(_experiment("v3_tiny_expert", 0), expert)}
    found = [_one_seed(int(seed), folder, expert) for seed in _SEEDS.value]
    rows = by_seed(found)
    print(markdown(list(rows[0]), [list(row.values()) for row in rows]))
    print(f"minutes of steps: expert {seconds['expert'] / 60:.1f}, first fine-tuning ", end="")
    print(", ".join(f"{one['seconds_of_fine_tuning'] / 60:.1f}" for one in found))
    print("by form: " + ", ".join(f"{k} {v:.0%}" for k, v in found[0]["forms"].items()))
    results = {"seconds": seconds, "by seed": rows, "seeds": found}
    keep("fine_tuning", called("fine_tuning"), results)


def _experiment(name: str, seed: int) -> ExperimentConfig:
    cfg = registry.get(name)
    return replace(cfg, init_from=_BASE.value, run=replace(cfg.run, seed=seed))


def _train(cfg: ExperimentConfig, workdir: Path) -> float:
    """Trains to the end; seconds in steps."""
    if not (workdir / "report.html").exists() and not train.run(cfg, workdir).finished:
        raise RuntimeError(f"{workdir}: stopped by a signal; the same command goes on")
    return sum(row["step_seconds"] for row in read_rows(workdir / "metrics.jsonl"))


def _one_seed(seed: int, folder: Path, expert: Path) -> dict[str, Any]:
    first = folder / f"first-{seed}"
    seconds = _train(_experiment("v3_tiny_sft", seed), first)
    forms = _forms(first)
    how = Sampling(
        samples=2, temperature=1.0, top_p=1.0, max_tokens=96, seed=seed, system=instructions.THINK
    )
    out = folder / f"distilled-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    # Other problems for every seed.
    asked = instructions.problems("chains", "train", _PROBLEMS.value * (seed + 1))
    made = distil(str(expert), asked[-_PROBLEMS.value :], out, how)
    test = instructions.problems("chains", "held_out", _TEST.value)
    report = out / "report.json"
    looped = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    if looped.get("held_out_problems") != len(test):
        looped = loop(_experiment("v3_tiny_sft", seed), made, str(first), test, out, how)
    return {
        "seed": seed,
        "seconds_of_fine_tuning": seconds,
        "forms": forms,
        "after_forms": _forms(out / "sft"),
        "distilled": asdict(made),
        "before": looped["before"],
        "after": looped["after"],
    }


def _forms(run: Path) -> dict[str, float]:
    """Share of instructions with unseen contents that are followed, by kind and in all."""
    loaded = open_model(run)
    problems = instructions.problems("forms", "held_out", _FORMS.value)
    found = answers(loaded, problems, max_tokens=64)
    return {"all": pass_rate(found)} | {k: pass_rate(some) for k, some in by_kind(found).items()}


def by_seed(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What is right of the forms and of the held-out chains, by seed."""
    rows = []
    for one in found:
        row = {"seed": str(one["seed"]), "forms": f"{one['forms']['all']:.1%}"}
        row["expert"] = f"{one['distilled']['right'] / one['distilled']['answers']:.1%}"
        for when in ("before", "after"):
            row[f"chains {when}"] = f"{one[when]['plain'][0]:.1%}"
            row[f"chains {when}, asked to reason"] = f"{one[when]['reasoned'][0]:.1%}"
        rows.append(row | {"forms after": f"{one['after_forms']['all']:.1%}"})
    return rows


if __name__ == "__main__":
    app.run(main)
