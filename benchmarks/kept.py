"""Figures that a benchmark found, kept in benchmarks/results, and as a table of the README."""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def keep(name: str, command: str, found: Mapping[str, Any]) -> None:
    """Writes results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    about = {"command": command, "date": date.today().isoformat()}
    (RESULTS / f"{name}.json").write_text(json.dumps(about | dict(found), indent=1) + "\n")


def called(script: str) -> str:
    """The command that runs, with DIR for folders."""
    folders = (re.sub(r"=.*/.*", "=DIR", argument) for argument in sys.argv[1:])
    return " ".join([f"python -m benchmarks.{script}", *folders])


def kept(name: str) -> dict[str, Any]:
    """What `keep` wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
