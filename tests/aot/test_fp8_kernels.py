"""The FP8 kernels compiled for devices that are not here, each in a process of its own."""

import importlib.util
import sys

import pytest

from v3jax.aot import process
from v3jax.aot.sass import kernels

pytestmark = pytest.mark.aot


def needs(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install 'v3jax[{extra}]'")


def compiled(name: str) -> dict:
    needs("jax_cuda13_plugin", "gpu-aot")
    command = ["-m", "v3jax.aot.sass", name]
    return process.run(command, "gpu:h100", python=sys.executable, timeout=300)


@pytest.mark.parametrize("name", [n for n in kernels() if n.endswith("_nt")])
def test_products_use_the_tensor_cores_in_fp8(name: str) -> None:
    """wgmma on E4M3 with operands brought by TMA, and nothing kept in local memory."""
    found = compiled(name)
    operations = found["operations"]
    assert operations["QGMMA"] >= 4
    assert all("E4M3.E4M3" in op for op in found["matrix_operations"])
    assert operations["UTMALDG"] > 0
    assert found["setmaxnreg"] >= 2
    assert found["registers"] <= 168
    assert found["spilled_bytes"] == 0
    assert not {"STL", "LDL"} & operations.keys()


@pytest.mark.parametrize("name", [n for n in kernels() if not n.endswith("_nt")])
def test_quantisation_spills_nothing(name: str) -> None:
    found = compiled(name)
    assert found["operations"]["F2FP"] > 0
    assert found["operations"]["UTMALDG"] > 0
    assert found["spilled_bytes"] == 0


@pytest.mark.parametrize("chip", ["v6e:2x2", "tpu7x:2x2x1", "v5p:2x2x1"])
def test_products_compile_for_tpu(chip: str) -> None:
    needs("libtpu", "tpu")
    script = (
        "import sys, jax, jax.numpy as jnp, numpy as np\n"
        "from jax.sharding import Mesh, NamedSharding, PartitionSpec as P\n"
        "from v3jax.aot import process, targets\n"
        "from v3jax.aot.devices import devices_of\n"
        "from v3jax.kernels import fp8_tpu\n"
        "mesh = Mesh(np.array(devices_of(targets.parse('tpu:' + sys.argv[1]))[:1]), ('d',))\n"
        "here, f8, f32 = NamedSharding(mesh, P()), jnp.float8_e4m3fn, jnp.float32\n"
        "shapes = [((512, 1024), f8), ((512, 8), f32), ((3, 768, 1024), f8), ((3, 6, 8), f32)]\n"
        "shapes.append(((4,), jnp.int32))\n"
        "arguments = [jax.ShapeDtypeStruct(s, d, sharding=here) for s, d in shapes]\n"
        "product = jax.jit(lambda *a: fp8_tpu.m_grouped_nt(*a, dtype=jnp.bfloat16))\n"
        "with jax.set_mesh(mesh):\n"
        "    lowered = product.trace(*arguments).lower(lowering_platforms=('tpu',))\n"
        "process.answer({'kernels': lowered.compile().as_text().count('tpu_custom_call')})\n"
    )
    found = process.run(["-c", script, chip], f"tpu:{chip}", python=sys.executable, timeout=300)
    assert found["kernels"] == 1
