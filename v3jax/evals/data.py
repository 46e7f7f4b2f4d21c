"""Records of evaluation tasks, read from files of JSON lines (`custom_dataset` of `tasks/`).

The harness calls `load` with a task's `metadata` and `dataset_kwargs`. Every record gets its solved
examples as the field `shots`, from which the task's template composes the whole prompt.
"""

import gzip
import importlib.util
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Groups = dict[tuple[str, ...], list[Record]]
"""Records by the values of some fields."""


class Records(list[Record]):
    """Records as the harness takes them: a list that knows its fields."""

    @property
    def features(self) -> dict[str, None]:
        """The fields, as keys."""
        return dict.fromkeys(self[0])


def load(
    *,
    folder: str,
    test: str,
    fields: Sequence[str] = (),
    shots: str | None = None,
    shot_fields: Sequence[str] | None = None,
    shots_where: Mapping[str, Sequence[Any]] | None = None,
    n_shots: int = 0,
    same: str | Sequence[str] = (),
    earlier: bool = False,
    between: Sequence[str] | None = None,
    requires: Sequence[str] = (),
    source: str,
    config_source: str = "",
    **_: Any,
) -> dict[str, Records]:
    """The split `test` of a task, each record with its `shots`.

    Args:
      folder: where the files are (`--data`).
      test: the questions, a file of JSON lines in it; `NAME.gz` is read where `NAME` is missing.
      fields: what each record must have.
      shots: a file of solved examples; of `test` itself, those examples leave the test.
      shot_fields: what each of them must have, `fields` by default.
      shots_where: fields and the values that an example may have there.
      n_shots: examples of a record, the first of the file.
      same: fields whose values a record and its examples share.
      earlier: take the examples from the records before it, as many of `n_shots` as there are.
      between: a field, and the first and the last date (`YYYY-MM-DD`) of the records that stay.
      requires: modules that scoring imports, packages of the same names.
      source: where the data comes from, in words.
      config_source: the task's file, which errors name.

    Raises:
      ValueError: a file that is missing or holds something else, too few examples, or a module
        that is not installed.
    """
    task = Path(config_source).stem or test
    for module in requires:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{task}: no module {module}; pip install {' '.join(requires)}")
    keys = [same] if isinstance(same, str) else list(same)
    path = _find(Path(folder).expanduser() / test, task, source)
    records = read_records(path, [*fields, *keys])
    if between is not None:
        field, first, last = between
        records = [r for r in records if first <= str(r[field])[:10] <= last]
    if not records:
        when = "" if between is None else " between " + " and ".join(between[1:])
        raise ValueError(f"{task}: {path} holds no records{when}. Its data: {source}")
    if earlier:
        return {"test": _after_earlier(records, n_shots, keys)}
    if shots is None or n_shots == 0:
        return {"test": Records(r | {"shots": []} for r in records)}
    if shots == test:
        pool, records = _take(records, n_shots, keys)
    else:
        path = _find(Path(folder).expanduser() / shots, task, source)
        wanted = fields if shot_fields is None else shot_fields
        allowed = shots_where or {}
        examples = read_records(path, [*wanted, *allowed, *keys])
        pool = _grouped([r for r in examples if _allows(allowed, r)], keys)
    if not records:
        raise ValueError(f"{task}: {path} holds nothing but {n_shots} solved examples")
    found = Records(r | {"shots": pool.get(_key(r, keys), [])[:n_shots]} for r in records)
    for record in found:
        if (there := len(record["shots"])) < n_shots:
            of = "".join(f" of {name} {record[name]!r}" for name in keys)
            raise ValueError(
                f"{task}: {path} holds {there} of {n_shots} solved examples{of}; "
                f"write more. Its data: {source}"
            )
    return {"test": found}


def read_records(path: Path, fields: Sequence[str] = ()) -> list[Record]:
    """The records of a file of JSON lines, compressed if its name ends in `.gz`.

    Raises:
      ValueError: a line that is no JSON object or lacks one of `fields`, or a damaged file.
    """
    records = []
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    records.append(_parse(line, fields, f"{path}, line {number}"))
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); write it again") from error
    return records


def redux(records: Records) -> Records:
    """MMLU-Redux as ZeroEval filters it: sound questions, and those whose label was corrected."""
    kept = Records()
    for record in records:
        letter = str(record["correct_answer"] or "").strip()
        if record["error_type"] == "ok":
            kept.append(record)
        elif record["error_type"] == "wrong_groundtruth" and letter in tuple("ABCD"):
            kept.append(record | {"answer": "ABCD".index(letter)})
    if not kept:
        raise ValueError("mmlu_redux: no record has the error_type ok; write the set's own fields")
    return kept


def shuffled(records: Records) -> Records:
    """GPQA with `question`, `choices` in simple-evals' random order, and the right `letter`."""
    rng = random.Random(0)
    found = Records()
    for record in records:
        order = rng.sample(range(4), 4)
        options = [record["Correct Answer"], *(record[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
        choices = [options[i] for i in order]
        letter = "ABCD"[order.index(0)]
        found.append(
            record | {"question": record["Question"], "choices": choices, "letter": letter}
        )
    return found


def _find(path: Path, task: str, source: str) -> Path:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"{task}: no {path}; write it, or name its folder by --data=DIR. Its data: {source}"
    )


def _parse(line: str, fields: Sequence[str], where: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}); one object a line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object; one object a line")
    for name in fields:
        if name not in record:
            raise ValueError(f"{where}: no field {name!r}; needed are {', '.join(fields)}")
    return record


def _allows(allowed: Mapping[str, Sequence[Any]], record: Record) -> bool:
    return all(record[name] in values for name, values in allowed.items())


def _key(record: Record, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(record[name]) for name in keys)


def _grouped(records: Sequence[Record], keys: Sequence[str]) -> Groups:
    groups: Groups = {}
    for record in records:
        groups.setdefault(_key(record, keys), []).append(record)
    return groups


def _take(records: Sequence[Record], n: int, keys: Sequence[str]) -> tuple[Groups, list[Record]]:
    """The first `n` of each group, and the others in their order."""
    pool: Groups = {}
    others = []
    for record in records:
        group = pool.setdefault(_key(record, keys), [])
        (group if len(group) < n else others).append(record)
    return pool, others


def _after_earlier(records: Sequence[Record], n: int, keys: Sequence[str]) -> Records:
    seen: Groups = {}
    found = Records()
    for record in records:
        before = seen.setdefault(_key(record, keys), [])
        found.append(record | {"shots": before[:n]})
        before.append(record)
    return found
