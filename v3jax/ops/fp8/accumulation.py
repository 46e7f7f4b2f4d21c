"""A model of how Hopper's tensor cores add up FP8 products, in NumPy (report section 3.5.2).

32 products at a time are aligned to the largest among them and the sum so far, what lies below 14
bits is cut off, and the sum keeps as many. Nothing trains with it: it shows what sums in FP32 every
128 elements are for. It is a model, not a measurement of a device.
Dims: M and N rows of the operands, K contraction.
"""

import numpy as np

BITS = 14
_INSTRUCTION = 32
"""Products that one instruction adds up."""


def gemm_nt(
    a_MK: np.ndarray, b_NK: np.ndarray, *, promotion: int | None, bits: int = BITS
) -> np.ndarray:
    """`[M, K] x [N, K] -> [M, N]` of E4M3 numbers, summed in `bits` bits, FP64.

    After every `promotion` elements, in whole 32s, sums are added to one in FP32; None: never.
    """
    total = np.zeros((len(a_MK), len(b_NK)), np.float32)
    sums = np.zeros(total.shape)
    for k in range(0, a_MK.shape[1], _INSTRUCTION):
        part = slice(k, k + _INSTRUCTION)
        products = a_MK[:, None, part].astype(np.float64) * b_NK[None, :, part]
        addends = np.concatenate([sums[..., None], products], axis=-1)
        largest = np.abs(addends).max(axis=-1, keepdims=True)
        sums = _cut(_cut(addends, largest, bits).sum(axis=-1), None, bits)
        if promotion is not None and (k + _INSTRUCTION) % promotion == 0:
            total = total + sums.astype(np.float32)
            sums = np.zeros_like(sums)
    return total.astype(np.float64) + sums


def _cut(x: np.ndarray, largest: np.ndarray | None, bits: int) -> np.ndarray:
    """Towards zero to so many bits below the exponent of `largest`, or of each number itself."""
    exponent = np.frexp(x if largest is None else largest)[1]
    unit = np.exp2((exponent - bits).astype(np.float64))
    return np.trunc(x / unit) * unit
