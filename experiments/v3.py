"""DeepSeek-V3 as the technical report (arXiv 2412.19437) states it.

    python -m v3jax.train --exp=v3_full            # on the pod of its mesh: 2048 accelerators
    python -m v3jax.train --exp=v3_ctx32k          # then its context extended, 4K to 32K to 128K
    python -m v3jax.aot --exp=v3_full_v5p --target=tpu:v5p:8x8x8   # its step, compiled here
    python -m v3jax.cost --exp=v3_full             # tokens, steps, FLOPs, GPU hours
    python -m v3jax.train --exp=v3_small           # about 100M parameters, one GPU

Values the report leaves open are marked "ours".
"""

from dataclasses import replace

from v3jax.config import (
    BalanceConfig,
    BatchConfig,
    DataConfig,
    ExperimentConfig,
    LrPhase,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    NumericsConfig,
    OptimConfig,
    PipelineConfig,
    RunConfig,
    SourceConfig,
    YarnConfig,
    scaled_to,
)
from v3jax.registry import register

# What every Python installation carries, read in place. Weights are ours.
EMBEDDED_SOURCES = (
    SourceConfig(name="stdlib", weight=0.45, max_mb=40.0),
    SourceConfig(name="pydoc_topics", weight=0.05, max_mb=2.0),
    SourceConfig(name="package:jax", weight=0.15, max_mb=20.0),
    SourceConfig(name="package:numpy", weight=0.15, max_mb=20.0),
    SourceConfig(name="package:scipy", weight=0.20, max_mb=30.0),
)


@register
def v3_full() -> ExperimentConfig:
    """DeepSeek-V3, 671B parameters, 14.8T tokens, on 2048 accelerators."""
    return ExperimentConfig(
        name="v3_full",
        model=ModelConfig(
            vocab_size=129_280,  # 128,815 ids padded to a multiple of 640 (released checkpoint)
            dim=7168,  # section 4.2, model hyper-parameters, down to mtp_depth
            n_layers=61,
            n_dense_layers=3,
            n_heads=128,
            q_latent_dim=1536,
            kv_latent_dim=512,
            nope_head_dim=128,
            rope_head_dim=64,
            v_head_dim=128,
            dense_ffn_dim=18_432,
            expert_ffn_dim=2048,
            n_shared_experts=1,
            n_experts=256,
            top_k=8,
            n_groups=8,  # one group a node, section 3.2.2
            top_groups=4,
            route_scale=2.5,  # released config
            mtp_depth=1,
            norm_eps=1e-6,  # released config
            latent_norm_eps=1e-6,  # released code
            rope_base=10_000.0,
            yarn=None,  # from section 4.3 on only
            init_std=0.006,
        ),
        numerics=NumericsConfig(
            compute="bf16",
            moments="bf16",  # section 3.3.3
            # Section 3.2.3 keeps what is sent to experts, in FP8: in BF16 17 chunks of it are too
            # much for 80 GB. "report" keeps it.
            remat="full",
        ),
        mesh=MeshConfig(pipe=16, data=2, node=8, expert=8),  # section 3.2: PP16, EP64 over 8 nodes
        # Section 3.2.1. Ours: no weight gradient waits, so that memory suffices; a pair takes two
        # thirds of its parts, an assumption by which ranks wait for each other to run pairs.
        pipeline=PipelineConfig(schedule="dualpipe", most_waiting=0, pair_time=2.0),
        moe=MoEConfig(bound_factor=1.5),  # ours: smaller buffers
        data=DataConfig(
            sources=EMBEDDED_SOURCES,  # a pod run names its own shards by data.path
            seq_len=4096,  # section 4.2
            heldout_fraction=0.001,  # ours
            fim_rate=0.1,  # section 4.1
            newline_split_rate=0.1,  # section 4.1 says "a certain proportion"; 0.1 is ours
            tokenizer_vocab_size=128_815,  # section 4.1: 128K, with the special tokens
        ),
        batch=BatchConfig(
            micro_batch=128,  # one sequence for each of the 128 data-parallel ranks
            start=3072,  # section 4.2
            end=15_360,
            ramp_tokens=469e9,
        ),
        optim=OptimConfig(
            beta1=0.9,  # section 4.2
            beta2=0.95,
            eps=1e-8,  # ours
            weight_decay=0.1,
            clip_norm=1.0,
            warmup_steps=2000,
            phases=(
                LrPhase(shape="constant", until_tokens=10e12, lr=2.2e-4),
                LrPhase(shape="cosine", until_tokens=14.3e12, lr=2.2e-5),  # 4.3T tokens
                LrPhase(shape="constant", until_tokens=14.633e12, lr=2.2e-5),  # 333B
                LrPhase(shape="constant", until_tokens=14.8e12, lr=7.3e-6),  # 167B
            ),
            ema_decay=0.999,  # section 3.2.3 keeps an EMA; its decay is ours
        ),
        balance=BalanceConfig(
            strategy="loss_free",
            bias_speed=((14.3e12, 0.001), (14.8e12, 0.0)),  # section 4.2
            sequence_alpha=0.0001,
            aux_alpha=0.001,  # the baseline of section 4.5.2, strength from DeepSeek-V2-Lite
        ),
        mtp_weight=((10e12, 0.3), (14.8e12, 0.1)),  # section 4.2
        run=RunConfig(
            total_tokens=14.8e12,  # section 4.1
            seed=0,
            eval_every=1000,  # this line and the rest are ours
            eval_sequences=1024,
            checkpoint_every=500,
            keep_checkpoints=3,
            max_bad_steps=10,
        ),
    )


