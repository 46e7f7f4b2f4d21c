"""Work read from compiled programs: against XLA's own counts, and of kernels by their shapes."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests import mini
from v3jax import config, objective
from v3jax.aot import targets
from v3jax.aot.costs import Costs, read_costs
from v3jax.aot.hlo import Loops, parse
from v3jax.aot.kernels import causal_pairs
from v3jax.model import transformer
from v3jax.ops.blocks import _scope
from v3jax.state import init_state

MAIN = """
HloModule jit_main, is_scheduled=true

%update (big: f32[64,128], new: f32[1,128], i: s32[]) -> f32[64,128] {
  %big = f32[64,128]{1,0} parameter(0)
  %new = f32[1,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %put = f32[64,128]{1,0} dynamic-update-slice(%big, %new, %i, %i)
}

%window (big: f32[64,128], i: s32[]) -> f32[2,128] {
  %big = f32[64,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %part = f32[2,128]{1,0} dynamic-slice(%big, %i, %i), dynamic_slice_sizes={2,128}
  ROOT %twice = f32[2,128]{1,0} add(%part, %part)
}

ENTRY %main (big: f32[64,128], new: f32[1,128], i: s32[]) -> f32[2,128] {
  %big = f32[64,128]{1,0:T(8,128)} parameter(0)
  %new = f32[1,128]{1,0:T(8,128)S(1)} parameter(1)
  %i = s32[] parameter(2)
  %put = f32[64,128]{1,0:T(8,128)} fusion(%big, %new, %i), kind=kLoop, calls=%update
  ROOT %out = f32[2,128]{1,0:T(8,128)} fusion(%put, %i), kind=kLoop, calls=%window
}
"""

STARTED = MAIN.replace(
    "%put = f32[64,128]{1,0:T(8,128)} fusion(",
    "%start = ((f32[64,128], f32[1,128], s32[]), f32[64,128]{1,0:T(8,128)}, u32[]) fusion-start(",
).replace("\n  ROOT %out", "\n  %put = f32[64,128]{1,0:T(8,128)} fusion-done(%start)\n  ROOT %out")
"""As a GPU runs it beside something else."""

# Of shapes as TPU programs have them, attributes shortened.
KERNELS = """
HloModule jit_kernels, is_scheduled=true

ENTRY %main (q: bf16[2,1024,192], k: bf16[2,1024,192], v: bf16[2,1024,128], m: s8[1,2,2]) -> f32[] {
  %q = bf16[2,1024,192]{2,1,0} parameter(0)
  %k = bf16[2,1024,192]{2,1,0} parameter(1)
  %v = bf16[2,1024,128]{2,1,0} parameter(2)
  %m = s8[1,2,2]{2,1,0} parameter(3)
  %g = bf16[1,256,4,48]{3,2,1,0} parameter(4)
  %h = bf16[1,256,4,32]{3,2,1,0} parameter(5)
  %fwd = bf16[2,1024,128]{2,1,0} custom-call(%m, %q, %k, %v), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512, \\"block_q_dq\\": 256, \\"block_kv_dq\\": 256}"
}}, metadata={op_name="jit(f)/splash_mha_fwd_residuals/pallas_call" id=1}
  %dq = bf16[2,1024,192]{2,1,0} custom-call(%m, %q, %k, %v), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512, \\"block_q_dq\\": 256, \\"block_kv_dq\\": 256}"
}}, metadata={op_name="jit(f)/splash_mha_dq_no_residuals/pallas_call" id=2}
  %mm = bf16[4,4]{1,0} custom-call(%q), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp(grouped_matmul))/pallas_call"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"0","bytes_accessed":"10"}}}
  %fmha = (bf16[1,4,256,32]{3,1,2,0}, u8[0]{0}) custom-call(%g, %g, %h), custom_call_target="__cudnn$fmhaSoftmax"
  %a = f8e4m3fn[512,256]{1,0} parameter(6)
  %sa = f32[2,512]{1,0} parameter(7)
  %b = f8e4m3fn[4,384,256]{2,1,0} parameter(8)
  %gemm = bf16[512,384]{1,0} custom-call(%a, %sa, %b), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/fp8_gemm_nt/jit(gemm_nt)/fp8_gemm_nt/mpmd_map"}
  %groups = bf16[512,384]{1,0} custom-call(%a, %sa, %b), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/transpose(jvp(fp8_m_grouped_nt_of_300))/jit(m_grouped_nt)/fp8_m_grouped_nt/mpmd_map"}
  %weights = f32[4,512,384]{2,1,0} custom-call(%a, %sa, %a), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/fp8_k_grouped_nt_of_200/jit(k_grouped_nt)/fp8_k_grouped_nt/mpmd_map"}
  %codes = (f8e4m3fn[512,256]{1,0}, f32[2,512]{1,0}) custom-call(%q), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/jit(rows)/fp8_quantize/mpmd_map"}
  ROOT %free = f32[] custom-call(), custom_call_target="AllocateBuffer"
}
"""  # noqa: E501

CONVOLUTIONS = """
HloModule jit_convolutions, is_scheduled=true

