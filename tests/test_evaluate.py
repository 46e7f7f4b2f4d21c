"""`python -m v3jax.evaluate`: results beside the report's, built-ins, mistakes in one line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import mini
from v3jax.evals import catalogue

needs_harness = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("lm_eval") is None,
    reason="needs the extra eval: lm-eval",
)


def call(*arguments: str) -> Any:
    return mini.call(mini.command(*arguments, program="evaluate"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of a few tasks, small enough for a context of 32 tokens."""
    folder = tmp_path_factory.mktemp("data")

    def write(file: str, records: list[dict[str, Any]]) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("".join(json.dumps(r) + "\n" for r in records))

    piqa = [{"goal": "a", "sol1": f"{n} x", "sol2": f"y {n}", "label": n % 2} for n in range(6)]
    write("piqa/test.jsonl", piqa)
    write("pile/test.jsonl", [{"text": "import os\n" * n} for n in (1, 2, 9)])
    program = {"prompt": "def f", "entry_point": "f", "canonical_solution": "", "test": ""}
    write("humaneval/test.jsonl", [program | {"task_id": f"HumanEval/{n}"} for n in range(2)])
    return folder


@needs_harness
def test_results_stand_beside_the_reports(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        f"--ckpt={mini.finished()}",
        "--tasks=piqa,pile_test,humaneval,held_out,acceptance",
        f"--data={data}",
        f"--out={out}",
        "--max-new-tokens=4",
        "--truncate",
    ]
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert lines["piqa"][1] == "acc_bytes"
    assert lines["piqa"][5:8] == ["6", "84.7", "DeepSeek-V3-Base,"]
    assert lines["pile_test"][-2:] == ["0.548", "DeepSeek-V3-Base"]
    assert 1 < float(lines["pile_test"][2]) < 20  # bits a byte, not percent
    assert "needs execution" in done.stdout
    assert lines["all"][2].endswith("%")
    results = json.loads((out / "results.json").read_text())
    assert results["n-samples"]["piqa"]["effective"] == 6
    assert results["held_out"][0]["name"] == results["acceptance"][0]["name"] == "user"
    assert "MoE layer 0" in (out / "specialisation.html").read_text()
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {s["task"] for s in samples} == {"humaneval", "piqa", "pile_test"}
    programs = (out / "humaneval.completions.jsonl").read_text().splitlines()
    assert [json.loads(p)["task_id"] for p in programs] == ["HumanEval/0", "HumanEval/1"]

    # The same command asks the model nothing anew and says the same.
    before = (out / "answers.jsonl").read_text()
    again = call(*arguments)
    assert again.stdout == done.stdout
    assert (out / "answers.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks=gsm8"], 2, "no task 'gsm8'; did you mean gsm8k?"),
        (["--tasks=zzzz"], 2, "--list shows the tasks"),
        (["--tasks=swe_verified"], 2, "needs more than a model: the agentless framework"),
        (["--tasks=mine.yaml"], 2, "mine.yaml: no such file"),
        ([], 2, "--tasks=NAME,... is missing"),
        (["--tasks=held_out", "--limit=0"], 2, "limit"),
        (["--tasks=held_out", "x"], 2, "unexpected arguments x"),
    ],
)
def test_mistakes_in_the_call_are_one_line(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    done = call(f"--ckpt={tmp_path}", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=mmlu"], "mmlu: no "),
        (["--tasks=piqa", "--max-length=33"], "made for 32 tokens"),
        (["--tasks=pile_test,piqa", "--max-length=2"], "exceeds the model's context of 2"),
        (["--tasks=humaneval"], "exceeds the model's context of 32; --truncate"),
        (["--tasks=held_out", "--ckpt=nowhere"], "nowhere: no model here"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    arguments: list[str], message: str, data: Path, tmp_path: Path
) -> None:
    done = call(f"--ckpt={mini.finished()}", f"--data={data}", f"--out={tmp_path}", *arguments)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("v3jax.evaluate: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need the extra eval; pip install .*\[eval\]"):
        catalogue.load(["gsm8k"], Path())


def test_the_list_has_every_task_with_its_data_and_reason(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").touch()
    done = call("--list", f"--data={tmp_path}")
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert len(lines) == len(catalogue.files()) + len(catalogue.not_runnable()) + 4
    assert "no data" not in lines["gsm8k"]
    assert "no data" in lines["mmlu"]
    assert "not runnable" in lines["swe_verified"]
    assert "needs execution" in lines["humaneval"]
