"""Files by hand, whole or wrong in one place, and how an error has to look."""

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        0.0,
        -0.5,
        1.5,
        1e308,
        2**31,
        2**63,
        2**64,
        -(2**70),
        10**400,
    ),
    *("", "F32", "yarn", "..", "a\nb", "\u2028", "\ud800", "\x00", "x" * 5000),
    *([], [0], [-1, 4], [4, 0], [1.0], [2**62, 2**62], [[]], [0, 2**64], ["a"], [1] * 5000),
    *({}, {"a": 1}, {"type": "yarn"}, {"dtype": "F32"}),
]
"""Values to put where others belong."""


@contextmanager
def refused(*named: object) -> Iterator[None]:
    """Asserts a ValueError of one line of moderate length that has each of `named` in it."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        yield
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 1500, message[:3000]
    for name in named:
        assert str(name) in message, message


@contextmanager
def at_most(n_bytes: float) -> Iterator[None]:
    """Asserts that Python and NumPy never hold more than so many bytes beyond what they had."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= n_bytes, f"{peak / 2**20:.1f} MiB"


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file's bytes. `header` is JSON text or what it stands for; `length` is what the file says
    of the header's, if not the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    told = len(text) if length is None else length
    return told.to_bytes(8, "little") + text + data


def entry(dtype: Any, shape: Any, *place: Any) -> dict[str, Any]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": list(place)}


def edit(file: Path, **changes: Any) -> None:
    """Changes fields of a JSON object in a file; those set to `...` are dropped."""
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: v for name, v in fields.items() if v is not ...}))


def index(folder: Path, **weight_map: str) -> None:
    """Writes an index; keyword `a` stands for the tensor `a`."""
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
