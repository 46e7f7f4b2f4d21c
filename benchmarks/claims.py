"""Claims of the DeepSeek-V3 technical report beside what small runs here show, into claims.md.

    python notebooks/render.py notebooks/balancing.ipynb    # trains what is not there yet
    python notebooks/render.py notebooks/mtp.ipynb
    python notebooks/render.py notebooks/fp8.ipynb
    python -m benchmarks.claims [--runs=runs]

Reads the notebooks' run directories and writes `benchmarks/results/claims.md`, one row a claim; of
notebooks without runs it keeps what the file says. A later claim is a function here. ± is half of
the two-sided 95% interval over seeds by Student's t; differences are taken seed by seed.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from v3jax import config
from v3jax.ablation import (
    Estimate,
    Figure,
    Run,
    accepted,
    by_variant,
    closing,
    difference,
    global_violation,
    relative_difference,
    specialisation,
)

_RUNS = flags.DEFINE_string("runs", "runs", "Folder of the notebooks' runs.")
_OUT = Path(__file__).parent / "results" / "claims.md"
_HEAD = "| claim | the report | here | seeds | holds here | command |"
Runs = Mapping[str, list[Run]]

violation: Figure = closing("max_violation", 100)
loss: Figure = closing("eval_loss", 1)


def found(folder: Path) -> dict[str, list[Run]]:
    """The finished runs of an ablation, by variant.

    Raises:
      ValueError: there are none.
    """
    runs: dict[str, list[Run]] = {}
    for variant in sorted(p for p in folder.glob("*") if p.is_dir()):
        for run in sorted(variant.iterdir(), key=lambda p: int(p.name)):
            cfg = config.from_text((run / "config.txt").read_text())
            runs.setdefault(variant.name, []).append(Run(variant.name, cfg.run.seed, run, cfg))
    if not runs:
        raise ValueError(f"{folder}: no runs; execute the notebook first")
    return runs


def row(claim: str, reported: str, here: str, n: int, holds: str, notebook: str) -> str:
    """One line of the table."""
    command = f"`notebooks/render.py notebooks/{notebook}.ipynb`"
    return f"| {claim} | {reported} | {here} | {n} | {holds} | {command} |"


def sign(it: Estimate) -> str:
    """Whether a difference is below zero, in words."""
    return "yes" if it.high < 0 else "no" if it.low > 0 else "undecided"


def balance(runs: Runs) -> str:
    """2.1.2: the bias keeps the experts balanced."""
    figures = by_variant(runs, violation)
    free, none = figures["loss_free"], figures["none"]
    return row(
        "loss-free balancing keeps loads even (2.1.2): MaxViolation of a batch",
        "0.04 against an auxiliary loss's 0.72, globally, 1B model (arXiv 2408.15664)",
        f"{free} against {none} without balancing: {free.mean / none.mean:.2f} of it",
        free.n,
        "yes" if free.high < none.low / 3 else "no",
        "balancing",
    )


def balance_beside_loss(runs: Runs) -> str:
    """2408.15664, table 2: better balanced than the usual auxiliary loss."""
    name = "aux_0.001"
    it = difference(runs, global_violation, "loss_free", name)
    figures = by_variant(runs, global_violation)
    return row(
        "loss-free is better balanced than an auxiliary loss of 0.001, globally",
        "0.04 against 0.72 (arXiv 2408.15664, table 2)",
        f"{figures['loss_free']} against {figures[name]}",
        it.n,
        sign(it),
        "balancing",
    )


def model_no_worse(runs: Runs) -> str:
    """4.5.2: the model is no worse than with the auxiliary loss."""
    overall = by_variant(runs, global_violation)
    equal = [
        n for n in runs if n.startswith("aux") and overall[n].mean <= overall["loss_free"].high
    ]
    said = [(n, difference(runs, loss, "loss_free", n)) for n in equal]
    texts = [f"{it.mean:+.4f} ± {it.half:.2g} against {n}" for n, it in said]
    worse = any(it.low > 0 for _, it in said)
    return row(
        "loss-free is no worse than auxiliary losses that balance as well (4.5.2): held-out loss",
        "2.253 against 2.258 (1B), 2.080 against 2.085 (3B), section 4.5.3",
        "; ".join(texts) or "none balances as well",
        len(runs["loss_free"]),
        "no" if worse else "yes: none is lower beyond chance",
        "balancing",
    )


def batch_wise(runs: Runs) -> str:
    """4.5.3: a batch-wise loss is as good as loss-free, a sequence-wise one worse."""
    it = difference(runs, loss, "aux_batch_0.1", "aux_0.1")
    return row(
        "a batch-wise auxiliary loss gives a lower loss than a sequence-wise one (4.5.3)",
        "2.253 against 2.258 (1B), 2.080 against 2.085 (3B)",
        f"{it.mean:+.4f} ± {it.half:.2g} at a strength of 0.1",
        it.n,
        sign(it),
        "balancing",
    )


def experts_specialise(runs: Runs) -> str:
    """4.5.3, figure 9: experts specialise more without the auxiliary loss."""
    figures = by_variant(runs, specialisation)
    it = difference(runs, specialisation, "aux_0.1", "loss_free")
    return row(
        "experts specialise by domain with loss-free, less so with an auxiliary loss (figure 9): "
        "distance of domains' expert loads",
        "shown as heat maps",
        f"{figures['loss_free']} against {figures['aux_0.1']} with aux_0.1",
        it.n,
        sign(it),
        "balancing",
    )


def speeds(runs: Runs) -> str:
    """2408.15664, figure 4: too slow and too fast are worse."""
    figures = by_variant(runs, violation)
    names = {"speed_0.001": "0.001", "loss_free": "0.005", "speed_0.02": "0.02"}
    texts = [f"{figures[name]} at {speed}" for name, speed in names.items()]
    faster, slower = (
        difference(runs, violation, "loss_free", n) for n in ("speed_0.02", "speed_0.001")
    )
    return row(
        "the bias must be neither too slow nor too fast: MaxViolation of a batch at the end",
        "0.001 best, 0.0001 slow, 0.01 oscillates, over 40,000 steps (arXiv 2408.15664)",
        "; ".join(texts),
        faster.n,
        f"0.005 better than 0.02: {sign(faster)}; than 0.001: {sign(slower)}",
        "balancing",
    )


def module_helps(runs: Runs) -> str:
    """4.5.1: MTP makes the main model better."""
    it = difference(runs, loss, "depth_1", "depth_0")
    return row(
        "training with one MTP module makes the main model better (4.5.1): held-out loss",
        "better on 9 of 10 benchmarks (15.7B), Pile-test 0.729 and 0.729 bits a byte",
        f"{it.mean:+.4f} ± {it.half:.2g}",
        it.n,
        sign(it),
        "mtp",
    )


def drafts(runs: Runs) -> str:
    """5.4.3: drafts are accepted."""
    rate = by_variant({"depth_1": runs["depth_1"]}, accepted)["depth_1"]
    return row(
        "drafts of the MTP module are accepted (5.4.3)",
        "85% to 90%",
        f"{rate}, greedy continuations of held-out text",
        rate.n,
        "yes" if rate.low >= 0.85 else "no, on a model so small",
        "mtp",
    )


def fp8_loss(runs: Runs) -> str:
    """3.3, B.1: training in FP8 loses next to nothing."""
    fp8, fp32 = apart(runs, "fp8"), apart(runs, "fp32")
    held_out = difference(runs, loss, "fp8", "bf16")
    return row(
        "the loss in FP8 stays near BF16's (3.3, B.1): relative difference, both smoothed with a "
        "mean of 0.9, at its largest over the second half",
        "below 0.25% (16B and 230B)",
        f"{percents(fp8)} by seed; chance alone, FP32 for BF16: {percents(fp32)}; held-out loss "
        f"{held_out.mean:+.4f} ± {held_out.half:.2g}",
        len(fp8),
        _within(fp8, fp32),
        "fp8",
    )


def _within(found: Sequence[float], chance: Sequence[float], limit: float = 0.0025) -> str:
    """Whether differences are below the report's limit, and whether chance alone is."""
    n = sum(one < limit for one in found)
    said = "yes" if n == len(found) else f"{n} of {len(found)} seeds"
    return said if max(chance) < limit else f"{said}; chance alone is beyond {limit:.2%} too"


