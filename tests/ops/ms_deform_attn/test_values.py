"""`ms_deform_attn` by values that can be checked by hand, and by what must not disturb what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax import ms_deform_attn
from dcn_jax.ops.weighted_reads import sum as weighted_reads
from tests.support.running import assert_close, value_and_gradients

SHAPES = ((3, 4), (2, 2))


def read(row, xs, **options):
    """A 1×W map of one channel read at (x, 0.5), one point a query, all weights 1."""
    row, xs = np.float32(row), np.float32(xs)
    locations = np.stack([xs, np.full_like(xs, 0.5)], axis=-1)[:, None, None, None]
    weights = np.ones((len(xs), 1, 1, 1), np.float32)
    return ms_deform_attn(row[:, None, None], ((1, len(row)),), locations, weights, **options)[:, 0]


def draw(queries=6, heads=2, channels=3, points=2, seed=0, dtype=np.float32, batch=()):
    """Arguments whose locations lie away from the kinks, some outside."""
    rng = np.random.default_rng(seed)
    size = np.array(SHAPES)[:, None, ::-1]
    shape = (*batch, queries, heads, len(SHAPES), points)
    pixels = rng.integers(-2, size + 1, (*shape, 2)) + rng.uniform(0.1, 0.4, (*shape, 2))
    value = rng.standard_normal((*batch, 16, heads, channels))
    return tuple(a.astype(dtype) for a in (value, (pixels + 0.5) / size, rng.random(shape)))


def attend(value, locations, weights, **options):
    return jax.jit(lambda *a: ms_deform_attn(a[0], SHAPES, *a[1:], **options))(value, locations, weights)


def with_gradients(value, locations, weights, **options):
    run = functools.partial(value_and_gradients, functools.partial(attend, **options))
    return jax.jit(run)((value, locations, weights), np.ones((len(weights), 6), np.float32))


@pytest.mark.parametrize("queries", [0, 1, 8, 21])
def test_blocks_of_queries_as_on_a_tpu(queries, monkeypatch):
    """A block that would end beyond the queries begins early, and reads some of them again."""
    arrays, chosen, algorithms = draw(queries, batch=(2,)), [], weighted_reads.algorithms
    wanted = attend(*arrays)

    def as_on_tpu(*arguments):
        of_sum, of_derivatives = algorithms(*arguments)
        chosen.append(dict(of_sum)["tpu"])
        return (("default", chosen[-1]),), of_derivatives

    monkeypatch.setattr(weighted_reads, "algorithms", as_on_tpu)
    jax.clear_caches()
    np.testing.assert_allclose(attend(*arrays), wanted, atol=1e-6)
    jax.clear_caches()
    assert {made.blocks.number for made in chosen} == {{0: 0, 1: 1, 8: 8, 21: 7}[queries]}


def test_a_map_of_one_pixel():
    locations = np.float32([[0, 0], [0.5, 0.5], [1, 1]])[:, None, None, None]
    y = ms_deform_attn(np.ones((1, 1, 1), np.float32), ((1, 1),), locations, np.ones((3, 1, 1, 1), np.float32))
    np.testing.assert_array_equal(y[:, 0], [0.25, 1, 0.25])


def test_a_row_at_its_end():
    np.testing.assert_allclose(read(np.ones(10), [0.95, 1.0, 1.5]), [1, 0.5, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        # at locations of pixels -1, -0.5, 0, 0.5, 0.75, 1.5, 3.5, 9
        ("nearest", [0, 10, 10, 10, 20, 30, 0, 0]),
        ("discrete", [10, 10, 20, 20, 20, 30, 40, 40]),
    ],
)
def test_one_pixel_alone(method, wanted):
    """Halves go to the even pixel, outside is zero; or down after half a pixel more, and never outside."""
    pixels = np.array([-1, -0.5, 0, 0.5, 0.75, 1.5, 3.5, 9])
    np.testing.assert_array_equal(read([10, 20, 30, 40], (pixels + 0.5) / 4, method=method), wanted)


def test_discrete_clamps_each_axis_by_its_own_size():
    value = np.arange(6, dtype=np.float32)[:, None, None]  # 2 rows of 3
    locations = np.float32([[9, 0], [0, 9], [0.9, 0.1]])[:, None, None, None]
    y = ms_deform_attn(value, ((2, 3),), locations, np.ones((3, 1, 1, 1), np.float32), method="discrete")
    np.testing.assert_array_equal(y[:, 0], [2, 3, 2])


def test_heads_lie_one_after_another():
    value = np.float32([[[1, 2], [30, 40]]])  # one pixel, two heads of two channels
    locations, weights = np.full((1, 2, 1, 1, 2), 0.5, np.float32), np.float32([[[[1]], [[10]]]])
    np.testing.assert_array_equal(ms_deform_attn(value, ((1, 1),), locations, weights), [[1, 2, 300, 400]])


@pytest.mark.parametrize("batch", [(), (2, 2), (0,)])
def test_any_batch(batch):
    arguments = draw(batch=batch)
    y = attend(*arguments)
    assert y.shape == (*batch, 6, 6)
    for image in np.ndindex(*batch):
        assert_close(y[image], attend(*[a[image] for a in arguments]), 1e-6)


def test_no_queries():
    assert attend(*draw(queries=0)).shape == (0, 6)


def test_complex():
    value, locations, weights = draw()
    y = attend((value + 1j * value[::-1]).astype(np.complex64), locations, weights)
    assert_close(y.real, attend(value, locations, weights), 1e-6)
    assert_close(y.imag, attend(value[::-1], locations, weights), 1e-6)


@pytest.mark.parametrize("method", ["linear", "nearest", "discrete"])
def test_far_and_nan_locations_disturb_nothing(method):
    """50 queries, so that the derivative takes them in blocks which overlap."""
    value, locations, weights = draw(queries=50)
    changed = locations.copy()
    far = {3: np.inf, 20: -np.inf, 30: 1e30, 49: np.finfo(np.float32).max}
    for query, number in far.items():
        changed[query, 0, 1, 0, 0] = number
    changed[48, 1, 0, 1, 1] = np.nan
    y, (d_value, d_locations, _) = with_gradients(value, changed, weights, method=method)
    clean, (_, clean_d, _) = with_gradients(value, locations, weights, method=method)
    own = (changed != locations).any(axis=(2, 3, 4))  # (Q, M)
    heads = np.asarray(y).reshape(50, 2, 3)
    np.testing.assert_array_equal(heads[~own], np.asarray(clean).reshape(50, 2, 3)[~own])
    np.testing.assert_array_equal(d_locations[~own], clean_d[~own])
    assert np.isnan(heads[48, 1]).all()
    assert np.isfinite(heads[[*far], 0]).all()
    assert np.isfinite(d_value).all()
    np.testing.assert_array_equal(d_locations[[*far], 0, 1, 0], 0)
    if method != "discrete":  # far reads zero, as if its weight were
        without = weights.copy()
        without[[*far], 0, 1, 0] = 0
        assert_close(heads[[*far], 0], np.asarray(attend(value, locations, without, method=method)).reshape(50, 2, 3)[[*far], 0], 1e-5)  # fmt: skip


@pytest.mark.parametrize("queries", [6, 50])
def test_an_infinite_pixel_reaches_only_those_that_read_it(queries):
    value, locations, weights = draw(queries=queries)
    value[5, 1] = np.inf  # pixel (1, 1) of the first level
    y, (_, d_locations, d_weights) = with_gradients(value, locations, weights)
    pixels = locations[:, 1, 0] * np.float32([4, 3]) - 0.5  # (Q, P, 2)
    reads = np.zeros((queries, 2), bool)
    reads[:, 1] = (np.abs(pixels - 1) < 1).all(axis=-1).any(axis=-1)
    assert reads.any()
    assert not reads.all()
    np.testing.assert_array_equal(~np.isfinite(np.asarray(y).reshape(queries, 2, 3)).all(axis=-1), reads)
    for gradient in (d_locations, d_weights):
        assert np.isfinite(np.asarray(gradient)[~reads]).all()


def test_the_derivative_at_a_whole_pixel_is_the_right_hand_one():
    row = np.random.default_rng(0).standard_normal(4).astype(np.float32)
    xs = (np.arange(-2, 6) + 0.5) / 4
    slope = jax.jit(jax.grad(lambda xs: jnp.sum(read_jax(row, xs))))(jnp.float32(xs))
    np.testing.assert_allclose(slope, 4 * np.diff(np.pad(row, (2, 3))), rtol=1e-6)


def read_jax(row, xs):
    locations = jnp.stack([xs, jnp.full_like(xs, 0.5)], axis=-1)[:, None, None, None]
    return ms_deform_attn(row[:, None, None], ((1, 4),), locations, jnp.ones((len(xs), 1, 1, 1)))


def test_wide_weights_are_not_rounded(x64):
    """Weights of float64 beside values and locations of float32: they cancel to 1e-9, which float32 would lose."""
    value, locations = jnp.ones((1, 1, 1), jnp.float32), jnp.full((1, 1, 1, 2, 2), 0.5, jnp.float32)
    weights = jnp.array([1 + 1e-9, -1.0]).reshape(1, 1, 1, 2)
    y = ms_deform_attn(value, ((1, 1),), locations, weights)
    np.testing.assert_allclose(y, 1e-9, rtol=1e-3)
