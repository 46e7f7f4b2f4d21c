"""What each phase of the small model took and reached, from the runs of the README's commands.

    python -m benchmarks.phases [--runs=runs] [--evals=evals]

Reads the finished runs of `v3_tiny_base`, its extensions and `v3_tiny_sft`, the needle tests kept
in them, and the results of `evaluate --tasks=instructions`. Minutes are those of steps, without
start-up and evaluation. Figures go to results/phases.json.
"""

import json
from pathlib import Path

from absl import app, flags

from benchmarks.kept import called, keep, markdown
from v3jax.metrics import read_rows
from v3jax.report import Needles

_RUNS = flags.DEFINE_string("runs", "runs", "Folder of the runs.")
_EVALS = flags.DEFINE_string("evals", "evals", "Folder of their evaluations.")
PHASES = ("v3_tiny_base", "v3_tiny_ctx1k", "v3_tiny_ctx4k", "v3_tiny_sft")


def main(argv: list[str]) -> None:
    del argv
    rows = [_row(name, Path(_RUNS.value, name)) for name in PHASES]
    print(markdown(list(rows[0]), [list(row.values()) for row in rows]))
    keep("phases", called("phases"), {"phases": rows})


def _row(name: str, run: Path) -> dict[str, str]:
    steps = read_rows(run / "metrics.jsonl")
    needles, asked = run / "needle.json", Path(_EVALS.value, name, "results.json")
    found = Needles.from_text(needles.read_text(), str(needles)) if needles.exists() else None
    results = json.loads(asked.read_text()) if asked.exists() else {}
    followed = results.get("instructions", {}).get("all forms")
    return {
        "phase": f"`{name}`",
        "tokens": f"{steps[-1]['tokens']:,}",
        "minutes of steps": f"{sum(row['step_seconds'] for row in steps) / 60:.1f}",
        "needles found": "" if found is None else f"{found.exact:.1%} to {found.lengths[-1]:,}",
        "instructions followed": "" if followed is None else f"{followed:.1%}",
    }


if __name__ == "__main__":
    app.run(main)
