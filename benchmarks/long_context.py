"""The context of `v3_tiny_base` extended to 1K and searched for needles, before and after.

    python -m benchmarks.long_context [--seeds=0] [--folder=runs/long_context] [--needles=4]
        [--phases=v3_tiny_ctx1k,v3_tiny_ctx4k]

Pre-trains and extends (report section 4.3) with the source `key_values` and without it, everything
else alike, at once on a core each, and prints the share of needles found at each length by every
model: before the extension without YaRN and with YaRN that no training has seen, and after it. Runs
that are finished in the folder are not run again. Figures go to results/long_context.json.
"""

import sys
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.kept import called, keep, markdown
from v3jax import host, registry
from v3jax.ablation import Run, ablate
from v3jax.config import DataConfig
from v3jax.evals.needle import needle, with_yarn
from v3jax.models import open_model
from v3jax.report import Needles

_SEEDS = flags.DEFINE_list("seeds", ["0"], "Values of run.seed.")
_FOLDER = flags.DEFINE_string("folder", "runs/long_context", "Where the runs are.")
_NEEDLES = flags.DEFINE_integer("needles", 4, "Contexts of a cell.", lower_bound=1)
_PHASES = flags.DEFINE_list("phases", ["v3_tiny_ctx1k"], "Experiments that extend the context.")

BASE = "v3_tiny_base"
FACTS = "key_values"


def main(argv: list[str]) -> None:
    del argv
    host.prepare()
    found = {f"with {FACTS}": [], f"without {FACTS}": []}
    for seed in map(int, _SEEDS.value):
        for kept, runs in zip(found.values(), _train(seed), strict=True):
            kept.append(_measured(seed, runs))
    for name, seeds in found.items():
        print(f"\n{name}, mean of seeds {', '.join(_SEEDS.value)}; right answers by tokens")
        print(table([one["needles"] for one in seeds]))
        for one in seeds:
            print(f"seed {one['seed']}: " + minutes(one["seconds"]))
    rows = short(found, registry.get(_PHASES.value[0]).data.seq_len)
    print("\n" + markdown(list(rows[0]), [list(row.values()) for row in rows]))
    results = {"needles a cell": _NEEDLES.value, "found": rows, "runs": found}
    keep("long_context", called("long_context"), results)


def _train(seed: int) -> list[dict[str, Run]]:
    """The base and every phase on it, finished: with facts, and without."""
    chains: list[dict[str, Run]] = [{}, {}]
    for name in (BASE, *_PHASES.value):
        cfg = registry.get(name)
        variants = {name: [], f"{name}_without": [f"data.mixture={without(cfg.data)}"]}
        for changes, chain in zip(variants.values(), chains, strict=True):
            if chain:
                changes.append(f"init_from={list(chain.values())[-1].folder}")
        runs = ablate(name, variants, folder=_FOLDER.value, seeds=[seed], workers=2)
        for chain, (run,) in zip(chains, runs.values(), strict=True):
            chain[name] = run
    return chains


def without(data: DataConfig) -> tuple[tuple[float, tuple[float, ...]], ...]:
    """The mixture that draws no facts: the other sources in their proportions."""
    kept = [source.name != FACTS for source in data.sources]
    return tuple(
        (until, tuple(weight * keep for weight, keep in zip(weights, kept, strict=True)))
        for until, weights in data.mixture
    )


def _measured(seed: int, runs: dict[str, Run]) -> dict[str, Any]:
    """What each model of a chain finds, and how long it was trained."""
    base, longest = runs[BASE], runs[_PHASES.value[0]].cfg.data.seq_len
    found = {
        f"{BASE}, no YaRN": _search(base, longest),
        f"{BASE}, YaRN untrained": _search(base, longest, factor=40.0),
    }
    for name in _PHASES.value:
        found[name] = _search(runs[name], runs[name].cfg.data.seq_len)
    return {
        "seed": seed,
        "seconds": {
            name: sum(row["step_seconds"] for row in run.rows) for name, run in runs.items()
        },
        "needles": {name: vars(one) for name, one in found.items()},
    }


def _search(run: Run, longest: int, factor: float | None = None) -> Needles:
    loaded = open_model(run.folder)
    if factor is not None:
        loaded = with_yarn(loaded, factor)
    found = needle(loaded, longest=longest, n_needles=_NEEDLES.value)
    print(f"{run.variant}: {found.exact:.1%} of needles found up to {longest}", file=sys.stderr)
    return found


def short(found: dict[str, list[dict[str, Any]]], longest: int) -> list[dict[str, str]]:
    """Right answers at some lengths and in all, of each model searched up to `longest`."""
    rows, at = [], [longest * n // 8 for n in (1, 2, 4, 6, 8)]
    for kind, seeds in found.items():
        for name in seeds[0]["needles"]:
            some = [Needles(**one["needles"][name]) for one in seeds]
            if some[0].lengths[-1] == longest:
                shares = np.mean([one.exact_L for one in some], axis=0)
                by_length = dict(zip(some[0].lengths, shares, strict=True))
                rows.append(
                    {"needles found": f"{name}, {kind}"}
                    | {f"{n:,} tokens": f"{by_length[n]:.0%}" for n in at}
                    | {"all 15 lengths": f"{shares.mean():.1%}"}
                )
    return rows


def table(seeds: list[dict[str, dict[str, Any]]]) -> str:
    """Right answers of each model by length, the mean of all seeds."""
    lines = []
    by_length: dict[tuple[int, ...], list[list[str]]] = {}
    for name in seeds[0]:
        some = [Needles(**one[name]) for one in seeds]
        shares = np.mean([one.exact_L for one in some], axis=0)
        cells = [name, *(f"{share:.0%}" for share in shares)]
        by_length.setdefault(tuple(some[0].lengths), []).append(cells)
    for lengths, rows in by_length.items():
        lines.append(markdown(["model", *map(str, lengths)], rows))
    return "\n\n".join(lines)


def minutes(seconds: dict[str, float]) -> str:
    """Training time of each run."""
    return ", ".join(f"{name} {value / 60:.1f} minutes" for name, value in seconds.items())


if __name__ == "__main__":
    app.run(main)
