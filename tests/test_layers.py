"""Imports point down: a module imports from its own floor or from floors below, and no cycles.

Within a floor a folder (`model/`, `optim/`, ...) imports only itself, but for `BESIDE`; single
files may import their neighbours. Every module of the package has a place here; a new one is
given a floor first.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (
    {"config"},
    {"cli", "host", "processes", "registry", "sharding"},
    {"kernels", "eplb"},
    {"ops", "compiler"},
    {"model", "optim", "data", "rewards"},
    {"objective", "weights"},
    {"pipeline"},
    {"state", "step", "checkpoint", "metrics", "progress", "report", "decode", "hf"},
    {"models", "preflight", "summary"},
    {"evals"},
    {"train", "grpo", "evaluate", "sample", "convert", "aot", "cost", "planning"},
    {"ablation", "plots", "reasoning"},
    {"distill"},
)

# Folders that may use a neighbour on their floor: importer, imported.
BESIDE = {
    ("aot", "cost"),  # measures a program against the model's FLOPs
    ("data", "optim"),  # the loader asks the schedules how large each step's batch is
    ("hf", "checkpoint"),  # conversions commit a manifest as checkpoints do
}


def floor_of(part: str) -> int:
    """The floor of a file or folder of v3jax, counted from below."""
    for i, parts in enumerate(FLOORS):
        if part in parts:
            return i
    raise AssertionError(f"v3jax/{part} has no floor: add it to FLOORS in tests/test_layers.py")


def modules() -> list[Path]:
    paths = (ROOT / "v3jax").rglob("*.py")
    return sorted(
        p.relative_to(ROOT / "v3jax")
        for p in paths
        if p.parent != ROOT / "v3jax" or p.stem != "__init__"
    )


def part_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imported_parts(module: Path) -> Iterator[str]:
    """Top-level parts of v3jax that a module imports anywhere, inside functions too."""
    tree = ast.parse((ROOT / "v3jax" / module).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full, from v3jax"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            assert root not in ("experiments", "tests", "benchmarks"), f"{module} imports {name}"
            if root == "v3jax":
                yield rest.split(".")[0]


def may_import(importer: str, imported: str, folders: set[str]) -> bool:
    if (
        importer == imported
        or (importer, imported) in BESIDE
        or floor_of(imported) < floor_of(importer)
    ):
        return True
    return floor_of(imported) == floor_of(importer) and not {importer, imported} & folders


def folders() -> set[str]:
    return {part_of(m) for m in modules() if len(m.parts) > 1}


@pytest.mark.parametrize("module", modules(), ids=str)
def test_imports_point_down(module: Path) -> None:
    part = part_of(module)
    floor_of(part)
    for other in imported_parts(module):
        assert may_import(part, other, folders()), f"{module} imports v3jax.{other}, not below it"


def test_no_part_stands_on_two_floors() -> None:
    names = [name for floor in FLOORS for name in floor]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("ops", "kernels", True),
        ("kernels", "ops", False),
        ("model", "optim", False),
        ("data", "optim", True),
        ("optim", "data", False),
        ("model", "model", True),
        ("step", "state", True),
        ("ops", "model", False),
        ("config", "registry", False),
        ("train", "config", True),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported, {"ops", "kernels", "model", "optim", "data"}) is allowed


def test_cycles_between_files_of_one_floor_are_absent() -> None:
    edges = {
        part_of(m): set(imported_parts(m)) - {part_of(m)} for m in modules() if len(m.parts) == 1
    }
    done: set[str] = set()

    def visit(part: str, path: tuple[str, ...]) -> None:
        assert part not in path, f"import cycle {' -> '.join((*path, part))}"
        if part not in done:
            for other in edges.get(part, set()):
                visit(other, (*path, part))
            done.add(part)

    for part in edges:
        visit(part, ())
