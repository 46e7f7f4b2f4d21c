"""Documents of one source: what Python itself carries, or a user's files.

The embedded sources are read in place, so that the default corpus needs no download and copies
nothing: `stdlib` (sources of the standard library), `pydoc_topics` (the language reference as
prose), `arithmetic` (questions and answers on numbers), `key_values` (facts that are asked for
again), `refrains` (words said over and over), `instructions` and `chains` (short conversations, for
fine-tuning) and `package:NAME` (sources of an installed dependency, found without importing it).
Test folders and files that are not UTF-8 are left out.

A user's source is a file, a directory or a glob of .txt, .md, .rst, .py and .jsonl files. A file is
a document and so is a line of a .jsonl file; a path that names one single text file stands for a
whole corpus, so that file is cut at blank lines into documents of some 16,000 characters. Where
conversations are asked for, only they and .jsonl files will do (`conversations`).
"""

import codecs
import glob
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v3jax.config import SourceConfig
from v3jax.data import arithmetic, conversations, instructions, key_values, refrains

MADE: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "arithmetic": arithmetic.documents,
    "key_values": key_values.documents,
    "refrains": refrains.documents,
}
"""Embedded sources of documents that are made, not read: names and texts."""

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py"}
_CONVERSATIONS = {"instructions": instructions.conversations, "chains": instructions.worked_out}
_SECTION = 16_384  # characters; ours


@dataclass(frozen=True)
class Document:
    """One document: where it came from and its text, which UTF-8 can encode."""

    source: str
    name: str
    text: str


def read(source: SourceConfig, *, chat: bool = False) -> Iterator[Document]:
    """The documents of `source` in a fixed order, empty ones left out.

    Args:
      chat: conversations are asked for, instead of text.

    Raises:
      ValueError: an unknown source, a path that is missing or cannot be read, invalid UTF-8, or a
        bad JSONL line; the message names file and place.
    """
    if source.path is not None:
        documents = _read_user(source, source.path, chat)
    elif chat or source.name in _CONVERSATIONS:
        if not chat or source.name not in _CONVERSATIONS:
            raise ValueError(
                f"data.sources: {source.name!r} has {'no ' if chat else ''}conversations; set "
                f"data.format={'text' if chat else 'chat'} or give another source"
            )
        documents = (
            Document(source.name, name, conversations.text_of(record, f"{source.name}:{name}"))
            for name, record in _CONVERSATIONS[source.name]()
        )
    elif source.name == "stdlib":
        documents = _read_tree(source.name, Path(os.__file__).parent)
    elif source.name == "pydoc_topics":
        documents = _read_topics(source.name)
    elif source.name in MADE:
        documents = (Document(source.name, *named) for named in MADE[source.name]())
    elif source.name.startswith("package:"):
        documents = _read_package(source.name)
    else:
        raise ValueError(
            f"data.sources: {source.name!r} is no embedded source (stdlib, pydoc_topics, "
            "arithmetic, key_values, refrains, package:NAME; of conversations instructions, "
            "chains); give it a path"
        )
    return (d for d in documents if d.text.strip())


def _read_tree(source: str, root: Path) -> Iterator[Document]:
    """Python files below `root` that are UTF-8, tests left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for file in sorted(f for f in files if f.endswith(".py")):
            path = Path(folder, file)
            try:
                text = _read_bytes(path).decode()
            except UnicodeDecodeError:
                continue  # a few old sources declare another encoding
            yield Document(source, path.relative_to(root).as_posix(), text)


def _read_topics(source: str) -> Iterator[Document]:
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield Document(source, name, text)


def _read_package(source: str) -> Iterator[Document]:
    name = source.removeprefix("package:")
    if not name.isidentifier():
        raise ValueError(f"data.sources: {source!r} names no top-level package")
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ValueError(f"data.sources: package {name!r} is not installed; pip install {name}")
    roots = [Path(p) for p in spec.submodule_search_locations or ()]
    if not roots:
        raise ValueError(f"data.sources: {name!r} is a module, not a package with sources")
    return (document for root in roots for document in _read_tree(source, root))


def _read_user(source: SourceConfig, path: str, chat: bool) -> Iterator[Document]:
    files = _user_files(path)
    if not files:
        raise ValueError(
            f"{path}: no such file or directory, or no .txt, .md, .rst, .py or .jsonl in it"
        )
    single = files == [Path(path).expanduser()]
    for file in files:
        if file.suffix == ".jsonl":
            yield from _read_jsonl(source, file, chat)
            continue
        if chat:
            raise ValueError(f"{file}: no .jsonl file; data.format=chat reads conversations alone")
        text = _decode(file, _read_bytes(file))
        if single:
            for start, section in _sections(text):
                yield Document(source.name, f"{file}:{start}", section)
        else:
            yield Document(source.name, str(file), text)


def _user_files(path: str) -> list[Path]:
    """The files a path stands for: itself, those below it, or those the glob matches."""
    if not path:
        return []
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    found = root.rglob("*") if root.is_dir() else map(Path, glob.glob(str(root), recursive=True))
    kinds = _TEXT_SUFFIXES | {".jsonl"}
    return sorted(p for p in found if p.is_file() and p.suffix in kinds)


def _sections(text: str) -> Iterator[tuple[int, str]]:
    """Consecutive pieces of `text`, each with the character it starts at."""
    start = 0
    while start < len(text):
        end = _section_end(text, start + _SECTION)
        yield start, text[start:end]
        start = end


def _section_end(text: str, at: int) -> int:
    """The end of the first blank line after `at`, or else of the first line, or else `at`."""
    for mark in ("\n\n", "\n"):
        found = text.find(mark, at, at + _SECTION)
        if found >= 0:
            return found + len(mark)
    return at if len(text) > at + _SECTION else len(text)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turns the system's refusal to read into a user's error."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); check the file") from None


def _read_bytes(file: Path) -> bytes:
    with _naming(file):
        return file.read_bytes()


def _decode(file: Path, raw: bytes, at: int = 0) -> str:
    """The text of the bytes that stand `at` bytes into `file`, without a byte-order mark."""
    if at == 0 and raw.startswith(codecs.BOM_UTF8):
        raw, at = raw[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: invalid UTF-8 at byte {at + error.start}; convert the file to UTF-8"
        ) from None


def _read_jsonl(source: SourceConfig, file: Path, chat: bool) -> Iterator[Document]:
    at = 0
    with _naming(file), file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            record = _decode(file, line, at)
            at += len(line)
            if record.strip():
                place = f"{file}:{number}"
                text = (
                    conversations.text_of(_parsed(record, place), place)
                    if chat
                    else _text_of(record, source.text_field, place)
                )
                yield Document(source.name, place, text)


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg}); fix or drop the line") from None
    except RecursionError:
        raise ValueError(f"{place}: JSON nested too deep; fix or drop the line") from None


def _text_of(line: str, field: str, place: str) -> str:
    """The text field of one JSON line."""
    record = _parsed(line, place)
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{place}: no text field {field!r}; set data.text_field")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{place}: half a surrogate pair in {field!r}; fix or drop the line"
        ) from None
    return text
