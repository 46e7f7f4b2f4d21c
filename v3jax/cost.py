"""What an experiment costs: from its config and the report's speed, or its compiled step's.

    python -m v3jax.cost --exp=v3_full [--price=2] [--gpu_hours_per_trillion=180000] [--json]
    python -m v3jax.cost --exp=v3_full_v5p --price=4.2 --aot=benchmarks/results/v3_full_v5p.json
    python -m v3jax.cost --exp=v3_full_v5p --price=4.2 --target=tpu:v5p:8x8x8   # compiles first

Counts follow the shapes, not a model in memory. FLOPs a token are 6 for every weight of a matrix
the token meets (2 forward, 4 backward; the head counts, the embedding is a look-up) plus causal
attention, without recomputation: the convention behind the 250 GFLOP and the 39% MFU published
for DeepSeek-V3. GPU hours start from the 180K H800 hours per trillion tokens the DeepSeek-V3
technical report measured (section 1); for other shapes they scale with FLOPs a token, a rough
guide which says nothing of small models that cannot fill a GPU. `--aot` and `--target` take the
speed from the compiled step, which is never slower than the real one.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from v3jax import cli, config, planning, registry
from v3jax.config import ExperimentConfig, ModelConfig
from v3jax.planning import REPORT_HOURS, Plan

REPORT_GPU_HOURS_PER_TRILLION = 180_000.0  # report section 1, H800, v3_full at 4K
H800_PEAK_FLOPS = 989e12  # BF16 without sparsity
_BF16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class ParamCounts:
    """Numbers of parameters; `main` and `mtp` with router biases, `mtp` without shared weights.

    `active` counts the trained weights that serve one token in the main model (published as 37B),
    `active_with_head` leaves out the embedding, `active_body` the head as well.
    """

    embedding: int
    head: int
    main: int
    mtp: int
    mtp_as_stored: int
    active: int
    active_with_head: int
    active_body: int


def param_counts(model: ModelConfig) -> ParamCounts:
    """Parameters of `model`, counted from its shapes (report section 4.2)."""
    embedding = model.vocab_size * model.dim
    router_biases = model.n_moe_layers * model.n_experts
    active_body = _body(model, model.top_k)
    mtp_block = _block(model, _moe_matrices(model, model.n_experts) + model.n_experts)
    mtp = model.mtp_depth * (mtp_block + _mtp_projection(model) + 3 * model.dim)
    return ParamCounts(
        embedding=embedding,
        head=embedding,
        main=_body(model, model.n_experts) + router_biases + 2 * embedding,
        mtp=mtp,
        mtp_as_stored=mtp + 2 * model.mtp_depth * embedding,
        active=active_body + 2 * embedding,
        active_with_head=active_body + embedding,
        active_body=active_body,
    )


def _body(model: ModelConfig, experts_met: int) -> int:
    """Trained weights of all layers and the final norm, `experts_met` routed experts in each."""
    dense = model.n_dense_layers * _block(model, _ffn(model, model.dense_ffn_dim))
    moe = model.n_moe_layers * _block(model, _moe_matrices(model, experts_met))
    return dense + moe + model.dim


def _block(model: ModelConfig, ffn: int) -> int:
    norms = (model.q_latent_dim or 0) + model.kv_latent_dim + 2 * model.dim
    return _mla_matrices(model) + norms + ffn


def _mla_matrices(model: ModelConfig) -> int:
    query = model.n_heads * (model.nope_head_dim + model.rope_head_dim)
    key_value = model.n_heads * (model.nope_head_dim + model.v_head_dim)
    latent = model.q_latent_dim
    return (
        (model.dim * query if latent is None else latent * (model.dim + query))
        + model.dim * (model.kv_latent_dim + model.rope_head_dim)
        + model.kv_latent_dim * key_value
        + model.n_heads * model.v_head_dim * model.dim
    )


def _ffn(model: ModelConfig, width: int) -> int:
    return 3 * model.dim * width


def _moe_matrices(model: ModelConfig, experts_met: int) -> int:
    experts = experts_met + model.n_shared_experts
    return experts * _ffn(model, model.expert_ffn_dim) + model.n_experts * model.dim


def _mtp_projection(model: ModelConfig) -> int:
    return 2 * model.dim * model.dim


def flops_per_token(
    model: ModelConfig, seq_len: int, *, causal: bool = True, mtp: bool = False
) -> float:
    """FLOPs of training on one token, forward and backward, without recomputation.

    `causal` counts half of each attention matrix, as published figures do; `mtp` adds the MTP
    modules, each with its own pass through the head.
    """
    head = model.vocab_size * model.dim
    moe_layer = _mla_matrices(model) + _moe_matrices(model, model.top_k)
    dense_layer = _mla_matrices(model) + _ffn(model, model.dense_ffn_dim)
    matrices = model.n_dense_layers * dense_layer + model.n_moe_layers * moe_layer + head
    n_attentions = model.n_layers
    if mtp:
        matrices += model.mtp_depth * (moe_layer + _mtp_projection(model) + head)
        n_attentions += model.mtp_depth
    return 6 * matrices + n_attentions * _attention_flops(model, seq_len, causal)


def _attention_flops(model: ModelConfig, seq_len: int, causal: bool) -> float:
    """Scores and weighted values of one layer, for one token; backward costs twice the forward."""
    context = seq_len / 2 if causal else seq_len
    head_dims = model.nope_head_dim + model.rope_head_dim + model.v_head_dim
    return 3 * model.n_heads * head_dims * 2 * context


def kv_bytes_per_token(model: ModelConfig) -> int:
    """BF16 bytes a cached token takes: the latent and the shared RoPE key of every layer."""
    return model.n_layers * (model.kv_latent_dim + model.rope_head_dim) * _BF16_BYTES


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Everything `python -m v3jax.cost` prints; `params` as in `ParamCounts`."""

    exp: str
    tokens: float
    steps: int
    tokens_per_step_first: int
    tokens_per_step_last: int
    params: ParamCounts
    flops_per_token: float
    flops_per_token_non_causal: float
    flops_per_token_with_mtp: float
    total_flops: float
    kv_bytes_per_token: int
    gpu_hours_per_trillion: float
    gpu_hours: float
    gpu_hours_at_peak: float
    mfu: float
    n_devices: int
    days: float
    price_per_gpu_hour: float
    dollars: float


