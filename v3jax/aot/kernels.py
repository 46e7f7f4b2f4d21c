"""Work of kernels that a compiler sees from outside only: custom calls of Pallas, cuDNN, cuBLAS."""

import re
from dataclasses import dataclass

from v3jax.aot.hlo import Array, Computation, Instruction, arrays

_WHOLE = "/whole_block/"
"""In the name of an attention that is not causal: see `ops.blocks`."""
_KERNELS = re.compile(r"tpu_custom_call|mosaic_gpu.*|__cudnn\$.*|__cublas\$.*|__gpu\$.*")


@dataclass(frozen=True)
class Kernel:
    """One call of a kernel."""

    name: str
    flops: float
    bytes: float
    declared: bool
    """Whether the kernel tells the compiler its cost."""


def target_of(instruction: Instruction) -> str:
    """A custom call's target."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def operand_arrays(computation: Computation, instruction: Instruction) -> list[Array]:
    """The arrays an instruction reads, in order."""
    sources = (computation.find(name) for name in instruction.operands)
    return [array for source in sources if source is not None for array in arrays(source.shape)]


def read_kernel(computation: Computation, instruction: Instruction) -> Kernel | None:
    """The work of a custom call, or None if it computes nothing.

    FLOPs are the kernel's own estimate where it gives one, else follow from its name and shapes,
    and are 0 for a name not known here. Without an estimate every operand and result is taken to
    move once.
    """
    target = target_of(instruction)
    if not _KERNELS.fullmatch(target):
        return None
    name = _name(instruction, target)
    cost = re.search(
        r'"cost_estimate":\{"flops":"?(-?\d+)"?.*?"bytes_accessed":"?(-?\d+)',
        instruction.attributes,
    )
    if cost:
        return Kernel(name, max(int(cost[1]), 0), max(int(cost[2]), 0), True)
    inputs, outputs = operand_arrays(computation, instruction), arrays(instruction.shape)
    moved = sum(array.bytes for array in (*inputs, *outputs) if array.in_main_memory)
    if name.startswith("splash_m"):
        flops = _splash(name, instruction.attributes, inputs)
    elif target.startswith("mosaic_gpu"):
        flops = _fp8(name, instruction.attributes, inputs, outputs)
    elif "fmhaSoftmax" in target:
        flops = _cudnn_attention(target, inputs) * (2 if _WHOLE in instruction.attributes else 1)
    elif target.startswith("__cublas$"):
        # XLA knows what its own library calls compute.
        return Kernel(name, _gemm(instruction.attributes, inputs, outputs), moved, True)
    else:
        flops = 0.0
    return Kernel(name, flops, moved, False)


def _name(instruction: Instruction, target: str) -> str:
    """The name its author gave it."""
    called = re.search(r'([^"/()]+)\)*/(pallas_call|mpmd_map)"', instruction.attributes)
    if called:
        return called[1]
    if target.startswith(("__cudnn", "__cublas")):
        return target
    return re.sub(r"(\.\d+)*$", "", instruction.name)


def causal_pairs(length_q: int, length_kv: int, block_q: int, block_kv: int) -> int:
    """Pairs of a block of queries and one of keys in which some query sees some key."""
    n_kv = -(-length_kv // block_kv)
    return sum(
        min(n_kv, -(-min(start + block_q, length_q) // block_kv))
        for start in range(0, length_q, block_q)
    )


def _splash(name: str, attributes: str, inputs: list[Array]) -> float:
    """JAX's splash attention, causal: every block pair on or below the diagonal, in full; of a
    whole block (`ops.blocks`) every pair.

    `widths` adds up the matrix products of a pair: forward `q k^T` and `p v`; dq `q k^T`,
    `do v^T` and `ds k`; dkv `q k^T`, `do v^T`, `ds^T q` and `p^T do`.
    """
    wide = [a for a in inputs if len(a.dims) >= 3 and a.dtype in ("bf16", "f16", "f32")]
    if len(wide) < 3:
        return 0.0
    q, k, v = wide[:3]
    (length, key), length_kv, value = q.dims[-2:], k.dims[-2], v.dims[-1]
    if "_fwd" in name:
        suffix, widths = "", key + value
    elif "_dq" in name:
        suffix, widths = "_dq", 2 * key + value
    else:
        fused = re.search(r'use_fused_bwd_kernel\\*": true', attributes) is not None
        suffix, widths = "_dkv", (3 if fused else 2) * key + 2 * value
    blocks = [re.search(rf'"block_{x}{suffix}\\*": (\d+)', attributes) for x in ("q", "kv")]
    block_q, block_kv = (int(b[1]) if b else 128 for b in blocks)
    pairs = causal_pairs(length, length_kv, block_q, block_kv)
    if _WHOLE in attributes:
        pairs = -(-length // block_q) * -(-length_kv // block_kv)
    heads = q.size // (length * key)
    return 2.0 * heads * pairs * block_q * block_kv * widths


def _fp8(name: str, attributes: str, inputs: list[Array], outputs: list[Array]) -> float:
    """The products of `kernels.fp8_gpu`, of the rows that a balanced batch fills if a name says so
    (`ops.fp8.gemm`); quantisation has none."""
    if not name.endswith("_nt"):
        return 0.0
    rows, contracted = inputs[0].dims
    if name.endswith("k_grouped_nt"):
        m, n = outputs[0].dims[-2:]
        told = re.findall(r"fp8_k_grouped_nt_of_(\d+)", attributes)
        return 2.0 * m * n * (int(told[-1]) if told else contracted)
    told = re.findall(r"fp8_m_grouped_nt_of_(\d+)", attributes)
    return 2.0 * (int(told[-1]) if told else rows) * outputs[0].dims[-1] * contracted


def _cudnn_attention(target: str, inputs: list[Array]) -> float:
    """cuDNN's fused attention, causal: half of each product; backward has five of them.

    Operands are `[batch, time, heads, width]` in memory, whichever way they are written.
    """
    q, k, v = inputs[:3]
    key, value = q.dims[-1], v.dims[-1]
    length_kv = k.dims[1]
    widths = 3 * key + 2 * value if "Backward" in target else key + value
    return q.size / key * length_kv * widths


def _gemm(attributes: str, inputs: list[Array], outputs: list[Array]) -> float:
    """A cuBLAS product, by the dimensions its configuration contracts."""
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', attributes)
    contracted = 1
    for dim in re.findall(r"\d+", found[1]) if found else []:
        contracted *= inputs[0].dims[int(dim)]
    return 2.0 * outputs[0].size * contracted
