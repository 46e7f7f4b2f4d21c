"""The TPU kernel, interpreted with race detection, against FP64."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.fp8.test_gemm import close, operand
from v3jax.kernels import fp8_tpu

INTERPRET = pltpu.InterpretParams(detect_races=True)


@pytest.mark.parametrize("native", [False, True])
def test_gemm_nt(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In BF16 and, as a TPU 7x does, of the codes themselves."""
    monkeypatch.setattr(fp8_tpu, "device_kind", lambda: "TPU7x" if native else "TPU v5")
    a, exact_a = operand((256, 640), (128,), 0)
    b, exact_b = operand((384, 640), (128, 128), 1)
    got = fp8_tpu.gemm_nt(a.codes, a.scales, b.codes, b.scales, jnp.float32, interpret=INTERPRET)
    close(got, exact_a @ exact_b.T)


@pytest.mark.parametrize("experts", [[0, 2, 2, -1], [1, 1, 1, 1], [-1, -1, -1, -1]], ids=str)
def test_m_grouped_nt(experts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_tpu, "_TILE_BYTES", 128 * 512)  # two tiles of the result
    a, exact_a = operand((512, 512), (128,), 0)
    b, exact_b = operand((3, 256, 512), (128, 128), 1)
    got: Any = fp8_tpu.m_grouped_nt(
        *(a.codes, a.scales, b.codes, b.scales, jnp.array(experts, jnp.int32), jnp.float32),
        interpret=INTERPRET,
    )
    used = sum(e >= 0 for e in experts)
    if used:
        wanted = np.einsum("mrk,mnk->mrn", exact_a.reshape(4, 128, 512), exact_b[experts])
        close(got[: used * 128], wanted[:used].reshape(-1, 256))
