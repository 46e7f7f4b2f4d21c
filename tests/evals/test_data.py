"""Records of tasks: their files, their solved examples, and what is said of bad ones."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from v3jax.evals import answers, data, packaged


def put(folder: Path, name: str, *records: dict[str, Any] | str) -> Path:
    """A file of records, or of lines as they are."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def load(folder: Path, **options: Any) -> data.Records:
    """The test split, with metadata as the harness passes it."""
    given: dict[str, Any] = {
        "source": "org/set, split test to t.jsonl",
        "config_source": "/x/tasks/quiz.yaml",
    }
    given |= {"report": None, "method": "m", "test": "t.jsonl"}
    return data.load(folder=str(folder), **given | options)["test"]


def q(i: int, **more: Any) -> dict[str, Any]:
    return {"q": f"q{i}"} | more


def shots(records: data.Records) -> list[list[str]]:
    return [[shot["q"] for shot in record["shots"]] for record in records]


def test_records_come_in_their_order_and_know_their_fields(tmp_path: Path) -> None:
    put(tmp_path, "t.jsonl", q(1, text="a\u2028b\n"), "", q(2, text="é"))
    found = load(tmp_path, fields=["q", "text"])
    assert [r["text"] for r in found] == ["a\u2028b\n", "é"]
    assert list(found.features) == ["q", "text", "shots"]
    assert shots(found) == [[], []]


def test_a_compressed_file_stands_in_for_a_missing_one(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "t.jsonl.gz", "wt", encoding="utf-8") as out:
        out.write(json.dumps(q(1)) + "\n")
    assert len(load(tmp_path)) == 1
    put(tmp_path, "t.jsonl", q(1), q(2))
    assert len(load(tmp_path)) == 2


def test_all_records_get_the_first_examples_of_the_file(tmp_path: Path) -> None:
    put(tmp_path, "t.jsonl", q(1), q(2))
    put(tmp_path, "s.jsonl", q(7), q(8), q(9))
    assert shots(load(tmp_path, shots="s.jsonl", n_shots=2)) == [["q7", "q8"]] * 2


def test_examples_share_the_subject_of_the_record(tmp_path: Path) -> None:
    put(tmp_path, "t.jsonl", q(1, s="b", n=1), q(2, s="a", n=1))
    put(tmp_path, "s.jsonl", *(q(i, s="ab"[i % 2], n=1) for i in range(6)))
    options = {"shots": "s.jsonl", "n_shots": 2}
    assert shots(load(tmp_path, same="s", **options)) == [["q1", "q3"], ["q0", "q2"]]
    assert shots(load(tmp_path, same=["s", "n"], **options)) == [["q1", "q3"], ["q0", "q2"]]
    with pytest.raises(ValueError, match=r"quiz: .*s\.jsonl holds 3 of 4 solved examples of s 'b'"):
        load(tmp_path, same="s", shots="s.jsonl", n_shots=4)


def test_examples_may_be_chosen_by_a_field(tmp_path: Path) -> None:
    put(tmp_path, "t.jsonl", q(1))
    put(tmp_path, "s.jsonl", *(q(i, label=i % 2) for i in range(6)))
    chosen = {"shots": "s.jsonl", "shots_where": {"label": [1, "true"]}}
    assert shots(load(tmp_path, n_shots=2, **chosen)) == [["q1", "q3"]]
    with pytest.raises(ValueError, match="holds 3 of 4"):
        load(tmp_path, n_shots=4, **chosen)


def test_examples_taken_from_the_test_leave_it(tmp_path: Path) -> None:
    put(tmp_path, "t.jsonl", *(q(i, s="ab"[i % 2]) for i in range(7)))
    found = load(tmp_path, shots="t.jsonl", n_shots=2, same="s")
    assert [r["q"] for r in found] == ["q4", "q5", "q6"]
    assert shots(found) == [["q0", "q2"], ["q1", "q3"], ["q0", "q2"]]
    put(tmp_path, "t.jsonl", q(1), q(2))
    with pytest.raises(ValueError, match="holds nothing but 2 solved examples"):
        load(tmp_path, shots="t.jsonl", n_shots=2)


def test_earlier_records_of_a_passage_are_examples(tmp_path: Path) -> None:
    put(tmp_path, "t.jsonl", *(q(i, p="xy"[i == 1]) for i in range(5)))
    found = load(tmp_path, n_shots=2, same="p", earlier=True)
    assert shots(found) == [[], [], ["q0"], ["q0", "q2"], ["q0", "q2"]]


