"""The evaluation tasks: finding them, loading them, their figures beside the report's.

A task is a YAML file of the language model evaluation harness (extra `eval`) in `tasks/`: `base`
holds table 3 of the DeepSeek-V3 technical report (arXiv 2412.19437), `chat` table 6. Its
`metadata` says where the data comes from, how it is scored and what the report found.
`not_runnable.yaml` lists the rows that need a judge, an agent or a contest.
"""

import difflib
import importlib.util
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

_TASKS = Path(__file__).parent / "tasks"
_EXTRA = "evaluate: needs the extra eval; pip install -c constraints.txt -e '.[eval]'"
_HARNESS = "harness:"


class _Loader(yaml.SafeLoader):
    """YAML with the harness's `!function`, which is left as text."""


def _name(_: yaml.SafeLoader, node: Any) -> str:
    return node.value


_Loader.add_constructor("!function", _name)


def files() -> dict[str, Path]:
    """The project's task files by name; those that begin with `_` are templates of others."""
    found = sorted(_TASKS.glob("*/*.yaml"))
    return {file.stem: file for file in found if not file.name.startswith("_")}


def read(file: Path) -> dict[str, Any]:
    """A task file's own fields, functions by name."""
    return _parsed(file)


def _parsed(file: Path) -> Any:
    return yaml.load(file.read_text(encoding="utf-8"), _Loader)


def not_runnable() -> list[dict[str, Any]]:
    """Rows of the report's tables that a model alone cannot answer, each with its reason."""
    return _parsed(_TASKS / "not_runnable.yaml")


def resolve(name: str, built_in: Collection[str]) -> str:
    """A name of `--tasks`, checked; a file of one's own as its path.

    Raises:
      ValueError: no such task; the message has the nearest one or the reason.
    """
    known = files()
    if name in built_in or name in known or name.startswith(_HARNESS):
        return name
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return name
        raise ValueError(f"--tasks: {name}: no such file")
    for row in not_runnable():
        if name == row["task"]:
            raise ValueError(f"--tasks: {name} cannot be run here: {row['reason']}")
    near = difflib.get_close_matches(name, [*built_in, *known], 1)
    hint = f"did you mean {near[0]}?" if near else "--list shows the tasks"
    raise ValueError(f"--tasks: no task {name!r}; {hint}")


def load(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Tasks of the harness by name, their data read.

    Raises:
      ValueError: no harness, or data that is missing or wrong.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(_EXTRA)
    from lm_eval.tasks import TaskManager

    metadata: Any = {"folder": str(folder)}
    ours = TaskManager(
        include_path=[str(_TASKS / "base"), str(_TASKS / "chat")],
        include_defaults=False,
        metadata=metadata,
    )
    tasks: dict[str, Any] = {}
    for name in names:
        if not name.startswith(_HARNESS):
            tasks |= _built(ours, name)
            continue
        own = name.removeprefix(_HARNESS)
        theirs = TaskManager(metadata=metadata)
        if own not in theirs.all_tasks:
            near = difflib.get_close_matches(own, theirs.all_tasks, 1)
            hint = f"did you mean {near[0]}?" if near else "lm-eval ls tasks shows them"
            raise ValueError(f"--tasks: the harness has no task {own!r}; {hint}")
        tasks |= _built(theirs, own)
    return tasks


def _built(manager: Any, name: str) -> dict[str, Any]:
    try:
        return manager.load([name])["tasks"]
    except (OSError, ConnectionError) as error:
        line = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{name}: its data is not at hand and is not downloaded ({line})"
        ) from None


def listing(folder: Path) -> list[str]:
    """One line a task: its row in the report, its method, and its data if that is missing."""
    lines = []
    for name, file in files().items():
        task = read(file)
        about = task["metadata"]
        row = about.get("report")
        place = f"table {row['table']}, {row['row']}" if row else "not in the report"
        wanted = folder / task["dataset_kwargs"]["test"]
        missing = "" if wanted.exists() else f"; no data: {wanted} from {about['source']}"
        lines.append(f"{name:22s} {place}; {about['method']}{missing}")
    lines += [
        f"{row['task']:22s} table {row['table']}, {row['row']}; not runnable: {row['reason']}"
        for row in not_runnable()
    ]
    return lines


def table(tasks: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Every figure with its standard error, beside the report's for the same benchmark.

    Args:
      tasks: as `load` gives them.
      found: the harness's results.
    """
    lines = [["task", "metric", "here", "records", "report", "for"]]
    for name, task in tasks.items():
        row = (task.config.metadata or {}).get("report") or {}
        for metric, value in _figures(found["results"][name]):
            wanted = metric == row.get("metric")
            scale = row.get("scale", 100) if row else 100
            error = found["results"][name].get(f"{metric}_stderr,none")
            reported = row.get("values", {}) if wanted else {}
            last = list(reported)[-1:]  # DeepSeek-V3 stands last in the report's tables
            lines.append(
                [
                    name,
                    metric,
                    _shown(value, error, scale if _is_share(metric) else 1),
                    str(found["n-samples"][name]["effective"]),
                    "".join(f"{reported[model]}" for model in last),
                    "".join(f"{model}, {row['shots']}-shot" for model in last),
                ]
            )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _figures(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    pairs = [(key.split(",")[0], value) for key, value in results.items() if "," in key]
    return [(k, v) for k, v in pairs if not k.endswith("_stderr") and isinstance(v, int | float)]


def _is_share(metric: str) -> bool:
    return not metric.startswith(("bits_per", "byte_", "word_"))


def _shown(value: float, error: Any, scale: float) -> str:
    text = f"{value * scale:.4g}"
    return f"{text} ± {error * scale:.2g}" if isinstance(error, int | float) else text
