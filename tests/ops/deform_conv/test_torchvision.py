"""`deform_conv` against torchvision's op in float64: values and the gradients of every argument (see support/parity.py)."""

import jax
import numpy as np
import pytest

from tests.support import parity

IDS = [
    "k{window}-s{strides}-p{padding}-d{kernel_dilation}-fg{feature_group_count}-og{offset_groups}-b{batch}".format(**g).replace(" ", "")
    for g in parity.GEOMETRIES
]  # fmt: skip


def test_the_cases_are_at_least_60_and_cover_what_they_should():
    geometries = parity.GEOMETRIES
    kinds = [kind for g in geometries for kind in g["kinds"]]
    assert len(kinds) >= 60
    assert set(kinds) == {"zero", "plus half", "minus half", "near", "far", "normal"}
    for option in ("mask", "bias"):
        assert {g[option] for g in geometries} == {True, False}
    for option in ("feature_group_count", "offset_groups"):
        assert {g[option] for g in geometries} == {1, 2, 3}
    for option in ("window", "strides", "padding", "kernel_dilation"):
        assert {len(set(g[option])) == 1 for g in geometries} == {True, False}  # the same on both axes, and not


@pytest.mark.parametrize(
    "dtype",
    [pytest.param("float64", marks=pytest.mark.needs("float64")), pytest.param("float32", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("number", range(len(IDS)), ids=IDS)
def test_equals_torchvision(op, number, dtype):
    with jax.enable_x64(dtype == "float64"):
        for case, results in parity.compute(op, number, dtype):
            assert results.keys() == case.expected.keys()
            for name, value in results.items():
                expected = case.expected[name]
                largest = np.abs(expected).max(initial=0)
                rtol, atol = (1e-9, 1e-9) if dtype == "float64" else (2e-4, 2e-6 * largest)
                np.testing.assert_allclose(
                    value, expected, rtol, atol, err_msg=f"{name}, offsets of kind {case.kind!r}"
                )


@pytest.mark.needs("half")
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_is_near_torchvision_in_half_precision(op, dtype, bound):
    for case, results in parity.compute(op, 0, dtype):
        for name, value in results.items():
            assert value.dtype == ("float32" if name == "d_offset" else dtype)
            assert parity.deviation(value, case.expected[name]) < bound, (name, case.kind)
