"""`to_onnx`: what onnxruntime and ONNX's reference evaluator compute of a model is what the model computes."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dcn_jax.interop import to_onnx
from dcn_jax.models.resnet import BasicBlock, Bottleneck, ResNet, resnet50
from dcn_jax.nnx import DeformConv
from tests.support.running import assert_close

pytestmark = pytest.mark.lenient

SHAPE = (None, None, None, 4)


def filled(make, seed=0, scale=0.3):
    """What `make(rngs)` makes, with every parameter and statistic from N(0, scale²), variances from U(0.5, 2)."""
    model, rng = make(nnx.Rngs(0)), np.random.default_rng(seed)

    def fill(path, variable):
        shape = variable.shape
        values = rng.uniform(0.5, 2, shape) if path[-1] == "var" else rng.normal(0, scale, shape)
        return variable.replace(jnp.asarray(values, variable.dtype))

    nnx.update(model, nnx.map_state(fill, nnx.state(model, (nnx.Param, nnx.BatchStat))))
    model.eval()
    return model


def layer(*shape, **options):
    """A DeformConv whose offsets lead up to a few pixels away, and out of the map."""
    return filled(lambda rngs: DeformConv(*shape, **options, rngs=rngs))


def images(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def checked(model, input_shape, **options):
    """The ONNX model, once onnx has nothing against it."""
    proto = to_onnx(model, input_shape, **options)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def check_runtime(proto, model, *inputs, tolerance=1e-5):
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for x in inputs:
        (y,) = session.run(["output"], {"input": x})
        assert_close(y, jax.jit(lambda x: model(x))(x), tolerance)


def attributes_of(node):
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


# ---- one layer

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


ALWAYS = ("modulated", "groups", "strides, dilations", "bounded on one axis")  # the others are slow together


@pytest.mark.parametrize(
    ("shape", "options"),
    [pytest.param(*LAYERS[name], id=name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in LAYERS],
)
def test_a_layer_over_open_sizes(shape, options):
    model = layer(*shape, **options)
    proto = checked(model, SHAPE)
    check_runtime(proto, model, images(1, 6, 5, 4), images(3, 4, 9, 4))

    x = images(1, 4, 5, 4)
    (y,) = ReferenceEvaluator(checked(model, SHAPE, opset=19)).run(["output"], {"input": x})
    assert_close(y, jax.jit(lambda x: model(x))(x), 1e-5)


@pytest.mark.parametrize("size", [(6, 5), (7, 8)])
@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER"])
def test_same_with_strides_over_known_sizes(size, padding):
    model = layer(4, 3, (3, 2), strides=(2, 3), padding=padding)
    check_runtime(checked(model, (None, *size, 4)), model, images(1, *size, 4), images(3, *size, 4))


def test_a_branch_of_several_layers():
    def branch(features_in, features, *, rngs):
        first = nnx.Conv(features_in, 5, (3, 3), rngs=rngs)
        return nnx.Sequential(first, nnx.relu, nnx.Conv(5, features, (1, 1), rngs=rngs))

    model = layer(4, 3, (3, 3), offset_conv_cls=branch)
    check_runtime(checked(model, SHAPE), model, images(2, 6, 5, 4))


def test_one_node_computes_it():
    """The graph, node by node; its weights are the layer's, and there are no others of their size."""
    model = layer(
        4, 6, (3, 2), strides=2, padding=((1, 0), (2, 1)), feature_group_count=2, offset_groups=2, mask_scale=2.0
    )
    proto = checked(model, SHAPE)
    assert [node.op_type for node in proto.graph.node] == [
        "Transpose", "Conv", "Slice", "Slice", "Sigmoid", "Mul", "DeformConv", "Transpose",
    ]  # fmt: skip
    (node,) = [node for node in proto.graph.node if node.op_type == "DeformConv"]
    assert attributes_of(node) == {
        "kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 2, 0, 1], "dilations": [1, 1], "group": 2, "offset_group": 2,
    }  # fmt: skip
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    np.testing.assert_array_equal(arrays[node.input[1]], model.kernel[...].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(arrays[node.input[3]], model.bias[...])
    assert sum(array.size for array in arrays.values()) < sum(v.size for v in jax.tree.leaves(nnx.state(model))) + 10


def sizes_of(value):
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize(
    ("input_shape", "padding", "ends"),
    [
        ((None, None, None, 4), 1, (["batch", "height", "width", 4], ["batch", "height", "width", 6])),
        (("n", 8, "w", 4), "VALID", (["n", 8, "w", 4], ["n", 6, 0, 6])),  # 0: open, without a name
        ((2, 8, 9, 4), 1, ([2, 8, 9, 4], [2, 8, 9, 6])),
        ((2, 8, "w", 4), ((1, 2), (1, 1)), ([2, 8, "w", 4], [2, 9, "w", 6])),
    ],
)
def test_the_ends(input_shape, padding, ends):
    graph = to_onnx(layer(4, 6, (3, 3), padding=padding), input_shape).graph
    assert ([i.name for i in graph.input], [o.name for o in graph.output]) == (["input"], ["output"])
    assert (sizes_of(graph.input[0]), sizes_of(graph.output[0])) == ends


def test_a_size_that_a_stride_changes_loses_its_name():
    graph = to_onnx(layer(4, 6, (3, 3), strides=(1, 2), padding=1), SHAPE).graph
    assert sizes_of(graph.output[0]) == ["batch", "height", 0, 6]


@pytest.mark.parametrize("opset", [19, 22])
def test_the_opset(opset):
    proto = checked(layer(4, 6, (3, 3)), SHAPE, opset=opset)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]


