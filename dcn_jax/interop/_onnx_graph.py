"""An ONNX graph under construction: its nodes and the arrays that they need.

Inside a graph maps are channels first, `(batch, C, *spatial)`, as ONNX has them. This file does
not need the package onnx.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from dcn_jax.geometry import Padding, resolve_window

# An int; or, if the size is known only when the graph runs, a name or None.
AxisSize = int | str | None

USE_JAX_EXPORT = "or use jax.export, which takes every model (docs/exporting.md)"

_LARGE = 2**20  # stands for an unknown size; any window fits in it


class Value(NamedTuple):
    """The result of a node: a map `(batch, C, *spatial)`, or vectors `(batch, C)`."""

    name: str
    channels: int
    spatial: tuple[AxisSize, ...]


class Node(NamedTuple):
    """What `onnx.helper.make_node` needs."""

    op_type: str
    inputs: list[str]
    output: str  # also the name of the node
    attributes: dict[str, Any]


class Graph:
    """Nodes in the order in which they run, and the arrays that do not depend on the input.

    Args:
        converters: functions that add the nodes of a module, by its class, or of a function, by
            that function. They are called as `converter(graph, module, x)`, or
            `converter(graph, x)` for a function, and return a `Value`.
        paths: where each module is in the model, by its `id`: "layer1.0.conv2".
    """

    def __init__(self, converters: Mapping[Any, Callable[..., Value]], paths: Mapping[int, str]):
        self.nodes: list[Node] = []
        self.arrays: dict[str, np.ndarray] = {}
        self._converters = converters
        self._paths = paths
        self._scope = ""  # the path of the module whose nodes are being added
        self._named: Counter[str] = Counter()

    def add(self, part: Any, *values: Value) -> Value:
        """Add the nodes of a module, a function, or a `functools.partial` of a function."""
        outer, self._scope = self._scope, self._paths.get(id(part), self._scope)
        y = self._converter(part)(self, *values)
        self._scope = outer
        return y

    def node(
        self,
        op_type: str,
        *inputs: Value | np.ndarray | np.generic | None,
        channels: int | None = None,
        spatial: Sequence[AxisSize] | None = None,
        **attributes: Any,
    ) -> Value:
        """Add one node.

        Args:
            op_type: ONNX's name of the operator.
            inputs: in ONNX's order; arrays become part of the model, None omits an input.
            channels: of the result; by default those of the first input.
            spatial: sizes of the result; by default those of the first input.
            attributes: of the operator, by ONNX's names.
        """
        name = f"{self._scope}/{op_type}" if self._scope else op_type
        self._named[name] += 1
        if self._named[name] > 1:
            name = f"{name}_{self._named[name]}"
        names = [self._input(f"{name}/{position}", given) for position, given in enumerate(inputs)]
        self.nodes.append(Node(op_type, names, name, attributes))
        first: Any = inputs[0]
        return Value(
            name, first.channels if channels is None else channels, first.spatial if spatial is None else tuple(spatial)
        )

    def _input(self, name: str, given: Any) -> str:
        """The name of an input; an array is first added to the graph under the name `name`."""
        if given is None:
            return ""
        if isinstance(given, Value):
            return given.name
        self.arrays[name] = np.asarray(given)
        return name

    def window(
        self, x: Value, size: Sequence[int], *, strides: Any, padding: Padding, **options: Any
    ) -> tuple[dict[str, Any], tuple[AxisSize, ...]]:
        """A window over the map x: its attributes in ONNX, and the sizes of the result.

        Pads are numbers in ONNX. Raise if they depend on a size that is not known yet.
        """
        if len(size) != len(x.spatial):
            self.refuse(
                f"a window of {tuple(size)} does not fit a map with {len(x.spatial)} spatial axes; wanted an "
                f"input_shape of (batch, *spatial, channels) with {len(size)}"
            )
        resolve = functools.partial(resolve_window, size, strides=strides, padding=padding, **options)
        window = resolve(spatial=[s if isinstance(s, int) else _LARGE for s in x.spatial])
        for more in range(1, max(window.strides)):  # the pads of "SAME" depend on size % stride
            if resolve(spatial=[s if isinstance(s, int) else _LARGE + more for s in x.spatial]).pads != window.pads:
                self.refuse(
                    f"padding={padding!r} at strides {window.strides} depends on the size of the map, {x.spatial}, and "
                    "ONNX's pads are numbers; give that size as an int in input_shape, or the layer's padding as ints"
                )
        if set(window.padding_mode) != {"zeros"}:
            self.refuse(
                f"padding={padding!r} with padding_mode={window.padding_mode} has no form in ONNX, which pads "
                f"with zeros: use zeros, {USE_JAX_EXPORT}"
            )
        lows, highs = zip(*window.pads, strict=True)
        if min(*lows, *highs) < 0:
            self.refuse(f"padding={padding!r} crops, and pads in ONNX are 0 or more: slice the map, {USE_JAX_EXPORT}")
        attributes = {
            "kernel_shape": list(window.size),
            "strides": list(window.strides),
            "pads": [*lows, *highs],
            "dilations": list(window.dilation),
        }
        # An unknown size keeps its name if the window does not change it; otherwise it has no name.
        kept = [
            stride == 1 and low + high == (k - 1) * d
            for k, d, stride, low, high in zip(size, window.dilation, window.strides, lows, highs, strict=True)
        ]
        spatial = zip(x.spatial, window.out_spatial, kept, strict=True)
        return attributes, tuple(out if isinstance(s, int) else s if same else None for s, out, same in spatial)

    def refuse(self, sentence: str) -> NoReturn:
        """Raise ValueError with this sentence, after the path of the module that is being converted."""
        raise ValueError(f"{self._scope}: {sentence}" if self._scope else sentence)

    def _converter(self, part: Any) -> Callable[..., Value]:
        """The function that adds the nodes of `part`, called with the graph and the values."""
        if isinstance(part, functools.partial) and part.func in self._converters and not part.args:
            return functools.partial(self._converters[part.func], **part.keywords)
        for cls in type(part).__mro__:  # a subclass is converted as its parent, unless it has its own __call__
            if cls in self._converters and cls.__call__ is type(part).__call__:
                converter = self._converters[cls]
                return lambda graph, *values: converter(graph, part, *values)
        if part in self._converters:
            return self._converters[part]
        known = sorted(key.__name__ for key in self._converters)
        mine = getattr(part, "__name__", type(part).__name__)
        self.refuse(
            f"{mine} is not known; wanted one of {', '.join(known)}, or functools.partial of a function with options "
            f"by name. Pass converters={{{mine}: f}}, where f(graph, module, x) adds its nodes, {USE_JAX_EXPORT}"
        )
