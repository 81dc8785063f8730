"""`linear_sample`: values, derivatives, dtypes, hostile points, and errors that say what is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from dcn_jax import linear_sample
from tests.support import oracle
from tests.support.running import assert_close, compiled, value_and_gradients

sample = compiled(linear_sample)

SPATIAL = [(5,), (4, 3), (2, 3, 2), (1, 1), (2, 2, 1, 2)]


def draw(spatial, channels=3, query=(4, 6), dtype=np.float32, whole=0.0):
    """A map and points within and around it."""
    rng = np.random.default_rng(0)
    points = rng.uniform(-2.5, np.array(spatial) + 1.5, (*query, len(spatial)))
    fraction = np.where(rng.random(points.shape) < whole, 0, rng.uniform(0.1, 0.9, points.shape))
    return rng.standard_normal((*spatial, channels)).astype(dtype), (np.floor(points) + fraction).astype(dtype)


@pytest.mark.parametrize("spatial", SPATIAL, ids=str)
def test_values(spatial):
    features, points = draw(spatial, whole=0.2)
    sampled = sample(features, points)
    assert sampled.dtype == np.float32
    assert_close(sampled, oracle.linear_sample(features, points), 1e-6)


def test_whole_points_read_pixels():
    features, _ = draw((4, 3))
    points = np.stack(np.meshgrid(np.arange(-2, 6), np.arange(-2, 5), indexing="ij"), axis=-1).astype(np.float32)
    np.testing.assert_array_equal(sample(features, points), np.pad(features, ((2, 2), (2, 2), (0, 0))))


@pytest.mark.parametrize("query", [(), (0,), (1, 2, 3)], ids=str)
def test_any_number_of_points_in_any_shape(query):
    features, points = draw((4, 3), query=query)
    assert_close(sample(features, points), oracle.linear_sample(features, points), 1e-6)


def test_no_channels():
    assert linear_sample(np.zeros((4, 3, 0), np.float32), np.zeros((7, 2), np.float32)).shape == (7, 0)


@pytest.mark.parametrize("in_axes", [(0, 0), (None, 1), (-1, None)], ids=str)
def test_vmap(in_axes):
    features, points = draw((4, 3), 2, (5,))
    stacks = [a if axis is None else np.stack([a, 0.5 * a], axis) for a, axis in zip((features, points), in_axes, strict=True)]  # fmt: skip
    together = jax.jit(jax.vmap(linear_sample, in_axes))(*stacks)
    for i in range(2):
        scale = [1 if axis is None else (1, 0.5)[i] for axis in in_axes]
        assert_close(together[i], oracle.linear_sample(scale[0] * features, np.float32(scale[1]) * points), 1e-6)


@pytest.mark.parametrize(
    "spatial",
    [(4, 3), pytest.param((5,), marks=pytest.mark.slow), pytest.param((2, 3, 2), marks=pytest.mark.slow)],
    ids=str,
)
def test_derivatives_against_finite_differences(x64, spatial):
    arguments = draw(spatial, 2, (4,), np.float64)
    f = jax.jit(lambda features, points: jnp.sin(linear_sample(features, points)))
    check_grads(f, arguments, order=2, modes=["fwd", "rev"], rtol=1e-5)


def test_the_derivative_at_a_whole_number_is_the_right_hand_one():
    """Everywhere, at the border of the map too: -1 leads into it, its last pixel and its size lead out."""
    features = np.random.default_rng(0).standard_normal(4).astype(np.float32)
    points = np.arange(-3, 7, dtype=np.float32)
    slope = jax.jit(jax.vmap(jax.grad(lambda point: linear_sample(features[:, None], point[None])[0])))(points)
    padded = np.pad(features, (3, 4))  # pixels -3 to 7
    np.testing.assert_array_equal(slope, np.diff(padded))


# Dtypes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    """Weights in float32 whatever the dtypes, the result in that of the features."""
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.integers(-4, 5, (4096, 1)), dtype)
    points = np.float32(rng.integers(0, 4 * 4095, (300, 1)) / 4)
    sampled = sample(features, points)
    assert sampled.dtype == dtype
    np.testing.assert_array_equal(np.float64(sampled), oracle.linear_sample(np.float64(features), points))
    near = jnp.asarray(points % 2, dtype)  # exact in half precision
    sampled = sample(features.astype(np.float32), near)
    assert sampled.dtype == np.float32
    np.testing.assert_array_equal(sampled, oracle.linear_sample(np.float64(features), np.float64(near)))


def test_gradients_of_half_precision_are_those_of_its_dtype():
    features, points = draw((4, 3))
    total = lambda *arguments: jnp.sum(linear_sample(*arguments))  # noqa: E731
    gradients = jax.eval_shape(jax.grad(total, (0, 1)), features.astype(jnp.bfloat16), points)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, np.float32]


def test_gradients_of_half_precision_are_summed_in_float32():
    """300 points read one pixel; a sum of ones in bfloat16 stops at 256."""
    features, points = jnp.ones((2, 1), jnp.bfloat16), jnp.zeros((300, 1))
    total = lambda features: jnp.sum(linear_sample(features, points).astype(np.float32))  # noqa: E731
    gradient = jax.jit(jax.grad(total))(features)
    assert float(gradient[0, 0]) == 300


def test_float64(x64):
    features, points = draw((4, 3), dtype=np.float64, whole=0.2)
    assert_close(sample(features, points), oracle.linear_sample(features, points), 1e-14)
    mixed = sample(features, points.astype(np.float32))
    assert mixed.dtype == np.float64
    assert_close(mixed, oracle.linear_sample(features, points.astype(np.float32)), 1e-14)


def test_complex():
    features, points = draw((4, 3))
    sampled = sample(features + 1j * features[::-1], points)
    assert sampled.dtype == np.complex64
    assert_close(sampled.real, oracle.linear_sample(features, points), 1e-6)
    assert_close(sampled.imag, oracle.linear_sample(features[::-1], points), 1e-6)


# Hostile points


def test_hostile_points():
    """Those far away read zero with a zero gradient, a NaN reads NaN, and none disturbs another or reads a border pixel."""
    features, points = draw((3, 2), query=(8,))
    far = (np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31), float(np.finfo(np.float32).max), -1.0001, 3.0001)

    program = jax.jit(functools.partial(value_and_gradients, linear_sample))

    def run(features, points):
        sampled, gradients = program((features, points), np.ones((len(points), features.shape[-1])))
        return map(np.asarray, (sampled, *gradients))

    clean, _, clean_d_points = run(features, points)

    @settings(deadline=None, max_examples=60, derandomize=True)
    @given(st.dictionaries(st.integers(0, 15), st.sampled_from((*far, np.nan)), min_size=1, max_size=6))
    def check(entries):
        changed = points.copy()
        for place, value in entries.items():
            changed.flat[place] = value
        sampled, d_features, d_points = run(features, changed)
        nan, own = np.isnan(changed).any(axis=-1), (changed != points).any(axis=-1)
        assert np.isnan(sampled[nan]).all()
        np.testing.assert_array_equal(sampled[own & ~nan], 0)
        np.testing.assert_array_equal(d_points[own & ~nan], 0)
        np.testing.assert_array_equal(sampled[~own], clean[~own])
        np.testing.assert_array_equal(d_points[~own], clean_d_points[~own])
        without = np.where(own[:, None], np.float32(np.inf), changed)
        _, wanted, _ = run(features, without)
        np.testing.assert_array_equal(d_features, wanted)

    check()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_hostile_pixel_is_not_read_by_who_does_not_touch_it(value):
    features = np.ones((3, 3, 1), np.float32)
    features[0, 0] = value
    outside = [[-1.5, 0], [0, -7], [-np.inf, 0], [1e9, -1e9], [1, 0], [0.5, 1]]
    sampled = sample(features, np.float32(outside))
    np.testing.assert_array_equal(sampled[:, 0], [0, 0, 0, 0, 1, 1])
    touching = sample(features, np.float32([[0, 0], [0.5, 0.5], [-0.5, 0]]))
    assert not np.isfinite(touching).any()


# Errors

ERRORS = [
    (np.zeros(3, np.float32), np.zeros(1, np.float32), ValueError, "features has shape (3,); wanted (*spatial, C) with at least one pixel"),
    (np.zeros((3, 0, 2), np.float32), np.zeros(2, np.float32), ValueError, "features has shape (3, 0, 2); wanted (*spatial, C) with at least one pixel"),
    (np.zeros((3, 3, 2), np.float32), np.zeros((5, 3), np.float32), ValueError, "points has shape (5, 3); wanted (*query, 2): one coordinate for each spatial axis of features, whose shape is (3, 3, 2)"),
    (np.zeros((3, 3, 2), np.float32), np.zeros((), np.float32), ValueError, "points has shape (); wanted (*query, 2)"),
    (np.zeros((3, 2), int), np.zeros(1, np.float32), TypeError, "features has dtype int64; wanted a floating-point or complex array: features.astype(jnp.float32)"),
    (np.zeros((3, 2), np.float32), np.zeros(1, int), TypeError, "points has dtype int64; wanted a floating-point array: points.astype(jnp.float32)"),
    (np.zeros((3, 2), np.float32), np.zeros(1, np.complex64), TypeError, "points has dtype complex64; wanted a floating-point array"),
    ([[1.0]], np.zeros(1, np.float32), TypeError, "features is a list; wanted an array (wrap it in jnp.asarray)"),
    (np.zeros((3, 2), np.float32), 1.5, TypeError, "points is a float; wanted an array (wrap it in jnp.asarray)"),
]  # fmt: skip


@pytest.mark.parametrize(("features", "points", "error", "message"), ERRORS)
def test_errors(features, points, error, message):
    with pytest.raises(error) as raised:
        linear_sample(features, points)
    assert message in str(raised.value)


@pytest.mark.parametrize(("features", "points", "error", "message"), ERRORS[:4])
def test_errors_at_trace_time(features, points, error, message):
    with pytest.raises(error) as raised:
        jax.eval_shape(linear_sample, features, points)
    assert message in str(raised.value)


def test_outside_of_jit_it_is_the_same():
    features, points = draw((4, 3), whole=0.2)
    assert_close(linear_sample(features, points), sample(features, points), 1e-6)
