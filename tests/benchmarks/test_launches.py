"""Launches are counted in a program's text."""

import pytest

from benchmarks.launches import count_launches

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %n = f32[4]{0} negate(%p)
  ROOT %e = f32[4]{0} exponential(%n)
}

%body (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %c = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%c), index=1
  %i = s32[] get-tuple-element(%c), index=0
  %next = s32[] fusion(%i), kind=kLoop, calls=%fused
  %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, %y)
}

%condition (c: (s32[], f32[4])) -> pred[] {
  %c = (s32[], f32[4]{0}) parameter(0)
  ROOT %less = pred[] fusion(%c), kind=kLoop, calls=%fused
}

%wrapped (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %k = f32[4]{0} custom-call(%p), custom_call_target="kernel"
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} bitcast(%a)
  %zero = s32[] constant(0)
  %in = (s32[], f32[4]{0}) tuple(%zero, %b)
  %loop = (s32[], f32[4]{0}) while(%in), condition=%condition, body=%body, TRIPS
  %out = f32[4]{0} get-tuple-element(%loop), index=1
  %begun = ((f32[4]{0}), f32[4]{0}) async-start(%out), calls=%wrapped
  %ended = f32[4]{0} async-done(%begun)
  %either = f32[4]{0} conditional(%zero, %ended, %ended), branch_computations={%wrapped, %fused}
  ROOT %d = f32[4]{0} call(%either), to_apply=%wrapped
}
"""


@pytest.mark.parametrize(
    ("trips", "launches"), [('backend_config={"known_trip_count":{"n":"9"},"more":1}', 9 * 2 + 5), ("", 3 + 5)]
)
def test_loops_count_as_often_as_they_run_and_fusions_as_one(trips, launches):
    assert count_launches(PROGRAM.replace("TRIPS", trips)) == launches
