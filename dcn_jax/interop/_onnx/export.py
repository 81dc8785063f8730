"""Export of models to ONNX."""

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from dcn_jax._core import checks, extras
from dcn_jax.interop._onnx.converters import CONVERTERS
from dcn_jax.interop._onnx.graph import AxisSize, Graph, Value

if TYPE_CHECKING:
    import onnx

_OLDEST_OPSET = 19  # the first with DeformConv
_OLDEST_DECOMPOSED = 17  # the first with LayerNormalization; GridSample is older

# The names of sizes that are None, by the rank of input_shape.
_NAMES = {
    1: ("batch",),
    2: ("batch", "channels"),
    3: ("batch", "length", "channels"),
    4: ("batch", "height", "width", "channels"),
    5: ("batch", "depth", "height", "width", "channels"),
}

Shape = Sequence[AxisSize]


def to_onnx(
    layer: Any,
    input_shape: Shape | Mapping[str, Shape],
    *,
    opset: int = 22,
    converters: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
    constants: Mapping[str, Any] = MappingProxyType({}),
    decompose: bool = False,
) -> "onnx.ModelProto":
    """Write an nnx layer or model as an ONNX model, whose inputs and output are channels last.

        input (batch, *spatial, C)  ->  output (batch, *out_spatial, features), or (batch, features)

    Each DeformConv becomes its branch and one standard `DeformConv` node.

    It knows DeformConv, MSDeformAttn, DCNv3, DCNv4, the ResNets of `dcn_jax.models`, and of Flax
    Conv, ConvTranspose, Linear, Embed, BatchNorm, LayerNorm, GroupNorm, Dropout and Sequential;
    the functions relu, relu6, leaky_relu, sigmoid, silu, gelu and tanh; and, by
    `functools.partial` with named options, `jnp.mean`, softmax, max_pool, avg_pool, `grid_sample`
    and `ms_deform_attn`. Others raise an error with their name; `converters` adds them.

    Batch norms use their own statistics and dropout does nothing, as after `model.eval()`. The
    graph computes in float32, whatever the dtypes of the layer and its parameters.

    Pads are numbers in ONNX: "SAME" with a stride above 1 needs a size given as an int (or padding
    as ints). A `padding_mode` of DeformConv other than "zeros" and negative padding have no form in
    ONNX, and DeformConv over one or three axes has one only with `decompose`.

    Args:
        layer: a `flax.nnx` module, or a function of the list above; it is not changed.
        input_shape: `(batch, *spatial, channels)`. The channels are an int. Another size is an
            int, or a name if it is known only when the graph runs; None is the usual name, such as
            "batch" or "height". For a call with several arrays a dict, from the names of the
            call's arguments, which the graph's inputs then have, to their shapes. In a dict None
            is "batch" on the first axis, and elsewhere a size of its own.
        opset: the version of ONNX's operators, 19 or later, with `decompose` 17 or later.
        converters: functions that add the nodes of your own modules, by class, or of functions.
            Each is called as `converter(graph, module, x)`, or `converter(graph, x)` for a
            function. It returns the result of `graph.add(part, x)`, for a known layer or function,
            or of `graph.node(op_type, x, y, …)`.
        constants: other arguments of the call, by name: what stays the same, such as
            `{"spatial_shapes": ((32, 32), (16, 16))}`. Arrays of floats or bools become part of the
            model.
        decompose: writes GridSample and a matrix product instead of each DeformConv node, for
            runtimes that have no such node.

    Returns:
        The `onnx.ModelProto`: `onnx.save(model, path)`.

    Raises:
        ValueError: something has no form in ONNX or does not fit; the message names it.
        TypeError: `layer` is not an nnx module, or a size is not an int.
        ImportError: onnx is not installed.

    Source: https://onnx.ai/onnx/operators/onnx__DeformConv.html,
    https://onnx.ai/onnx/operators/onnx__GridSample.html

    Example:
        >>> from flax import nnx
        >>> from dcn_jax.interop import to_onnx
        >>> from dcn_jax.nnx import DeformConv
        >>> layer = DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
        >>> model = to_onnx(layer, (None, "rows", "columns", 4))
        >>> [node.op_type for node in model.graph.node]
        ['Transpose', 'Conv', 'Slice', 'Slice', 'Sigmoid', 'DeformConv', 'Transpose']
        >>> model = to_onnx(layer, {"inputs": (1, 9, 9, 4), "offset": (1, 9, 9, 18)})
        >>> [given.name for given in model.graph.input]
        ['inputs', 'offset']
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise extras.missing("dcn_jax.interop.to_onnx", "interop") from error

    _check_opset(opset, onnx.defs.onnx_opset_version(), decompose)
    table = {**CONVERTERS, **converters}
    _check_layer(layer, table)
    shapes = _shapes(input_shape)
    paths = {}
    if isinstance(layer, nnx.Module):
        paths = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(layer)}
    graph = Graph(table, paths, opset=opset, decompose=decompose)
    inputs = {name: graph.input(name, shape) for name, shape in shapes.items()}
    values, options = _arguments(layer, inputs, constants, named=isinstance(input_shape, Mapping))
    y = graph.channels_last(graph.add(layer, *values, **options))
    if not graph.nodes or graph.nodes[-1].output != y.name:
        graph.emit("Identity", y)
    graph.nodes[-1] = graph.nodes[-1]._replace(output="output")
    return _model(graph, shapes, y.shape, type(layer).__name__)


def _check_opset(opset: Any, newest: int, decompose: bool) -> None:
    oldest, why = (_OLDEST_DECOMPOSED, "") if decompose else (_OLDEST_OPSET, ", the first with DeformConv,")
    if not checks.is_int(opset) or not oldest <= opset <= newest:
        raise ValueError(f"opset={opset!r}; wanted an int from {oldest}{why} to {newest}")


def _check_layer(layer: Any, table: Mapping[Any, Any]) -> None:
    """Raise if `layer` is neither an nnx module nor a function that is known."""
    function = layer.func if isinstance(layer, functools.partial) else layer
    known = not isinstance(function, type) and isinstance(function, Hashable) and function in table
    if known or isinstance(layer, nnx.Module):
        return
    problem = f"layer is a {type(layer).__name__}; wanted a flax.nnx module"
    if type(layer).__module__.startswith("flax.linen") or hasattr(layer, "init_with_output"):
        problem += (
            ". For a module of flax.linen, make the same module of flax.nnx or dcn_jax.nnx, fill it by "
            "dcn_jax.interop.from_linen(nnx_module, params), and pass that"
        )
    raise TypeError(problem)


def _shapes(input_shape: Any) -> dict[str, tuple[Any, ...]]:
    """Each input's name, and its shape, checked, as an int or a name per axis."""
    if not isinstance(input_shape, Mapping):
        sizes = _sizes("input_shape", input_shape, _NAMES.get(len(input_shape)) if _is_shape(input_shape) else None)
        return {"input": sizes}
    if not input_shape or "output" in input_shape or not all(isinstance(name, str) for name in input_shape):
        raise ValueError(
            f"input_shape={input_shape!r} is not understood; wanted the names of the call's arguments, other than "
            "'output', with a shape each"
        )
    shapes = {}
    for name, shape in input_shape.items():
        own = ["batch", *(f"{name}_{axis}" for axis in range(1, len(shape)))] if _is_shape(shape) else None
        shapes[name] = _sizes(f"input_shape[{name!r}]", shape, own)
    return shapes


