"""`grid_sample` against torch's: values and gradients in every mode that torch has."""

import functools

import jax
import numpy as np
import pytest

from dcn_jax import grid_sample
from tests.support import family
from tests.support.running import assert_close

OPTIONS = family.OPTIONS["grid_sample"]
NAMES = ("features", "grid")


def test_the_cases_cover_what_they_should():
    ranks = {family.read("grid_sample", number, NAMES).arguments[1].shape[-1] for number in range(len(OPTIONS))}
    assert ranks == {1, 2, 3}
    for option, values in {
        "method": {"linear", "nearest", "cubic"},
        "padding_mode": {"zeros", "edge", "reflect", "symmetric"},
        "align_corners": {True, False},
    }.items():
        assert {options[option] for options in OPTIONS} == values


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[pytest.mark.slow] if n % 3 else []) for n in range(len(OPTIONS))]
)
def test_equals_torch(x64, number):
    case = family.read("grid_sample", number, NAMES)
    results = family.compute(functools.partial(grid_sample, **OPTIONS[number]), case, np.float64)
    for result, expected in zip(results, case.expected, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number", range(0, len(OPTIONS), 7))
def test_is_near_torch_in_float32(number):
    case = family.read("grid_sample", number, NAMES)
    results = family.compute(functools.partial(grid_sample, **OPTIONS[number]), case, np.float32)
    for result, expected in zip(results, case.expected, strict=True):
        assert_close(result, expected, 1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_half_precision_rounds_the_features_alone(dtype, bound):
    case = family.read("grid_sample", 12, NAMES)
    features, grid = case.arguments
    y = grid_sample(features.astype(dtype), grid.astype(np.float32), **OPTIONS[12])
    assert y.dtype == dtype
    assert_close(np.float64(y), case.expected[0], bound)
    gradients = jax.eval_shape(
        lambda *a: jax.vjp(grid_sample, *a)[1](y), features.astype(dtype), grid.astype(np.float32)
    )
    assert [g.dtype for g in gradients] == [dtype, np.float32]
