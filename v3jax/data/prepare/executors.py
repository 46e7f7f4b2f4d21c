"""datatrove's executors with our defaults: quiet, and for SLURM with an interpreter of its own."""

import contextlib
import importlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats

if TYPE_CHECKING:
    from datatrove.executor.ray import RayPipelineExecutor

    from v3jax.data.prepare.pipeline import Stage


class _Quiet(LocalPipelineExecutor):
    """Logs to its files alone."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        logger.remove()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            try:
                return super()._run_for_rank(rank, local_rank, node_rank)
            finally:
                logger.remove()


def local(stage: "Stage", folder: Path, workers: int) -> LocalPipelineExecutor:
    """Runs a stage in processes of this machine."""
    logger.remove()
    return _Quiet(
        pipeline=list(stage.steps), tasks=stage.tasks, workers=workers, logging_dir=str(folder)
    )


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS, or a cluster of this machine."""
    ray = importlib.import_module("ray")  # of an extra of its own
    ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def on_ray(stage: "Stage", folder: Path, workers: int) -> "RayPipelineExecutor":
    """Runs a stage as tasks of Ray; `folder` must be one that all machines see."""
    from datatrove.executor.ray import RayPipelineExecutor

    logger.remove()
    return RayPipelineExecutor(
        pipeline=list(stage.steps),
        tasks=stage.tasks,
        workers=workers,
        logging_dir=str(folder),
        mem_per_cpu_gb=1,
    )


def on_slurm(
    stage: "Stage",
    folder: Path,
    workers: int,
    options: dict[str, str],
    before: SlurmPipelineExecutor | None,
) -> SlurmPipelineExecutor:
    """Queues a stage as an array of jobs; `options` are sbatch's own (`time`, `partition`, ...)."""
    options = dict(options)
    time, partition = options.pop("time", "24:00:00"), options.pop("partition", "")
    arguments: dict[str, Any] = {
        "pipeline": list(stage.steps),
        "tasks": stage.tasks,
        "workers": workers,
        "time": time,
        "partition": partition,
        "job_name": f"prepare_{stage.name}",
        "qos": options.pop("qos", ""),
        "cpus_per_task": int(options.pop("cpus-per-task", "1")),
        "mem_per_cpu_gb": int(options.pop("mem-per-cpu", "4").rstrip("G")),
        "env_command": f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        "sbatch_args": options,
        "depends": before,
        "logging_dir": str(folder),
        "slurm_logs_folder": str(folder / "slurm_logs"),
    }
    return _Slurm(**arguments)


class _Slurm(SlurmPipelineExecutor):
    """Leaves out what was not asked for, which clusters may refuse."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        found = super().get_sbatch_args(max_array)
        return {key: value for key, value in found.items() if value or key == "requeue"}