def _is_shape(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)


def _sizes(name: str, shape: Any, usual: Sequence[str] | None) -> tuple[Any, ...]:
    """A shape, with names for the sizes that are None."""
    wanted = "wanted (batch, *spatial, channels), at most three of them spatial, each an int, a name, or None"
    if not usual:
        raise ValueError(f"{name}={shape!r} is not understood; {wanted}")
    sizes = [name if size is None else size for size, name in zip(shape, usual, strict=True)]
    for size in sizes:
        if not isinstance(size, str):
            checks.count(f"a size of {name}", size)
    return tuple(size if isinstance(size, str) else int(size) for size in sizes)


def _arguments(
    layer: Any, inputs: Mapping[str, Value], constants: Mapping[str, Any], *, named: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, by place and by name; a converter may call those by place otherwise."""
    if twice := sorted(inputs.keys() & constants.keys()):
        raise ValueError(f"{twice[0]!r} is in input_shape and in constants; wanted it in one of them")
    if not callable(layer):
        raise TypeError(f"layer is a {type(layer).__name__} without __call__, which says what a graph computes")
    signature = inspect.signature(layer)
    by_place, by_name = ((), {**inputs, **constants}) if named else (tuple(inputs.values()), dict(constants))
    try:
        bound = signature.bind(*by_place, **by_name)
    except TypeError as error:
        raise ValueError(
            f"the arguments {', '.join([*inputs, *constants])} do not fit the call {type(layer).__name__}{signature}: {error}; "
            "give the shapes of its arrays as a dict, input_shape={argument: shape}, and what stays the same in constants"
        ) from error
    if not named:
        return by_place, by_name
    given = list(bound.arguments)
    bound.apply_defaults()  # an argument by place that is left out may stand before one that is given
    places = [name for name, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    last = max((i for i, name in enumerate(places) if name in given), default=-1)
    values = tuple(bound.arguments[name] for name in places[: last + 1])
    return values, {name: value for name, value in by_name.items() if name not in places}


def _model(
    graph: Graph, shapes: Mapping[str, Sequence[AxisSize]], out: Sequence[AxisSize], name: str
) -> "onnx.ModelProto":
    """The graph as an ONNX model, in the oldest format that has the opset."""
    from onnx import TensorProto, helper, numpy_helper

    types = {bool: TensorProto.BOOL, np.int32: TensorProto.INT32}
    nodes = [
        helper.make_node(node.op_type, node.inputs, [node.output], name=node.output, **node.attributes)
        for node in graph.nodes
    ]
    proto = helper.make_graph(
        nodes,
        name,
        [
            helper.make_tensor_value_info(name, types.get(graph.types[name], TensorProto.FLOAT), shape)
            for name, shape in shapes.items()
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(array, name) for name, array in graph.arrays.items()],
    )
    opsets = [helper.make_opsetid("", graph.opset)]
    version = helper.find_min_ir_version_for(opsets)
    return helper.make_model(proto, opset_imports=opsets, ir_version=version, producer_name="dcn_jax")
