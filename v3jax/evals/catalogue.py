"""The evaluation tasks: finding them, loading them, their figures beside the report's.

A task is a YAML file of the language model evaluation harness (extra `eval`) in `tasks/`: `base`
holds table 3 of the DeepSeek-V3 technical report (arXiv 2412.19437), `chat` table 6. Its
`metadata` says where the data comes from, how it is scored and what the report found.
`not_runnable.yaml` lists the rows that need a judge, an agent or a contest.
"""

import difflib
import importlib.util
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

_TASKS = Path(__file__).parent / "tasks"
_EXTRA = "--tasks: benchmarks need the extra eval; pip install -c constraints.txt -e '.[eval]'"
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
    loader = _Loader(file.read_text(encoding="utf-8"))
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def not_runnable() -> list[dict[str, Any]]:
    """Rows of the report's tables that a model alone cannot answer, each with its reason, and a
    name as tasks have one."""
    rows = _parsed(_TASKS / "not_runnable.yaml")
    return [row | {"task": _name_of(row["row"])} for row in rows]


def _name_of(row: str) -> str:
    """`SWE Verified (Resolved)` as `swe_verified`."""
    return re.sub(r"\W+", "_", row.split("(")[0].strip().lower())


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
            raise ValueError(f"--tasks: {name} needs more than a model: {row['reason']}")
    near = difflib.get_close_matches(name, [*built_in, *known], 1)
    hint = f"did you mean {near[0]}?" if near else "--list shows the tasks"
    raise ValueError(f"--tasks: no task {name!r}; {hint}")


def load(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Tasks and groups of the harness, their data read, as its `TaskManager.load` gives them.

    Raises:
      ValueError: no harness, or data that is missing or wrong.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(_EXTRA)
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata: Any = {"folder": str(folder)}
    ours = TaskManager(
        include_path=[str(_TASKS / "base"), str(_TASKS / "chat")],
        include_defaults=False,
        metadata=metadata,
    )
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        manager, own = ours, name
        if name.startswith(_HARNESS):
            manager, own = TaskManager(metadata=metadata), name.removeprefix(_HARNESS)
            if own not in manager.all_tasks:
                near = difflib.get_close_matches(own, manager.all_tasks, 1)
                hint = f"did you mean {near[0]}?" if near else "lm-eval ls tasks shows them"
                raise ValueError(f"--tasks: the harness has no task {own!r}; {hint}")
        for kind, found in _built(manager, own).items():
            loaded[kind] |= found
    return loaded


def _built(manager: Any, name: str) -> dict[str, Any]:
    try:
        return manager.load([name])
    except (OSError, ConnectionError) as error:
        line = str(error).strip().split("\n")[0]
        raise ValueError(f"{name}: its data is not at hand, none is downloaded ({line})") from None


def listing(folder: Path) -> list[str]:
    """One line a task: its row in the report, its method, and its data if that is missing."""
    lines = []
    for name, file in files().items():
        task = read(file)
        about = task["metadata"]
        row = about.get("report")
        place = f"table {row['table']}, {row['row']}" if row else "not in the report"
        wanted = folder / task["dataset_kwargs"]["test"]
        there = any(wanted.with_name(wanted.name + end).exists() for end in ("", ".gz"))
        missing = "" if there else f"; no data: {wanted} from {about['source']}"
        reason = f"; needs {about['needs']}: {about['reason']}" if "needs" in about else ""
        lines.append(f"{name:22s} {place}; {about['method']}{reason}{missing}")
    lines += [
        f"{row['task']:22s} table {row['table']}, {row['row']}; not runnable: {row['reason']}"
        for row in not_runnable()
    ]
    return lines


def unexecuted(loaded: Mapping[str, Any]) -> list[str]:
    """Tasks whose texts are programs that something else must run."""
    tasks = loaded["tasks"].items()
    return [n for n, task in tasks if (task.config.metadata or {}).get("needs") == "execution"]


def unlike_report(loaded: Mapping[str, Any], *, chat: bool) -> list[str]:
    """Tasks that the report ran with a chat template where this call has none, or without."""
    rows = {n: (t.config.metadata or {}).get("report") for n, t in loaded["tasks"].items()}
    return [name for name, row in rows.items() if row and (row["table"] == 6) != chat]


def table(loaded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Every figure with its standard error, beside the report's for the same benchmark.

    Args:
      loaded: as `load` gives them.
      found: the harness's results.
    """
    lines = [["task", "metric", "here", "records", "report", "for"]]
    for name, task in loaded["tasks"].items():
        about = task.config.metadata or {}
        row = about.get("report") or {}
        reported = row.get("values", {})
        last = list(reported)[-1:]  # DeepSeek-V3 stands last in the report's tables
        shots = f", {row['shots']}-shot" if row.get("shots") is not None else ""
        results = found["results"][name]
        records = str(found["n-samples"][name]["effective"])
        for metric, value in _figures(results):
            wanted = metric == row.get("metric")
            scale = row.get("scale", 100) if _is_share(metric) else 1
            here = _shown(value, results.get(f"{metric}_stderr,none"), scale)
            if metric == "bypass":
                metric, here = "none yet", f"needs {about.get('needs', 'a metric')}"
            beside = [f"{reported[m]}" for m in last if wanted]
            lines.append(
                [
                    name,
                    metric,
                    here,
                    records,
                    *(beside or [""]),
                    "".join(last) + shots if beside else "",
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
