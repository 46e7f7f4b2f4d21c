"""What is read from HLO of collectives: kinds, axes, bytes, loops and overlap.

The snippets are shortened from programs that XLA compiled for H100, TPU v5p and TPU7x.
"""

import textwrap

import pytest

from v3jax.aot.collectives import (
    Collective,
    group_axes,
    groups_of,
    read_collectives,
    sent_bytes,
)
from v3jax.aot.hlo import Loops, parse, shape_bytes

MESH = {"pipe": 1, "data": 1, "node": 2, "expert": 8}

GPU = """
HloModule jit_local, is_scheduled=true

%fused_dot (p0: bf16[4,8], p1: bf16[8,8]) -> bf16[4,8] {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %p1 = bf16[8,8]{1,0} parameter(1)
  ROOT %dot.1 = bf16[4,8]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main.1_spmd (x: bf16[4,8], w: bf16[8,8], n: s64[16], s: f32[]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,8]{1,0} parameter(1)
  %n = s64[16]{0} parameter(2)
  %s = f32[] parameter(3)
  %zeros = bf16[6,8]{1,0:S(7)} broadcast(%s), dimensions={}
  %norm = f32[] all-reduce(%s), channel_id=3, replica_groups=mesh['pipe'=1,'data'=1,'node'=2,'expert'=8] {'data','node','expert'}, use_global_device_ids=true, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":true}}
  %ragged-all-to-all-start = ((bf16[4,8]{1,0}, bf16[6,8]{1,0:S(7)}, s64[16]{0}, s64[16]{0}, s64[16]{0}, /*index=5*/s64[16]{0}), bf16[6,8]{1,0:S(7)}) ragged-all-to-all-start(%x, %zeros, %n, %n, %n, /*index=5*/%n), channel_id=1, replica_groups={{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}, backend_config={"collective_backend_config":{"is_sync":false}}
  %gemm = bf16[4,8]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused_dot
  %ragged-all-to-all-done = bf16[6,8]{1,0:S(7)} ragged-all-to-all-done(%ragged-all-to-all-start)
  %all-gather-start = ((bf16[4,8]{1,0}), bf16[32,8]{1,0}) all-gather-start(%gemm), channel_id=2, replica_groups=[2,8]<=[16], dimensions={0}, backend_config={"collective_backend_config":{"is_sync":true}}
  %all-gather-done = bf16[32,8]{1,0} all-gather-done(%all-gather-start)
  %alone = bf16[4,8]{1,0} all-to-all(%gemm), channel_id=5, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7},{8},{9},{10},{11},{12},{13},{14},{15}}
  ROOT %out = bf16[4,8]{1,0} slice(%all-gather-done), slice={[0:4], [0:8]}
}
"""  # noqa: E501

LOOPS = """
HloModule jit_loops, is_scheduled=true

%body (state: (s32[], bf16[4,2,4])) -> (s32[], bf16[4,2,4]) {
  %state = (s32[]{:T(128)}, bf16[4,2,4]{2,1,0:T(2,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[4,2,4]{2,1,0:T(2,128)(2,1)} get-tuple-element(%state), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %sent = bf16[4,2,4]{2,1,0:T(2,128)(2,1)} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0},{8,9},{9,8}}
  ROOT %tuple = (s32[]{:T(128)}, bf16[4,2,4]{2,1,0:T(2,128)(2,1)}) tuple(%next, %sent)
}

%cond (state: (s32[], bf16[4,2,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %state = (s32[]{:T(128)}, bf16[4,2,4]{2,1,0:T(2,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%unknown (state: (s32[], bf16[4,2,4])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[4,2,4]{2,1,0:T(2,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %n = s32[]{:T(128)} all-reduce(%i), channel_id=2, replica_groups={}, to_apply=%add
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[4,2,4]) -> bf16[4,2,4] {
  %x = bf16[4,2,4]{2,1,0:T(2,128)(2,1)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %first = s32[]{:T(128)} copy(%two)
  %start = (s32[]{:T(128)}, bf16[4,2,4]{2,1,0:T(2,128)(2,1)}) tuple(%first, %x)
  %counted = (s32[]{:T(128)}, bf16[4,2,4]{2,1,0:T(2,128)(2,1)}) while(%start), condition=%cond, body=%body
  %annotated = (s32[]{:T(128)}, bf16[4,2,4]{2,1,0:T(2,128)(2,1)}) while(%counted), condition=%unknown, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %open = (s32[]{:T(128)}, bf16[4,2,4]{2,1,0:T(2,128)(2,1)}) while(%annotated), condition=%unknown, body=%body
  ROOT %out = bf16[4,2,4]{2,1,0:T(2,128)(2,1)} get-tuple-element(%open), index=1
}
"""  # noqa: E501