ENTRY %main (a: bf16[8,16], b: bf16[16,32], c: f32[4,8,16], d: f32[4,32,16]) -> f32[] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  %c = f32[4,8,16]{2,1,0} parameter(2)
  %d = f32[4,32,16]{2,1,0} parameter(3)
  %plain = bf16[8,32]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  ROOT %batched = f32[4,8,32]{2,1,0} convolution(%c, %d), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
}
"""  # noqa: E501

BLOCKS = """
HloModule jit_blocks, is_scheduled=true

%one (s: (s32[], bf16[71,32,8], s32[], bf16[71,32,4])) -> (s32[], bf16[71,32,8], s32[], bf16[71,32,4]) {
  %s = (s32[], bf16[71,32,8]{2,1,0}, s32[], bf16[71,32,4]{2,1,0}) parameter(0)
  %m = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%m, %one)
  ROOT %t = (s32[], bf16[71,32,8]{2,1,0}, s32[], bf16[71,32,4]{2,1,0}) tuple(%next, %s, %m, %s)
}

%more (s: (s32[], bf16[71,32,8], s32[], bf16[71,32,4])) -> pred[] {
  %s = (s32[], bf16[71,32,8]{2,1,0}, s32[], bf16[71,32,4]{2,1,0}) parameter(0)
  %m = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=2
  ROOT %lt = pred[] compare(%m, %n), direction=LT
}

