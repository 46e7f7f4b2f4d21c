"""Documents of the sources, and what cannot be read, with file and offset.

Files are .jsonl, .parquet, text and HTML, the first three also with .gz; for the kind `code`, a
tree of program sources. A file's name is relative to its source's root, so that nothing depends on
where a corpus lies. Large .jsonl files are read in pieces by several tasks.
"""

import glob
import gzip
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v3jax.config import SourceConfig
from v3jax.data import sources as embedded
from v3jax.data.prepare.config import PrepareConfig, PrepareSource

_TEXT = {".txt", ".md", ".rst", ".tex"}
_HTML = {".html", ".htm", ".xhtml"}
_CODE_NAMES = (
    "c cc cpp cu cuh h hh hpp cs css go hs java jl js jsx kt lean lua m ml mm php pl pm py pyi pyx "
    "r rb rs scala sh sql swift ts tsx v vhd zig"
)
_CODE = {f".{name}" for name in _CODE_NAMES.split()}
_SKIPPED = {"__pycache__", "node_modules", ".git"}
_PIECE = 64 * 2**20  # bytes of a .jsonl file that one task reads at a time
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Raw:
    """A document as it was read."""

    name: str
    text: str


@dataclass(frozen=True)
class Bad:
    """What could not be read, where it lies (bytes; rows of a .parquet file), and why."""

    file: str
    offset: int
    reason: str


@dataclass(frozen=True)
class Piece:
    """What a task reads at a time: a file, or the lines of it that start in a range of bytes."""

    source: int
    file: str
    """Empty for an embedded source, of which a task takes every n-th document."""
    name: str
    size: int
    start: int = 0
    end: int | None = None


def pieces(cfg: PrepareConfig) -> list[Piece]:
    """Everything to read, in a fixed order.

    Raises:
      ValueError: a source without files.
    """
    return [p for i, source in enumerate(cfg.sources) for p in _pieces(i, source, cfg.n_tasks)]


def _pieces(place: int, source: PrepareSource, n_tasks: int) -> Iterator[Piece]:
    if source.path is None:
        for n in range(n_tasks):
            yield Piece(place, "", source.name, 0, n)
        return
    root = Path(source.path).expanduser()
    files = _files(root, source)
    if not files:
        wanted = "program sources" if source.kind == "code" else ".jsonl, .parquet, text or HTML"
        raise ValueError(f"sources[{source.name}].path: no {wanted} at {source.path}")
    base = root if root.is_dir() else _common(files)
    for file in files:
        name, size = file.relative_to(base).as_posix(), file.stat().st_size
        if file.suffix != ".jsonl" or size <= _PIECE:
            yield Piece(place, str(file), name, size)
            continue
        for start in range(0, size, _PIECE):
            yield Piece(place, str(file), name, size, start, min(start + _PIECE, size))


def _common(files: Sequence[Path]) -> Path:
    """The folder that all files are in."""
    folder = files[0].parent
    while not all(file.is_relative_to(folder) for file in files):
        folder = folder.parent
    return folder


def _files(root: Path, source: PrepareSource) -> list[Path]:
    if root.is_file():
        return [root]
    found = root.rglob("*") if root.is_dir() else map(Path, glob.glob(str(root), recursive=True))
    wanted = {".jsonl", ".parquet"} | (_CODE if source.kind == "code" else _TEXT | _HTML)
    return sorted(
        file
        for file in found
        if _suffix(file) in wanted and not _SKIPPED & set(file.parts) and file.is_file()
    )


def _suffix(file: Path) -> str:
    """The suffix that tells the format, before a .gz."""
    return Path(file.stem).suffix.lower() if file.suffix == ".gz" else file.suffix.lower()


def language_of_code(name: str) -> str:
    """What a program is written in, by its name's suffix, without the dot."""
    return _suffix(Path(name.split(":")[0])).removeprefix(".") or "code"


def read(piece: Piece, source: PrepareSource, n_tasks: int, max_bytes: int) -> Iterator[Raw | Bad]:
    """The documents of a piece.

    Raises:
      ValueError: a file that the system refuses to read, or that is not of its format at all.
    """
    if not piece.file:
        return _embedded(piece, source, n_tasks, max_bytes)
    kind = _suffix(Path(piece.file))
    if kind == ".jsonl":
        found = _jsonl(piece, source.text_field, max_bytes)
    elif kind == ".parquet":
        found = _parquet(piece, source.text_field, max_bytes)
    else:
        found = _whole(piece, max_bytes, html=kind in _HTML and source.kind != "code")
    return _refused(piece.file, found)


