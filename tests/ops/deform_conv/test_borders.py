"""What the map is beyond its border: against the oracle on a map that NumPy has padded, and by what Flax's Conv does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcn_jax import linear_sample
from dcn_jax.geometry import PADDING_MODES, resolve_window
from tests.support import oracle
from tests.support.cases import draw
from tests.support.running import assert_close, compiled, value_and_gradients

quick = pytest.mark.quick
MARGIN = 9  # pixels: more than any point of a case lies beyond the map

CASES = {
    "2-D": draw((2, 4, 5, 4), (3, 2), 3, offset_groups=2, padding=((2, 1), (0, 3))),
    "strides, dilation": draw((1, 5, 4, 2), (3, 3), 2, strides=(2, 1), kernel_dilation=(1, 2)),
    "1-D": draw((2, 4, 2), (3,), 2, mask=False),
    "3-D": draw((1, 2, 3, 2, 2), (1, 2, 2), 2),
    "one pixel": draw((1, 1, 2, 2), (3, 2), 2),
}
MIXED = ("wrap", "zeros", "symmetric")


def padded(x, modes, margin=MARGIN):
    """x `(B, *spatial, C)` as NumPy or JAX continues it along each axis."""
    pad = jnp.pad if isinstance(x, jax.Array) else np.pad
    for axis, mode in enumerate(modes, 1):
        width = [(margin, margin) if a == axis else (0, 0) for a in range(x.ndim)]
        x = pad(x, width, mode="constant" if mode == "zeros" else mode)
    return x


def moved(case):
    """The options of a call on the padded map."""
    rank = case.arrays[1].ndim - 2
    options = {name: value for name, value in case.options.items() if name != "feature_group_count"}
    window = resolve_window(case.arrays[1].shape[:rank], spatial=case.arrays[0].shape[1:-1], **options)
    return case.options | {"padding": tuple((low - MARGIN, high - MARGIN) for low, high in window.pads)}


def marks(name, mode):
    """The GPU kernels always run over one border of each kind; long cases are slow for all."""
    if (name, mode) in (("2-D", "mixed"), ("one pixel", "edge"), ("one pixel", "reflect")):
        return (quick,)
    return () if name in ("2-D", "one pixel") else (pytest.mark.slow,)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=marks(name, mode), id=f"{name}-{mode}")
        for name in CASES
        for mode in (*PADDING_MODES[1:], "mixed")
    ],
)
def test_equals_the_oracle_on_a_padded_map(op, name, mode):
    case = CASES[name]
    x, *rest = case.arrays
    modes = MIXED[: x.ndim - 2] if mode == "mixed" else (mode,) * (x.ndim - 2)
    op = functools.partial(op, padding_mode=modes, **case.options)
    wanted = oracle.deform_conv(padded(x, modes), *rest, **moved(case))
    cotangent = np.random.default_rng(1).standard_normal(wanted.shape).astype(np.float32)

    y, gradients = jax.jit(functools.partial(value_and_gradients, op))(case.arrays, cotangent)
    assert_close(y, wanted, 1e-5)
    exact = oracle.gradients(cotangent, padded(x, modes), *rest, **moved(case))
    _, fold = jax.vjp(functools.partial(padded, modes=modes), jnp.asarray(x))
    assert_close(gradients[0], fold(jnp.asarray(exact[0], jnp.float32))[0], 1e-5)
    for gradient, wanted in zip(gradients[1:], exact[1:], strict=True):
        if gradient is not None:
            assert_close(gradient, wanted, 1e-5)


# Values that can be checked by hand

ROW = np.float32([10, 20, 30, 40])[:, None]


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("edge", [10, 40, 40]),
        ("wrap", [35, 12.5, 25]),
        ("reflect", [25, 27.5, 25]),
        ("symmetric", [15, 37.5, 10]),
        ("zeros", [0, 0, 0]),
    ],
)
def test_a_row_read_beyond_its_ends(op, mode, wanted):
    points = np.float32([[-1.5], [4.25], [7.5]])
    np.testing.assert_array_equal(compiled(linear_sample, padding_mode=mode)(ROW, points)[:, 0], wanted)
    kernel, offset = np.ones((1, 1, 1), np.float32), np.float32([[-1.5], [3.25], [5.5], [0]])
    y = compiled(op, padding_mode=mode)(ROW, kernel, offset)
    np.testing.assert_array_equal(y[:3, 0], wanted)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_far_points_read_the_border_or_zero_without_a_gradient(mode):
    far = np.float32([np.inf, -np.inf, 1e30, -1e30, 2.0**30, -(2.0**31)])
    read = functools.partial(linear_sample, ROW, padding_mode=mode)
    y, (slope,) = jax.jit(functools.partial(value_and_gradients, read))((far[:, None],), np.ones((6, 1), np.float32))
    np.testing.assert_array_equal(y[:, 0], [40, 10, 40, 10, 40, 10] if mode == "edge" else np.zeros(6))
    np.testing.assert_array_equal(slope, np.zeros((6, 1)))


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_a_nan_disturbs_nothing_but_its_own_output(mode):
    points = np.float32([[0.5], [np.nan], [2.25]])
    run = functools.partial(value_and_gradients, functools.partial(linear_sample, padding_mode=mode))
    y, (d_features, d_points) = jax.jit(run)((ROW, points), np.ones((3, 1), np.float32))
    np.testing.assert_array_equal(y[:, 0], [15, np.nan, 32.5])
    np.testing.assert_array_equal(d_features[:, 0], [0.5, 0.5, 0.75, 0.25])
    np.testing.assert_array_equal(d_points[[0, 2], 0], [10, 10])


@pytest.mark.parametrize("mode", PADDING_MODES[1:])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_derivative_at_a_whole_number_is_the_right_hand_one(mode, size):
    features = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    points = np.arange(-7, size + 6, dtype=np.float32)
    read = lambda p: linear_sample(features[:, None], p[None], padding_mode=mode)[0]  # noqa: E731
    slope = jax.jit(jax.vmap(jax.grad(read)))(points)
    np.testing.assert_array_equal(slope, np.diff(np.pad(features, (7, 7), mode=mode)))


@pytest.mark.parametrize("mode", ["wrap", "reflect", "symmetric"])
def test_points_many_periods_away(mode):
    """Reduced as whole numbers, and so exactly."""
    periods = {"wrap": 4, "reflect": 6, "symmetric": 8}[mode] * 2**22
    points = np.float32([[0.5], [1.0], [3.0]])
    read = compiled(linear_sample, padding_mode=mode)
    near = read(ROW, points)
    offset = np.float64(points) + np.float64([[periods], [-periods], [periods]])
    with jax.enable_x64(True):
        np.testing.assert_array_equal(read(ROW, offset), near)


# Flax's own


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT"])
@pytest.mark.parametrize("window", [(3, 3), (2, 4)])
def test_without_offsets_it_is_flaxs_convolution(op, padding, strides, window):
    x = np.random.default_rng(0).standard_normal((2, 7, 9, 3)).astype(np.float32)
    options = {"strides": strides, "padding": padding, "kernel_dilation": (1, 2)}

    @jax.jit
    def both(x):
        conv = nnx.Conv(3, 4, window, rngs=nnx.Rngs(0), **options)
        wanted = conv(x)
        offset = jnp.zeros((*wanted.shape[:-1], 2 * window[0] * window[1]))
        return op(x, conv.kernel[...], offset, None, conv.bias[...], **options), wanted

    assert_close(*both(x), 1e-6)


@pytest.mark.parametrize("modes", [("zeros", "wrap"), ("wrap", "wrap")])
def test_a_rolled_panorama_gives_a_rolled_result(op, modes):
    """At offsets of many pixels, several times around."""
    (x, kernel, offset, mask, bias), _ = draw((1, 6, 8, 4), (3, 3), 4, offset_groups=2)
    op = jax.jit(functools.partial(op, padding=1, padding_mode=modes))
    y = op(x, kernel, 5 * offset, mask, bias)
    roll = functools.partial(np.roll, shift=3, axis=2)
    assert_close(op(roll(x), kernel, roll(5 * offset), roll(mask), bias), roll(np.asarray(y)), 1e-5)
