"""What a run records of itself: `metrics.jsonl`, `loads.jsonl` and TensorBoard events.

Row `k` of `metrics.jsonl` describes step `k`: loss, rate and speed of that step, and `eval_*` of
the parameters *before* it; the last row's `eval_*` are of the finished parameters. `loads.jsonl`
holds the experts' loads of about 200 steps, for the report's heat map.
Dims: L MoE layers (MTP last), E experts.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

_LOAD_ROWS = 200

# BF16 peak of the accelerators, FLOP/s of one device without sparsity (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v6 lite": 918e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H800": 989e12,
}


class JsonLines:
    """A growing file of JSON objects, each with a `step`.

    On a local disk rows are appended and flushed; an object store cannot append, so there the
    whole file is put again at `flush`.
    """

    def __init__(self, path: epath.Path, first_step: int) -> None:
        """Keeps the rows before `first_step` and drops the rest, also a torn last line."""
        self._path = path
        self._local = isinstance(path, Path)
        rows = [row for row in read_rows(path) if row["step"] < first_step]
        text = "".join(_line(row) for row in rows)
        if self._local:
            temporary = path.parent / f".{path.name}.new"
            temporary.write_text(text)
            temporary.replace(path)
            self._file = path.open("a")
        else:
            self._text = [text]
            self.flush()

    def write(self, row: dict[str, Any]) -> None:
        if self._local:
            self._file.write(_line(row))
            self._file.flush()
        else:
            self._text.append(_line(row))

    def flush(self) -> None:
        if not self._local:
            self._path.write_text("".join(self._text))

    def close(self) -> None:
        self.flush()
        if self._local:
            self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def read_rows(path: epath.PathLike) -> list[dict[str, Any]]:
    """The whole rows of a JSON-lines file; a torn last line and a missing file give fewer."""
    path = epath.Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows.append(row)
    return rows


class Recorder:
    """Writes every row to all three places."""

    def __init__(self, workdir: epath.PathLike, first_step: int, n_steps: int) -> None:
        from tensorboard.summary import Writer

        root = epath.Path(workdir)
        self._metrics = JsonLines(root / "metrics.jsonl", first_step)
        self._loads = JsonLines(root / "loads.jsonl", first_step)
        self._every = max(1, n_steps // _LOAD_ROWS)
        self._events = Writer(str(root / "tensorboard"))

    def write(self, row: dict[str, Any], load_LE: np.ndarray) -> None:
        """Records one step: its row, and its loads if it is one of those kept."""
        self._metrics.write(row)
        if row["step"] % self._every == 0:
            self._loads.write({"step": row["step"], "load": load_LE.tolist()})
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, float(value), row["step"])

    def flush(self) -> None:
        self._metrics.flush()
        self._loads.flush()
        self._events.flush()

    def close(self) -> None:
        self._metrics.close()
        self._loads.close()
        self._events.close()


def mfu(flops_per_token: float, tokens_per_second: float, device_kind: str, n: int) -> float | None:
    """Model FLOPs over the devices' BF16 peak; None where the peak is not known."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * n)
