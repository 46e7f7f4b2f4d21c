"""What a run records of itself: `metrics.jsonl`, `loads.jsonl` and TensorBoard events.

Row `k` of `metrics.jsonl` describes step `k`: loss, rate and speed of that step, and `eval_*` of
the parameters *before* it; the last row's `eval_*` are of the finished parameters. `loads.jsonl`
holds the experts' loads of about 200 steps, for the report's heat map. A loss that is not finite
is `null` there, since JSON has no such numbers.
Dims: L MoE layers (MTP last), E experts.
"""

import json
import math
import time
from typing import Any

import numpy as np
from etils import epath

from v3jax.checkpoint import local_path, write_whole

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

    On a local disk rows are appended as they come; an object store cannot append, so there the
    whole file is put again at `flush`.
    """

    def __init__(self, path: epath.Path, first_step: int) -> None:
        """Keeps the rows before `first_step` and drops the rest, also a torn last line."""
        self._path = path
        self._rows = [_line(row) for row in read_rows(path) if row["step"] < first_step]
        write_whole(path, "".join(self._rows))
        local = local_path(path)
        self._file = None if local is None else local.open("a")

    def write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            self._rows.append(_line(row))
        else:
            self._file.write(_line(row))
            self._file.flush()

    def flush(self) -> None:
        if self._file is None:
            self._path.write_text("".join(self._rows))

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def _line(row: dict[str, Any]) -> str:
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


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


class Events:
    """Scalars for TensorBoard, written without TensorFlow."""

    def __init__(self, folder: epath.Path, first_step: int) -> None:
        """A run continued at `first_step` makes TensorBoard drop what it had from there on."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = event_pb2  # generated modules: their messages have no annotations
        self._summary: Any = summary_pb2
        _await_a_new_second(folder)
        self._writer = EventFileWriter(str(folder))
        if first_step:
            self._add(first_step, session_log=self._event.SessionLog(status="START"))

    def write(self, row: dict[str, Any]) -> None:
        values = [
            self._summary.Summary.Value(tag=name, simple_value=float(value))
            for name, value in row.items()
            if name != "step"
        ]
        self._add(row["step"], summary=self._summary.Summary(value=values))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, **content))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _await_a_new_second(folder: epath.Path) -> None:
    """TensorBoard reads event files by name, which orders them only by the second they began in."""
    now = time.time()
    if any(folder.glob(f"events.out.tfevents.{int(now):010d}.*")):
        time.sleep(int(now) + 1 - now)


class Recorder:
    """Writes every row to all three places; a context manager that closes them.

    Without `writes`, as on all processes of a run but one, it records nothing.
    """

    def __init__(
        self, workdir: epath.PathLike, first_step: int, n_steps: int, *, writes: bool = True
    ) -> None:
        self._places: tuple[JsonLines, JsonLines, Events] | None = None
        self._every = max(1, n_steps // _LOAD_ROWS)
        if writes:
            root = epath.Path(workdir)
            self._places = (
                JsonLines(root / "metrics.jsonl", first_step),
                JsonLines(root / "loads.jsonl", first_step),
                Events(root / "tensorboard", first_step),
            )

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        for place in self._places or ():
            place.close()

    def write(self, row: dict[str, Any], load_LE: np.ndarray) -> None:
        """Records one step: its row, and its loads if it is one of those kept."""
        if self._places is None:
            return
        metrics, loads, events = self._places
        metrics.write(row)
        if row["step"] % self._every == 0:
            loads.write({"step": row["step"], "load": load_LE.tolist()})
        events.write(row)

    def flush(self) -> None:
        """Puts everything where a restart finds it; called before a checkpoint commits."""
        for place in self._places or ():
            place.flush()


def mfu(flops_per_token: float, tokens_per_second: float, device_kind: str, n: int) -> float | None:
    """Model FLOPs over the devices' BF16 peak; None where the peak is not known."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * n)
