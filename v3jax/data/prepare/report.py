"""`report.html`: what went in and came out, by stage, source and language, and what was dropped."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2

from v3jax.data.prepare.config import PrepareConfig
from v3jax.data.prepare.staged import Folder, Ledger, documents_file, read_ledgers

_SHOWN_LANGUAGES = 12
_SHOWN_QUARANTINE = 50
_STEPS = {
    "read": "read",
    "unicode": "Unicode",
    "language": "language",
    "quality": "quality rules",
    "decontamination": "decontamination",
    "exact": "exact duplicates",
    "near": "near duplicates",
    "classifier": "classifier",
}


def stage_counts(cfg: PrepareConfig, ledgers: Sequence[Ledger]) -> list[dict[str, Any]]:
    """For the index: documents and bytes kept and dropped, by step and source."""
    return [
        {
            "stage": ledger.step,
            "sources": [_of_source(cfg, ledger, i) for i in range(len(cfg.sources))],
        }
        for ledger in ledgers
    ]


def _of_source(cfg: PrepareConfig, ledger: Ledger, source: int) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    for (place, _, reason), n in ledger.dropped.items():
        reasons[reason] += n * (place == source)
    return {
        "name": cfg.sources[source].name,
        "kept": _sum(ledger.kept, source),
        "kept_bytes": _sum(ledger.kept_bytes, source),
        "dropped": _sum(ledger.dropped, source),
        "dropped_bytes": _sum(ledger.dropped_bytes, source),
        "reasons": {reason: n for reason, n in sorted(reasons.items()) if n},
    }


def _sum(counts: Mapping[Any, int], source: int | None = None, language: str | None = None) -> int:
    return sum(
        n
        for at, n in counts.items()
        if (source is None or at[0] == source) and (language is None or at[1] == language)
    )


def funnel(stage: str, work: Folder) -> str:
    """What the console says of a finished stage."""
    if stage == "clean":
        ledgers = read_ledgers(work.stage("clean"), _STEPS, 0)
        read, last = ledgers[0].kept.total(), [x for x in ledgers if x.kept or x.dropped][-1]
        dropped = ", ".join(f"{x.step} -{n:,}" for x in ledgers if (n := x.dropped.total()))
        return f"{read:,} documents read, {last.kept.total():,} kept ({dropped or 'none dropped'})"
    if stage in ("exact", "near", "judged"):
        from v3jax.data.prepare.staged import load

        n = sum(len(load(file)) for file in work.stage(stage).glob("*.removed.npy"))
        return f"{n:,} documents to drop"
    if stage.startswith("train_"):
        about = json.loads((work.stage(stage) / "round.json").read_text(encoding="utf-8"))
        return (
            f"{about['seeds']:,} seeds and {about['recalled']:,} recalled against "
            f"{about['negatives']:,}; accuracy {about['accuracy']:.3f} on seeds kept apart"
        )
    return "done"


def rounds(work: Folder) -> list[dict[str, Any]]:
    """What the classifier's rounds found."""
    files = sorted((work.root / "stages").glob("train_*/round.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def page(
    cfg: PrepareConfig,
    index: Mapping[str, Any],
    ledgers: Sequence[Ledger],
    quarantined: Sequence[Mapping[str, Any]],
    trained: Sequence[Mapping[str, Any]],
    work: Folder,
) -> str:
    """The page, self-contained."""
    per_byte = _tokens_per_byte(cfg, index)
    template = _template()
    return template.render(
        sources=[
            _source_row(source, index, ledgers, i) for i, source in enumerate(index["sources"])
        ],
        stages=[_stage_row(ledger, per_byte) for ledger in ledgers],
        by_source=[(_STEPS[x.step], _by_source(x, cfg, per_byte)) for x in ledgers],
        languages=_languages(cfg, ledgers, per_byte),
        reasons=_reasons(cfg, ledgers, work),
        rounds=trained,
        quarantined=quarantined[:_SHOWN_QUARANTINE],
        n_quarantined=len(quarantined),
        vocab_size=index["tokenizer"]["vocab_size"],
        documents=sum(
            s[side]["documents"] for s in index["sources"] for side in ("train", "heldout")
        ),
        tokens=sum(s[side]["tokens"] for s in index["sources"] for side in ("train", "heldout")),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["n"] = lambda value: f"{value:,}"
    environment.filters["mb"] = lambda value: f"{value / 1e6:,.2f}"
    text = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)


def _tokens_per_byte(cfg: PrepareConfig, index: Mapping[str, Any]) -> list[float]:
    """Of each source, in what was written; of the whole corpus where a source is empty."""
    sides = [[s[side] for side in ("train", "heldout")] for s in index["sources"]]
    tokens = [sum(x["tokens"] for x in both) for both in sides]
    sizes = [sum(x["text_bytes"] for x in both) for both in sides]
    mean = sum(tokens) / max(sum(sizes), 1)
    return [t / s if s else mean for t, s in zip(tokens, sizes, strict=True)]


def _source_row(
    source: Mapping[str, Any], index: Mapping[str, Any], ledgers: Sequence[Ledger], i: int
) -> dict[str, Any]:
    tokens = sum(source[side]["tokens"] for side in ("train", "heldout"))
    size = sum(source[side]["text_bytes"] for side in ("train", "heldout"))
    return {
        "name": source["name"],
        "kind": source["kind"],
        "read": _sum(ledgers[0].kept, i),
        "read_bytes": _sum(ledgers[0].kept_bytes, i),
        "train": source["train"]["documents"],
        "heldout": source["heldout"]["documents"],
        "size": size,
        "tokens": tokens,
        "bytes_per_token": f"{size / tokens:.2f}" if tokens else "",
        "shards": sum(len(source[side]["shards"]) for side in ("train", "heldout")),
    }


def _estimate(sizes: Mapping[Any, int], per_byte: Sequence[float], where: Any = None) -> int:
    """Tokens of texts that were not encoded, by the rate of their sources."""
    return round(
        sum(size * per_byte[at[0]] for at, size in sizes.items() if where is None or where(at))
    )


def _stage_row(ledger: Ledger, per_byte: Sequence[float]) -> dict[str, Any]:
    out, dropped = ledger.kept.total(), ledger.dropped.total()
    tokens_out = _estimate(ledger.kept_bytes, per_byte)
    tokens_dropped = _estimate(ledger.dropped_bytes, per_byte)
    return {
        "name": _STEPS[ledger.step],
        "in": out + dropped,
        "out": out,
        "share": f"{dropped / max(out + dropped, 1):.1%}",
        "tokens_in": tokens_out + tokens_dropped,
        "tokens_out": tokens_out,
    }


def _by_source(
    ledger: Ledger, cfg: PrepareConfig, per_byte: Sequence[float]
) -> list[dict[str, Any]]:
    rows = []
    for i, source in enumerate(cfg.sources):
        out, dropped = _sum(ledger.kept, i), _sum(ledger.dropped, i)
        kept_bytes, dropped_bytes = _sum(ledger.kept_bytes, i), _sum(ledger.dropped_bytes, i)
        rows.append(
            {
                "name": source.name,
                "in": out + dropped,
                "out": out,
                "tokens_in": round((kept_bytes + dropped_bytes) * per_byte[i]),
                "tokens_out": round(kept_bytes * per_byte[i]),
            }
        )
    return rows


def _languages(
    cfg: PrepareConfig, ledgers: Sequence[Ledger], per_byte: Sequence[float]
) -> list[dict[str, Any]]:
    """Documents after language identification and at the end, the commonest languages first."""
    first = next(x for x in ledgers if x.step == "language")
    last = ledgers[-1]
    total: Counter[str] = Counter()
    for counts in (first.kept, first.dropped):
        for at, n in counts.items():
            total[at[1]] += n
    shown = [name for name, _ in sorted(total.items(), key=lambda x: (-x[1], x[0]))]
    rows = []
    for name in shown[:_SHOWN_LANGUAGES]:
        sizes_in = first.kept_bytes + first.dropped_bytes_by_place()
        rows.append(
            {
                "name": name,
                "in": total[name],
                "out": _sum(last.kept, None, name),
                "tokens_in": _estimate(sizes_in, per_byte, lambda at, name=name: at[1] == name),
                "tokens_out": _estimate(
                    last.kept_bytes, per_byte, lambda at, name=name: at[1] == name
                ),
            }
        )
    others = set(shown[_SHOWN_LANGUAGES:])
    if others:
        rows.append(
            {
                "name": f"{len(others)} others",
                "in": sum(total[name] for name in others),
                "out": sum(_sum(last.kept, None, name) for name in others),
                "tokens_in": _estimate(
                    first.kept_bytes + first.dropped_bytes_by_place(),
                    per_byte,
                    lambda at: at[1] in others,
                ),
                "tokens_out": _estimate(last.kept_bytes, per_byte, lambda at: at[1] in others),
            }
        )
    return rows


def _reasons(cfg: PrepareConfig, ledgers: Sequence[Ledger], work: Folder) -> list[dict[str, Any]]:
    rows = []
    for ledger in ledgers:
        counts: Counter[str] = Counter()
        for (_, _, reason), n in ledger.dropped.items():
            counts[reason] += n
        for reason, n in sorted(counts.items(), key=lambda x: (-x[1], x[0])):
            examples = [
                {
                    "source": cfg.sources[source].name,
                    "language": language,
                    "name": name,
                    "detail": _named(detail, work),
                    "text": text,
                }
                for _, source, language, name, detail, text in ledger.examples.get(reason, [])
            ]
            rows.append(
                {"step": _STEPS[ledger.step], "reason": reason, "n": n, "examples": examples}
            )
    return rows


def _named(detail: str, work: Folder) -> str:
    """The name of the document that was kept instead, where the detail says its task and row."""
    if not detail.startswith("@"):
        return detail
    task, row = map(int, detail[1:].split(":"))
    with documents_file(work.stage("clean"), task).open("rb") as lines:
        (line,) = islice(lines, row, row + 1)
    return json.loads(line)["name"]
