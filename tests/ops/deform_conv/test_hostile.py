"""Offsets and pixels that no healthy network has: nothing reads out of bounds, nothing disturbs its neighbours."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import oracle
from tests.support.cases import draw
from tests.support.running import assert_close, compiled, value_and_gradients

needs = pytest.mark.needs
examples = settings(deadline=None, max_examples=30, derandomize=True)

LARGEST = float(np.finfo(np.float32).max)
FAR = (np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**63, 1e5, LARGEST, -LARGEST)
TINY = (1e-45, -1e-45, 1e-40, -1e-40, float(np.finfo(np.float32).tiny), -0.0)

PLANE = draw((2, 2, 3, 4), (2, 2), 3, offset_groups=2, whole=0)
OTHERS = [
    pytest.param(draw((2, 1, 2), (3,), 2, whole=0), id="1-D, one pixel"),
    pytest.param(draw((1, 2, 1, 2, 1), (1, 2, 2), 2, whole=0), id="3-D", marks=[needs("rank 3"), pytest.mark.slow]),
]
CASES = [pytest.param(PLANE, id="2-D"), *OTHERS]
QUICK = [pytest.param(PLANE, id="2-D", marks=pytest.mark.quick), *OTHERS]


class Program:
    """One compiled program, `(y, gradients)` of a case with another offset or x."""

    def __init__(self, op, case):
        self.arrays = _, kernel, offset, mask, _ = case.arrays
        self.window = kernel.shape[:-2]
        self.taps = math.prod(self.window)
        self.groups = mask.shape[-1] // self.taps
        self.cotangent = np.random.default_rng(1).standard_normal((*offset.shape[:-1], kernel.shape[-1]))

        self.run = jax.jit(functools.partial(value_and_gradients, op))

    def arguments(self, offset=None, x=None):
        given_x, kernel, given_offset, mask, bias = self.arrays
        return given_x if x is None else x, kernel, given_offset if offset is None else offset, mask, bias

    def __call__(self, **changed):
        results = self.run(self.arguments(**changed), self.cotangent.astype(np.float32))
        return jax.tree.map(np.asarray, results)

    def wanted(self, **changed):
        arguments = self.arguments(**changed)
        return oracle.deform_conv(*arguments), oracle.gradients(self.cotangent, *arguments)

    def by_tap(self, offset):
        """`(*batch, *out_spatial, OG, K, n)`."""
        return offset.reshape(*offset.shape[:-1], self.groups, self.taps, len(self.window))

    def points(self, offset):
        """Where each tap reads, with the padding "SAME"."""
        offset = np.float64(self.by_tap(offset))
        spatial = self.arrays[0].shape[1:-1]
        geometry = oracle.Geometry(spatial, self.window, 1, "SAME", 1)
        regular = [geometry.tap_positions(position) for position in np.ndindex(*spatial)]
        return np.reshape(regular, (*spatial, 1, self.taps, len(self.window))) + offset

    def offsets(self, *values):
        """Strategy: the case's offset with up to 12 entries replaced by some of `values`."""
        offset = self.arrays[2]

        def replace(entries):
            changed = offset.copy()
            for place, value in entries.items():
                changed.flat[place] = value
            return changed

        places = st.integers(0, offset.size - 1)
        return st.dictionaries(places, st.sampled_from(values), min_size=1, max_size=12).map(replace)


@pytest.fixture
def program(op, case):
    return Program(op, case)


@pytest.mark.parametrize("case", QUICK)
def test_far_offsets_read_zero_with_zero_gradients(program):
    clean, _ = program()

    @examples
    @given(program.offsets(*FAR))
    def check(offset):
        y, gradients = program(offset=offset)
        wanted, wanted_gradients = program.wanted(offset=offset)
        assert_close(y, wanted, 1e-5)
        for gradient, exact in zip(gradients, wanted_gradients, strict=True):
            assert_close(gradient, exact, 1e-5)
        far = np.abs(offset) >= 1e5
        np.testing.assert_array_equal(gradients[2][far], 0)
        elsewhere = ~far.any(axis=-1)
        np.testing.assert_array_equal(y[elsewhere], clean[elsewhere])

    check()