def fp8_blocks(runs: Runs) -> str:
    """B.2: blocks for gradients of activations."""
    blocks = apart(runs, "fp8_blocks")
    return row(
        "gradients of activations in blocks of 128 x 128 instead of tiles make training diverge "
        "(B.2)",
        "a 16B model diverges at about 300B tokens",
        f"{percents(blocks)} from BF16's loss",
        len(blocks),
        "yes" if max(blocks) > 0.1 else "no, on a model so small",
        "fp8",
    )


def apart(runs: Runs, variant: str) -> list[float]:
    """Each seed's largest relative difference to BF16 over the second half of the run."""
    of_bf16 = {run.seed: run for run in runs["bf16"]}
    curves = [relative_difference(run, of_bf16[run.seed]) for run in runs[variant]]
    return [float(np.abs(curve[len(curve) // 2 :]).max()) for curve in curves]


def percents(values: list[float]) -> str:
    """One after the other."""
    return ", ".join(f"{value:.3%}" for value in values)


CLAIMS: dict[str, tuple[Callable[[Runs], str], ...]] = {
    "balancing": (
        balance,
        balance_beside_loss,
        model_no_worse,
        batch_wise,
        experts_specialise,
        speeds,
    ),
    "mtp": (module_helps, drafts),
    "fp8": (fp8_loss, fp8_blocks),
}


def setting(notebook: str, runs: Runs) -> str:
    """Size and data of a notebook's runs, which are those of its first, and when and where this is
    written, which is taken for where they were trained."""
    cfg = next(iter(runs.values()))[0].cfg
    model = cfg.model
    return (
        f"- `{notebook}`: {cfg.run.total_tokens / 1e6:.1f}M tokens in rows of {cfg.data.seq_len}, "
        f"{model.n_moe_layers} MoE layers of {model.dim} features with {model.n_experts} experts, "
        f"of which {model.top_k} serve a token; {datetime.date.today()}, {machine()}."
    )


def machine() -> str:
    """The processor that this runs on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0].partition(': ')[2]}" if names else "an unknown CPU"


def earlier(notebook: str) -> tuple[list[str], list[str]]:
    """Setting and rows of a notebook that the file has."""
    lines = _OUT.read_text(encoding="utf-8").splitlines() if _OUT.exists() else []
    return (
        [line for line in lines if line.startswith(f"- `{notebook}`: ")],
        [
            line
            for line in lines
            if line.endswith(f"`notebooks/render.py notebooks/{notebook}.ipynb` |")
        ],
    )


def main(argv: list[str]) -> None:
    del argv
    settings: list[str] = []
    rows: list[str] = []
    for notebook, claims in CLAIMS.items():
        folder = Path(_RUNS.value) / notebook
        if folder.is_dir():
            runs = found(folder)
            mine, new = [setting(notebook, runs)], [claim(runs) for claim in claims]
        else:
            print(f"{folder}: no runs; keeping what {_OUT.name} says of them")
            mine, new = earlier(notebook)
        settings += mine
        rows += new
    lines = [
        "# The report's claims, on small models",
        "",
        "Written by `python -m benchmarks.claims`. ± is half of the two-sided 95% interval over",
        "seeds. What does not hold on so small a model may hold on a large one.",
        "",
        *settings,
        "",
        _HEAD,
        "|---|---|---|---|---|---|",
        *rows,
    ]
    _OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(_OUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    app.run(main)
