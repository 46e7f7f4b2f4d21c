"""Held-out loss and expert load of a run, source by source (report section 4.5.3, figure 9).

Held-out documents of each source of the run's corpus go through its newest checkpoint. A source's
relative load of an expert is its share of the source's choices times the number of experts: 1 if
the source used all experts alike, up to E / K for one that all of its tokens choose.
Dims: L MoE layers without MTP's, E experts, N rows, S tokens of a row.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from v3jax import objective
from v3jax.config import DataConfig, ExperimentConfig
from v3jax.data.baselines import bits_per_byte
from v3jax.data.fim import encode_documents
from v3jax.data.packing import Rows, pack
from v3jax.data.prepared import held_out
from v3jax.data.tokenizer import Tokenizer
from v3jax.model.transformer import head_weight
from v3jax.models import load_run
from v3jax.ops.loss import linear_cross_entropy
from v3jax.sharding import rules_of

_ROWS = 8
"""Of one batch."""


@dataclass(frozen=True)
class SourceFigures:
    """What the held-out documents of one source showed."""

    name: str
    documents: int
    tokens: int
    """Targets: tokens that were predicted."""
    loss: float
    """Nats a token."""
    bits_per_byte: float
    load_LE: np.ndarray
    """Choices of each expert, int64."""

    @property
    def relative_load(self) -> np.ndarray:
        """Load over that of perfect balance."""
        return self.load_LE / np.maximum(self.load_LE.mean(axis=1, keepdims=True), 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return vars(self) | {"load_LE": self.load_LE.tolist()}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "SourceFigures":
        """What `to_json` gave."""
        load_LE = np.array(entry["load_LE"], np.int64)
        return replace(cls(**entry), load_LE=load_LE)


def by_source(
    ckpt: epath.PathLike, *, ema: bool = False, max_rows: int = 256
) -> list[SourceFigures]:
    """Figures of every source of the run's corpus that has held-out documents.

    Args:
      ckpt: a run directory; its experiment's corpus must be at hand.
      max_rows: at most so many rows of a source, the first of its documents in hash order.

    Raises:
      ValueError: no run there, or its corpus is not at hand or holds nothing out.
    """
    cfg, params, router_state, tokenizer = load_run(ckpt, ema=ema)
    if cfg.data.synthetic:
        raise ValueError(f"{ckpt}: trained on synthetic data, which has no sources")
    found = []
    for name, documents, rows in _held_out_rows(cfg.data, tokenizer, max_rows):
        nats, tokens, load_LE = _run(cfg, params, router_state, rows)
        n_bytes = _target_bytes(cfg, tokenizer, rows)
        found.append(
            SourceFigures(
                name,
                documents,
                tokens,
                nats / tokens,
                bits_per_byte(nats, n_bytes),
                load_LE,
            )
        )
    return found


_kept: dict[tuple[Any, ...], list[tuple[str, int, Rows]]] = {}
"""The last rows made, so that runs on the same text share them."""


def _held_out_rows(
    data: DataConfig, tokenizer: Tokenizer, max_rows: int
) -> list[tuple[str, int, Rows]]:
    """Each source's name, number of held-out documents and first rows of them."""
    key = (data, tokenizer.digest, max_rows)
    own_files = data.path is not None or any(s.path is not None for s in data.sources)
    if key in _kept and not own_files:  # a user's files may have changed
        return _kept[key]
    found = []
    for name, documents in held_out(data):
        if documents:
            texts = [d.text for d in documents]
            ids = encode_documents(tokenizer, texts, seed=0, fim_rate=0.0, newline_split_rate=0.0)
            rows = pack(list(ids), data.seq_len + 1, tokenizer.pad)
            rows = Rows(rows.tokens_NS[:max_rows], rows.segments_NS[:max_rows])
            found.append((name, len(documents), rows))
    _kept.clear()
    _kept[key] = found
    return found


def max_violation_global(figures: Iterable[SourceFigures]) -> float:
    """MaxViolation of all sources' loads together: `(max - mean) / mean`, averaged over layers.

    "Global" in the loss-free balancing paper (arXiv 2408.15664, section 4.1): over a held-out set
    instead of a batch.
    """
    load_LE = np.sum([f.load_LE for f in figures], axis=0)
    mean_L = load_LE.mean(axis=1)
    return float(((load_LE.max(axis=1) - mean_L) / mean_L).mean())


def specialisation(figures: Sequence[SourceFigures]) -> float:
    """How differently sources use experts: the mean distance of two sources' shares of choices.

    Total variation, averaged over layers and pairs of sources: 0 if all sources load every expert
    alike, 1 if no two share one, NaN for a single source. The report shows the loads only; the
    number is ours.
    """
    if len(figures) < 2:
        return float("nan")
    share_DLE = np.stack([f.load_LE / f.load_LE.sum(axis=1, keepdims=True) for f in figures])
    first, second = np.triu_indices(len(figures), k=1)
    return float(0.5 * np.abs(share_DLE[first] - share_DLE[second]).sum(axis=-1).mean())


def _run(
    cfg: ExperimentConfig, params: Any, router_state: Any, rows: Rows
) -> tuple[float, int, np.ndarray]:
    """Summed nats, number of targets and loads of rows in batches of one shape."""
    forward = jax.jit(functools.partial(_forward, cfg))
    n_rows, length = rows.tokens_NS.shape
    nats, tokens, load = 0.0, 0, 0
    for start in range(0, n_rows, _ROWS):
        part = np.zeros((2, _ROWS, length), np.int32)
        here = slice(start, min(start + _ROWS, n_rows))
        part[0, : here.stop - start] = rows.tokens_NS[here]
        part[1, : here.stop - start] = rows.segments_NS[here]
        some, n, load_LE = jax.device_get(forward(params, router_state, *part))
        nats, tokens, load = nats + float(some), tokens + int(n), load + load_LE.astype(np.int64)
    return nats, tokens, np.asarray(load)


def _forward(
    cfg: ExperimentConfig,
    params: Any,
    router_state: Any,
    tokens_BS: jax.Array,
    segments_BS: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    inputs_BT = segments_BS[:, :-1]
    isolate = cfg.data.isolate_documents
    out = objective.apply_model(
        cfg,
        params,
        router_state,
        tokens_BS[:, :-1],
        positions_T=objective.positions(inputs_BT, isolate_documents=isolate),
        segments_BT=objective.isolated(inputs_BT, isolate_documents=isolate),
        counted_BS=inputs_BT != 0,
    )
    mask_BT = objective.target_mask(segments_BS, isolate_documents=isolate)
    head = head_weight(cfg.model, cfg.numerics, params, rules_of(cfg))
    nats, _ = linear_cross_entropy(
        out.hidden_BTD, head, tokens_BS[:, 1:], mask_BT.astype(jnp.float32)
    )
    return nats, mask_BT.sum(dtype=jnp.int32), out.stats.load_E


def _target_bytes(cfg: ExperimentConfig, tokenizer: Tokenizer, rows: Rows) -> int:
    isolate = cfg.data.isolate_documents
    segments = jnp.asarray(rows.segments_NS)
    mask_NT = np.asarray(objective.target_mask(segments, isolate_documents=isolate))
    return int(tokenizer.byte_lengths[rows.tokens_NS[:, 1:][mask_NT]].sum())
