"""The README speaks of code that exists: its map, its tree, its flags and its first command."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kept import kept, markdown
from v3jax import registry
from v3jax.pipeline.schedule import SCHEDULES, reported_bubble, with_waiting
from v3jax.pipeline.table import make_table
from v3jax.pipeline.ticks import abreast, lockstep


@pytest.fixture
def readme(repo: Path) -> str:
    return (repo / "README.md").read_text()


def test_every_file_and_symbol_of_the_map_exists(readme: str, repo: Path) -> None:
    places = re.findall(r"`((?:v3jax|tests|experiments)/[\w/]+\.py)(?::(\w+))?`", readme)
    assert len(places) > 30
    for path, symbol in places:
        tree = ast.parse((repo / path).read_text())
        defined = {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert not symbol or symbol in defined, f"{path} defines no {symbol}"


def test_the_tree_names_every_module(readme: str, repo: Path) -> None:
    tree = readme.split("```\nexperiments/")[1].split("```")[0]
    for path in (repo / "v3jax").rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            assert re.search(rf"\b{path.stem}\b", tree), f"the README's tree lacks {path.stem}"


def test_the_tree_names_every_experiment_file(readme: str, repo: Path) -> None:
    for path in (repo / "experiments").glob("*.py"):
        assert path.name == "__init__.py" or path.name in readme


def test_experiments_it_speaks_of_are_registered(readme: str) -> None:
    spoken = set(re.findall(r"--exp=(v3_\w+)", readme))
    assert spoken
    assert spoken <= set(registry.names())


def test_tables_of_compiled_steps_are_those_of_the_kept_results(readme: str, repo: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.full_size", "--parts=readme"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True)
    tables = done.stdout.strip().split("\n\n")
    assert len(tables) == 7
    for name in ("pipeline", "fp8"):
        command = [sys.executable, "-m", f"benchmarks.{name}", "--tables=readme"]
        done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True)
        tables += done.stdout.strip().split("\n\n")
    assert len(tables) == 11
    for table in tables:
        assert table in readme


@pytest.mark.parametrize(
    ("name", "table", "n_rows"),
    [
        ("prepare", "domains", 13),
        ("tokenizer", "bytes a token", 13),
        ("long_context", "found", 6),
        ("phases", "phases", 4),
        ("fine_tuning", "by seed", 3),
    ],
)
def test_tables_of_the_readme_are_those_of_the_kept_results(
    readme: str, name: str, table: str, n_rows: int
) -> None:
    rows = kept(name)[table]
    assert len(rows) == n_rows
    assert markdown(list(rows[0]), [list(row.values()) for row in rows]) in readme


def test_figures_of_the_loader_are_those_of_the_kept_results(readme: str) -> None:
    found = kept("loader")
    said = " ".join(readme.split())
    for words in (
        f"best fit pads {found['best fit: padding']:.3%} of a 4K row",
        f"end to end cuts {found['end to end: documents cut that fit a row']:.0%} of them",
        f"packed in {found['1M documents packed, s']:.1f} s",
        f"in {found['resume at any position, s, the slowest of 10']:.2f} s",
        f"{found['a thread, times what is trained']:.0f} times the tokens",
        f"two processes {found['2 processes, times what is trained']:.0f} times",
        f"a step waits {1000 * found['waits for data, s a step, median']:.1f} ms",
    ):
        assert words in said, words
    assert found["mixture: largest distance from its weight"] < 1e-4  # "within 0.01%"


def test_figures_of_the_corpus_are_those_of_the_kept_results(readme: str) -> None:
    said = " ".join(readme.split())
    prepared, tokenizer, encoding = map(kept, ("prepare", "tokenizer", "encoding"))
    documents = [int(row["documents read"].replace(",", "")) for row in prepared["domains"]]
    removed = [f"{one['removed']:,} of {one['planted']:,}" for one in prepared["planted"].values()]
    assert encoding["same_ids"]
    for words in (
        f"{sum(float(row['MB read']) for row in prepared['domains']):.0f} MB of real text",
        f"{sum(documents):,} documents of which {documents[-1]:,} are planted",
        f"exact copies {removed[0]} were removed",
        f"words changed) {removed[1]}",
        f"in disguise {removed[2]}",
        f"{tokenizer['ids']:,} ids takes {tokenizer['seconds']:.0f} s to train on "
        f"{tokenizer['megabytes']:.0f} MB",
        f"{encoding['in bulk, MB/s'] / encoding['tokenizers, MB/s']:.1f} times as fast, "
        f"{encoding['in bulk, MB/s']:.1f} MB/s on two cores",
    ):
        assert words in said, words


def test_losses_in_fp8_are_those_of_the_claims(readme: str, repo: Path) -> None:
    claims = (repo / "benchmarks" / "results" / "claims.md").read_text(encoding="utf-8")
    (row,) = (line for line in claims.splitlines() if "loss in FP8 stays near" in line)
    one, two, three = re.findall(r"[\d.]+%", row.split(" by seed")[0])[-3:]
    said = " ".join(readme.split())
    assert f"apart by at most {one}, {two} and {three}" in said
    (chance,) = re.findall(r"FP32 for BF16: ([\d.]+%)", row)
    assert f"FP32 is {chance} from BF16" in said
    (difference,) = re.findall(r"held-out loss \+([\d.]+ ± [\d.]+)", row)
    assert f"held-out losses are {difference} apart" in said


def test_evaluation_figures_are_those_of_the_kept_results(readme: str, repo: Path) -> None:
    kept = json.loads((repo / "benchmarks" / "results" / "evaluation.json").read_text())
    (row,) = (line for line in readme.splitlines() if line.endswith("| `evaluation` |"))
    said = dict(re.findall(r"(choice|examples|documents|texts) ([\d.]+)", row))
    ratios = {one["task"]: f"{one['ratio']:.2f}" for one in kept["tasks"]}
    assert said == {
        "choice": ratios["choice"],
        "examples": ratios["few_shot"],
        "documents": ratios["rolling"],
        "texts": ratios["texts"],
    }
    assert f"{kept['ratio']:.2f} times as fast in all" in row
    apart = [one["scores"].split(" nats, ")[-1].removesuffix(" of it") for one in kept["tasks"][:3]]
    assert float(re.findall(r"within ([\d.e-]+) of each", row)[0]) == max(map(float, apart))


@pytest.mark.parametrize("notebook", ["balancing", "mtp"])
def test_figures_with_intervals_are_those_of_the_rendered_notebooks(
    readme: str, repo: Path, notebook: str
) -> None:
    (row,) = (
        line for line in readme.splitlines() if line.endswith(f"| `notebooks/{notebook}.ipynb` |")
    )
    page = (repo / "notebooks" / "rendered" / f"{notebook}.html").read_text(encoding="utf-8")
    figures = re.findall(r"[-+]?[\d.]+ ± [\d.]+", row)
    assert len(figures) >= 3
    assert all(figure in page for figure in figures)
    claims = (repo / "benchmarks" / "results" / "claims.md").read_text(encoding="utf-8")
    assert figures[0] in claims


def test_pipeline_figures_are_those_of_the_schedules(readme: str) -> None:
    schedules = {name: SCHEDULES[name](16, 120) for name in ("1f1b", "zb1p", "dualpipe")}
    quick = with_waiting(schedules["dualpipe"], 0)
    names = ("1F1B", "ZB1P", "DualPipe", "DualPipe, `pipeline.most_waiting=0`")
    for label, schedule in zip(names, [*schedules.values(), quick], strict=True):
        ticks = lockstep(schedule)
        slots = make_table(ticks).slots
        figures = (reported_bubble(schedule), ticks.bubble(), slots["saved"], slots["found"])
        assert f"| {label} | {' | '.join(f'{n:g}' for n in figures)} |" in readme
    pairs = min(sum(len(i) > 1 for i in some) for some in schedules["dualpipe"].instructions)
    met = lockstep(schedules["dualpipe"], fb=2.0).n_pairs
    assert re.search(rf"\b{met}\nof the {pairs} pairs", readme)
    masked, own = (ticks(SCHEDULES["dualpipe"](8, 20)).bubble() for ticks in (abreast, lockstep))
    assert f"a bubble of {masked:g} instead of {own:g} with 8 ranks and 20" in readme


def test_ci_runs_the_readme_test_command(readme: str, repo: Path) -> None:
    ci = (repo / ".ci" / "run").read_text()
    assert "pytest -n 2" in readme
    assert "pytest -n 2" in ci
    assert "-c constraints.txt -e '.[test]'" in readme
    assert "-c constraints.txt -e '.[test]'" in ci
