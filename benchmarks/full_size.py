"""The full-size step, compiled for pods that are not here, and MaxText's beside it.

    python -m benchmarks.full_size --tpu-python=PYTHON --cuda-python=PYTHON      # the layouts
    python -m benchmarks.full_size --parts=piped,fp8,long --tpu-python=PYTHON --cuda-python=PYTHON
    python -m benchmarks.full_size --parts=recompute --tpu-python=PYTHON --cuda-python=PYTHON
    python -m benchmarks.full_size --parts=step,layer --tpu-python=PYTHON --maxtext=DIR
    python -m benchmarks.full_size --parts=readme        # what is in results, as the README has it

What each part finds is also written to benchmarks/results, with the command.

`layouts`: every layout of `v3_full` without stages through `v3jax.aot`, `piped`: `v3_full` itself
for H100 and v5p, `fp8`: both for H100 in FP8, `long`: the context extensions. `recompute`: memory
and work of a device under each `numerics.remat`. `step`: MaxText 0.2.5's own recipe for DeepSeek-V3
on 512 TPU v5p (FSDP 512, sequence 8192, 6 sequences a chip; without MTP, bias update, node-limited
routing or balance loss) against `v3_full_v5p` with the same tokens a chip and all of them. `layer`:
what one MoE layer of V3's widths adds to XLA's estimate on 64 v5p with 4 x 4096 tokens a chip and
full recompute, as the difference of one dense + two MoE layers and one dense + one. Both programs'
collectives and kernels are counted by the reader of `v3jax.aot`. `--maxtext` is a folder with
benchmarks/maxtext_requirements.txt installed and libtpu.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.kept import keep, kept, markdown
from v3jax import registry
from v3jax.aot import targets
from v3jax.aot.__main__ import compile_for
from v3jax.aot.collectives import read_collectives
from v3jax.aot.costs import read_costs
from v3jax.aot.hlo import parse
from v3jax.aot.report import table
from v3jax.aot.targets import GIB
from v3jax.config import MeshConfig
from v3jax.sharding import MESH_AXES

_PARTS = flags.DEFINE_list(
    "parts", ["layouts"], "layouts, piped, fp8, long, recompute, step, layer, readme."
)
_ONLY = flags.DEFINE_list("only", [], "Names of layouts, or chips of `piped`; default all.")
_TPU = flags.DEFINE_string("tpu-python", "python", "Python of an environment with extra tpu.")
_CUDA = flags.DEFINE_string("cuda-python", "python", "Python of an environment with extra cuda.")
_MAXTEXT = flags.DEFINE_string("maxtext", None, "MaxText's virtual environment.")

TIMEOUT = 3600.0
V5P_512 = targets.parse("tpu:v5p:8x8x8")
V5P_64 = targets.parse("tpu:v5p:4x4x4")
LAYOUTS = {
    "v3_full_v5p": "tpu:v5p:8x8x8",
    "v3_full_tpu7x": "tpu:tpu7x:4x8x8",
    "v3_full_h100": "gpu:h100:256x8",
}
PIPED = {"h100": "gpu:h100:256x8", "v5p": "tpu:v5p:8x16x16"}
"""What `v3_full` itself, through its pipeline, is compiled for."""
FP8 = {
    "v3_full_pipe_h100": ("v3_full", ()),
    "v3_full_h100": ("v3_full_h100", ("numerics.remat=report",)),
}
"""What is compiled in FP8 too, by the name of its results in BF16. Without stages the report's own
choice of what is recomputed fits."""
LONG = {
    "v3_ctx32k_h100": "v3_ctx32k",
    "v3_ctx128k_h100": "v3_ctx128k",
    "v3_ctx32k_v5p": "v3_ctx32k_v5p",
    "v3_ctx128k_v5p": "v3_ctx128k_v5p",
}
"""Names of results, and experiments; those for v5p without the scheduler's estimate."""
THEIR_FLAGS = Path(__file__).parent / "maxtext_flags.txt"
"""Of MaxText's recipe `deepseek3_671b_v5p_1024`, but for one that this libtpu does not know."""


# ---- The layouts


def print_layouts() -> None:
    """Compiles each layout and keeps its report."""
    for exp in _ONLY.value or LAYOUTS:
        _print_layout(exp, LAYOUTS[exp], exp)


def print_piped() -> None:
    """The same of `v3_full` on each of its targets."""
    for name in _ONLY.value or PIPED:
        _print_layout("v3_full", PIPED[name], f"v3_full_pipe_{name}")


