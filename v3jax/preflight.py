"""`--check`: everything a run needs is built and measured, and nothing is trained."""

from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from v3jax import checkpoint, processes
from v3jax.config import ExperimentConfig
from v3jax.data.dataset import Dataset
from v3jax.models import find_initial
from v3jax.optim.schedules import n_steps
from v3jax.state import abstract_state
from v3jax.step import abstract_amount


def preflight(
    cfg: ExperimentConfig,
    workdir: epath.Path,
    dataset: Dataset,
    mesh: Any,
    train_step: Any,
    batch_place: NamedSharding,
) -> None:
    """Compiles the step, on every process, and prints what the run needs beside what is there.

    Raises:
      ValueError: the disk has no room for the checkpoints, or `init_from` cannot be used.
    """
    if cfg.init_from is not None:
        find_initial(cfg)
    state = abstract_state(cfg, mesh)
    n_micro = cfg.batch.end // cfg.batch.micro_batch
    shape = (n_micro, cfg.batch.micro_batch, cfg.data.seq_len + 1)
    batch = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_place)
    amount = abstract_amount(cfg, mesh)
    compiled = train_step.lower(state, batch, batch, amount).compile()
    memory = compiled.memory_analysis()
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    rows = [
        ("experiment", cfg.name),
        ("mesh", ", ".join(f"{k}={v}" for k, v in mesh.shape.items())),
        ("processes", str(processes.count())),
        ("steps", f"{n_steps(cfg):,}"),
        ("starts from", cfg.init_from or "new weights"),
        ("data digest", dataset.digest),
        ("rows", str(dataset.folder or "synthetic")),
        ("state", f"{state_bytes / 1e6:,.1f} MB"),
        ("temporaries a device", f"{memory.temp_size_in_bytes / 1e6:,.1f} MB"),
        ("checkpoints kept", f"{cfg.run.keep_checkpoints * state_bytes / 1e6:,.1f} MB"),
    ]
    free = processes.decided(lambda: checkpoint.free_bytes(workdir))
    if free is not None:
        rows.append(("disk free", f"{free / 1e6:,.0f} MB"))
    for name, value in rows:
        processes.say(f"{name:22s} {value}")
    needed = (cfg.run.keep_checkpoints + 1) * state_bytes
    if free is not None and free < needed:
        raise ValueError(
            f"{workdir}: {free / 1e6:,.0f} MB free, checkpoints need {needed / 1e6:,.0f} MB; "
            "free space or lower run.keep_checkpoints"
        )
    processes.say("check passed: nothing was trained")
