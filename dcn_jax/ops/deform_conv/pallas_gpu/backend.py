"""`deform_conv` as fused GPU kernels, which gather, interpolate, modulate and multiply in one pass.

`_result` and `_gradients` are the op and its gradients. `_prepare` computes what the kernels read:
x as rows, the indices of the rows to read, and their weights. `_forward` and `_backward` divide the work into tiles, and launch
the kernels. JOURNAL.md has the times, what was tried, and what to try next.
"""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jax.sharding import AxisType

from dcn_jax._core.dtypes import asked_precision, wide
from dcn_jax._core.mesh import on_any_mesh, zeros_varying_like
from dcn_jax._core.pallas import batching, partitioning
from dcn_jax._core.pallas.derivatives import by_kernels
from dcn_jax._core.pallas.launch import interpreting, launch, out_of_reach, stack_size
from dcn_jax._core.platform_op import Op, platform_op, type_of
from dcn_jax.ops.deform_conv.call import Arrays, Spec, add_bias, flatten_batch
from dcn_jax.ops.deform_conv.pallas_gpu import kernels
from dcn_jax.ops.deform_conv.pallas_gpu.points import locate_points
from dcn_jax.ops.deform_conv.pallas_gpu.tiles import WARPS, GpuCall, Tiling, count_chunks, count_tiles, tiling_for
from dcn_jax.ops.deform_conv.xla import backend as xla

DTYPES = ("float32", "bfloat16", "float16")  # of x and kernel; sums are float32

# How float32 products are computed, by `precision`. Products of 16-bit numbers are always exact.
_DOT_ALGORITHMS = {
    None: lax.DotAlgorithmPreset.TF32_TF32_F32,
    (lax.Precision.DEFAULT, lax.Precision.DEFAULT): lax.DotAlgorithmPreset.TF32_TF32_F32,
    (lax.Precision.HIGH, lax.Precision.HIGH): lax.DotAlgorithmPreset.TF32_TF32_F32,
    (lax.Precision.HIGHEST, lax.Precision.HIGHEST): lax.DotAlgorithmPreset.F32_F32_F32,
    lax.DotAlgorithmPreset.DEFAULT: lax.DotAlgorithmPreset.TF32_TF32_F32,
    lax.DotAlgorithmPreset.TF32_TF32_F32: lax.DotAlgorithmPreset.TF32_TF32_F32,
    lax.DotAlgorithmPreset.TF32_TF32_F32_X3: lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
    lax.DotAlgorithmPreset.F32_F32_F32: lax.DotAlgorithmPreset.F32_F32_F32,
}


def refusal(spec: Spec, arrays: Arrays) -> str | None:
    """All reasons why the kernels cannot take this call, in one sentence; None if they can."""
    reasons = []
    if any(map(is_symbolic_dim, (*arrays.x.shape, *spec.window.spatial))):
        reasons.append(f"x has the symbolic shape {arrays.x.shape} (the kernels need sizes that are known)")
    for name, array in (("x", arrays.x), ("kernel", arrays.kernel)):
        if array.dtype.name not in DTYPES:
            reasons.append(f"{name} has dtype {array.dtype} (the kernels take {', '.join(DTYPES)})")
    if _dot_algorithm(spec.precision) is None:
        known = ", ".join(map(str, _DOT_ALGORITHMS))
        reasons.append(f"precision={spec.precision!r} is not one that the kernels take ({known})")
    kinds = set(jax.sharding.get_abstract_mesh().axis_types)
    if AxisType.Manual in kinds and len(kinds) > 1:  # JAX cannot partition a kernel in such a shard_map
        reasons.append("it is in a shard_map over some axes of its mesh (the kernels need one over all axes)")
    if problem := out_of_reach("cuda"):
        reasons.append(problem)
    return "; and ".join(reasons) or None


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """The result of `deform_conv`, for a checked call that `refusal` returns None for."""
    if 0 in (arrays.x.size, arrays.kernel.size):
        return xla.run(spec, arrays)  # a GPU cannot launch a kernel with an empty grid
    out_dtype = spec.out_dtype if spec.out_dtype.name in DTYPES else jnp.dtype("float32")
    algorithm = cast(lax.DotAlgorithmPreset, _dot_algorithm(spec.precision))
    # Gradients may be traced later, outside `interpret`. They are interpreted if the result was.
    call = GpuCall(spec._replace(out_dtype=out_dtype), algorithm, interpreting())
    rank = spec.window.rank
    compute = on_any_mesh(
        _op_on_one_mesh,
        (spec, call),
        arrays,
        batched=(arrays.x, arrays.offset),
        batch=arrays.x.ndim - rank - 1,
        whole=rank + 1,
    )
    return compute(*arrays)


