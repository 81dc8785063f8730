"""What `to_onnx` refuses, each in a sentence that says where, what was given, and what to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import dcn_jax.linen
from dcn_jax.interop import from_linen, to_onnx
from dcn_jax.nnx import DCNv3, DeformConv, MSDeformAttn
from tests.support.onnx_models import SHAPE

pytestmark = pytest.mark.lenient

partial = functools.partial


def layer(*shape, **options):
    return DeformConv(*shape, **options, rngs=nnx.Rngs(0))


REFUSED = {
    "SAME, open": ((4, 3, (3, 3), 2), {}, "padding='SAME' at strides .2, 2. depends on the size of the map.*'height'.*as ints"),
    "border": ((4, 3, (3, 3)), {"padding_mode": ("zeros", "wrap")}, r"padding='SAME' with padding_mode=\('zeros', 'wrap'\) has"),
    "circular": ((4, 3, (3, 3)), {"padding": "CIRCULAR"}, r"padding='CIRCULAR' with padding_mode=\('wrap', 'wrap'\) has"),
    "crop": ((4, 3, (3, 3)), {"padding": -1}, "padding=-1 crops.*jax.export"),
    "one axis": ((4, 3, (3,)), {}, "kernel_size=.3,. has 1 spatial axes.*jax.export"),
    "no branch": ((4, 3, (3, 3)), {"offset_branch": False}, "offset_branch=False.*graph.add.*or give offset in input_shape"),
    "channels": ((5, 3, (3, 3)), {}, "its input has 4 channels; wanted 5"),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_layers_without_a_form_in_onnx(shape, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        to_onnx(layer(*shape, **options), SHAPE)


class ResNet(nnx.Module):
    """Named as one that is known."""

    def __call__(self, x):
        return x


class Doubled(DeformConv):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Renamed(DeformConv):
    pass


def test_a_subclass_is_known_where_it_computes_the_same():
    assert "DeformConv" in [node.op_type for node in to_onnx(Renamed(4, 3, (3, 3), rngs=nnx.Rngs(0)), SHAPE).graph.node]
    with pytest.raises(ValueError, match="Doubled is not known"):
        to_onnx(Doubled(4, 3, (3, 3), rngs=nnx.Rngs(0)), SHAPE)


def own(*args, **kwargs):
    return args[0]


def stacked(kind, *shape):
    return nnx.vmap(lambda rngs: kind(*shape, rngs=rngs))(nnx.Rngs(0).split(5))


USUAL = "has no known nodes: leave it out, or use jax.export"
PARTS = {
    "a module": (lambda rngs: ResNet(), r"layers.0: tests.interop.onnx.test_errors.ResNet is not known; wanted one of .*dcn_jax.models.resnet.ResNet.*converters=\{ResNet: f\}"),
    "a branch": (
        lambda rngs: DeformConv(4, 4, (3, 3), offset_conv_cls=lambda *_, rngs: ResNet(), rngs=rngs),
        "layers.0.offset_conv: .*ResNet is not known",
    ),
    "a function": (lambda rngs: jnp.cos, "jax.numpy.cos is not known"),
    "positional": (lambda rngs: partial(nnx.leaky_relu, 0.1), "functools.partial of flax.nnx.leaky_relu has options by position.*by name"),
    "a mean of all": (lambda rngs: jnp.mean, r"the mean over axis=None takes in axis 0, the batch.*axis=\(1, 2\)"),
    "a mean over the batch": (lambda rngs: partial(jnp.mean, axis=(0, 1)), r"the mean over axis=\(0, 1\) takes in axis 0"),
    "no such axis": (lambda rngs: partial(nnx.softmax, axis=4), "the softmax over axis=4 does not fit an array of 4 axes"),
    "an option": (lambda rngs: partial(jnp.mean, axis=1, dtype=jnp.float32), r"jax.numpy.mean cannot be added so: .*'dtype'; options that are known: axis, keepdims"),
    "an option of none": (lambda rngs: partial(nnx.relu, x=1), "flax.nnx.relu cannot be added so: .*'x'; it has no options"),
    "no window": (lambda rngs: nnx.max_pool, "flax.nnx.max_pool cannot be added so: missing a required argument: 'window_shape'"),
    "dilated input": (lambda rngs: nnx.Conv(4, 4, (3, 3), input_dilation=2, rngs=rngs), "layers.0: input_dilation=2"),
    "a convolution": (lambda rngs: nnx.Conv(4, 4, (3, 3), conv_general_dilated=own, rngs=rngs), f"layers.0: its own conv_general_dilated {USUAL}"),
    "a product": (lambda rngs: nnx.Linear(4, 4, dot_general=own, rngs=rngs), f"layers.0: its own dot_general {USUAL}"),
    "a promotion": (lambda rngs: DeformConv(4, 4, (3, 3), promote_dtype=own, rngs=rngs), f"layers.0: its own promote_dtype {USUAL}"),
    "of devices": (lambda rngs: nnx.LayerNorm(4, axis_name="i", rngs=rngs), f"layers.0: its own axis_name {USUAL}"),
    "another axis": (lambda rngs: nnx.BatchNorm(4, axis=1, rngs=rngs), "layers.0: axis=1 is not the axis of channels"),
    "a layer norm": (lambda rngs: nnx.LayerNorm(4, reduction_axes=(1, 2), rngs=rngs), r"layers.0: reduction_axes=\(1, 2\) is not the axis of channels"),
    "a group norm": (lambda rngs: nnx.GroupNorm(4, 2, reduction_axes=(1, -1), rngs=rngs), r"layers.0: reduction_axes=\(1, -1\) has no form"),
    "a map of fewer axes": (lambda rngs: nnx.Conv(4, 4, 3, rngs=rngs), r"layers.0: a window of \(3,\) does not fit a map"),
    "transposed": (lambda rngs: nnx.ConvTranspose(4, 4, 3, rngs=rngs), r"layers.0: a window of \(3,\) does not fit a map"),
    "circular": (lambda rngs: nnx.ConvTranspose(4, 4, (3, 3), padding="CIRCULAR", rngs=rngs), "layers.0: padding='CIRCULAR' of a ConvTranspose"),
    "wide": (lambda rngs: nnx.ConvTranspose(4, 4, (3, 3), padding=3, rngs=rngs), "layers.0: padding=3 is wider than ONNX"),
    "a stack": (lambda rngs: stacked(nnx.Conv, 4, 4, (3, 3)), r"layers.0: kernel has shape \(5, 3, 3, 4, 4\); wanted 4 axes. A stack of layers .nnx.vmap."),
    "a stack of deformable": (lambda rngs: stacked(DeformConv, 4, 4, (3, 3)), r"layers.0.offset_conv: kernel has shape \(5, 3, 3, 4, 27\)"),
    "a stack of norms": (lambda rngs: stacked(nnx.LayerNorm, 4), r"layers.0: scale has shape \(5, 4\); wanted 1 axes"),
    "DCNv3's channels": (lambda rngs: DCNv3(8, group=2, rngs=rngs), "layers.0: its input has 4 channels; wanted 8"),
    "DCNv3's activation": (lambda rngs: DCNv3(4, group=2, act_layer=jnp.cos, rngs=rngs), "layers.0.dw_conv: jax.numpy.cos is not known"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), PARTS.values(), ids=PARTS.keys())
def test_parts_that_are_not_known(make, message):
    with pytest.raises(ValueError, match=f"^(layers.0: |){message}"):
        to_onnx(nnx.Sequential(make(nnx.Rngs(0))), SHAPE)


def test_a_model_without_values():
    model = nnx.eval_shape(lambda: nnx.Sequential(layer(4, 3, (3, 3))))
    with pytest.raises(
        ValueError, match=r"^layers.0.offset_conv: kernel has a shape and no values.*from_torch or nnx.update"
    ):
        to_onnx(model, SHAPE)


def test_a_layer_of_linen_and_the_advice_about_it():
    given = dcn_jax.linen.DeformConv(3, (3, 3))
    with pytest.raises(
        TypeError, match=r"^layer is a DeformConv; wanted a flax.nnx module. For a module of flax.linen, make"
    ):
        to_onnx(given, SHAPE)
    with pytest.raises(TypeError, match="For a module of flax"):
        to_onnx(linen.Conv(3, (3, 3)), SHAPE)
    params = given.init(jax.random.key(0), jnp.zeros((1, 5, 5, 4)))["params"]
    to_onnx(from_linen(layer(4, 3, (3, 3)), params), SHAPE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": jnp.cos}, TypeError, "layer is a .*; wanted a flax.nnx module"),
        ({"opset": 18}, ValueError, "opset=18; wanted an int from 19, the first with DeformConv, to"),
        ({"opset": 16, "decompose": True}, ValueError, "opset=16; wanted an int from 17 to"),
        ({"opset": 22.0}, ValueError, "opset=22.0; wanted an int from 19"),
        ({"input_shape": ()}, ValueError, r"input_shape=\(\) is not understood"),
        ({"input_shape": "bhwc"}, ValueError, "input_shape='bhwc' is not understood"),
        ({"input_shape": (None, None, None, None)}, ValueError, "its input has no number of channels; make the last size in input_shape the int 4"),
        ({"input_shape": (None, 0, 8, 4)}, ValueError, "a size of input_shape=0 is too small"),
        ({"input_shape": (None, 8.0, 8, 4)}, TypeError, "a size of input_shape=8.0 is a float"),
        ({"input_shape": {}}, ValueError, "input_shape=.* is not understood; wanted the names"),
        ({"input_shape": {"inputs": 4}}, ValueError, r"input_shape\['inputs'\]=4 is not understood"),
        ({"input_shape": {"input": SHAPE}}, ValueError, "the arguments input do not fit the call DeformConv.*missing"),
        ({"input_shape": {"inputs": SHAPE}, "constants": {"inputs": 1}}, ValueError, "'inputs' is in input_shape and in constants"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(arguments, error, message):
    given = {"layer": layer(4, 3, (3, 3)), "input_shape": SHAPE} | arguments
    with pytest.raises(error, match=f"^{message}"):
        to_onnx(**given)


SHAPES = {"query": (2, 5, 8), "reference_points": (2, 5, 2, 2), "value": (2, 10, 8)}
LEVELS = {"spatial_shapes": ((2, 3), (2, 2))}
ATTENTION = {
    "no levels": (SHAPES, {}, "the arguments .*missing a required argument: 'spatial_shapes'.*what stays the same in constants"),
    "levels as an input": (SHAPES | {"spatial_shapes": (2, 2)}, {}, "spatial_shapes is an input, and a graph must know it: constants="),
    "other levels": (SHAPES, {"spatial_shapes": ((2, 5),)}, "spatial_shapes=.* has 1 levels of 2 sizes; wanted 2 for each of num_levels=2"),
    "pixels": (SHAPES | {"value": (2, 9, 8)}, LEVELS, r"value has shape \(2, 9, 8\); wanted 10 pixels"),
    "channels": (SHAPES | {"query": (2, 5, 6)}, LEVELS, "query has 6 channels; wanted 8"),
    "axes": (SHAPES | {"query": (1, 2, 5, 8)}, LEVELS, r"query has shape \(1, 2, 5, 8\); wanted three axes"),
    "other images": (SHAPES | {"query": (3, 5, 8)}, LEVELS, r"query has shape \(3, 5, 8\); wanted the batch of value, 2, or 1"),
    "points": (SHAPES | {"reference_points": (2, 4, 2, 2)}, LEVELS, r"reference_points has shape \(2, 4, 2, 2\); wanted \(2, 5, 2, '2 or 4'\)"),
    "mask": (SHAPES | {"padding_mask": (2, 2, 3)}, LEVELS, r"padding_mask has shape \(2, 2, 3\); wanted \(2, 10\)"),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "constants", "message"), ATTENTION.values(), ids=ATTENTION.keys())
def test_attention(shapes, constants, message):
    model = MSDeformAttn(embed_dim=8, num_heads=2, num_levels=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"^{message}"):
        to_onnx(model, shapes, constants=constants)


def test_one_shape_for_a_call_of_several_arrays():
    model = MSDeformAttn(embed_dim=8, num_heads=2, num_levels=2, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError,
        match=r"^the arguments input do not fit .*'reference_points'; give the shapes of its arrays as a dict",
    ):
        to_onnx(model, (2, 5, 8))


def test_constants_that_nothing_takes():
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^the arguments input, gain do not fit the call Linear.*'gain'"):
        to_onnx(layer, (None, 4), constants={"gain": 2.0})


def test_a_module_without_a_call():
    with pytest.raises(TypeError, match=r"^layer is a Module without __call__"):
        to_onnx(nnx.Module(), (None, 4))


def bounded(z):
    """A function that the table does not know."""
    return 10 * jnp.tanh(z)


def test_the_advice_for_a_function_works():
    """Its converter gets no module; a function without a name is to be given one."""
    net = nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)), bounded)
    message = r"Pass converters=\{bounded: f\}, where f\(graph, x\) adds its nodes"
    with pytest.raises(ValueError, match=message):
        to_onnx(net, (1, 5, 6, 4))
    ten = np.float32(10)
    to_onnx(net, (1, 5, 6, 4), converters={bounded: lambda graph, x: graph.node("Mul", graph.node("Tanh", x), ten)})
    net = nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)), lambda z: z)
    with pytest.raises(ValueError, match=r"Give it a name, function, and pass converters=\{function: f\}"):
        to_onnx(net, (1, 5, 6, 4))
