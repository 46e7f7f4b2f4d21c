"""What the FP8 kernels become on Hopper: compiled without a GPU, and read in its machine code.

    python -m v3jax.aot.sass KERNEL    # gemm_nt, m_grouped_nt, k_grouped_nt, rows, columns, ...

Prints one JSON object. It needs the extra `gpu-aot`: XLA and Mosaic compile to PTX, NVIDIA's ptxas
and nvdisasm, whose own view of registers and spills counts, do the rest.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v3jax.aot import process, targets
from v3jax.aot.devices import devices_of
from v3jax.kernels import fp8_gpu, fp8_quantize_gpu

_OPERATIONS = ("QGMMA", "HGMMA", "UTMALDG", "UTMASTG", "STL", "LDL", "USETMAXREG", "F2FP", "LDSM")
_M, _N, _K, _E = 4096, 4096, 7168, 8

Shapes = list[tuple[tuple[int, ...], Any]]


def kernels() -> dict[str, tuple[Callable[..., Any], Shapes]]:
    """Every kernel by name, at sizes of DeepSeek-V3, as a function and its arguments."""
    f8, f32, bf16, i32 = jnp.float8_e4m3fn, jnp.float32, jnp.bfloat16, jnp.int32
    rounded: dict[str, Any] = {"power_of_two": True, "floor": 1e-4}
    a: Shapes = [((_M, _K), f8), ((_M, _K // 128), f32)]
    b: Shapes = [((_N, _K), f8), ((_N // 128, _K // 128), f32)]
    experts: Shapes = [((_E, *shape), dtype) for shape, dtype in b]
    by_rows: Shapes = [((_N, _K), f8), ((_N, _K // 128), f32)]
    return {
        "gemm_nt": (lambda *x: fp8_gpu.gemm_nt(*x, dtype=bf16), [*a, *b]),
        "m_grouped_nt": (
            lambda *x: fp8_gpu.m_grouped_nt(*x, dtype=bf16),
            [*a, *experts, ((_M // 128,), i32)],
        ),
        "k_grouped_nt": (fp8_gpu.k_grouped_nt, [*a, *by_rows, ((_E + 1,), i32)]),
        "rows": (lambda x: fp8_quantize_gpu.rows(x, **rounded), [((_M, _K), bf16)]),
        "columns": (lambda x: fp8_quantize_gpu.columns(x, **rounded), [((_M, _K), bf16)]),
        "swiglu_rows": (
            lambda x: fp8_quantize_gpu.swiglu_rows(x, None, **rounded),
            [((_M, 4096), bf16)],
        ),
        "gated_swiglu_rows": (
            lambda x, gates: fp8_quantize_gpu.swiglu_rows(x, gates, **rounded),
            [((_M, 4096), bf16), ((_M,), f32)],
        ),
    }


def read(name: str) -> dict[str, Any]:
    """Registers, spilled bytes and operations of a kernel on H100.

    Raises:
      ValueError: no such kernel.
      RuntimeError: a compiler or disassembler is not installed, or refuses it.
    """
    known = kernels()
    if name not in known:
        raise ValueError(f"no kernel {name!r}; there are {', '.join(known)}")
    function, shapes = known[name]
    with tempfile.TemporaryDirectory() as folder:
        _compile(function, shapes, Path(folder))
        found = sorted(Path(folder).glob("*.ptx"))
        if len(found) != 1:
            raise RuntimeError(f"{name}: Mosaic left {len(found)} PTX files, not one")
        ptx, cubin = found[0], Path(folder) / "kernel.cubin"
        said = _tool("ptxas", "-arch=sm_90a", "-O3", "-v", str(ptx), "-o", str(cubin))
        sass = _tool("nvdisasm", "-c", str(cubin))
        text = ptx.read_text(errors="replace")
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.findall(r"(\d+) bytes spill", said)
    counts = {op: len(re.findall(rf"\b{op}\b", sass)) for op in _OPERATIONS}
    return {
        "kernel": name,
        "registers": int(registers[1]) if registers else 0,
        "spilled_bytes": sum(map(int, spilled)),
        "setmaxnreg": text.count("setmaxnreg"),
        "operations": {op: n for op, n in counts.items() if n},
        "matrix_operations": sorted(set(re.findall(r"\b[QH]GMMA\.\S+", sass))),
    }


def _compile(function: Callable[..., Any], shapes: Shapes, folder: Path) -> None:
    os.environ |= {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTX": "1"}
    mesh = Mesh(np.array(devices_of(targets.parse("gpu:h100:1x1"))[:1]), ("device",))
    here = NamedSharding(mesh, P())
    arguments = [jax.ShapeDtypeStruct(s, d, sharding=here) for s, d in shapes]
    with jax.set_mesh(mesh):
        traced = jax.jit(function, out_shardings=here).trace(*arguments)
        traced.lower(lowering_platforms=("cuda",)).compile()


def _tool(name: str, *arguments: str) -> str:
    """What one of NVIDIA's tools says, on both streams."""
    path = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / name
    if not path.exists():
        raise RuntimeError(f"{sys.executable} has no {name}: pip install 'v3jax[gpu-aot]'")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1][:300]}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    try:
        print(json.dumps(read(sys.argv[1] if len(sys.argv) > 1 else "")), flush=True)
    except Exception as error:
        process.answer_error(error)
