"""Checkpoints of a whole run: written in the background, real only once their manifest is.

    <workdir>/checkpoints/<step>/state/          arrays, by orbax
    <workdir>/checkpoints/<step>/manifest.json   written last: it alone makes the step exist

The manifest holds the step, the config, the position in the data, and shape, type and SHA-256 of
every array, and ends in a digest of itself, so that a half-written one counts as absent. No commit
relies on a rename, which object stores do not have. `step` counts the batches drawn from the
loader, committed or not.
"""

import hashlib
import json
import threading
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from v3jax.config import CHECKPOINT_FORMAT, ExperimentConfig, digest, flatten
from v3jax.state import TrainState

# What may differ between a run and its continuation: rhythm and length, never the mathematics.
MAY_CHANGE = frozenset(
    f"run.{name}"
    for name in (
        "total_tokens",
        "eval_every",
        "eval_sequences",
        "checkpoint_every",
        "keep_checkpoints",
        "max_bad_steps",
    )
)


@dataclass(frozen=True)
class Checkpoint:
    """One complete step of a run directory."""

    folder: epath.Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]


def flat_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a tree under names like `params.moe_layers.mlp.gate`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def checkpoints_folder(workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir) / "checkpoints"


def committed(workdir: epath.PathLike) -> list[Checkpoint]:
    """The complete checkpoints of a run directory, oldest first."""
    folder = checkpoints_folder(workdir)
    if not folder.exists():
        return []
    found = (_read_manifest(step) for step in folder.iterdir() if step.name.isdigit())
    return sorted((c for c in found if c is not None), key=lambda c: c.step)


def latest(workdir: epath.PathLike) -> Checkpoint | None:
    """The newest complete checkpoint, or None."""
    found = committed(workdir)
    return found[-1] if found else None


def _read_manifest(folder: epath.Path) -> Checkpoint | None:
    file = folder / "manifest.json"
    if not file.exists():
        return None
    try:
        manifest = json.loads(file.read_text())
        written = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError):
        return None
    return Checkpoint(folder, manifest) if written == _digest_json(manifest) else None


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_array(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


class Writer:
    """Saves states in the background, one at a time; a failure surfaces at the next call.

    Raises:
      RuntimeError: from `save`, `poll` or `wait`, when an earlier save failed.
    """

    def __init__(self, workdir: epath.PathLike, cfg: ExperimentConfig) -> None:
        if jax.process_count() > 1:
            raise ValueError("checkpoint: runs of several processes cannot be saved yet")
        self._workdir = epath.Path(workdir)
        self._cfg = cfg
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied, so `state` may be donated."""
        self.wait()
        arrays = {k: np.array(v) for k, v in flat_arrays(jax.device_get(state)).items()}
        self._thread = threading.Thread(
            target=self._save_and_keep_error, args=(step, arrays, data_state), daemon=True
        )
        self._thread.start()

    def poll(self) -> None:
        """Raises what a finished save failed with; never blocks."""
        if self._error is not None:
            error, self._error = self._error, None
            raise RuntimeError(
                f"{checkpoints_folder(self._workdir)}: saving failed ({error}); "
                "the previous checkpoint is untouched"
            ) from error

    def wait(self) -> None:
        """Waits for the save in progress."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def _save_and_keep_error(
        self, step: int, arrays: dict[str, np.ndarray], data_state: dict[str, Any]
    ) -> None:
        try:
            self._save(step, arrays, data_state)
        except BaseException as error:  # handed to the training thread
            self._error = error

    def _save(self, step: int, arrays: dict[str, np.ndarray], data_state: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        folder = checkpoints_folder(self._workdir) / str(step)
        if _read_manifest(folder) is not None:
            return  # saved before a restart, bit for bit the same
        if folder.exists():
            folder.rmtree()  # what an interrupted save left
        folder.mkdir(parents=True)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(folder / "state", args=ocp.args.StandardSave(arrays))
        manifest = {
            "format": CHECKPOINT_FORMAT,
            "step": step,
            "experiment": self._cfg.name,
            "config_digest": digest(self._cfg),
            "config": {k: repr(v) for k, v in flatten(self._cfg).items()},
            "data": data_state,
            "arrays": {
                k: {"shape": list(a.shape), "dtype": str(a.dtype), "sha256": _digest_array(a)}
                for k, a in arrays.items()
            },
        }
        manifest["sha256"] = _digest_json(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        self._drop_old()

    def _drop_old(self) -> None:
        for old in committed(self._workdir)[: -self._cfg.run.keep_checkpoints]:
            (old.folder / "manifest.json").unlink()  # from here on it does not exist
            old.folder.rmtree()


def check_config(checkpoint: Checkpoint, cfg: ExperimentConfig) -> None:
    """Refuses to continue a run under other mathematics.

    Raises:
      ValueError: another checkpoint format, or a field outside `MAY_CHANGE` differs.
    """
    manifest = checkpoint.manifest
    if manifest["format"] != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{checkpoint.folder}: checkpoint format {manifest['format']}, this version reads "
            f"{CHECKPOINT_FORMAT}; use the version that wrote it"
        )
    then, now = manifest["config"], {k: repr(v) for k, v in flatten(cfg).items()}
    changed = [
        f"{k} was {then.get(k, 'absent')}, is {now.get(k, 'absent')}"
        for k in sorted(then.keys() | now.keys())
        if then.get(k) != now.get(k) and k not in MAY_CHANGE
    ]
    if changed:
        raise ValueError(
            f"{checkpoint.folder.parent.parent}: holds another experiment ({'; '.join(changed)}); "
            "choose another --workdir"
        )


def restore(checkpoint: Checkpoint, target: TrainState) -> TrainState:
    """The saved state in the places of `target` (arrays or shapes with shardings), verified.

    Raises:
      ValueError: an array is missing, damaged, or of another shape or type than `target`'s.
    """
    wanted = flat_arrays(target)
    arrays = read_arrays(checkpoint, wanted)
    placed = [jax.device_put(arrays[k], x.sharding) for k, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), placed)