# ---- Layouts of v3_full that need no pipeline. All is ours: the report trains on one cluster.


def _unpiped(name: str, mesh: MeshConfig, batch: BatchConfig) -> ExperimentConfig:
    """`v3_full` with weights, moments and gradients split over all devices, gathered layer by
    layer, and every block computed again in the backward pass: a device keeps a block's input."""
    full = v3_full()
    return replace(
        full,
        name=name,
        numerics=replace(full.numerics, remat="full"),
        mesh=replace(mesh, storage="fsdp"),
        pipeline=PipelineConfig(),
        batch=batch,
    )


@register
def v3_full_v5p() -> ExperimentConfig:
    """v3_full on 512 TPU v5p (8x8x8): experts over an 8x8 plane of the torus, data on the rest."""
    batch = replace(v3_full().batch, micro_batch=1536)  # three sequences a chip
    return _unpiped("v3_full_v5p", MeshConfig(data=8, expert=64), batch)


@register
def v3_full_tpu7x() -> ExperimentConfig:
    """v3_full on 256 TPU7x (4x8x8), 512 devices: as v3_full_v5p."""
    batch = replace(v3_full().batch, micro_batch=1536)
    return _unpiped("v3_full_tpu7x", MeshConfig(data=8, expert=64), batch)


@register
def v3_full_h100() -> ExperimentConfig:
    """v3_full on 2048 H100 (256 hosts of 8): experts over 8 hosts, as in the report."""
    # Two sequences a GPU. 15,360 sequences are 7.5 on each of 2048: the next whole number, and the
    # first batch in proportion.
    batch = replace(v3_full().batch, micro_batch=4096, start=4096, end=16_384)
    return _unpiped("v3_full_h100", MeshConfig(data=32, node=8, expert=8), batch)


# ---- Long context, section 4.3: 1000 steps at 32K, then 1000 at 128K


def _extended(
    name: str, seq_len: int, batch: BatchConfig, mesh: MeshConfig, start: str
) -> ExperimentConfig:
    """`v3_full` continued on longer rows that `mesh.context` devices share, 4,096 tokens each."""
    full = v3_full()
    total = 1000.0 * batch.end * seq_len
    return replace(
        full,
        name=name,
        model=replace(
            full.model,
            yarn=YarnConfig(
                factor=40.0,
                original_seq_len=4096,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,  # sqrt(t) = 0.1 ln s + 1
            ),
        ),
        mesh=mesh,
        data=replace(full.data, seq_len=seq_len),
        batch=batch,
        optim=replace(
            full.optim,
            warmup_steps=0,  # ours
            phases=(LrPhase(shape="constant", until_tokens=total, lr=7.3e-6),),
        ),
        balance=replace(full.balance, bias_speed=((total, 0.0),)),  # ours: as pre-training ends
        mtp_weight=((total, 0.1),),  # ours: as pre-training ends
        run=replace(
            full.run,
            total_tokens=total,
            eval_every=100,
            eval_sequences=full.run.eval_sequences * full.data.seq_len // seq_len,
            checkpoint_every=100,
        ),
        init_from=start,  # weights and router biases; moments and average start anew: ours
    )