def _op_on_one_mesh(static: tuple[Spec, GpuCall], *arrays) -> jax.Array:
    return _op(*static, Arrays(*arrays))


def _dot_algorithm(precision: Any) -> lax.DotAlgorithmPreset | None:
    """How to compute float32 products, by `precision` as lax understands it; None if the kernels cannot."""
    return _DOT_ALGORITHMS.get(asked_precision(precision))


# --- the op and its gradients -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))  # a call outside of jit compiles once, not each time
def _op(spec: Spec, call: GpuCall, arrays: Arrays) -> jax.Array:
    result = type_of(functools.partial(_by_xla, spec, call), arrays)
    algorithms = by_kernels(_result, _gradients, _by_xla, call)
    return platform_op(Op(spec, result, algorithms, partitioning.holds_kernels()), arrays)


def _by_xla(spec: Spec, call: GpuCall, arrays: Arrays) -> jax.Array:
    del call
    return xla.convolve(spec, *arrays)


class _ForwardOperands(NamedTuple):
    """What the forward kernel reads; `kernels` has the shapes. In `_forward` each has a stack axis before its own axes."""

    x: jax.Array
    kernel: jax.Array
    row: jax.Array | None  # None in a tuple of gradients: integers have none
    weight: jax.Array
    bias: jax.Array | None


def _result(spec: Spec, call: GpuCall, arrays: Arrays) -> jax.Array:
    operands, row = _prepare(call, arrays)
    bias = operands.bias
    in_kernel = bias is not None and bias.dtype.name in DTYPES
    y = batching.run_pass(_FORWARD, call, operands._replace(row=row, bias=bias if in_kernel else None)).y
    y = y.reshape(*arrays.x.shape[: -spec.window.rank - 1], *spec.window.out_spatial, y.shape[-1])
    return add_bias(y, None if in_kernel else bias).astype(spec.out_dtype)


def _gradients(spec: Spec, call: GpuCall, active: tuple[str, ...], y_bar: jax.Array, arrays: Arrays) -> dict:
    """The gradients of the arrays named in `active`."""
    del spec
    operands, undo, row = jax.vjp(functools.partial(_prepare, call), arrays, has_aux=True)
    x, kernel, _, weight, bias = operands
    y_bar = y_bar.reshape(x.shape[0], -1, y_bar.shape[-1])
    given = _BackwardOperands(x, kernel, row, weight, y_bar.astype(call.spec.out_dtype))
    made = batching.run_pass(_BACKWARD, call, given)
    bias_bar = None
    if bias is not None:
        bias_bar = jnp.sum(y_bar, axis=(0, 1), dtype=wide(y_bar.dtype, bias.dtype)).astype(bias.dtype)
    found = undo(_ForwardOperands(made.x_bar, made.kernel_bar, None, made.weight_bar, bias_bar))[0]
    return {name: getattr(found, name) for name in active}