def print_fp8() -> None:
    """The same in FP8 for H100."""
    for name in _ONLY.value or FP8:
        exp, settings = FP8[name]
        settings = ("numerics.compute=fp8", *settings)
        _print_layout(exp, PIPED["h100"], _in_fp8(name), settings)


def print_long() -> None:
    """The same of the context extensions, which XLA's own estimate of TPUs takes too long for."""
    for name in _ONLY.value or LONG:
        target = LAYOUTS["v3_full_v5p"] if name.endswith("v5p") else PIPED["h100"]
        _print_layout(LONG[name], target, name, estimate=False)


def _in_fp8(name: str) -> str:
    return name.replace("_h100", "_fp8_h100")


def _print_layout(
    exp: str, target: str, name: str, settings: Sequence[str] = (), *, estimate: bool = True
) -> None:
    report = ours(exp, settings, targets.parse(target), estimate=estimate)
    told = "".join(f" --set {setting}" for setting in settings)
    told += "" if estimate else " --no-estimate"
    keep(name, f"python -m v3jax.aot --exp={exp} --target={target} --json{told}", report)
    print(f"{table(report)}\n", flush=True)


def print_recompute() -> None:
    """Compiles each layout with each policy."""
    print(
        f"{'layout':<16}{'numerics.remat':<16}{'fits':<6}{'GiB a device':>13}{'limit':>8}"
        f"{'temporaries':>13}{'model FLOPs':>14}{'FLOPs over them':>17}"
    )
    kept: dict[str, Any] = {}
    for exp in _ONLY.value or LAYOUTS:
        for policy in ("none", "report", "full"):
            r = ours(exp, (f"numerics.remat={policy}",), targets.parse(LAYOUTS[exp]))
            temp, flops = r["temp_bytes_per_chip"], r["flops_per_chip"]
            kept.setdefault(exp, {})[policy] = {
                name: r[name]
                for name in (
                    "fits",
                    "over_bytes",
                    "memory_bytes_per_chip",
                    "temp_bytes_per_chip",
                    "flops_per_chip",
                    "model_flops_per_chip",
                )
            }
            print(
                f"{exp:<16}{policy:<16}{'yes' if r['fits'] else 'no':<6}"
                f"{r['memory_bytes_per_chip'] / GIB:>13.1f}{r['memory_limit_bytes'] / GIB:>8.1f}"
                f"{'' if temp is None else f'{temp / GIB:.1f}':>13}"
                f"{r['model_flops_per_chip']:>14.3g}"
                f"{'' if flops is None else f'{flops / r["model_flops_per_chip"]:.2f}':>17}",
                flush=True,
            )

    only = f" --only={','.join(_ONLY.value)}" if _ONLY.value else ""
    command = f"--parts=recompute{only} --tpu-python=PYTHON --cuda-python=PYTHON"
    keep("recompute", f"python -m benchmarks.full_size {command}", kept)


def ours(
    exp: str,
    settings: Sequence[str],
    target: targets.Target,
    *,
    hlo: str | None = None,
    estimate: bool = False,
) -> dict[str, Any]:
    """The report of `v3jax.aot`."""
    python = _TPU.value if target.platform == "tpu" else _CUDA.value
    return compile_for(
        exp,
        settings,
        target,
        python=python,
        timeout=TIMEOUT,
        estimate=estimate,
        hlo=hlo,
    )


# ---- Beside MaxText


