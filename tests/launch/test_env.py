"""The settings of launch/env.sh: the parsers know every name, and the user's own values win."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.launch.shell import LAUNCH, environment, run

_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NCCL_MAX_CTAS", "XLA_CLIENT_MEM_FRACTION")

# Asks libtpu: it compiles, without a TPU, an exchange between the chips of a slice.
_COMPILE = """
import jax, sys
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
chips = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = Mesh(np.array(chips), ("chip",))
def exchange(x, w):
    x = jax.lax.all_to_all(x, "chip", 0, 0, tiled=True)
    y = x @ jax.lax.all_gather(w, "chip", tiled=True)
    return jax.lax.psum_scatter(y, "chip", tiled=True)
n = len(chips)
split = NamedSharding(mesh, P("chip"))
x = jax.ShapeDtypeStruct((n * n * 256, 1024), jnp.bfloat16, sharding=split)
w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=split)
spec = P("chip")
step = jax.shard_map(exchange, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
print("sparsecore" in jax.jit(step).lower(x, w).compile().as_text().lower())
"""


def _settings(platform: str, **own: str) -> dict[str, str]:
    """What `source launch/env.sh` leaves in the environment."""
    env = {k: v for k, v in environment().items() if k not in _VARIABLES}
    code = 'source "$0" "$1"; env'
    done = run("bash", "-euc", code, LAUNCH / "env.sh", platform, env=env | own)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def _jax(flags: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return run(sys.executable, "-c", "import jax; jax.devices()", env=env)


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_xla_knows_every_flag(platform: str) -> None:
    flags = _settings(platform)["XLA_FLAGS"]
    done = _jax(flags)
    assert done.returncode == 0, done.stderr


def test_xla_would_have_refused_an_unknown_flag() -> None:
    done = _jax("--xla_gpu_enable_latency_hiding_schedulers=true")
    assert done.returncode != 0
    assert "Unknown flag" in done.stderr


def _libtpu(topology: str, flags: str) -> subprocess.CompletedProcess[str]:
    own = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    own |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "LIBTPU_INIT_ARGS": flags, "XLA_FLAGS": ""}
    return run(sys.executable, "-c", _COMPILE, topology, seconds=300, env=os.environ | own)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_libtpu_compiles_the_exchange_for_the_sparse_core(topology: str) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("pip install libtpu==0.0.50.1")
    done = _libtpu(topology, _settings("tpu")["LIBTPU_INIT_ARGS"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
    assert _libtpu(topology, "--xla_tpu_no_such_flag=true").returncode != 0


def test_a_value_of_the_user_wins_flag_by_flag() -> None:
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false"
    found = _settings("gpu", NCCL_MAX_CTAS="8", XLA_FLAGS=mine)
    assert found["NCCL_MAX_CTAS"] == "8"
    flags = found["XLA_FLAGS"].split()
    assert flags[0] == mine
    assert len([f for f in flags if "latency_hiding_scheduler" in f]) == 1
    assert "--xla_gpu_nccl_terminate_on_error=true" in flags


def test_a_flag_whose_name_begins_another_is_not_taken_for_it() -> None:
    longer = "--xla_gpu_nccl_terminate_on_error_never=1"
    assert (
        "--xla_gpu_nccl_terminate_on_error=true" in _settings("gpu", XLA_FLAGS=longer)["XLA_FLAGS"]
    )


def test_the_old_name_of_the_memory_fraction_is_respected() -> None:
    found = _settings("gpu", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    assert "XLA_CLIENT_MEM_FRACTION" not in found  # jax refuses both


def test_the_report_s_share_of_the_sms() -> None:
    found = _settings("gpu")
    assert int(found["NCCL_MAX_CTAS"]) == 20  # report section 3.2.2
    channels = int(found["NCCL_MAX_P2P_NCHANNELS"])
    assert channels <= 20
    assert channels & (channels - 1) == 0, "NCCL would round it up"


def test_every_setting_is_printed_with_its_reason() -> None:
    for platform in ("gpu", "tpu", "cpu"):
        lines = run("bash", LAUNCH / "env.sh", platform).stderr.splitlines()
        assert lines
        assert all(line.startswith("env: ") and "  # " in line for line in lines)
