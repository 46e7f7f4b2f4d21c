"""Task files: every row of the report, its prompts as texts, and its scores through the harness."""

import importlib.util
import inspect
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from v3jax.evals import data

pytest.importorskip("lm_eval", reason="lm-eval (extra [eval]) is not installed")

TASKS = Path(data.__file__).parent / "tasks"

BASE_ROWS = """
    Pile-test (BPB), BBH (EM), MMLU (EM), MMLU-Redux (EM), MMLU-Pro (EM), DROP (F1), ARC-Easy (EM),
    ARC-Challenge (EM), HellaSwag (EM), PIQA (EM), WinoGrande (EM), RACE-Middle (EM),
    RACE-High (EM), TriviaQA (EM), NaturalQuestions (EM), AGIEval (EM), HumanEval (Pass@1),
    MBPP (Pass@1), LiveCodeBench-Base (Pass@1), CRUXEval-I (EM), CRUXEval-O (EM), GSM8K (EM),
    MATH (EM), MGSM (EM), CMath (EM), CLUEWSC (EM), C-Eval (EM), CMMLU (EM), CMRC (EM), C3 (EM),
    CCPM (EM), MMMLU-non-English (EM)
"""
CHAT_ROWS = """
    MMLU (EM), MMLU-Redux (EM), MMLU-Pro (EM), DROP (3-shot F1), IF-Eval (Prompt Strict),
    GPQA-Diamond (Pass@1), SimpleQA (Correct), FRAMES (Acc.), LongBench v2 (Acc.),
    HumanEval-Mul (Pass@1), LiveCodeBench (Pass@1-COT), LiveCodeBench (Pass@1),
    Codeforces (Percentile), SWE Verified (Resolved), Aider-Edit (Acc.), Aider-Polyglot (Acc.),
    AIME 2024 (Pass@1), MATH-500 (EM), CNMO 2024 (Pass@1), CLUEWSC (EM), C-Eval (EM),
    C-SimpleQA (Correct)
"""
ROWS = {3: BASE_ROWS, 6: CHAT_ROWS, 7: "Arena-Hard, AlpacaEval 2.0"}
"""The rows of the report's tables 3, 6 and 7."""
EXTRAS = {"truthfulqa_mc1", "aime_2025"}


def wide(text: str) -> str:
    """Chinese punctuation for ASCII's."""
    return "".join(chr(ord(c) + 0xFEE0) if c in ",:?" else c for c in text)


# --- The smallest records that the tasks take ---


def choice(i: int, **more: Any) -> dict[str, Any]:
    answer = i % 4
    return {"question": f"Q{i}?", "choices": ["w", "x", "y", "z"], "answer": answer} | more


def columns(i: int, question: str, answer: str, **more: Any) -> dict[str, Any]:
    letters = dict(zip("ABCD", "wxyz", strict=True))
    return {question: f"Q{i}?", answer: "ABCD"[i % 4]} | letters | more


def passage(text: str, question: str, number: str = "", **more: Any) -> dict[str, Any]:
    date = dict.fromkeys(("day", "month", "year"), "")
    answer = {"number": number, "spans": [], "date": date} | more
    others = {name: [value] for name, value in answer.items()}
    return {"passage": text, "question": question, "answer": answer, "validated_answers": others}


def exam(subject: str, question: str, options: list[str] | None, **more: Any) -> dict[str, Any]:
    plain = {"passage": None, "label": None, "answer": None}
    return {"subject": subject, "question": question, "options": options} | plain | more


