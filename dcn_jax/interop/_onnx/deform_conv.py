"""The converter of DeformConv: one node, or with `decompose` GridSample and a product."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dcn_jax._layers import offset_conv
from dcn_jax.interop._onnx import sampling, windows
from dcn_jax.interop._onnx.graph import USE_JAX_EXPORT, AxisSize, Graph, Value, may_be_equal
from dcn_jax.interop._onnx.layers import check_channels, check_usual, given_inputs, kernel_first
from dcn_jax.nnx import DeformConv


def deform_conv(
    graph: Graph,
    layer: DeformConv,
    inputs: Value,
    offset: Value | None = None,
    mask: Value | None = None,
    *,
    offset_inputs: Value | None = None,
    base_offset: Value | None = None,
) -> Value:
    """The branch, its split, and the convolution; if `offset` is given, the convolution alone."""
    rank = len(layer.kernel_size)
    if rank != 2 and not graph.decompose:
        graph.refuse(
            f"kernel_size={layer.kernel_size} has {rank} spatial axes, and ONNX's runtimes have DeformConv for 2 "
            f"alone: use 2, decompose=True, {USE_JAX_EXPORT}"
        )
    check_usual(graph, layer, "promote_dtype")
    check_channels(graph, inputs, layer.in_features)
    attributes, spatial, window = windows.attributes(graph, inputs, layer.kernel_size, **offset_conv.geometry(layer))
    per_group = window.taps * rank
    if offset is None:
        if mask is not None:
            graph.refuse("mask was given without offset; wanted both, or neither: then the branch emits both")
        offset, mask = _from_branch(graph, layer, inputs, spatial, offset_inputs, base_offset)
    elif offset_inputs is not None or base_offset is not None:
        graph.refuse("offset_inputs or base_offset was given beside offset, with which no branch runs; leave one out")
    groups = offset.channels // per_group if isinstance(offset.channels, int) else 0
    if groups == 0 or offset.channels % per_group or layer.in_features % groups:
        graph.refuse(
            f"offset has {offset.channels} channels; wanted OG * {per_group}: K * n = {window.taps} * {rank} values "
            f"for each of OG offset groups, which divide the {layer.in_features} channels of the input"
        )
    offset = _fitted(graph, "offset", offset, inputs, spatial, groups * per_group)
    if mask is not None:
        mask = _fitted(graph, "mask", mask, inputs, spatial, groups * window.taps)
    kernel, bias = kernel_first(graph, layer, rank), graph.parameter(layer, "bias", 1)
    if graph.decompose:
        call = _Call(window, groups, layer.feature_group_count, spatial)
        return _decomposed(graph, call, inputs, kernel, offset, mask, bias)
    return graph.node(
        "DeformConv",
        *given_inputs(inputs, kernel, offset, bias, mask),
        channels=layer.out_features,
        spatial=spatial,
        group=layer.feature_group_count,
        offset_group=groups,
        **attributes,
    )


def _fitted(graph: Graph, name: str, given: Value, inputs: Value, spatial: Sequence[AxisSize], channels: int) -> Value:
    """An array of the call's positions, with the batch of `inputs`; refuse another shape."""
    given = sampling.with_batch(graph, given, len(inputs.shape))
    batch, own = inputs.shape[0], given.shape[0]
    sizes = zip((own, *given.spatial), (own if own == 1 else batch, *spatial), strict=False)
    same_rank = len(given.shape) == len(inputs.shape)
    if not same_rank or given.channels != channels or not all(may_be_equal(*pair) for pair in sizes):
        graph.refuse(
            f"{name} has shape {given.shape}; wanted ({', '.join(map(str, (batch, *spatial)))}, {channels}): the output "
            "positions, then the values of each; the axis of the batch may be 1 or missing"
        )
    if own == batch or own != 1:
        return given
    given = graph.channels_first(given)
    return Value(sampling.for_each_image(graph, given.name, len(given.shape), inputs), (batch, *given.shape[1:]))


# ---- the branch


def _from_branch(
    graph: Graph,
    layer: DeformConv,
    inputs: Value,
    spatial: Sequence[AxisSize],
    offset_inputs: Value | None,
    base_offset: Value | None,
) -> tuple[Value, Value | None]:
    """Offset `(batch, OG * K * n, …)` and mask `(batch, OG * K, …)` from the branch."""
    if not layer.offset_branch:
        graph.refuse(
            "offset_branch=False leaves it without offsets; in the converter of the model that makes them, add it "
            "by graph.add(layer, x, offset, mask), or give offset in input_shape"
        )
    seen = inputs if offset_inputs is None else offset_inputs
    name = "its input" if offset_inputs is None else "offset_inputs"
    check_channels(graph, seen, layer.offset_in_features, name)
    z = graph.add(layer.offset_conv, seen)
    offsets, logits = offset_conv.branch_channels(layer)
    if z.channels != offsets + logits:
        graph.refuse(f"its branch emits {z.channels} channels; wanted {offsets + logits}")
    offset = _activated(graph, layer, _channels(graph, z, 0, offsets))
    offset = _bound(graph, offset, offset_conv.bounds_of(layer.max_offset, len(layer.kernel_size)))
    if base_offset is not None:
        offset = _add_base(graph, layer, offset, base_offset, inputs, spatial)
    if not layer.modulated:
        return offset, None
    mask = graph.node("Sigmoid", _channels(graph, z, offsets, z.channels))
    return offset, mask if layer.mask_scale == 1 else graph.node("Mul", mask, np.float32(layer.mask_scale))


