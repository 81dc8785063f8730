"""The family on a GPU, in float32: against what torch computed, and DCNv3's oracle."""

import functools

import numpy as np
import pytest

from dcn_jax import dcnv3, dcnv4, grid_sample, ms_deform_attn
from tests.support import dcn_oracle, family, gpu

if reason := gpu.missing():
    pytest.skip(reason, allow_module_level=True)

TOLERANCE = 1e-5


def check_stored(record, f, case, names):
    """A case of torch's."""
    arguments = [a.astype(np.float32) for a in case.arguments]
    got = gpu.run(gpu.gradients_of(f), arguments, case.cotangent.astype(np.float32))
    names, (y, *gradients) = ("y", *(f"d{name}" for name in names)), case.expected
    gpu.check(record, "stored", gpu.named(got, names), gpu.named((y, gradients), names), TOLERANCE)


@pytest.mark.parametrize("number", range(0, len(family.OPTIONS["grid_sample"]), 7))
def test_grid_sample(record_property, number):
    names = ("features", "grid")
    f = functools.partial(grid_sample, **family.OPTIONS["grid_sample"][number])
    check_stored(record_property, f, family.read("grid_sample", number, names), names)


@pytest.mark.parametrize("number", [3, 4, 5])
def test_ms_deform_attn(record_property, number):
    options, names = family.OPTIONS["ms_deform_attn"][number], ("value", "locations", "weights")

    def f(value, locations, weights):
        shapes, points = options["spatial_shapes"], options["points"]
        return ms_deform_attn(value, shapes, locations, weights, points_per_level=points, method=options["method"])

    check_stored(record_property, f, family.read("ms_deform_attn", number, names), names)


@pytest.mark.parametrize("options", [{}, {"remove_center": True, "offset_scale": 2.0, "strides": 2}], ids=str)
def test_dcnv3_and_dcnv4(record_property, options):
    x, offset, mask = dcn_oracle.draw((2, 9, 10, 32), 2, **options)
    y = dcn_oracle.dcnv3(x, offset, mask, **options)
    cotangent = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    dx, doffset, dmask = dcn_oracle.gradients(cotangent, x, offset, mask, **options)

    program = gpu.gradients_of(functools.partial(dcnv3, **options))
    got = gpu.named(gpu.run(program, (x, offset, mask), cotangent), ("y", "dx", "doffset", "dmask"))
    gpu.check(record_property, "dcnv3", got, {"y": y, "dx": dx, "doffset": doffset, "dmask": dmask}, TOLERANCE)

    packed = dcn_oracle.pack(offset, mask, 2)
    program = gpu.gradients_of(functools.partial(dcnv4, groups=2, **options))
    got = gpu.named(gpu.run(program, (x, packed), cotangent), ("y", "dx", "dpacked"))
    wanted = {"y": y, "dx": dx, "dpacked": dcn_oracle.pack(doffset, dmask, 2)}
    gpu.check(record_property, "dcnv4", got, wanted, TOLERANCE)