ABCD = ["(A)a", "(B)b", "(C)c", "(D)d"]
REDUX = [
    choice(1, subject="sea_life", error_type="ok", correct_answer=None),
    choice(2, subject="sea_life", error_type="bad_options_clarity", correct_answer=None),
    choice(3, subject="sea_life", error_type="wrong_groundtruth", correct_answer="B"),
]
PRO = {"question": "P?", "options": ["p", "q", "r"], "answer": "C", "category": "law"}
COT = "A: Let's think step by step. Hm. The answer is (C)."
LONG = {"context": "Long. ", "question": "L?", "answer": "D"} | {f"choice_{c}": c for c in "ABCD"}
PROBLEM = {"problem": "Find $x$.", "answer": "33"}
CODE = {"code": "def f(n):\n    return n", "input": "[1]", "output": "[1]"}
RACE = [
    {"article": "Art.", "question": f"Why {i}?", "options": ["o", "p", "q", "r"], "answer": "C"}
    for i in range(3)
]
ARC = {"choices": {"text": ["u", "v", "w"], "label": ["1", "2", "3"]}, "answerKey": "2"}
HELLASWAG = {"activity_label": "Golf", "ctx_a": "A man swings.", "label": "2"}
HELLASWAG |= {"ctx_b": "he", "endings": ["falls [sic].", 'sings "a".', "can't stop here.", "d."]}
LABELS = {"de": ("Frage: ", "Antwort: "), "zh": (wide("问题:"), wide("逐步解答:"))}
MGSM = [
    {"language": language, "question": f"{ask}Wie {i}: x", "answer": f"{say}Er {i}: 2."}
    for language, (ask, say) in LABELS.items()
    for i in range(8)
]
GPQA = {"Question": "G?", "Correct Answer": "r"} | {f"Incorrect Answer {i}": "x" for i in (1, 2, 3)}
CONTESTS = [
    {"question_content": f"C{i}.", "starter_code": code, "contest_date": f"{day}T00:00:00"}
    for i, (code, day) in enumerate(
        [("", "2024-07-31"), ("class S:", "2024-08-01"), ("", "2024-11-02"), ("", "2024-12-01")]
    )
]

