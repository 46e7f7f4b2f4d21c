"""Steps between documents: each is a datatrove pipeline step, a callable of documents and a rank.

The cleaning stage is `Read, Normalise, Identify, Rules, Decontaminate, Keep`; later stages begin
with `Load` and `Without`. Any step of datatrove may stand between them.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v3jax.data.prepare import decontaminate, language, quality, unicode
from v3jax.data.prepare.config import PrepareConfig
from v3jax.data.prepare.read import Bad, Piece, read
from v3jax.data.prepare.staged import (
    Ledger,
    Quarantine,
    Store,
    documents_file,
    removed_rows,
    sha_of,
)

if TYPE_CHECKING:
    from datatrove.data import Document

Documents = Iterable["Document"]


def over_budget(n_bad: int, n_read: int, cfg: PrepareConfig) -> str | None:
    """Why a run with so many quarantined documents stops; None if it goes on."""
    budget = cfg.quarantine
    if budget.max_documents is not None and n_bad > budget.max_documents:
        return (
            f"{n_bad} quarantined documents exceed quarantine.max_documents={budget.max_documents}"
        )
    if n_bad > budget.max_share * n_read:
        return (
            f"{n_bad} of {n_read} documents quarantined exceed quarantine.max_share="
            f"{budget.max_share:g}"
        )
    return None


@dataclass(frozen=True)
class Read:
    """The documents of a task's pieces; what cannot be read goes to quarantine."""

    cfg: PrepareConfig
    pieces: tuple[Piece, ...]
    folder: Path

    def __call__(self, data: Documents | None, rank: int, world_size: int) -> Iterator["Document"]:
        from datatrove.data import Document

        ledger, quarantine = Ledger("read", 0), Quarantine(self.folder, rank, "read")
        limit = int(self.cfg.quarantine.max_document_mb * 1e6)
        for piece in self.pieces[rank::world_size]:
            source = self.cfg.sources[piece.source]
            for found in read(piece, source, world_size, limit):
                if isinstance(found, Bad):
                    quarantine.put(source.name, found.file, found.offset, found.reason)
                    self._check(quarantine)
                    continue
                about = {"source": piece.source, "language": ""}
                document = Document(text=found.text, id=found.name, metadata=about)
                ledger.keep(document)
                yield document
        quarantine.write()
        ledger.write(self.folder, rank)

    def _check(self, quarantine: Quarantine) -> None:
        most = self.cfg.quarantine.max_documents
        if most is not None and len(quarantine.rows) > most:
            quarantine.write()
            raise ValueError(
                f"{_last(quarantine)}: {over_budget(len(quarantine.rows), 1, self.cfg)}"
            )


def _last(quarantine: Quarantine) -> str:
    row = quarantine.rows[-1]
    return f"{row['file']}: {row['reason']} at {row['offset']}"


@dataclass(frozen=True)
class Normalise:
    """Unicode repaired and normalised; documents that had lost too much dropped."""

    cfg: PrepareConfig
    folder: Path

    def __call__(self, data: Documents, rank: int, world_size: int) -> Iterator["Document"]:
        ledger = Ledger("unicode", self.cfg.examples)
        for document in data:
            kind = self.cfg.sources[document.metadata["source"]].kind
            document.text = unicode.normalise(document.text, code=kind == "code")
            if unicode.lost(document.text):
                ledger.drop(document, "more than 1% of the characters lost (U+FFFD)")
            elif not document.text.strip():
                ledger.drop(document, "no text left")
            else:
                ledger.keep(document)
                yield document
        ledger.write(self.folder, rank)


@dataclass(frozen=True)
class Identify:
    """The language of every document; those of languages that a source does not keep dropped."""

    cfg: PrepareConfig
    folder: Path

    def __call__(self, data: Documents, rank: int, world_size: int) -> Iterator["Document"]:
        ledger = Ledger("language", self.cfg.examples)
        for document in data:
            source = self.cfg.sources[document.metadata["source"]]
            found = language.identify(document.text, document.id, source.kind)
            document.metadata["language"] = found
            if source.languages and found not in source.languages:
                ledger.drop(document, "a language that its source does not keep")
            else:
                ledger.keep(document)
                yield document
        ledger.write(self.folder, rank)