def cost(
    cfg: ExperimentConfig, price: float = 2.0, gpu_hours_per_trillion: float | None = None
) -> Cost:
    """The cost of `cfg` at `price` dollars a GPU hour.

    `gpu_hours_per_trillion` is a measured speed in GPU hours per 1e12 tokens; None takes the
    report's, scaled by FLOPs a token.

    Raises:
      ValueError: a negative price or a speed that is not positive.
    """
    if price < 0:
        raise ValueError(f"--price={price}: must not be negative")
    if gpu_hours_per_trillion is not None and gpu_hours_per_trillion <= 0:
        raise ValueError(f"--gpu_hours_per_trillion={gpu_hours_per_trillion}: must be positive")
    from v3jax.optim.schedules import n_steps  # brings jax, which a usage error need not wait for

    flops = flops_per_token(cfg.model, cfg.data.seq_len)
    trillions = cfg.run.total_tokens / 1e12
    speed = gpu_hours_per_trillion or REPORT_GPU_HOURS_PER_TRILLION * flops / _report_flops()
    hours = speed * trillions
    total_flops = flops * cfg.run.total_tokens
    at_peak = total_flops / H800_PEAK_FLOPS / 3600
    return Cost(
        exp=cfg.name,
        tokens=cfg.run.total_tokens,
        steps=n_steps(cfg),
        tokens_per_step_first=cfg.batch.start * cfg.data.seq_len,
        tokens_per_step_last=cfg.batch.end * cfg.data.seq_len,
        params=param_counts(cfg.model),
        flops_per_token=flops,
        flops_per_token_non_causal=flops_per_token(cfg.model, cfg.data.seq_len, causal=False),
        flops_per_token_with_mtp=flops_per_token(cfg.model, cfg.data.seq_len, mtp=True),
        total_flops=total_flops,
        kv_bytes_per_token=kv_bytes_per_token(cfg.model),
        gpu_hours_per_trillion=speed,
        gpu_hours=hours,
        gpu_hours_at_peak=at_peak,
        mfu=at_peak / hours,
        n_devices=cfg.mesh.n_devices,
        days=hours / cfg.mesh.n_devices / 24,
        price_per_gpu_hour=price,
        dollars=hours * price,
    )


def _report_flops() -> float:
    """FLOPs a token of the model whose speed the report measured."""
    full = registry.get("v3_full")
    return flops_per_token(full.model, full.data.seq_len)


