"""An ONNX graph as it grows: nodes, the arrays that they need, and the modules that they come from.

Inside a graph maps are channels first, `(batch, C, *spatial)`, as ONNX has them. The package onnx is
not needed here.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from dcn_jax.geometry import Padding, resolve_window

Size = int | str | None  # of an axis: known, or known when the graph runs, with or without a name

USE_JAX_EXPORT = "jax.export, which takes every model, is the other way out (docs/exporting.md)"

_LARGE = 2**20  # stands for a size that is not known: any window fits


class Value(NamedTuple):
    """What a node returns: a map `(batch, C, *spatial)`, or vectors `(batch, C)`.

    The batch is the input's.
    """

    name: str
    channels: int
    spatial: tuple[Size, ...]


class Node(NamedTuple):
    """A node, before it is ONNX's."""

    op_type: str
    inputs: list[str]
    output: str  # the node's name too
    attributes: dict[str, Any]


class Graph:
    """Nodes in the order in which they run, and the arrays that do not depend on the input.

    Args:
        converters: what adds the nodes of a module, by its class, or of a function, by itself. It is
            called as `converter(graph, module, x)`, for a function as `converter(graph, x)`, and
            returns a `Value`.
        paths: where each module is in the model, by its `id`: "layer1.0.conv2". Nodes and errors are
            named by it.
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
        spatial: Sequence[Size] | None = None,
        **attributes: Any,
    ) -> Value:
        """Add one node.

        Args:
            op_type: what it computes, by ONNX's name.
            inputs: in ONNX's order; arrays become part of the model, None leaves one out.
            channels: of the result; by default those of the first input.
            spatial: sizes of the result; by default those of the first input.
            attributes: by ONNX's names.
        """
        name = f"{self._scope}/{op_type}" if self._scope else op_type
        self._named[name] += 1
        if self._named[name] > 1:
            name = f"{name}_{self._named[name]}"
        names = [self._input(f"{name}/{position}", given) for position, given in enumerate(inputs)]
        self.nodes.append(Node(op_type, names, name, attributes))
        first: Any = inputs[0]
        return Value(
            name,
            first.channels if channels is None else channels,
            first.spatial if spatial is None else tuple(spatial),
        )

    def _input(self, name: str, given: Any) -> str:
        """The name by which a node reads what it is given."""
        if given is None:
            return ""
        if isinstance(given, Value):
            return given.name
        self.arrays[name] = np.asarray(given)
        return name

    def window(
        self, x: Value, size: Sequence[int], *, strides: Any, padding: Padding, **options: Any
    ) -> tuple[dict[str, Any], tuple[Size, ...]]:
        """A window over the map x: its attributes in ONNX, and the sizes of the result.

        ONNX's pads are numbers: over a size that is not known yet, they must be the same whatever it is.
        """
        if len(size) != len(x.spatial):
            self.refuse(
                f"a window of {tuple(size)} does not fit a map with {len(x.spatial)} spatial axes; wanted an input_shape of "
                f"(batch, *spatial, channels) with {len(size)}"
            )
        resolve = functools.partial(resolve_window, size, strides=strides, padding=padding, **options)
        window = resolve(spatial=[s if isinstance(s, int) else _LARGE for s in x.spatial])
        for more in range(1, max(window.strides)):  # "SAME" depends on what is left over by the stride
            if resolve(spatial=[s if isinstance(s, int) else _LARGE + more for s in x.spatial]).pads != window.pads:
                self.refuse(
                    f"padding={padding!r} at strides {window.strides} pads by the map's size, which is {x.spatial}, and ONNX's "
                    "pads are numbers; give input_shape that size as an int, or the layer its padding as ints"
                )
        if set(window.padding_mode) != {"zeros"}:
            self.refuse(
                f"padding={padding!r} with padding_mode={window.padding_mode} has no form in ONNX, which pads with zeros; "
                f"{USE_JAX_EXPORT}"
            )
        lows, highs = zip(*window.pads, strict=True)
        if min(*lows, *highs) < 0:
            self.refuse(
                f"padding={padding!r} crops, which has no form in ONNX, where pads are 0 or more; {USE_JAX_EXPORT}"
            )
        attributes = {
            "kernel_shape": list(window.size),
            "strides": list(window.strides),
            "pads": [*lows, *highs],
            "dilations": list(window.dilation),
        }
        # A size that is not known stays what it was, or becomes one that has no name.
        kept = [
            stride == 1 and low + high == (k - 1) * d
            for k, d, stride, low, high in zip(size, window.dilation, window.strides, lows, highs, strict=True)
        ]
        spatial = zip(x.spatial, window.out_spatial, kept, strict=True)
        return attributes, tuple(out if isinstance(s, int) else s if same else None for s, out, same in spatial)

    def refuse(self, sentence: str) -> NoReturn:
        """Say why the module whose nodes are being added has no form in ONNX, and what to do."""
        raise ValueError(f"{self._scope}: {sentence}" if self._scope else sentence)

    def _converter(self, part: Any) -> Callable[..., Value]:
        """What adds the nodes of `part`, to be called with the graph and the values."""
        if isinstance(part, functools.partial) and part.func in self._converters and not part.args:
            return functools.partial(self._converters[part.func], **part.keywords)
        for cls in type(part).__mro__:  # a subclass is known by its parent, unless it computes something else
            if cls in self._converters and cls.__call__ is type(part).__call__:
                converter = self._converters[cls]
                return lambda graph, *values: converter(graph, part, *values)
        if part in self._converters:
            return self._converters[part]
        known = sorted(key.__name__ for key in self._converters)
        mine = getattr(part, "__name__", type(part).__name__)
        self.refuse(
            f"{mine} is not known; known are {', '.join(known)}, and functools.partial of a function with options by name. "
            f"Pass converters={{{mine}: f}}, where f(graph, module, x) adds its nodes; {USE_JAX_EXPORT}"
        )