@dataclass(frozen=True)
class Rules:
    """The quality rules of each source's kind."""

    cfg: PrepareConfig
    folder: Path

    def __call__(self, data: Documents, rank: int, world_size: int) -> Iterator["Document"]:
        ledger = Ledger("quality", self.cfg.examples)
        for document in data:
            source = self.cfg.sources[document.metadata["source"]]
            found = document.metadata["language"]
            reason = (
                quality.judge(document.text, source.kind, found, self.cfg.quality)
                if source.rules
                else None
            )
            if reason is None:
                ledger.keep(document)
                yield document
            else:
                ledger.drop(document, f"{source.kind}: {reason}")
        ledger.write(self.folder, rank)


@dataclass(frozen=True)
class Decontaminate:
    """Documents that hold evaluation text dropped, or the lines that do cut out of them."""

    cfg: PrepareConfig
    folder: Path

    def __call__(self, data: Documents, rank: int, world_size: int) -> Iterator["Document"]:
        index = decontaminate.make_index(self.cfg.decontaminate)
        ledger = Ledger("decontamination", self.cfg.examples)
        for document in data:
            item = decontaminate.first_hit(index, document.text)
            if item is not None:
                left = ""
                if self.cfg.decontaminate.action == "cut":
                    left = decontaminate.without_hits(index, document.text)
                if not left.strip():
                    ledger.drop(document, "evaluation text", item)
                    continue
                document.text = left
            ledger.keep(document)
            yield document
        ledger.write(self.folder, rank)


@dataclass(frozen=True)
class Keep:
    """Writes the documents for later stages."""

    folder: Path

    def __call__(self, data: Documents, rank: int, world_size: int) -> None:
        Store(self.folder, rank).write(data)


@dataclass(frozen=True)
class Load:
    """The documents of a task, with their rows.

    Those that do not read back as they were written are left out and go to the quarantine of
    `into`; without it they come blank, so that the others keep their numbers.
    """

    folder: Path
    into: Path | None = None

    def __call__(self, data: Documents | None, rank: int, world_size: int) -> Iterator["Document"]:
        from datatrove.data import Document

        quarantine = None if self.into is None else Quarantine(self.into, rank, "load")
        file, at = documents_file(self.folder, rank), 0
        with file.open("rb") as lines:
            for row, line in enumerate(lines):
                start, at = at, at + len(line)
                record = _whole_record(line)
                if record is None and quarantine is not None:
                    quarantine.put("stages", file.name, start, "bad digest")
                    continue
                record = record or {"text": "", "name": "", "source": 0, "language": ""}
                about = {"source": record["source"], "language": record["language"], "row": row}
                yield Document(text=record["text"], id=record["name"], metadata=about)
        if quarantine is not None:
            quarantine.write()


def _whole_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line, unless it is damaged."""
    try:
        record = json.loads(line)
        return record if sha_of(record["text"]).hex() == record["sha256"] else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class Without:
    """Drops what a list of an earlier stage names."""

    step: str
    reason: str
    removed: Path
    cfg: PrepareConfig
    folder: Path
    """Where the ledger goes."""

    def __call__(self, data: Documents, rank: int, world_size: int) -> Iterator["Document"]:
        removed = removed_rows(self.removed, rank)
        ledger = Ledger(self.step, self.cfg.examples)
        for document in data:
            stead = removed.get(document.metadata["row"])
            if stead is None:
                ledger.keep(document)
                yield document
            else:
                detail = "" if stead[0] < 0 else f"@{stead[0]}:{stead[1]}"
                ledger.drop(document, self.reason, detail)
        ledger.write(self.folder, rank)
