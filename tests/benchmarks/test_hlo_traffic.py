"""What loops in an HLO module move, against modules small enough to count by hand."""

from __future__ import annotations

import pytest
from benchmarks.hlo_traffic import Body, loop_bodies

# A loop that copies a slice of the stack, multiplies by it, rounds, and stacks the result.
COPIED = """
%slice_it (param_0: bf16[4,8,16], param_1: s32[]) -> bf16[1,8,16] {
  %param_0 = bf16[4,8,16]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,8,16]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,8,16}
}

%round_it (param_0: f32[2,16], param_1: bf16[4,2,16], param_2: s32[]) -> bf16[4,2,16] {
  %param_0 = f32[2,16]{1,0} parameter(0)
  %param_1 = bf16[4,2,16]{2,1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %narrow = bf16[2,16]{1,0} convert(%param_0)
  %row = bf16[1,2,16]{2,1,0} bitcast(%narrow)
  ROOT %update = bf16[4,2,16]{2,1,0} dynamic-update-slice(%param_1, %row, %param_2, %zero, %zero)
}

%body (carry: (s32[], bf16[2,8], bf16[4,8,16], bf16[4,2,16])) -> (s32[], bf16[2,8], bf16[4,8,16], bf16[4,2,16]) {
  %carry = (s32[], bf16[2,8]{1,0}, /*index=2*/bf16[4,8,16]{2,1,0}, bf16[4,2,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[2,8]{1,0} get-tuple-element(%carry), index=1
  %stack = bf16[4,8,16]{2,1,0} get-tuple-element(%carry), index=2
  %out = bf16[4,2,16]{2,1,0} get-tuple-element(%carry), index=3
  %copied = bf16[1,8,16]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%slice_it
  %weight = bf16[8,16]{1,0} bitcast(%copied)
  %product = (f32[2,16]{1,0}, s8[4194304]{0}) custom-call(%x, %weight), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %wide = f32[2,16]{1,0} get-tuple-element(%product), index=0
  %stacked = bf16[4,2,16]{2,1,0} fusion(%wide, %out, /*index=2*/%i), kind=kLoop, calls=%round_it
  ROOT %next = (s32[], bf16[2,8]{1,0}, bf16[4,8,16]{2,1,0}, bf16[4,2,16]{2,1,0}) tuple(%i, %x, %stack, %stacked)
}

ENTRY %main (x: bf16[2,8]) -> s32[] {
  %loop = (s32[], bf16[2,8]{1,0}, bf16[4,8,16]{2,1,0}, bf16[4,2,16]{2,1,0}) while(%start), condition=%c, body=%body
}
"""

# The same product from the slice where it lies: one fusion around the library's call.
IN_PLACE = """
%in_place (param_0: bf16[4,8,16], param_1: s32[], param_2: bf16[2,8]) -> (f32[2,16], s8[4194304]) {
  %param_2 = bf16[2,8]{1,0} parameter(2)
  %param_0 = bf16[4,8,16]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,16]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %weight = bf16[8,16]{1,0} bitcast(%slice)
  %call = (f32[2,16]{1,0}, s8[4194304]{0}) custom-call(%param_2, %weight), custom_call_target="__cublas$lt$matmul", \
lhs_contracting_dims={1}
  %wide = f32[2,16]{1,0} get-tuple-element(%call), index=0
  %workspace = s8[4194304]{0} get-tuple-element(%call), index=1
  ROOT %both = (f32[2,16]{1,0}, s8[4194304]{0}) tuple(%wide, %workspace)
}

%body (carry: (s32[], bf16[2,8], bf16[4,8,16])) -> (s32[], bf16[2,8], bf16[4,8,16]) {
  %carry = (s32[], bf16[2,8]{1,0}, bf16[4,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[2,8]{1,0} get-tuple-element(%carry), index=1
  %stack = bf16[4,8,16]{2,1,0} get-tuple-element(%carry), index=2
  %product = (f32[2,16]{1,0}, s8[4194304]{0}) fusion(%stack, %i, %x), kind=kCustom, calls=%in_place
  ROOT %next = (s32[], bf16[2,8]{1,0}, bf16[4,8,16]{2,1,0}) tuple(%i, %x, %stack)
}

ENTRY %main (x: bf16[2,8]) -> s32[] {
  %loop = (s32[], bf16[2,8]{1,0}, bf16[4,8,16]{2,1,0}) while(%start), condition=%c, body=%body
}
"""

X, WEIGHT, WIDE, ROW, INDEX = 2 * 16, 2 * 8 * 16, 4 * 2 * 16, 2 * 2 * 16, 4
FLOPS = 2 * 2 * 8 * 16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            COPIED,
            # The copy reads a slice and writes it, the product reads that; the update reads fp32 and writes one row.
            Body("body", (WEIGHT + INDEX) + (X + WEIGHT) + (WIDE + INDEX), WEIGHT + WIDE + ROW, FLOPS, 3),
        ),
        (IN_PLACE, Body("body", WEIGHT + INDEX + X, WIDE, FLOPS, 1)),
    ],
    ids=["copied", "in place"],
)
def test_bytes_and_flops_by_hand(text: str, expected: Body) -> None:
    assert loop_bodies(text) == [expected]
