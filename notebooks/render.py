"""Runs a notebook from top to bottom and writes it with its outputs as one HTML file.

    python notebooks/render.py notebooks/balancing.ipynb      # into notebooks/rendered/
    V3JAX_NOTEBOOK=reduced python notebooks/render.py notebooks/balancing.ipynb --out=build/

The notebook itself stays without outputs. Runs go to `runs/` of the folder this is called in, and
what is finished there is not run again. The page asks the network for nothing.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

_HERE = Path(__file__).parent


def execute(notebook: Path) -> Any:
    """The notebook with its outputs.

    Raises:
      CellExecutionError: a cell failed.
    """
    book = nbformat.read(notebook, as_version=4)
    NotebookClient(book, timeout=None, resources={"metadata": {"path": str(Path.cwd())}}).execute()
    return book


def page(book: Any, title: str) -> str:
    """The notebook as HTML without scripts: nothing in it needs one."""
    exporter = HTMLExporter(template_name="lab", exclude_input_prompt=True)
    text, _ = exporter.from_notebook_node(book, {"metadata": {"name": title}})
    text = re.sub(r"<script\b.*?</script>", "", text, flags=re.DOTALL)
    phone = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return text if 'name="viewport"' in text else text.replace("<head>", f"<head>{phone}", 1)


def main() -> int:
    """1 if a cell failed: its error is printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, default=_HERE / "rendered")
    options = parser.parse_args()
    start = time.monotonic()
    try:
        book = execute(options.notebook)
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / f"{options.notebook.stem}.html"
    target.write_text(page(book, options.notebook.stem), encoding="utf-8")
    print(f"done: {target} after {(time.monotonic() - start) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
