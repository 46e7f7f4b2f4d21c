"""Safetensors as the public library has them; every damage is one line, found in the headers."""

import json
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save_file

from tests.hf.small import ODD, at_most, edit, entry, index, refused, safetensors
from v3jax.hf import files
from v3jax.hf.files import DTYPES, INDEX, NAMES, SINGLE, Entry, Planned

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def some_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"scalar": (), "empty": (0, 3), "row": (5,), "matrix": (7, 3), "cube": (4, 2, 3)}
    return {
        f"{shape}.{kind}": np.asarray(rng.normal(size=size)).astype(dtype)
        for shape, size in shapes.items()
        for kind, dtype in DTYPES.items()
    }


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


# What is read and written


def test_what_the_safetensors_library_wrote_is_read_to_the_bit(tmp_path: Path) -> None:
    arrays = some_arrays()
    save_file(arrays, tmp_path / SINGLE, metadata={"format": "pt"})
    entries = files.open_directory(tmp_path)
    assert entries.keys() == arrays.keys()
    for name, array in arrays.items():
        got = files.read(entries[name])
        assert (got.dtype, got.shape, bits(got)) == (array.dtype, array.shape, bits(array))
        assert entries[name].n_bytes == array.nbytes


def test_rows_are_those_of_a_slice(tmp_path: Path) -> None:
    arrays = {name: a for name, a in some_arrays().items() if a.ndim}
    save_file(arrays, tmp_path / SINGLE)
    entries = files.open_directory(tmp_path)
    for rows in (slice(0, 2), slice(2, 4), slice(1, None), slice(3, 99), slice(9, 12), slice(0, 0)):
        for name, array in arrays.items():
            got = files.read(entries[name], rows)
            assert (got.shape, bits(got)) == (array[rows].shape, bits(array[rows]))


def test_the_safetensors_library_reads_what_is_written_to_the_bit(tmp_path: Path) -> None:
    arrays = some_arrays()
    plan = [Planned(name, a.dtype, a.shape) for name, a in arrays.items()]
    files.write_shard(tmp_path / SINGLE, plan, iter(arrays.values()))
    content = (tmp_path / SINGLE).read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0, "the data are aligned"
    read = {name: (i["dtype"], i["shape"], bytes(i["data"])) for name, i in deserialize(content)}
    assert read == {n: (NAMES[a.dtype], list(a.shape), bits(a)) for n, a in arrays.items()}


def test_an_array_that_is_not_as_planned_is_not_written(tmp_path: Path) -> None:
    plan = [Planned("a", np.dtype(np.float32), (2, 3))]
    for array in (np.zeros((3, 2), np.float32), np.zeros((2, 3), BF16)):
        with refused(tmp_path / SINGLE, "a came as", "planned was"):
            files.write_shard(tmp_path / SINGLE, plan, iter([array]))


def test_shards_keep_the_order_and_hold_no_more_than_asked_or_one_tensor() -> None:
    rng = np.random.default_rng(0)
    plan = [Planned(str(i), np.dtype(np.float32), (int(rng.integers(1, 50)),)) for i in range(200)]
    for most in (100, 200, 640):
        shards = files.shards(plan, most)
        assert [t for _, group in shards for t in group] == plan
        sizes = [sum(t.n_bytes for t in group) for _, group in shards]
        assert all(
            n <= most or len(group) == 1 for n, (_, group) in zip(sizes, shards, strict=True)
        )
        fits = [n + group[0].n_bytes for n, (_, group) in zip(sizes, shards[1:], strict=False)]
        assert min(fits) > most, "a shard ends only where the next tensor does not fit"
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        assert [name for name, _ in shards] == names
    assert files.shards(plan, math.inf) == [(SINGLE, plan)]


def test_shards_with_their_index_are_read_as_one(tmp_path: Path) -> None:
    arrays = some_arrays()
    plan = [Planned(name, a.dtype, a.shape) for name, a in arrays.items()]
    shards = files.shards(plan, 60)
    assert len(shards) > 3
    rest = iter(arrays.values())
    for name, group in shards:
        files.write_shard(tmp_path / name, group, rest)
    files.write_index(tmp_path, shards)
    total = json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(a.nbytes for a in arrays.values())
    entries = files.open_directory(tmp_path)
    assert {n: bits(files.read(e)) for n, e in entries.items()} == {
        n: bits(a) for n, a in arrays.items()
    }


