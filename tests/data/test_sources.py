"""Where documents come from, and every way a user's files can be wrong."""

import json
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.data import small
from v3jax.config import SourceConfig
from v3jax.data.sources import Document, read


def embedded(name: str) -> list[Document]:
    return list(read(SourceConfig(name=name, weight=1.0, max_mb=1.0)))


def user(path: Path | str, **changes: str) -> list[Document]:
    return list(read(SourceConfig(name="mine", weight=1.0, max_mb=1.0, path=str(path), **changes)))


def test_the_standard_library_is_read_without_tests_and_packages() -> None:
    documents = embedded("stdlib")
    names = [d.name for d in documents]
    assert len(names) == len(set(names)) > 400
    assert {"os.py", "json/decoder.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "site-packages", "dist-packages"})
    assert documents == embedded("stdlib")
    assert {d.source for d in documents} == {"stdlib"}


def test_the_language_reference_is_prose() -> None:
    documents = embedded("pydoc_topics")
    assert len(documents) > 50
    assert "assert" in {d.name for d in documents}


def test_arithmetic_is_right_and_the_same_every_time() -> None:
    documents = embedded("arithmetic")
    assert documents == embedded("arithmetic")
    assert len({d.text for d in documents}) == len(documents) == 4000
    kinds = set()
    for document in documents[::40]:
        lines = document.text.splitlines()
        for question, answer in zip(lines[::2], lines[1::2], strict=True):
            numbers = [int(n) for n in re.findall(r"-?\d+", question)]
            kind = re.sub(r"-?\d+|\b[a-z]\b", "#", question)
            kinds.add(kind)
            assert Fraction(answer) == _ANSWERS[kind](*numbers), question
    assert kinds == _ANSWERS.keys()


_ANSWERS: dict[str, Callable[..., Any]] = {
    "Calculate # + #.": lambda a, b: a + b,
    "What is # less than #?": lambda b, a: a - b,
    "Multiply # and #.": lambda a, b: a * b,
    "Solve #*# + # = # for #.": lambda a, b, c: Fraction(c - b, a),
    "Simplify #/#.": Fraction,
    "Calculate the remainder when # is divided by #.": lambda a, b: a - b * (a // b),
    "What is next in #, #, #, #?": lambda a, b, c, d: d + (b - a),
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = small.write(tmp_path / "dummypkg", ["raise RuntimeError('imported')\n"], "__init__.py")
    (folder / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    (folder / "empty.py").write_bytes(b" \n")
    (folder / "data.txt").write_bytes(b"no source")
    small.write(folder / "sub", ["x = 1\n"], "module.py")
    small.write(folder / "tests", ["assert True\n"], "test_module.py")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_package_is_read_without_importing_it(package: Path) -> None:
    assert [d.name for d in embedded("package:dummypkg")] == ["__init__.py", "sub/module.py"]
    assert "dummypkg" not in sys.modules


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("wikipedia", "'wikipedia' is no embedded source .* give it a path"),
        ("package:nowhere_pkg", "'nowhere_pkg' is not installed; pip install nowhere_pkg"),
        ("package:dummypkg.sub", "names no top-level package"),
        ("package:", "names no top-level package"),
        ("package:this", "a module, not a package"),
        ("package:sys", "a module, not a package"),
    ],
)
def test_an_unknown_source_is_named(name: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"^data.sources: .*{named}"):
        embedded(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = small.write(tmp_path / "texts", ["zero", "one"], "{i}.txt")
    small.write(root / "a" / "b", ["deep"], "deep.md")
    small.write(root, ["print()"], "code.py")
    small.write(root, ["title\n=====\n"], "page.rst")
    small.write(root, ['{"text": "first"}\n\n{"text": "second", "id": 3}'], "lines.jsonl")
    small.write(root, ["\x89PNG"], "image.png")
    return root


def test_a_directory_is_read_in_order_of_its_files(folder: Path) -> None:
    documents = user(folder)
    names = [d.name.removeprefix(f"{folder}/") for d in documents]
    texts = [d.text for d in documents]
    assert names == [
        "0.txt", "1.txt", "a/b/deep.md", "code.py", "lines.jsonl:1", "lines.jsonl:3", "page.rst",
    ]  # fmt: skip
    assert texts == ["zero", "one", "deep", "print()", "first", "second", "title\n=====\n"]


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("*.txt", ["zero", "one"]),
        ("**/*.md", ["deep"]),
        ("[0c]*", ["zero", "print()"]),
        ("lines.jsonl", ["first", "second"]),
        ("0.txt", ["zero"]),
        ("image.png", ["\x89PNG"]),  # named outright: the suffix is the user's affair
    ],
)
def test_a_glob_or_a_file_is_read(folder: Path, pattern: str, texts: list[str]) -> None:
    assert [d.text for d in user(folder / pattern)] == texts


def test_a_home_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(user("~/texts")) == 7


def test_a_json_line_may_name_another_field(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"body": "caf\\u00e9", "text": 3}\r\n{"body": "\\ud83d\\ude42\\n"}\r\n')
    assert [d.text for d in user(file, text_field="body")] == ["café", "🙂\n"]


def test_line_breaks_inside_a_json_line_are_no_ends(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b\x0bc\x85d"}, ensure_ascii=False) + "\n")
    assert [d.text for d in user(file)] == ["a\u2028b\x0bc\x85d"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "more"}\n')
    assert [d.text for d in user(tmp_path)] == ["words", "more"]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    small.write(tmp_path, ["", " \n\t\n", "words"])
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    assert [d.text for d in user(tmp_path)] == ["words"]


@pytest.mark.parametrize("end", ["\n\n", "\n", " "])
def test_one_text_file_is_cut_into_documents(tmp_path: Path, end: str) -> None:
    text = end.join(f"paragraph {i} of words" for i in range(6000))
    file = tmp_path / "book.txt"
    file.write_bytes(text.encode())
    documents = user(file)
    assert "".join(d.text for d in documents) == text
    assert 7 <= len(documents) <= 10
    assert len({d.name for d in documents}) == len(documents)
    if end != " ":
        assert all(d.text.endswith(end) for d in documents[:-1])
    assert [d.text for d in user(tmp_path)] == [text], "in a directory a file is a document"


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", "é".encode()])
def test_invalid_utf8_is_named_by_its_byte(tmp_path: Path, before: bytes) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(before + b"ab\xe9c")
    expected = f"{file}: invalid UTF-8 at byte {len(before) + 2}; convert the file to UTF-8"
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match="invalid UTF-8") as error:
            user(path)
        assert str(error.value) == expected


def test_invalid_utf8_in_a_later_line_is_named_by_its_byte_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    first = '{"text": "é"}\n'.encode()
    file.write_bytes(first + b'{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=f"invalid UTF-8 at byte {len(first) + 10};"):
        user(file)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"text": ', "not JSON"),
        (b"{'text': 'a'}", "not JSON"),
        (b'{"text": "a"} x', "not JSON"),
        (b'["text"]', "no text field 'text'; set data.text_field"),
        (b'{"body": "a"}', "no text field 'text'"),
        (b'{"text": null}', "no text field 'text'"),
        (b'{"text": 7}', "no text field 'text'"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"text": "a\\ud800b"}', "half a surrogate pair in 'text'"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: bytes, named: str) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=named) as error:
        user(file)
    assert str(error.value).startswith(f"{file}:3: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["absent.txt", "absent/", "*.txt", "empty", "images"])
def test_a_path_that_holds_no_text_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    small.write(tmp_path / "images", ["\x89PNG"], "image.png")
    with pytest.raises(ValueError, match="no such file or directory") as error:
        user(f"{tmp_path}/{path}")
    assert str(error.value).startswith(f"{tmp_path}/{path}: ")


def test_an_empty_path_is_not_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="no such file"):
        user("")


@pytest.mark.parametrize("name", ["0.txt", "lines.jsonl"])
def test_a_file_that_cannot_be_read_is_named(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == name:
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", lambda self: self.open("rb").read())
    with pytest.raises(ValueError, match=f"{name}: cannot be read .Permission denied.") as error:
        user(folder)
    assert str(error.value).startswith(f"{folder}/{name}")
