"""How balanced each strategy leaves the experts: `v3_tiny` under each, on three seeds.

    python -m benchmarks.balance [--strategies=loss_free,none] [--seeds=0,1,2]

Prints the mean over the last 20 steps of MaxViolation, `(max load - mean) / mean` of the batch
averaged over MoE layers, and the held-out loss. Only `balance.strategy` and `run.seed` differ.
"""

import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags

from v3jax import config, registry, train
from v3jax.host import reuse_freed_memory
from v3jax.metrics import read_rows

_STRATEGIES = flags.DEFINE_list("strategies", ["loss_free", "none"], "Values of balance.strategy.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Values of run.seed.")
_LAST = 20


def run_one(strategy: str, seed: str) -> tuple[float, float]:
    """Trains once; the closing MaxViolation and held-out loss."""
    cfg = config.override(
        registry.get("v3_tiny"),
        [f"balance.strategy={strategy}", f"run.seed={seed}", "run.checkpoint_every=0"],
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train.run(cfg, folder)
        rows = read_rows(Path(folder) / "metrics.jsonl")
    violation = float(np.mean([row["max_violation"] for row in rows[-_LAST:]]))
    return violation, result.eval_loss or float("nan")


def main(argv: list[str]) -> None:
    del argv
    reuse_freed_memory()
    lines = []
    for seed in _SEEDS.value:
        for strategy in _STRATEGIES.value:
            violation, loss = run_one(strategy, seed)
            lines.append(f"{seed:>4s}  {strategy:10s}  {violation:12.3f}  {loss:13.4f}")
            print(lines[-1], flush=True)
    print("\nseed  strategy    MaxViolation  held-out loss")
    print("\n".join(lines))


if __name__ == "__main__":
    app.run(main)
