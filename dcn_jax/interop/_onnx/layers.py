"""Converters of Flax's layers. Batch norms and dropout behave as in inference."""

from typing import Any

import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from dcn_jax._layers import offset_conv
from dcn_jax.interop._onnx import windows
from dcn_jax.interop._onnx.graph import USE_JAX_EXPORT, Graph, Value

# Functions that layers compute with, if none is given. Another one may compute anything.
_USUAL = {
    "conv_general_dilated": (lax.conv_general_dilated, offset_conv.wide_conv),
    "dot_general": (lax.dot_general,),
    "promote_dtype": (promote_dtype,),
    "axis_name": (None,),
}


def check_usual(graph: Graph, layer: Any, *options: str) -> None:
    """Refuse a layer that computes by a function of its own, or over devices."""
    for name in options:
        given = getattr(layer, name)
        given = getattr(given, "promote_dtype", given)  # a branch's, which wraps the usual one
        if given not in _USUAL[name]:
            graph.refuse(f"its own {name} has no known nodes: leave it out, {USE_JAX_EXPORT}")


def check_channels(graph: Graph, x: Value, wanted: int, name: str = "its input") -> None:
    """Refuse an array that has not as many channels as a layer was made for."""
    if not isinstance(x.channels, int):
        graph.refuse(f"{name} has no number of channels; make the last size in input_shape the int {wanted}")
    if x.channels != wanted:
        graph.refuse(f"{name} has {x.channels} channels; wanted {wanted}: the last size of input_shape says how many")


def given_inputs(*inputs: Any) -> list[Any]:
    """`inputs` up to the last that is given: ONNX omits the last inputs by leaving them off."""
    given = [i for i, value in enumerate(inputs) if value is not None]
    return list(inputs[: given[-1] + 1])


# ---- products


def kernel_first(graph: Graph, layer: Any, rank: int) -> np.ndarray:
    """The kernel, masked if the layer has a mask, in ONNX's order: `(features, C // groups, *window)`."""
    kernel = graph.parameter(layer, "kernel", rank + 2)
    if getattr(layer, "mask", None) is not None:
        kernel = kernel * np.asarray(layer.mask, np.float32)
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def conv(graph: Graph, layer: nnx.Conv, x: Value) -> Value:
    """Conv."""
    if not np.all(np.equal(1 if layer.input_dilation is None else layer.input_dilation, 1)):
        graph.refuse(
            f"input_dilation={layer.input_dilation} has no form in ONNX's Conv: leave it out, {USE_JAX_EXPORT}"
        )
    check_usual(graph, layer, "conv_general_dilated", "promote_dtype")
    check_channels(graph, x, layer.in_features)
    kernel, bias = kernel_first(graph, layer, len(layer.kernel_size)), graph.parameter(layer, "bias", 1)
    attributes, spatial, _ = windows.attributes(
        graph,
        x,
        layer.kernel_size,
        strides=layer.strides,
        padding=_conv_padding(graph, layer),
        kernel_dilation=layer.kernel_dilation,
    )
    inputs, group = given_inputs(x, kernel, bias), layer.feature_group_count
    return graph.node("Conv", *inputs, channels=layer.out_features, spatial=spatial, group=group, **attributes)


def _conv_padding(graph: Graph, layer: nnx.Conv) -> Any:
    """`padding`, with "CAUSAL" as ints."""
    if layer.padding != "CAUSAL":
        return layer.padding
    if len(layer.kernel_size) != 1:
        graph.refuse(
            f"padding='CAUSAL' is for one spatial axis, and kernel_size={layer.kernel_size} has more; use ints"
        )
    (dilation,) = np.broadcast_to(1 if layer.kernel_dilation is None else layer.kernel_dilation, 1).tolist()
    return ((dilation * (layer.kernel_size[0] - 1), 0),)


