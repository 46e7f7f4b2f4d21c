"""What a finished run leaves to read: samples, baselines on the same text, `report.html`."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from etils import epath

from v3jax import decode, processes
from v3jax.config import ExperimentConfig, MeshConfig
from v3jax.data import baselines
from v3jax.data.dataset import Dataset
from v3jax.data.packing import Rows
from v3jax.metrics import read_rows
from v3jax.report import Needles, Sample, render, with_needles
from v3jax.sharding import make_mesh
from v3jax.state import TrainState

_SAMPLE_PROMPTS = ("def ", "import numpy as np\n", "The ")
_SAMPLE_TOKENS = 48
_NEEDLES = "needle.json"
_SAMPLED_ROWS = 2000
"""Of a prepared source, for the baselines."""


def write_samples(
    cfg: ExperimentConfig, state: TrainState, dataset: Dataset, workdir: epath.Path
) -> list[Sample]:
    """Continues fixed prompts greedily into `samples.txt`; nothing on synthetic data.

    Every process of a run calls it. Where there are several, the weights are gathered to the
    writer, which generates on one of its devices.
    """
    if dataset.tokenizer is None:
        return []
    params, router_state, mesh = state.params, state.router_state, nullcontext()
    if processes.count() > 1:
        params, router_state = processes.gathered((params, router_state)) or ({}, {})
        if not processes.is_writer():
            return []
        params, router_state = jax.device_put((params, router_state), jax.local_devices()[0])
        mesh = jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()))
    with mesh:
        texts = decode.generate(
            cfg,
            params,
            router_state,
            dataset.tokenizer,
            _SAMPLE_PROMPTS,
            n_tokens=_SAMPLE_TOKENS,
        )
    samples = [
        Sample(prompt, dataset.tokenizer.decode(ids))
        for prompt, ids in zip(_SAMPLE_PROMPTS, texts, strict=True)
    ]
    text = "\n\n".join(f">>> {s.prompt!r}\n{s.prompt}{s.text}" for s in samples)
    (workdir / "samples.txt").write_text(text + "\n")
    return samples


def write_report(
    cfg: ExperimentConfig,
    dataset: Dataset,
    workdir: epath.Path,
    samples: Sequence[Sample],
    last: dict[str, float],
) -> None:
    """Writes `report.html` and prints the closing figures."""
    rows, loads = read_rows(workdir / "metrics.jsonl"), read_rows(workdir / "loads.jsonl")
    compared = _compare(cfg, dataset, last)
    figures = _closing_figures(rows, last)
    page = render(
        name=cfg.name,
        mtp_depth=cfg.model.mtp_depth,
        rows=rows,
        loads=loads,
        figures=figures,
        bits_per_byte=compared,
        samples=samples,
        needles=_needles(workdir),
    )
    (workdir / "report.html").write_text(page)
    for name, value in [*figures, *((f"bits a byte, {n}", f"{v:.3f}") for n, v in compared)]:
        print(f"{name:34s} {value}")
    print(f"done: {workdir / 'report.html'}", flush=True)


def keep_needles(workdir: epath.Path, needles: Needles) -> bool:
    """Keeps a needle test in a finished run's directory and shows it on its page, which is False
    if there is none."""
    page = workdir / "report.html"
    if not page.exists():
        return False
    (workdir / _NEEDLES).write_text(needles.to_text())
    page.write_text(with_needles(page.read_text(), needles))
    return True


def _needles(workdir: epath.Path) -> Needles | None:
    """The needle test that was kept."""
    file = workdir / _NEEDLES
    return Needles.from_text(file.read_text(), str(file)) if file.exists() else None


def _closing_figures(
    rows: Sequence[dict[str, Any]], last: dict[str, float]
) -> list[tuple[str, str]]:
    """What is known of a finished run; rows may be lost, and hold null for what was not finite."""
    figures = [("steps", f"{len(rows):,}")]
    if rows:
        figures.append(("tokens", f"{rows[-1]['tokens']:,}"))
    first = rows[0].get("eval_loss") if rows else None
    if "eval_loss" in last and first is not None:
        drop = 1 - last["eval_loss"] / first
        figures += [
            ("held-out loss at step 0", f"{first:.4f}"),
            ("held-out loss", f"{last['eval_loss']:.4f}  ({drop:.1%} lower)"),
        ]
    if "eval_loss_ema" in last:
        figures.append(("held-out loss, averaged weights", f"{last['eval_loss_ema']:.4f}"))
    tail = [row["max_violation"] for row in rows[-20:] if row["max_violation"] is not None]
    if tail:
        figures.append(("max violation, last 20 steps", f"{np.mean(tail):.3f}"))
    return figures


def _sample(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segments of the training rows, of large sources some from all over."""
    parts = []
    for rows in dataset.train:
        if isinstance(rows, Rows):
            parts.append((rows.tokens_NS, rows.segments_NS))
        else:
            few = np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLED_ROWS)).astype(int)
            parts += [tuple(row[None] for row in rows[int(i)]) for i in few]
    tokens, segments = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(segments)


def _compare(
    cfg: ExperimentConfig, dataset: Dataset, last: dict[str, float]
) -> list[tuple[str, float]]:
    """Bits a byte of the model and of the baselines on the held-out rows that were evaluated."""
    if "bits_per_byte" not in last:
        return []
    n_rows = min(cfg.run.eval_sequences, len(dataset.heldout.tokens_NS))
    n_bytes, vocab = dataset.heldout_bytes(n_rows), cfg.model.vocab_size
    train = baselines.pairs(*_sample(dataset))
    held = baselines.pairs(dataset.heldout.tokens_NS[:n_rows], dataset.heldout.segments_NS[:n_rows])
    unigram = baselines.bits_per_byte(baselines.unigram_nats(train, held, vocab), n_bytes)
    bigram = baselines.bits_per_byte(baselines.bigram_nats(train, held, vocab), n_bytes)
    return [
        ("this model", last["bits_per_byte"]),
        ("interpolated bigram", bigram),
        ("gzip -9", baselines.gzip_bits_per_byte(dataset.heldout_text(n_rows))),
        ("unigram", unigram),
    ]
