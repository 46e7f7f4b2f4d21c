"""Kernels for Hopper, interpreted on a CPU with race detection, against FP64 and `ops.fp8`."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.fp8.test_gemm import close, operand
from tests.fp8.test_quantize import bits, sample
from v3jax.kernels import fp8_gpu, fp8_quantize_gpu
from v3jax.kernels.fp8_gpu import Run
from v3jax.ops.fp8.quantize import Quantized, quantize
from v3jax.ops.norm import swiglu

RUN = Run(n_programs=2, interpret=plgpu.InterpretGPUParams(detect_races=True))


@pytest.fixture(autouse=True)
def _fresh_interpreter() -> Iterator[None]:
    gpu_callbacks.reset_gpu_interpret_mode_state()
    yield
    gpu_callbacks.reset_gpu_interpret_mode_state()


def no_races() -> bool:
    return not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gemm_nt(dtype: Any) -> None:
    a, exact_a = operand((256, 512), (128,), 0)
    b, exact_b = operand((384, 512), (128, 128), 1)
    got = fp8_gpu.gemm_nt(a.codes, a.scales, b.codes, b.scales, dtype, RUN)
    assert got.dtype == dtype
    close(got, exact_a @ exact_b.T, 1e-6 if dtype == jnp.float32 else 4e-3)
    assert no_races()


def test_m_grouped_nt() -> None:
    """An expert without rows, and a block of nobody at the end."""
    experts = [0, 2, 2, -1]
    a, exact_a = operand((512, 512), (128,), 0)
    b, exact_b = operand((3, 256, 512), (128, 128), 1)
    expert_M = jnp.array(experts, jnp.int32)
    got = fp8_gpu.m_grouped_nt(a.codes, a.scales, b.codes, b.scales, expert_M, jnp.float32, RUN)
    wanted = np.einsum("mrk,mnk->mrn", exact_a.reshape(4, 128, 512), exact_b[experts])
    close(got[:384], wanted.reshape(512, 256)[:384])
    assert no_races()


def test_k_grouped_nt() -> None:
    """An expert without tokens has a gradient of zeros; the last tokens are of nobody."""
    first = [0, 1, 1, 5]
    a, exact_a = operand((128, 768), (128,), 0)
    b, exact_b = operand((256, 768), (128,), 1)
    got = fp8_gpu.k_grouped_nt(
        a.codes, a.scales, b.codes, b.scales, jnp.array(first, jnp.int32), RUN
    )
    wanted = np.stack(
        [
            exact_a[:, 128 * i : 128 * j] @ exact_b[:, 128 * i : 128 * j].T
            for i, j in itertools.pairwise(first)
        ]
    )
    assert not np.any(got[1])
    close(got, wanted)
    assert no_races()


def test_the_race_detector_sees_a_missing_fence() -> None:
    """Without the fence after reads of scales the loader's next write is not ordered after them."""
    a, b = operand((256, 1024), (128,), 0)[0], operand((128, 1024), (128, 128), 1)[0]
    unfenced = Run(n_programs=2, interpret=RUN.interpret, fence=False)

    def product() -> None:
        y = fp8_gpu.gemm_nt(a.codes, a.scales, b.codes, b.scales, jnp.float32, unfenced)
        jax.block_until_ready(y)

    with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
        product()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("floor", [1e-4, 1e-30])
def test_quantisation(power_of_two: bool, floor: float) -> None:
    """To the bit; a tile of zeros and one of tiny numbers too."""
    x = jnp.asarray(sample((256, 256)), jnp.bfloat16).at[128:, 128:].multiply(1e-20)
    options = {"power_of_two": power_of_two, "floor": floor}
    rows = fp8_quantize_gpu.rows(x, **options, run=RUN)
    same(rows, quantize(x, (128,), **options))
    columns = fp8_quantize_gpu.columns(x, **options, run=RUN)
    same(columns, jax.tree.map(lambda a: a.T, quantize(x, (128, 1), **options)))
    assert no_races()


@pytest.mark.parametrize("gated", [False, True])
def test_quantised_swiglu(gated: bool) -> None:
    gate_up = jnp.asarray(np.random.default_rng(0).standard_normal((128, 512)), jnp.bfloat16)
    gates = jnp.asarray(np.random.default_rng(1).uniform(size=128), jnp.float32) if gated else None
    options = {"power_of_two": True, "floor": 1e-4}
    got = fp8_quantize_gpu.swiglu_rows(gate_up, gates, **options, run=RUN)
    hidden = swiglu(gate_up)
    if gates is not None:
        hidden = (hidden.astype(jnp.float32) * gates[:, None]).astype(jnp.bfloat16)
    same(got, quantize(hidden, (128,), **options))
    assert no_races()


def same(got: tuple[jax.Array, jax.Array], wanted: Quantized) -> None:
    np.testing.assert_array_equal(got[1], wanted.scales)
    np.testing.assert_array_equal(bits(got[0]), bits(wanted.codes))
