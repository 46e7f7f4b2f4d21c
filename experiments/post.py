"""Supervised fine-tuning (report section 5.1), on a pod and on a laptop.

    python -m v3jax.train --exp=v3_sft --set data.path='chats/*.jsonl'
    python -m v3jax.train --exp=v3_tiny_sft

Conversations as .jsonl lines of `messages`, two epochs. The report gives the learning rates, the
epochs and that samples share rows without seeing each other; the rest is ours: rows of 32K tokens
so that long reasoning fits, prompts that are no targets, no warm-up, MTP trained along at the
weight of pre-training's end, so that drafts keep up with the model they serve
(`optim.frozen=("mtp_layers_0",)` and a weight of 0 leave it as it is), and the router bias frozen,
as in the last 500B tokens of pre-training: chats are another mixture than the one that experts are
balanced for.
"""

from dataclasses import replace

from experiments.tiny import v3_tiny_ctx1k
from experiments.v3 import v3_ctx32k
from v3jax.config import BatchConfig, ExperimentConfig, LrPhase, MeshConfig, SourceConfig
from v3jax.registry import register


def _fine_tuned(cfg: ExperimentConfig, *, tokens: float, lr: float) -> ExperimentConfig:
    """`cfg` made fine-tuning: cosine from `lr` to a fifth of it, two epochs of conversations."""
    return replace(
        cfg,
        data=replace(
            cfg.data,
            format="chat",
            fim_rate=0.0,
            newline_split_rate=0.0,
            isolate_documents=True,
        ),
        optim=replace(
            cfg.optim,
            warmup_steps=0,
            phases=(
                LrPhase(shape="constant", until_tokens=0.0, lr=lr),
                LrPhase(shape="cosine", until_tokens=tokens, lr=lr / 5),
            ),
            ema_decay=None,
        ),
        balance=replace(cfg.balance, bias_speed=((tokens, 0.0),)),
        mtp_weight=((tokens, 0.1),),
        run=replace(cfg.run, total_tokens=tokens, epochs=2.0),
    )


@register
def v3_sft() -> ExperimentConfig:
    """Fine-tuning of the 128K model on 1.5M conversations of your own, on 1024 accelerators."""
    long = v3_ctx32k()
    cfg = replace(
        long,
        name="v3_sft",
        init_from="runs/v3_ctx128k",
        # Half of v3_ctx32k's devices, so that 4.2M tokens a step are 16 micro-batches.
        mesh=MeshConfig(pipe=16, node=8, context=8),
        data=replace(
            long.data, sources=(SourceConfig(name="chats", weight=1.0, max_mb=1e6, path="chats"),)
        ),
        batch=BatchConfig(micro_batch=8, start=128, end=128, ramp_tokens=0.0),
        run=replace(long.run, eval_every=50, eval_sequences=128, checkpoint_every=100),
    )
    # 1.5M instances (report section 5.1) of some 1,000 tokens (ours), twice: what `cost` counts.
    return _fine_tuned(cfg, tokens=3e9, lr=5e-6)


@register
def v3_tiny_sft() -> ExperimentConfig:
    """Fine-tuning of the extended tiny model on `instructions`, two epochs."""
    tiny = v3_tiny_ctx1k()
    cfg = replace(
        tiny,
        name="v3_tiny_sft",
        init_from="runs/v3_tiny_ctx1k",
        data=replace(
            tiny.data,
            sources=(SourceConfig(name="instructions", weight=1.0, max_mb=10.0),),
            mixture=(),
            seq_len=256,  # several conversations
        ),
        batch=BatchConfig(micro_batch=4, start=4, end=4, ramp_tokens=0.0),
        run=replace(tiny.run, eval_every=500, eval_sequences=64, checkpoint_every=500),
    )
    return _fine_tuned(cfg, tokens=1e6, lr=5e-4)


@register
def v3_tiny_expert() -> ExperimentConfig:
    """An expert that works chains out step by step, for `v3jax.distill`: four epochs of them."""
    cfg = v3_tiny_sft()
    start, cosine = cfg.optim.phases
    phases = (replace(start, lr=1e-3), replace(cosine, lr=1e-4))
    return replace(
        cfg,
        name="v3_tiny_expert",
        data=replace(cfg.data, sources=(SourceConfig(name="chains", weight=1.0, max_mb=10.0),)),
        optim=replace(cfg.optim, phases=phases),
        run=replace(cfg.run, epochs=4.0),
    )
