"""`ms_deform_attn` against the published formula in torch: values and gradients by every method, by op and by reference."""

import numpy as np
import pytest

from dcn_jax import ms_deform_attn
from dcn_jax.ops.ms_deform_attn import reference
from dcn_jax.ops.ms_deform_attn.call import check_attention
from tests.support import family
from tests.support.running import assert_close

OPTIONS = family.OPTIONS["ms_deform_attn"]
IDS = ["{name}-{method}".format(**options) for options in OPTIONS]
NAMES = ("value", "locations", "weights")


def by_reference(value, spatial_shapes, locations, weights, **options):
    return reference.run(*check_attention(value, spatial_shapes, locations, weights, **options))


def bound(op, options):
    def f(value, locations, weights):
        shapes, points = options["spatial_shapes"], options["points"]
        return op(value, shapes, locations, weights, points_per_level=points, method=options["method"])

    return f


@pytest.mark.parametrize("form", [ms_deform_attn, by_reference], ids=["op", "reference"])
@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=IDS)
def test_equals_torch(x64, number, form):
    case = family.read("ms_deform_attn", number, NAMES)
    for result, expected in zip(
        family.compute(bound(form, OPTIONS[number]), case, np.float64), case.expected, strict=True
    ):
        np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number", [3, 4, 5], ids=IDS[3:6])
def test_is_near_torch_in_float32(number):
    case = family.read("ms_deform_attn", number, NAMES)
    for result, expected in zip(family.compute(bound(ms_deform_attn, OPTIONS[number]), case, np.float32), case.expected, strict=True):  # fmt: skip
        assert_close(result, expected, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_half_precision_rounds_the_values_alone(dtype, tolerance):
    case = family.read("ms_deform_attn", 3, NAMES)
    value, locations, weights = (a.astype(d) for a, d in zip(case.arguments, (dtype, "f4", "f4"), strict=True))
    y = bound(ms_deform_attn, OPTIONS[3])(value, locations, weights)
    assert y.dtype == dtype
    assert_close(np.float64(y), case.expected[0], tolerance)


def test_points_by_level_and_by_shape_are_the_same():
    options = OPTIONS[3]
    value, locations, weights = (a.astype(np.float32) for a in family.read("ms_deform_attn", 3, NAMES).arguments)
    shapes, points = options["spatial_shapes"], options["points"]
    assert len(set(points)) == 1
    split = (*weights.shape[:3], len(points), points[0])
    by_shape = ms_deform_attn(value, shapes, locations.reshape(*split, 2), weights.reshape(split))
    np.testing.assert_array_equal(by_shape, bound(ms_deform_attn, options)(value, locations, weights))