def conv_transpose(graph: Graph, layer: nnx.ConvTranspose, x: Value) -> Value:
    """ConvTranspose. Flax's pads lie around the stretched input, and ONNX's crop the result."""
    check_usual(graph, layer, "promote_dtype")
    check_channels(graph, x, layer.in_features)
    rank = len(layer.kernel_size)
    if len(x.spatial) != rank:
        graph.refuse(f"a window of {layer.kernel_size} does not fit a map with {len(x.spatial)} spatial axes")
    strides, dilation = (
        np.broadcast_to(1 if option is None else option, rank).tolist()
        for option in (layer.strides, layer.kernel_dilation)
    )
    extent = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, dilation, strict=True)]
    pads = _conv_transpose_pads(graph, layer.padding, extent, strides)
    begin, end = ([e - 1 - pair[side] for e, pair in zip(extent, pads, strict=True)] for side in (0, 1))
    more = [max(-pad, 0) for pad in end]
    if min(begin) < 0 or any(m >= max(s, d) for m, s, d in zip(more, strides, dilation, strict=True)):
        graph.refuse(
            f"padding={layer.padding!r} is wider than ONNX's ConvTranspose can pad: pad less, {USE_JAX_EXPORT}"
        )
    kernel = kernel_first(graph, layer, rank)
    if not layer.transpose_kernel:  # (out_features, in_features, *window), and ONNX's window runs backwards
        kernel = np.flip(kernel.swapaxes(0, 1), tuple(range(2, 2 + rank)))
    sizes = zip(x.spatial, strides, extent, begin, end, strict=True)
    spatial = [(s - 1) * stride + e - b - n if isinstance(s, int) else None for s, stride, e, b, n in sizes]
    return graph.node(
        "ConvTranspose",
        *given_inputs(x, kernel, graph.parameter(layer, "bias", 1)),
        channels=layer.out_features,
        spatial=spatial,
        kernel_shape=list(layer.kernel_size),
        strides=strides,
        dilations=dilation,
        pads=[*begin, *(max(pad, 0) for pad in end)],
        output_padding=more,
    )