def test_one_file_has_no_index(tmp_path: Path) -> None:
    files.write_index(tmp_path, [(SINGLE, [])])
    assert not list(tmp_path.iterdir())


def sparse(file: Path, shape: list[int]) -> int:
    """A file of one FP32 tensor `a` that is all hole, and where its data begin."""
    n_bytes = 4 * math.prod(shape)
    content = safetensors({"a": entry("F32", shape, 0, n_bytes)})
    file.write_bytes(content)
    os.truncate(file, len(content) + n_bytes)
    return len(content)


def test_some_rows_of_a_tensor_larger_than_memory_take_their_own_memory(tmp_path: Path) -> None:
    start = sparse(tmp_path / SINGLE, [2**24, 2**10])  # 64 GiB
    with (tmp_path / SINGLE).open("r+b") as file:
        file.seek(start + 4 * 2**10 * 12_345_678)
        file.write(np.arange(2**10, dtype=np.float32).tobytes())
    with at_most(2**20):
        rows = files.read(files.open_directory(tmp_path)["a"], slice(12_345_677, 12_345_679))
    np.testing.assert_array_equal(rows, [np.zeros(2**10), np.arange(2**10)])


# What is refused

F4 = entry("F32", [1], 0, 4)  # a good tensor of 4 bytes