SPARSECORE = """
HloModule jit_sparsecore, is_scheduled=true

%called (p: bf16[4,8], q: bf16[6,8], n: s32[16]) -> bf16[6,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %q = bf16[6,8]{1,0} parameter(1)
  %n = s32[16]{0} parameter(2)
  ROOT %inner = bf16[6,8]{1,0} ragged-all-to-all(%p, %q, %n, %n, %n, %n), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}
}

ENTRY %main (x: bf16[4,8], y: bf16[6,8], n: s32[16]) -> bf16[6,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = bf16[6,8]{1,0} parameter(1)
  %n = s32[16]{0} parameter(2)
  %call-start = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%called
  %call-update = ((bf16[4,8]{1,0}, bf16[6,8]{1,0}, s32[16]{0}), bf16[6,8]{1,0}) call-update(%call-start, %x, %y, %n)
  %product = f32[4,4]{1,0} convolution(%x, %x), dim_labels=bf_oi->bf
  ROOT %call-done = bf16[6,8]{1,0} call-done(%call-update)
}
"""  # noqa: E501

# A kernel's attributes with line ends in them, and TPU's reduce-scatter of a padded operand.
KERNEL = """
HloModule jit_kernel, is_scheduled=true

%all-reduce-scatter.3.clone.1 (p: f32[28,4], q: f32[32,4]) -> (f32[4,4], f32[4,4]) {
  %p = f32[28,4]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %pad = f32[32,4]{1,0} pad(%p, %zero), padding=0_4x0_0
  %q = f32[32,4]{1,0} parameter(1)
  %all-reduce.1 = (f32[32,4]{1,0}, f32[32,4]{1,0}) all-reduce(%pad, %q), channel_id=1, replica_groups=[2,8]<=[16], to_apply=%add
  %first = f32[32,4]{1,0} get-tuple-element(%all-reduce.1), index=0
  %second = f32[32,4]{1,0} get-tuple-element(%all-reduce.1), index=1
  %i = s32[] constant(0)
  %a = f32[4,4]{1,0} dynamic-slice(%first, %i, %i), dynamic_slice_sizes={4,4}
  %b = f32[4,4]{1,0} dynamic-slice(%second, %i, %i), dynamic_slice_sizes={4,4}
  ROOT %parts = (f32[4,4]{1,0}, f32[4,4]{1,0}) tuple(%a, %b)
}

%thread (z: f32[28,4]) -> f32[28,4] {
  ROOT %z = f32[28,4]{1,0} parameter(0)
}, execution_thread="sparsecore"

ENTRY %main (x: f32[28,4], y: f32[32,4]) -> f32[4,4] {
  %x = f32[28,4]{1,0} parameter(0)
  %y = f32[32,4]{1,0} parameter(1)
  %splash = f32[28,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}",
"of = f32[8] all-reduce(x)":"-> {"
}}, metadata={op_name="jit(f)/splash/pallas_call"}, backend_config={"used":[]}
  %both = (f32[4,4]{1,0}, f32[4,4]{1,0}) fusion(%splash, %y), kind=kCustom, calls=%all-reduce-scatter.3.clone.1
  ROOT %out = f32[4,4]{1,0} get-tuple-element(%both), index=0
}
"""  # noqa: E501

