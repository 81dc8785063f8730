"""Converters of DCNv3 and DCNv4.

The letters of the shapes: B images; M groups of D channels; T taps of a group; Q output positions.
"""

from typing import Any

import numpy as np

from dcn_jax._layers import dcn
from dcn_jax.interop._onnx import sampling, windows
from dcn_jax.interop._onnx.graph import Graph, Size, Value
from dcn_jax.interop._onnx.layers import check_channels
from dcn_jax.nnx import DCNv3, DCNv4
from dcn_jax.ops.dcnv3 import Grid, centre, make_grid


def dcnv3(graph: Graph, layer: DCNv3, inputs: Value) -> Value:
    """A depthwise convolution, two projections, and the sum over taps."""
    grid, inputs = _grid(graph, layer, inputs), graph.channels_last(inputs)
    x = graph.add(layer.input_proj, inputs)
    z = graph.add(layer.dw_conv, _around_centres(graph, inputs, grid, layer.dw_conv.conv.kernel_size))
    z = graph.channels_last(z)
    offset = _by_group(graph, graph.add(layer.offset, z), layer.group)
    logits = _by_group(graph, graph.add(layer.mask, z), layer.group)
    y = _sum_taps(graph, grid, layer.group, x, offset, graph.emit("Softmax", logits, axis=-1), z)
    if layer.center_feature_scale:
        y = _blend(graph, layer, y, x, z, grid)
    return graph.add(layer.output_proj, y)


def dcnv4(graph: Graph, layer: DCNv4, inputs: Value) -> Value:
    """One projection, and the sum over taps."""
    grid, inputs = _grid(graph, layer, inputs), graph.channels_last(inputs)
    x = inputs if layer.value_proj is None else graph.add(layer.value_proj, inputs)
    if layer.offset_mask_dw is None:
        seen = _at_centres(graph, inputs, grid)
    else:
        size = layer.offset_mask_dw.kernel_size
        seen = graph.add(layer.offset_mask_dw, _around_centres(graph, inputs, grid, size))
    packed = graph.channels_last(graph.add(layer.offset_mask, graph.channels_last(seen)))
    used, taps = layer.group * grid.taps * 3, grid.taps
    packed = Value(graph.slice(packed, 0, used, 3), (*packed.shape[:-1], used), channels_last=True)
    values = _by_group(graph, packed, layer.group)  # (B · M, Q, 3 T)
    offset, weights = graph.slice(values, 0, 2 * taps, 2), graph.slice(values, 2 * taps, 3 * taps, 2)
    y = _sum_taps(graph, grid, layer.group, x, offset, weights, seen)
    if layer.center_feature_scale:
        y = _blend(graph, layer, y, x, y, grid)
    return y if layer.output_proj is None else graph.add(layer.output_proj, y)


def depthwise_block(graph: Graph, block: Any, x: Value) -> Value:
    """A convolution, a norm, an activation."""
    return graph.add(block.act, graph.add(block.norm, graph.add(block.conv, x)))


def _grid(graph: Graph, layer: Any, inputs: Value) -> Grid:
    """The taps over the map; their window's sizes are only true where those of the map are ints."""
    check_channels(graph, inputs, layer.channels)
    options, size = dcn.op_options(layer), dcn.square("kernel_size", layer.kernel_size)
    geometry = {name: options[name] for name in ("strides", "padding", "kernel_dilation")}
    window = windows.resolve(graph, inputs, size, **geometry)
    return make_grid((*window.spatial, layer.channels), **options)


def _by_group(graph: Graph, x: Value, groups: int) -> str:
    """A map `(B, H, W, M · values)` -> `(B · M, Q, values)`."""
    x, values = graph.channels_last(x), x.channels // groups
    height, width = x.spatial
    flat = graph.reshape(x, 0, -1, groups, values)
    known = isinstance(height, int) and isinstance(width, int)
    return sampling.by_head(graph, flat, height * width if known else Size(flat, 1), values)


