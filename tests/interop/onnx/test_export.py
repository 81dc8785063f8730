"""`to_onnx`: whole models, the ends of a graph, arguments by name, and what it needs."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcn_jax.interop import to_onnx
from dcn_jax.models.resnet import BasicBlock, Bottleneck, ResNet, resnet50
from dcn_jax.nnx import DeformConv, MSDeformAttn
from tests.support.onnx_models import SHAPE, check, checked, filled, images, operators

pytestmark = pytest.mark.lenient


def layer(*shape, **options):
    return DeformConv(*shape, **options, rngs=nnx.Rngs(0))


# ---- the ends


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
@pytest.mark.parametrize("decompose", [False, True])
def test_the_ends(input_shape, padding, ends, decompose):
    graph = to_onnx(layer(4, 6, (3, 3), padding=padding), input_shape, decompose=decompose).graph
    assert ([i.name for i in graph.input], [o.name for o in graph.output]) == (["input"], ["output"])
    assert (sizes_of(graph.input[0]), sizes_of(graph.output[0])) == ends


def test_a_size_that_a_stride_changes_loses_its_name():
    graph = to_onnx(layer(4, 6, (3, 3), strides=(1, 2), padding=1), SHAPE).graph
    assert sizes_of(graph.output[0]) == ["batch", "height", 0, 6]


def test_open_sizes_of_several_inputs_are_apart():
    """But for the batch: two that have one name would be equal."""
    shapes = {"query": (None, None, 8), "reference_points": (None, None, 1, 2), "value": (None, None, 8)}
    model = MSDeformAttn(embed_dim=8, num_heads=2, num_levels=1, rngs=nnx.Rngs(0))
    graph = to_onnx(model, shapes, constants={"spatial_shapes": ((2, 3),)}).graph
    assert [sizes_of(given) for given in (*graph.input, *graph.output)] == [
        ["batch", "query_1", 8], ["batch", "reference_points_1", 1, 2], ["batch", "value_1", 8], ["batch", "query_1", 8],
    ]  # fmt: skip


@pytest.mark.parametrize("opset", [19, 22])
def test_the_opset(opset):
    proto = checked(layer(4, 6, (3, 3)), SHAPE, opset=opset)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]


def test_a_model_that_computes_nothing():
    model = nnx.Sequential(nnx.Dropout(0.5, deterministic=True))
    check(checked(model, SHAPE), model, images(1, 2, 2, 4))


# ---- models


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
    check(proto, model, images(1, 6, 5, 3), images(3, 4, 9, 3), reference=False)
    assert "layers.4.layers.0/DeformConv" in [node.name for node in proto.graph.node]


def test_the_first_of_a_sequence_gets_all_arguments():
    model = filled(lambda rngs: nnx.Sequential(DeformConv(4, 3, (1, 1), offset_branch=False, rngs=rngs), nnx.relu))
    given = {"inputs": images(1, 3, 4, 4), "offset": images(1, 3, 4, 2)}
    check(checked(model, {name: array.shape for name, array in given.items()}), model, given, reference=False)


@pytest.mark.slow
@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize(("block", "num_classes"), [(BasicBlock, 5), (Bottleneck, None)])
def test_a_small_resnet(block, num_classes, decompose):
    stages = ("conv3", "conv5")
    model = filled(lambda rngs: ResNet(block, (1, 1, 1, 1), num_classes, width=4, deform_stages=stages, rngs=rngs))
    proto = checked(model, (None, None, None, 3), decompose=decompose)
    deformed = ["layer2.0.conv1", "layer2.0.conv2", "layer4.0.conv1", "layer4.0.conv2"]
    if block is Bottleneck:
        deformed = ["layer2.0.conv2", "layer4.0.conv2"]
    wanted = "GridSample" if decompose else "DeformConv"
    assert [node.name for node in proto.graph.node if node.op_type == wanted] == [f"{d}/{wanted}" for d in deformed]
    check(proto, model, images(2, 33, 40, 3), reference=False)


@pytest.mark.slow
@pytest.mark.parametrize("decompose", [False, True])
def test_resnet50(decompose):
    stages = ("conv3", "conv4", "conv5")
    model = filled(lambda rngs: resnet50(5, width=4, deform_stages=stages, rngs=rngs), scale=0.2)
    proto = checked(model, (None, None, None, 3), decompose=decompose)
    assert operators(proto).count("GridSample" if decompose else "DeformConv") == 13
    check(proto, model, images(2, 32, 24, 3), reference=False)


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
    check(checked(model, SHAPE, converters=converters), model, images(2, 6, 5, 4), reference=False)


class Gated(nnx.Module):
    """Squeeze and excite, and a gate of the caller's."""

    def __init__(self, rngs):
        self.gate = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x, *, gain, bias=0.0):
        pooled = jnp.mean(x, axis=(1, 2), keepdims=True)
        return nnx.sigmoid(self.gate(pooled)) * x * gain + bias


def add_gated(graph, model, x, *, gain, bias=0.0):
    pooled = graph.add(jnp.mean, x, axis=(1, 2), keepdims=True)
    gated = graph.node("Mul", graph.add(nnx.sigmoid, graph.add(model.gate, pooled)), x)
    return graph.node("Add", graph.node("Mul", gated, gain), np.float32(bias))


