"""Peak memory and speed of reading and writing public checkpoints.

    python -m benchmarks.conversion [--gigabytes=4] [--kind=fp8] [--folder=DIR]

Makes a checkpoint of about that many gigabytes with random weights, of the report's proportions,
and loads, converts and exports it, each in a process of its own. `beyond` is the process's peak
resident memory less the arrays it ends with and less what it had when jax was up; the limit is the
larger of 2 GiB and twice the largest tensor.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from v3jax import convert, hf, models, registry
from v3jax.config import ModelConfig
from v3jax.hf import blocks, export
from v3jax.hf import config as hf_config
from v3jax.host import reuse_freed_memory

_GIGABYTES = flags.DEFINE_float("gigabytes", 4.0, "Size of the checkpoint in 10^9 bytes.")
_KIND = flags.DEFINE_enum("kind", "fp8", export.KINDS, "Types of the checkpoint.")
_FOLDER = flags.DEFINE_string("folder", None, "Where to work; a temporary folder by default.")
_JOB = flags.DEFINE_string("job", None, "Internal: what the child process does.")


def proportioned(n_layers: int) -> ModelConfig:
    """The report's model at a quarter of its widths, 64 experts, and some layers."""
    full = registry.get("v3_full").model
    return replace(
        full,
        vocab_size=32_320,
        dim=1792,
        n_layers=n_layers,
        n_dense_layers=1,
        n_heads=32,
        q_latent_dim=384,
        dense_ffn_dim=4608,
        expert_ffn_dim=512,
        n_experts=64,
    )


def make_checkpoint(folder: Path, kind: str, n_bytes: float) -> ModelConfig:
    """A random checkpoint of at least `n_bytes`, in shards of 1 GB."""
    n_layers = 1
    while _size(proportioned(n_layers), kind) < n_bytes:
        n_layers += 1
    model = proportioned(n_layers)
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(2**22) * 0.02).astype(np.float32)

    def stored(tensor: Any, dtype: np.dtype) -> tuple[np.ndarray, ...]:
        values = np.resize(noise, tensor.shape)
        return blocks.quantize(values) if dtype == blocks.FP8 else (values.astype(dtype),)

    config = hf_config.render(model, dtype="bfloat16", fp8=kind == "fp8", max_positions=4096)
    export.write(folder, model, kind, stored, config=config, beside={}, shard_bytes=1e9)
    return model


def _size(model: ModelConfig, kind: str) -> int:
    return sum(part.n_bytes for _, parts in export.plan(model, kind) for part in parts)


def _files(folder: Path) -> Iterator[int]:
    return (p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(job: str, folder: Path) -> dict[str, float]:
    """One job in this process: seconds, its result's bytes in memory, and peak memory."""
    import jax

    reuse_freed_memory()
    jax.block_until_ready(jax.numpy.zeros(8))
    base, start, kept = _peak_bytes(), time.perf_counter(), 0
    if job == "load":
        _, params, router_state = hf.load(folder / "source")
        kept = sum(x.nbytes for x in jax.tree.leaves([params, router_state]))
    elif job == "from-hf":
        convert.from_hf(folder / "source", folder / "in")
    elif job == "load conversion":
        reader = models.open_reader(folder / "in")
        assert reader is not None
        kept = sum(x.nbytes for x in jax.tree.leaves(hf.load_variables(reader)))
    else:
        convert.to_hf(folder / "in", folder / "out", shard_bytes=1e9)
    return {"seconds": time.perf_counter() - start, "kept": kept, "peak": _peak_bytes() - base}


def measure(folder: Path, job: str) -> dict[str, float]:
    """`child` in a process of its own."""
    call = [sys.executable, "-m", "benchmarks.conversion", f"--folder={folder}", f"--job={job}"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    del argv
    if _JOB.value is not None and _FOLDER.value is not None:
        print(json.dumps(child(_JOB.value, Path(_FOLDER.value))))
        return
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as name:
        folder = Path(name)
        model = make_checkpoint(folder / "source", _KIND.value, _GIGABYTES.value * 1e9)
        planned = export.plan(model, _KIND.value)
        largest = max(part.n_bytes for _, parts in planned for part in parts)
        size = sum(_files(folder / "source"))
        limit = max(2 * 2**30, 2 * largest)
        print(
            f"{size / 1e9:.2f} GB {_KIND.value} in {len(list((folder / 'source').glob('*.safe*')))}"
            f" files, largest tensor {largest / 2**20:.0f} MiB, limit {limit / 2**30:.2f} GiB"
        )
        print(f"{'':16s} {'seconds':>8s} {'GB/s':>6s} {'result GiB':>11s} {'beyond GiB':>11s}")
        for job in ("load", "from-hf", "load conversion", "to-hf"):
            got = measure(folder, job)
            beyond = (got["peak"] - got["kept"]) / 2**30
            print(
                f"{job:16s} {got['seconds']:8.1f} {size / 1e9 / got['seconds']:6.2f} "
                f"{got['kept'] / 2**30:11.2f} {beyond:11.2f}",
                flush=True,
            )
        same = all(
            (folder / "source" / file.name).read_bytes() == file.read_bytes()
            for file in (folder / "out").glob("*.safetensors")
        )
        print(f"files written back are {'the same to the bit' if same else 'NOT the same'}")


if __name__ == "__main__":
    app.run(main)
