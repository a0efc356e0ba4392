"""What a compiled step moves over the networks, by hand: groups, chips of two devices, slices."""

# ruff: noqa: E501
import pytest

from memphis_jax import plan_hlo
from memphis_jax.plan_traffic import collectives, group_size, groups

# As libtpu writes it for tpu7x: the SparseCore gathers f32[8, 128] (4096 bytes) along groups of 8 ...
OFFLOADED = """HloModule step

%called_computation.1 (p: f32[8,128]) -> f32[64,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.1 = f32[64,128]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=GROUPS, dimensions={0}
}, execution_thread="sparsecore"

%async_computation.1 (q: f32[8,128]) -> f32[64,128] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %custom-call.1 = f32[64,128]{1,0:T(8,128)} custom-call(%q), custom_call_target="TODO(b/522284627)", called_computations={%called_computation.1}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[8,128]) -> f32[64,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %start = ((), (), (s32[2]{0:T(1)})) async-start(), async_execution_thread="sparsecore", calls=%async_computation.1
  %update = ((f32[8,128]{1,0}), f32[64,128]{1,0}, (s32[2]{0:T(1)})) async-update(%start, %x)
  ROOT %done = f32[64,128]{1,0:T(8,128)} async-done(%update)
}
"""
PAIRS = [0, 0, 1, 1, 2, 2, 3, 3]  # the chip of each of 8 devices


def test_what_the_sparsecore_gathers_counts() -> None:
    """... of which 7 of 8 parts come from other devices."""
    module = plan_hlo.parse(OFFLOADED.replace("GROUPS", "mesh['x'=8] {'x'}"))
    found = collectives(module)["all-gather"]
    assert (found.count, found.payload, found.wire, found.ici) == (1, 8 * 4096, 7 * 4096, 7 * 4096)


@pytest.mark.parametrize(
    ("lines", "of", "into_a_chip"),
    [
        # 8 devices, two of each chip: 6 of 8 parts come over its links, for both.
        ("all-gather(%x), replica_groups=mesh['x'=8] {'x'}", 8, 6 / 8),
        ("all-reduce(%x), replica_groups=[1,8]<=[8]", 1, 2 * 6 / 8),
        # One device of each chip: two groups, each of which needs 3 of 4 parts.
        ("all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0)", 4, 2 * 3 / 4),
        ("reduce-scatter(%x), replica_groups={{0,2,4,6},{1,3,5,7}}", 1, 2 * 3 / 4),
        # Both devices of a chip: nothing leaves it.
        ("all-reduce(%x), replica_groups=mesh['x'=4,'y'=2] {'y'}", 1, 0),
        # Two chips a group: 2 of 4 parts.
        ("all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}", 4, 2 / 4),
        # Each device of a chip gets its own 6 of 8 parts.
        ("all-to-all(%x), replica_groups={{0,1,2,3,4,5,6,7}}", 1, 2 * 6 / 8),
        # Around the devices: of each chip one gets from another chip; around the chips: both.
        ("collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}", 1, 1),
        ("collective-permute(%x), source_target_pairs={{0,2},{1,3},{2,4},{3,5},{4,6},{5,7},{6,0},{7,1}}", 1, 2),
    ],
)  # fmt: skip
def test_a_chip_of_two_devices(lines: str, of: int, into_a_chip: float) -> None:
    """`of`: payload, in units of what a device gives; into_a_chip: of the payload, over its links."""
    text = f"""HloModule step

ENTRY %main (x: f32[8,128]) -> f32[64,128] {{
  %x = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %r = f32[64,128]{{1,0:T(8,128)}} {lines}, channel_id=1
}}
"""
    (found,) = collectives(plan_hlo.parse(text), PAIRS).values()
    assert found.payload == of * 4096
    assert found.ici == found.payload * into_a_chip
    (alone,) = collectives(plan_hlo.parse(text), range(8)).values()
    assert alone.ici == alone.wire


# As libtpu writes it for several slices: through the host, summed there.
BETWEEN = """HloModule step

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %after-all = token[] after-all()
  %inside = f32[8,128]{1,0:T(8,128)} all-reduce(%x), channel_id=3, replica_groups={{0,1,2,3}}
  %send = (f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%inside, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="TYPE"}
  %recv = (f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%after-all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="TYPE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv-done = (f32[8,128]{1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %r = f32[8,128]{1,0:T(8,128)} get-tuple-element(%recv-done), index=0
}
"""


@pytest.mark.parametrize(
    ("kind", "slices", "received"),
    [
        ("ALL_REDUCE", 2, 4096),  # the other's sum
        ("ALL_REDUCE", 4, 2 * 4096 * 3 / 4),  # reduced and gathered again, as within a slice
        ("ALL_GATHER", 4, 4096 * 3),
        ("ONE_TO_ONE", 2, 4096),
    ],
)
def test_what_crosses_slices_is_told_apart(kind: str, slices: int, received: float) -> None:
    module = plan_hlo.parse(BETWEEN.replace("TYPE", kind))
    found = collectives(module, range(4), slices)
    inside = found.pop("all-reduce")
    ((name, across),) = found.items()
    assert name.endswith(" between slices")
    assert (across.wire, across.dcn, across.ici) == (received, received, 0)
    assert (inside.ici, inside.dcn) == (2 * 4096 * 3 / 4, 0)
    # Two devices of a chip share its part of the host's network.
    assert collectives(module, [0, 0, 1, 1], slices)[name].dcn == 2 * received


def test_a_transfer_to_the_host_is_read_once() -> None:
    module = plan_hlo.parse(BETWEEN)
    send = module.computations["main"]["send"]
    assert plan_hlo._moved(module, module.computations["main"], send) == 4096


@pytest.mark.parametrize(
    ("text", "size", "first"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3, (0, 1, 2)),
        ("replica_groups=[4,8]<=[32]", 8, (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4, (0, 2, 4, 6)),
        ("replica_groups=[2,16]<=[8,2,2]T(1,0,2)", 16, (0, 1, *range(4, 32, 4))),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", 8, tuple(range(0, 16, 2))),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1','axis_0'}", 8, (0, 2, 4, 6, 1)),
    ],
)  # fmt: skip
def test_groups(text: str, size: int, first: tuple[int, ...]) -> None:
    attributes = f"channel_id=1, {text}, dimensions={{0}}"
    assert group_size(attributes) == size
    assert groups(attributes, 32)[0][: min(len(first), 2)] == first[:2]
    assert group_size("channel_id=1") == 1