FILES: dict[str, list[dict[str, Any]]] = {
    "agieval/test.jsonl": [
        exam("gaokao-biology", "正确的是", ABCD, label="B"),
        exam("lsat-ar", "Which?", [*ABCD, "(E)e"], label="C", passage="Text."),
        exam("math", "1+1?", None, answer="2"),
        exam("gaokao-mathcloze", "1+1", None, answer="$2$;$3$"),
    ],
    "aime_2024/test.jsonl": [PROBLEM, PROBLEM | {"answer": "34"}],
    "aime_2025/test.jsonl": [PROBLEM],
    "arc_challenge/shots.jsonl": [ARC | {"question": f"Q{i}?"} for i in range(25)],
    "arc_challenge/test.jsonl": [ARC | {"question": "Q?"}],
    "arc_easy/shots.jsonl": [ARC | {"question": f"Q{i}?"} for i in range(25)],
    "arc_easy/test.jsonl": [ARC | {"question": "Q?"}],
    "bbh/shots.jsonl": [
        {"subject": s, "description": "Walk.", "input": f"i{i}", "target": "So the answer is No."}
        for s in ("navigate", "snarks")
        for i in range(3)
    ],
    "bbh/test.jsonl": [
        {"subject": subject, "input": "go?", "target": target}
        for subject, target in (("navigate", "No"), ("navigate", "Yes"), ("snarks", "No"))
    ],
    "c3/test.jsonl": [
        {
            "context": ["好。", "嗯。"],
            "question": "在哪儿",
            "choice": ["店", "医院"],
            "answer": "医院",
        }
    ],
    "ccpm/test.jsonl": [{"translation": "春天。", "choices": ["甲", "乙乙"], "answer": 1}],
    "ceval/shots.jsonl": [columns(i, "question", "answer", subject="law") for i in range(5)],
    "ceval/test.jsonl": [columns(2, "question", "answer", subject="law")],
    "cluewsc/shots.jsonl": [
        {"text": f"他{i}走。", "label": i % 2, "target": {"span1_text": "小李", "span2_text": "他"}}
        for i in range(10)
    ],
    "cluewsc/test.jsonl": [
        {"text": "她走。", "label": 0, "target": {"span1_text": "小王", "span2_text": "她"}}
    ],
    "cmath/shots.jsonl": [
        {"question": f"几{i}", "solution": wide("所以答案是:2。")} for i in range(3)
    ],
    "cmath/test.jsonl": [{"question": "几个", "golden": "4"}],
    "cmmlu/shots.jsonl": [columns(i, "Question", "Answer", subject="anatomy") for i in range(5)],
    "cmmlu/test.jsonl": [columns(2, "Question", "Answer", subject="anatomy")],
    "cmrc/test.jsonl": [
        {"context": "文。", "question": f"问{i}", "answers": {"text": [f"答{i}"]}} for i in range(3)
    ],
    "cnmo_2024/test.jsonl": [{"question": "Find $x$.", "answer": "33"}],
    "cruxeval/test.jsonl": [CODE],
    "drop/shots.jsonl": [passage("Pt.", f"How {i}?", str(i)) for i in range(3)],
    "drop/test.jsonl": [
        passage("Pa.", "How many?", "83.9"),
        passage("Pb.", "Where?", spans=["Rome"]),
        passage("Pa.", "Who?", spans=["Ann", "Bo"]),
        passage("Pa.", "When?", date={"day": "", "month": "May", "year": "1999"}),
    ],
    "gpqa_diamond/test.jsonl": [GPQA, GPQA],
    "gsm8k/shots.jsonl": [
        {"question": f"N{i}?", "answer": f"1+{i}=<<1+{i}=9>>9.\nSo 9.\n#### 9"} for i in range(8)
    ],
    "gsm8k/test.jsonl": [{"question": "How many?", "answer": f"Hm.\n#### {n}"} for n in (18, 6)],
    "hellaswag/shots.jsonl": [HELLASWAG | {"ctx_b": "", "label": str(i % 4)} for i in range(10)],
    "hellaswag/test.jsonl": [HELLASWAG, HELLASWAG | {"label": "0"}],
    "humaneval/test.jsonl": [
        {"task_id": "HumanEval/0", "prompt": 'def f():\n    """Doc."""\n', "entry_point": "f"}
        | {"canonical_solution": "    return 1\n", "test": "assert f() == 1"}
    ],
    "humaneval_mul/test.jsonl": [
        {"language": "cpp", "task_id": "x", "prompt": "int f() {\n", "test": "}"}
    ],
    "ifeval/test.jsonl": [
        {"key": 1, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"]}
        | {"kwargs": [{"relation": None}]}
    ],
    "livecodebench/shots.jsonl": [
        {"question_content": f"S{i}.", "starter_code": "", "solution": "print(1)"} for i in range(3)
    ],
    "livecodebench/test.jsonl": CONTESTS,
    "longbench_v2/test.jsonl": [LONG],
    "math/shots.jsonl": [{"problem": f"p{i}", "solution": f"s{i}"} for i in range(4)],
    "math/test.jsonl": [{"problem": "$1+1$?", "solution": r"$\boxed{2}$."}],
    "math_500/test.jsonl": [PROBLEM],
    "mbpp/shots.jsonl": [
        {"task_id": i, "text": f"T{i}.", "code": f"def f{i}():\r\n  1", "test_list": ["assert t"]}
        for i in range(1, 6)
    ],
    "mbpp/test.jsonl": [{"text": "Add.", "code": "c", "test_list": ["assert a", "assert b"]}],
    "mgsm/shots.jsonl": MGSM,
    "mgsm/test.jsonl": [
        {"language": "de", "question": "Wie viele?", "answer": None, "answer_number": 4},
        {"language": "zh", "question": "几个", "answer": None, "answer_number": 4},
    ],
    "mmlu/shots.jsonl": [choice(i, subject="sea_life") for i in range(5)],
    "mmlu/test.jsonl": [choice(i, subject="sea_life") for i in range(4)],
    "mmlu_pro/shots.jsonl": [PRO | {"question": f"P{i}?", "cot_content": COT} for i in range(5)],
    "mmlu_pro/test.jsonl": [PRO],
    "mmlu_redux/test.jsonl": REDUX,
    "mmmlu/test.jsonl": [
        columns(i, "Question", "Answer", language="DE_DE", Subject="sea_life") for i in range(7)
    ],
    "natural_questions/shots.jsonl": [
        {"question": f"who {i}", "answer": [f"{i}"]} for i in range(5)
    ],
    "natural_questions/test.jsonl": [{"question": "who is it", "answer": ["Al", "Bo"]}],
    "pile/test.jsonl": [{"text": "{{ab}}\n"}, {"text": "cdé"}],
    "piqa/test.jsonl": [{"goal": "To eat,", "sol1": "chew", "sol2": "don't", "label": 0}],
    "race_high/test.jsonl": RACE,
    "race_middle/test.jsonl": RACE,
    "triviaqa/shots.jsonl": [
        {"question": f"Who {i}?", "answer": {"value": f"V{i}", "aliases": ["v"]}} for i in range(5)
    ],
    "triviaqa/test.jsonl": [{"question": "Who?", "answer": {"value": "Al", "aliases": ["Ali"]}}],
    "truthfulqa_mc1/test.jsonl": [
        {"question": "Why?", "mc1_targets": {"choices": ["No.", "Yes."], "labels": [0, 1]}}
    ],
    "winogrande/shots.jsonl": [
        {"sentence": f"The _ ran {i}.", "option1": "cat", "option2": "dog", "answer": "1"}
        for i in range(5)
    ],
    "winogrande/test.jsonl": [
        {"sentence": "So _ sat down.", "option1": "Ann", "option2": "Bo", "answer": "2"}
    ],
}


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All task files, over the records above."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = tmp_path_factory.mktemp("data")
    for name, records in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return TaskManager(
        include_path=[str(TASKS)], include_defaults=False, metadata={"folder": str(folder)}
    )


def names() -> list[str]:
    return [path.stem for path in sorted(TASKS.glob("*/[!_]*.yaml"))]


@pytest.fixture
def as_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What IFEval's scoring imports need not be there for its prompt."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        data.importlib.util,
        "find_spec",
        lambda name: found("json" if name in ("immutabledict", "langdetect") else name),
    )