def _activated(graph: Graph, layer: DeformConv, z: Value) -> Value:
    """`offset_activation` of the offsets, which it gets as `(…, OG, K, n)`."""
    function = getattr(layer, "offset_activation", None)
    if function is None:
        return z
    z, rank = graph.channels_last(z), len(layer.kernel_size)
    groups = (layer.offset_groups, int(np.prod(layer.kernel_size)), rank)
    sizes = [0, *(graph.size(z, axis) for axis in range(1, rank + 1))]
    apart = Value(graph.reshape(z, *sizes, *groups), (*z.shape[:-1], *groups), channels_last=True)
    y = graph.channels_last(graph.add(function, apart))
    return z._replace(name=graph.reshape(y, *sizes, z.channels))


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
        return np.tile(np.array(values, dtype), z.channels // len(bounds)).reshape(-1, *(1 for _ in bounds))

    divisor = per_channel([bound or 1 for bound in bounds], np.float32)  # a bound of 0 makes 0 · tanh(z)
    factor = per_channel([bound or 0 for bound in bounds], np.float32)
    bounded = graph.node("Mul", graph.node("Tanh", graph.node("Div", z, divisor)), factor)
    if None not in bounds:
        return bounded
    return graph.node("Where", per_channel([bound is None for bound in bounds], bool), z, bounded)


def _add_base(
    graph: Graph, layer: DeformConv, offset: Value, base: Value, inputs: Value, spatial: Sequence[AxisSize]
) -> Value:
    """`offset` + `base`, of as many channels or of n: one vector for all taps."""
    rank = len(layer.kernel_size)
    base = _fitted(graph, "base_offset", base, inputs, spatial, rank if base.channels == rank else offset.channels)
    if base.channels != offset.channels:
        repeats = np.array([1, offset.channels // rank, *(1 for _ in spatial)])
        base = graph.node("Tile", base, repeats, channels=offset.channels)
    return graph.node("Add", offset, base)


# ---- without a DeformConv node


class _Call(NamedTuple):
    """A deformable convolution, but for its arrays."""

    window: Any
    offset_groups: int
    groups: int
    spatial: Sequence[AxisSize]  # of the result


def _decomposed(
    graph: Graph,
    call: _Call,
    x: Value,
    kernel: np.ndarray,
    offset: Value,
    mask: Value | None,
    bias: np.ndarray | None,
) -> Value:
    """All taps read by one GridSample, then one matrix product.

    The letters of the shapes: B images, OG offset groups, K taps, n spatial axes, N outputs.
    """
    window, groups, taps, rank = call.window, call.offset_groups, call.window.taps, call.window.rank
    x, offset = graph.channels_first(x), graph.channels_first(offset)
    maps = graph.reshape(x, -1, x.channels // groups, *(0 for _ in x.spatial))  # (B · OG, C / OG, *spatial)
    moved = _by_group(graph, offset, groups, taps, rank)  # (B · OG, K, n, N)
    if rank > 1:
        moved = graph.emit("Gather", moved, np.arange(rank)[::-1], axis=2)  # the last axis first
    moved = graph.emit("Transpose", moved, perm=[0, 1, 3, 2])  # (B · OG, K, N, n)
    pixels = graph.emit("Add", moved, _taps(window)[:, None])
    out = [graph.size(offset, axis) for axis in range(1, rank + 1)]
    pixels = graph.emit("Add", pixels, sampling.starts(graph, out, window.strides, [low for low, _ in window.pads]))
    grid = sampling.from_pixels(graph, pixels, [graph.size(x, axis) for axis in range(1, rank + 1)])
    samples = sampling.read(graph, maps, grid, rank)  # (B · OG, C / OG, K, N)
    if mask is not None:
        samples = graph.emit("Mul", samples, _by_group(graph, graph.channels_first(mask), groups, 1, taps))
    columns = graph.reshape(samples, -1, call.groups, x.channels // call.groups * taps, 0)  # (B, G, C / G · K, N)
    y = graph.emit("MatMul", kernel.reshape(call.groups, len(kernel) // call.groups, -1), columns)  # (B, G, F / G, N)
    y = graph.reshape(y, 0, len(kernel), *out)
    if bias is not None:
        y = graph.emit("Add", y, bias.reshape(-1, *(1 for _ in out)))
    return Value(y, (x.shape[0], *call.spatial, len(kernel)))


def _by_group(graph: Graph, x: Value, groups: int, *values: int) -> str:
    """`(B, OG · values, *out)` -> `(B · OG, *values, N)`."""
    return graph.reshape(graph.reshape(x, 0, groups, int(np.prod(values)), -1), -1, *values, 0)


def _taps(window: Any) -> np.ndarray:
    """From the first tap to each tap, in pixels, the last axis first: `(K, n)`."""
    index = np.stack(np.meshgrid(*map(np.arange, window.size), indexing="ij"), axis=-1).reshape(window.taps, -1)
    return (index * window.dilation)[:, ::-1].astype(np.float32)