def _sum_taps(graph: Graph, grid: Grid, groups: int, x: Value, offset: str, weights: str, at: Value) -> Value:
    """Σ_k m_k · x(p0 + s · (p_k + Δp_k)), with Δp `(B · M, Q, 2 T)` and m `(B · M, Q, T)`.

    The result has the size of the map `at`.
    """
    window, x = grid.window, graph.channels_first(x)
    maps = graph.reshape(x, -1, x.channels // groups, 0, 0)  # (B · M, D, H, W)
    points = graph.reshape(offset, 0, 0, grid.taps, 2)
    if grid.scale != 1:
        points = graph.emit("Mul", points, np.float32(grid.scale))
    points = graph.emit("Add", points, np.float32(grid.scale * _taps(grid)))
    out = [graph.size(at, axis) for axis in (1, 2)]
    lows = [low - middle for (low, _), middle in zip(window.pads, centre(window), strict=True)]
    first = sampling.starts(graph, out, window.strides, lows)
    pixels = graph.emit("Add", points, graph.emit("Unsqueeze", first, np.array([1])))  # (B · M, Q, T, 2)
    grid_of = sampling.from_pixels(graph, pixels, [graph.size(x, axis) for axis in (1, 2)])
    y = sampling.weighted_sum(graph, sampling.read(graph, maps, grid_of, 2), weights)  # (B · M, D, Q)
    y = graph.reshape(graph.reshape(y, -1, x.channels, 0), 0, x.channels, *out)
    return Value(y, (x.shape[0], *windows.sizes_after(x, window), x.channels))


def _taps(grid: Grid) -> np.ndarray:
    """The place of each tap from the centre, as (x, y), down the columns of the window: `(T, 2)`."""
    rows, columns = (
        dilation * np.arange(size) - middle
        for size, dilation, middle in zip(grid.window.size, grid.window.dilation, centre(grid.window), strict=True)
    )
    places = np.stack(np.meshgrid(columns, rows, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.delete(places, len(places) // 2, axis=0) if grid.remove_center else places


def _around_centres(graph: Graph, x: Value, grid: Grid, size: tuple[int, ...]) -> Value:
    """The map, padded or cropped for a convolution with taps `size` about the op's window centres."""
    window, pads = grid.window, []
    for axis, middle in enumerate(centre(window)):
        low, high = window.pads[axis]
        extent = (window.size[axis] - 1) * window.dilation[axis] + 1
        before = low - middle + (size[axis] - 1) // 2
        # As many outputs as the op's, whatever the size of the map.
        pads.append((before, low + high - extent + size[axis] - before))
    return windows.padded(graph, x, pads) if np.any(pads) else x


def _at_centres(graph: Graph, x: Value, grid: Grid) -> Value:
    """The pixels at the op's window centres, zero outside the map."""
    x = _around_centres(graph, x, grid, (1, 1))
    strides = grid.window.strides
    if strides == (1, 1):
        return x
    spatial = [-(-s // stride) if isinstance(s, int) else None for s, stride in zip(x.spatial, strides, strict=True)]
    far = np.full(2, np.iinfo(np.int64).max)
    return graph.node("Slice", x, np.zeros(2, np.int64), far, np.array([2, 3]), np.array(strides), spatial=spatial)


def _blend(graph: Graph, layer: Any, y: Value, x: Value, query: Value, grid: Grid) -> Value:
    """The mix y · (1 - σ) + x · σ, with σ = sigmoid(weight · query + bias), one for each group."""
    weight = graph.parameter(layer, "center_feature_scale_proj_weight", 2)
    bias = graph.parameter(layer, "center_feature_scale_proj_bias", 1)
    each = np.repeat(np.arange(layer.group), layer.channels // layer.group)  # the group of each channel
    logits = graph.emit("Add", graph.emit("MatMul", graph.channels_last(query), weight.T[:, each]), bias[each])
    share = Value(graph.emit("Sigmoid", logits), y.shape, channels_last=True)
    rest = graph.node("Mul", y, graph.node("Sub", np.float32(1), share))
    return graph.node("Add", rest, graph.node("Mul", _at_centres(graph, x, grid), share))