def requests(manager: Any, name: str, doc: int = -1) -> list[Any]:
    """What a task asks of one of its records."""
    task = manager.load([name])["tasks"][name]
    task.build_all_requests(rank=0, world_size=1)
    wanted = range(len(task.task_docs))[doc]
    return [request for request in task.instances if request.doc_id == wanted]


def prompt(manager: Any, name: str, doc: int = -1) -> str:
    """The context of a record's first request."""
    return requests(manager, name, doc)[0].args[0]


def options(manager: Any, name: str, doc: int = -1) -> list[str]:
    """The scored continuations of a record."""
    return [request.args[1] for request in requests(manager, name, doc)]


# --- The files ---


def reports(manager: Any) -> list[dict[str, Any]]:
    """The rows of the task files and of those that cannot be run."""
    import yaml

    found = [manager.task_index[name].cfg["metadata"]["report"] for name in manager.all_tasks]
    others = yaml.safe_load((TASKS / "not_runnable.yaml").read_text(encoding="utf-8"))
    return [row for row in found if row is not None] + others


def test_every_row_of_the_report_is_there_once(manager: Any) -> None:
    wanted = [
        (table, " ".join(row.split())) for table, rows in ROWS.items() for row in rows.split(",")
    ]
    assert [sum(table == t for t, _ in wanted) for table in ROWS] == [32, 22, 2]
    assert sorted((row["table"], row["row"]) for row in reports(manager)) == sorted(wanted)


def test_the_report_has_a_number_of_each_model(manager: Any) -> None:
    models = {3: 4, 6: 7, 7: 6}
    for row in reports(manager):
        values = row["values"]
        assert len(values) == models[row["table"]], row
        assert all(isinstance(value, float | None) for value in values.values()), row
        assert values["DeepSeek-V3-Base" if row["table"] == 3 else "DeepSeek-V3"] is not None
    missing = [row["row"] for row in reports(manager) if None in row["values"].values()]
    assert sorted(missing) == ["Aider-Polyglot (Acc.)", "SWE Verified (Resolved)"]


def test_rows_that_cannot_be_run_say_why_and_are_no_tasks(manager: Any) -> None:
    import yaml

    rows = yaml.safe_load((TASKS / "not_runnable.yaml").read_text(encoding="utf-8"))
    assert {row["needs"] for row in rows} == {"judge", "agent", "raters"}
    assert all(row["reason"] and "\n" not in row["reason"] for row in rows)
    assert manager.all_tasks == sorted(names())
    assert manager.all_tasks == manager.all_subtasks


@pytest.mark.parametrize("name", names())
@pytest.mark.usefixtures("as_if_installed")
def test_a_task_loads_and_says_what_it_measures(manager: Any, name: str) -> None:
    config = manager.task_index[name].cfg
    assert set(config["dataset_kwargs"]) <= set(inspect.signature(data.load).parameters)
    metadata = config["metadata"]
    assert set(metadata) - {"needs", "reason"} == {"report", "source", "method"}
    texts = [metadata[key] for key in metadata if key not in ("report", "needs")]
    assert all(text and "\n" not in text for text in texts)
    for key in ("test", "shots"):
        assert config["dataset_kwargs"].get(key, "") in metadata["source"]
    report = metadata["report"]
    assert (report is None) == (name in EXTRAS)
    metrics = [metric["metric"] for metric in config["metric_list"]]
    if report is not None:
        assert report["metric"] in metrics
        shots = 2 if "cruxeval" in name else config["dataset_kwargs"].get("n_shots", 0)
        assert report["shots"] in (None, shots)  # CRUXEval's are in its prompt
        assert report.get("scale") == (1 if report["metric"] == "bits_per_byte" else None)
    assert (metrics == ["bypass"]) == (metadata.get("needs") == "execution")
    assert ("needs" in metadata) == ("reason" in metadata)

    task = manager.load([name])["tasks"][name]
    assert task.config.task == name
    assert task.config.num_fewshot == 0
    assert requests(manager, name)
    if task.OUTPUT_TYPE == "generate_until":
        kwargs = task.config.generation_kwargs
        chat = manager.task_index[name].yaml_path.parent.name == "chat"
        assert (kwargs["max_gen_toks"] == 8192) == chat
        assert (kwargs["until"] == []) == chat
        assert kwargs["do_sample"] == (task.config.repeats == 16)