def table(c: Cost) -> str:
    """The cost as aligned lines of text."""
    p = c.params
    rows = [
        ("tokens", f"{c.tokens:,.0f}"),
        ("steps", f"{c.steps:,}"),
        ("tokens a step", f"{c.tokens_per_step_first:,} to {c.tokens_per_step_last:,}"),
        ("parameters, main model", f"{p.main:,}"),
        ("parameters, MTP modules", f"{p.mtp:,} ({p.mtp_as_stored:,} with embedding and head)"),
        ("active a token", f"{p.active:,}"),
        ("  without embedding", f"{p.active_with_head:,}"),
        ("  without embedding and head", f"{p.active_body:,}"),
        ("training FLOPs a token", _giga(c.flops_per_token)),
        ("  attention not causal", _giga(c.flops_per_token_non_causal)),
        ("  with MTP", _giga(c.flops_per_token_with_mtp)),
        ("training FLOPs", f"{c.total_flops:.4g}"),
        ("KV cache a token, BF16", f"{c.kv_bytes_per_token:,} bytes"),
        ("H800 hours per 1e12 tokens", f"{c.gpu_hours_per_trillion:,.6g}"),
        ("H800 hours", f"{c.gpu_hours:,.7g}"),
        ("  at the BF16 peak", f"{c.gpu_hours_at_peak:,.7g} (MFU {c.mfu:.1%})"),
        (f"days on {c.n_devices:,} devices", f"{c.days:,.3g}"),
        (f"dollars at {c.price_per_gpu_hour:g} an hour", f"{c.dollars:,.2f}"),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(
        [f"{'experiment':<{width}}  {c.exp}", *(f"{k:<{width}}  {v}" for k, v in rows)]
    )


def report_total(price: float) -> str:
    """The report's own bill: all phases in H800 hours, and money."""
    phases = " + ".join(f"{hours:,.0f} {name}" for name, hours in REPORT_HOURS.items())
    total = sum(REPORT_HOURS.values())
    return f"the report's run: {phases} = {total:,.0f} H800 hours, {total * price:,.0f} dollars"


def report_plan(cfg: ExperimentConfig, c: Cost) -> Plan:
    """The cost as a plan: at the report's speed, or at the one that was given."""
    return planning.plan(
        cfg,
        source="the report's speed" if cfg.name == "v3_full" else "speed as given or scaled",
        n_devices=c.n_devices,
        device_seconds_per_token=c.gpu_hours_per_trillion * 3600 / 1e12,
        mfu=c.mfu,
        bubble=planning.REPORT_BUBBLE if cfg.mesh.pipe > 1 else 0.0,
        price=c.price_per_gpu_hour,
    )


def plan_table(cfg: ExperimentConfig, base: Plan, flops: float) -> str:
    """A plan and what moves it, as lines of text."""
    lines = [
        f"plan: {base.source}",
        f"  {base.days:,.3g} days on {base.n_devices:,} devices, {base.device_hours:,.0f} device "
        f"hours, {base.dollars:,.0f} dollars; MFU {base.mfu:.1%}, "
        f"{base.tokens_per_second:,.0f} tokens/s a device",
        "days if one thing were otherwise:",
    ]
    changed = planning.sensitivity(cfg, base, flops)
    width = max(len(label) for label, _ in changed)
    return "\n".join([*lines, *(f"  {label:<{width}}  {days:,.3g}" for label, days in changed)])


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.1f} GFLOP" if flops >= 1e9 else f"{flops / 1e9:.4g} GFLOP"


def main(argv: Sequence[str]) -> int:
    """Prints the table; a wrong experiment, field or number is one line and exit code 2."""
    values = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r} is no flag; see --help")
        if values.exp is None:
            raise ValueError(f"--exp: name one of {', '.join(registry.names())}")
        cfg = config.override(registry.get(values.exp), values.set)
        result = cost(cfg, values.price, values.gpu_hours_per_trillion)
        base = _plan(cfg, result)
    except ValueError as error:
        return cli.fail("cost", error, cli.USAGE)
    flops = result.flops_per_token
    if values.json:
        changed = dict(planning.sensitivity(cfg, base, flops))
        whole = dataclasses.asdict(result) | {
            "plan": dataclasses.asdict(base),
            "days_if": changed,
            "report_gpu_hours": REPORT_HOURS,
        }
        print(json.dumps(whole))
    else:
        print(table(result))
        print(plan_table(cfg, base, flops))
        print(report_total(values.price))
    return 0


def _plan(cfg: ExperimentConfig, result: Cost) -> Plan:
    values = flags.FLAGS
    if values.aot is not None and values.target is not None:
        raise ValueError("--aot and --target exclude each other")
    if values.aot is not None:
        return planning.from_program(cfg, planning.read_program(Path(values.aot)), values.price)
    if values.target is not None:
        program = planning.compile_program(values.exp, values.target, values.set)
        return planning.from_program(cfg, program, values.price)
    return report_plan(cfg, result)


if __name__ == "__main__":
    flags.DEFINE_string("exp", None, "A registered experiment, or path/to/file.py.")
    flags.DEFINE_multi_string("set", [], "path.to.field=value; may be repeated.")
    flags.DEFINE_float("price", 2.0, "Dollars a GPU hour.")
    flags.DEFINE_float("gpu_hours_per_trillion", None, "Measured GPU hours per 1e12 tokens.")
    flags.DEFINE_string("aot", None, "Report of v3jax.aot --json to take the speed from.")
    flags.DEFINE_string("target", None, "Target of v3jax.aot to compile for, minutes.")
    flags.DEFINE_boolean("json", False, "Print one JSON object.")
    cli.run("cost", main)
