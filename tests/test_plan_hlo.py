"""What a compiled step moves, by hand: loops multiplied, chains counted once, slices not wholes."""

# ruff: noqa: E501
import pytest

from memphis_jax import plan_hlo
from memphis_jax.plan_traffic import collectives

# A loop of 4 around: a gather of 4 x [8, 128] f32 along groups of 4, written as a chain of
# asynchronous fusions; a fused reduce-scatter over 8; a permute; and after it an all-reduce over 2.
MODULE = """HloModule step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%start.1 (p: f32[8,128]) -> (f32[8,128], f32[32,128], s32[2]) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = f32[32,128]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}, use_global_device_ids=true
  ROOT %custom-call.1 = (f32[8,128]{1,0}, f32[32,128]{1,0:T(8,128)S(1)}, s32[2]{0:S(4)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: f32[8,128]) -> f32[32,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.3 = f32[32,128]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}, use_global_device_ids=true
}, execution_thread="main"

%done.1 (p: f32[8,128]) -> f32[32,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-gather.2 = f32[32,128]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}, use_global_device_ids=true
  ROOT %custom-call.2 = f32[32,128]{1,0:T(8,128)S(1)} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (q: bf16[64,128]) -> bf16[8,128] {
  %q = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%q), channel_id=7, replica_groups=[1,8]<=[8], to_apply=%add.1
  ROOT %part = bf16[8,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,128}
}

%slice_and_square (stack: f32[4,8,128], at: s32[]) -> f32[8,128] {
  %stack = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %zero.1 = s32[] constant(0)
  %one = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%stack, %at, %zero.1, %zero.1), dynamic_slice_sizes={1,8,128}
  %flat = f32[8,128]{1,0:T(8,128)} bitcast(%one)
  ROOT %square = f32[8,128]{1,0:T(8,128)} multiply(%flat, %flat)
}

%update (stack.1: f32[4,8,128], row: f32[8,128], at.1: s32[]) -> f32[4,8,128] {
  %stack.1 = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %row = f32[8,128]{1,0:T(8,128)} parameter(1)
  %at.1 = s32[]{:T(128)} parameter(2)
  %zero.2 = s32[] constant(0)
  %layer = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%row)
  ROOT %updated = f32[4,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%stack.1, %layer, %at.1, %zero.2, %zero.2)
}

%body (t: (s32[], f32[4,8,128], bf16[64,128])) -> (s32[], f32[4,8,128], bf16[64,128]) {
  %t = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}, /*index=2*/bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = f32[4,8,128]{2,1,0:T(8,128)} get-tuple-element(%t), index=1
  %g = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %y = f32[8,128]{1,0:T(8,128)} fusion(%x, %i), kind=kLoop, calls=%slice_and_square
  %s = (f32[8,128]{1,0}, f32[32,128]{1,0:T(8,128)S(1)}, s32[2]{0:S(4)}) fusion(%y), kind=kCustom, calls=%start.1
  %k = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%y), custom_call_target="tpu_custom_call", kernel_metadata={
"block_q": 256}
}}, metadata={op_name="a kernel with a text of its own"}
  %w = f32[32,128]{1,0:T(8,128)S(1)} fusion(%y), kind=kCustom, calls=%async_collective_fusion.1
  %d = f32[32,128]{1,0:T(8,128)S(1)} fusion(%y), kind=kCustom, calls=%done.1
  %r = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %cp = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%r), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %cpd = bf16[8,128]{1,0} collective-permute-done(%cp)
  %x2 = f32[4,8,128]{2,1,0:T(8,128)} fusion(%x, %y, %i), kind=kLoop, calls=%update
  ROOT %n = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%i, %x2, %g)
}

%condition (t.1: (s32[], f32[4,8,128], bf16[64,128])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(4)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (x.1: f32[4,8,128], g.1: bf16[64,128]) -> f32[8,128] {
  %x.1 = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %g.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %i.2 = s32[]{:T(128)} constant(0)
  %t.2 = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%i.2, %x.1, %g.1)
  %loop = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) while(%t.2), condition=%condition, body=%body
  %x.2 = f32[4,8,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
  %row.1 = f32[8,128]{1,0:T(8,128)} fusion(%x.2, %i.2), kind=kLoop, calls=%slice_and_square
  ROOT %total = f32[8,128]{1,0:T(8,128)} all-reduce(%row.1), channel_id=10, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add.1
}
"""


def test_collectives_run_as_often_as_their_loop() -> None:
    found = collectives(plan_hlo.parse(MODULE))
    assert {kind: one.count for kind, one in found.items()} == {
        "all-gather": 4,
        "reduce-scatter": 4,
        "collective-permute": 4,
        "all-reduce": 1,
    }
    # f32[8, 128] is 4096 bytes: gathered by 4 it is 16384, of which 3/4 come from elsewhere.
    assert (found["all-gather"].payload, found["all-gather"].wire) == (4 * 16384, 4 * 12288)
    # bf16[64, 128] is 16384 bytes; 7/8 of what remains comes from the 7 others.
    assert (found["reduce-scatter"].payload, found["reduce-scatter"].wire) == (65536, 57344)
    assert (found["collective-permute"].payload, found["collective-permute"].wire) == (8192, 8192)
    assert (found["all-reduce"].payload, found["all-reduce"].wire) == (4096, 2 * 4096 / 2)


def test_memory_traffic_counts_slices_and_updates_as_parts() -> None:
    module = plan_hlo.parse(MODULE)
    of = {
        instruction.name: plan_hlo._moved(module, module.computations[where], instruction)
        for where, instruction, _ in plan_hlo.executed(module)
        if instruction.opcode == "fusion"
    }
    assert of["y"] == 4096 + 4 + 4096  # one layer of four, the counter, one layer written
    assert of["x2"] == 4096 + 4 + 4096  # the stack itself is neither read nor written as a whole
    assert of["d"] == 4096  # what it writes is in VMEM
    assert of["row.1"] == of["y"]


def test_a_nested_loop_multiplies() -> None:
    inner = MODULE.replace("ENTRY %main", "%inner").replace("%main", "%inner")
    outer = """
ENTRY %main (x.9: f32[4,8,128], g.9: bf16[64,128]) -> f32[8,128] {
  %x.9 = f32[4,8,128]{2,1,0} parameter(0)
  %g.9 = bf16[64,128]{1,0} parameter(1)
  ROOT %c = f32[8,128]{1,0} call(%x.9, %g.9), to_apply=%inner
}
"""
    found = collectives(plan_hlo.parse(inner + outer))
    assert found["all-gather"].count == 4
    twice = MODULE.replace("constant(4)", "constant(12)")
    assert collectives(plan_hlo.parse(twice))["all-gather"].count == 12


def test_a_loop_without_a_constant_bound_is_an_error() -> None:
    unknown = MODULE.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="while loop: no constant bound"):
        collectives(plan_hlo.parse(unknown))


@pytest.mark.parametrize(
    ("shape", "all_bytes", "in_memory"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096, 4096),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048, 0),
        ("(s32[], pred[3]{0}, f32[2,2]{1,0:S(1)})", 4 + 3 + 16, 4 + 3),
        ("f8e4m3fn[16]{0}", 16, 16),
    ],
)
def test_bytes_of_a_shape(shape: str, all_bytes: int, in_memory: int) -> None:
    assert plan_hlo.size(shape) == all_bytes
    assert plan_hlo.size(shape, memory=True) == in_memory
