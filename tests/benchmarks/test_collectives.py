"""What a program moves is read from its text."""

import pytest

from benchmarks.collectives import Collective, memory_traffic, read_collectives

PROGRAM = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[4,8]) -> f32[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %n = bf16[4,8]{1,0} negate(%p)
  ROOT %e = f32[4,8]{1,0} convert(%n)
}

%body (c: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %c = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%c), index=1
  %wide = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %start = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%wide), channel_id=1, GROUPS, dimensions={0}
  %all = f32[16,8]{1,0} all-gather-done(%start)
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %x)
}

%condition (c: (s32[], bf16[4,8])) -> pred[] {
  %c = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

ENTRY %main (x: bf16[4,8]) -> f32[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %in = (s32[], bf16[4,8]{1,0}) tuple(%zero, %x)
  %loop = (s32[], bf16[4,8]{1,0}) while(%in), condition=%condition, body=%body, TRIPS
  %out = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
  %halo = bf16[4,8]{1,0} collective-permute(%out), channel_id=2, source_target_pairs={{0,1},{1,2}}
  %wide.1 = f32[4,8]{1,0} fusion(%halo), kind=kLoop, calls=%fused
  ROOT %sum.1 = f32[4,8]{1,0} all-reduce(%wide.1), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


def program(groups="replica_groups=[2,4]<=[8]", trips='backend_config={"known_trip_count":{"n":"5"}}'):
    return PROGRAM.replace("GROUPS", groups).replace("TRIPS", trips)


def test_collectives():
    assert read_collectives(program()) == [
        Collective("all-gather", [(4, 8), (16, 8)], 128, 4, 5, True),
        Collective("collective-permute", [(4, 8)], 64, 0, 1, False),
        Collective("all-reduce", [(4, 8)], 128, 4, 1, False),
    ]
    # To three others five times; to one neighbour; three quarters of it twice around the ring.
    assert [found.sent for found in read_collectives(program())] == [5 * 3 * 128, 64, 2 * 0.75 * 128]


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0,1,2,3},{4,5,6,7}}",
        "replica_groups=mesh['a'=2,'b'=4] {'b'}",
        "replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([8]) {'a','c'}",
    ],
)
def test_groups_are_written_in_many_ways(groups):
    assert read_collectives(program(groups))[0].devices == 4


def test_a_loop_whose_turns_only_its_condition_tells():
    assert read_collectives(program(trips="metadata={}"))[0].runs == 3


PARTS = """HloModule jit_f, is_scheduled=true

%start (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  ROOT %s = f32[8]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}
}

%end (q: f32[4]) -> f32[8] {
  %q = f32[4]{0} parameter(0)
  ROOT %e = f32[8]{0} all-gather(%q), channel_id=1, replica_groups={{0,1}}
}

ENTRY %main (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %y = f32[8]{0} fusion(%x), kind=kCustom, calls=%start
  ROOT %z = f32[8]{0} fusion(%x), kind=kCustom, calls=%end
}
"""


def test_a_collective_in_several_parts_is_counted_once():
    """As a TPU's compiler fuses them with kernels."""
    assert read_collectives(PARTS) == [Collective("all-gather", [(8,)], 16, 2, 1, False)]


def test_memory_traffic():
    """Each fusion reads 64 bytes and writes 128; the one in the loop and its condition run five times."""
    assert memory_traffic(program()) == 6 * (64 + 128) + 5 * (4 + 4 + 1)