# The step's loop over micro-batches, in it a loop of exchange passes that starts at the second.
STEP = """
HloModule jit_step, is_scheduled=true

%pass (s: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %s = (s32[], s32[], f32[8]{0}) parameter(0)
  %k = s32[] get-tuple-element(%s), index=0
  %m = s32[] get-tuple-element(%s), index=1
  %w = f32[8]{0} get-tuple-element(%s), index=2
  %again = f32[8]{0} all-to-all(%w), channel_id=3, replica_groups=[2,8]<=[16]
  ROOT %t = (s32[], s32[], f32[8]{0}) tuple(%k, %m, %again)
}

%more (s: (s32[], s32[], f32[8])) -> pred[] {
  %s = (s32[], s32[], f32[8]{0}) parameter(0)
  %k = s32[] get-tuple-element(%s), index=0
  %m = s32[] get-tuple-element(%s), index=1
  ROOT %lt = pred[] compare(%k, %m), direction=LT
}

%batch (s: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %s = (s32[], s32[], f32[8]{0}) parameter(0)
  %k = s32[] get-tuple-element(%s), index=0
  %m = s32[] get-tuple-element(%s), index=1
  %w = f32[8]{0} get-tuple-element(%s), index=2
  %sum = f32[8]{0} all-reduce(%w), channel_id=4, replica_groups=[2,8]<=[16], to_apply=%add
  %FIRST = s32[] constant(FIRST)
  %start = (s32[], s32[], f32[8]{0}) tuple(%FIRST, %m, %sum)
  ROOT %passes = (s32[], s32[], f32[8]{0}) while(%start), condition=%more, body=%pass, metadata={op_name="jit(step)/shard_map/while/body/experts/while"}
}

ENTRY %main (n: s32[], x: f32[8]) -> f32[8] {
  %n = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], s32[], f32[8]{0}) tuple(%zero, %n, %x)
  %loop = (s32[], s32[], f32[8]{0}) while(%start), condition=%more, body=%batch, metadata={op_name="jit(step)/shard_map/while" stack_frame_id=2}
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_gpu_program_gives_axes_bytes_and_overlap() -> None:
    assert read_collectives(parse(GPU), MESH) == [
        Collective("all-reduce", ("node", "expert"), 4, 7, 1, True, False, False),
        Collective("ragged-all-to-all", ("node",), 64, 32, 1, True, True, True),
        Collective("all-gather", ("expert",), 64, 7 * 64, 1, True, False, False),
    ]


def test_loops_multiply_where_the_trip_count_is_known() -> None:
    found = read_collectives(parse(LOOPS), MESH)
    assert [(c.kind, c.axes, c.bytes, c.count, c.certain) for c in found] == [
        ("collective-permute", ("expert",), 64, 3, True),
        ("all-reduce", ("node", "expert"), 4, 4, True),
        ("collective-permute", ("expert",), 64, 4, True),
        ("all-reduce", ("node", "expert"), 4, 1, False),
        ("collective-permute", ("expert",), 64, 1, False),
    ]


def test_collective_in_an_asynchronous_call_is_found() -> None:
    assert read_collectives(parse(SPARSECORE), MESH) == [
        Collective("ragged-all-to-all", ("expert",), 64, 56, 1, True, True, True)
    ]


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}", ("expert",)),
        ("{{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}", ("node",)),
        ("[2,8]<=[16]", ("expert",)),
        ("[8,2]<=[2,8]T(1,0)", ("node",)),
        ("[1,16]<=[16]", ("node", "expert")),
        ("{}", ("node", "expert")),
        ("{{0},{1}}", ()),
        ("{{0,1},{2,3},{4,5},{6,7}}", ("expert",)),
        ("mesh['pipe'=1,'data'=1,'node'=2,'expert'=8] {'data','node'}", ("node",)),
        ("mesh['a'=2,'b'=8] {'b':(1)2}", ("expert",)),
        ("mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'b'}", ("node",)),
    ],
)
def test_groups_are_read_in_every_form(groups: str, axes: tuple[str, ...]) -> None:
    attributes = f", channel_id=1, replica_groups={groups}, use_global_device_ids=true"
    assert group_axes(groups_of(attributes, MESH), MESH) == axes


def test_part_of_a_mesh_axis_gives_its_groups() -> None:
    got = groups_of("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, metadata={}", {"d": 8})
    assert sorted(map(sorted, got)) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_unknown_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot read replica_groups"):
        groups_of("replica_groups=everyone, metadata={}", MESH)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[8192,2,3584]{2,1,0:T(2,128)(2,1)S(1)}", 8192 * 7168 * 2),
        ("(f32[4]{0}, s64[2,3]{1,0}, u32[])", 16 + 48 + 4),
        ("f8e4m3fn[16,16]", 256),
        ("pred[8]", 8),
        ("s4[10]", 5),
    ],
)
def test_sizes_leave_out_the_layout(shape: str, size: int) -> None:
    assert shape_bytes(shape) == size


def test_text_without_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        parse(textwrap.dedent("HloModule nothing"))


def test_lines_of_a_kernel_are_no_instructions_and_end_no_computation() -> None:
    entry = parse(KERNEL).computations["main"]
    assert [i.name for i in entry.instructions] == ["x", "y", "splash", "both", "out"]
    splash = entry.find("splash")
    assert splash is not None
    assert '"used":[]' in splash.attributes
    assert [i.name for i in parse(KERNEL).computations["thread"].instructions] == ["z"]


def test_fused_sum_and_slice_is_a_reduce_scatter_of_what_was_padded() -> None:
    size = 4 * (28 + 32) * 4
    assert read_collectives(parse(KERNEL), MESH) == [
        Collective("reduce-scatter", ("expert",), size, size * 7 // 8, 1, True, False, False)
    ]


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 7 * 800),
        ("reduce-scatter", 700),
        ("all-reduce", 1400),
        ("all-to-all", 700),
        ("collective-permute", 800),
        ("ragged-all-to-all", 350),
    ],
)
def test_bytes_through_the_links_are_those_of_a_ring(kind: str, sent: int) -> None:
    assert sent_bytes(kind, 8, 800, 400) == sent


def test_ragged_exchange_moves_no_more_than_its_smaller_buffer() -> None:
    assert sent_bytes("ragged-all-to-all", 8, 400, 800) == 350


@pytest.mark.parametrize(("first", "passes"), [(0, [("all-to-all", 5, False)]), (1, [])])
def test_micro_batches_multiply_and_a_balanced_batch_takes_one_pass(
    first: int, passes: list[tuple[str, int, bool]]
) -> None:
    module = parse(STEP.replace("FIRST", str(first)), Loops(n_micro=5))
    found = [(c.kind, c.count, c.certain) for c in read_collectives(module, MESH)]
    assert found == [("all-reduce", 5, True), *passes]


# Conditionals as GPUs and TPUs have them, in a loop over a pipeline's ticks.
PIPELINE = """
HloModule jit_step, is_scheduled=true