def _conv_transpose_pads(graph: Graph, padding: Any, extent: list[int], strides: list[int]) -> Any:
    """One (low, high) pair per axis, as `lax.conv_transpose` defines "SAME" and "VALID"."""
    if padding not in ("SAME", "VALID"):
        if isinstance(padding, str):
            graph.refuse(f"padding={padding!r} of a ConvTranspose has no form in ONNX: use ints, {USE_JAX_EXPORT}")
        per_axis = [padding] * len(extent) if isinstance(padding, int) else padding
        return [(pad, pad) if isinstance(pad, int) else pad for pad in per_axis]
    pads = []
    for e, stride in zip(extent, strides, strict=True):
        total = e + stride - 2 + (max(e - stride, 0) if padding == "VALID" else 0)
        low = e - 1 if padding == "VALID" or stride > e - 1 else -(-total // 2)
        pads.append((low, total - low))
    return pads


def linear(graph: Graph, layer: nnx.Linear, x: Value) -> Value:
    """A matrix product; for maps that are channels first, a convolution with one tap."""
    check_usual(graph, layer, "dot_general", "promote_dtype")
    check_channels(graph, x, layer.in_features)
    kernel, bias = graph.parameter(layer, "kernel", 2), graph.parameter(layer, "bias", 1)
    features = layer.out_features
    if len(x.shape) == 2:
        return graph.node("Gemm", *given_inputs(x, kernel.T, bias), channels=features, transB=1)
    if x.channels_last or len(x.spatial) > 3:
        x = graph.channels_last(x)
        y = graph.emit("MatMul", x, kernel)
        return Value(y if bias is None else graph.emit("Add", y, bias), (*x.shape[:-1], features), True)
    kernel = kernel.T.reshape(features, -1, *(1 for _ in x.spatial))
    return graph.node("Conv", *given_inputs(x, kernel, bias), channels=features)


def embed(graph: Graph, layer: nnx.Embed, x: Value) -> Value:
    """Gather of rows, by ints."""
    check_usual(graph, layer, "promote_dtype")
    table = graph.parameter(layer, "embedding", 2)
    x = graph.typed(graph.channels_last(x), np.int32)
    rows = graph.emit("Mul", x, np.int32(0)) if layer.num_embeddings == 1 else x  # Flax then reads no x
    return Value(graph.emit("Gather", table, rows, axis=0), (*x.shape, layer.features), True)


# ---- norms


def _scale_and_bias(graph: Graph, layer: Any, channels: int) -> tuple[np.ndarray, np.ndarray]:
    scale, bias = (graph.parameter(layer, name, 1) for name in ("scale", "bias"))
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    return ones if scale is None else scale, zeros if bias is None else bias


def batch_norm(graph: Graph, layer: nnx.BatchNorm, x: Value) -> Value:
    """BatchNormalization with the stored statistics."""
    if layer.axis not in (-1, 1 + len(x.spatial)):
        graph.refuse(
            f"axis={layer.axis} is not the axis of channels, which ONNX's BatchNormalization needs: make it -1"
        )
    check_usual(graph, layer, "promote_dtype")
    check_channels(graph, x, layer.num_features)
    statistics = (graph.parameter(layer, name, 1) for name in ("mean", "var"))
    affine = _scale_and_bias(graph, layer, x.channels)
    return graph.node("BatchNormalization", x, *affine, *statistics, epsilon=float(layer.epsilon))


def layer_norm(graph: Graph, layer: nnx.LayerNorm, x: Value) -> Value:
    """LayerNormalization over the channels."""
    last = (-1, (-1,), len(x.shape) - 1, (len(x.shape) - 1,))
    for name in ("reduction_axes", "feature_axes"):
        axes = getattr(layer, name)
        if (tuple(axes) if isinstance(axes, list) else axes) not in last:
            graph.refuse(f"{name}={axes} is not the axis of channels alone: make it -1, {USE_JAX_EXPORT}")
    check_usual(graph, layer, "axis_name", "promote_dtype")
    check_channels(graph, x, layer.num_features)
    x = graph.channels_last(x)
    affine = _scale_and_bias(graph, layer, x.channels)
    name = graph.emit("LayerNormalization", x, *affine, axis=-1, epsilon=float(layer.epsilon))
    return x._replace(name=name)


def group_norm(graph: Graph, layer: nnx.GroupNorm, x: Value) -> Value:
    """InstanceNormalization of the groups, each as one channel; scale and bias apart."""
    if layer.reduction_axes is not None:
        graph.refuse(f"reduction_axes={layer.reduction_axes} has no form in ONNX: leave it out, {USE_JAX_EXPORT}")
    check_usual(graph, layer, "axis_name", "promote_dtype")
    check_channels(graph, x, layer.num_groups * layer.group_size)
    x, groups = graph.channels_first(x), layer.num_groups
    grouped = graph.reshape(x, 0, groups, -1)  # (batch, groups, all else)
    one = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    normed = graph.emit("InstanceNormalization", grouped, *one, epsilon=float(layer.epsilon))
    shape = [0, x.channels, *(graph.size(x, axis) for axis in range(1, len(x.shape) - 1))]
    y = x._replace(name=graph.reshape(normed, *shape))
    for op_type, name in (("Mul", "scale"), ("Add", "bias")):
        values = graph.parameter(layer, name, 1)
        if values is not None:
            y = graph.node(op_type, y, values.reshape(-1, *(1 for _ in x.spatial)))
    return y


# ---- the rest


def dropout(graph: Graph, layer: nnx.Dropout, x: Value) -> Value:
    """Nothing."""
    return x


def sequential(graph: Graph, model: nnx.Sequential, *values: Value, **options: Any) -> Value:
    """One after another; the first gets all arguments of the call."""
    for layer in model.layers:
        values, options = (graph.add(layer, *values, **options),), {}
    return values[0]
