"""Flax's layers and functions in ONNX, for each option that has a form there, over open sizes."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcn_jax.interop import to_onnx
from tests.support.onnx_models import SHAPE, check, checked, filled, images, operators

pytestmark = pytest.mark.lenient

partial = functools.partial

LAYERS = {
    "Conv": partial(nnx.Conv, 4, 6, (3, 2), 2, padding=((1, 0), (2, 1)), kernel_dilation=2, feature_group_count=2),
    "Conv, masked, no bias": partial(nnx.Conv, 4, 6, (2, 2), mask=np.tri(4, 6) * np.ones((2, 2, 1, 1)), use_bias=False),
    "ConvTranspose": partial(nnx.ConvTranspose, 4, 6, (3, 2), (2, 3)),
    "ConvTranspose, torch's kernel": partial(nnx.ConvTranspose, 4, 6, (4, 3), 2, padding=((2, 1), (1, 2)), transpose_kernel=True),
    "ConvTranspose, VALID, dilated": partial(nnx.ConvTranspose, 4, 3, (2, 3), (3, 2), padding="VALID", kernel_dilation=(1, 2)),
    "ConvTranspose, masked, no bias": partial(
        nnx.ConvTranspose, 4, 6, (2, 2), padding=1, mask=np.tri(4, 6) * np.ones((2, 2, 1, 1)), use_bias=False
    ),
    "Linear": partial(nnx.Linear, 4, 6),
    "Linear, no bias": partial(nnx.Linear, 4, 6, use_bias=False),
    "BatchNorm": partial(nnx.BatchNorm, 4, epsilon=1e-3),
    "BatchNorm, bare": partial(nnx.BatchNorm, 4, use_scale=False, use_bias=False),
    "LayerNorm": partial(nnx.LayerNorm, 4, epsilon=1e-2),
    "LayerNorm, bare": partial(nnx.LayerNorm, 4, use_scale=False, use_bias=False),
    "GroupNorm": partial(nnx.GroupNorm, 4, 2, epsilon=1e-2),
    "GroupNorm, bare": partial(nnx.GroupNorm, 4, num_groups=None, group_size=1, use_scale=False, use_bias=False),
    "Dropout": partial(nnx.Dropout, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_layers(make):
    model = filled(lambda rngs: make(rngs=rngs))
    check(checked(model, SHAPE), model, images(2, 6, 5, 4))
    if not isinstance(model, nnx.Conv | nnx.ConvTranspose):
        check(checked(model, (None, 4)), model, images(3, 4))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("kind", [nnx.Conv, nnx.ConvTranspose])
def test_convolutions_over_one_and_three_axes(kind, rank):
    model = filled(lambda rngs: kind(2, 3, (2, 3, 2)[:rank], rngs=rngs))
    check(checked(model, (None,) * (rank + 1) + (2,)), model, images(2, *(4, 5, 3)[:rank], 2), reference=False)


@pytest.mark.parametrize(("taps", "strides"), [(1, 3), (2, 2), (5, 2), (3, 1)])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_the_size_of_a_transposed_convolution(taps, strides, padding):
    model = filled(lambda rngs: nnx.ConvTranspose(2, 3, (taps,), (strides,), padding=padding, rngs=rngs))
    proto = checked(model, (1, 6, 2))
    size = proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    assert size == model(images(1, 6, 2)).shape[1]
    check(proto, model, images(1, 6, 2), reference=False)


def test_a_causal_convolution():
    model = filled(lambda rngs: nnx.Conv(4, 3, (3,), padding="CAUSAL", kernel_dilation=2, rngs=rngs))
    check(checked(model, (None, None, 4)), model, images(2, 6, 4))
    with pytest.raises(
        ValueError, match=r"^padding='CAUSAL' is for one spatial axis, and kernel_size=\(3, 3\) has more"
    ):
        to_onnx(nnx.Conv(4, 3, (3, 3), padding="CAUSAL", rngs=nnx.Rngs(0)), SHAPE)


@pytest.mark.parametrize("count", [5, 1])
def test_an_embedding(count):
    model = filled(lambda rngs: nnx.Embed(count, 3, rngs=rngs))
    ids = np.random.default_rng(0).integers(0, 5, (2, 4)).astype(np.int32)
    check(checked(model, (None, None)), model, ids)
    check(checked(nnx.Sequential(model, nnx.relu, nnx.Conv(3, 2, (3,), rngs=nnx.Rngs(0))), (2, 4)),
          nnx.Sequential(model, nnx.relu, nnx.Conv(3, 2, (3,), rngs=nnx.Rngs(0))), ids)  # fmt: skip


FUNCTIONS = [
    nnx.relu,
    nnx.relu6,
    nnx.leaky_relu,
    partial(nnx.leaky_relu, negative_slope=0.3),
    nnx.sigmoid,
    nnx.tanh,
    nnx.silu,
    nnx.gelu,
    partial(nnx.gelu, approximate=False),
    partial(nnx.max_pool, window_shape=(3, 2), strides=(2, 1), padding=((1, 1), (0, 1))),
    partial(nnx.max_pool, window_shape=(2, 2)),
    partial(nnx.avg_pool, window_shape=(2, 3), padding="SAME"),
    partial(nnx.avg_pool, window_shape=(2, 2), padding="SAME", count_include_pad=False),
    partial(jnp.mean, axis=(1, 2)),
    partial(jnp.mean, axis=(-3, -2), keepdims=True),
    partial(jnp.mean, axis=1),
    partial(jnp.mean, axis=-1),
    partial(jnp.mean, axis=(2, -1), keepdims=True),
    nnx.softmax,
    partial(nnx.softmax, axis=1),
    partial(nnx.softmax, axis=(1, 2)),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=range(len(FUNCTIONS)))
def test_functions(function):
    """In both orders of axes that an array may have inside a graph: a pool leaves it channels first."""
    x = 4 * images(2, 6, 5, 4)
    for before in [], [partial(nnx.max_pool, window_shape=(1, 1))]:
        check(checked(nnx.Sequential(*before, function), SHAPE, opset=19), function, x)


def test_before_opset_18():
    model = nnx.Sequential(partial(nnx.softmax, axis=(1, 2)), partial(jnp.mean, axis=(1, 2)))
    check(checked(model, SHAPE, opset=17, decompose=True), model, images(2, 6, 5, 4))


def test_layers_of_a_transformer_turn_nothing_around():
    """Where no operator needs channels first, no array is transposed."""
    parts = (nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.LayerNorm(8, rngs=nnx.Rngs(1)), nnx.softmax)
    assert operators(to_onnx(nnx.Sequential(*parts), (None, None, 4))) == [
        "MatMul", "Add", "Relu", "LayerNormalization", "Softmax",
    ]  # fmt: skip