HEADERS: dict[str, tuple[Any, ...]] = {
    # name: the file's bytes, what the message names
    "empty": (b"", "0 bytes hold no header", "truncated"),
    "seven bytes": (b"\x02" + b"\0" * 6, "7 bytes hold no header"),
    "no header": (b"\0" * 8, "no JSON"),
    "a header beyond the cap": (
        safetensors({}, length=files.MAX_HEADER + 1),
        f"a header of {files.MAX_HEADER + 1} bytes, at most {files.MAX_HEADER}",
    ),
    "an enormous header": (b"\xff" * 8, f"a header of {2**64 - 1} bytes"),
    "a header beyond the file": (safetensors({"a": F4}, length=999), "in a file of", "truncated"),
    "truncated data": (safetensors({"a": F4}, b"123"), "truncated", "download it again"),
    "data nobody has": (safetensors({"a": F4}, b"12345"), "bytes instead of"),
    "half a header": (safetensors(b'{"a": {"dtype": "F32", "sh'), "no JSON"),
    "a pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x08builtins.", "a header of"),
    "no UTF-8": (safetensors(b'{"\xff": 1}'), "no JSON"),
    "UTF-16": (safetensors("{}".encode("utf-16")), "no JSON"),
    "a list": (safetensors([]), "the header is no object"),
    "deep nesting": (safetensors(b"[" * 200_000), "no JSON"),
    "a long number": (safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "no JSON"),
    "NaN": (safetensors(b'{"a": NaN}'), "NaN is no number"),
    "a tensor twice": (
        safetensors(b'{"a": %b, "a": %b}' % ((json.dumps(F4).encode(),) * 2), b"1234"),
        "'a' is there twice",
    ),
    "an offset twice": (
        safetensors(
            b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4],"shape":[1]}}', b"1234"
        ),
        "'shape' is there twice",
    ),
    "metadata that is no object": (safetensors({"__metadata__": [], "a": F4}), "__metadata__"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}}), "__metadata__"),
    "a name with a line break": (safetensors({"a\nb": F4}, b"1234"), r"a\nb", "no name"),
    "an empty entry": (safetensors({"a": {}}), "a lacks dtype, shape or data_offsets"),
    "an entry that is a list": (safetensors({"a": ["F32", [1], [0, 4]]}), "a lacks"),
    "no dtype": (safetensors({"a": {"shape": [1], "data_offsets": [0, 4]}}), "a lacks dtype"),
    "another dtype": (safetensors({"a": entry("F16", [2], 0, 4)}, b"1234"), "a is 'F16'"),
    "a dtype that is a list": (safetensors({"a": entry([], [2], 0, 4)}), "a is []"),
    "a negative size": (safetensors({"a": entry("F32", [-1], 0, 4)}), "a has the shape [-1]"),
    "two negative sizes": (safetensors({"a": entry("F32", [-1, -1], 0, 4)}), "[-1, -1]"),
    "a size with a point": (safetensors({"a": entry("F32", [1.0], 0, 4)}), "[1.0]"),
    "a size that is true": (safetensors({"a": entry("F32", [True], 0, 4)}), "[True]"),
    "a size beyond 63 bits": (safetensors({"a": entry("F32", [0, 2**63], 0, 0)}), str(2**63)),
    "sizes whose product wraps": (
        safetensors({"a": entry("F32", [2**32, 2**32], 0, 0)}),
        f"a has 0 bytes, F32[{2**32}, {2**32}] takes {2**66}",
    ),
    "many axes": (safetensors({"a": entry("F32", [2**62] * 100_000, 0, 4)}), "the shape"),
    "a shape in words": (safetensors({"a": entry("F32", "11", 0, 4)}), "a has the shape '11'"),
    "negative offsets": (safetensors({"a": entry("F32", [1], -4, 0)}), "data_offsets [-4, 0]"),
    "offsets backwards": (safetensors({"a": entry("F32", [1], 4, 0)}, b"1234"), "has -4 bytes"),
    "offsets beyond 63 bits": (
        safetensors({"a": entry("F32", [1], 2**64, 2**64 + 4)}, b"1234"),
        "a has data_offsets",
    ),
    "one offset": (safetensors({"a": entry("F32", [1], 4)}), "a has data_offsets [4]"),
    "three offsets": (safetensors({"a": entry("F32", [1], 0, 4, 8)}), "data_offsets [0, 4, 8]"),
    "too few bytes": (safetensors({"a": entry("F32", [2], 0, 4)}, b"1234"), "a has 4 bytes"),
    "a gap before": (safetensors({"a": entry("F32", [1], 4, 8)}, b"12345678"), "a begins at byte"),
    "a gap between": (
        safetensors({"a": F4, "b": entry("F32", [1], 8, 12)}, b"123456789012"),
        "b begins at byte",
    ),
    "an overlap": (
        safetensors({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"1" * 12),
        "b begins at byte",
    ),
    "the same bytes": (safetensors({"a": F4, "b": F4}, b"1234"), "b begins at byte"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    content, *named = HEADERS[case]
    (tmp_path / SINGLE).write_bytes(content)
    with at_most(64 * 2**20), refused(tmp_path / SINGLE, *named):
        files.open_directory(tmp_path)


def test_a_header_of_the_cap_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = safetensors({"a": F4})
    (tmp_path / SINGLE).write_bytes(content + b"1234")
    monkeypatch.setattr(files, "MAX_HEADER", len(content) - 8)
    assert files.open_directory(tmp_path).keys() == {"a"}
    monkeypatch.setattr(files, "MAX_HEADER", len(content) - 9)
    with refused(tmp_path / SINGLE, "at most"):
        files.open_directory(tmp_path)


def whole(entries: dict[str, Entry]) -> None:
    """Asserts that tensors lie side by side in their files, and can be read."""
    ends: dict[Path, int] = {}
    for tensor in sorted(entries.values(), key=lambda e: (e.offset, e.n_bytes)):
        assert ends.setdefault(tensor.file, tensor.offset) == tensor.offset
        ends[tensor.file] += tensor.n_bytes
        assert files.read(tensor).shape == tensor.shape
    assert all(end == file.stat().st_size for file, end in ends.items())


def opens_or_is_refused(folder: Path, file: Path) -> bool:
    """Whether a directory opens; if it does it is whole, if not it is said in one line."""
    try:
        entries = files.open_directory(folder)
    except ValueError as error:
        message = str(error)
        assert str(file) in message
        assert len(message.splitlines()) == 1
        assert len(message) < 1500
        return False
    whole(entries)
    return True


def good_header() -> dict[str, Any]:
    return {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], 0, 24),
        "b": entry("BF16", [5], 24, 34),
        "c": entry("F8_E4M3", [3, 3], 34, 43),
    }


def test_bytes_of_a_header_changed_at_random_give_a_whole_file_or_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    good = np.frombuffer(safetensors(good_header(), b"\1" * 43), np.uint8)
    file = tmp_path / SINGLE
    opened = 0
    with at_most(2 * files.MAX_HEADER):
        for _ in range(1500):
            content = good.copy()
            where = rng.integers(0, len(good) - 43, rng.integers(1, 4))
            content[where] = rng.choice([*b'0123456789,:[]{}"-.eE ', int(rng.integers(256))])
            cut = rng.integers(0, len(good)) if rng.random() < 0.1 else len(good)
            file.write_bytes(content[:cut].tobytes())
            opened += opens_or_is_refused(tmp_path, file)
    assert 0 < opened < 750


