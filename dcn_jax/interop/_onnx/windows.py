"""Windows over maps, in ONNX's attributes, and arrays that lie around windows."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dcn_jax.geometry import Padding, Window, resolve_window
from dcn_jax.interop._onnx.graph import USE_JAX_EXPORT, AxisSize, Graph, Value

_LARGE = 2**20  # stands for an unknown size; any window fits in it


def resolve(graph: Graph, x: Value, size: Sequence[int], *, strides: Any, padding: Padding, **options: Any) -> Window:
    """The window over the map x; its sizes are only true where those of x are ints.

    Pads are numbers in ONNX. Raise if they depend on a size that is not known yet.
    """
    if len(size) != len(x.spatial):
        graph.refuse(
            f"a window of {tuple(size)} does not fit a map with {len(x.spatial)} spatial axes; wanted an "
            f"input_shape of (batch, *spatial, channels) with {len(size)}"
        )
    at = functools.partial(resolve_window, size, strides=strides, padding=padding, **options)
    window = at(spatial=[s if isinstance(s, int) else _LARGE for s in x.spatial])
    for more in range(1, max(window.strides)):  # the pads of "SAME" depend on size % stride
        if at(spatial=[s if isinstance(s, int) else _LARGE + more for s in x.spatial]).pads != window.pads:
            graph.refuse(
                f"padding={padding!r} at strides {window.strides} depends on the size of the map, {x.spatial}, and "
                "ONNX's pads are numbers; give that size as an int in input_shape, or the layer's padding as ints"
            )
    if set(window.padding_mode) != {"zeros"}:
        graph.refuse(
            f"padding={padding!r} with padding_mode={window.padding_mode} has no form in ONNX, which pads "
            f"with zeros: use zeros, {USE_JAX_EXPORT}"
        )
    return window


def sizes_after(x: Value, window: Window) -> tuple[AxisSize, ...]:
    """The sizes of a window's result. An open one keeps its name if the window does not change it."""
    axes = zip(x.spatial, window.out_spatial, window.size, window.dilation, window.strides, window.pads, strict=True)
    return tuple(
        out if isinstance(s, int) else s if stride == 1 and sum(pads) == (k - 1) * d else None
        for s, out, k, d, stride, pads in axes
    )


def attributes(
    graph: Graph, x: Value, size: Sequence[int], *, padding: Padding, **options: Any
) -> tuple[dict[str, Any], tuple[AxisSize, ...], Window]:
    """A window over the map x: ONNX's attributes, the sizes of the result, and the window itself."""
    window = resolve(graph, x, size, padding=padding, **options)
    lows, highs = zip(*window.pads, strict=True)
    if min(*lows, *highs) < 0:
        graph.refuse(f"padding={padding!r} crops, and pads in ONNX are 0 or more: slice the map, {USE_JAX_EXPORT}")
    named = {
        "kernel_shape": list(window.size),
        "strides": list(window.strides),
        "pads": [*lows, *highs],
        "dilations": list(window.dilation),
    }
    return named, sizes_after(x, window), window


def padded(graph: Graph, x: Value, pads: Sequence[tuple[int, int]]) -> Value:
    """The map x with zeros around it; negative pads crop."""
    x, rank = graph.channels_first(x), len(x.spatial)
    name = x.name
    zeros = np.maximum(pads, 0).T  # (2, rank)
    if zeros.any():
        name = graph.emit("Pad", name, np.pad(zeros, [(0, 0), (2, 0)]).ravel(), np.float32(0))
    if np.min(pads) < 0:
        start, stop = -np.minimum(pads, 0).T
        stop = np.where(stop > 0, -stop, np.iinfo(np.int64).max)
        name = graph.emit("Slice", name, start, stop, np.arange(2, 2 + rank))
    grown = zip(x.spatial, map(sum, pads), strict=True)
    sizes = [s + more if isinstance(s, int) else s if more == 0 else None for s, more in grown]
    return Value(name, (x.shape[0], *sizes, x.channels))