def _prepare(call: GpuCall, arrays: Arrays) -> tuple[_ForwardOperands, jax.Array]:
    """The operands, and apart from them the rows, which have no gradients. The batch axes become one."""
    x, kernel, offset, mask, bias = arrays
    window, groups = call.spec.window, call.spec.offset_groups
    batch, channels = x.shape[: -window.rank - 1], x.shape[-1]

    flat = functools.partial(flatten_batch, batch)
    row, weight = locate_points(window, groups, flat(offset), None if mask is None else flat(mask))
    rows = flat(x).reshape(-1, math.prod(window.spatial) * groups, channels // groups)
    return _ForwardOperands(rows, kernel.reshape(window.taps, *kernel.shape[-2:]), None, weight, bias), row


# --- the two passes, over arrays with a stack axis ----------------------------------------------------------------


class _ForwardResults(NamedTuple):
    y: jax.Array


class _BackwardOperands(NamedTuple):
    x: jax.Array
    kernel: jax.Array
    row: jax.Array
    weight: jax.Array
    y_bar: jax.Array


class _BackwardResults(NamedTuple):
    x_bar: jax.Array
    kernel_bar: jax.Array
    weight_bar: jax.Array


def _forward(call: GpuCall, operands: _ForwardOperands) -> _ForwardResults:
    images, positions, features = operands.x.shape[1], operands.weight.shape[-1], operands.kernel.shape[-1]
    tiling = tiling_for("forward", call, operands.x.shape[-1], features)
    y = jax.ShapeDtypeStruct((stack_size(operands), images, positions, features), call.spec.out_dtype)
    grid = call.spec.feature_groups * tiling.feature_blocks, count_tiles(tiling, images)
    return _ForwardResults(**_launch_tiles("forward", kernels.forward, operands._asdict(), {"y": y}, grid, tiling))


def _backward(call: GpuCall, operands: _BackwardOperands) -> _BackwardResults:
    x_bar, (kernel_bar, weight_bar) = _backward_x(call, operands), _backward_kernel(call, operands)
    return _BackwardResults(x_bar.astype(operands.x.dtype), kernel_bar.astype(operands.kernel.dtype), weight_bar)


def _backward_x(call: GpuCall, operands: _BackwardOperands) -> jax.Array:
    x = operands.x
    tiling = tiling_for("backward_x", call, x.shape[-1], operands.y_bar.shape[-1])
    given = operands._asdict()
    del given["x"]
    zeros = zeros_varying_like(x, jnp.float32, (stack_size(operands), *x.shape[1:]))
    grid = call.segments * tiling.channel_blocks, count_tiles(tiling, x.shape[1])
    return _launch_tiles("backward_x", kernels.backward_x, given, {"x_bar": zeros}, grid, tiling)["x_bar"]


def _backward_kernel(call: GpuCall, operands: _BackwardOperands) -> tuple[jax.Array, jax.Array]:
    x, kernel, row, _, y_bar = operands
    stack = stack_size(operands)
    tiling = tiling_for("backward_kernel", call, x.shape[-1], y_bar.shape[-1])
    programs = call.spec.window.taps * call.segments * tiling.channel_blocks * tiling.feature_blocks
    splits = min(max(1, WARPS // (tiling.tile.warps * programs * stack)), count_chunks(tiling, x.shape[1]))
    body = functools.partial(kernels.backward_kernel, splits=splits)
    shape = stack, *kernel.shape[1:]
    kernel_bar = jax.ShapeDtypeStruct(shape, kernel.dtype) if splits == 1 else zeros_varying_like(x, jnp.float32, shape)
    _, images, points, corners, positions = row.shape
    terms = stack, images, points, tiling.weight_terms, corners, positions
    results = {"weight_bar": jax.ShapeDtypeStruct(terms, jnp.float32), "kernel_bar": kernel_bar}
    made = _launch_tiles("backward_kernel", body, operands._asdict(), results, (programs, splits), tiling)
    return made["kernel_bar"], jnp.sum(made["weight_bar"], axis=3)


_FORWARD = partitioning.Pass(_forward, batched=frozenset({"x", "row", "weight", "y"}))
_BACKWARD = partitioning.Pass(_backward, batched=frozenset({"x", "row", "weight", "y_bar", "x_bar", "weight_bar"}))


def _launch_tiles(name: str, body, operands: dict, results: dict, grid: tuple[int, int], tiling: Tiling) -> dict:
    return launch(
        functools.partial(body, tiling=tiling),
        operands,
        results,
        name=f"deform_conv_{name}",
        grid=grid,
        warps=tiling.tile.warps,
        interpret=tiling.call.interpret,
    )
