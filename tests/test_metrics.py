"""Rows are written as they come, are strict JSON, and those past a restored step are dropped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from v3jax import checkpoint, metrics
from v3jax.metrics import JsonLines, Recorder, mfu, read_rows

LOAD_LE = np.arange(6).reshape(2, 3)


def row(step: int, loss: float = 1.5) -> dict[str, Any]:
    return {"step": step, "loss": loss, "lr": 0.1}


def record(workdir: Path, first: int, end: int, n_steps: int = 10) -> None:
    workdir.mkdir(exist_ok=True)
    with Recorder(workdir, first, n_steps) as recorder:
        for step in range(first, end):
            recorder.write(row(step, loss=100 * first + step), LOAD_LE + step)


def test_a_row_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    lines = JsonLines(epath.Path(tmp_path) / "metrics.jsonl", 0)
    for step in range(3):
        lines.write(row(step))
        assert len(read_rows(tmp_path / "metrics.jsonl")) == step + 1


def test_rows_past_the_restored_step_are_dropped(tmp_path: Path) -> None:
    record(tmp_path, 0, 8)
    record(tmp_path, 5, 9)
    rows, loads = read_rows(tmp_path / "metrics.jsonl"), read_rows(tmp_path / "loads.jsonl")
    assert [r["step"] for r in rows] == list(range(9))
    assert [r["loss"] for r in rows] == [0, 1, 2, 3, 4, 505, 506, 507, 508]
    assert [r["step"] for r in loads] == list(range(9))
    assert loads[-1]["load"] == (LOAD_LE + 8).tolist()


@pytest.mark.parametrize("number", [0, 9])  # files of one second differ in it: 10 sorts before 9
def test_tensorboard_drops_them_too(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer._global_uid, "_value", number, raising=True)
    record(tmp_path, 0, 8)
    record(tmp_path, 5, 9)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "lr"} <= set(events.Tags()["scalars"])
    seen = [(e.step, e.value) for e in events.Scalars("loss")]
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 505), (6, 506), (7, 507), (8, 508)]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    record(tmp_path, 0, 3)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-4])
    assert [r["step"] for r in read_rows(file)] == [0, 1]
    record(tmp_path, 2, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_losses_that_are_not_finite_are_null(tmp_path: Path, value: float) -> None:
    lines = JsonLines(epath.Path(tmp_path) / "metrics.jsonl", 0)
    lines.write(row(0, loss=value))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 0, "loss": null, "lr": 0.1}\n'


def test_an_object_store_gets_whole_files_and_no_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"not on an object store: {arguments}")

    for module in (checkpoint, metrics):
        monkeypatch.setattr(module, "local_path", lambda path: None)
    for name in ("rename", "replace", "open"):
        monkeypatch.setattr(Path, name, refuse)
    record(tmp_path, 0, 8)
    record(tmp_path, 5, 9)
    monkeypatch.undo()
    assert [r["loss"] for r in read_rows(tmp_path / "metrics.jsonl")] == [
        *range(5),
        *range(505, 509),
    ]


def test_rows_reach_an_object_store_at_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "local_path", lambda path: None)
    lines = JsonLines(epath.Path(tmp_path) / "metrics.jsonl", 0)
    lines.write(row(0))
    lines.flush()
    lines.write(row(1))
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == [0]
    lines.close()
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == [0, 1]


def test_loads_are_thinned_to_about_two_hundred(tmp_path: Path) -> None:
    record(tmp_path, 0, 1000, n_steps=1000)
    steps = [r["step"] for r in read_rows(tmp_path / "loads.jsonl")]
    assert steps == list(range(0, 1000, 5))


def test_all_processes_but_one_record_nothing(tmp_path: Path) -> None:
    with Recorder(tmp_path, 0, 10, writes=False) as recorder:
        recorder.write(row(0), LOAD_LE)
        recorder.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_mfu_is_the_share_of_the_peak_of_all_devices() -> None:
    assert mfu(989e9, 500, "NVIDIA H100 80GB HBM3", 2) == pytest.approx(0.25)
    assert mfu(989e9, 500, "cpu", 2) is None
