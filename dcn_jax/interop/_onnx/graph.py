"""An ONNX graph under construction: its nodes and the arrays that they need.

A converter is a function that adds the nodes of one module or function. Arrays are channels last,
as in JAX, or channels first, as ONNX's convolutions need them; a `Value` knows which. This file
does not need the package onnx.
"""

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

AxisSize = Any  # an int; or, if the size is known only when the graph runs, a name or None

USE_JAX_EXPORT = "or use jax.export, which takes every model (docs/exporting.md)"

# Operators that compute each element by itself: they take either order of axes.
_ELEMENTWISE = {
    "Abs", "Add", "And", "Ceil", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Log", "Max", "Min", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round",
    "Sigmoid", "Sign", "Sin", "Softplus", "Sqrt", "Sub", "Tanh", "Where",
}  # fmt: skip

# Where users find functions and modules, to name them as users do.
_PLACES = ("flax.nnx", "jax.nn", "jax.numpy", "dcn_jax", "dcn_jax.nnx", "dcn_jax.models.resnet")


class Value(NamedTuple):
    """An array of the graph: a map `(batch, *spatial, C)`, or vectors `(batch, C)`."""

    name: str
    shape: tuple[AxisSize, ...]  # in JAX's order, (batch, *spatial, C), whichever order the array has
    channels_last: bool = False  # whether the array has that order too, or is (batch, C, *spatial)

    @property
    def channels(self) -> Any:
        """The last size in JAX's order."""
        return self.shape[-1]

    @property
    def spatial(self) -> tuple[AxisSize, ...]:
        """The sizes between the first and the last."""
        return self.shape[1:-1]

    def axis(self, axis: int) -> int:
        """Where the array has JAX's axis `axis`."""
        axis, rank = axis % len(self.shape), len(self.shape)
        return axis if self.channels_last or axis == 0 else 1 if axis == rank - 1 else axis + 1


class Node(NamedTuple):
    """What `onnx.helper.make_node` needs."""

    op_type: str
    inputs: list[str]
    output: str  # also the name of the node
    attributes: dict[str, Any]


class Size(NamedTuple):
    """A size that is known only when the graph runs: that of one axis of an array."""

    array: str
    axis: int


