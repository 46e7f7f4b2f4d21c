"""The notebooks: short, kept without outputs, rendered, and run from top to bottom."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks: nbconvert")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAYS = {
    "balancing": "95% interval|±",  # over seeds
    "fp8": r"fp8: within \d",
    "long_context": r"extended: \d+\.\d% right up to 256",
    "mtp": "95% interval|±",
    "pipeline": r"\b(\d+) of \1 schedules have",  # the report's bubble and peak
}
by_name = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)


def code_cells(notebook: Path) -> list[Any]:
    return [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert {n.stem for n in NOTEBOOKS} == SAYS.keys()


@by_name
def test_a_notebook_is_short_and_has_no_outputs(notebook: Path) -> None:
    cells = code_cells(notebook)
    assert 0 < len(cells) <= 10
    for cell in cells:
        assert not cell.outputs
        assert cell.execution_count is None
        ast.parse(cell.source)
        assert "def test" not in cell.source
        assert cell.source.count("\n") < 40
    assert nbformat.read(notebook, as_version=4).cells[0].source.startswith("# ")


def is_self_contained(page: str) -> bool:
    """Whether nothing is fetched: links and addresses in comments of styles are no requests."""
    without_comments = re.sub(r"/\*.*?\*/", "", page, flags=re.DOTALL)
    asked = r"""<script|<iframe|<link|@import|(src|srcset)=["'](?!data:)|url\((?!["']?data:|#)"""
    return re.search(asked, without_comments) is None


@pytest.mark.notebooks
@by_name
def test_a_notebook_runs_from_top_to_bottom(notebook: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "notebooks" / "render.py", notebook, f"--out={tmp_path}"],
        cwd=tmp_path,
        env=os.environ | {"V3JAX_NOTEBOOK": "reduced", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    page = (tmp_path / f"{notebook.stem}.html").read_text(encoding="utf-8")
    assert is_self_contained(page)
    assert page.count("data:image/png") >= 2
    assert re.search(SAYS[notebook.stem], page)
