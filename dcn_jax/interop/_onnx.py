"""Models taken to ONNX."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dcn_jax._core import checks, extras
from dcn_jax.interop._onnx_graph import Graph, Size, Value
from dcn_jax.interop._onnx_parts import CONVERTERS, nnx

if TYPE_CHECKING:
    import onnx

_OLDEST_OPSET = 19  # the first with DeformConv

# What sizes of None are called, by the rank of input_shape.
_NAMES = {
    2: ("batch", "channels"),
    3: ("batch", "length", "channels"),
    4: ("batch", "height", "width", "channels"),
    5: ("batch", "depth", "height", "width", "channels"),
}


def to_onnx(
    layer: Any,
    input_shape: Sequence[Size],
    *,
    opset: int = 22,
    converters: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> "onnx.ModelProto":
    """Write an nnx layer or model as an ONNX model, channels last on the outside.

        input (batch, *spatial, C)  ->  output (batch, *out_spatial, features), or (batch, features)

    Each DeformConv becomes its branch and one standard `DeformConv` node.

    Known are DeformConv, the ResNets of `dcn_jax.models`, and of Flax Conv, Linear, BatchNorm, Dropout
    and Sequential; as functions relu, relu6, leaky_relu, sigmoid, silu, gelu and tanh; and by
    `functools.partial`, with named options, max_pool, avg_pool and `jnp.mean` over all positions. The
    rest is refused by name; `converters` adds to it.

    Batch norms use the statistics that they keep, and dropout drops nothing, as after `model.eval()`.
    The graph computes in float32, whatever the dtypes of the layer and its parameters.

    ONNX's pads are numbers: "SAME" with a stride above 1 needs a known size (or padding as ints). What
    has no form in ONNX: a `padding_mode` other than "zeros", negative padding, DeformConv over one or
    three axes.

    Args:
        layer: a `flax.nnx` module; it is not changed.
        input_shape: `(batch, *spatial, channels)`. A size is an int, or it is known when the graph
            runs: a name, or None for the usual one ("batch", "height", "width"). The channels are an
            int.
        opset: the version of ONNX's operators, 19 or later.
        converters: what adds the nodes of modules of your own, by class, or of functions. Each is
            called as `converter(graph, module, x)`, for a function as `converter(graph, x)`, and
            returns the result of `graph.add(part, x)`, for a layer or function that is known, or of
            `graph.node(op_type, x, y, …)`.

    Returns:
        The `onnx.ModelProto`: `onnx.save(model, path)`.

    Raises:
        ValueError: something has no form in ONNX, or does not fit; the message names it, and the way out.
        TypeError: `layer` is no nnx module, or a size is no int.
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
            f"layer is a {type(layer).__name__}; wanted a flax.nnx module (from_linen makes one of linen's)"
        )
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
    """`input_shape`, checked: an int or a name for each axis."""
    wanted = "wanted (batch, *spatial, channels), at most three of them spatial, each an int, a name, or None"
    if not isinstance(input_shape, Sequence) or isinstance(input_shape, str) or len(input_shape) not in _NAMES:
        raise ValueError(f"input_shape={input_shape!r} is not understood; {wanted}")
    sizes = [usual if size is None else size for size, usual in zip(input_shape, _NAMES[len(input_shape)], strict=True)]
    for size in sizes:
        if not isinstance(size, str):
            checks.count("a size of input_shape", size)
    if isinstance(sizes[-1], str):
        raise ValueError(
            f"input_shape={input_shape!r} leaves the channels open; {wanted}, but for the channels, an int"
        )
    return tuple(sizes)


def _model(graph: Graph, sizes: Sequence[Size], out_sizes: Sequence[Size], opset: int, name: str) -> "onnx.ModelProto":
    """The graph in ONNX's own words, of the oldest format that has the opset."""
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