def test_dates_are_bounded_on_both_sides(tmp_path: Path) -> None:
    days = ["2024-07-31T23:00:00", "2024-08-01T00:00:00", "2024-11-01T09:00:00", "2024-11-02"]
    put(tmp_path, "t.jsonl", *(q(i, day=day) for i, day in enumerate(days)))
    found = load(tmp_path, between=["day", "2024-08-01", "2024-11-01"])
    assert [r["q"] for r in found] == ["q1", "q2"]
    with pytest.raises(ValueError, match="no records between 2025-01-01 and 2025-02-01"):
        load(tmp_path, between=["day", "2025-01-01", "2025-02-01"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], r"t\.jsonl, line 1: not JSON \(.*\); one object a line"),
        ([q(1, s=1), "[1]"], r"t\.jsonl, line 2: not a JSON object"),
        ([q(1, s=1), "", {"s": 1}], r"t\.jsonl, line 3: no field 'q'; needed are q, s"),
        ([q(1)], r"t\.jsonl, line 1: no field 's'"),
        ([], r"quiz: .*t\.jsonl holds no records\. Its data: org/set, split test"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, lines: list[Any], said: str) -> None:
    put(tmp_path, "t.jsonl", *lines)
    with pytest.raises(ValueError, match=said) as caught:
        load(tmp_path, fields=["q"], same="s")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_where_its_data_comes_from(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"quiz: no .*t\.jsonl; write it, .* --data=DIR\. Its data: org"
    ):
        load(tmp_path)
    put(tmp_path, "t.jsonl", q(1))
    with pytest.raises(ValueError, match=r"quiz: no .*s\.jsonl; write it"):
        load(tmp_path, shots="s.jsonl", n_shots=1)


def test_examples_need_their_own_fields(tmp_path: Path) -> None:
    put(tmp_path, "t.jsonl", q(1, gold=1))
    put(tmp_path, "s.jsonl", q(1, solution="s"))
    options = {"fields": ["q", "gold"], "shots": "s.jsonl", "n_shots": 1}
    assert len(load(tmp_path, shot_fields=["q", "solution"], **options)) == 1
    with pytest.raises(ValueError, match=r"s\.jsonl, line 1: no field 'gold'"):
        load(tmp_path, **options)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(q(1)).encode() * 100)
    (tmp_path / "t.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"t\.jsonl\.gz: damaged"):
        load(tmp_path)
    (tmp_path / "t.jsonl").write_bytes(b'{"q": "\xff"}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl: damaged"):
        load(tmp_path)


def test_a_module_that_scoring_needs_is_missed_before_the_run(tmp_path: Path) -> None:
    put(tmp_path, "t.jsonl", q(1))
    assert len(load(tmp_path, requires=["json"])) == 1
    with pytest.raises(ValueError, match="quiz: no module no_such_one; pip install json no_such_"):
        load(tmp_path, requires=["json", "no_such_one"])


def test_redux_keeps_sound_and_corrected_questions() -> None:
    def record(error_type: str, correct: str | None) -> dict[str, Any]:
        return {"answer": 0, "error_type": error_type, "correct_answer": correct}

    given = [
        record("ok", None),
        record("wrong_groundtruth", "C"),
        record("wrong_groundtruth", "the third"),
        record("multiple_correct_answers", "A"),
    ]
    assert [r["answer"] for r in data.redux(data.Records(given))] == [0, 2]
    with pytest.raises(ValueError, match="mmlu_redux: no record has the error_type ok"):
        data.redux(data.Records(given[2:]))


def test_gpqa_is_shuffled_alike_each_time() -> None:
    names = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    given = data.Records(
        {"Question": f"q{i}"} | dict(zip(names, "rxyz", strict=True)) for i in range(9)
    )
    found = data.shuffled(given)
    assert found == data.shuffled(given)
    assert len({r["letter"] for r in found}) > 1
    for record in found:
        assert record["choices"]["ABCD".index(record["letter"])] == "r"
        assert sorted(record["choices"]) == sorted("rxyz")


@pytest.mark.parametrize("module", [answers, data, packaged])
def test_the_files_import_neither_jax_nor_the_harness(module: Any) -> None:
    """In a fresh interpreter, as the tests' own have both."""
    code = f"import sys, {module.__name__}; print({{'jax', 'lm_eval'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
