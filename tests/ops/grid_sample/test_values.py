"""`grid_sample` by values that can be checked by hand, and where torch says nothing: halves, kinks, what is far or NaN."""

import functools

import jax
import numpy as np
import pytest

from dcn_jax import grid_sample, linear_sample
from dcn_jax.geometry import PADDING_MODES
from tests.support import oracle
from tests.support.running import assert_close, compiled, value_and_gradients

ROW = np.float32([10, 20, 30, 40])[:, None]


def at_pixels(features, pixels, **options):
    """`grid_sample` at positions in pixels of a 1-D map."""
    grid = (2 * np.float32(pixels) + 1) / features.shape[0] - 1
    return compiled(grid_sample, **options)(features, grid[:, None])[:, 0]


@pytest.mark.parametrize(
    ("mode", "linear", "nearest"),
    [
        ("edge", [10, 40, 40], [10, 40, 40]),
        ("wrap", [35, 12.5, 25], [30, 10, 10]),
        ("reflect", [25, 27.5, 25], [30, 30, 30]),
        ("symmetric", [15, 37.5, 10], [10, 40, 10]),
        ("zeros", [0, 0, 0], [0, 0, 0]),
    ],
)
def test_a_row_read_beyond_its_ends(mode, linear, nearest):
    """Half way the pixel that is even in the map, wherever in its continuation the position lies."""
    for method, wanted in (("linear", linear), ("nearest", nearest)):
        read = at_pixels(ROW, [-1.5, 4.25, 7.5], method=method, padding_mode=mode)
        np.testing.assert_array_equal(read, wanted, err_msg=method)


def test_nearest_rounds_half_to_even():
    pixels = [-0.75, -0.5, -0.25, 0.5, 0.75, 1.5, 2.5, 3.5]
    wanted = [0, 10, 10, 10, 20, 30, 30, 0]
    np.testing.assert_array_equal(at_pixels(ROW, pixels, method="nearest"), wanted)