@pytest.mark.parametrize("case", QUICK)
def test_a_nan_offset_makes_nan_at_its_own_output_alone(program):
    """And in the gradients of what it was multiplied with: never in that of x, nor of another tap."""

    @examples
    @given(program.offsets(np.nan, -np.nan, np.inf, 1e30))
    def check(offset):
        y, (d_x, d_kernel, d_offset, d_mask, d_bias) = program(offset=offset)
        without, wanted = program(offset=np.nan_to_num(offset, nan=np.inf, posinf=np.inf))
        nan = np.isnan(offset)
        own = nan.any(axis=-1)
        assert np.isnan(y[own]).all()
        np.testing.assert_array_equal(y[~own], without[~own])
        np.testing.assert_array_equal(d_x, wanted[0])
        np.testing.assert_array_equal(d_bias, wanted[4])
        taps = program.by_tap(nan).any(axis=-1)  # (*batch, *out_spatial, OG, K)
        np.testing.assert_array_equal(program.by_tap(d_offset)[~taps], program.by_tap(wanted[2])[~taps])
        np.testing.assert_array_equal(d_mask.reshape(taps.shape)[~taps], wanted[3].reshape(taps.shape)[~taps])
        touched = taps.any(axis=tuple(range(taps.ndim - 2))).T.reshape(*program.window, program.groups)
        touched = np.repeat(touched, d_kernel.shape[-2] // program.groups, axis=-1)  # (*window, C)
        np.testing.assert_array_equal(d_kernel[~touched], wanted[1][~touched])

    check()


@pytest.mark.parametrize("case", CASES[:1])
def test_subnormal_offsets_are_as_good_as_zero(program):
    @examples
    @given(program.offsets(*TINY))
    def check(offset):
        y, gradients = program(offset=offset)
        wanted, wanted_gradients = program.wanted(offset=offset)
        assert_close(y, wanted, 1e-5)
        assert all(np.isfinite(g).all() for g in gradients)
        for i in (0, 1, 3, 4):
            assert_close(gradients[i], wanted_gradients[i], 1e-5)
        # On which side of the kink a subnormal lies depends on whether the machine flushes it to zero.
        tiny = np.abs(offset) < 1e-30
        assert_close(np.where(tiny, 0, gradients[2]), np.where(tiny, 0, wanted_gradients[2]), 1e-5)

    check()


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_pixel_is_read_by_those_who_point_at_it_alone(program):
    """A point reads the pixels of its cell, [floor(p), floor(p) + 1] along each axis, and no other."""
    x = program.arrays[0]
    clean, clean_gradients = program()
    below = np.floor(program.points(program.arrays[2]))

    @examples
    @given(st.tuples(*[st.integers(0, size - 1) for size in x.shape]), st.sampled_from([np.inf, -np.inf, np.nan]))
    def check(place, value):
        hostile = x.copy()
        hostile[place] = value
        y, (d_x, _, d_offset, d_mask, d_bias) = program(x=hostile)
        image, pixel, channel = place[0], np.array(place[1:-1]), place[-1]
        reads = ((below == pixel) | (below + 1 == pixel)).all(axis=-1)  # (B, *out_spatial, OG, K)
        reads &= (np.arange(program.groups) == channel // (x.shape[-1] // program.groups))[:, None]
        reads &= (np.arange(len(x)) == image).reshape(-1, *[1] * (reads.ndim - 1))
        own = reads.any(axis=(-2, -1))
        assert not np.isfinite(y[own]).any()
        np.testing.assert_array_equal(y[~own], clean[~own])
        np.testing.assert_array_equal(d_x, clean_gradients[0])
        np.testing.assert_array_equal(d_bias, clean_gradients[4])
        np.testing.assert_array_equal(program.by_tap(d_offset)[~reads], program.by_tap(clean_gradients[2])[~reads])
        np.testing.assert_array_equal(
            d_mask.reshape(reads.shape)[~reads], clean_gradients[3].reshape(reads.shape)[~reads]
        )

    check()


def test_a_hostile_corner_is_not_read_from_outside(op):
    """Where an index is clamped to the map, it lands on a pixel at its border: that one must not count."""
    x = np.full((1, 3, 3, 1), np.nan, np.float32)
    kernel = np.ones((1, 1, 1, 1), np.float32)
    positions = np.stack(np.meshgrid([-1e9, -2.5, -1.5, 3.5, 1e9, np.inf], [-3, 0.5, 1, 4], indexing="ij"), axis=-1)
    grid = np.stack(np.meshgrid(np.arange(6), np.arange(4), indexing="ij"), axis=-1)
    offset = np.float32(positions - grid)[None]

    def total(x, offset):
        return jnp.sum(op(x, kernel, offset, padding=((0, 3), (0, 1))))

    y, (d_x, d_offset) = jax.jit(jax.value_and_grad(total, (0, 1)))(x, offset)
    assert y == 0
    assert not np.any(d_x)
    assert not np.any(d_offset)


@needs("half")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_far_offsets_of_half_precision(op, dtype):
    largest = float(jnp.finfo(dtype).max)
    values = jnp.array([jnp.inf, -jnp.inf, largest, -largest, 0.5, jnp.nan], dtype)
    x, kernel = jnp.ones((1, 8, 1), dtype), jnp.ones((1, 1, 1), dtype)

    run = jax.jit(functools.partial(value_and_gradients, functools.partial(op, padding=((0, -2),))))
    y, (d_x, _, d_offset) = run((x, kernel, values[None, :, None]), np.ones((1, 6, 1)))
    np.testing.assert_array_equal(np.float32(y[0, :, 0]), [0, 0, 0, 0, 1, np.nan])
    np.testing.assert_array_equal(np.float32(d_x[0, :, 0]), [0, 0, 0, 0, 0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(np.float32(d_offset[0, :5, 0]), 0)


@needs("float64")
def test_far_offsets_of_double_precision(op, x64):
    values = np.array([1e300, -1e300, 2.0**63, -(2.0**64), np.finfo(np.float64).max, 0.25])
    x, kernel = np.ones((1, 6, 1)), np.ones((1, 1, 1))
    y = compiled(op)(x, kernel, values[None, :, None])
    np.testing.assert_array_equal(y[0, :, 0], [0, 0, 0, 0, 0, 0.75])
