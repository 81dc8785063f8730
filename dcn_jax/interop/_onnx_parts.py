"""The converters: one function for each layer and function, which adds its nodes to an ONNX graph.

Batch norms and dropout behave as in inference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dcn_jax._layers import offset_conv
from dcn_jax.interop._onnx_graph import USE_JAX_EXPORT, Graph, Value
from dcn_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from dcn_jax.nnx import DeformConv


def _array(parameter: Any) -> np.ndarray | None:
    """A parameter as a float32 array; None stays None."""
    return None if parameter is None else np.asarray(parameter[...]).astype(np.float32)


def _check_channels(graph: Graph, x: Value, wanted: int) -> None:
    if x.channels != wanted:
        graph.refuse(
            f"its input has {x.channels} channels; wanted {wanted}: the last size of input_shape says how many"
        )


# ---- layers


def _kernel(layer: Any) -> np.ndarray:
    """The kernel in ONNX's order: `(features, C // groups, *window)`."""
    kernel: Any = _array(layer.kernel)
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _deform_conv(
    graph: Graph, layer: DeformConv, x: Value, offset: Value | None = None, mask: Value | None = None
) -> Value:
    """The branch, its split, and one DeformConv; if `offset` is given, the DeformConv alone."""
    if len(layer.kernel_size) != 2:
        graph.refuse(
            f"kernel_size={layer.kernel_size} has {len(layer.kernel_size)} spatial axes, and ONNX's runtimes have "
            f"DeformConv for 2 alone: use 2, {USE_JAX_EXPORT}"
        )
    _check_channels(graph, x, layer.in_features)
    attributes, spatial = graph.window(x, layer.kernel_size, **offset_conv.geometry(layer))
    if offset is None:
        if not layer.offset_branch:
            graph.refuse(
                "offset_branch=False leaves it without offsets; in the converter of the model that makes them, add it "
                "by graph.add(layer, x, offset, mask)"
            )
        offset, mask = _split(graph, layer, graph.add(layer.offset_conv, x))
    return graph.node(
        "DeformConv",
        *_without_trailing_nones(x, _kernel(layer), offset, _array(layer.bias), mask),
        channels=layer.out_features,
        spatial=spatial,
        group=layer.feature_group_count,
        offset_group=layer.offset_groups,
        **attributes,
    )


def _split(graph: Graph, layer: DeformConv, z: Value) -> tuple[Value, Value | None]:
    """Offset `(batch, OG * K * 2, …)` and mask `(batch, OG * K, …)` from the branch's output."""
    offsets, logits = offset_conv.branch_channels(layer)
    if z.channels != offsets + logits:
        graph.refuse(f"its branch emits {z.channels} channels; wanted {offsets + logits}")
    if layer.offset_activation is not None:
        graph.refuse(
            "its offset_activation has no known nodes: make the function part of the branch by offset_conv_cls, with a "
            f"converter for that class, {USE_JAX_EXPORT}"
        )
    offset = _bound(graph, _channels(graph, z, 0, offsets), offset_conv.bounds_of(layer.max_offset, 2))
    if not layer.modulated:
        return offset, None
    mask = graph.node("Sigmoid", _channels(graph, z, offsets, z.channels))
    return offset, mask if layer.mask_scale == 1 else graph.node("Mul", mask, np.float32(layer.mask_scale))


def _channels(graph: Graph, z: Value, start: int, stop: int) -> Value:
    """The channels from `start` to `stop`."""
    if (start, stop) == (0, z.channels):
        return z
    return graph.node("Slice", z, *(np.array([i]) for i in (start, stop, 1)), channels=stop - start)