def test_ifeval_says_what_its_scoring_needs(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="ifeval: no module immutabledict; pip install immutab"):
        manager.load(["ifeval"])


def test_missing_data_is_named_through_the_harness(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=[str(TASKS)], include_defaults=False, metadata={"folder": str(tmp_path)}
    )
    with pytest.raises(ValueError, match=r"mmlu: no .*mmlu/test\.jsonl; .* Its data: cais/mmlu, c"):
        manager.load(["mmlu"])


# --- The prompts ---

QUESTION = "Q%d?\nA. w\nB. x\nC. y\nD. z\n"


def test_letters_are_scored_after_solved_items(manager: Any) -> None:
    assert prompt(manager, "mmlu") == (
        "The following are multiple choice questions (with answers) about sea life.\n\n"
        "Q0?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n"
        "Q1?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n"
        "Q2?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n"
        "Q3?\nA. w\nB. x\nC. y\nD. z\nAnswer: D\n\n"
        "Q4?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n"
        "Q3?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert options(manager, "mmlu") == [" A", " B", " C", " D"]
    # The same examples, and the corrected label.
    assert prompt(manager, "mmlu_redux") == prompt(manager, "mmlu")
    task = manager.load(["mmlu_redux"])["tasks"]["mmlu_redux"]
    assert [task.doc_to_target(doc) for doc in task.task_docs] == [1, 1]


def test_mmlu_pro_has_as_many_letters_as_options(manager: Any) -> None:
    text = prompt(manager, "mmlu_pro")
    assert text.startswith(
        "The following are multiple choice questions (with answers) about law.\n\n"
        "P0?\nA. p\nB. q\nC. r\nAnswer: C\n\nP1?\n"
    )
    assert text.endswith("\n\nP?\nA. p\nB. q\nC. r\nAnswer:")
    assert options(manager, "mmlu_pro") == [" A", " B", " C"]


def test_chinese_and_multilingual_letters(manager: Any) -> None:
    assert prompt(manager, "ceval") == wide(
        "以下是中国关于法学考试的单项选择题,请选出其中的正确答案。\n\n"
    ) + (
        "".join(QUESTION % i + wide("答案:") + "ABCDA"[i] + "\n\n" for i in range(5))
        + QUESTION % 2
        + wide("答案:")
    )
    assert prompt(manager, "cmmlu") == (
        wide("以下是关于解剖学的单项选择题,请直接给出正确答案的选项。\n\n")
        + "".join(
            wide("题目:") + QUESTION % i + wide("答案是:") + f"{'ABCDA'[i]}\n\n" for i in range(5)
        )
        + wide("题目:")
        + QUESTION % 2
        + wide("答案是:")
    )
    for name in ("ceval", "cmmlu"):
        assert options(manager, name) == ["A", "B", "C", "D"]
    # The first five of the test are its examples.
    assert prompt(manager, "mmmlu", 0) == (
        "The following are multiple choice questions (with answers) about sea life.\n\n"
        + "".join(QUESTION % i + f"Answer: {'ABCDA'[i]}\n\n" for i in range(5))
        + QUESTION % 5
        + "Answer:"
    )
    assert len(manager.load(["mmmlu"])["tasks"]["mmmlu"].task_docs) == 2


def test_arc_is_asked_for_each_letter_with_and_without_the_question(manager: Any) -> None:
    asked = [request.args for request in requests(manager, "arc_challenge")]
    text = "".join(f"Question: Q{i}?\nA. u\nB. v\nC. w\nAnswer: B\n\n" for i in range(25))
    text += "Question: Q?\nA. u\nB. v\nC. w\nAnswer:"
    assert asked == [(text, " A"), (text, " B"), (text, " C"), ("", " A"), ("", " B"), ("", " C")]


def test_whole_texts_are_options(manager: Any) -> None:
    shots = ["falls .", 'sings "a".', "can't stop here.", "d."] * 3
    assert prompt(manager, "hellaswag") == (
        "".join(f"Golf: A man swings. {shot}\n\n" for shot in shots[:10]) + "Golf: A man swings. He"
    )
    assert options(manager, "hellaswag") == [f" {shot}" for shot in shots[:4]]
    assert prompt(manager, "piqa") == "To eat,"
    assert options(manager, "piqa") == [" chew", " don't"]
    assert prompt(manager, "race_high") == (
        "Article:\nArt.\n\nQ: Why 0?\nA: q\n\nQ: Why 1?\nA: q\n\nQ: Why 2?\nA:"
    )
    assert options(manager, "race_high") == [" o", " p", " q", " r"]
    asked = wide("好。\n嗯。\n请根据上文回答问题:\n在哪儿\n答案:")
    assert prompt(manager, "c3") == asked
    assert options(manager, "c3") == ["店", "医院"]
    assert prompt(manager, "ccpm") == wide(
        "以下是将某句古诗文翻译而成的现代表述:春天。\n该翻译所对应的古诗文是:"
    )
    assert options(manager, "ccpm") == ["甲", "乙乙"]
    assert prompt(manager, "truthfulqa_mc1") == "Q: Why?\nA:"
    assert options(manager, "truthfulqa_mc1") == [" No.", " Yes."]


def test_winogrande_scores_one_completion_after_each_prefix(manager: Any) -> None:
    solved = "".join(f"The cat ran {i}.\n\n" for i in range(5))
    assert [request.args for request in requests(manager, "winogrande")] == [
        (solved + "So Ann", " sat down."),
        (solved + "So Bo", " sat down."),
    ]


def test_documents_are_scored_as_they_are(manager: Any) -> None:
    assert requests(manager, "pile_test", 0)[0].args == ("{{ab}}\n",)


def test_worked_examples_precede_a_question(manager: Any) -> None:
    think = "A: Let's think step by step."
    assert prompt(manager, "gsm8k") == (
        "".join(f"Q: N{i}?\n{think} 1+{i}=9. So 9. The answer is 9.\n\n" for i in range(8))
        + f"Q: How many?\n{think}"
    )
    assert prompt(manager, "bbh", 0) == (
        "Walk.\n\n"
        + "".join(f"Q: i{i}\n{think}\nSo the answer is No.\n\n" for i in range(3))
        + f"Q: go?\n{think}\n"
    )
    assert prompt(manager, "math") == (
        "".join(f"Problem:\np{i}\n\nSolution:\ns{i}\n\n" for i in range(4))
        + "Problem:\n$1+1$?\n\nSolution:"
    )
    assert prompt(manager, "cmath") == (
        "".join(f"Q: 几{i}\nA: {wide('所以答案是:2。')}\n\n" for i in range(3)) + "Q: 几个\nA:"
    )


def test_mgsm_asks_in_the_words_of_its_examples(manager: Any) -> None:
    assert prompt(manager, "mgsm", 0) == (
        "".join(f"Frage: Wie {i}: x\nAntwort: Er {i}: 2.\n\n" for i in range(8))
        + "Frage: Wie viele?\nAntwort:"
    )
    assert prompt(manager, "mgsm", 1).endswith(wide("\n\n问题:几个\n逐步解答:"))


def test_questions_and_answers_of_one_line(manager: Any) -> None:
    assert prompt(manager, "triviaqa") == (
        "Answer these questions:\n"
        + "".join(f"Q: Who {i}?\nA: V{i}\n" for i in range(5))
        + "Q: Who?\nA:"
    )
    assert prompt(manager, "natural_questions") == (
        "Answer these questions:\n"
        + "".join(f"Q: Who {i}?\nA: {i}\n" for i in range(5))
        + "Q: Who is it?\nA:"
    )


def test_examples_are_a_passages_earlier_questions(manager: Any) -> None:
    said = "A: The answer type is {}. So according to above Passage, the answer is"
    start = (
        "Passage: {}\nAnswer the following questions based on the above passage, "
        "please calculate carefully if calculation is necessary.\n"
    )
    number, spans, date = (said.format(kind) for kind in ("number", "spans", "date"))
    assert prompt(manager, "drop", 0) == start.format("Pa.") + f"Q: How many?\n{number}"
    assert prompt(manager, "drop", 1) == start.format("Pb.") + f"Q: Where?\n{said.format('span')}"
    assert prompt(manager, "drop", 3) == start.format("Pa.") + (
        f"Q: How many?\n{number} 83.9.\nQ: Who?\n{spans} Ann, Bo.\nQ: When?\n{date}"
    )
    assert prompt(manager, "cmrc", 2) == wide(
        "文章:文。\n根据上文回答下面的问题。\n问题:问0\n答案:答0\n问题:问2\n答案:"
    )


def test_cluewsc_asks_what_a_pronoun_stands_for(manager: Any) -> None:
    ask = '上面的句子中的"{}"指的是\n'
    assert prompt(manager, "cluewsc") == (
        "".join(f"他{i}走。\n{ask.format('他')}小李\n\n" for i in (0, 2, 4, 6, 8))
        + "她走。\n"
        + ask.format("她")
    )


def test_agieval_has_the_authors_four_prompts(manager: Any) -> None:
    assert [prompt(manager, "agieval", i) for i in range(4)] == [
        "以下是一道中国高考生物选择题"
        + wide(",请选择正确的答案。\n问题:正确的是 选项:")
        + "(A)a (B)b (C)c (D)d\n"
        + wide("答案:从A到D")
        + ", 我们应选择",
        "Text.Q: Which? Answer Choices: (A)a (B)b (C)c (D)d (E)e\n"
        "A: Among A through E, the answer is",
        "Q: 1+1?\nA: The answer is",
        wide("问题:1+1\n答案:"),
    ]


def test_code_is_asked_for(manager: Any) -> None:
    assert prompt(manager, "humaneval") == 'def f():\n    """Doc."""\n'
    task = (
        "You are an expert Python programmer, and here is your task: {} "
        "Your code should pass these tests:\n\n{}\n[BEGIN]\n"
    )
    assert prompt(manager, "mbpp") == (
        "".join(
            task.format(f"T{i}.", "assert t") + f"def f{i}():\n  1\n[DONE]\n\n" for i in (2, 3, 4)
        )
        + task.format("Add.", "assert a\nassert b")
    )
    assert prompt(manager, "livecodebench") == (
        "".join(f"### Question\nS{i}.\n\n### Answer\n\nprint(1)\n\n" for i in range(3))
        + "### Question\nC1.\n\n### Starter Code\nclass S:\n\n### Answer\n\n"
    )
    assert prompt(manager, "cruxeval_o").endswith(
        '\n\n[PYTHON]\ndef f(s):\n    return s + "a"\nassert f("x9j") == ??\n[/PYTHON]\n[ANSWER]\n'
        'assert f("x9j") == "x9ja"\n[/ANSWER]\n\n'
        "[PYTHON]\ndef f(n):\n    return n\nassert f([1]) == ??\n[/PYTHON]\n[ANSWER]\n"
    )
    assert prompt(manager, "cruxeval_i").endswith(
        "[PYTHON]\ndef f(n):\n    return n\nassert f(??) == [1]\n[/PYTHON]\n[ANSWER]\n"
    )


def test_messages_of_chat_models(manager: Any) -> None:
    letters = (
        "Answer the following multiple choice question. The last line of your response should be "
        "of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. "
        "Think step by step before answering.\n\n"
    )
    assert prompt(manager, "mmlu_chat") == letters + "Q3?\n\nA) w\nB) x\nC) y\nD) z"
    text = prompt(manager, "gpqa_diamond", 0)
    task = manager.load(["gpqa_diamond"])["tasks"]["gpqa_diamond"]
    assert text.startswith(letters + "G?\n\nA) ")
    assert f"\n{task.doc_to_target(task.task_docs[0])}) r" in text
    assert prompt(manager, "mmlu_redux_chat", 0) == (
        "## Question:\n\nQ1?\n\n## Choices:\n\n- (A) w\n- (B) x\n- (C) y\n- (D) z\n\n"
        "## Instruction\n\n"
        "Please answer this question by first reasoning and then selecting the correct choice.\n"
        "Present your reasoning and solution in the following json format.\n"
        "Please show your choice in the `answer` field with only the choice letter, e.g.,"
        '`"answer": "C"`.\n\n'
        '```json\n{\n    "reasoning": "___",\n    "answer": "___"\n}\n```\n'
    )
    text = prompt(manager, "mmlu_pro_chat")
    options_ = "Options:\nA. p\nB. q\nC. r\nAnswer: Let's think step by step."
    assert text.startswith(
        "The following are multiple choice questions (with answers) about law. Think step by step "
        'and then finish your answer with "the answer is (X)" where X is the correct letter choice.'
        f"\n\nQuestion:\nP0?\n{options_} Hm. The answer is (C).\n\nQuestion:\nP1?\n"
    )
    assert text.endswith(f"The answer is (C).\n\nQuestion:\nP?\n{options_}")
    assert prompt(manager, "drop_chat", 0) == (
        "You will be asked to read a passage and answer a question. Some examples of passages and "
        "Q&A are provided below.\n\n# Examples\n"
        + "".join(f"---\nPassage: Pt.\nQuestion: How {i}?\nAnswer: {i}\n\n" for i in range(3))
        + "# Your Task\n\n---\nPassage: Pa.\nQuestion: How many?\nAnswer:\n\n"
        'Think step by step, then write a line of the form "Answer: $ANSWER" at the end of your '
        "response."
    )
    asked = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    for name in ("aime_2024", "aime_2025", "cnmo_2024", "math_500"):
        assert prompt(manager, name) == "Find $x$." + asked
    assert prompt(manager, "longbench_v2") == (
        "Please read the following text and answer the question below.\n\n<text>\nLong.\n</text>"
        "\n\nWhat is the correct answer to this question: L?\nChoices:\n(A) A\n(B) B\n(C) C\n"
        '(D) D\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
    )
    assert prompt(manager, "ceval_chat").endswith("\n\nQ2?\nA. w\nB. x\nC. y\nD. z")
    assert "C++ function" in prompt(manager, "humaneval_mul")
    assert prompt(manager, "livecodebench_chat", 0).endswith(
        "\n```python\nclass S:\n```\n\n### Answer: (use the provided format with backticks)\n"
    )
    assert "YOUR CODE HERE" in prompt(manager, "livecodebench_cot", 1)
    assert len(manager.load(["livecodebench_cot"])["tasks"]["livecodebench_cot"].task_docs) == 2


# --- The scores ---


def evaluate(manager: Any, tasks: Sequence[str], likely: str = "", text: str = "") -> Any:
    """The harness's results of a model that always says `text`, and finds `likely` likely.

    Any other continuation has a log-probability of -8, and a document 8 bits a byte. Of repeated
    requests only the first gets `text`.
    """
    from lm_eval import evaluator
    from lm_eval.api.model import LM

    class Constant(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(-4.0 if r.args[1] == likely else -8.0, False) for r in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [-8 * math.log(2) * len(r.args[0].encode()) for r in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            seen: set[int] = set()
            texts = []
            for request in requests:
                texts.append("" if id(request) in seen else text)
                seen.add(id(request))
            return texts

    harness: Any = evaluator
    found = harness.simple_evaluate(
        model=Constant(), tasks=list(tasks), task_manager=manager, bootstrap_iters=0
    )
    assert found is not None
    return found


def test_a_constant_letter_is_right_where_it_is_the_answer(manager: Any) -> None:
    results = evaluate(manager, ["mmlu", "arc_easy", "hellaswag", "winogrande"], likely=" B")
    scores = results["results"]
    assert scores["mmlu"]["acc,none"] == 0.25
    # As likely without the question, the letter says nothing, and the first one counts.
    assert scores["arc_easy"]["acc_mutual_info,none"] == 0
    # All endings are as likely, so the one with the most bytes has the best of a byte.
    assert scores["hellaswag"]["acc_bytes,none"] == 0.5
    assert scores["winogrande"]["acc,none"] == 0


def test_a_constant_answer_is_right_where_it_is_the_answer(manager: Any) -> None:
    scores = evaluate(manager, ["gsm8k", "bbh"], text=" The answer is 18.")["results"]
    assert scores["gsm8k"]["exact_match,none"] == 0.5
    scores = evaluate(manager, ["bbh", "drop"], text=" So the answer is No.")["results"]
    # One of two questions of a subject, and all of another.
    assert scores["bbh"]["exact_match,none"] == 0.75
    assert scores["drop"]["f1,none"] == 0
    scores = evaluate(manager, ["drop", "mmlu_chat"], text="83.9.\nAnswer: D")["results"]
    assert scores["drop"]["f1,none"] == scores["drop"]["exact_match,none"] == 0.25
    assert scores["mmlu_chat"]["exact_match,none"] == 0.25


def test_sixteen_samples_of_a_problem_give_their_mean(manager: Any) -> None:
    found = evaluate(manager, ["aime_2024"], text=r"So $\boxed{33}$.")
    assert found["results"]["aime_2024"]["exact_match,none"] == pytest.approx(1 / 16 / 2)
    assert [len(sample["resps"][0]) for sample in found["samples"]["aime_2024"]] == [16, 16]


def test_bits_are_counted_per_byte_of_all_documents(manager: Any) -> None:
    scores = evaluate(manager, ["pile_test"])["results"]
    assert scores["pile_test"]["bits_per_byte,none"] == pytest.approx(8)


def test_completions_of_code_are_kept_without_a_score(manager: Any) -> None:
    found = evaluate(manager, ["humaneval"], text="    return 1\n")
    assert found["results"]["humaneval"]["bypass,none"] == 999  # the harness's word for none
    assert found["samples"]["humaneval"][0]["resps"] == [["    return 1\n"]]
