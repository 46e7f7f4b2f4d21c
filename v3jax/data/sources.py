"""Documents of one source: what Python itself carries, or a user's files.

The embedded sources are read in place, so that the default corpus needs no download and copies
nothing: `stdlib` (sources of the standard library), `pydoc_topics` (the language reference as
prose) and `package:NAME` (sources of an installed dependency). A user's source is a file, a
directory or a glob of .txt, .md, .rst, .py and .jsonl files.
"""

import glob
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from v3jax.config import SourceConfig

_SKIPPED_FOLDERS = {"site-packages", "__pycache__", "test", "tests", "idle_test"}
_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py"}


@dataclass(frozen=True)
class Document:
    """One document: where it came from and its text."""

    source: str
    name: str
    text: str


def read(source: SourceConfig) -> Iterator[Document]:
    """The documents of `source` in a fixed order, empty ones left out.

    Raises:
      ValueError: an unknown source, a missing path, invalid UTF-8, or a bad JSONL line; the
        message names file and place.
    """
    if source.path is not None:
        documents = _read_user(source, source.path)
    elif source.name == "stdlib":
        documents = _read_tree(source.name, Path(os.__file__).parent)
    elif source.name == "pydoc_topics":
        documents = _read_topics(source.name)
    elif source.name.startswith("package:"):
        documents = _read_package(source.name)
    else:
        raise ValueError(
            f"data.sources: {source.name!r} is no embedded source (stdlib, pydoc_topics, "
            "package:NAME); give it a path"
        )
    return (d for d in documents if d.text.strip())


def _read_tree(source: str, root: Path) -> Iterator[Document]:
    """Python files below `root` that are UTF-8, tests left out."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            yield Document(source, relative.as_posix(), path.read_bytes().decode())
        except UnicodeDecodeError:
            continue  # a few old sources declare another encoding


def _read_topics(source: str) -> Iterator[Document]:
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield Document(source, name, text)


def _read_package(source: str) -> Iterator[Document]:
    name = source.removeprefix("package:")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"data.sources: package {name!r} is not installed; pip install {name}")
    return _read_tree(source, Path(next(iter(spec.submodule_search_locations))))


def _read_user(source: SourceConfig, path: str) -> Iterator[Document]:
    files = _user_files(path)
    if not files:
        raise ValueError(
            f"{path}: no such file or directory, or no .txt, .md, .rst, .py or .jsonl in it"
        )
    for file in files:
        if file.suffix == ".jsonl":
            yield from _read_jsonl(source, file)
        else:
            yield Document(source.name, str(file), _decode(file, file.read_bytes()))


def _user_files(path: str) -> list[Path]:
    root = Path(path)
    if root.is_file():
        return [root]
    found = root.rglob("*") if root.is_dir() else (Path(p) for p in glob.glob(path, recursive=True))
    kinds = _TEXT_SUFFIXES | {".jsonl"}
    return sorted(p for p in found if p.is_file() and p.suffix in kinds)


def _decode(file: Path, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: invalid UTF-8 at byte {error.start}; convert the file to UTF-8"
        ) from None


def _read_jsonl(source: SourceConfig, file: Path) -> Iterator[Document]:
    for number, line in enumerate(_decode(file, file.read_bytes()).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not JSON ({error.msg}); fix or drop it") from None
        text = record.get(source.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f"{file}:{number}: no text field {source.text_field!r}; set data.text_field"
            )
        yield Document(source.name, f"{file}:{number}", text)
