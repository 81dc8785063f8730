"""The rows and weights of points, against NumPy in float64, which pads a map of the rows' numbers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax.geometry import PADDING_MODES, resolve_window
from dcn_jax.ops.deform_conv.pallas_gpu.points import locate_points

MARGIN = 12  # pixels: more than any point of a case lies beyond the map


def expected(window, groups, offset, mask):
    """Rows and weights `(B, OG * K, corners, P)` of finite offsets within the margin, one point after another."""
    rows = np.arange(np.prod(window.spatial)).reshape(window.spatial)
    for axis, mode in enumerate(window.padding_mode):
        width = [(MARGIN, MARGIN) if a == axis else (0, 0) for a in range(window.rank)]
        rows = np.pad(rows, width, **({"constant_values": -1} if mode == "zeros" else {"mode": mode}))
    shape = (len(offset), groups * window.taps, 2**window.rank, np.prod(window.out_spatial))
    row, weight = np.empty(shape, int), np.empty(shape)
    offset = np.float64(offset).reshape(len(offset), shape[-1], groups, window.taps, window.rank)
    mask = np.ones(offset.shape[:-1]) if mask is None else np.float64(mask).reshape(offset.shape[:-1])
    positions, taps = list(np.ndindex(*window.out_spatial)), list(np.ndindex(*window.size))
    for image, position, group, tap in np.ndindex(offset.shape[:-1]):
        at = np.array(positions[position]) * window.strides - np.array(window.pads)[:, 0]
        at = at + np.array(taps[tap]) * window.dilation + offset[image, position, group, tap]
        for corner, step in enumerate(itertools.product((0, 1), repeat=window.rank)):
            pixel = np.floor(at).astype(int) + step
            number = rows[tuple(pixel + MARGIN)]
            here = (image, group * window.taps + tap, corner, position)
            row[here] = number * groups + group if number >= 0 else np.prod(window.spatial) * groups
            weight[here] = np.prod(1 - np.abs(at - pixel)) * mask[image, position, group, tap]
    return row, weight


def draw(window, groups, images=2, masked=True):
    rng = np.random.default_rng(0)
    offset = rng.uniform(-3, 3, (images, *window.out_spatial, groups * window.taps * window.rank))
    offset = np.where(rng.random(offset.shape) < 0.2, np.round(offset), offset).astype(np.float32)
    mask = rng.random((images, *window.out_spatial, groups * window.taps)).astype(np.float32) if masked else None
    return offset, mask


CASES = {
    "plain": (((3, 3), {"spatial": (5, 6)}), 1),
    "groups": (((2, 3), {"spatial": (4, 5)}), 3),
    "strides, dilation": (((3, 2), {"spatial": (7, 8), "strides": (2, 3), "kernel_dilation": (1, 2)}), 2),
    "padding": (((3, 2), {"spatial": (5, 4), "padding": ((2, 0), (0, 3))}), 1),
    "1-D": (((4,), {"spatial": (7,), "kernel_dilation": 2}), 2),
    "3-D": (((1, 2, 3), {"spatial": (2, 3, 4)}), 2),
    **{mode: (((3, 3), {"spatial": (4, 5), "padding_mode": mode}), 2) for mode in PADDING_MODES[1:]},
    "mixed": (((2, 2, 2), {"spatial": (2, 3, 1), "padding_mode": ("edge", "zeros", "reflect")}), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_and_weights(name):
    (size, options), groups = CASES[name]
    window = resolve_window(size, **options)
    offset, mask = draw(window, groups, masked=name != "plain")
    row, weight = jax.jit(functools.partial(locate_points, window, groups))(offset, mask)
    assert (row.dtype, weight.dtype) == (jnp.int32, jnp.float32)
    wanted_row, wanted_weight = expected(window, groups, offset, mask)
    np.testing.assert_array_equal(row, wanted_row)
    np.testing.assert_allclose(weight, wanted_weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_far_points_read_the_border_or_nothing_and_a_nan_weighs_nan(mode):
    window = resolve_window((1, 1), spatial=(4, 5), padding_mode=mode)
    offset = np.zeros((1, 4, 5, 2), np.float32)
    offset[0, 0, 0], offset[0, 1, 2], offset[0, 2, 2] = (-np.inf, 0), (1e30, -1e30), (np.nan, 0)
    row, weight = (np.asarray(a)[0, 0] for a in locate_points(window, 1, offset, None))  # (corners, P)
    outside, (first, second, lost, near) = 20, (0, 7, 12, 19)
    if mode == "edge":
        assert set(row[weight[:, first] > 0, first]) == {0}
        assert set(row[:, second]) == {15}
    else:
        assert set(row[:, first]) == set(row[:, second]) == {outside}
    assert set(row[:, lost]) == {outside}
    assert np.isnan(weight[:, lost]).all()
    np.testing.assert_array_equal(weight[:, near], [1, 0, 0, 0])
    assert row[0, near] == 19
    assert np.isfinite(np.delete(weight, lost, axis=1)).all()


def test_positions_in_float64_are_exact(x64):
    """As with XLA. Only the weights are rounded, to the float32 that the kernels load."""
    window = resolve_window((1,), spatial=(2**26,), strides=2**26)
    offset, mask = np.full((1, 1, 1), 2.0**25 + 0.3), np.full((1, 1, 1), 1 / 3)
    row, weight = locate_points(window, 1, offset, mask)
    np.testing.assert_array_equal(row[0, 0, :, 0], [2**25, 2**25 + 1])
    np.testing.assert_allclose(weight[0, 0, :, 0], [0.7 / 3, 0.3 / 3], rtol=1e-7)
    assert (row.dtype, weight.dtype) == (np.int32, np.float32)
