"""Other executors run the same stages: Ray to the same bytes, SLURM from scripts it queues."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.prepare import corpora
from tests.data.prepare.corpora import contents, jsonl, prose
from v3jax.data.prepare import pipeline
from v3jax.data.prepare.__main__ import prepare
from v3jax.data.prepare.config import PrepareConfig, PrepareSource
from v3jax.data.prepare.staged import Folder

FAKE_SBATCH = """#!/bin/sh
echo "$@" >> {log}
n=$(wc -l < {log})
echo "Submitted batch job $n"
"""


def config(root: Path) -> PrepareConfig:
    file = jsonl(root / "a.jsonl", [prose(i) for i in range(30)])
    source = PrepareSource(name="a", kind="prose", path=str(file))
    return corpora.config(root, [source], n_tasks=2)


def fake(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def test_slurm_queues_every_stage_after_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "sbatch.log"
    fake(tmp_path / "bin", "sbatch", FAKE_SBATCH.format(log=log))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    cfg, work = config(tmp_path), Folder(tmp_path / "work")
    found = pipeline.start(cfg, work, tmp_path / "corpus")
    options = {"partition": "cpu", "time": "02:00:00", "account": "me"}
    scripts = pipeline.run_slurm(found, work, 2, options)
    assert [Path(script).parent.name for script in scripts] == [stage.name for stage in found]
    for stage, script in zip(found, scripts, strict=True):
        text = Path(script).read_text()
        said = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
        assert said["partition"] == "cpu"
        assert said["time"] == "02:00:00"
        assert said["account"] == "me"
        assert said["job-name"] == f"prepare_{stage.name}"
        assert said["array"] == f"0-{stage.tasks - 1}%{min(2, stage.tasks)}"
        assert "qos" not in said
        assert str(Path(sys.executable).parent) in text
        assert f"launch_pickled_pipeline {work.root}/logs/{stage.name}/executor.pik" in text
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    arrays = [line for line in log.read_text().splitlines() if "RUN_OFFSET" in line]
    assert len(arrays) == len(found)
    assert "--dependency" not in arrays[0]
    assert all(re.search(r"--dependency=afterok:\d+", line) for line in arrays[1:])


def test_a_queued_stage_runs_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a job of an array does, with the variables that SLURM sets."""
    fake(tmp_path / "bin", "sbatch", FAKE_SBATCH.format(log=tmp_path / "log"))
    fake(tmp_path / "bin", "scontrol", "#!/bin/sh\necho localhost\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin")
    cfg, work = config(tmp_path), Folder(tmp_path / "work")
    found = pipeline.start(cfg, work, tmp_path / "corpus")
    pipeline.run_slurm(found, work, 2, {})
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    picked = str(pipeline.logs(work, "clean") / "executor.pik")
    command = [str(Path(sys.executable).parent / "launch_pickled_pipeline"), picked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (work.stage("clean") / "00001.jsonl").is_file()
    assert [p.name for p in (pipeline.logs(work, "clean") / "completions").iterdir()] == ["00001"]


def test_slurm_where_there_is_none_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    work = Folder(tmp_path / "work")
    with pytest.raises(ValueError, match="no sbatch here"):
        pipeline.run_slurm([], work, 1, {})


@pytest.mark.slow
def test_ray_gives_the_bytes_of_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    cfg = config(tmp_path)
    for executor in ("local", "ray"):
        prepare(cfg, Folder(tmp_path / executor), tmp_path / executor / "out", executor, 2, {})
    assert contents(tmp_path / "local" / "out") == contents(tmp_path / "ray" / "out")


def test_ray_where_there_is_none_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs ray; pip install 'v3jax\[ray\]'"):
        pipeline.run_ray([], Folder(tmp_path), 1, print)
