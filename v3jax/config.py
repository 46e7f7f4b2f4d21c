"""Every knob of a run, as frozen dataclasses. Imports nothing of the package.

An experiment is one `ExperimentConfig`; architecture numbers have no defaults. Quantities named
`..._tokens` count tokens consumed, `..._steps` committed optimizer steps, and batches are counted
in sequences, as in the DeepSeek-V3 technical report (arXiv 2412.19437, section 4.2).
"""

import ast
import dataclasses
import difflib
import hashlib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

CHECKPOINT_FORMAT = 2
"""Version of the run directory's checkpoint layout; raised whenever it changes incompatibly."""

Schedule = tuple[tuple[float, float], ...]
"""Piecewise-constant value over tokens: `((until_tokens, value), ...)`, `until` rising."""


def _require(ok: bool, field: str, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{field}: {remedy}")


def _require_rising(schedule: Schedule, field: str) -> None:
    untils = [until for until, _ in schedule]
    _require(len(untils) > 0, field, "needs at least one (until_tokens, value) pair")
    _require(untils == sorted(set(untils)), field, f"token boundaries must rise, got {untils}")


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (report section 4.3)."""

    factor: float
    original_seq_len: int
    beta_fast: float
    beta_slow: float
    mscale: float

    def __post_init__(self) -> None:
        _require(self.factor >= 1, "yarn.factor", "must be at least 1")
        _require(self.original_seq_len > 0, "yarn.original_seq_len", "must be positive")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes of the network (report sections 2.1, 2.2 and 4.2)."""

    vocab_size: int
    dim: int
    n_layers: int
    n_dense_layers: int
    n_heads: int
    q_latent_dim: int | None
    """None projects queries in one step, as the smallest V2 model does."""
    kv_latent_dim: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    dense_ffn_dim: int
    expert_ffn_dim: int
    n_shared_experts: int
    n_experts: int
    top_k: int
    n_groups: int
    top_groups: int
    route_scale: float
    mtp_depth: int
    norm_eps: float
    latent_norm_eps: float
    """Of the norms of the two latents."""
    rope_base: float
    yarn: YarnConfig | None
    init_std: float
    router_bias: Literal["added", "multiplied"] = "added"
    """How a router's bias enters its choice: `s + b` as in the report, or `s (1 + b)`, a variant of
    the loss-free balancing paper (arXiv 2408.15664, section 4.3)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name not in (
                "n_dense_layers",
                "mtp_depth",
                "n_shared_experts",
            ):
                _require(value > 0, f"model.{field.name}", f"must be positive, got {value}")
        _require(
            0 <= self.n_dense_layers <= self.n_layers,
            "model.n_dense_layers",
            "must be within 0..n_layers",
        )
        _require(self.n_shared_experts >= 0, "model.n_shared_experts", "must not be negative")
        _require(self.mtp_depth >= 0, "model.mtp_depth", "must not be negative")
        _require(
            self.rope_head_dim % 2 == 0, "model.rope_head_dim", "must be even: RoPE rotates pairs"
        )
        _require(
            self.n_experts % self.n_groups == 0,
            "model.n_groups",
            f"{self.n_groups} groups do not divide {self.n_experts} experts",
        )
        _require(
            1 <= self.top_groups <= self.n_groups,
            "model.top_groups",
            f"must be within 1..n_groups={self.n_groups}, got {self.top_groups}",
        )
        group_size = self.n_experts // self.n_groups
        _require(
            self.top_k <= self.top_groups * group_size,
            "model.top_k",
            f"{self.top_k} experts do not fit in {self.top_groups} kept groups of {group_size}",
        )

    @property
    def n_moe_layers(self) -> int:
        return self.n_layers - self.n_dense_layers

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the network's groups of parameters."""
        layers = ("dense_layers",) * (self.n_dense_layers > 0)
        layers += ("moe_layers",) * (self.n_moe_layers > 0)
        modules = tuple(f"mtp_layers_{k}" for k in range(self.mtp_depth))
        return ("embed_tokens", *layers, *modules, "norm", "lm_head")


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """How `numerics.compute=fp8` multiplies; by default as the report (sections 3.3.2, 3.3.3)."""

    tile: int = 128
    """Channels of a token, and tokens of a channel, that share a scale."""
    block: int = 128
    """Rows and columns of a weight that share a scale."""
    promotion: int = 128
    """Elements of the contraction after which sums are scaled and added up in FP32."""
    power_of_two: Literal["none", "report", "all"] = "report"
    """Scales rounded up to a power of two: `report`, of the input of attention's output projection,
    of tokens and their gradients on the way to experts, and wherever such values are tiled anew;
    `all`, of every activation and gradient."""
    gradients: Literal["tiles", "blocks"] = "tiles"
    """Tiling of the gradients that input gradients are computed from; `blocks`, of the weights'
    kind, makes large models diverge (report appendix B.2)."""
    dispatch: Literal["fp8", "bf16"] = "fp8"
    """What tokens, and on the way back their gradients, travel to experts in (section 3.3.3)."""
    backend: Literal["auto", "xla", "kernel"] = "auto"
    """`kernel` insists on the Pallas kernels, `xla` on none; `auto` takes them where they run."""

    def __post_init__(self) -> None:
        for name in ("tile", "block", "promotion"):
            size = getattr(self, name)
            _require(
                size >= 16 and size & (size - 1) == 0,
                f"numerics.fp8.{name}",
                f"{size} is not a power of two from 16 on",
            )
        least = min(self.tile, self.block)
        _require(
            self.promotion <= least,
            "numerics.fp8.promotion",
            f"{self.promotion} is more than a scale holds for; at most {least}, the smaller of "
            "numerics.fp8.tile and numerics.fp8.block",
        )
        sizes = (self.tile, self.block, self.promotion)
        _require(
            self.backend != "kernel" or sizes == (128, 128, 128),
            "numerics.fp8.backend",
            "the kernels are for tile, block and promotion of 128; set backend=xla",
        )


@dataclass(frozen=True, kw_only=True)
class NumericsConfig:
    """Number formats: `compute` of activations and matrix products, `moments` of AdamW.

    Master weights, gradients, router, norms' statistics and the loss are always FP32
    (report section 3.3). `fp8` multiplies in FP8 in every linear map but embedding, head, router
    and MTP's projection, all else in BF16; `fp64` computes everything in FP64, to compare programs
    to the last bits.
    """

    compute: Literal["fp8", "bf16", "fp32", "fp64"]
    moments: Literal["bf16", "fp32"]
    remat: Literal["none", "report", "full"]
    fp8: Fp8Config = Fp8Config()


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each named mesh axis; all axes are always present (report section 3.2).

    The batch is split over data, node and expert, experts over node, context and expert; `node` is
    the slow network between hosts, `context` and `expert` the fast ones within. The positions of a
    row are split over context, for long sequences (section 4.3): see `ops.zigzag`. Layers are split
    over pipe, see `PipelineConfig`.
    """

    pipe: int = 1
    data: int = 1
    node: int = 1
    context: int = 1
    expert: int = 1
    storage: Literal["whole", "zero1", "fsdp"] = "zero1"
    """Where master weights, moments and average lie. `whole`: on every device that computes with
    them; `zero1`: split over the whole data-parallel group, weights gathered once a step; `fsdp`:
    the same, gathered layer by layer where they are used."""
    deterministic: bool = False
    """Gradients are gathered and added in the devices' order, so that no network's own order of
    addition shows in the last bits; slower."""

    def __post_init__(self) -> None:
        for axis in ("pipe", "data", "node", "context", "expert"):
            _require(getattr(self, axis) >= 1, f"mesh.{axis}", "must be at least 1")

    @property
    def sizes(self) -> str:
        """The sizes of its axes, as a message names them."""
        of = {"pipe": self.pipe, "data": self.data, "node": self.node, "context": self.context}
        return " x ".join(f"{axis}={n}" for axis, n in (of | {"expert": self.expert}).items())

    @property
    def n_devices(self) -> int:
        return self.pipe * self.data * self.node * self.context * self.expert

    @property
    def batch_shards(self) -> int:
        return self.data * self.node * self.expert

    @property
    def token_shards(self) -> int:
        """Devices that have tokens of their own: parts of the batch, and of each of its rows."""
        return self.batch_shards * self.context

    @property
    def expert_shards(self) -> int:
        return self.node * self.context * self.expert


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How micro-batches pass through the layers that `mesh.pipe` ranks share (report 3.2.1).

    `dualpipe` and `dualpipev` take any number of micro-batches; with fewer than twice the ranks, or
    an odd number, some places of their schedule stay empty.
    """

    schedule: Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"] = "dualpipe"
    mode: Literal["branches", "masked"] = "branches"
    """`branches`: a rank runs what its schedule says, and others something else at that time.
    `masked`: all ranks run what any of them has to, and drop what was not asked of them; slower,
    but a layer may then exchange messages of every kind."""
    pair_time: float = 3.0
    """Time of a forward and a backward that overlap, in forwards; one after the other they take 3.
    Below that, ranks wait for one another to run pairs if this makes a step shorter."""
    most_waiting: int | None = None
    """Weight gradients of a rank that may wait for a better time, which holds what they are made
    of; None as many as the schedule has. With 0 DualPipe's bubble on 16 ranks is 14, not 7."""

    def __post_init__(self) -> None:
        _require(
            2 <= self.pair_time <= 3,
            "pipeline.pair_time",
            f"must be within 2..3 forwards, got {self.pair_time:g}",
        )
        _require(
            self.most_waiting is None or self.most_waiting >= 0,
            "pipeline.most_waiting",
            "must not be negative, or None",
        )

    @property
    def chunks(self) -> int:
        """Stages of one direction that a rank holds."""
        return 2 if self.schedule == "dualpipev" else 1


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """How tokens travel to their experts and back (report section 3.2.2).

    `bound_factor`: receive buffers hold so many times the rows of a balanced batch; what does not
    fit takes extra passes, and nothing is dropped. `dispatch_chunks` splits a device's tokens, so
    that the exchange of one part can overlap the experts of another. `capacity_factor` drops
    choices beyond that many times an expert's even share of a device's tokens: for comparison
    only, None (never) in the report.
    """

    bound_factor: float = 2.0
    dispatch_chunks: int = 1
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        _require(self.bound_factor > 0, "moe.bound_factor", "must be positive")
        _require(self.dispatch_chunks >= 1, "moe.dispatch_chunks", "must be at least 1")
        _require(
            self.capacity_factor is None or self.capacity_factor > 0,
            "moe.capacity_factor",
            "must be positive, or None to drop nothing",
        )


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One corpus source. `weight` is its share of the mixture, `max_mb` a cap on its raw text.

    `name` is one of the embedded sources (`stdlib`, `pydoc_topics`, `arithmetic`, `key_values`,
    `refrains`, `package:NAME`; of conversations `instructions` and `chains`) or a free name with
    `path` pointing at a file, directory or glob of .txt, .md, .py or .jsonl files.
    """

    name: str
    weight: float
    max_mb: float
    path: str | None = None
    text_field: str = "text"

    def __post_init__(self) -> None:
        _require(self.weight > 0, f"data.sources[{self.name}].weight", "must be positive")
        _require(self.max_mb > 0, f"data.sources[{self.name}].max_mb", "must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how it becomes sequences (report sections 4.1 and 4.2).

    `path` replaces `sources` by a user's own file, directory or glob, or by a folder of prepared
    rows (`data.dataset`). `synthetic` ignores both and draws uniform token ids, for speed
    measurements. `isolate_documents` confines attention and targets to a document: off in
    pre-training (section 4.1), on in fine-tuning (section 5.1), where every document's positions
    begin anew.
    """

    sources: tuple[SourceConfig, ...]
    seq_len: int
    heldout_fraction: float
    fim_rate: float
    newline_split_rate: float
    tokenizer: str | None = None
    tokenizer_vocab_size: int
    path: str | None = None
    text_field: str = "text"
    format: Literal["text", "chat"] = "text"
    """What documents are: text, or conversations, of which an assistant's turns alone are targets
    (`data.conversations`)."""
    chat_template: str | None = None
    """Of conversations: a file or a model's folder; None for that of `init_from`, else V3's."""
    synthetic: bool = False
    isolate_documents: bool = False
    mixture: tuple[tuple[float, tuple[float, ...]], ...] = ()
    """Weights of all sources up to so many tokens, one entry a phase, the last without end; empty:
    each source's own `weight` throughout."""
    max_corrupt: int = 10
    """Documents of a prepared corpus that may turn out to be damaged before the run stops."""
    workers: int = 0
    """Processes that read rows ahead on each host; 0 for a thread of the run's own."""

    def __post_init__(self) -> None:
        _check_mixture(self)
        _require(self.seq_len > 0, "data.seq_len", "must be positive")
        _require(self.workers >= 0, "data.workers", "must not be negative")
        _require(0 <= self.fim_rate <= 1, "data.fim_rate", "must be within 0..1")
        _require(
            0 <= self.newline_split_rate <= 1, "data.newline_split_rate", "must be within 0..1"
        )
        _require(0 < self.heldout_fraction < 1, "data.heldout_fraction", "must be between 0 and 1")
        for name in ("fim_rate", "newline_split_rate"):
            _require(
                self.format == "text" or getattr(self, name) == 0,
                f"data.{name}",
                "rearranges text and data.format=chat has conversations; set it to 0",
            )


def _check_mixture(data: DataConfig) -> None:
    before = 0.0
    for until_tokens, weights in data.mixture:
        _require(until_tokens > before, "data.mixture", "phases must end one after the other")
        _require(
            all(w >= 0 for w in weights) and any(weights),
            "data.mixture",
            "weights must not be negative, nor all zero",
        )
        if data.path is None:
            n_sources = len(data.sources)
            _require(
                len(weights) == n_sources, "data.mixture", f"give {n_sources} weights, one a source"
            )
        before = until_tokens


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Batch size in sequences: linear from `start` to `end` over `ramp_tokens`.

    `micro_batch` is the global number of sequences in one micro-batch; every batch is a whole
    number of them.
    """

    micro_batch: int
    start: int
    end: int
    ramp_tokens: float

    def __post_init__(self) -> None:
        _require(self.micro_batch > 0, "batch.micro_batch", "must be positive")
        for name in ("start", "end"):
            value = getattr(self, name)
            _require(
                value > 0 and value % self.micro_batch == 0,
                f"batch.{name}",
                f"{value} sequences are not a whole number of micro-batches of {self.micro_batch}",
            )
        _require(self.start <= self.end, "batch.start", "must not exceed batch.end")


@dataclass(frozen=True, kw_only=True)
class LrPhase:
    """One phase of the learning rate, up to `until_tokens`.

    `constant` holds `lr`; `cosine` descends from the previous phase's value to `lr`.
    """

    shape: Literal["constant", "cosine"]
    until_tokens: float
    lr: float


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule and the parameters' moving average (report sections 3.2.3 and 4.2)."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    warmup_steps: int
    phases: tuple[LrPhase, ...]
    ema_decay: float | None
    frozen: tuple[str, ...] = ()
    """Groups of parameters that stay as they are, such as `mtp_layers_0` or `embed_tokens`."""

    def __post_init__(self) -> None:
        _require_rising(tuple((p.until_tokens, p.lr) for p in self.phases), "optim.phases")
        _require(
            self.phases[0].shape == "constant", "optim.phases", "the first phase must be constant"
        )
        if self.ema_decay is not None:
            _require(0 < self.ema_decay < 1, "optim.ema_decay", "must be between 0 and 1, or None")


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """How experts are kept balanced (report sections 2.1.2 and 4.2).

    `loss_free`: the router bias moves by `bias_speed`, with the complementary sequence-wise loss
    of strength `sequence_alpha`. `aux_loss`: no bias; the same loss at strength `aux_alpha`.
    `none`: neither.
    """

    strategy: Literal["loss_free", "aux_loss", "none"]
    bias_speed: Schedule
    sequence_alpha: float
    aux_alpha: float
    bias_rule: str = "sign"
    """How the bias moves: a rule of `optim.router_bias`, or one of your own registered there."""
    loss_over: Literal["sequence", "batch"] = "sequence"
    """What the loss balances: every sequence, or each micro-batch as a whole (section 4.5.3)."""

    def __post_init__(self) -> None:
        _require_rising(self.bias_speed, "balance.bias_speed")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length and rhythm of a run; `0` for an interval means never."""

    total_tokens: float
    seed: int
    eval_every: int
    eval_sequences: int
    checkpoint_every: int
    keep_checkpoints: int
    max_bad_steps: int
    epochs: float | None = None
    """Times that every row is drawn, whatever the sources' weights; the schedules stretch from
    `total_tokens` to what that makes. None: `total_tokens` counts."""

    def __post_init__(self) -> None:
        _require(self.total_tokens > 0, "run.total_tokens", "must be positive")
        _require(self.epochs is None or self.epochs > 0, "run.epochs", "must be positive, or None")
        for name in ("eval_every", "checkpoint_every"):
            _require(getattr(self, name) >= 0, f"run.{name}", "must be positive, or 0 for never")
        _require(self.eval_sequences >= 1, "run.eval_sequences", "must be positive")
        _require(self.keep_checkpoints >= 1, "run.keep_checkpoints", "must keep at least 1")
        _require(self.max_bad_steps >= 1, "run.max_bad_steps", "must allow at least 1")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """A whole run as one value."""

    name: str
    model: ModelConfig
    numerics: NumericsConfig
    mesh: MeshConfig
    data: DataConfig
    batch: BatchConfig
    optim: OptimConfig
    balance: BalanceConfig
    mtp_weight: Schedule
    run: RunConfig
    moe: MoEConfig = MoEConfig()
    pipeline: PipelineConfig = PipelineConfig()
    init_from: str | None = None
    """Weights the run starts from: a run directory, a Hugging Face directory or a conversion."""
    checkpoint_format: int = CHECKPOINT_FORMAT

    def __post_init__(self) -> None:
        _require_rising(self.mtp_weight, "mtp_weight")
        _require(
            self.data.tokenizer_vocab_size <= self.model.vocab_size,
            "data.tokenizer_vocab_size",
            f"{self.data.tokenizer_vocab_size} ids exceed model.vocab_size={self.model.vocab_size}",
        )
        _require(
            self.model.mtp_depth < self.data.seq_len,
            "model.mtp_depth",
            f"must be smaller than data.seq_len={self.data.seq_len}",
        )
        for name in self.optim.frozen:
            _require(
                name in self.model.groups,
                "optim.frozen",
                f"the model has no group {name!r}; it has {', '.join(self.model.groups)}",
            )
        mesh = self.mesh
        _require(
            self.batch.micro_batch % mesh.batch_shards == 0,
            "mesh",
            f"data={mesh.data} x node={mesh.node} x expert={mesh.expert} devices do not divide "
            f"batch.micro_batch={self.batch.micro_batch} sequences",
        )
        _require(
            self.model.n_experts % mesh.expert_shards == 0,
            "mesh",
            f"node={mesh.node} x context={mesh.context} x expert={mesh.expert} devices do not "
            f"divide model.n_experts={self.model.n_experts}",
        )
        if mesh.context > 1:
            _require(
                self.data.seq_len % (2 * mesh.context) == 0,
                "mesh.context",
                f"{mesh.context} devices do not cut data.seq_len={self.data.seq_len} into "
                f"{2 * mesh.context} equal pieces, two a device; make it a multiple",
            )
            _require(
                self.model.mtp_depth <= self.data.seq_len // (2 * mesh.context),
                "mesh.context",
                f"pieces of {self.data.seq_len // (2 * mesh.context)} positions are shorter than "
                f"model.mtp_depth={self.model.mtp_depth}; lower it",
            )
        if mesh.pipe > 1:
            self._check_pipeline()
        _require(
            self.checkpoint_format == CHECKPOINT_FORMAT,
            "checkpoint_format",
            f"this version writes format {CHECKPOINT_FORMAT}, got {self.checkpoint_format}",
        )

    def _check_pipeline(self) -> None:
        model, mesh, pipeline = self.model, self.mesh, self.pipeline
        _require(
            pipeline.schedule != "dualpipe" or mesh.pipe % 2 == 0,
            "mesh.pipe",
            f"{mesh.pipe} ranks are odd and dualpipe enters from both ends; make them even or set "
            "pipeline.schedule to dualpipev or zb1p",
        )
        _require(
            model.n_moe_layers > 0,
            "mesh.pipe",
            "a pipeline passes through MoE layers and the model has none; set it to 1",
        )
        stages = mesh.pipe * pipeline.chunks
        most = model.n_moe_layers + (model.n_dense_layers > 0) + (model.mtp_depth > 0)
        _require(
            stages <= most,
            "mesh.pipe",
            f"{stages} stages of {pipeline.schedule}, but the model can be cut into {most} at most "
            "(MoE layers, dense layers together, MTP modules together); lower it",
        )
        _require(
            model.vocab_size % mesh.pipe == 0,
            "mesh.pipe",
            f"{mesh.pipe} ranks do not divide model.vocab_size={model.vocab_size}, which is split "
            "over them; make it a multiple",
        )
        _require(
            mesh.storage != "fsdp",
            "mesh.storage",
            "fsdp gathers a layer where it is used, a pipeline all of them before; set zero1",
        )


def scaled_to(cfg: ExperimentConfig, total_tokens: float) -> ExperimentConfig:
    """`cfg` with every schedule in tokens shrunk or stretched to `total_tokens`."""
    scale = total_tokens / cfg.run.total_tokens

    def stretched(schedule: tuple[tuple[float, Any], ...]) -> tuple[tuple[float, Any], ...]:
        return tuple((until * scale, value) for until, value in schedule)

    replace = dataclasses.replace
    phases = tuple(replace(p, until_tokens=p.until_tokens * scale) for p in cfg.optim.phases)
    return replace(
        cfg,
        batch=replace(cfg.batch, ramp_tokens=cfg.batch.ramp_tokens * scale),
        optim=replace(cfg.optim, phases=phases),
        balance=replace(cfg.balance, bias_speed=stretched(cfg.balance.bias_speed)),
        data=replace(cfg.data, mixture=stretched(cfg.data.mixture)),
        mtp_weight=stretched(cfg.mtp_weight),
        run=replace(cfg.run, total_tokens=total_tokens),
    )


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a config as `{"path.to.field": value}`; tuples of configs by index."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        flat |= _flatten_value(f"{prefix}{field.name}", getattr(cfg, field.name))
    return flat


def _flatten_value(path: str, value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return flatten(value, f"{path}.")
    if isinstance(value, tuple) and value and all(dataclasses.is_dataclass(v) for v in value):
        return {
            k: v
            for i, item in enumerate(value)
            for k, v in _flatten_value(f"{path}.{i}", item).items()
        }
    return {path: value}


def to_text(cfg: Any) -> str:
    """The flattened config, one `path = value` a line; what `config.txt` and golden files hold."""
    return "".join(f"{path} = {value!r}\n" for path, value in flatten(cfg).items())


def from_text(text: str) -> ExperimentConfig:
    """The experiment that `to_text` wrote.

    Raises:
      ValueError: a line is not `path = value`, or fields are missing or unknown.
    """
    flat: dict[str, Any] = {}
    for line in filter(None, text.split("\n")):
        path, sep, value = line.partition(" = ")
        try:
            flat[path] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            sep = ""
        if not sep:
            raise ValueError(f"config text: {line!r} is not of the form path = value")
    return _unflatten(ExperimentConfig, flat, "")


def _unflatten(cls: type, flat: dict[str, Any], prefix: str) -> Any:
    """The config of type `cls` whose fields lie below `prefix`."""
    values = {}
    optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    for name, hint in typing.get_type_hints(cls).items():
        path = f"{prefix}{name}"
        if path in flat:
            values[name] = flat[path]
            continue
        if name in optional and not any(k.startswith(f"{path}.") for k in flat):
            continue  # a field that is younger than the text
        options = (hint, *typing.get_args(hint))
        kinds = [h for h in options if isinstance(h, type) and dataclasses.is_dataclass(h)]
        if not kinds or not any(k.startswith(f"{path}.") for k in flat):
            raise ValueError(f"config text: {path} is missing")
        if typing.get_origin(hint) is tuple:
            below = len(path) + 1
            indices = {int(k[below:].split(".")[0]) for k in flat if k.startswith(f"{path}.")}
            values[name] = tuple(
                _unflatten(kinds[0], flat, f"{path}.{i}.") for i in sorted(indices)
            )
        else:
            values[name] = _unflatten(kinds[0], flat, f"{path}.")
    return cls(**values)


def digest(cfg: Any) -> str:
    """A short hash of every value in `cfg`, written into checkpoints."""
    return hashlib.sha256(to_text(cfg).encode()).hexdigest()[:16]


def override[T](cfg: T, assignments: Iterable[str]) -> T:
    """Returns `cfg` with each `"path.to.field=value"` applied, e.g. `"optim.clip_norm=0.5"`.

    Values are read as the field's declared type; items of a tuple are reached by index
    (`data.sources.0.weight=2`).

    Raises:
      ValueError: an unknown field (with the closest names) or a value of the wrong type.
    """
    for assignment in assignments:
        path, sep, text = assignment.partition("=")
        if not sep:
            raise ValueError(f"--set {assignment!r}: write path.to.field=value")
        cfg = _replace(cfg, path.split("."), text, path)
    return cfg


def _replace(node: Any, keys: list[str], text: str, path: str) -> Any:
    key, rest = keys[0], keys[1:]
    if isinstance(node, tuple):
        if not key.isdigit() or int(key) >= len(node):
            raise ValueError(f"{path}: {key!r} is not an index below {len(node)}")
        item = _replace(node[int(key)], rest, text, path)
        return (*node[: int(key)], item, *node[int(key) + 1 :])
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise ValueError(f"{path}: {key!r} lies below a value that has no fields ({node!r})")
    hints = typing.get_type_hints(type(node))
    if key not in hints:
        close = difflib.get_close_matches(key, hints, n=3) or sorted(hints)
        raise ValueError(
            f"{path}: {type(node).__name__} has no field {key!r}; did you mean {', '.join(close)}?"
        )
    old = getattr(node, key)
    if rest:
        value = _replace(old, rest, text, path)
    elif dataclasses.is_dataclass(old):
        names = ", ".join(f.name for f in dataclasses.fields(old))
        raise ValueError(f"{path}: names a group; set one of its fields ({names})")
    else:
        value = _parse(text, hints[key], path)
    return dataclasses.replace(node, **{key: value})


def _parse(text: str, hint: Any, path: str) -> Any:
    if hint is str:
        return text
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if type(None) in options and text in ("None", "none"):
        return None
    if str in options:
        return text
    if hint == tuple[SourceConfig, ...] and not text.startswith(("(", "[")):
        return _parse_sources(text, path)
    for option in options:
        if typing.get_origin(option) is Literal:
            if text in typing.get_args(option):
                return text
            close = difflib.get_close_matches(text, typing.get_args(option), n=1)
            hint_text = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"{path}={text}: not one of {', '.join(typing.get_args(option))}{hint_text}"
            )
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ValueError(f"{path}={text}: expected {_type_name(hint)}") from None
    for option in options:
        converted = _convert(value, option)
        if converted is not None:
            return converted
    raise ValueError(f"{path}={text}: expected {_type_name(hint)}, got {type(value).__name__}")


def _parse_sources(text: str, path: str) -> tuple[SourceConfig, ...]:
    """`PATH[:WEIGHT],...`: files, folders or sources of a prepared corpus, all of each."""
    found = []
    for item in text.split(","):
        where, _, weight = item.rpartition(":") if ":" in item else (item, "", "1")
        try:
            share = float(weight)
        except ValueError:
            raise ValueError(f"{path}={text}: write PATH:WEIGHT,PATH:WEIGHT") from None
        _require(bool(where), path, "write PATH:WEIGHT,PATH:WEIGHT")
        name = where.rstrip("/").rpartition("/")[2]
        found.append(SourceConfig(name=name, weight=share, max_mb=1e9, path=where.rstrip("/")))
    return tuple(found)


def _convert(value: Any, hint: Any) -> Any:
    """`value` as `hint`, or None if it is not of that type. Widens int to float, list to tuple."""
    if hint is float and type(value) is int:
        return float(value)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        args = typing.get_args(hint)
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(hints) != len(value):
            return None
        items = [_convert(v, h) for v, h in zip(value, hints, strict=True)]
        return None if any(item is None for item in items) else tuple(items)
    return value if type(value) is hint else None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