def test_arguments_of_a_model_of_one_s_own():
    """By their names in the model's `__call__`; the converter may call them otherwise, but for those by name alone."""
    model, given = filled(lambda rngs: Gated(rngs)), {"gain": images(2, 3, 5, 4), "x": images(2, 3, 5, 4, seed=2)}
    shapes = {"gain": (None, None, "w", 4), "x": (None, "h", "w", 4)}
    proto = checked(model, shapes, converters={Gated: add_gated}, constants={"bias": 0.5})
    check(proto, functools.partial(model, bias=0.5), given)
    assert sizes_of(proto.graph.output[0])[-1] == 4


class Stack(nnx.Module):
    """Layers of one kind in one, as `nnx.vmap` makes them for `nnx.scan`."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(lambda rngs: DeformConv(4, 4, (3, 3), rngs=rngs))(rngs.split(3))

    def each(self):
        graph, state = nnx.split(self.layers)
        return [nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state)) for i in range(3)]

    def __call__(self, x):
        for layer in self.each():
            x = layer(x)
        return x


def add_stack(graph, stack, x):
    for layer in stack.each():
        x = graph.add(layer, x)
    return x


@pytest.mark.slow
def test_the_advice_about_a_stack_of_layers():
    model = filled(lambda rngs: Stack(rngs))
    check(checked(model, SHAPE, converters={Stack: add_stack}), model, images(1, 5, 4, 4), reference=False)


class Fused(nnx.Module):
    """Two maps side by side in their channels."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(6, 2, (1, 1), rngs=rngs)

    def __call__(self, x, y):
        return self.conv(jnp.concatenate([x, y], axis=-1))


def add_fused(graph, model, x, y):
    return graph.add(model.conv, graph.node("Concat", x, y, axis=1, channels=x.channels + y.channels))


def test_a_node_that_changes_the_channels():
    model, given = filled(lambda rngs: Fused(rngs)), {"x": images(2, 3, 5, 4), "y": images(2, 3, 5, 2)}
    shapes = {"x": (None, "h", "w", 4), "y": (None, "h", "w", 2)}
    check(checked(model, shapes, converters={Fused: add_fused}), model, given, reference=False)


def test_an_array_in_a_node_is_channels_first():
    gains = np.arange(4, dtype=np.float32)
    converters = {jnp.cos: lambda graph, x: graph.node("Mul", x, gains.reshape(-1, 1, 1))}
    check(checked(nnx.Sequential(jnp.cos), SHAPE, converters=converters), lambda x: x * gains, images(2, 3, 4, 4))


class Encoder(nnx.Module):
    """A layer of Deformable DETR's encoder."""

    def __init__(self, rngs):
        sizes = {"embed_dim": 8, "num_heads": 2, "num_levels": 2, "num_points": 3}
        self.self_attn = MSDeformAttn(**sizes, rngs=rngs)
        self.norm1 = nnx.LayerNorm(8, rngs=rngs)
        self.linear1 = nnx.Linear(8, 16, rngs=rngs)
        self.linear2 = nnx.Linear(16, 8, rngs=rngs)
        self.norm2 = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, src, pos, reference_points, spatial_shapes, padding_mask=None):
        src = self.norm1(src + self.self_attn(src + pos, reference_points, src, spatial_shapes, padding_mask))
        return self.norm2(src + self.linear2(nnx.relu(self.linear1(src))))


def add_encoder(graph, encoder, src, pos, reference_points, spatial_shapes, padding_mask=None):
    query = graph.node("Add", src, pos)
    seen = graph.add(encoder.self_attn, query, reference_points, src, spatial_shapes, padding_mask)
    src = graph.add(encoder.norm1, graph.node("Add", src, seen))
    hidden = graph.add(nnx.relu, graph.add(encoder.linear1, src))
    return graph.add(encoder.norm2, graph.node("Add", src, graph.add(encoder.linear2, hidden)))


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_encoder_layer(padded):
    model, levels = filled(lambda rngs: Encoder(rngs)), ((3, 4), (2, 2))
    given = {name: images(2, 16, 8, seed=seed) for seed, name in enumerate(("src", "pos"))}
    given["reference_points"] = 0.7 * images(2, 16, 2, 2, seed=3) + 0.5
    shapes = {name: (None, None, *array.shape[2:]) for name, array in given.items()}
    if padded:
        given["padding_mask"], shapes["padding_mask"] = images(2, 16, seed=4) > 0.5, (None, 16)
    constants = {"spatial_shapes": levels}
    proto = checked(model, shapes, converters={Encoder: add_encoder}, constants=constants)
    check(proto, functools.partial(model, **constants), given)


# ---- the package onnx


def run(code):
    return subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)


def test_onnx_is_imported_when_called():
    assert run("import sys, dcn_jax.interop; sys.exit('onnx' in sys.modules)").returncode == 0


def test_without_onnx_the_error_says_what_to_install():
    result = run("import sys; sys.modules['onnx'] = None; from dcn_jax.interop import to_onnx; to_onnx(None, (1, 4))")
    assert 'dcn_jax.interop.to_onnx needs the extra "interop": pip install "dcn-jax[interop]"' in result.stderr
