"""CPU training throughput against MaxText 0.2.5 on the same shapes, and the matmul limit.

    python -m benchmarks.step_speed                  # ours and the limit
    python -m benchmarks.step_speed --maxtext=DIR    # and MaxText, installed into DIR from PyPI

MaxText is the nearest JAX peer. It runs its own training loop in an environment of its own with the
shapes of `v3_peer`: FP32, minimal recompute, AdamW, loss-free bias update on, synthetic data, MTP
off and then on. Ours is timed before and after it and the two are averaged, since machines are
shared; the CPU seconds of both processes are printed beside the wall clock for the same reason.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.timing import Timing, matmul_flops, time_step
from v3jax import cost, registry
from v3jax.config import ExperimentConfig
from v3jax.host import reuse_freed_memory

MAXTEXT = flags.DEFINE_string("maxtext", None, "Folder of MaxText's environment, made if absent.")
STEPS = flags.DEFINE_integer("steps", 20, "Steps to time.")
_HERE = Path(__file__).parent


def maxtext_arguments(cfg: ExperimentConfig, n_devices: int = 1, **changes: Any) -> list[str]:
    """MaxText's options for the shapes of `cfg` on so many devices."""
    model = cfg.model
    options = {
        "model_name": "deepseek3-671b",
        "override_model_config": True,
        "base_num_decoder_layers": model.n_layers,
        "first_num_dense_layers": model.n_dense_layers,
        "base_emb_dim": model.dim,
        "base_num_query_heads": model.n_heads,
        "base_num_kv_heads": model.n_heads,
        "base_mlp_dim": model.dense_ffn_dim,
        "base_moe_mlp_dim": model.expert_ffn_dim,
        "num_experts": model.n_experts,
        "num_experts_per_tok": model.top_k,
        "shared_experts": model.n_shared_experts,
        "q_lora_rank": model.q_latent_dim,
        "kv_lora_rank": model.kv_latent_dim,
        "qk_nope_head_dim": model.nope_head_dim,
        "qk_rope_head_dim": model.rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "vocab_size": model.vocab_size,
        "max_target_length": cfg.data.seq_len,
        "per_device_batch_size": cfg.batch.end // n_devices,
        "routed_bias": True,
        "routed_bias_update_rate": cfg.balance.bias_speed[0][1],
        "mtp_num_layers": model.mtp_depth,
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "dataset_type": "synthetic",
        "enable_checkpointing": False,
        "attention": "dot_product",
        "sparse_matmul": True,
        "megablox": False,
        "dtype": "float32",
        "weight_dtype": "float32",
        "remat_policy": "minimal",
        "opt_type": "adamw",
        "scan_layers": True,
        "enable_goodput_recording": False,
        "monitor_goodput": False,
        "enable_tensorboard": False,
        "tokenizer_type": "huggingface",
        "tokenizer_path": "deepseek-ai/DeepSeek-V3",
        "run_name": "v3_peer",
    }
    return [f"{name}={value}" for name, value in (options | changes).items()]


def time_maxtext(
    cfg: ExperimentConfig, folder: Path, n_steps: int, n_devices: int = 1, **changes: Any
) -> Timing:
    """Installs MaxText if need be, runs its trainer in a process of its own, reads its times.

    `n_devices` are CPU devices; `changes` are options of MaxText's.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pins = _HERE / "maxtext_requirements.txt"
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(pins)]
        subprocess.run(install, check=True)
    options = [f"base_output_directory={folder / 'out'}", f"steps={n_steps + 5}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    result = subprocess.run(
        [
            str(python),
            str(_HERE / "maxtext_peer.py"),
            *maxtext_arguments(cfg, n_devices, **changes),
            *options,
        ],
        env=environment
        | {
            "JAX_PLATFORMS": "cpu",
            "DECOUPLE_GCLOUD": "TRUE",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={n_devices}",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"MaxText did not finish: {result.stderr.strip().splitlines()[-1]}")
    return Timing(**json.loads(lines[-1]))


def main(argv: list[str]) -> None:
    del argv
    reuse_freed_memory()
    cfg = registry.get("v3_peer")
    tokens = cfg.batch.end * cfg.data.seq_len
    mtp = replace(cfg, model=replace(cfg.model, mtp_depth=1))
    peak = matmul_flops()
    print(f"FP32 matrix products: {peak / 1e9:.0f} GFLOP/s")
    print(f"{'':28s} {'s/step':>8s} {'CPU s':>8s} {'tokens/s':>10s} {'of limit':>10s}")

    def row(name: str, run: ExperimentConfig, wall: float, cpu: float) -> None:
        flops = tokens * cost.flops_per_token(run.model, run.data.seq_len, mtp=True)
        print(
            f"{name:28s} {wall:8.3f} {cpu:8.3f} {tokens / wall:10.0f} {flops / peak / wall:10.2f}",
            flush=True,
        )

    for name, run in (("", cfg), (" with MTP", mtp)):
        ours = [time_step(run, STEPS.value)]
        peer = None
        if MAXTEXT.value:
            peer = time_maxtext(run, Path(MAXTEXT.value).resolve(), STEPS.value)
            ours.append(time_step(run, STEPS.value))
        wall = statistics.mean(timing.wall for timing in ours)
        cpu = statistics.mean(timing.cpu for timing in ours)
        row(f"v3jax{name}", run, wall, cpu)
        if peer is not None:
            row(f"MaxText 0.2.5{name}", run, peer.wall, peer.cpu)
            print(
                f"ratio to MaxText: wall {peer.wall / wall:.2f}, CPU seconds {peer.cpu / cpu:.2f}"
            )


if __name__ == "__main__":
    app.run(main)