@register
def v3_ctx32k() -> ExperimentConfig:
    """v3_full extended to 32K tokens: 62.9B tokens, on 2048 accelerators."""
    # 1920 * 32,768 = 62,914,560 tokens a step, those of v3_full's largest batch; also as many
    # micro-batches, 120, and as many tokens a device. Eight devices of a host share a row.
    return _extended(
        "v3_ctx32k",
        32_768,
        BatchConfig(micro_batch=16, start=1920, end=1920, ramp_tokens=0.0),
        MeshConfig(pipe=16, data=2, node=8, context=8),
        "runs/v3_full",
    )


@register
def v3_ctx128k() -> ExperimentConfig:
    """v3_ctx32k extended to 128K tokens: 62.9B tokens, on 2048 accelerators."""
    # 480 * 131,072 = 62,914,560 tokens a step. 32 devices share a row, so the fast hop of the
    # exchange of tokens spans four hosts here, and the slow one has two ends.
    return _extended(
        "v3_ctx128k",
        131_072,
        BatchConfig(micro_batch=4, start=480, end=480, ramp_tokens=0.0),
        MeshConfig(pipe=16, data=2, node=2, context=32),
        "runs/v3_ctx32k",
    )


def _extended_unpiped(name: str, cfg: ExperimentConfig, mesh: MeshConfig) -> ExperimentConfig:
    """The same on 512 devices without a pipeline: a row's 4,096 tokens a device."""
    shards = mesh.data * mesh.node * mesh.expert
    batch = replace(cfg.batch, micro_batch=shards)
    unpiped = _unpiped(name, mesh, batch)
    return replace(cfg, name=name, mesh=unpiped.mesh, pipeline=unpiped.pipeline, batch=batch)


@register
def v3_ctx32k_v5p() -> ExperimentConfig:
    """v3_ctx32k on 512 TPU v5p (8x8x8): experts over an 8x8 plane of the torus, rows on a line."""
    mesh = MeshConfig(data=8, context=8, expert=8)
    return _extended_unpiped("v3_ctx32k_v5p", v3_ctx32k(), mesh)


@register
def v3_ctx128k_v5p() -> ExperimentConfig:
    """v3_ctx128k on 512 TPU v5p (8x8x8)."""
    mesh = MeshConfig(data=8, context=32, expert=2)
    return _extended_unpiped("v3_ctx128k_v5p", v3_ctx128k(), mesh)


@register
def v3_small() -> ExperimentConfig:
    """About 100M parameters, 1B tokens, for one GPU; every schedule scaled to its length."""
    full = v3_full()
    cfg = replace(
        full,
        name="v3_small",
        model=replace(
            full.model,
            vocab_size=32_768,
            dim=512,
            n_layers=8,
            n_dense_layers=1,
            n_heads=8,
            q_latent_dim=192,
            kv_latent_dim=128,
            nope_head_dim=64,
            rope_head_dim=32,
            v_head_dim=64,
            dense_ffn_dim=1536,
            expert_ffn_dim=192,
            n_experts=32,
            top_k=4,
            n_groups=4,
            top_groups=2,
            init_std=0.006,
        ),
        numerics=replace(full.numerics, remat="none"),
        mesh=MeshConfig(),
        pipeline=PipelineConfig(),
        moe=MoEConfig(),
        data=replace(full.data, seq_len=1024, tokenizer_vocab_size=32_768, heldout_fraction=0.02),
        batch=BatchConfig(micro_batch=16, start=64, end=256, ramp_tokens=full.batch.ramp_tokens),
        optim=replace(full.optim, warmup_steps=100),
        run=replace(full.run, eval_every=200, eval_sequences=128, checkpoint_every=500),
    )
    return scaled_to(cfg, 1e9)
