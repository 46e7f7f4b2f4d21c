"""The corpus of a run: sources read, deduplicated, capped, and split by content.

Documents are ordered by a hash of their text, which mixes files without a seed, capped to the
source's `max_mb` in that order, and held out by another part of the same hash: the split of a
document depends on nothing but its text, so it never moves between train and held-out.
"""

import hashlib
from dataclasses import dataclass

from v3jax.config import DataConfig, SourceConfig
from v3jax.data.sources import Document, read


@dataclass(frozen=True)
class Corpus:
    """Documents by source, in the order of `sources`, and a digest of all of them."""

    sources: tuple[SourceConfig, ...]
    train: tuple[tuple[Document, ...], ...]
    heldout: tuple[tuple[Document, ...], ...]
    files: tuple[tuple[str, str, str], ...]
    """`(source, document name, sha256)` of every document taken."""
    digest: str


def sources_of(cfg: DataConfig) -> tuple[SourceConfig, ...]:
    """The experiment's sources, or the one the user's `data.path` stands for."""
    if cfg.path is None:
        return cfg.sources
    unlimited = 1e9
    return (
        SourceConfig(
            name="user", weight=1.0, max_mb=unlimited, path=cfg.path, text_field=cfg.text_field
        ),
    )


def load_corpus(cfg: DataConfig) -> Corpus:
    """Reads every source.

    Raises:
      ValueError: an unreadable source, one with no documents, or a corpus too small to hold
        anything out or anything to train on.
    """
    train, heldout, files = [], [], []
    seen: set[str] = set()
    for source in sources_of(cfg):
        kept = _documents(source, seen)
        if not kept:
            raise ValueError(f"{source.path or source.name}: no documents; the corpus is empty")
        held = tuple(d for h, d in kept if int(h[:8], 16) < cfg.heldout_fraction * 2**32)
        train.append(tuple(d for h, d in kept if int(h[:8], 16) >= cfg.heldout_fraction * 2**32))
        heldout.append(held)
        files += [(d.source, d.name, h) for h, d in kept]
    for name, part in (("training", train), ("held-out", heldout)):
        if not any(part):
            raise ValueError(
                f"{sources_of(cfg)[0].path or 'data.sources'}: no {name} documents among "
                f"{len(files)}; add documents or change data.heldout_fraction"
            )
    digest = hashlib.sha256("\n".join(h for _, _, h in files).encode()).hexdigest()
    return Corpus(sources_of(cfg), tuple(train), tuple(heldout), tuple(files), digest)


def _documents(source: SourceConfig, seen: set[str]) -> list[tuple[str, Document]]:
    """Documents with their hashes, new ones only, in hash order, up to the source's cap."""
    hashed = []
    for document in read(source):
        digest = hashlib.sha256(document.text.encode(errors="surrogatepass")).hexdigest()
        if digest not in seen:
            seen.add(digest)
            hashed.append((digest, document))
    hashed.sort(key=lambda pair: pair[0][8:])
    kept, size = [], 0
    for digest, document in hashed:
        size += len(document.text.encode(errors="surrogatepass"))
        if size > source.max_mb * 1e6 and kept:
            break
        kept.append((digest, document))
    return kept