ENTRY %main (s: (s32[], bf16[71,32,8], s32[], bf16[71,32,4])) -> (s32[], bf16[71,32,8], s32[], bf16[71,32,4]) {
  %s = (s32[], bf16[71,32,8]{2,1,0}, s32[], bf16[71,32,4]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[71,32,8]{2,1,0}, s32[], bf16[71,32,4]{2,1,0}) while(%s), condition=%more, body=%one, metadata={op_name="jit(f)/shard_map/mlp/transpose(jvp(grouped_matmul))/while/body/while" id=3}
}
"""  # noqa: E501


def compiled_loss(monkeypatch: pytest.MonkeyPatch, unrolled: int) -> Any:
    """Loss and gradient of a small model, its layers in loops or not."""
    monkeypatch.setattr(transformer, "_UNROLLED", unrolled)
    changes = ["model.n_layers=3", "model.mtp_depth=0", "model.dim=128"]
    cfg = config.override(mini.config(), changes)
    state = jax.eval_shape(lambda: init_state(cfg))
    one = jnp.float32(1.0)
    scale = objective.Scale(n_targets=one, n_sequences=one, mtp_weight=one)
    rows = jax.ShapeDtypeStruct((2, cfg.data.seq_len + 1), jnp.int32)

    def loss(params: Any, router_state: Any, tokens: jax.Array, segments: jax.Array) -> Any:
        return objective.loss(cfg, params, router_state, tokens, segments, scale)

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    return gradient.lower(state.params, state.router_state, rows, rows).compile()


def test_layers_in_a_loop_count_as_they_do_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    unrolled, looped = (compiled_loss(monkeypatch, n) for n in (8, 0))
    by_xla = unrolled.cost_analysis()["flops"]
    flat, loops = (read_costs(parse(c.as_text())) for c in (unrolled, looped))
    assert flat.flops == pytest.approx(by_xla, rel=1e-3)
    assert loops.flops == pytest.approx(by_xla, rel=0.02)
    assert loops.matrix_flops == pytest.approx(flat.matrix_flops, rel=0.02)
    assert flat.memory_bytes < loops.memory_bytes < 1.5 * flat.memory_bytes


@pytest.mark.parametrize("text", [MAIN, STARTED])
def test_slices_and_updates_in_place_count_what_they_touch(text: str) -> None:
    row = 128 * 4
    # The update reads nothing of `big`, its new row lies in fast memory; indices are 4 bytes each.
    assert read_costs(parse(text)).memory_bytes == (row + 4) + (2 * row + 4 + 2 * row)
    assert read_costs(parse(text)).flops == 2 * 128


def test_convolutions_count_only_where_the_window_meets_the_input() -> None:
    assert read_costs(parse(CONVOLUTIONS)).flops == 2 * 8 * 16 * 32 + 4 * 2 * 8 * 16 * 32


def costs_of_kernels() -> Costs:
    return read_costs(parse(KERNELS))


def test_kernels_count_by_their_estimate_or_by_their_shapes() -> None:
    kernels = costs_of_kernels().kernels
    assert {name: k.flops for name, k in kernels.items()} == {
        "splash_mha_fwd_residuals": 2 * 2 * 3 * 512 * 512 * (192 + 128),
        "splash_mha_dq_no_residuals": 2 * 2 * 10 * 256 * 256 * (192 + 128 + 192),
        "grouped_matmul": 1000,
        "__cudnn$fmhaSoftmax": 4 * 256 * 256 * (48 + 32),
        "fp8_gemm_nt": 2 * 512 * 384 * 256,
        "fp8_m_grouped_nt": 2 * 300 * 384 * 256,  # rows of a balanced batch, by its scope's name
        "fp8_k_grouped_nt": 2 * 512 * 384 * 200,
        "fp8_quantize": 0,
    }
    assert [name for name, k in kernels.items() if k.declared] == ["grouped_matmul"]


def test_attention_to_a_whole_block_counts_every_key() -> None:
    """As its scope in `ops.blocks` says."""
    whole = KERNELS.replace("jit(f)/splash", "jit(f)/whole_block/splash").replace(
        'custom_call_target="__cudnn$fmhaSoftmax"',
        'custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/whole_block/fmha"}',
    )
    kernels = read_costs(parse(whole)).kernels
    assert kernels["splash_mha_fwd_residuals"].flops == 2 * 2 * 1024 * 1024 * (192 + 128)
    assert kernels["splash_mha_dq_no_residuals"].flops == 2 * 2 * 1024 * 1024 * (192 + 128 + 192)
    assert kernels["__cudnn$fmhaSoftmax"].flops == 2 * 4 * 256 * 256 * (48 + 32)
    assert _scope(causal=False) in ["jit(f)", "whole_block", "fmha"]


def test_what_xla_leaves_out_is_time_at_the_peak() -> None:
    costs, chip = costs_of_kernels(), targets.parse("tpu:v5p:2x2x1").chip
    unknown = costs.flops - 1000
    assert costs.beyond_xla(chip) == pytest.approx(unknown / chip.peak_flops)


@pytest.mark.parametrize(
    ("block_q", "block_kv", "pairs"), [(512, 512, 3), (256, 256, 10), (512, 256, 6), (256, 512, 6)]
)
def test_causal_attention_visits_blocks_on_and_below_the_diagonal(
    block_q: int, block_kv: int, pairs: int
) -> None:
    assert causal_pairs(1024, 1024, block_q, block_kv) == pairs


@pytest.mark.parametrize(("rows", "trips"), [(None, 1), (64, 2), (65, 3), (10_000, 71)])
def test_loop_over_an_experts_blocks_walks_those_of_a_balanced_batch(
    rows: int | None, trips: int
) -> None:
    costs = read_costs(parse(BLOCKS, Loops(expert_rows=rows)))
    assert costs.flops == 2 * trips  # a comparison and an addition