def read_arrays(checkpoint: Checkpoint, wanted: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays named by `wanted`, of its shapes and types, with their digests checked."""
    listed = checkpoint.manifest["arrays"]
    for name, like in wanted.items():
        entry = listed.get(name)
        if entry is None:
            raise ValueError(f"{checkpoint.folder}: lacks the array {name}")
        if tuple(entry["shape"]) != like.shape or entry["dtype"] != str(like.dtype):
            raise ValueError(
                f"{checkpoint.folder}: {name} is {entry['dtype']}{entry['shape']}, this run "
                f"needs {like.dtype}{list(like.shape)}"
            )
    arrays = _load(checkpoint)
    for name in wanted:
        if _digest_array(arrays[name]) != listed[name]["sha256"]:
            raise ValueError(_damaged(checkpoint, f"array {name} does not match its digest"))
    return {name: arrays[name] for name in wanted}


def _load(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    target = {
        name: np.empty(entry["shape"], np.dtype(entry["dtype"]))
        for name, entry in checkpoint.manifest["arrays"].items()
    }
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            return checkpointer.restore(
                checkpoint.folder / "state", args=ocp.args.StandardRestore(target)
            )
    except Exception as error:  # orbax raises many kinds for a damaged file
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(_damaged(checkpoint, reason)) from error


def _damaged(checkpoint: Checkpoint, reason: str) -> str:
    return (
        f"{checkpoint.folder}: step {checkpoint.step} is damaged ({reason}); "
        "remove this folder to continue from the step before it"
    )


def verify(checkpoint: Checkpoint) -> None:
    """Reads every array of a checkpoint against its digest.

    Raises:
      ValueError: naming the first damaged array.
    """
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(entry["shape"]), np.dtype(entry["dtype"]))
        for name, entry in checkpoint.manifest["arrays"].items()
    }
    read_arrays(checkpoint, wanted)
