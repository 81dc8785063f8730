"""DeformConv in ONNX, as its node and without that node: each option, given offsets, open and known sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from onnx import helper, numpy_helper

from dcn_jax.interop import to_onnx
from dcn_jax.nnx import DeformConv
from tests.support.onnx_models import SHAPE, check, checked, filled, images, operators

pytestmark = pytest.mark.lenient


def layer(*shape, scale=0.3, **options):
    """A DeformConv whose offsets lead up to a few pixels away, and out of the map."""
    return filled(lambda rngs: DeformConv(*shape, **options, rngs=rngs), scale=scale)


LAYERS = {
    "modulated": ((4, 6, (3, 3)), {}),
    "not modulated, no bias": ((4, 6, (3, 3)), {"modulated": False, "use_bias": False}),
    "modulated, no bias": ((4, 6, (2, 2)), {"use_bias": False, "padding": "VALID"}),
    "groups": ((4, 6, (3, 2)), {"feature_group_count": 2, "offset_groups": 4, "padding": ((1, 0), (2, 1))}),
    "strides, dilations": ((4, 3, (2, 3)), {"strides": (2, 1), "kernel_dilation": (1, 2), "padding": (1, 2)}),
    "SAME_LOWER": ((4, 3, (2, 2)), {"padding": "SAME_LOWER"}),
    "a stride that SAME does not pad for": ((4, 3, (1, 1)), {"strides": 2}),
    "scaled and bounded": ((4, 3, (3, 3)), {"mask_scale": 2.0, "max_offset": 1.5}),
    "bounded on one axis": ((4, 3, (2, 2)), {"offset_groups": 2, "max_offset": (None, 0.7)}),
    "undeformed on one axis": ((4, 3, (2, 2)), {"offset_groups": 2, "max_offset": (0, 2.0)}),
    "bfloat16 parameters": ((4, 3, (2, 2)), {"param_dtype": jnp.bfloat16}),
    "a branch of 1×1": ((4, 3, (3, 3)), {"offset_conv_cls": functools.partial(nnx.Conv, kernel_size=(1, 1))}),
}


# The others are slow together.
ALWAYS = {False: ("modulated", "bounded on one axis"), True: ("groups",)}


def names(decompose):
    return [pytest.param(name, marks=[] if name in ALWAYS[decompose] else [pytest.mark.slow]) for name in LAYERS]


def check_layer(name, decompose):
    shape, options = LAYERS[name]
    model = layer(*shape, **options)
    proto = checked(model, SHAPE, decompose=decompose)
    check(proto, model, images(1, 4, 5, 4), images(3, 4, 9, 4))
    assert ("DeformConv" in operators(proto), "GridSample" in operators(proto)) == (not decompose, decompose)


@pytest.mark.parametrize("name", names(False))
def test_over_open_sizes(name):
    check_layer(name, decompose=False)


@pytest.mark.parametrize("name", names(True))
def test_without_the_node(name):
    check_layer(name, decompose=True)


@pytest.mark.parametrize("opset", [17, 22])
def test_without_the_node_over_known_sizes(opset):
    """Offsets of many pixels, as one would see nowhere; no array of sizes is left in the graph."""
    model = layer(4, 6, (3, 3), scale=3.0, offset_groups=2)
    proto = checked(model, (None, 6, 5, 4), decompose=True, opset=opset)
    assert not {"Shape", "Range"} & set(operators(proto))
    check(proto, model, images(2, 6, 5, 4), reference=opset >= 20)


@pytest.mark.parametrize("window", [(3,), pytest.param((2, 3, 2), marks=pytest.mark.slow)], ids=["1-D", "3-D"])
def test_over_one_and_three_axes(window):
    model = layer(2, 3, window, offset_groups=2, strides=(2, 1, 1)[: len(window)], padding=1)
    spatial = (4, 5, 3)[: len(window)]
    check(checked(model, (*(None for _ in (0, *window)), 2), decompose=True), model, images(2, *spatial, 2))
    with pytest.raises(
        ValueError, match=f"^kernel_size=.* has {len(window)} spatial axes.*decompose=True, or use jax.export"
    ):
        to_onnx(model, (None, *spatial, 2))


@pytest.mark.parametrize("decompose", [False, True])
def test_infinite_offsets_read_zero(decompose):
    model = layer(4, 3, (1, 1), offset_branch=False)
    offset = images(1, 3, 4, 2)
    offset[0, 0] = [[np.inf, 0], [0, -np.inf], [1e30, 1], [-1e30, -1]]
    given = {"inputs": images(1, 3, 4, 4), "offset": offset}
    check(
        checked(model, {name: array.shape for name, array in given.items()}, decompose=decompose),
        model,
        given,
        reference=False,
    )


@pytest.mark.parametrize(
    ("padding", "size"),
    [
        ("SAME", (6, 5)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("SAME", (7, 8)), ("SAME_LOWER", (6, 5)), ("SAME_LOWER", (7, 8)))
        ),
    ],
)
def test_same_with_strides_over_known_sizes(size, padding):
    model = layer(4, 3, (3, 2), strides=(2, 3), padding=padding)
    check(checked(model, (None, *size, 4)), model, images(1, *size, 4), images(3, *size, 4), reference=False)


@pytest.mark.slow
def test_a_branch_of_several_layers():
    def branch(features_in, features, *, rngs):
        first = nnx.Conv(features_in, 5, (3, 3), rngs=rngs)
        return nnx.Sequential(first, nnx.relu, nnx.Conv(5, features, (1, 1), rngs=rngs))

    model = layer(4, 3, (3, 3), offset_conv_cls=branch)
    check(checked(model, SHAPE), model, images(2, 6, 5, 4), reference=False)


# ---- the call's other arguments

CALLS = {
    "offset": {"offset": (2, 6, 5, 18)},
    "offset, mask": {"offset": (2, 6, 5, 36), "mask": (2, 6, 5, 18)},
    "one for all images": {"offset": (1, 6, 5, 18), "mask": (6, 5, 9)},
    "offset_inputs": {"offset_inputs": (2, 6, 5, 4)},
    "flow": {"base_offset": (2, 6, 5, 2), "offset_inputs": (2, 6, 5, 4)},
    "a base for each tap, of all images": {"base_offset": (6, 5, 18)},
}


ALWAYS_CALLED = {False: ("one for all images", "flow"), True: ("offset, mask",)}


@pytest.mark.parametrize(
    ("arguments", "decompose"),
    [
        pytest.param(CALLS[name], decompose, marks=[] if name in ALWAYS_CALLED[decompose] else [pytest.mark.slow])
        for name in CALLS
        for decompose in (False, True)
    ],
)
def test_several_inputs(arguments, decompose):
    """The groups of offsets that are given are read off their channels, as the layer does."""
    model = layer(4, 3, (3, 3), max_offset=2.0)
    shapes = {"inputs": (2, 6, 5, 4)} | arguments
    given = {name: images(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    opened = {name: (None, *shape[1:]) if shape[0] == 2 else shape for name, shape in shapes.items()}
    proto = checked(model, opened, decompose=decompose)
    assert [x.name for x in proto.graph.input] == list(shapes)
    check(proto, model, given, reference=False)


WRONG = {
    "offset": ({"offset": (2, 6, 5, 4)}, r"offset has 4 channels; wanted OG \* 18: K \* n = 9 \* 2 values for each"),
    "offset's size": ({"offset": (2, 5, 6, 18)}, r"offset has shape \(2, 5, 6, 18\); wanted \(2, 6, 5, 18\)"),
    "other images": ({"offset": (3, 6, 5, 18)}, r"offset has shape \(3, 6, 5, 18\); wanted \(2, 6, 5, 18\)"),
    "mask": ({"offset": (2, 6, 5, 18), "mask": (2, 6, 5, 8)}, r"mask has shape \(2, 6, 5, 8\); wanted \(2, 6, 5, 9\)"),
    "mask alone": ({"mask": (2, 6, 5, 9)}, "mask was given without offset"),
    "too many": ({"offset": (2, 6, 5, 18), "base_offset": (2, 6, 5, 2)}, "offset_inputs or base_offset was given beside"),
    "base": ({"base_offset": (2, 6, 5, 3)}, r"base_offset has shape \(2, 6, 5, 3\); wanted \(2, 6, 5, 18\)"),
    "offset_inputs": ({"offset_inputs": (2, 6, 5, 3)}, "offset_inputs has 3 channels; wanted 4"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        to_onnx(layer(4, 3, (3, 3)), {"inputs": (2, 6, 5, 4)} | arguments)


# ---- the graph


def attributes_of(node):
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def test_one_node_computes_it():
    """The graph, node by node; its weights are the layer's, and there are no others of their size."""
    model = layer(
        4, 6, (3, 2), strides=2, padding=((1, 0), (2, 1)), feature_group_count=2, offset_groups=2, mask_scale=2.0
    )
    proto = checked(model, SHAPE)
    assert operators(proto) == ["Transpose", "Conv", "Slice", "Slice", "Sigmoid", "Mul", "DeformConv", "Transpose"]
    (node,) = [node for node in proto.graph.node if node.op_type == "DeformConv"]
    assert attributes_of(node) == {
        "kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 2, 0, 1], "dilations": [1, 1], "group": 2, "offset_group": 2,
    }  # fmt: skip
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    np.testing.assert_array_equal(arrays[node.input[1]], model.kernel[...].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(arrays[node.input[3]], model.bias[...])
    assert sum(array.size for array in arrays.values()) < sum(v.size for v in jax.tree.leaves(nnx.state(model))) + 10


def test_a_function_that_bounds_offsets():
    """A layer may have one (`offset_activation`); it is called with the taps on an axis of their own."""
    model = layer(4, 3, (2, 3))
    model.offset_activation = jnp.tanh
    bounded = layer(4, 3, (2, 3), max_offset=1.0)
    check(checked(model, SHAPE), bounded, images(2, 5, 4, 4), reference=False)
    model.offset_activation = jnp.cos
    with pytest.raises(ValueError, match=r"^jax.numpy.cos is not known"):
        to_onnx(model, SHAPE)
