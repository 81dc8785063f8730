"""Converters of multi-scale deformable attention, the layer and the op.

The letters of the shapes: B images; S pixels of all levels; Q queries; M heads of D channels,
E = M · D; L levels; T points of all levels of a head, P of one level; n coordinates of a point, the
last spatial axis first.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dcn_jax._layers.ms_deform_attn import points_per_level as points_of_layer
from dcn_jax.interop._onnx import sampling
from dcn_jax.interop._onnx.graph import Graph, Value, may_be_equal
from dcn_jax.interop._onnx.layers import check_channels
from dcn_jax.nnx import MSDeformAttn
from dcn_jax.ops.ms_deform_attn.call import METHODS, check_spatial_shapes


class _Levels(NamedTuple):
    """The maps, and how each is read."""

    shapes: tuple[tuple[int, ...], ...]
    points: tuple[int, ...]
    heads: int
    method: str

    @property
    def rank(self) -> int:
        """How many coordinates a point has: n."""
        return len(self.shapes[0])

    @property
    def pixels(self) -> list[int]:
        """How many pixels each map has."""
        return [math.prod(shape) for shape in self.shapes]

    def each_point(self, values: Any) -> np.ndarray:
        """A value per level for each of the T points."""
        return np.repeat(np.array(values), self.points, axis=0)


def layer(
    graph: Graph,
    attention: MSDeformAttn,
    query: Value,
    reference_points: Value,
    value: Value,
    spatial_shapes: Any,
    padding_mask: Value | None = None,
) -> Value:
    """The four projections, and between them the op."""
    shapes = _check_shapes(graph, spatial_shapes, value)
    points = points_of_layer(attention)
    levels = _Levels(shapes, points, attention.num_heads, attention.method)
    total, rank = sum(points), getattr(attention, "num_axes", 2)
    if (len(shapes), levels.rank) != (attention.num_levels, rank):
        graph.refuse(
            f"spatial_shapes={shapes} has {len(shapes)} levels of {levels.rank} sizes; wanted {rank} for each of "
            f"num_levels={attention.num_levels}"
        )
    query = sampling.with_batch(graph, query, 3)
    for name, given in (("query", query), ("value", value)):
        check_channels(graph, given, attention.embed_dim, name)
        if len(given.shape) != 3:
            graph.refuse(f"{name} has shape {given.shape}; wanted three axes, (batch, length, {attention.embed_dim})")
    query = graph.channels_last(query)
    value = graph.channels_last(graph.add(attention.value_proj, graph.channels_last(value)))
    if padding_mask is not None:
        value = _zero_at(graph, padding_mask, value)
    offset = graph.reshape(graph.add(attention.sampling_offsets, query), 0, 0, levels.heads, total * levels.rank)
    reference_points = _check_reference(graph, levels, reference_points, value, query)
    locations = _locations(graph, levels, offset, reference_points)
    logits = graph.reshape(graph.add(attention.attention_weights, query), 0, 0, levels.heads, total)
    weights = graph.emit("Softmax", logits, axis=-1)
    if query.shape[0] == 1 != value.shape[0]:  # all images share the queries
        weights = sampling.for_each_image(graph, weights, 4, value)
        if reference_points.shape[0] == 1:
            locations = sampling.for_each_image(graph, locations, 4, value)
    y = _attend(graph, levels, value, locations, weights, query)
    return graph.add(attention.output_proj, graph.channels_last(y))


def op(
    graph: Graph,
    value: Value,
    spatial_shapes: Any,
    sampling_locations: Value,
    attention_weights: Value,
    points_per_level: Sequence[int] | None = None,
    method: str = "linear",
    implementation: str | None = None,
) -> Value:
    """`dcn_jax.ms_deform_attn`."""
    shapes = _check_shapes(graph, spatial_shapes, value)
    if method not in METHODS:
        graph.refuse(f"method={method!r} is not known; wanted one of {METHODS}")
    *_, heads, channels = value.shape
    each = attention_weights.shape[3:]
    points = (each[-1],) * len(shapes) if points_per_level is None else tuple(points_per_level)
    if math.prod(each) != sum(points) or sampling_locations.shape[3:] != (*each, len(shapes[0])):
        graph.refuse(
            f"sampling_locations has shape {sampling_locations.shape} and attention_weights {attention_weights.shape}; "
            f"wanted the points of {len(shapes)} levels, each with {len(shapes[0])} coordinates, and a weight for each"
        )
    levels = _Levels(shapes, points, heads, method)
    value = graph.channels_last(value)
    value = Value(graph.reshape(value, 0, 0, -1), (*value.shape[:2], heads * channels), channels_last=True)
    weights = graph.channels_last(attention_weights)
    locations = graph.reshape(graph.channels_last(sampling_locations), 0, 0, heads, sum(points) * levels.rank)
    return _attend(graph, levels, value, locations, graph.reshape(weights, 0, 0, heads, sum(points)), weights)


def _check_shapes(graph: Graph, given: Any, value: Value) -> tuple[tuple[int, ...], ...]:
    """`spatial_shapes` as ints that fit `value`."""
    if isinstance(given, Value):
        graph.refuse(
            "spatial_shapes is an input, and a graph must know it: constants={'spatial_shapes': ((H1, W1), …)}"
        )
    shapes, pixels = check_spatial_shapes(given), value.shape[1]
    total = sum(map(math.prod, shapes))
    if isinstance(pixels, int) and pixels != total:
        graph.refuse(
            f"value has shape {value.shape}; wanted {total} pixels, those of all levels one after another, as "
            f"spatial_shapes={shapes} has them"
        )
    return shapes


def _zero_at(graph: Graph, padding_mask: Value, value: Value) -> Value:
    """`value`, zero where the mask `(B, S)` is True."""
    wanted = value.shape[:2]
    if len(padding_mask.shape) != 2 or not all(map(may_be_equal, padding_mask.shape, wanted)):
        graph.refuse(f"padding_mask has shape {padding_mask.shape}; wanted {wanted}: one bool for each pixel of value")
    mask = graph.emit("Unsqueeze", graph.typed(padding_mask, bool), np.array([2]))
    return value._replace(name=graph.emit("Where", mask, np.float32(0), value))


def _check_reference(graph: Graph, levels: _Levels, reference: Value, value: Value, query: Value) -> Value:
    """`reference_points` as `(B or 1, Q, L or 1, n or 2 n)`."""
    reference, rank = graph.channels_last(sampling.with_batch(graph, reference, 4)), levels.rank
    wanted = (value.shape[0], query.shape[1], len(levels.shapes))
    shared = [(1,), (), (1,)]  # sizes of the batch and of the levels that stand for all
    fits = [may_be_equal(*pair) or pair[0] in one for *pair, one in zip(reference.shape, wanted, shared, strict=False)]
    if len(reference.shape) != 4 or not all(fits) or reference.channels not in (rank, 2 * rank):
        graph.refuse(
            f"reference_points has shape {reference.shape}; wanted {(*wanted, f'{rank} or {2 * rank}')}: a point or a box "
            "for each query and level; the axis of levels may be 1, that of the batch 1 or missing"
        )
    if not may_be_equal(query.shape[0], value.shape[0]) and query.shape[0] != 1:
        graph.refuse(f"query has shape {query.shape}; wanted the batch of value, {value.shape[0]}, or 1")
    return reference


def _locations(graph: Graph, levels: _Levels, offset: str, reference: Value) -> str:
    """Where each point reads, in [0, 1] inside a map: `(B, Q, M, T · n)`."""
    rank = levels.rank
    own = range(len(levels.shapes)) if reference.shape[2] != 1 else [0] * len(levels.shapes)
    each = graph.emit("Gather", reference, levels.each_point(own), axis=2)  # (B, Q, T, n or 2 n)
    flat = sum(levels.points) * rank
    if reference.channels == rank:
        centre = graph.reshape(each, 0, 0, 1, flat)
        step: Any = levels.each_point([1 / np.array(shape[::-1], np.float32) for shape in levels.shapes]).ravel()
    else:
        centre = graph.reshape(graph.slice(each, 0, rank, 3), 0, 0, 1, flat)
        share = levels.each_point([[0.5 / count] * rank for count in levels.points]).ravel().astype(np.float32)
        step = graph.emit("Mul", graph.reshape(graph.slice(each, rank, 2 * rank, 3), 0, 0, 1, flat), share)
    return graph.emit("Add", centre, graph.emit("Mul", offset, step))


def _attend(graph: Graph, levels: _Levels, value: Value, locations: str, weights: str, query: Value) -> Value:
    """The op: `(B, S, E)`, `(B, Q, M, T · n)`, `(B, Q, M, T)` -> `(B, Q, E)`, channels first."""
    queries, total = graph.size(query, 1), sum(levels.points)
    locations = sampling.by_head(graph, locations, queries, total * levels.rank)
    weights = sampling.by_head(graph, weights, queries, total)
    points = graph.reshape(locations, 0, 0, total, levels.rank)  # (B · M, Q, T, n)
    read = _gathered if levels.method == "discrete" else _sampled
    y = read(graph, levels, value, points, weights)  # (B · M, D, Q)
    return Value(graph.reshape(y, -1, value.channels, 0), (value.shape[0], query.shape[1], value.channels))


def _sampled(graph: Graph, levels: _Levels, value: Value, points: str, weights: str) -> str:
    """Each level read by GridSample."""
    columns = graph.emit("Transpose", value, perm=[0, 2, 1])  # (B, E, S)
    grid = graph.emit("Sub", graph.emit("Mul", points, np.float32(2)), np.float32(1))
    y, ends, spans = "", itertools.accumulate(levels.pixels), itertools.accumulate(levels.points)
    for shape, end, last, count in zip(levels.shapes, ends, spans, levels.points, strict=True):
        pixels = graph.slice(columns, end - math.prod(shape), end, 2)
        maps = graph.reshape(pixels, -1, value.channels // levels.heads, *shape)  # (B · M, D, H, W)
        own = graph.slice(grid, last - count, last, 2), graph.slice(weights, last - count, last, 2)
        samples = sampling.read(graph, maps, own[0], levels.rank, method=levels.method)
        part = sampling.weighted_sum(graph, samples, own[1])
        y = graph.emit("Add", y, part) if y else part
    return y


def _gathered(graph: Graph, levels: _Levels, value: Value, points: str, weights: str) -> str:
    """Whole pixels of all levels by one GatherND: that at trunc(location · size + 0.5), clamped to the map."""
    size = levels.each_point([shape[::-1] for shape in levels.shapes]).astype(np.float32)  # (T, n)
    pixel = graph.emit("Add", graph.emit("Mul", points, size), np.float32(0.5))
    pixel = graph.emit("Floor", graph.emit("Min", graph.emit("Max", pixel, np.float32(0)), size - np.float32(1)))
    strides = levels.each_point([np.cumprod((1, *shape[:0:-1])) for shape in levels.shapes])
    starts = levels.each_point(np.cumsum((0, *levels.pixels))[:-1])
    row = graph.emit("Mul", graph.emit("Cast", pixel, to=7), strides)
    row = graph.emit("Add", graph.emit("ReduceSum", row, np.array([3]), keepdims=1), starts[:, None])
    row = graph.emit("Clip", row, np.int64(0), np.int64(sum(levels.pixels) - 1))  # a NaN is cast to any int
    rows = sampling.by_head(
        graph,
        graph.reshape(value, 0, 0, levels.heads, -1),
        sum(levels.pixels),
        value.channels // levels.heads,
    )  # (B · M, S, D)
    samples = graph.emit("GatherND", rows, row, batch_dims=1)  # (B · M, Q, T, D)
    y = graph.emit("MatMul", graph.emit("Unsqueeze", weights, np.array([2])), samples)  # (B · M, Q, 1, D)
    return graph.emit("Transpose", graph.emit("Squeeze", y, np.array([2])), perm=[0, 2, 1])