def test_x_comes_first():
    image = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    grid = np.float32([[1, -1], [-1, 1]])
    read = compiled(grid_sample, align_corners=True)
    np.testing.assert_array_equal(read(image, grid)[:, 0], [3, 8])
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4, 1)
    grid = np.float32([[1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    np.testing.assert_array_equal(read(volume, grid)[:, 0], [3, 8, 12])


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("mode", ["wrap", "reflect", "symmetric", ("edge", "wrap")])
def test_modes_that_torch_has_not(mode, align_corners):
    """Those of `linear_sample`, one per axis too, whatever align_corners."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((4, 3, 2)).astype(np.float32)
    grid = rng.uniform(-2.5, 2.5, (20, 2))
    size = np.array([3, 4])
    pixels = (grid + 1) / 2 * (size - 1) if align_corners else ((grid + 1) * size - 1) / 2
    margin, modes = 9, (mode, mode) if isinstance(mode, str) else mode
    padded = features
    for axis, name in enumerate(modes):
        padded = np.pad(padded, [(margin, margin) if a == axis else (0, 0) for a in range(3)], mode=name)
    y = compiled(grid_sample, padding_mode=mode, align_corners=align_corners)(features, grid.astype(np.float32))
    assert_close(y, oracle.linear_sample(padded, pixels[:, ::-1] + margin), 1e-5)


@pytest.mark.parametrize(("batch", "query"), [((), ()), ((2, 3), (4,)), ((0,), (3,)), ((2,), (0,)), ((2,), (2, 1, 3))])
def test_any_batch_and_query(batch, query):
    rng = np.random.default_rng(0)
    features, grid = rng.standard_normal((*batch, 3, 4, 2)), rng.uniform(-1.5, 1.5, (*batch, *query, 2))
    y = compiled(grid_sample)(features.astype(np.float32), grid.astype(np.float32))
    assert y.shape == (*batch, *query, 2)
    pixels = ((grid + 1) * [4, 3] - 1)[..., ::-1] / 2
    for image in np.ndindex(*batch):
        assert_close(y[image], oracle.linear_sample(features[image], pixels[image]), 1e-5)


def test_complex():
    features = (ROW + 1j * ROW[::-1]).astype(np.complex64)
    y = grid_sample(features, np.float32([[-0.5], [0.1]]))
    assert y.dtype == np.complex64
    for part, wanted in ((y.real, ROW), (y.imag, ROW[::-1])):
        assert_close(part, grid_sample(wanted, np.float32([[-0.5], [0.1]])), 1e-6)


@pytest.mark.parametrize("align_corners", [True, False])
def test_the_derivative_at_a_whole_pixel_is_the_right_hand_one(align_corners):
    size = 5 if align_corners else 4  # of which the grid's numbers are exact
    features = np.random.default_rng(0).standard_normal((size, 1)).astype(np.float32)
    pixels = np.arange(-2, size + 2)
    grid = pixels / np.float32(2) - 1 if align_corners else (2 * pixels + 1) / np.float32(size) - 1
    scale = (size - 1) / 2 if align_corners else size / 2
    read = lambda g: grid_sample(features, g[None], align_corners=align_corners)[0]  # noqa: E731
    slope = jax.jit(jax.vmap(jax.grad(read)))(np.float32(grid))
    wanted = scale * np.diff(np.pad(features[:, 0], (2, 3)))
    np.testing.assert_allclose(slope, wanted, rtol=1e-6)


@pytest.mark.parametrize(("size", "align_corners"), [(1, True), (4, False)])
@pytest.mark.parametrize("method", ["linear", "nearest", "cubic"])
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_far_and_nan_positions_disturb_nothing(mode, method, size, align_corners):
    """Also on a map of one pixel, where ±inf times its size less one would be a NaN."""
    features = ROW[:size]
    bad = np.float32([np.inf, -np.inf, 1e30, -1e30, np.finfo(np.float32).max, np.nan])
    grid = np.concatenate([bad, np.float32([0.25, -0.3])])[:, None]
    read = functools.partial(grid_sample, method=method, padding_mode=mode, align_corners=align_corners)
    run = jax.jit(functools.partial(value_and_gradients, read))
    y, (d_features, d_grid) = run((features, grid), np.ones_like(grid))
    one_pixel = size == 1 and align_corners  # where all finite positions are pixel 0
    far = [features[-1, 0], features[0, 0]] if mode == "edge" else [0, 0]
    np.testing.assert_array_equal(y[:2, 0], far)
    if not one_pixel:
        np.testing.assert_array_equal(y[2:5, 0], [*far, far[0]])
    np.testing.assert_array_equal(d_grid[:5, 0], 0)
    assert np.isnan(y[5])
    clean, (_, d_clean) = run((features, grid[6:]), np.ones_like(grid[6:]))
    np.testing.assert_array_equal(y[6:], clean)
    np.testing.assert_array_equal(d_grid[6:], d_clean)
    assert np.isfinite(d_features).all()


@pytest.mark.parametrize("method", ["linear", "nearest", "cubic"])
def test_an_infinite_pixel_reaches_only_those_that_read_it(method):
    features = ROW.copy()
    features[0] = np.inf
    beyond = (-2.5, 2) if method == "cubic" else (-1.5, 1)  # as near as they may be without reading it
    read = at_pixels(features, [beyond[0], -2e9, beyond[1], 2.25, 0, 30], method=method)
    np.testing.assert_array_equal(np.isfinite(read), [True, True, True, True, False, True])


def test_blocks_that_do_not_divide_the_queries():
    """37 queries of 9 pixels: the derivative takes them in blocks, whose last one overlaps."""
    rng = np.random.default_rng(0)
    features, grid = np.float32(rng.standard_normal((3, 3, 2))), np.float32(rng.uniform(-1.2, 1.2, (37, 2)))
    features[1, 1], grid[36] = np.inf, np.nan
    cotangent = np.float32(rng.standard_normal((37, 2)))
    pixels = ((grid + 1) * 3 - 1)[:, ::-1] / 2

    def run(read, points):
        return jax.jit(functools.partial(value_and_gradients, read))((features, points), cotangent)

    y, (d_features, d_grid) = run(grid_sample, grid)
    wanted, (wanted_features, wanted_pixels) = run(linear_sample, pixels)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    assert_close(d_features, wanted_features, 1e-5)
    np.testing.assert_allclose(d_grid, 1.5 * wanted_pixels[:, ::-1], rtol=1e-5, atol=1e-5)
