"""Converters of functions: activations, pooling, means and softmax."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dcn_jax.interop._onnx import windows
from dcn_jax.interop._onnx.graph import USE_JAX_EXPORT, Graph, Value

# ---- activations


def operator(op_type: str) -> Callable[[Graph, Value], Value]:
    """The converter of a function that is one ONNX operator."""

    def convert(graph: Graph, x: Value) -> Value:
        return graph.node(op_type, x)

    return convert


def relu6(graph: Graph, x: Value) -> Value:
    """Clip to [0, 6]."""
    return graph.node("Clip", x, np.float32(0), np.float32(6))


def leaky_relu(graph: Graph, x: Value, negative_slope: float = 0.01) -> Value:
    """LeakyRelu."""
    return graph.node("LeakyRelu", x, alpha=float(negative_slope))


def silu(graph: Graph, x: Value) -> Value:
    """Silu: x · sigmoid(x)."""
    return graph.node("Mul", x, graph.node("Sigmoid", x))


def gelu(graph: Graph, x: Value, approximate: bool = True) -> Value:
    """Gelu, x · Φ(x), with Φ from the error function or as sigmoid(2 √(2 / π) (x + 0.044715 x³)).

    ONNX has an operator Gelu only from opset 20.
    """
    if approximate:
        cube = graph.node("Mul", graph.node("Mul", x, x), x)
        inner = graph.node("Add", x, graph.node("Mul", cube, np.float32(0.044715)))
        return graph.node("Mul", x, graph.node("Sigmoid", graph.node("Mul", inner, np.float32(np.sqrt(8 / np.pi)))))
    erf = graph.node("Erf", graph.node("Mul", x, np.float32(np.sqrt(0.5))))
    return graph.node("Mul", x, graph.node("Mul", graph.node("Add", erf, np.float32(1)), np.float32(0.5)))


# ---- pooling


def max_pool(graph: Graph, x: Value, window_shape: Any, strides: Any = None, padding: Any = "VALID") -> Value:
    """MaxPool."""
    attributes, spatial, _ = windows.attributes(graph, x, window_shape, strides=strides, padding=padding)
    return graph.node("MaxPool", x, spatial=spatial, **attributes)


def avg_pool(
    graph: Graph,
    x: Value,
    window_shape: Any,
    strides: Any = None,
    padding: Any = "VALID",
    count_include_pad: bool = True,
) -> Value:
    """AveragePool."""
    attributes, spatial, _ = windows.attributes(graph, x, window_shape, strides=strides, padding=padding)
    return graph.node("AveragePool", x, spatial=spatial, count_include_pad=int(count_include_pad), **attributes)


# ---- over axes


def mean(graph: Graph, x: Value, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Value:
    """The mean over any of JAX's axes but the batch's."""
    axes = _axes(graph, x, axis, "the mean")
    if keepdims:
        shape = tuple(1 if i in axes else size for i, size in enumerate(x.shape))
    else:
        shape = tuple(size for i, size in enumerate(x.shape) if i not in axes)
        if len(x.shape) - 1 in axes and len(shape) > 2:  # what is left is in JAX's order only if x is
            x = graph.channels_last(x)
    name = reduce(graph, "ReduceMean", x, [x.axis(i) for i in axes], keepdims)
    return Value(name, shape, x.channels_last)


def softmax(graph: Graph, x: Value, axis: int | Sequence[int] | None = -1) -> Value:
    """The softmax over any of JAX's axes but the batch's, together."""
    axes = [x.axis(i) for i in _axes(graph, x, axis, "the softmax")]
    if len(axes) == 1:
        return x._replace(name=graph.emit("Softmax", x, axis=axes[0]))
    below = graph.emit("Sub", x, reduce(graph, "ReduceMax", x, axes, keepdims=True))
    powers = graph.emit("Exp", below)
    total = graph.emit("ReduceSum", powers, np.array(axes), keepdims=1)
    return x._replace(name=graph.emit("Div", powers, total))


def reduce(graph: Graph, op_type: str, x: Value | str, axes: Sequence[int], keepdims: bool) -> str:
    """ReduceMean or ReduceMax, whose axes are an input only from opset 18."""
    if graph.opset < 18:
        return graph.emit(op_type, x, axes=list(axes), keepdims=int(keepdims))
    return graph.emit(op_type, x, np.array(axes), keepdims=int(keepdims))


def _axes(graph: Graph, x: Value, axis: Any, of: str) -> list[int]:
    """`axis` as axes of x in JAX's order, from 1; refuse the batch's."""
    rank = len(x.shape)
    axes = list(range(rank)) if axis is None else np.atleast_1d(axis).tolist()
    if not all(isinstance(a, int) and -rank <= a < rank for a in axes):
        graph.refuse(f"{of} over axis={axis!r} does not fit an array of {rank} axes; wanted ints from 1 to {rank - 1}")
    axes = sorted({a % rank for a in axes})
    if 0 in axes:
        graph.refuse(
            f"{of} over axis={axis!r} takes in axis 0, the batch, whose images a graph keeps apart; wanted axes from 1 "
            f"to {rank - 1}, such as axis={tuple(range(1, max(rank - 1, 2)))}, {USE_JAX_EXPORT}"
        )
    return axes
