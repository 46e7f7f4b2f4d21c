"""What the benchmarks read from HLO: kinds, axes, bytes, loops and overlap of collectives.

The snippets are shortened from programs that XLA compiled for H100, TPU v5p and TPU7x.
"""

import textwrap

import pytest

from benchmarks.ahead import (
    Collective,
    Report,
    compile_for,
    group_axes,
    groups_of,
    read_collectives,
    shape_bytes,
)

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


def test_gpu_program_gives_axes_bytes_and_overlap() -> None:
    assert read_collectives(GPU, MESH) == [
        Collective("all-reduce", ("node", "expert"), 4, 1, True, False, False),
        Collective("ragged-all-to-all", ("node",), 64, 1, True, True, True),
        Collective("all-gather", ("expert",), 64, 1, True, False, False),
    ]


def test_loops_multiply_where_the_trip_count_is_known() -> None:
    found = read_collectives(LOOPS, MESH)
    assert [(c.kind, c.axes, c.bytes, c.count, c.certain) for c in found] == [
        ("collective-permute", ("expert",), 64, 3, True),
        ("all-reduce", ("node", "expert"), 4, 4, True),
        ("collective-permute", ("expert",), 64, 4, True),
        ("all-reduce", ("node", "expert"), 4, 1, False),
        ("collective-permute", ("expert",), 64, 1, False),
    ]


def test_collective_in_an_asynchronous_call_is_found() -> None:
    assert read_collectives(SPARSECORE, MESH) == [
        Collective("ragged-all-to-all", ("expert",), 64, 1, True, True, True)
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


def test_sum_over_an_axis_leaves_out_what_may_not_run() -> None:
    report = Report("h100:2x8", tuple(read_collectives(LOOPS, MESH)), 0, 0, 0, 0.0)
    assert report.sent("expert", "collective-permute") == 7 * 64
    assert report.sent("node") == 4 * 4


def test_text_without_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        read_collectives(textwrap.dedent("HloModule nothing"), MESH)


def test_missing_interpreter_is_one_line() -> None:
    with pytest.raises(RuntimeError, match=r"^h100:2x8: cannot run /no/python: [^\n]*$"):
        compile_for("benchmarks.exchange:layer", "h100:2x8", python="/no/python")
