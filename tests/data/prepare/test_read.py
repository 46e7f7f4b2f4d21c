"""Every format is read, and what cannot be read is named with file and offset."""

import gzip
from pathlib import Path

import pytest

from tests.data.prepare.corpora import jsonl
from v3jax.data.prepare import read
from v3jax.data.prepare.config import Kind, PrepareConfig, PrepareSource
from v3jax.data.prepare.read import Bad, Raw, pieces


def found(
    path: Path, kind: Kind = "prose", n_tasks: int = 1, max_bytes: int = 10_000
) -> list[Raw | Bad]:
    source = PrepareSource(name="s", kind=kind, path=str(path))
    cfg = PrepareConfig(sources=(source,), n_tasks=n_tasks)
    return [d for p in pieces(cfg) for d in read.read(p, source, n_tasks, max_bytes)]


def test_text_files_are_named_from_their_root(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one.txt").write_text("first")
    (tmp_path / "a" / "two.md").write_bytes(b"\xef\xbb\xbfsecond")
    (tmp_path / "a" / "three.bin").write_bytes(b"\x00")
    assert found(tmp_path / "a") == [Raw("b/one.txt", "first"), Raw("two.md", "second")]
    assert found(tmp_path / "a" / "**" / "*.txt") == [Raw("one.txt", "first")]


def test_a_tree_of_programs_leaves_prose_and_vendored_folders_out(tmp_path: Path) -> None:
    for name in ("a.py", "README.md", "sub/b.RS", "node_modules/c.js", "sub/d.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    assert [d.name for d in found(tmp_path, "code") if isinstance(d, Raw)] == ["a.py", "sub/b.RS"]
    assert read.language_of_code("sub/b.RS") == "rs"


def test_lines_are_named_by_their_offset(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", ["eins", "zwölf", "drei"])
    offsets = [0, 17, 17 + len(b'{"text": "zw\xc3\xb6lf"}\n')]
    assert found(file) == [
        Raw(f"x.jsonl:{at}", text)
        for at, text in zip(offsets, ["eins", "zwölf", "drei"], strict=True)
    ]


@pytest.mark.parametrize("piece", [1, 7, 18, 19, 40, 1000])
def test_pieces_of_a_file_are_its_lines_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    texts = [f"text {i} " + "ä" * (i % 5) for i in range(30)]
    file = jsonl(tmp_path / "x.jsonl", texts)
    monkeypatch.setattr(read, "_PIECE", piece)
    assert [d.text for d in found(file, n_tasks=3) if isinstance(d, Raw)] == texts


def test_compressed_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert [d.text for d in found(tmp_path) if isinstance(d, Raw)] == ["one", "two"]


def test_the_text_of_a_page_is_read_without_its_menu(tmp_path: Path) -> None:
    said = "This paragraph says something at some length, so that it counts as the main text. "
    page = f"<html><body><nav>Menu Home</nav><article><p>{said * 4}</p></article></body></html>"
    (tmp_path / "a.html").write_text(page)
    (document,) = found(tmp_path)
    assert isinstance(document, Raw)
    assert said.strip() in document.text
    assert "Menu" not in document.text


def test_columns_of_parquet_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"text": ["one", None, "three"], "other": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert found(tmp_path) == [
        Raw("x.parquet:0", "one"),
        Bad("x.parquet", 1, "empty"),
        Raw("x.parquet:2", "three"),
    ]


def test_a_truncated_parquet_file_is_an_error(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    file = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"text": ["one"] * 100}), file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"x\.parquet: not a whole Parquet file"):
        found(tmp_path)


@pytest.mark.parametrize(
    ("line", "offset", "reason"),
    [
        (b'{"text": "a\xff"}', 11, "invalid UTF-8"),
        (b'{"text": ', 0, "not JSON"),
        (b'{"other": "a"}', 0, "no text field 'text'"),
        (b'{"text": 3}', 0, "no text field 'text'"),
        (b'["text"]', 0, "no text field 'text'"),
        (b'{"text": "  \\n"}', 0, "empty"),
        (b'{"text": "a\\ud800b"}', 0, "half a surrogate pair at character 1"),
        (b'{"text": "' + b"a" * 10_001 + b'"}', 0, "larger than quarantine.max_document_mb"),
        (b"a" * 200_000, 0, "larger than quarantine.max_document_mb"),
        (b"[" * 60_000, 0, "JSON nested too deep"),
    ],
)
def test_bad_lines_are_named_and_the_next_is_read(
    tmp_path: Path, line: bytes, offset: int, reason: str
) -> None:
    before, after = b'{"text": "before"}\n', b'\n{"text": "after"}\n'
    (tmp_path / "x.jsonl").write_bytes(before + line + after)
    first, bad, last = found(tmp_path)
    assert isinstance(bad, Bad)
    assert (bad.file, bad.offset) == ("x.jsonl", len(before) + offset)
    assert bad.reason.startswith(reason)
    assert first == Raw("x.jsonl:0", "before")
    assert isinstance(last, Raw)
    assert last.text == "after"


@pytest.mark.parametrize(
    ("raw", "offset", "reason"),
    [
        (b"abc\xe4def", 3, "invalid UTF-8"),
        (b"\xef\xbb\xbfabc\xe4", 6, "invalid UTF-8"),
        (b" \n\t", 0, "empty"),
        (b"", 0, "empty"),
        (b"a" * 10_001, 0, "larger than quarantine.max_document_mb (10001 bytes)"),
    ],
)
def test_bad_text_files_are_named(tmp_path: Path, raw: bytes, offset: int, reason: str) -> None:
    (tmp_path / "x.txt").write_bytes(raw)
    assert found(tmp_path) == [Bad("x.txt", offset, reason)]


def test_embedded_sources_are_shared_among_tasks() -> None:
    source = PrepareSource(name="package:absl", kind="code")

    def by_task(n: int) -> list[list[str]]:
        parts = pieces(PrepareConfig(sources=(source,), n_tasks=n))
        some = [list(read.read(part, source, n, 10**7)) for part in parts]
        return [[d.name for d in documents if isinstance(d, Raw)] for documents in some]

    three, (whole,) = by_task(3), by_task(1)
    assert all(three)
    assert sorted(name for names in three for name in names) == sorted(whole)


def test_a_path_without_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sources\[s\]\.path: no program sources at"):
        found(tmp_path, "code")