# ---- models


PLAIN = {
    "Conv": functools.partial(nnx.Conv, 4, 6, (3, 2), 2, padding=((1, 0), (2, 1)), kernel_dilation=2, feature_group_count=2),
    "Conv, masked, no bias": functools.partial(nnx.Conv, 4, 6, (2, 2), mask=np.tri(4, 6) * np.ones((2, 2, 1, 1)), use_bias=False),
    "Linear": functools.partial(nnx.Linear, 4, 6),
    "Linear, no bias": functools.partial(nnx.Linear, 4, 6, use_bias=False),
    "BatchNorm": functools.partial(nnx.BatchNorm, 4, epsilon=1e-3),
    "BatchNorm, bare": functools.partial(nnx.BatchNorm, 4, use_scale=False, use_bias=False),
    "Dropout": functools.partial(nnx.Dropout, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN.keys())
def test_plain_layers(make):
    model = filled(lambda rngs: make(rngs=rngs))
    check_runtime(checked(model, SHAPE), model, images(2, 6, 5, 4), images(1, 7, 9, 4))
    if not isinstance(model, nnx.Conv):
        check_runtime(checked(model, (None, 4)), model, images(3, 4))


@pytest.mark.parametrize("rank", [1, 3])
def test_plain_convolutions_over_one_and_three_axes(rank):
    model = filled(lambda rngs: nnx.Conv(2, 3, (2, 3, 2)[:rank], rngs=rngs))
    check_runtime(checked(model, (None,) * (rank + 1) + (2,)), model, images(2, *(4, 5, 3)[:rank], 2))


FUNCTIONS = [
    nnx.relu,
    nnx.relu6,
    nnx.leaky_relu,
    functools.partial(nnx.leaky_relu, negative_slope=0.3),
    nnx.sigmoid,
    nnx.tanh,
    nnx.silu,
    nnx.gelu,
    functools.partial(nnx.gelu, approximate=False),
    functools.partial(nnx.max_pool, window_shape=(3, 2), strides=(2, 1), padding=((1, 1), (0, 1))),
    functools.partial(nnx.max_pool, window_shape=(2, 2)),
    functools.partial(nnx.avg_pool, window_shape=(2, 3), padding="SAME"),
    functools.partial(nnx.avg_pool, window_shape=(2, 2), padding="SAME", count_include_pad=False),
    functools.partial(jnp.mean, axis=(1, 2)),
    functools.partial(jnp.mean, axis=(-3, -2)),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=range(len(FUNCTIONS)))
def test_functions(function):
    model = nnx.Sequential(function)
    check_runtime(checked(model, SHAPE, opset=19), model, 4 * images(2, 6, 5, 4))


def test_a_sequence_of_layers():
    model = filled(
        lambda rngs: nnx.Sequential(
            nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
            nnx.relu,
            functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)),
            nnx.Sequential(DeformConv(4, 6, (3, 3), rngs=rngs), nnx.gelu),
            functools.partial(jnp.mean, axis=(1, 2)),
            nnx.Linear(6, 5, rngs=rngs),
        )
    )
    proto = checked(model, (None, None, None, 3))
    check_runtime(proto, model, images(1, 6, 5, 3), images(3, 4, 9, 3))
    assert "layers.4.layers.0/DeformConv" in [node.name for node in proto.graph.node]