def _refused(file: str, found: Iterator[Raw | Bad]) -> Iterator[Raw | Bad]:
    try:
        yield from found
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{file}: cannot be read ({why}); check the file") from None


def _embedded(
    piece: Piece, source: PrepareSource, n_tasks: int, max_bytes: int
) -> Iterator[Raw | Bad]:
    cfg = SourceConfig(name=source.name, weight=1.0, max_mb=1e9)
    for document in itertools.islice(embedded.read(cfg), piece.start, None, n_tasks):
        bad = _unusable(document.text, max_bytes)
        yield Bad(document.name, 0, bad) if bad else Raw(document.name, document.text)


def _unusable(text: str, max_bytes: int) -> str | None:
    """Why a text is no document; None if it is one."""
    if not text or text.isspace():
        return "empty"
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        return f"half a surrogate pair at character {error.start}"
    return f"larger than quarantine.max_document_mb ({size} bytes)" if size > max_bytes else None


def _open(file: str) -> Any:
    return gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb")


def _whole(piece: Piece, max_bytes: int, *, html: bool) -> Iterator[Raw | Bad]:
    """A file that is one document."""
    with _open(piece.file) as content:
        raw = content.read(max_bytes + len(_BOM) + 1)
    lead = len(_BOM) if raw.startswith(_BOM) else 0
    if len(raw) - lead > max_bytes:
        size = f"{piece.size} bytes" if not piece.file.endswith(".gz") else "unpacked"
        yield Bad(piece.name, 0, f"larger than quarantine.max_document_mb ({size})")
        return
    try:
        text = raw[lead:].decode()
    except UnicodeDecodeError as error:
        yield Bad(piece.name, lead + error.start, "invalid UTF-8")
        return
    if html:
        text = _html_text(text)
    bad = _unusable(text, max_bytes)
    yield Bad(piece.name, 0, bad) if bad else Raw(piece.name, text)


def _html_text(page: str) -> str:
    """The main text of a page; empty if it has none."""
    import trafilatura

    return trafilatura.extract(page, include_comments=False, include_tables=True) or ""


def _jsonl(piece: Piece, field: str, max_bytes: int) -> Iterator[Raw | Bad]:
    """The lines that start within the piece; the name of each is its file and first byte."""
    longest = 8 * max_bytes + 4096  # of a line: JSON may write a byte as \\u00XX, and other fields
    with _open(piece.file) as content:
        at = piece.start
        if at:
            content.seek(at - 1)
            at += (
                len(content.readline()) - 1
            )  # the line that began before belongs to the piece before
        while piece.end is None or at < piece.end:
            line = content.readline(longest)
            if not line:
                return
            start, at = at, at + len(line)
            if len(line) == longest and not line.endswith(b"\n"):
                while (more := content.readline(longest)) and not more.endswith(b"\n"):
                    at += len(more)
                at += len(more)
                yield Bad(piece.name, start, "larger than quarantine.max_document_mb (its line)")
                continue
            lead = len(_BOM) if start == 0 and line.startswith(_BOM) else 0
            if line[lead:].strip():
                yield _of_line(piece.name, start, lead, line, field, max_bytes)


def _of_line(
    name: str, start: int, lead: int, line: bytes, field: str, max_bytes: int
) -> Raw | Bad:
    try:
        record = json.loads(line[lead:].decode())
    except UnicodeDecodeError as error:
        return Bad(name, start + lead + error.start, "invalid UTF-8")
    except json.JSONDecodeError as error:
        return Bad(name, start, f"not JSON ({error.msg})")
    except RecursionError:
        return Bad(name, start, "JSON nested too deep")
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return Bad(name, start, f"no text field {field!r}")
    bad = _unusable(text, max_bytes)
    return Bad(name, start, bad) if bad else Raw(f"{name}:{start}", text)


def _parquet(piece: Piece, field: str, max_bytes: int) -> Iterator[Raw | Bad]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(piece.file)
        if field not in table.schema_arrow.names:
            raise ValueError(f"{piece.file}: no column {field!r}; set text_field of its source")
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0):
                yield _of_value(piece.name, row, value, max_bytes)
                row += 1
    except pyarrow.ArrowException as error:
        text = str(error).split("\n")[0]
        raise ValueError(f"{piece.file}: not a whole Parquet file ({text}); copy it anew") from None


def _of_value(name: str, row: int, value: Any, max_bytes: int) -> Raw | Bad:
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return Bad(name, row, "invalid UTF-8")
    if text is None:
        return Bad(name, row, "empty")
    if not isinstance(text, str):
        return Bad(name, row, "not text")
    bad = _unusable(text, max_bytes)
    return Bad(name, row, bad) if bad else Raw(f"{name}:{row}", text)
