"""Step time against the number of experts at a fixed number of active ones.

    python -m benchmarks.experts

A layout whose work is proportional to the tokens routed costs the same with 16, 64 or 256 experts
of one width, where a dense one costs 16 times more from the first to the last. Two things do grow
with the experts, because they hold parameters: the router's product, which `FLOPs` counts, and the
optimizer's pass over all weights, which is timed apart from the gradient.
"""

from dataclasses import replace

from absl import app

from benchmarks.timing import time_gradient, time_step
from v3jax import cost, registry
from v3jax.config import ExperimentConfig
from v3jax.host import reuse_freed_memory


def with_experts(n_experts: int, tokens: int = 8192) -> ExperimentConfig:
    """`v3_peer` with more experts, 4 of them active, all layers MoE, and a larger micro-batch."""
    cfg = registry.get("v3_peer")
    sequences = tokens // cfg.data.seq_len
    return replace(
        cfg,
        model=replace(cfg.model, n_experts=n_experts, top_k=4, expert_ffn_dim=64, n_dense_layers=0),
        batch=replace(cfg.batch, micro_batch=sequences, start=sequences, end=sequences),
    )


def main(argv: list[str]) -> None:
    del argv
    reuse_freed_memory()
    print("experts  parameters  FLOPs  gradient s  ratio  whole step s  ratio")
    base = None
    for n_experts in (16, 64, 256):
        cfg = with_experts(n_experts)
        gradient, step = time_gradient(cfg, n_steps=9), time_step(cfg, n_steps=9)
        flops = cost.flops_per_token(cfg.model, cfg.data.seq_len)
        base = base or (flops, gradient.wall, step.wall)
        total = cost.param_counts(cfg.model).main
        print(
            f"{n_experts:7d}  {total / 1e6:9.1f}M  {flops / base[0]:5.2f}  {gradient.wall:10.3f}  "
            f"{gradient.wall / base[1]:5.2f}  {step.wall:12.3f}  {step.wall / base[2]:5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