%idle (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}

%inputs (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %a = f32[8]{0} all-to-all(%x), channel_id=1, replica_groups=[2,8]<=[16]
}

%alone (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %p = pred[] constant(true)
  ROOT %y = f32[8]{0} conditional(%p, %x, %x), true_computation=%inputs, false_computation=%idle, metadata={op_name="jit(step)/while/body/pipeline_pair/cond/branch_0_fun/pipeline_inputs/cond"}
}

%pair (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} all-reduce(%x), channel_id=2, replica_groups=[2,8]<=[16], to_apply=%add
}

%tick (s: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %s = (s32[], s32[], f32[8]{0}) parameter(0)
  %k = s32[] get-tuple-element(%s), index=0
  %m = s32[] get-tuple-element(%s), index=1
  %w = f32[8]{0} get-tuple-element(%s), index=2
  %y = f32[8]{0} conditional(%k, %w, %w), branch_computations={%alone, %pair}, metadata={op_name="jit(step)/while/body/pipeline_pair/cond"}
  ROOT %t = (s32[], s32[], f32[8]{0}) tuple(%k, %m, %y)
}

%more (s: (s32[], s32[], f32[8])) -> pred[] {
  %s = (s32[], s32[], f32[8]{0}) parameter(0)
  %k = s32[] get-tuple-element(%s), index=0
  %m = s32[] get-tuple-element(%s), index=1
  ROOT %lt = pred[] compare(%k, %m), direction=LT
}

ENTRY %main (n: s32[], x: f32[8]) -> f32[8] {
  %n = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  %start = (s32[], s32[], f32[8]{0}) tuple(%n, %n, %x)
  %loop = (s32[], s32[], f32[8]{0}) while(%start), condition=%more, body=%tick, metadata={op_name="jit(step)/shard_map/while"}
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_branches_of_a_pipeline_count_as_often_as_they_are_taken() -> None:
    loops = Loops(n_micro=100, shares={"pair": 0.4, "inputs": 0.5})
    found = read_collectives(parse(PIPELINE, loops), MESH)
    assert [(c.kind, c.count, c.certain) for c in found] == [
        ("all-to-all", 30, True),
        ("all-reduce", 40, True),
    ]
    unknown = read_collectives(parse(PIPELINE, Loops(n_micro=100)), MESH)
    assert [(c.count, c.certain) for c in unknown] == [(100, False), (100, False)]


def test_loop_of_unknown_length_counts_once() -> None:
    found = read_collectives(parse(STEP.replace("FIRST", "0")), MESH)
    assert [(c.count, c.certain) for c in found] == [(1, False), (1, False)]