def mutate(rng: np.random.Generator, value: Any) -> Any:
    """A copy of decoded JSON with one part of it, however deep, dropped, doubled or replaced."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return ODD[rng.integers(len(ODD))]
    changed = value.copy()
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[rng.integers(len(keys))]
    draw = rng.random()
    if draw < 0.1:
        del changed[key]
    elif draw < 0.2:
        other = value[keys[rng.integers(len(keys))]]
        if isinstance(changed, dict):
            changed[f"{key}2"] = other
        else:
            changed.append(other)
    else:
        changed[key] = mutate(rng, value[key])
    return changed


def test_fields_of_a_header_changed_at_random_give_a_whole_file_or_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    file = tmp_path / SINGLE
    opened = 0
    with at_most(2 * files.MAX_HEADER):
        for _ in range(1500):
            header = good_header()
            for _ in range(rng.integers(1, 3)):
                header = mutate(rng, header)
            file.write_bytes(safetensors(header, b"\1" * 43))
            opened += opens_or_is_refused(tmp_path, file)
    assert 0 < opened < 750


def test_an_index_changed_at_random_gives_the_files_or_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    good = {"metadata": {"total_size": 8}, "weight_map": dict.fromkeys("ab", "1.safetensors")}
    good["weight_map"]["c"] = "2.safetensors"
    header = {"a": F4, "b": entry("F32", [1], 4, 8)}
    (tmp_path / "1.safetensors").write_bytes(safetensors(header, b"12345678"))
    (tmp_path / "2.safetensors").write_bytes(safetensors({"c": F4}, b"1234"))
    opened = 0
    for _ in range(1000):
        (tmp_path / INDEX).write_text(json.dumps(mutate(rng, good)))
        opened += opens_or_is_refused(tmp_path, tmp_path)
    assert 0 < opened < 750


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    file.write_bytes(safetensors({"a": entry("F32", [4, 2], 0, 32)}, b"1" * 32))
    tensor = files.open_directory(tmp_path)["a"]
    os.truncate(file, file.stat().st_size - 1)
    assert files.read(tensor, slice(0, 3)).shape == (3, 2)
    for rows in (slice(3, 4), slice(None)):
        with refused(file, "ends before"):
            files.read(tensor, rows)
    file.unlink()
    with refused(file, "cannot be read"):
        files.read(tensor)


# The directory and its index


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    """A directory with tensors `a` and `b` in two files and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "1.safetensors").write_bytes(safetensors({"a": F4}, b"1234"))
    (folder / "2.safetensors").write_bytes(safetensors({"b": F4}, b"5678"))
    index(folder, a="1.safetensors", b="2.safetensors")
    return folder


def test_the_index_leads_to_the_files(two_files: Path) -> None:
    entries = files.open_directory(two_files)
    assert {name: e.file.name for name, e in entries.items()} == {
        "a": "1.safetensors",
        "b": "2.safetensors",
    }