class Graph:
    """Nodes in the order in which they run, and the arrays that do not depend on the inputs.

    Args:
        converters: functions that add the nodes of a module, by its class, or of a function, by
            that function. They are called as `converter(graph, module, x, …)`, or
            `converter(graph, x, …)` for a function, and return a `Value`.
        paths: where each module is in the model, by its `id`: "layer1.0.conv2".
        opset: the version of ONNX's operators.
        decompose: whether to write other nodes instead of DeformConv.
    """

    def __init__(
        self,
        converters: Mapping[Any, Callable[..., Value]],
        paths: Mapping[int, str],
        *,
        opset: int = 22,
        decompose: bool = False,
    ):
        self.nodes: list[Node] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.types: dict[str, Any] = {}  # of the inputs, and of arrays given as values; None: not known yet
        self.opset = opset
        self.decompose = decompose
        self._converters = converters
        self._paths = paths
        self._scope = ""  # the path of the module whose nodes are being added
        self._named: Counter[str] = Counter()
        self._reordered: dict[str, Value] = {}  # the same array in the other order, by name

    def input(self, name: str, shape: tuple[AxisSize, ...]) -> Value:
        """An input of the graph."""
        self.types[name] = None
        return Value(name, shape, channels_last=True)

    # ---- what a converter calls

    def add(self, part: Any, *values: Any, **options: Any) -> Value:
        """Add the nodes of a module, a function, or a `functools.partial` of a function.

        Args:
            part: what is called.
            values: its arguments; arrays of floats or bools become part of the model.
            options: its arguments by name; axes are JAX's.
        """
        outer, self._scope = self._scope, self._paths.get(id(part), self._scope)
        converter, module, keywords = self._converter(part)
        given = [*module, *map(self._as_value, values)]
        named = {name: self._as_value(value) for name, value in {**keywords, **options}.items()}
        try:
            inspect.signature(converter).bind(self, *given, **named)
        except TypeError as error:
            self._refuse_call(part, converter, error)
        y = converter(self, *given, **named)
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
        """Add one node, whose inputs and result are channels first.

        Args:
            op_type: ONNX's name of the operator.
            inputs: in ONNX's order; arrays become part of the model, None omits an input.
            channels: of the result; by default those of the first input.
            spatial: sizes of the result; by default those of the first input.
            attributes: of the operator, by ONNX's names.
        """
        values = [given for given in inputs if isinstance(given, Value)]
        flat = all(isinstance(given, Value) or np.ndim(given) == 0 for given in inputs if given is not None)
        # An operator that takes either order is spared the transpositions.
        last = op_type in _ELEMENTWISE and flat and all(v.channels_last or len(v.shape) < 3 for v in values)
        order = self.channels_last if last else self.channels_first
        ordered = [order(given) if isinstance(given, Value) else given for given in inputs]
        batch, *sizes, features = _broadcast(values) if op_type in _ELEMENTWISE else values[0].shape
        sizes = sizes if spatial is None else spatial
        shape = (batch, *sizes, features if channels is None else channels)
        return Value(self.emit(op_type, *ordered, **attributes), shape, last)

    def channels_first(self, x: Value) -> Value:
        """The array of x as `(batch, C, *spatial)`."""
        rank = len(x.shape)
        return self._reorder(x, [0, rank - 1, *range(1, rank - 1)]) if x.channels_last else x

    def channels_last(self, x: Value) -> Value:
        """The array of x as `(batch, *spatial, C)`."""
        return x if x.channels_last else self._reorder(x, [0, *range(2, len(x.shape)), 1])

    def emit(self, op_type: str, *inputs: Any, **attributes: Any) -> str:
        """Add one node on arrays as they lie, values or names; return the name of its result."""
        name = f"{self._scope}/{op_type}" if self._scope else op_type
        self._named[name] += 1
        if self._named[name] > 1:
            name = f"{name}_{self._named[name]}"
        names = [self._input(f"{name}/{position}", given) for position, given in enumerate(inputs)]
        self.nodes.append(Node(op_type, names, name, attributes))
        return name

    def reshape(self, x: str | Value, *sizes: int | Size) -> str:
        """Reshape x to these sizes; -1 stands for what is left, and 0 for x's own size there."""
        static = [-1 if isinstance(size, Size) else size for size in sizes]
        if static.count(-1) > 1:  # an array of sizes, made when the graph runs
            parts = [
                self.emit("Shape", size.array, start=size.axis, end=size.axis + 1)
                if isinstance(size, Size)
                else np.array([size])
                for size in sizes
            ]
            return self.emit("Reshape", x, self.emit("Concat", *parts, axis=0))
        return self.emit("Reshape", x, np.array(static))

    def slice(self, x: str | Value, start: int, stop: int, axis: int) -> str:
        """The part of x from `start` to `stop` along an axis."""
        return self.emit("Slice", x, *(np.array([i]) for i in (start, stop, axis)))

    def size(self, x: Value, axis: int) -> int | Size:
        """The size of x along JAX's axis `axis`, to reshape by."""
        size = x.shape[axis]
        return size if isinstance(size, int) else Size(x.name, x.axis(axis))

    def typed(self, x: Value, dtype: Any) -> Value:
        """Read x as bools or ints. An input of the graph that nothing else has read is declared so."""
        if self.types.get(x.name, np.float32) is None:
            self.types[x.name] = dtype
        if self.types.get(x.name) == dtype:
            return x
        return x._replace(name=self.emit("Cast", x, to={bool: 9, np.int32: 6}[dtype]))  # of onnx.TensorProto

    def parameter(self, module: Any, name: str, rank: int) -> Any:
        """A parameter of `rank` axes as a float32 array; None stays None."""
        variable = getattr(module, name)
        if variable is None:
            return None
        value = variable.get_value()
        if isinstance(value, jax.ShapeDtypeStruct):
            self.refuse(
                f"{name} has a shape and no values, since the model is abstract (nnx.eval_shape): fill it first, by "
                "from_torch or nnx.update"
            )
        if value.ndim != rank:
            self.refuse(
                f"{name} has shape {value.shape}; wanted {rank} axes. A stack of layers (nnx.vmap) has no form in ONNX: "
                "write a converter that adds its layers one by one, each made by nnx.merge from nnx.split's state with "
                f"jax.tree.map(lambda a: a[i], state), {USE_JAX_EXPORT}"
            )
        return np.asarray(value).astype(np.float32)

    def refuse(self, sentence: str) -> NoReturn:
        """Raise ValueError with this sentence, after the path of the module that is being converted."""
        raise ValueError(f"{self._scope}: {sentence}" if self._scope else sentence)

    # ---- the rest

    def _reorder(self, x: Value, perm: list[int]) -> Value:
        if len(x.shape) < 3:  # the two orders are one
            return x._replace(channels_last=not x.channels_last)
        if x.name not in self._reordered:
            y = Value(self.emit("Transpose", x, perm=perm), x.shape, not x.channels_last)
            self._reordered |= {x.name: y, y.name: x}
        return self._reordered[x.name]

    def _input(self, name: str, given: Any) -> str:
        """The name of an input; an array is first added to the graph under the name `name`."""
        if given is None:
            return ""
        if isinstance(given, Value):
            given = given.name
        if isinstance(given, str):
            if self.types.get(given, bool) is None:
                self.types[given] = np.float32
            return given
        self.arrays[name] = np.asarray(given)
        return name

    def _as_value(self, given: Any) -> Any:
        """An array of floats or bools as a `Value`; anything else as it is."""
        if not isinstance(given, np.ndarray | jax.Array) or given.ndim == 0:
            return given
        array = np.asarray(given)
        if array.dtype == bool:
            dtype: Any = bool
        elif jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            dtype = np.float32
        else:
            return given
        self._named["array"] += 1
        name = f"array_{self._named['array']}"
        self.arrays[name], self.types[name] = array.astype(dtype), dtype
        return Value(name, array.shape, channels_last=True)

    def _converter(self, part: Any) -> tuple[Callable[..., Value], tuple[Any, ...], dict[str, Any]]:
        """What adds the nodes of `part`, the module that it is called with, if any, and options."""
        keywords: dict[str, Any] = {}
        if isinstance(part, functools.partial) and part.func in self._converters:
            if part.args:
                self.refuse(
                    f"functools.partial of {public_name(part.func)} has options by position, which are not known; give "
                    "them by name"
                )
            part, keywords = part.func, part.keywords
        for cls in type(part).__mro__:  # a subclass is converted as its parent, unless it has its own __call__
            if cls in self._converters and cls.__call__ is type(part).__call__:
                return self._converters[cls], (part,), keywords
        if part in self._converters:
            return self._converters[part], (), keywords
        known = sorted(name for name in map(public_name, self._converters) if "._" not in name)
        name, function = _class_or_function(part).__name__, _class_or_function(part) is part
        call = "f(graph, x)" if function else "f(graph, module, x)"
        named = name if name.isidentifier() else "function"
        self.refuse(
            f"{public_name(part)} is not known; wanted one of {', '.join(known)}, or functools.partial of a function "
            f"with options by name. {'' if named == name else 'Give it a name, function, and p'}"
            f"{'P' if named == name else ''}ass converters={{{named}: f}}, where {call} adds its nodes, {USE_JAX_EXPORT}"
        )

    def _refuse_call(self, part: Any, converter: Callable[..., Value], error: TypeError) -> NoReturn:
        """Say that a call does not fit its converter, and which options would."""
        known = [name for name, p in inspect.signature(converter).parameters.items() if p.default is not p.empty]
        options = f"options that are known: {', '.join(known)}" if known else "it has no options that are known"
        self.refuse(f"{public_name(getattr(part, 'func', part))} cannot be added so: {error}; {options}")


def public_name(part: Any) -> str:
    """Where users import a function, or the class of a module, from."""
    part = _class_or_function(part)
    for place in _PLACES:
        if getattr(sys.modules.get(place), part.__name__, None) is part:
            return f"{place}.{part.__name__}"
    return f"{part.__module__}.{part.__qualname__}"


def _class_or_function(part: Any) -> Any:
    """A function or class itself; of a module, its class."""
    return part if hasattr(part, "__name__") else type(part)


def may_be_equal(size: AxisSize, wanted: AxisSize) -> bool:
    """Whether two sizes are equal, or one of them is open."""
    return size == wanted or not (isinstance(size, int) and isinstance(wanted, int))


def _broadcast(values: Sequence[Value]) -> tuple[AxisSize, ...]:
    """The shape of arrays of one rank together; of several ranks, the first one's."""
    shapes = [value.shape for value in values]
    if len({len(shape) for shape in shapes}) > 1:
        return shapes[0]

    def together(sizes):
        others = [size for size in sizes if size != 1]
        return next((size for size in others if isinstance(size, int)), others[0] if others else 1)

    return tuple(map(together, zip(*shapes, strict=True)))
