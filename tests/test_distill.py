"""Reasoning data from an expert: what is kept, what is written, the whole loop."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import mini
from tests.test_sft import chats, tuned
from v3jax import reasoning
from v3jax.config import SourceConfig
from v3jax.data import instructions
from v3jax.data.conversations import text_of
from v3jax.data.problems import Problem, read_problems
from v3jax.evals import problems as asking
from v3jax.evals.problems import Answer, pass_rate
from v3jax.models import open_model
from v3jax.rewards.rules import exact, final_number, rule_named


def problem(question: str = "1 + 1?", answer: str = "2", rule: str = "final_number") -> Problem:
    return Problem("sum", ({"role": "user", "content": question},), answer, rule)


def answer(text: str, *, right: bool = True, n_tokens: int = 5) -> Answer:
    return Answer(problem(), text, right, True, n_tokens)


HOW = reasoning.Sampling(
    samples=2, temperature=1.0, top_p=1.0, max_tokens=8, seed=0, system="Think."
)


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("3 + 4 = 7. The answer is 7.", "The answer is 7.", True),
        ("The answer is 8, not 7", "8", False),
        ("7.0", "7", True),
        ("1,234", "1234", True),
        ("-3", "3", False),
        ("none", "3", False),
        ("3", "none", False),
    ],
)
def test_the_last_number_counts(text: str, reference: str, right: bool) -> None:
    assert final_number(text, reference) is right


def test_exact_answers_are_exact() -> None:
    assert exact(" I say so.\n", "I say so.")
    assert not exact("I say so", "I say so.")
    with pytest.raises(ValueError, match=r"rule: no 'best'; there are exact, final_number"):
        rule_named("best")


def test_the_shortest_right_answer_is_kept() -> None:
    asked = [problem("a?"), problem("b?"), problem("c?")]
    found = [
        answer("x", n_tokens=9),
        answer("y", n_tokens=4),
        answer("z", right=False, n_tokens=1),
        answer("w", right=False),
        answer("u", n_tokens=4),
        answer("v", n_tokens=4),
    ]
    kept = reasoning.chosen(asked, found, 2)
    assert [(p.messages[0]["content"], a.text) for p, a in kept] == [("a?", "y"), ("c?", "u")]


def test_a_problem_makes_the_two_samples_of_the_report() -> None:
    original, reasoned = reasoning.sample_forms(problem(), answer("1 + 1 = 2. 2"), "Think.")
    assert [m["content"] for m in original["messages"]] == ["1 + 1?", "2"]
    assert [m["content"] for m in reasoned["messages"]] == ["Think.", "1 + 1?", "1 + 1 = 2. 2"]
    assert reasoned["messages"][0]["role"] == "system"
    for row in (original, reasoned):
        text_of(row, "here")  # fine-tuning takes it


def written(folder: Path, *rows: Any) -> Path:
    file = folder / "problems.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def test_problems_are_read_from_lines(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    file = written(
        tmp_path,
        {"problem": "1 + 1?", "answer": "2"},
        {"messages": messages, "answer": "yes", "rule": "exact", "kind": "word"},
    )
    first, second = read_problems(file, "final_number")
    assert first == Problem(
        "problems", ({"role": "user", "content": "1 + 1?"},), "2", "final_number"
    )
    assert (second.kind, second.rule, second.asked("t")[0]["content"]) == ("word", "exact", "t")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "q"}, "no text field 'answer'"),
        ({"answer": "a"}, "no text field 'problem', nor 'messages'"),
        ({"answer": "a", "messages": []}, "messages: not a list of messages"),
        ({"answer": "a", "messages": [{"role": "assistant", "content": "x"}]}, "an assistant's"),
    ],
)
def test_lines_that_are_no_problem_are_refused_by_place(
    tmp_path: Path, row: Any, message: str
) -> None:
    file = written(tmp_path, {"problem": "q", "answer": "a"}, row)
    with pytest.raises(ValueError, match=f"{file}:2: {message}"):
        read_problems(file, "exact")


def test_an_answer_counts_only_if_the_model_ends_it() -> None:
    loaded = open_model(mini.finished())
    anything = replace(problem(), rule="exact", answer="")
    found = asking.answers(loaded, [anything] * 3, samples=2, temperature=1.0, max_tokens=4)
    assert len(found) == 6
    for one in found:
        assert one.right <= one.finished
        assert one.finished == (one.n_tokens < 4 or one.right)
    again = asking.answers(loaded, [anything] * 3, samples=2, temperature=1.0, max_tokens=4)
    assert [a.text for a in again] == [a.text for a in found]
    assert len({a.text for a in found}) > 1, "samples differ"
    assert pass_rate(found) == sum(a.right for a in found) / 6


def test_a_prompt_beyond_the_context_is_refused() -> None:
    loaded = open_model(mini.finished())
    with pytest.raises(ValueError, match=r"exceed the model's context of 32; lower"):
        asking.answers(loaded, [problem()], max_tokens=64)


def solved(patch: pytest.MonkeyPatch) -> list[int]:
    """Makes every first sample of an answer right; the calls so far."""
    calls = []

    def answers(loaded: Any, asked: Any, *, samples: int = 1, **_: Any) -> list[Answer]:
        calls.append(len(asked) * samples)
        return [
            Answer(p, f"So it is {p.answer}", k == 0, True, 7)
            for p in asked
            for k in range(samples)
        ]

    patch.setattr(reasoning, "answers", answers)
    return calls


def test_the_loop_ends_in_a_report_and_is_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = solved(monkeypatch)
    cfg = tuned(chats(tmp_path))
    own = SourceConfig(name="own", weight=1.0, max_mb=1.0, path=str(tmp_path / "chats.jsonl"))
    cfg = replace(cfg, data=replace(cfg.data, path=None, sources=(own,)))
    asked = [problem(f"{i} + 1?", str(i + 1)) for i in range(5)]
    out = tmp_path / "out"
    out.mkdir()
    made = reasoning.distil(str(mini.finished()), asked, out, HOW)
    assert (made.answers, made.right, made.solved, made.pass_rate) == (10, 5, 5, 0.5)
    assert reasoning.distil(str(mini.finished()), asked, out, HOW) == made
    assert calls == [10]
    figures = reasoning.loop(cfg, made, str(mini.finished()), asked[:2], out, HOW)
    assert figures["before"]["plain"] == (1.0, 7.0)
    assert json.loads((out / "report.json").read_text())["held_out_problems"] == 2
    page = (out / "report.html").read_text()
    assert "So it is 1" in page
    assert "100.0% solved" in page
    documents = (out / "sft" / "data_files.txt").read_text()
    assert documents.count("distilled") == 10


def test_an_expert_that_solves_nothing_is_refused(tmp_path: Path) -> None:
    hard = replace(problem(), answer="never said", rule="exact")
    with pytest.raises(ValueError, match=r"none of 4 answers to 2 problems is right"):
        reasoning.distil(str(mini.finished()), [hard] * 2, tmp_path, HOW)


def test_the_program_runs(tmp_path: Path) -> None:
    """From the command line to the samples, with the mini run as an expert in ending its turn."""
    file = written(tmp_path, {"problem": "q", "answer": "a"})
    call = mini.command(
        f"--expert={mini.finished()}",
        f"--problems={file}",
        f"--out={tmp_path / 'out'}",
        "--tokens=4",
        "--system=t",
        program="distill",
    )
    done = mini.call(call)
    assert done.returncode == 1
    assert done.stderr.startswith(f"v3jax.distill: {mini.finished()}: none of 8 answers to 1")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--expert=MODEL, --problems=FILE and --out=FOLDER are all needed"),
        (["--then=v3_tiny_sft"], 2, "are all needed"),
        (["--expert=x", "--problems=f", "--out=o", "--then=v3_tiny_sft"], 2, "--then and --before"),
        (
            ["--expert=x", "--problems=f", "--out=o", "--then=v3_tiny", "--before=x"],
            2,
            "--then=v3_tiny: fine-tunes on no data.sources of conversations",
        ),
        (
            ["--expert=x", "--problems=f", "--out=o", "--then=v3_tiny_sft", "--before=x"],
            2,
            "--test=FILE is missing",
        ),
        (["--expert=x", "--problems=f", "--out=o"], 1, "f: cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    arguments = [a.replace("--out=o", f"--out={tmp_path / 'o'}") for a in arguments]
    done = mini.call(mini.command(*arguments, program="distill"))
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_embedded_problems_are_of_the_side_that_is_asked_for() -> None:
    train = reasoning.problems_named("chains", "exact", 50)
    held = reasoning.problems_named("chains", "exact", 50, "held_out")
    assert train == instructions.problems("chains", "train", 50)
    questions = [{p.messages[0]["content"] for p in side} for side in (train, held)]
    assert not questions[0] & questions[1]
