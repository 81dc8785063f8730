"""`deform_conv` against the numbers that other projects' tests hold their own ops to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dcn_jax
from tests.support.running import value_and_gradients

# facebookresearch/detectron2 at 01ae81af: tests/layers/test_deformable.py, test_forward_output. A 5×5 ramp, a 3×3 kernel
# of ones, padding 1, every offset 0.5.
DETECTRON2 = [
    [30, 41.25, 48.75, 45, 28.75],
    [62.25, 81, 90, 80.25, 50.25],
    [99.75, 126, 135, 117.75, 72.75],
    [105, 131.25, 138.75, 120, 73.75],
    [71.75, 89.25, 93.75, 80.75, 49.5],
]


@pytest.mark.parametrize("modulation", [None, 0.5])
def test_detectron2_forward_output(op, modulation):
    x, kernel, offset = np.arange(25.0).reshape(5, 5, 1), np.ones((3, 3, 1, 1)), np.full((5, 5, 18), 0.5)
    mask = None if modulation is None else np.full((5, 5, 9), modulation, np.float32)
    y = jax.jit(functools.partial(op, padding=1))(*_float32(x, kernel, offset), mask)
    np.testing.assert_allclose(y[..., 0], np.array(DETECTRON2) * (modulation or 1), rtol=1e-6)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("modulated", [True, False])
def test_detectron2_small_input(op, size, modulated):
    """A map smaller than the kernel."""
    spatial, taps = (size - 1, size - 1), size**2
    arrays = _float32(np.ones((1, *spatial, 1)), np.ones((size, size, 1, 1)), np.ones((1, *spatial, 2 * taps)))
    mask = jnp.ones((1, *spatial, taps), jnp.float32) if modulated else None
    assert jax.eval_shape(functools.partial(op, padding=size // 2), *arrays, mask).shape == (1, *spatial, 1)


@pytest.mark.parametrize(("offset_channels", "mask_channels", "name"), [(9, 9, "offset"), (18, 18, "mask")])
def test_detectron2_raise_exception(op, offset_channels, mask_channels, name):
    arrays = [np.ones(shape) for shape in [(3, 3, 1), (3, 3, 1, 1), (3, 3, offset_channels), (3, 3, mask_channels)]]
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        op(*_float32(*arrays), padding=1)


# open-mmlab/mmcv at 0c3f157f: tests/test_ops/test_deform_conv.py. A layer that learns its offsets, with a 2×2 kernel and no
# padding; the gradients are those of the sum of the result. Channels first, as there.
MMCV_V1 = {
    "x": [[[[1, 2, 3], [0, 1, 2], [3, 5, 2]]]],
    "kernel": [[[[0.4, 0.2], [0.1, 0.9]]]],
    "offset_kernel": [
        [[[0.1, 0.4], [0.6, 0.1]]], [[[0.3, 0.2], [0.1, 0.3]]], [[[0.5, 0.5], [0.2, 0.8]]], [[[0.8, 0.3], [0.9, 0.1]]],
        [[[0.3, 0.1], [0.2, 0.5]]], [[[0.3, 0.7], [0.5, 0.3]]], [[[0.6, 0.2], [0.5, 0.3]]], [[[0.4, 0.1], [0.8, 0.4]]],
    ],
    "offset_bias": [0.7, 0.1, 0.8, 0.5, 0.6, 0.5, 0.4, 0.7],
}  # fmt: skip
MMCV_V1_EXPECTED = {
    "y": [[[[1.65, 0], [0, 0]]]],
    "x": [[[[-0.666, 0.204, 0], [0.030, -0.416, 0.012], [0, 0.252, 0.129]]]],
    "kernel": [[[[3.62, 0], [0.40, 0.18]]]],
    "offset_kernel": [
        [[[1.44, 2.88], [0, 1.44]]], [[[-0.72, -1.44], [0, -0.72]]], [[[0, 0], [0, 0]]], [[[0, 0], [0, 0]]],
        [[[-0.10, -0.20], [0, -0.10]]], [[[-0.08, -0.16], [0, -0.08]]],
        [[[-0.54, -1.08], [0, -0.54]]], [[[-0.54, -1.08], [0, -0.54]]],
    ],
    "offset_bias": [1.44, -0.72, 0, 0, -0.10, -0.08, -0.54, -0.54],
}  # fmt: skip

# open-mmlab/mmcv at 08653020: tests/test_ops/test_modulated_deform_conv.py. The modulated layer as it starts: a 2×2 kernel
# of ones, padding 1, offsets and logits zero.
MMCV_V2 = {
    "x": [[[[1, 2, 3], [1, 2, 3], [1, 2, 3]]]],
    "kernel": np.ones((1, 1, 2, 2)),
    "offset_kernel": np.zeros((12, 1, 2, 2)),
    "offset_bias": np.zeros(12),
}
MMCV_V2_EXPECTED = {
    "y": [[[[0.5, 1.5, 2.5, 1.5], [1.0, 3.0, 5.0, 3.0], [1.0, 3.0, 5.0, 3.0], [0.5, 1.5, 2.5, 1.5]]]],
    "x": [[[[2, 2, 2], [2, 2, 2], [2, 2, 2]]]],
    "kernel": [[[[9, 9], [9, 9]]]],
    "offset_kernel": [
        [[[-7, -4], [0, 0]]], [[[-9, 7.5], [-6, 5]]], [[[-4, -7], [0, 0]]], [[[-7.5, -9], [-5, -6]]],
        [[[-7, -4], [-7, -4]]], [[[-6, 5], [-9, 7.5]]], [[[-4, -7], [-4, -7]]], [[[-5, -6], [-7.5, -9]]],
        [[[10.5, 6], [7, 4]]], [[[6, 10.5], [4, 7]]], [[[7, 4], [10.5, 6]]], [[[4, 7], [6, 10.5]]],
    ],
    "offset_bias": [-3, -1.5, -3, -1.5, -3, -1.5, -3, -1.5, 4.5, 4.5, 4.5, 4.5],
}  # fmt: skip
# The same by torchvision 0.29.1, which like this library takes the right-hand derivative where a tap reads at exactly -1 or
# at the map's size; mmcv takes zero for both axes there. The logits do not care.
TORCHVISION_V2_EXPECTED = MMCV_V2_EXPECTED | {
    "offset_kernel": [
        [[[-7, -4], [7, 4]]], [[[-9, 9], [-6, 6]]], [[[-4, -7], [4, 7]]], [[[-7.5, -9], [-5, -6]]],
        [[[-7, -4], [-7, -4]]], [[[-6, 6], [-9, 9]]], [[[-4, -7], [-4, -7]]], [[[-5, -6], [-7.5, -9]]],
        *MMCV_V2_EXPECTED["offset_kernel"][8:],
    ],
    "offset_bias": [0, 0, 0, -1.5, -3, 0, -3, -1.5, 4.5, 4.5, 4.5, 4.5],
}  # fmt: skip


def _float32(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def _offset_conv(params, padding):
    """What mmcv's layer convolves its offsets and logits from: `(N, H, W, 8 or 12)`."""
    z = lax.conv_general_dilated(
        params["x"],
        params["offset_kernel"],
        (1, 1),
        [(padding, padding)] * 2,
        dimension_numbers=("NCHW", "OIHW", "NHWC"),
    )
    return z + params["offset_bias"].reshape(1, 1, 1, -1)