@pytest.mark.slow
@pytest.mark.parametrize(("block", "num_classes"), [(BasicBlock, 5), (Bottleneck, None)])
def test_a_small_resnet(block, num_classes):
    stages = ("conv3", "conv5")
    model = filled(lambda rngs: ResNet(block, (1, 1, 1, 1), num_classes, width=4, deform_stages=stages, rngs=rngs))
    proto = checked(model, (None, None, None, 3))
    deformed = ["layer2.0.conv1", "layer2.0.conv2", "layer4.0.conv1", "layer4.0.conv2"]
    if block is Bottleneck:
        deformed = ["layer2.0.conv2", "layer4.0.conv2"]
    assert [node.name for node in proto.graph.node if node.op_type == "DeformConv"] == [
        f"{d}/DeformConv" for d in deformed
    ]
    check_runtime(proto, model, images(2, 33, 40, 3))


@pytest.mark.slow
def test_resnet50():
    stages = ("conv3", "conv4", "conv5")
    model = filled(lambda rngs: resnet50(5, width=4, deform_stages=stages, rngs=rngs), scale=0.2)
    proto = checked(model, (None, None, None, 3))
    nodes = [node.name for node in proto.graph.node if node.op_type == "DeformConv"]
    assert len(nodes) == 13
    assert nodes[0] == "layer2.0.conv2/DeformConv"
    check_runtime(proto, model, images(2, 32, 24, 3))


class Net(nnx.Module):
    """A model of one's own: the layer that is called twice takes its offsets from another."""

    def __init__(self, rngs):
        self.offsets = nnx.Conv(4, 18, (3, 3), rngs=rngs)
        self.deform = DeformConv(4, 4, (3, 3), offset_branch=False, rngs=rngs)

    def __call__(self, x):
        offset = self.offsets(x)
        return x + self.deform(self.deform(x, offset), offset)


def add_net(graph, net, x):
    offset = graph.add(net.offsets, x)
    return graph.node("Add", x, graph.add(net.deform, graph.add(net.deform, x, offset), offset))


def test_converters_of_one_s_own():
    model = filled(lambda rngs: nnx.Sequential(Net(rngs), jnp.cos))
    converters = {Net: add_net, jnp.cos: lambda graph, x: graph.node("Cos", x)}
    check_runtime(checked(model, SHAPE, converters=converters), model, images(2, 6, 5, 4))


class Renamed(DeformConv):
    pass


class Doubled(DeformConv):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_a_subclass_is_known_where_it_computes_the_same():
    assert "DeformConv" in [node.op_type for node in to_onnx(Renamed(4, 3, (3, 3), rngs=nnx.Rngs(0)), SHAPE).graph.node]
    with pytest.raises(ValueError, match="Doubled is not known"):
        to_onnx(Doubled(4, 3, (3, 3), rngs=nnx.Rngs(0)), SHAPE)


# ---- what is refused

