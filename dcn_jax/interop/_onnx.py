"""Export of models to ONNX."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dcn_jax._core import checks, extras
from dcn_jax.interop._onnx_graph import AxisSize, Graph, Value
from dcn_jax.interop._onnx_parts import CONVERTERS, nnx
from dcn_jax.nnx._stacks import stack_problems

if TYPE_CHECKING:
    import onnx

_OLDEST_OPSET = 19  # the first with DeformConv

# The names of sizes that are None, by the rank of input_shape.
_NAMES = {
    2: ("batch", "channels"),
    3: ("batch", "length", "channels"),
    4: ("batch", "height", "width", "channels"),
    5: ("batch", "depth", "height", "width", "channels"),
}


def to_onnx(
    layer: Any,
    input_shape: Sequence[AxisSize],
    *,
    opset: int = 22,
    converters: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> "onnx.ModelProto":
    """Write an nnx layer or model as an ONNX model, whose input and output are channels last.

        input (batch, *spatial, C)  ->  output (batch, *out_spatial, features), or (batch, features)

    Each DeformConv becomes its branch and one standard `DeformConv` node.

    It knows DeformConv, the ResNets of `dcn_jax.models`, and of Flax Conv, Linear, BatchNorm,
    Dropout and Sequential; the functions relu, relu6, leaky_relu, sigmoid, silu, gelu and tanh;
    and, by `functools.partial` with named options, max_pool, avg_pool and `jnp.mean` over all
    positions. Others raise an error with their name; `converters` adds them.

    Batch norms use their own statistics and dropout does nothing, as after `model.eval()`. The
    graph computes in float32, whatever the dtypes of the layer and its parameters.

    Pads are numbers in ONNX: "SAME" with a stride above 1 needs a size given as an int (or padding
    as ints). A `padding_mode` other than "zeros", negative padding and DeformConv over one or
    three axes have no form in ONNX.

    Args:
        layer: a `flax.nnx` module; it is not changed.
        input_shape: `(batch, *spatial, channels)`. The channels are an int. Another size is an
            int, or a name if it is known only when the graph runs; None is the usual name, such as
            "batch" or "height".
        opset: the version of ONNX's operators, 19 or later.
        converters: functions that add the nodes of your own modules, by class, or of functions.
            Each is called as `converter(graph, module, x)`, or `converter(graph, x)` for a
            function. It returns the result of `graph.add(part, x)`, for a known layer or function,
            or of `graph.node(op_type, x, y, …)`.

    Returns:
        The `onnx.ModelProto`: `onnx.save(model, path)`.

    Raises:
        ValueError: something has no form in ONNX or does not fit; the message names it.
        TypeError: `layer` is not an nnx module, or a size is not an int.
        ImportError: onnx is not installed.

    Source: https://onnx.ai/onnx/operators/onnx__DeformConv.html

    Example:
        >>> from flax import nnx
        >>> from dcn_jax.interop import to_onnx
        >>> from dcn_jax.nnx import DeformConv
        >>> model = to_onnx(DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(0)), (None, "rows", "columns", 4))
        >>> [node.op_type for node in model.graph.node]
        ['Transpose', 'Conv', 'Slice', 'Slice', 'Sigmoid', 'DeformConv', 'Transpose']
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise extras.missing("dcn_jax.interop.to_onnx", "interop") from error

    newest = onnx.defs.onnx_opset_version()
    if not checks.is_int(opset) or not _OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"opset={opset!r}; wanted an int from {_OLDEST_OPSET}, the first with DeformConv, to {newest}")
    if not isinstance(layer, nnx.Module):
        raise TypeError(
            f"layer is a {type(layer).__name__}; wanted a flax.nnx module (from_linen fills one from linen)"
        )
    if stacks := stack_problems(layer):
        raise ValueError("\n".join(stacks))
    sizes = _sizes(input_shape)
    batch, *spatial, channels = sizes
    paths = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(layer)}
    graph = Graph({**CONVERTERS, **converters}, paths)
    x = Value("input", channels, tuple(spatial))
    if spatial:
        x = graph.node("Transpose", x, perm=[0, len(sizes) - 1, *range(1, len(sizes) - 1)])
    y = graph.add(layer, x)
    if y.spatial:
        graph.node("Transpose", y, perm=[0, *range(2, 2 + len(y.spatial)), 1])
    else:
        graph.node("Identity", y)
    graph.nodes[-1] = graph.nodes[-1]._replace(output="output")
    return _model(graph, sizes, (batch, *y.spatial, y.channels), opset, type(layer).__name__)


def _sizes(input_shape: Any) -> tuple[Any, ...]:
    """`input_shape`, checked, as an int or a name per axis."""
    wanted = "wanted (batch, *spatial, channels), at most three of them spatial, each an int, a name, or None"
    if not isinstance(input_shape, Sequence) or isinstance(input_shape, str) or len(input_shape) not in _NAMES:
        raise ValueError(f"input_shape={input_shape!r} is not understood; {wanted}")
    sizes = [usual if size is None else size for size, usual in zip(input_shape, _NAMES[len(input_shape)], strict=True)]
    for size in sizes:
        if not isinstance(size, str):
            checks.count("a size of input_shape", size)
    if isinstance(sizes[-1], str):
        raise ValueError(
            f"input_shape={input_shape!r} has no number of channels; {wanted}; the channels must be an int"
        )
    return tuple(sizes)


def _model(
    graph: Graph, sizes: Sequence[AxisSize], out_sizes: Sequence[AxisSize], opset: int, name: str
) -> "onnx.ModelProto":
    """The graph as an ONNX model, in the oldest format that has the opset."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node(node.op_type, node.inputs, [node.output], name=node.output, **node.attributes)
        for node in graph.nodes
    ]
    proto = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, out_sizes)],
        [numpy_helper.from_array(array, name) for name, array in graph.arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    version = helper.find_min_ir_version_for(opsets)
    return helper.make_model(proto, opset_imports=opsets, ir_version=version, producer_name="dcn_jax")
