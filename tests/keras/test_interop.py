"""`to_keras` and `from_keras`: the same numbers on both sides, and errors that name what does not go along."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import linen, nnx

from dcn_jax import nnx as ours
from dcn_jax.interop import from_keras, to_keras
from dcn_jax.keras import DeformConv1D, DeformConv2D, DeformConv3D, MSDeformAttn
from tests.keras.support import fill, first, last, normal

WILD = {"offset_kernel_init": nnx.initializers.normal(0.5), "offset_bias_init": nnx.initializers.normal(0.5)}


def conv(window=(3, 3), **options):
    return ours.DeformConv(4, 6, window, rngs=nnx.Rngs(0), **WILD, **options)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": None, "kernel_dilation": None, "use_bias": False, "modulated": False},
        {"strides": 2, "kernel_dilation": 2, "padding": 3, "offset_groups": 2, "feature_group_count": 2},
        {"padding": "SAME_LOWER", "padding_mode": "edge", "mask_scale": 2.0, "max_offset": 1.5},
        {"padding": "CIRCULAR", "offset_activation": jnp.tanh},
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
        {"dtype": jnp.float16, "offset_bias_init": nnx.initializers.normal(2.0)},
    ],
)
def test_both_ways_give_the_same_numbers(rank, options):
    layer = ours.DeformConv(4, 6, (3,) * rank, rngs=nnx.Rngs(0), **{**WILD, **options})
    x = normal(2, *(9, 7, 8)[:rank], 4)
    theirs = to_keras(layer)
    assert type(theirs) is {1: DeformConv1D, 2: DeformConv2D, 3: DeformConv3D}[rank]
    back = from_keras(theirs)
    for other in (theirs, back):
        y = other(x)
        assert y.dtype == layer(x).dtype
        np.testing.assert_array_equal(y, layer(x))
    for before, after in zip(*(jax.tree.leaves(nnx.state(each, nnx.Param)) for each in (layer, back)), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


def test_a_layer_without_a_branch():
    layer, x, offset = conv(offset_branch=False), normal(2, 7, 6, 4), normal(2, 7, 6, 18)
    theirs = to_keras(layer)
    np.testing.assert_array_equal(theirs([x, offset]), layer(x, offset))
    np.testing.assert_array_equal(from_keras(theirs)(x, offset), layer(x, offset))


def test_channels_first_become_last():
    layer = DeformConv2D(6, 3, data_format="channels_first", offset_kernel_initializer="random_normal")
    x = normal(2, 4, 7, 6)
    y = layer(x)
    np.testing.assert_allclose(from_keras(layer)(last(x)), last(y), rtol=0, atol=1e-6)
    assert first(last(x)).shape == x.shape


@pytest.mark.parametrize(
    "options", [{}, {"num_points": (3, 2), "method": "discrete"}, {"dtype": jnp.bfloat16}, {"num_axes": 3}]
)
def test_attention(options):
    layer = ours.MSDeformAttn(16, 4, 2, **{"num_points": 3, **options}, rngs=nnx.Rngs(0))
    theirs = fill(to_keras(layer))
    n = layer.num_axes
    levels = ((5, 4, 3)[:n], (3, 2, 1)[:n])
    pixels = sum(map(np.prod, levels))
    arrays = normal(2, 7, 16), normal(2, 7, 2, n, seed=1) * 0.3 + 0.5, normal(2, pixels, 16, seed=2)
    y = theirs(*arrays, spatial_shapes=levels)
    back = from_keras(theirs)
    np.testing.assert_array_equal(back(*arrays, levels), y)
    np.testing.assert_array_equal(to_keras(back)(*arrays, spatial_shapes=levels), y)


def test_the_copies_are_their_own():
    layer = conv()
    theirs = to_keras(layer)
    kernel = np.array(layer.kernel)
    back = from_keras(theirs)
    fill(theirs)
    np.testing.assert_array_equal(layer.kernel, kernel)
    np.testing.assert_array_equal(back.kernel, kernel)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: conv(precision="highest"), ValueError, "the layer was made with precision, which"),
        (
            lambda: conv(preferred_element_type=jnp.float32, offset_in_features=3),
            ValueError,
            "made with preferred_element_type, offset_in_features, which",
        ),
        (
            lambda: conv(offset_conv_cls=functools.partial(nnx.Conv, kernel_size=(1, 1))),
            ValueError,
            "made with offset_conv_cls, which",
        ),
        (
            lambda: conv(dtype=jnp.float16, param_dtype=jnp.bfloat16),
            ValueError,
            "dtype=float16 with param_dtype=bfloat16",
        ),
        (lambda: ours.MSDeformAttn(16, 4, precision="high", rngs=nnx.Rngs(0)), ValueError, "made with precision"),
        (lambda: ours.DCNv3(16, rngs=nnx.Rngs(0)), TypeError, "layer is a DCNv3; wanted a DeformConv or"),
        (
            lambda: linen.Conv(4, (3, 3)),
            TypeError,
            "layer is a Conv; wanted a DeformConv or MSDeformAttn of dcn_jax.nnx",
        ),
    ],
)
def test_what_keras_has_not(make, error, message):
    with pytest.raises(error, match=message):
        to_keras(make())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DeformConv2D(6, 3), ValueError, "has no weights yet; call it once"),
        (lambda: MSDeformAttn(16, 4), ValueError, "has no weights yet; call it once"),
        (lambda: keras.layers.Conv2D(6, 3), TypeError, "layer is a Conv2D; wanted DeformConv1D, DeformConv2D"),
    ],
)
def test_what_nnx_has_not(make, error, message):
    with pytest.raises(error, match=message):
        from_keras(make())


def test_an_activation_does_not_go_along():
    layer = DeformConv2D(6, 3, activation="relu")
    layer.build((None, 7, 6, 4))
    with pytest.raises(ValueError, match="activation=relu is not taken along"):
        from_keras(layer)


def test_weights_of_lora_are_merged():
    layer = to_keras(ours.MSDeformAttn(16, 4, 2, 3, rngs=nnx.Rngs(0)))
    layer.value_proj.enable_lora(2)
    layer.value_proj.lora_kernel_b.assign(normal(2, 16))
    kernel = keras.ops.convert_to_numpy(layer.value_proj.kernel)
    np.testing.assert_allclose(from_keras(layer).value_proj.kernel, kernel, rtol=0, atol=1e-6)