def test_a_missing_directory_or_an_empty_one_is_named(tmp_path: Path) -> None:
    with refused(tmp_path / "none", "no such directory"):
        files.open_directory(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with refused(tmp_path / "file", "no such directory"):
        files.open_directory(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with refused(tmp_path / "empty", "neither", INDEX, SINGLE):
        files.open_directory(tmp_path / "empty")


def test_a_missing_shard_is_named_with_a_tensor_of_it(two_files: Path) -> None:
    (two_files / "2.safetensors").unlink()
    with refused(two_files / "2.safetensors", "'b'", "missing", "download it"):
        files.open_directory(two_files)


OUTSIDE = [
    *("../2.safetensors", "/tmp/2.safetensors", "sub/2.safetensors", "./2.safetensors"),
    *("sub/../2.safetensors", "..", ".", "", "2.safetensors/", "sub\\2.safetensors"),
    *("2.safetensors\0", "2\n.safetensors", "\ud800.safetensors", "2.bin", "pytorch_model.bin"),
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_leads_to_no_other_place_or_kind_of_file(two_files: Path, name: str) -> None:
    (two_files / "sub").mkdir()
    for place in (two_files.parent, two_files / "sub"):
        (place / "2.safetensors").write_bytes((two_files / "2.safetensors").read_bytes())
    index(two_files, a="1.safetensors", b=name)
    with refused(two_files / INDEX, "'b'", "no .safetensors file of this directory"):
        files.open_directory(two_files)


@pytest.mark.parametrize("name", [None, 1, True, [], {}, ["1.safetensors"]])
def test_an_index_names_files(two_files: Path, name: Any) -> None:
    edit(two_files / INDEX, weight_map={"a": "1.safetensors", "b": name})
    with refused(two_files / INDEX, "'b'"):
        files.open_directory(two_files)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no JSON"),
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": ["1.safetensors"]}', "weight_map"),
        ('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', "'a' is there twice"),
    ],
)
def test_a_damaged_index_is_named(two_files: Path, text: str, named: str) -> None:
    (two_files / INDEX).write_text(text)
    with refused(two_files / INDEX, named):
        files.open_directory(two_files)


def test_an_index_beyond_the_cap_is_not_decoded(two_files: Path) -> None:
    os.truncate(two_files / INDEX, 2**40)
    with at_most(3 * files.MAX_HEADER), refused(two_files / INDEX, "longer than"):
        files.open_directory(two_files)


def test_a_tensor_that_its_file_lacks_is_named(two_files: Path) -> None:
    index(two_files, a="1.safetensors", b="2.safetensors", c="2.safetensors")
    with refused(two_files / "2.safetensors", "lacks 'c'", INDEX):
        files.open_directory(two_files)


def test_a_tensor_that_the_index_does_not_list_is_named(two_files: Path) -> None:
    header = {"b": F4, "c": entry("F32", [1], 4, 8)}
    (two_files / "2.safetensors").write_bytes(safetensors(header, b"56789012"))
    with refused(two_files / "2.safetensors", "holds c, which", INDEX, "no file"):
        files.open_directory(two_files)


@pytest.mark.parametrize("listed", ["1.safetensors", "2.safetensors"])
def test_a_tensor_in_two_files_is_named(two_files: Path, listed: str) -> None:
    for number, own in enumerate("bc", start=1):
        header = {"a": F4, own: entry("F32", [1], 4, 8)}
        (two_files / f"{number}.safetensors").write_bytes(safetensors(header, b"56789012"))
    index(two_files, a=listed, b="1.safetensors", c="2.safetensors")
    other = {"1.safetensors": "2.safetensors", "2.safetensors": "1.safetensors"}[listed]
    with refused(two_files / other, "holds a, which", f"puts into {listed}"):
        files.open_directory(two_files)


def test_one_file_beside_the_index_of_others_is_refused(two_files: Path) -> None:
    (two_files / SINGLE).write_bytes(safetensors({"a": F4}, b"1234"))
    with refused(two_files, SINGLE, INDEX, "remove one of them"):
        files.open_directory(two_files)
    (two_files / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE}}))
    assert files.open_directory(two_files).keys() == {"a"}


@pytest.mark.parametrize("name", ["2.safetensors", INDEX])
def test_a_link_out_of_the_directory_is_refused(two_files: Path, name: str) -> None:
    (two_files / name).rename(two_files.parent / "elsewhere")
    (two_files / name).symlink_to(two_files.parent / "elsewhere")
    with refused(two_files / name, "a link out of the directory", "put the file itself there"):
        files.open_directory(two_files)
    (two_files / name).unlink()
    (two_files / name).symlink_to("../elsewhere")
    with refused(two_files / name, "a link out of the directory"):
        files.open_directory(two_files)


def test_a_link_to_the_directory_or_within_it_is_followed(two_files: Path) -> None:
    (two_files / "2.safetensors").rename(two_files / "blob")
    (two_files / "2.safetensors").symlink_to("blob")
    (two_files.parent / "link").symlink_to("model", target_is_directory=True)
    for folder in (two_files, two_files.parent / "link"):
        assert files.open_directory(folder).keys() == {"a", "b"}


def test_what_is_no_file_is_not_opened(two_files: Path) -> None:
    shard = two_files / "2.safetensors"
    shard.unlink()
    os.mkfifo(shard)  # reading it would wait for ever
    with refused(shard, "not a file"):
        files.open_directory(two_files)
    for target in ("2.safetensors", "nothing"):  # a link to itself, and one to nothing
        shard.unlink()
        shard.symlink_to(target)
        with refused(shard, "not a file"):
            files.open_directory(two_files)
    shard.unlink()
    shard.mkdir()
    with refused(shard, "not a file"):
        files.open_directory(two_files)