REFUSED = {
    "SAME, open": ((4, 3, (3, 3), 2), {}, "padding='SAME' at strides .2, 2. depends on the size of the map.*'height'.*as ints"),
    "border": ((4, 3, (3, 3)), {"padding_mode": ("zeros", "wrap")}, r"padding='SAME' with padding_mode=\('zeros', 'wrap'\) has"),
    "circular": ((4, 3, (3, 3)), {"padding": "CIRCULAR"}, r"padding='CIRCULAR' with padding_mode=\('wrap', 'wrap'\) has"),
    "crop": ((4, 3, (3, 3)), {"padding": -1}, "padding=-1 crops.*jax.export"),
    "one axis": ((4, 3, (3,)), {}, "kernel_size=.3,. has 1 spatial axes.*jax.export"),
    "no branch": ((4, 3, (3, 3)), {"offset_branch": False}, "offset_branch=False.*graph.add"),
    "activation": ((4, 3, (3, 3)), {"offset_activation": jnp.tanh}, "its offset_activation has no known nodes.*jax.export"),
    "channels": ((5, 3, (3, 3)), {}, "its input has 4 channels; wanted 5"),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_layers_without_a_form_in_onnx(shape, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        to_onnx(layer(*shape, **options), SHAPE)


def branch_module(features_in, features, *, rngs):
    return Net(rngs)


def injected(*args, **kwargs):
    return jax.lax.conv_general_dilated(*args, **kwargs)


PARTS = {
    "a module": (lambda rngs: Net(rngs), "layers.0: Net is not known; wanted one of BasicBlock, .*, tanh.*converters="),
    "a branch": (
        lambda rngs: DeformConv(4, 4, (3, 3), offset_conv_cls=branch_module, rngs=rngs),
        "layers.0.offset_conv: Net is not known",
    ),
    "a function": (lambda rngs: jnp.cos, "cos is not known"),
    "positional": (lambda rngs: functools.partial(nnx.leaky_relu, 0.1), "partial is not known.*options by name"),
    "another mean": (lambda rngs: functools.partial(jnp.mean, axis=1), r"the mean over axis=1 is not known.*\(1, 2\)"),
    "dilated input": (lambda rngs: nnx.Conv(4, 4, (3, 3), input_dilation=2, rngs=rngs), "layers.0: input_dilation=2"),
    "injected": (lambda rngs: nnx.Conv(4, 4, (3, 3), conv_general_dilated=injected, rngs=rngs), "layers.0: a conv_general"),
    "another axis": (lambda rngs: nnx.BatchNorm(4, axis=1, rngs=rngs), "layers.0: axis=1 is not the axis of channels"),
    "a map of fewer axes": (lambda rngs: nnx.Conv(4, 4, 3, rngs=rngs), r"layers.0: a window of \(3,\) does not fit a map"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), PARTS.values(), ids=PARTS.keys())
def test_parts_that_are_not_known(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        to_onnx(nnx.Sequential(make(nnx.Rngs(0))), SHAPE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": jnp.cos}, TypeError, "layer is a .*; wanted a flax.nnx module"),
        ({"opset": 18}, ValueError, "opset=18; wanted an int from 19"),
        ({"opset": 22.0}, ValueError, "opset=22.0; wanted an int from 19"),
        ({"input_shape": (4,)}, ValueError, r"input_shape=\(4,\) is not understood"),
        ({"input_shape": (None, None, None, None)}, ValueError, r"input_shape=\(None, .*\) has no number of channels"),
        ({"input_shape": (None, 0, 8, 4)}, ValueError, "a size of input_shape=0 is too small"),
        ({"input_shape": (None, 8.0, 8, 4)}, TypeError, "a size of input_shape=8.0 is a float"),
    ],
)
def test_arguments_that_make_no_sense(arguments, error, message):
    given = {"layer": layer(4, 3, (3, 3)), "input_shape": SHAPE} | arguments
    with pytest.raises(error, match=f"^{message}"):
        to_onnx(**given)


def run(code):
    return subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)


def test_onnx_is_imported_when_called():
    assert run("import sys, dcn_jax.interop; sys.exit('onnx' in sys.modules)").returncode == 0


def test_without_onnx_the_error_says_what_to_install():
    result = run("import sys; sys.modules['onnx'] = None; from dcn_jax.interop import to_onnx; to_onnx(None, (1, 4))")
    assert 'dcn_jax.interop.to_onnx needs the extra "interop": pip install "dcn-jax[interop]"' in result.stderr
