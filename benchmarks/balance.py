"""How balanced each strategy leaves the experts: `v3_tiny` under each, on three seeds.

    python -m benchmarks.balance [--strategies=loss_free,none] [--seeds=0,1,2]

Prints the mean over the last 20 steps of MaxViolation, `(max load - mean) / mean` of the batch
averaged over MoE layers, and the held-out loss, each with half of its 95% interval over the seeds.
Only `balance.strategy` and `run.seed` differ.
"""

import sys
import tempfile

from absl import app, flags

from v3jax import host
from v3jax.ablation import ablate, closing, table

_STRATEGIES = flags.DEFINE_list("strategies", ["loss_free", "none"], "Values of balance.strategy.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Values of run.seed.")


def main(argv: list[str]) -> None:
    del argv
    host.prepare()
    with tempfile.TemporaryDirectory() as folder:
        runs = ablate(
            "v3_tiny",
            {name: [f"balance.strategy={name}"] for name in _STRATEGIES.value},
            folder=folder,
            seeds=[int(seed) for seed in _SEEDS.value],
            settings=["run.checkpoint_every=0"],
            log=sys.stderr,
        )
        figures = {
            "MaxViolation": closing("max_violation", 20),
            "held-out loss": closing("eval_loss", 1),
        }
        for seed, *some in zip(_SEEDS.value, *runs.values(), strict=True):
            for run in some:
                values = "  ".join(f"{take(run):.4f}" for take in figures.values())
                print(f"seed {seed}  {run.variant:10s}  {values}")
        print(table(runs, figures))


if __name__ == "__main__":
    app.run(main)