def _bound(graph: Graph, z: Value, bounds: tuple[float | None, ...]) -> Value:
    """max_offset · tanh(z / max_offset); channels are ordered [offset group, tap, axis]."""
    if set(bounds) == {None}:
        return z

    def per_channel(values: Sequence[Any], dtype: Any) -> np.ndarray:
        return np.tile(np.array(values, dtype), z.channels // len(bounds)).reshape(-1, 1, 1)

    divisor = per_channel([bound or 1 for bound in bounds], np.float32)  # a bound of 0 makes 0 · tanh(z)
    factor = per_channel([bound or 0 for bound in bounds], np.float32)
    bounded = graph.node("Mul", graph.node("Tanh", graph.node("Div", z, divisor)), factor)
    if None not in bounds:
        return bounded
    free = per_channel([bound is None for bound in bounds], bool)
    return graph.node("Where", free, z, bounded, channels=z.channels, spatial=z.spatial)


def _without_trailing_nones(*inputs: Any) -> list[Any]:
    """`inputs` up to the last that is given: ONNX omits the last inputs by leaving them off."""
    given = [i for i, value in enumerate(inputs) if value is not None]
    return list(inputs[: given[-1] + 1])


def _conv(graph: Graph, layer: nnx.Conv, x: Value) -> Value:
    if not np.all(np.equal(1 if layer.input_dilation is None else layer.input_dilation, 1)):
        graph.refuse(
            f"input_dilation={layer.input_dilation} has no form in ONNX's Conv: leave it out, {USE_JAX_EXPORT}"
        )
    if layer.conv_general_dilated not in (lax.conv_general_dilated, offset_conv.wide_conv):
        graph.refuse(f"a conv_general_dilated of its own has no known nodes: leave it out, {USE_JAX_EXPORT}")
    _check_channels(graph, x, layer.in_features)
    kernel = _kernel(layer)
    if layer.mask is not None:
        kernel = kernel * np.moveaxis(np.asarray(layer.mask, np.float32), (-1, -2), (0, 1))
    attributes, spatial = graph.window(
        x, layer.kernel_size, strides=layer.strides, padding=layer.padding, kernel_dilation=layer.kernel_dilation
    )
    inputs = _without_trailing_nones(x, kernel, _array(layer.bias))
    group = layer.feature_group_count
    return graph.node("Conv", *inputs, channels=layer.out_features, spatial=spatial, group=group, **attributes)


def _linear(graph: Graph, layer: nnx.Linear, x: Value) -> Value:
    """A matrix product for vectors; for maps a convolution with one tap."""
    _check_channels(graph, x, layer.in_features)
    kernel, bias, features = _kernel(layer), _array(layer.bias), layer.out_features
    if not x.spatial:
        return graph.node("Gemm", *_without_trailing_nones(x, kernel, bias), channels=features, transB=1)
    kernel = kernel.reshape(*kernel.shape, *(1 for _ in x.spatial))
    return graph.node("Conv", *_without_trailing_nones(x, kernel, bias), channels=features)


def _batch_norm(graph: Graph, layer: nnx.BatchNorm, x: Value) -> Value:
    if layer.axis not in (-1, 1 + len(x.spatial)):
        graph.refuse(
            f"axis={layer.axis} is not the axis of channels, which ONNX's BatchNormalization needs: make it -1"
        )
    _check_channels(graph, x, layer.num_features)
    scale = np.ones(x.channels, np.float32) if layer.scale is None else _array(layer.scale)
    bias = np.zeros(x.channels, np.float32) if layer.bias is None else _array(layer.bias)
    return graph.node(
        "BatchNormalization", x, scale, bias, _array(layer.mean), _array(layer.var), epsilon=float(layer.epsilon)
    )


def _sequential(graph: Graph, model: nnx.Sequential, x: Value) -> Value:
    for layer in model.layers:
        x = graph.add(layer, x)
    return x


# ---- models


def _shortcut(graph: Graph, block: Any, x: Value, y: Value) -> Value:
    """The end of a block: relu(y + downsample(x))."""
    for layer in block.downsample:
        x = graph.add(layer, x)
    return graph.node("Relu", graph.node("Add", y, x))


def _basic_block(graph: Graph, block: BasicBlock, x: Value) -> Value:
    y = graph.node("Relu", graph.add(block.bn1, graph.add(block.conv1, x)))
    y = graph.add(block.bn2, graph.add(block.conv2, y))
    return _shortcut(graph, block, x, y)


def _bottleneck(graph: Graph, block: Bottleneck, x: Value) -> Value:
    y = graph.node("Relu", graph.add(block.bn1, graph.add(block.conv1, x)))
    y = graph.node("Relu", graph.add(block.bn2, graph.add(block.conv2, y)))
    y = graph.add(block.bn3, graph.add(block.conv3, y))
    return _shortcut(graph, block, x, y)


def _resnet(graph: Graph, model: ResNet, x: Value) -> Value:
    x = graph.node("Relu", graph.add(model.bn1, graph.add(model.conv1, x)))
    x = _max_pool(graph, x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            x = graph.add(block, x)
    x = _mean(graph, x, axis=(1, 2))
    return x if model.fc is None else graph.add(model.fc, x)


# ---- functions


def _operator(op_type: str) -> Callable[[Graph, Value], Value]:
    """The converter of a function that is one ONNX operator."""
    return lambda graph, x: graph.node(op_type, x)


def _relu6(graph: Graph, x: Value) -> Value:
    return graph.node("Clip", x, np.float32(0), np.float32(6))


def _leaky_relu(graph: Graph, x: Value, negative_slope: float = 0.01) -> Value:
    return graph.node("LeakyRelu", x, alpha=float(negative_slope))


def _silu(graph: Graph, x: Value) -> Value:
    return graph.node("Mul", x, graph.node("Sigmoid", x))


def _gelu(graph: Graph, x: Value, approximate: bool = True) -> Value:
    """Gelu, x · Φ(x), with Φ from the error function or as sigmoid(2 √(2 / π) (x + 0.044715 x³)).

    ONNX has an operator Gelu only from opset 20.
    """
    if approximate:
        cube = graph.node("Mul", graph.node("Mul", x, x), x)
        inner = graph.node("Add", x, graph.node("Mul", cube, np.float32(0.044715)))
        return graph.node("Mul", x, graph.node("Sigmoid", graph.node("Mul", inner, np.float32(np.sqrt(8 / np.pi)))))
    erf = graph.node("Erf", graph.node("Mul", x, np.float32(np.sqrt(0.5))))
    return graph.node("Mul", x, graph.node("Mul", graph.node("Add", erf, np.float32(1)), np.float32(0.5)))


def _max_pool(graph: Graph, x: Value, window_shape: Any, strides: Any = None, padding: Any = "VALID") -> Value:
    attributes, spatial = graph.window(x, window_shape, strides=strides, padding=padding)
    return graph.node("MaxPool", x, spatial=spatial, **attributes)


def _avg_pool(
    graph: Graph,
    x: Value,
    window_shape: Any,
    strides: Any = None,
    padding: Any = "VALID",
    count_include_pad: bool = True,
) -> Value:
    attributes, spatial = graph.window(x, window_shape, strides=strides, padding=padding)
    return graph.node("AveragePool", x, spatial=spatial, count_include_pad=int(count_include_pad), **attributes)


def _mean(graph: Graph, x: Value, axis: int | Sequence[int]) -> Value:
    """The mean over all positions: vectors `(batch, C)`."""
    rank = 2 + len(x.spatial)
    axes = sorted(a % rank for a in np.atleast_1d(axis).tolist())
    if axes != list(range(1, rank - 1)):
        graph.refuse(f"the mean over axis={axis} is not known; wanted all spatial axes, {tuple(range(1, rank - 1))}")
    return graph.node("ReduceMean", x, np.arange(2, rank), spatial=(), keepdims=0)


CONVERTERS: dict[Any, Callable[..., Value]] = {
    DeformConv: _deform_conv,
    nnx.Conv: _conv,
    nnx.Linear: _linear,
    nnx.BatchNorm: _batch_norm,
    nnx.Dropout: lambda graph, layer, x: x,
    nnx.Sequential: _sequential,
    ResNet: _resnet,
    BasicBlock: _basic_block,
    Bottleneck: _bottleneck,
    jax.nn.relu: _operator("Relu"),
    jax.nn.relu6: _relu6,
    jax.nn.leaky_relu: _leaky_relu,
    jax.nn.sigmoid: _operator("Sigmoid"),
    jax.nn.silu: _silu,
    jax.nn.gelu: _gelu,
    jnp.tanh: _operator("Tanh"),
    jnp.mean: _mean,
    nnx.max_pool: _max_pool,
    nnx.avg_pool: _avg_pool,
}
