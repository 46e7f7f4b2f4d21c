"""Step time against the number of experts at a fixed number of active ones.

    python -m benchmarks.experts

A layout whose work is proportional to the tokens routed costs the same with 16, 64 or 256 experts
of one width; a dense one costs 16 times more. Two things do grow with the experts because they hold
parameters: reading each weight once, and the optimizer. Enough tokens make the first small; the
second is shown apart.
"""

from dataclasses import replace

from absl import app

from benchmarks.timing import time_step
from v3jax import cost, registry
from v3jax.config import ExperimentConfig
from v3jax.host import reuse_freed_memory


def with_experts(n_experts: int, tokens: int = 8192) -> ExperimentConfig:
    """`v3_peer` with more, narrower experts, 4 of them active, and a larger micro-batch."""
    cfg = registry.get("v3_peer")
    sequences = tokens // cfg.data.seq_len
    return replace(
        cfg,
        model=replace(cfg.model, n_experts=n_experts, top_k=4, expert_ffn_dim=32, n_dense_layers=0),
        batch=replace(cfg.batch, micro_batch=sequences, start=sequences, end=sequences),
    )


def main(argv: list[str]) -> None:
    del argv
    reuse_freed_memory()
    print("experts  parameters  seconds/step  ratio to 16")
    base = None
    for n_experts in (16, 64, 256):
        cfg = with_experts(n_experts)
        timing = time_step(cfg, n_steps=9)
        base = base or timing.wall
        total = cost.param_counts(cfg.model).main
        print(
            f"{n_experts:7d}  {total / 1e6:8.1f}M  {timing.wall:12.3f}  {timing.wall / base:11.2f}"
        )


if __name__ == "__main__":
    app.run(main)
