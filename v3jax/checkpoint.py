"""Checkpoints of a whole run: written in the background, real only once their manifest is.

    <workdir>/checkpoints/<step>/state/          arrays, by orbax
    <workdir>/checkpoints/<step>/manifest.json   written last: it alone makes the step exist

The manifest holds the step, the config, the position in the data, the size of every file, the
shape, type and SHA-256 of every array, and a digest of itself. It appears whole or not at all: an
object store puts a file in one piece, and a local disk gets it by a rename. So a folder without a
manifest is what an interrupted save left, and a manifest that does not match its digest was
damaged afterwards, which is an error. `step` counts the batches drawn from the loader, committed
or not. Of several processes one writes, whole arrays gathered in its memory one after the other
(sharded writing is not done yet); each reads all and keeps its shards, on any mesh.
"""

import hashlib
import json
import os
import shutil
import threading
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from v3jax import processes
from v3jax.config import (
    CHECKPOINT_FORMAT,
    ExperimentConfig,
    MeshConfig,
    PipelineConfig,
    digest,
    flatten,
)
from v3jax.state import TrainState

# What may differ between a run and its continuation: rhythm, length and devices, never the
# mathematics.
MAY_CHANGE = frozenset(
    {
        "run.total_tokens",
        "run.eval_every",
        "run.eval_sequences",
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "run.max_bad_steps",
        "moe.bound_factor",
        "moe.dispatch_chunks",
        "batch.micro_batch",
        "data.workers",
        *(f"mesh.{field.name}" for field in fields(MeshConfig)),
        *(f"pipeline.{field.name}" for field in fields(PipelineConfig)),
    }
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
    """Where a run's checkpoints lie; on a local disk the path is absolute, as orbax wants it."""
    local = local_path(workdir)
    return epath.Path(workdir if local is None else local.absolute()) / "checkpoints"


def local_path(path: epath.PathLike) -> Path | None:
    """The path on this machine's disk, or None for an object store's (gs://, s3://)."""
    text = os.fspath(path)
    return None if "://" in text else Path(text)


def free_bytes(workdir: epath.PathLike) -> int | None:
    """Free bytes on the disk that holds `workdir`, or will; None on an object store."""
    path = local_path(workdir)
    if path is None:
        return None
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def committed_steps(workdir: epath.PathLike) -> list[int]:
    """The steps that have a manifest, in order."""
    return sorted(int(s.name) for s in _step_folders(workdir) if (s / "manifest.json").exists())


def _step_folders(workdir: epath.PathLike) -> list[epath.Path]:
    folder = checkpoints_folder(workdir)
    return [s for s in folder.iterdir() if s.name.isdigit()] if folder.exists() else []


def load(workdir: epath.PathLike, step: int) -> Checkpoint:
    """The checkpoint of a step that has a manifest; its arrays are not read yet.

    Raises:
      ValueError: the manifest is damaged.
    """
    file = checkpoints_folder(workdir) / str(step) / "manifest.json"
    manifest: dict[str, Any] = {}
    try:
        manifest = json.loads(file.read_text())
        whole = manifest.pop("sha256") == _digest_json(manifest) and manifest["step"] == step
    except (ValueError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{file}: the manifest of step {step} is damaged; "
            "remove its folder to continue from the step before it"
        )
    return Checkpoint(file.parent, manifest)


def latest(workdir: epath.PathLike) -> Checkpoint | None:
    """The newest complete checkpoint, or None.

    Raises:
      ValueError: its manifest is damaged.
    """
    steps = committed_steps(workdir)
    return load(workdir, steps[-1]) if steps else None


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_array(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def _file_sizes(folder: epath.Path, prefix: str = "") -> dict[str, int]:
    """Bytes of every file below `folder`, by its path from there."""
    sizes: dict[str, int] = {}
    for path in folder.iterdir():
        name = f"{prefix}{path.name}"
        if path.is_dir():
            sizes |= _file_sizes(path, f"{name}/")
        else:
            sizes[name] = path.stat().length
    return sizes


class Writer:
    """Saves states in the background, one at a time; a failure surfaces at the next call.

    Every process of a run makes one and calls `save` and `wait` alike; only the writer's writes.
    As a context manager it waits for the save in progress, whatever ends the run.

    Raises:
      RuntimeError: from `save`, `poll` or `wait`, when an earlier save failed; from `save` and
        `wait` on every process.
    """

    def __init__(self, workdir: epath.PathLike, cfg: ExperimentConfig) -> None:
        self._workdir = epath.Path(workdir)
        self._cfg = cfg
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._n_saves = self._n_heard = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.join()

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied, so `state` may be donated."""
        self.wait()
        state = processes.gathered(state)
        self._n_saves += 1
        if not processes.is_writer():
            return
        arrays = {k: np.array(v) for k, v in flat_arrays(state).items()}
        self._thread = threading.Thread(
            target=self._save_and_keep_error, args=(step, arrays, data_state), daemon=True
        )
        self._thread.start()

    def poll(self) -> None:
        """Raises what a finished save failed with; never blocks."""
        if self._error is not None:
            error, self._error = self._error, None
            raise RuntimeError(self._why(error)) from error

    def wait(self) -> None:
        """Waits for the save in progress, wherever it runs."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()
        if not processes.is_writer() and self._n_heard < self._n_saves:
            self._n_heard = self._n_saves
            failure = json.loads(processes.wait_for(f"saved/{self._n_saves}"))
            if failure is not None:
                raise RuntimeError(failure)

    def _why(self, error: BaseException) -> str:
        return (
            f"{checkpoints_folder(self._workdir)}: saving failed ({error}); "
            "the previous checkpoint is untouched"
        )

    def _save_and_keep_error(
        self, step: int, arrays: dict[str, np.ndarray], data_state: dict[str, Any]
    ) -> None:
        failure = None
        try:
            self._save(step, arrays, data_state)
        except BaseException as error:  # handed to the training thread
            self._error, failure = error, self._why(error)
        if processes.count() > 1:
            processes.post(f"saved/{self._n_saves}", json.dumps(failure))

    def _save(self, step: int, arrays: dict[str, np.ndarray], data_state: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        if step in committed_steps(self._workdir):
            return  # saved before a restart, bit for bit the same
        self._drop_leftovers()
        folder = checkpoints_folder(self._workdir) / str(step)
        folder.mkdir(parents=True)
        with _checkpointer() as checkpointer:
            checkpointer.save(folder / "state", args=ocp.args.PyTreeSave(arrays))
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
            "files": _file_sizes(folder / "state"),
        }
        manifest["sha256"] = _digest_json(manifest)
        write_whole(folder / "manifest.json", json.dumps(manifest, indent=1))
        self._drop_old()

    def _drop_leftovers(self) -> None:
        """Removes what interrupted saves left; a step with a manifest is never touched."""
        kept = set(committed_steps(self._workdir))
        for folder in _step_folders(self._workdir):
            if int(folder.name) not in kept:
                folder.rmtree()

    def _drop_old(self) -> None:
        for step in committed_steps(self._workdir)[: -self._cfg.run.keep_checkpoints]:
            folder = checkpoints_folder(self._workdir) / str(step)
            (folder / "manifest.json").unlink()  # from here on it does not exist
            folder.rmtree()


def write_whole(file: epath.Path, text: str) -> None:
    """Writes a file that a reader sees whole or not at all, and that outlives a power cut."""
    local = local_path(file)
    if local is None:
        file.write_text(text)  # an object appears when its upload is complete
        return
    temporary = local.with_name(f".{local.name}.new")
    with temporary.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(local)
    folder = os.open(local.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_workdir(workdir: epath.PathLike, cfg: ExperimentConfig) -> Checkpoint | None:
    """The checkpoint from which `cfg` continues in `workdir`, or None; changes nothing.

    Raises:
      ValueError: no directory, a damaged manifest, another format, or a run under other
        mathematics: a field outside `MAY_CHANGE` differs.
    """
    root = epath.Path(workdir)
    local = local_path(root)
    for folder in (local, *local.absolute().parents) if local is not None else ():
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: is a file; choose another --workdir")
    found = latest(root)
    if found is not None and found.manifest["format"] != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{found.folder}: checkpoint format {found.manifest['format']}, this version reads "
            f"{CHECKPOINT_FORMAT}; use the version that wrote it"
        )
    if found is not None:
        _check_same(root, found.manifest["config"], cfg)
    elif (root / "config.txt").exists():  # a run that ended before its first checkpoint
        try:
            lines = (root / "config.txt").read_text().splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{root / 'config.txt'}: no text; choose another --workdir") from None
        _check_same(root, dict(line.split(" = ", 1) for line in lines if " = " in line), cfg)
    elif (root / "metrics.jsonl").exists():
        raise ValueError(f"{root}: holds metrics.jsonl but no run; choose another --workdir")
    return found


def _check_same(root: epath.Path, then: dict[str, str], cfg: ExperimentConfig) -> None:
    # What fields stood for that are younger than the run.
    held = {".".join(k.split(".")[:n]) for k in then for n in range(1, k.count(".") + 1)}
    then = {k: repr(v) for k, v in _defaults(cfg).items() if k not in held} | then
    now = {k: repr(v) for k, v in flatten(cfg).items()}
    changed = [
        f"{k} was {then.get(k, 'absent')}, is {now.get(k, 'absent')}"
        for k in sorted(then.keys() | now.keys())
        if then.get(k) != now.get(k) and k not in MAY_CHANGE
    ]
    if changed:
        raise ValueError(
            f"{root}: holds another experiment ({'; '.join(changed)}); choose another --workdir"
        )


def _defaults(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a config's fields that have a default, with it."""
    found: dict[str, Any] = {}
    for field in fields(cfg):
        name, value = f"{prefix}{field.name}", getattr(cfg, field.name)
        if is_dataclass(field.default):
            found |= flatten(field.default, f"{name}.")
        elif field.default is not MISSING:
            found[name] = field.default
        elif is_dataclass(value):
            found |= _defaults(value, f"{name}.")
    return found


def restore(checkpoint: Checkpoint, target: TrainState) -> TrainState:
    """The saved state in the places of `target` (arrays or shapes with shardings), verified.

    Raises:
      ValueError: an array is missing, damaged, or of another shape or type than `target`'s.
    """
    return _restore_tree(checkpoint, target, prefix="")


def load_params(
    checkpoint: Checkpoint, target: TrainState, *, ema: bool = False
) -> tuple[Any, Any]:
    """Parameters, or their moving average, and router state in the places of `target`, verified.

    Raises:
      ValueError: as `restore`, or the run kept no average.
    """
    if ema and target.ema is None:
        raise ValueError(f"{checkpoint.folder}: the run kept no averaged weights; drop --ema")
    name, like = ("ema", target.ema) if ema else ("params", target.params)
    params = _restore_tree(checkpoint, like, prefix=f"{name}.")
    return params, _restore_tree(checkpoint, target.router_state, prefix="router_state.")


def _restore_tree(checkpoint: Checkpoint, target: Any, prefix: str) -> Any:
    wanted = {f"{prefix}{name}": like for name, like in flat_arrays(target).items()}
    arrays = read_arrays(checkpoint, wanted)
    placed = [processes.placed(arrays[name], like.sharding) for name, like in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), placed)


def verify(workdir: epath.PathLike, step: int) -> None:
    """Reads every array of a checkpoint against its digest.

    Raises:
      ValueError: the step does not exist, or naming what is damaged.
    """
    if step not in committed_steps(workdir):
        raise ValueError(f"{checkpoints_folder(workdir) / str(step)}: no complete checkpoint")
    checkpoint = load(workdir, step)
    wanted = {name: _abstract(entry) for name, entry in checkpoint.manifest["arrays"].items()}
    read_arrays(checkpoint, wanted)


def read_arrays(checkpoint: Checkpoint, wanted: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays named by `wanted`, of its shapes and types, with their digests checked."""
    listed = checkpoint.manifest["arrays"]
    for name, like in wanted.items():
        entry = listed.get(name)
        if entry is None:
            raise ValueError(f"{checkpoint.folder}: lacks the array {name}; use the code it is of")
        if tuple(entry["shape"]) != like.shape or entry["dtype"] != str(like.dtype):
            raise ValueError(
                f"{checkpoint.folder}: {name} is {entry['dtype']}{entry['shape']}, this run "
                f"needs {like.dtype}{list(like.shape)}; use the code it is of"
            )
    arrays = _read(checkpoint, {name: _abstract(listed[name]) for name in wanted})
    for name, like in wanted.items():
        array = arrays[name]
        if array.shape != like.shape or _digest_array(array) != listed[name]["sha256"]:
            raise ValueError(_damaged(checkpoint, f"array {name} does not match its digest"))
    return arrays


def _abstract(entry: dict[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), np.dtype(entry["dtype"]))


def _read(checkpoint: Checkpoint, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Reads these arrays and no others."""
    import orbax.checkpoint as ocp

    _check_files(checkpoint)
    if not wanted:
        return {}

    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
    args = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
    try:
        with _checkpointer() as checkpointer:
            arrays = checkpointer.restore(checkpoint.folder / "state", args=args)
    except Exception as error:  # orbax raises many kinds for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(_damaged(checkpoint, reason)) from error
    for name in wanted:  # what a damaged index of orbax's does not list is left out silently
        if not isinstance(arrays.get(name), np.ndarray):
            raise ValueError(_damaged(checkpoint, f"array {name} is not in the index"))
    return arrays


def _checkpointer() -> Any:
    """orbax's, which waits for no other process."""
    import orbax.checkpoint as ocp

    alone = ocp.options.MultiprocessingOptions(
        primary_host=processes.index(), active_processes={processes.index()}
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _check_files(checkpoint: Checkpoint) -> None:
    """Finds missing and truncated files without opening any."""
    there = _file_sizes(checkpoint.folder / "state")
    for name, size in checkpoint.manifest["files"].items():
        if name not in there:
            raise ValueError(_damaged(checkpoint, f"the file state/{name} is missing"))
        if there[name] != size:
            reason = f"the file state/{name} has {there[name]} bytes instead of {size}"
            raise ValueError(_damaged(checkpoint, reason))


def _damaged(checkpoint: Checkpoint, reason: str) -> str:
    return (
        f"{checkpoint.folder}: step {checkpoint.step} is damaged ({reason}); "
        "remove this folder to continue from the step before it"
    )
