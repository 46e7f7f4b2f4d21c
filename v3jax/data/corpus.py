"""The corpus of a run: sources read, deduplicated, capped, and split by content.

Documents are ordered by a hash of their text, which mixes files without a seed, capped to the
source's `max_mb` in that order, and held out by another part of the same hash: the split of a
document depends on nothing but its text, so it never moves between train and held-out. A text that
several sources hold belongs to the first of them. A source's `weight` has no part in this: it is
the share of the rows drawn in training (`loader`).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from v3jax.config import DataConfig, SourceConfig
from v3jax.data.sources import Document, read

_UNLIMITED_MB = 1e9


@dataclass(frozen=True)
class Corpus:
    """Documents by source, in the order of `sources`, and digests of what they are."""

    sources: tuple[SourceConfig, ...]
    train: tuple[tuple[Document, ...], ...]
    heldout: tuple[tuple[Document, ...], ...]
    files: tuple[tuple[str, str, str], ...]
    """`(source, document name, sha256)` of every document taken."""
    digest: str
    """Of every document, its source's place and its side of the split."""
    train_digest: str
    """Of the training documents alone: what a tokenizer is trained on."""


def sources_of(cfg: DataConfig) -> tuple[SourceConfig, ...]:
    """The experiment's sources, or the one the user's `data.path` stands for."""
    if cfg.path is None:
        return cfg.sources
    return (
        SourceConfig(
            name="user", weight=1.0, max_mb=_UNLIMITED_MB, path=cfg.path, text_field=cfg.text_field
        ),
    )


def load_corpus(cfg: DataConfig) -> Corpus:
    """Reads every source.

    Raises:
      ValueError: no sources, an unreadable one, one with nothing to train on, or a corpus too
        small to hold anything out.
    """
    sources = sources_of(cfg)
    if not sources:
        raise ValueError("data.sources: the corpus is empty; name a source or set data.path")
    seen: set[str] = set()
    taken = [_documents(source, seen, chat=cfg.format == "chat") for source in sources]
    sides = [[(h, d, _is_heldout(h, cfg.heldout_fraction)) for h, d in part] for part in taken]
    train = tuple(tuple(d for _, d, held in part if not held) for part in sides)
    heldout = tuple(tuple(d for _, d, held in part if held) for part in sides)
    _check(sources, train, heldout)
    places = [(i, h, held) for i, part in enumerate(sides) for h, _, held in part]
    return Corpus(
        sources=sources,
        train=train,
        heldout=heldout,
        files=tuple((d.source, d.name, h) for part in taken for h, d in part),
        digest=_digest(f"{i} {h} {held:d}" for i, h, held in places),
        train_digest=_digest(h for _, h, held in places if not held),
    )


def _check(
    sources: tuple[SourceConfig, ...],
    train: tuple[tuple[Document, ...], ...],
    heldout: tuple[tuple[Document, ...], ...],
) -> None:
    remedy = "add documents or change data.heldout_fraction"
    for source, kept, held in zip(sources, train, heldout, strict=True):
        if not kept:
            raise ValueError(
                f"{source.path or source.name}: no training documents among {len(held)}; {remedy}"
            )
    if not any(heldout):
        n_documents = sum(map(len, train))
        raise ValueError(
            f"{sources[0].path or 'data.sources'}: no held-out documents among {n_documents}; "
            f"{remedy}"
        )


def _is_heldout(text_hash: str, fraction: float) -> bool:
    return int(text_hash[:8], 16) < fraction * 2**32


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _documents(source: SourceConfig, seen: set[str], *, chat: bool) -> list[tuple[str, Document]]:
    """Documents with their hashes, new ones only, in hash order, up to the source's cap."""
    hashed = []
    n_read = 0
    for document in read(source, chat=chat):
        n_read += 1
        text_hash = hashlib.sha256(document.text.encode()).hexdigest()
        if text_hash not in seen:
            seen.add(text_hash)
            hashed.append((text_hash, document))
    if not hashed:
        why = "all documents stand in earlier sources" if n_read else "no documents"
        raise ValueError(f"{source.path or source.name}: {why}; the corpus is empty")
    hashed.sort(key=lambda pair: pair[0][8:])
    kept, size = [], 0
    for text_hash, document in hashed:
        size += len(document.text.encode())
        if size > source.max_mb * 1e6 and kept:
            break
        kept.append((text_hash, document))
    return kept