def _deform(op, params, z, padding):
    """The layer's result, `(N, 1, H, W)`, from z."""
    mask = jax.nn.sigmoid(z[..., 8:]) if z.shape[-1] > 8 else None
    x, kernel = params["x"].transpose(0, 2, 3, 1), params["kernel"].transpose(2, 3, 1, 0)
    return op(x, kernel, z[..., :8], mask, padding=padding).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("params", "padding", "expected"),
    [(MMCV_V1, 0, MMCV_V1_EXPECTED), (MMCV_V2, 1, TORCHVISION_V2_EXPECTED)],
    ids=["deform_conv", "modulated_deform_conv"],
)
def test_mmcv_values_and_gradients(op, params, padding, expected):
    @jax.jit
    def values_and_gradients(params):
        def total(params):
            y = _deform(op, params, _offset_conv(params, padding), padding)
            return y.sum(), y

        gradients, y = jax.grad(total, has_aux=True)(params)
        return gradients | {"y": y}

    actual = values_and_gradients({name: jnp.asarray(value, jnp.float32) for name, value in params.items()})
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_mmcv_differs_only_where_a_tap_reads_at_the_border(op):
    """With the offset's gradients zeroed where mmcv zeroes them, the parameters' are those of its test."""
    params = {name: jnp.asarray(value, jnp.float32) for name, value in MMCV_V2.items()}

    points = dcn_jax.sampling_points(jnp.zeros((1, 4, 4, 8), jnp.float32), (2, 2), padding=1, spatial=(3, 3))
    outside = np.any((points <= -1) | (points >= 3), axis=-1).repeat(2, axis=-1).reshape(1, 4, 4, 8)
    assert outside.any()

    @jax.jit
    def gradients(params):
        z_bar = jax.grad(lambda z: _deform(op, params, z, 1).sum())(_offset_conv(params, 1))
        z_bar = z_bar.at[..., :8].multiply((~outside).astype(np.float32))
        _, (d_params,) = value_and_gradients(lambda params: _offset_conv(params, 1), (params,), z_bar)
        return d_params

    actual = gradients(params)
    for name in ("offset_kernel", "offset_bias"):
        np.testing.assert_allclose(actual[name], MMCV_V2_EXPECTED[name], rtol=1e-5, atol=1e-5, err_msg=name)