def theirs(text_file: Path, **options: Any) -> dict[str, Any]:
    """What `benchmarks.maxtext_compile` measured; its program is in `text_file`."""
    folder = Path(_MAXTEXT.value or "")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "DECOUPLE_GCLOUD": "TRUE",
    }
    common = {
        "model_name": "deepseek3-671b",
        "compile_topology_num_slices": 1,
        "run_name": "aot",
        "base_output_directory": str(text_file.parent),
        "ici_fsdp_parallelism": -1,
        "dtype": "bfloat16",
        "weight_dtype": "float32",
        "megablox": True,
        "sparse_matmul": True,
        "attention": "flash",
        "dataset_type": "synthetic",
        "enable_checkpointing": False,
        "tokenizer_type": "huggingface",
        "tokenizer_path": "deepseek-ai/DeepSeek-V3",
    }
    done = subprocess.run(
        [
            folder / "bin" / "python",
            Path(__file__).parent / "maxtext_compile.py",
            text_file,
            *(f"{name}={value}" for name, value in (common | options).items()),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
        cwd=text_file.parent,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"MaxText: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return json.loads(lines[-1])


def attention_blocks(size: int) -> dict[str, int]:
    """MaxText's tiles of its attention kernel, all of one size."""
    parts = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return {f"sa_block_{part}": size for part in parts}


def sent(text_file: Path, mesh_shape: dict[str, int], n_micro: int = 1) -> float:
    """Bytes that a device sends in a step, by every collective of a program."""
    from v3jax.aot.hlo import Loops

    module = parse(text_file.read_text(), Loops(n_micro=n_micro, expert_rows=0))
    return float(sum(c.sent * c.count for c in read_collectives(module, mesh_shape)))


@dataclass(frozen=True)
class Row:
    """One side of the comparison of whole steps."""

    compile_seconds: float
    cpu_seconds: float
    memory: float
    host: float
    sent_per_token: float
    hlo: float


def print_step() -> None:
    """Whole steps of 3072 sequences of 8192 tokens on 512 chips."""
    tokens = 6 * 8192
    settings = (
        "data.seq_len=8192",
        "batch.micro_batch=1024",
        "batch.start=3072",
        "batch.end=3072",
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.txt"
        got = ours("v3_full_v5p", settings, V5P_512, hlo=str(file))
        rows = {
            "v3jax v3_full_v5p": Row(
                got["compile_seconds"],
                got["cpu_seconds"],
                got["memory_bytes_per_chip"],
                got["host_bytes_per_chip"],
                sum(c["bytes_per_chip"] for c in got["collectives"]) / tokens,
                got["hlo_bytes"],
            )
        }
        if _MAXTEXT.value:
            got = theirs(
                file,
                compile_topology="v5p-1024",
                ici_tensor_parallelism=1,
                per_device_batch_size=6,
                max_target_length=8192,
                scan_layers=True,
                use_custom_sort_vjp=True,
                remat_policy="custom",
                decoder_layer_input="offload",
                out_proj="offload",
                sa_use_fused_bwd_kernel=False,
                compile_xla_flags=" ".join(f"--{flag}" for flag in THEIR_FLAGS.read_text().split()),
                **attention_blocks(2048),
            )
            rows["MaxText 0.2.5, its recipe"] = Row(
                got["compile_seconds"],
                got["cpu_seconds"],
                got["memory_bytes_per_chip"],
                got["host_bytes_per_chip"],
                sent(file, got["mesh"]) / tokens,
                got["hlo_bytes"],
            )
    print(
        f"{'512 x v5p, 49,152 tokens a chip':<34}{'compile s':>10}{'CPU s':>8}{'device GB':>11}"
        f"{'host GB':>9}{'sent MB/token':>15}{'HLO MB':>8}"
    )
    for name, r in rows.items():
        print(
            f"{name:<34}{r.compile_seconds:>10.0f}{r.cpu_seconds:>8.0f}{r.memory / 1e9:>11.1f}"
            f"{r.host / 1e9:>9.1f}{r.sent_per_token / 1e6:>15.1f}{r.hlo / 1e6:>8.1f}",
            flush=True,
        )
    command = "python -m benchmarks.full_size --parts=step --tpu-python=PYTHON --maxtext=DIR"
    keep("step", command, {name: asdict(r) for name, r in rows.items()})


@dataclass(frozen=True)
class Layer:
    """What a program of some layers costs on one of 64 chips."""

    seconds: float
    """By XLA, to which a kernel that declares no cost adds nothing."""
    kernels: float
    """Seconds of such kernels at the chip's peak."""
    model: float
    """FLOPs of the model."""
    traffic: float
    sent: float
    links: float

    def __sub__(self, other: "Layer") -> "Layer":
        return Layer(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


def undeclared_seconds(text: str) -> float:
    """Time at the chip's peak of the kernels that XLA knows no cost of."""
    kernels = read_costs(parse(text)).kernels.values()
    return sum(k.flops for k in kernels if not k.declared) / V5P_64.chip.peak_flops


def our_layers(n_moe: int, data: int, expert: int, folder: Path) -> Layer:
    """One dense and some MoE layers with node-limited routing and moving biases."""
    file = folder / "ours.txt"
    settings = (
        "mesh.data=1",
        "mesh.expert=1",
        "batch.micro_batch=256",
        "batch.start=256",
        "batch.end=256",
        f"mesh.data={data}",
        f"mesh.expert={expert}",
        "model.mtp_depth=0",
        "model.n_dense_layers=1",
        f"model.n_layers={1 + n_moe}",
    )
    got = ours("v3_full_v5p", settings, V5P_64, hlo=str(file))
    return Layer(
        seconds=got["xla"]["optimal_seconds"],
        kernels=undeclared_seconds(file.read_text()),
        model=got["model_flops_per_chip"],
        traffic=got["xla"]["bytes accessed"],
        sent=sum(c["bytes_per_chip"] for c in got["collectives"]),
        links=sum(c["link_seconds"] for c in got["collectives"]),
    )


def their_layers(n_moe: int, folder: Path) -> Layer:
    """MaxText's, with its default routing: plain top 8, no bias update."""
    file = folder / "theirs.txt"
    got = theirs(
        file,
        override_model_config=True,
        base_num_decoder_layers=1 + n_moe,
        first_num_dense_layers=1,
        scan_layers=False,
        compile_topology="v5p-128",
        per_device_batch_size=4,
        max_target_length=4096,
        remat_policy="full",
        compile_xla_flags="--xla_tpu_scoped_vmem_limit_kib=81920",
        **attention_blocks(1024),
    )
    sent_bytes = sent(file, got["mesh"])
    return Layer(
        seconds=got["optimal_seconds"],
        kernels=undeclared_seconds(file.read_text()),
        model=got["model_flops_per_chip"],
        traffic=got["bytes"],
        sent=sent_bytes,
        links=sent_bytes / (6 * V5P_64.chip.link_speed),  # all six links, as devices.speed
    )


def print_layer() -> None:
    """What one MoE layer adds on 64 chips."""
    print(
        f"\n{'one MoE layer, 16,384 tokens a chip':<36}{'XLA s':>8}{'kernels s':>10}{'bound':>8}"
        f"{'with kernels':>14}{'traffic GB':>11}{'sent GB':>9}{'links s':>8}",
        flush=True,
    )
    rows: dict[str, dict[str, float]] = {}

    def add(name: str, one: Layer, two: Layer) -> None:
        r = two - one
        at_peak = r.model / V5P_64.chip.peak_flops
        rows[name] = asdict(r) | {"bound": at_peak / r.seconds}
        print(
            f"{name:<36}{r.seconds:>8.3f}{r.kernels:>10.3f}{at_peak / r.seconds:>8.1%}"
            f"{at_peak / (r.seconds + r.kernels):>14.1%}{r.traffic / 1e9:>11.0f}"
            f"{r.sent / 1e9:>9.1f}{r.links:>8.3f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for data, expert in ((1, 64), (4, 16)):
            label = f"v3jax data={data} x expert={expert}"
            add(label, *(our_layers(n, data, expert, folder) for n in (1, 2)))
        if _MAXTEXT.value:
            add("MaxText 0.2.5, FSDP 64", *(their_layers(n, folder) for n in (1, 2)))
    command = "python -m benchmarks.full_size --parts=layer --tpu-python=PYTHON --maxtext=DIR"
    keep("layer", command, rows)


# ---- The README's tables


def print_readme() -> None:
    """The kept results as the Markdown tables of the README."""
    found = {name: kept(name) for name in LAYOUTS}
    print(markdown(["", *(f"`{name}`" for name in found)], _layout_rows(list(found.values()))))
    piped = [kept(f"v3_full_pipe_{name}") for name in PIPED]
    rows = _layout_rows(piped)
    rows.insert(-3, ["idle in the pipeline", *(f"{r['idle_share']:.1%}" for r in piped)])
    print()
    print(markdown(["`v3_full`, pipe=16", *PIPED], [*rows, *_exchange_rows(piped)]))
    long = [kept(name) for name in LONG]
    meshes = [registry.get(exp).mesh for exp in LONG.values()]
    rows = [row for row in _layout_rows(long) if row[0] != "by XLA, s"]
    rows[2:2] = [[MESH_AXES_TOLD, *(_told(mesh) for mesh in meshes)]]
    print()
    print(markdown(["", *(f"`{exp}`" for exp in LONG.values())], rows))
    both = [kept(n) for name in FP8 for n in (name, _in_fp8(name))]
    columns = [f"`{exp}` {kind}" for exp, _ in FP8.values() for kind in ("BF16", "FP8")]
    print()
    print(markdown(["h100", *columns], [*_layout_rows(both)[2:], *_fp8_rows(both)]))
    steps, layers, recompute = (kept(name) for name in ("step", "layer", "recompute"))
    print()
    print(
        markdown(
            ["a step", "compiled in", "memory", "host", "sent a token"],
            [
                [
                    name,
                    f"{r['compile_seconds']:.0f} s, {r['cpu_seconds']:.0f} CPU s",
                    f"{r['memory'] / 1e9:.1f} GB",
                    f"{r['host'] / 1e9:.1f} GB",
                    f"{r['sent_per_token'] / 1e6:.1f} MB",
                ]
                for name, r in steps.items()
                if isinstance(r, dict)
            ],
        )
    )
    print()
    print(
        markdown(
            ["one MoE layer", "by XLA", "bound", "with attention", "traffic", "sent", "links"],
            [
                [
                    name,
                    f"{r['seconds']:.3f} s",
                    f"{r['bound']:.1%}",
                    f"{r['bound'] * r['seconds'] / (r['seconds'] + r['kernels']):.1%}",
                    f"{r['traffic'] / 1e9:.0f} GB",
                    f"{r['sent'] / 1e9:.1f} GB",
                    f"{r['links']:.3f} s",
                ]
                for name, r in layers.items()
                if isinstance(r, dict)
            ],
        )
    )
    print()
    policies = ("none", "report", "full")
    print(
        markdown(
            ["GiB a device, FLOPs over the model's", *(f"`{p}`" for p in policies)],
            [
                [f"`{name}`", *(_policy(r[p]) for p in policies)]
                for name, r in recompute.items()
                if isinstance(r, dict)
            ],
        )
    )


MESH_AXES_TOLD = " x ".join(MESH_AXES)


def _told(mesh: MeshConfig) -> str:
    return " x ".join(str(getattr(mesh, axis)) for axis in MESH_AXES)


def _policy(r: Mapping[str, Any]) -> str:
    size = f"{r['memory_bytes_per_chip'] / GIB:.1f}"
    if not r["fits"]:
        return f"{size}: {r['over_bytes'] / GIB:.1f} too much"
    return f"{size}, {r['flops_per_chip'] / r['model_flops_per_chip']:.2f}"


def _layout_rows(reports: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    def row(label: str, value: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [label, *(value(r) for r in reports)]

    return [
        row("target", lambda r: f"`{r['target']}`"),
        row("devices", lambda r: f"{r['n_devices']:,}"),
        row(
            "GiB a device",
            lambda r: (
                f"{r['memory_bytes_per_chip'] / GIB:.1f} of {r['memory_limit_bytes'] / GIB:.1f}"
            ),
        ),
        row("GiB of host memory a device", lambda r: f"{r['host_bytes_per_chip'] / GIB:.1f}"),
        row("products at peak, s", lambda r: f"{r['roofline_seconds']['flops']:.1f}"),
        row("memory traffic, s", lambda r: f"{r['roofline_seconds']['memory']:.1f}"),
        row("busiest links, s", lambda r: f"{r['roofline_seconds']['links']:.1f}"),
        row(
            "by XLA, s",
            lambda r: (
                "unknown"
                if r["estimated_step_seconds"] is None
                else f"{r['estimated_step_seconds']:.1f}"
            ),
        ),
        row("MFU at most", lambda r: f"{r['mfu_bound']:.1%}"),
        row("tokens a second and device", lambda r: f"{r['tokens_per_second_per_chip']:,.0f}"),
        row(
            "compiled in",
            lambda r: f"{r['compile_seconds']:.0f} s, {r['peak_rss_bytes'] / GIB:.1f} GiB",
        ),
    ]


def _exchange_rows(reports: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Of the exchanges of tokens in a step of a device: all, started and awaited apart, and with a
    matrix product between."""
    rows = []
    for axis in ("node", "expert"):
        told = []
        for report in reports:
            some = [
                r
                for r in report["collectives"]
                if (r["axis"], r["kind"]) == (axis, "ragged-all-to-all")
            ]
            counts = (sum(r[name] for r in some) for name in ("count", "async", "overlapped"))
            told.append(" / ".join(f"{count:,}" for count in counts))
        rows.append([f"exchanges over {axis}: all / async / beside", *told])
    return rows


def _fp8_rows(reports: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Calls of FP8 kernels in a step of a device."""
    rows = []
    for label, marks in (("products", ("_nt",)), ("quantisations", ("quantize",))):
        told = []
        for report in reports:
            mine = [k for k in report["kernels"] if k["name"].startswith("fp8_")]
            told.append(sum(k["count"] for k in mine if any(m in k["name"] for m in marks)))
        rows.append([f"FP8 {label} by kernels", *(f"{n:,}" for n in told)])
    return rows


def main(argv: list[str]) -> None:
    del argv
    parts = {
        "layouts": print_layouts,
        "piped": print_piped,
        "fp8": print_fp8,
        "long": print_long,
        "recompute": print_recompute,
        "step": print_step,
        "layer": print_layer,
        "readme": print_readme,
    }
    for part in _PARTS.value:
        parts[part]()


if __name__ == "__main__":
    app.run(main)
