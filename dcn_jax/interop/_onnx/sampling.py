"""Reading maps between pixels, by GridSample.

The letters of the shapes: N maps of C channels; n coordinates of a point, the last spatial axis
first; Q and P, two axes of points; M heads, T points of a head.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dcn_jax.geometry import canonical_padding_mode
from dcn_jax.interop._onnx.graph import USE_JAX_EXPORT, Graph, Size, Value

# ONNX's name of a method, before opset 20 and since.
_MODES = {"linear": ("bilinear", "linear"), "nearest": ("nearest", "nearest")}

# ONNX's name of a padding mode, and whether ±1 must be the centres of the outermost pixels there.
_PADDING_MODES = {
    "zeros": ("zeros", None),
    "edge": ("border", None),
    "reflect": ("reflection", True),
    "symmetric": ("reflection", False),
}

# Positions from -1 to 1 lie inside a map. At 4 every map, if it has but one pixel, is left behind.
_FAR = np.float32(4)


def read(
    graph: Graph,
    maps: str,
    grid: str,
    rank: int,
    *,
    method: str = "linear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> str:
    """What points read of maps: `(N, C, *spatial)`, `(N, Q, P, n)` in [-1, 1] -> `(N, C, Q, P)`."""
    if rank == 3 and graph.opset < 20:
        graph.refuse(f"maps over three axes are read from opset 20 on, and opset={graph.opset}; take 20 or later")
    if padding_mode == "zeros":  # infinite positions would make NaN
        grid = graph.emit("Clip", grid, -_FAR, _FAR)
    if rank == 1:  # a map of one row, all points in it
        maps = graph.emit("Unsqueeze", maps, np.array([2]))
        grid = graph.emit("Pad", grid, np.eye(8, dtype=np.int64)[7], np.float32(0))
    elif rank == 3:  # points have three axes as the map has
        grid = graph.emit("Unsqueeze", grid, np.array([3]))
    y = graph.emit(
        "GridSample",
        maps,
        grid,
        mode=_MODES[method][graph.opset >= 20],
        padding_mode=_PADDING_MODES[padding_mode][0],
        align_corners=int(align_corners),
    )
    return graph.emit("Squeeze", y, np.array([4])) if rank == 3 else y


def from_pixels(graph: Graph, pixels: str, spatial: Sequence[int | Size]) -> str:
    """Positions in [-1, 1], from pixels of maps of sizes `spatial`: (2 · pixel + 1) / size - 1."""
    size = _lengths(graph, spatial)
    step, first = _over(graph, 2, size), _over(graph, 1, size)
    before = first - np.float32(1) if isinstance(first, np.ndarray) else graph.emit("Sub", first, np.float32(1))
    return graph.emit("Add", graph.emit("Mul", pixels, step), before)


def _lengths(graph: Graph, spatial: Sequence[int | Size]) -> np.ndarray | str:
    """Sizes as floats, the last axis first: `(n,)`."""
    backwards = spatial[::-1]
    if all(isinstance(size, int) for size in backwards):
        return np.array(backwards, np.float32)
    return graph.emit("Cast", graph.emit("Concat", *(_length(graph, size) for size in backwards), axis=0), to=1)


def _length(graph: Graph, size: int | Size) -> np.ndarray | str:
    """A size as ints `(1,)`."""
    if isinstance(size, int):
        return np.array([size])
    return graph.emit("Shape", size.array, start=size.axis, end=size.axis + 1)


def _over(graph: Graph, number: float, size: np.ndarray | str) -> Any:
    """A number divided by sizes."""
    return np.float32(number) / size if isinstance(size, np.ndarray) else graph.emit("Div", np.float32(number), size)


def starts(graph: Graph, out: Sequence[Any], strides: Sequence[int], lows: Sequence[int]) -> np.ndarray | str:
    """The pixel output · stride - low of each output, the last axis first: `(N, n)`, row by row."""
    steps, shifts = np.array(strides[::-1], np.float32), -np.array(lows[::-1], np.float32)
    if all(isinstance(size, int) for size in out):
        index = np.indices(out).reshape(len(out), -1).T
        return index[:, ::-1].astype(np.float32) * steps + shifts
    sizes = [_length(graph, size) for size in out]
    count = sizes[0]
    for size in sizes[1:]:
        count = graph.emit("Mul", count, size)
    rest = graph.emit("Range", np.int64(0), graph.emit("Squeeze", count, np.array([0])), np.int64(1))
    columns = []
    for size in sizes[:0:-1]:
        columns.append(graph.emit("Mod", rest, size))
        rest = graph.emit("Div", rest, size)
    columns = [graph.emit("Unsqueeze", column, np.array([1])) for column in (*columns, rest)]
    index = graph.emit("Cast", graph.emit("Concat", *columns, axis=1), to=1)
    return graph.emit("Add", graph.emit("Mul", index, steps), shifts)


def with_batch(graph: Graph, x: Value, rank: int) -> Value:
    """An array of `rank` axes; if x has one less, that of the batch is put before them."""
    if len(x.shape) != rank - 1:
        return x
    x = graph.channels_last(x)
    return Value(graph.emit("Unsqueeze", x, np.array([0])), (1, *x.shape), channels_last=True)


def for_each_image(graph: Graph, x: str, rank: int, images: Value) -> str:
    """An array `(1, …)` of `rank` axes, repeated for each of `images`."""
    batch = graph.size(images, 0)
    shape = graph.emit("Concat", _length(graph, batch), np.ones(rank - 1, np.int64), axis=0)
    return graph.emit("Expand", x, shape)


def by_head(graph: Graph, x: str, queries: int | Size, values: int) -> str:
    """Heads as a part of the batch: `(B, Q, M, values)` -> `(B · M, Q, values)`."""
    return graph.reshape(graph.emit("Transpose", x, perm=[0, 2, 1, 3]), -1, queries, values)


def weighted_sum(graph: Graph, samples: str, weights: str) -> str:
    """The sum over points: `(N, C, Q, P)`, `(N, Q, P)` -> `(N, C, Q)`."""
    weighted = graph.emit("Mul", samples, graph.emit("Unsqueeze", weights, np.array([1])))
    return graph.emit("ReduceSum", weighted, np.array([3]), keepdims=0)


def grid_sample(
    graph: Graph,
    features: Value,
    grid: Value,
    method: str = "linear",
    padding_mode: Any = "zeros",
    align_corners: bool = False,
) -> Value:
    """`dcn_jax.grid_sample`."""
    rank = len(features.spatial)
    if method not in _MODES:
        graph.refuse(f"method={method!r} is not known; wanted one of {tuple(_MODES)}")
    if rank not in (1, 2, 3) or grid.channels != rank or len(grid.shape) < 2:
        graph.refuse(
            f"grid has shape {grid.shape}; wanted (batch, *query, {rank}), since features have shape {features.shape}, "
            "(batch, *spatial, C)"
        )
    modes = set(canonical_padding_mode(padding_mode, rank))
    mode = modes.pop()
    if modes or mode not in _PADDING_MODES:
        graph.refuse(
            f"padding_mode={padding_mode!r} has no form in ONNX, whose GridSample has one for all axes: use one of "
            f"{tuple(_PADDING_MODES)}, {USE_JAX_EXPORT}"
        )
    maps, grid = graph.channels_first(features), graph.channels_last(grid)
    points = grid.name
    wanted = _PADDING_MODES[mode][1]
    if wanted not in (None, align_corners):
        spatial = [graph.size(features, axis) for axis in range(1, rank + 1)]
        points, align_corners = _realigned(graph, points, spatial, align_corners), wanted
    queries = [graph.size(grid, axis) for axis in range(1, len(grid.shape) - 1)]
    if len(queries) != 2:
        points = graph.reshape(points, 0, -1, 1, rank)
    y = read(graph, maps.name, points, rank, method=method, padding_mode=mode, align_corners=align_corners)
    if len(queries) != 2:
        y = graph.reshape(y, 0, features.channels, *queries)
    return Value(y, (*grid.shape[:-1], features.channels))


def _realigned(graph: Graph, grid: str, spatial: Sequence[int | Size], align_corners: bool) -> str:
    """The same positions where ±1 are the edges of the map instead of its outermost centres, or back."""
    size = _lengths(graph, spatial)
    inner = size - 1 if isinstance(size, np.ndarray) else graph.emit("Sub", size, np.float32(1))
    if align_corners:
        return graph.emit("Div", graph.emit("Mul", grid, inner), size)
    # A map of one pixel is that pixel everywhere.
    inner = np.maximum(inner, 1) if isinstance(inner, np.ndarray) else graph.emit("Max", inner, np.float32(1))
    return graph.emit("Div", graph.emit("Mul", grid, size), inner)
