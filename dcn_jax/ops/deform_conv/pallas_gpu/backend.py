"""The op as fused GPU kernels, which gather, interpolate, modulate and multiply in one pass.

`_convolve` and `_pull` are the op and its gradients by the kernels, `_prepare` finds what they read.
`_forward` and `_backward` launch the kernels of `pallas_gpu_kernels`, over a call that is cut by
`pallas_gpu_tiles`. What kernels of any op need is in `_pallas`. What was counted, and what to try, is
in pallas_gpu.md.
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
from dcn_jax._core.mesh import on_any_mesh
from dcn_jax._core.pallas import batching, partitioning
from dcn_jax._core.pallas.derivatives import by_kernels
from dcn_jax._core.pallas.launch import interpreting, launch, out_of_reach, stack_size
from dcn_jax._core.platform_op import Op, platform_op, type_of
from dcn_jax.ops.deform_conv.call import Arrays, Spec, add_bias
from dcn_jax.ops.deform_conv.pallas_gpu import kernels
from dcn_jax.ops.deform_conv.pallas_gpu.points import locate_points
from dcn_jax.ops.deform_conv.pallas_gpu.tiles import WARPS, Cut, Plan, count_runs, count_tiles, cut_for
from dcn_jax.ops.deform_conv.xla import backend as xla

DTYPES = ("float32", "bfloat16", "float16")  # that the kernels load; they compute in float32

# How a float32 product is made, by what `precision` asks for. Half-precision products are exact in
# each of them.
_PRODUCTS = {
    (lax.Precision.DEFAULT, lax.Precision.DEFAULT): lax.DotAlgorithmPreset.TF32_TF32_F32,
    (lax.Precision.HIGH, lax.Precision.HIGH): lax.DotAlgorithmPreset.TF32_TF32_F32,
    (lax.Precision.HIGHEST, lax.Precision.HIGHEST): lax.DotAlgorithmPreset.F32_F32_F32,
    lax.DotAlgorithmPreset.DEFAULT: lax.DotAlgorithmPreset.TF32_TF32_F32,
    lax.DotAlgorithmPreset.TF32_TF32_F32: lax.DotAlgorithmPreset.TF32_TF32_F32,
    lax.DotAlgorithmPreset.TF32_TF32_F32_X3: lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
    lax.DotAlgorithmPreset.F32_F32_F32: lax.DotAlgorithmPreset.F32_F32_F32,
}


def refusal(spec: Spec, arrays: Arrays) -> str | None:
    """Why the kernels cannot take this call, all reasons in one sentence; None if they can."""
    reasons = []
    if any(map(is_symbolic_dim, (*arrays.x.shape, *spec.window.spatial))):
        reasons.append(f"x has the symbolic shape {arrays.x.shape} (the kernels are made for sizes that are known)")
    for name, array in (("x", arrays.x), ("kernel", arrays.kernel)):
        if array.dtype.name not in DTYPES:
            reasons.append(f"{name} has dtype {array.dtype} (the kernels know {', '.join(DTYPES)})")
    if _product(spec.precision) is None:
        known = ", ".join(map(str, _PRODUCTS))
        reasons.append(f"precision={spec.precision!r} is not among those the kernels know ({known})")
    kinds = set(jax.sharding.get_abstract_mesh().axis_types)
    if AxisType.Manual in kinds and len(kinds) > 1:  # JAX cannot partition what is inside
        reasons.append("it is in a shard_map over some axes of its mesh (the kernels go in one over all axes)")
    if problem := out_of_reach("cuda"):
        reasons.append(problem)
    return "; and ".join(reasons) or None


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """`deform_conv` of a checked call that `refusal` has nothing against."""
    if 0 in (arrays.x.size, arrays.kernel.size):
        return xla.run(spec, arrays)  # no products to make: a GPU has no kernel without programs
    out_dtype = spec.out_dtype if spec.out_dtype.name in DTYPES else jnp.dtype("float32")
    product = cast(lax.DotAlgorithmPreset, _product(spec.precision))
    # The mode is kept in the plan: a backward pass traced later runs in that of its forward pass.
    plan = Plan(spec._replace(out_dtype=out_dtype), product, interpreting())
    rank = spec.window.rank
    compute = on_any_mesh(
        _op_on_one_mesh,
        (spec, plan),
        arrays,
        batched=(arrays.x, arrays.offset),
        batch=arrays.x.ndim - rank - 1,
        whole=rank + 1,
    )
    return compute(*arrays)


def _op_on_one_mesh(call: tuple[Spec, Plan], *arrays) -> jax.Array:
    return _op(*call, Arrays(*arrays))


def _product(precision: Any) -> lax.DotAlgorithmPreset | None:
    """How to make a float32 product, by `precision` as lax understands it; None if the kernels cannot."""
    asked = asked_precision(precision)
    return _PRODUCTS.get(lax.DotAlgorithmPreset.DEFAULT if asked is None else asked)


# --- the op and its gradients -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))  # a call outside of jit compiles once, not each time
def _op(spec: Spec, plan: Plan, arrays: Arrays) -> jax.Array:
    made = by_kernels(_convolve, _gradients, _by_xla, plan)
    return platform_op(
        Op(spec, type_of(functools.partial(_by_xla, spec, plan), arrays), made, partitioning.holds_kernels()), arrays
    )


def _by_xla(spec: Spec, plan: Plan, arrays: Arrays) -> jax.Array:
    del plan
    return xla.convolve(spec, *arrays)


def _gradients(spec: Spec, plan: Plan, active: tuple[str, ...], g: jax.Array, arrays: Arrays) -> dict[str, Any]:
    """Those of the arrays named in `active`."""
    del spec
    found = _pull(plan, arrays, g)
    return {name: getattr(found, name) for name in active}


class _Operands(NamedTuple):
    """What the kernels read, as `pallas_gpu_kernels` describes it."""

    x: jax.Array
    kernel: jax.Array
    row: jax.Array
    weight: jax.Array
    bias: jax.Array | None


def _convolve(spec: Spec, plan: Plan, arrays: Arrays) -> jax.Array:
    """The op by the kernels."""
    operands, row = _prepare(plan, arrays)
    bias = operands.bias
    inside = bias is not None and bias.dtype.name in DTYPES
    y = batching.run_pass(_FORWARD, plan, operands._replace(row=row, bias=bias if inside else None)).y
    y = y.reshape(*arrays.x.shape[: -spec.window.rank - 1], *spec.window.out_spatial, y.shape[-1])
    return add_bias(y, None if inside else bias).astype(spec.out_dtype)  # a bias wider than what the kernels load


def _pull(plan: Plan, arrays: Arrays, g: jax.Array) -> Arrays:
    """The gradients by the kernels, at `g`, the gradient of y."""
    operands, undo, row = jax.vjp(functools.partial(_prepare, plan), arrays, has_aux=True)
    x, kernel, _, weight, bias = operands
    g = g.reshape(x.shape[0], -1, g.shape[-1])
    given = _BackwardOperands(x, kernel, row, weight, g.astype(plan.spec.out_dtype))
    made = batching.run_pass(_BACKWARD, plan, given)
    dbias = None
    if bias is not None:
        dbias = jnp.sum(g, axis=(0, 1), dtype=wide(g.dtype, bias.dtype)).astype(bias.dtype)
    return undo(operands._replace(x=made.dx, kernel=made.dkernel, weight=made.dweight, bias=dbias))[0]


def _prepare(plan: Plan, arrays: Arrays) -> tuple[_Operands, jax.Array]:
    """What the kernels read, and apart from it, having no gradients, the rows; batch axes are flattened."""
    x, kernel, offset, mask, bias = arrays
    window, groups = plan.spec.window, plan.spec.offset_groups
    batch, channels = x.shape[: -window.rank - 1], x.shape[-1]

    def flat(array):
        shape = array.shape[len(batch) :]
        return jnp.broadcast_to(array, (*batch, *shape)).reshape(-1, *shape)  # one set of offsets may serve all images

    row, weight = locate_points(window, groups, flat(offset), None if mask is None else flat(mask))
    rows = flat(x).reshape(-1, math.prod(window.spatial) * groups, channels // groups)
    operands = _Operands(rows, kernel.reshape(window.taps, *kernel.shape[-2:]), row, weight, bias)
    operands = partitioning.vary_alike(operands)  # as the kernels' results do
    return operands._replace(row=None), operands.row


# --- the two passes, over arrays with a stack axis ----------------------------------------------------------------


class _ForwardResults(NamedTuple):
    y: jax.Array


class _BackwardOperands(NamedTuple):
    x: jax.Array
    kernel: jax.Array
    row: jax.Array
    weight: jax.Array
    g: jax.Array


class _BackwardResults(NamedTuple):
    dx: jax.Array
    dkernel: jax.Array
    dweight: jax.Array


def _forward(plan: Plan, operands: _Operands) -> _ForwardResults:
    x, kernel, row, *_ = operands
    images, positions, features = x.shape[1], row.shape[-1], kernel.shape[-1]
    cut = cut_for("forward", plan, x.shape[-1], features)
    made = _launch(
        "forward",
        kernels.forward,
        operands._asdict(),
        {"y": jax.ShapeDtypeStruct((stack_size(operands), images, positions, features), plan.spec.out_dtype)},
        grid=(plan.spec.feature_groups * cut.feature_blocks, count_tiles(cut, images)),
        cut=cut,
    )
    return _ForwardResults(**made)


def _backward(plan: Plan, operands: _BackwardOperands) -> _BackwardResults:
    dx = _launch_backward_x(plan, operands)
    dkernel, dweight = _launch_backward_kernel(plan, operands)
    return _BackwardResults(dx.astype(operands.x.dtype), dkernel.astype(operands.kernel.dtype), dweight)


def _launch_backward_x(plan: Plan, operands: _BackwardOperands) -> jax.Array:
    x = operands.x
    cut = cut_for("backward_x", plan, x.shape[-1], operands.g.shape[-1])
    given = operands._asdict()
    del given["x"]
    made = _launch(
        "backward_x",
        kernels.backward_x,
        given,
        {"dx": partitioning.zeros((stack_size(operands), *x.shape[1:]), like=x)},
        grid=(plan.segments * cut.channel_blocks, count_tiles(cut, x.shape[1])),
        cut=cut,
    )
    return made["dx"]


def _launch_backward_kernel(plan: Plan, operands: _BackwardOperands) -> tuple[jax.Array, jax.Array]:
    x, kernel, row, _, g = operands
    stack = stack_size(operands)
    cut = cut_for("backward_kernel", plan, x.shape[-1], g.shape[-1])
    programs = plan.spec.window.taps * plan.segments * cut.channel_blocks * cut.feature_blocks
    splits = min(max(1, WARPS // (cut.tile.warps * programs * stack)), count_runs(cut, x.shape[1]))
    shape = (stack, *kernel.shape[1:])
    _, images, groups, corners, positions = row.shape
    made = _launch(
        "backward_kernel",
        functools.partial(kernels.backward_kernel, splits=splits),
        operands._asdict(),
        {
            "dweight": jax.ShapeDtypeStruct((stack, images, groups, cut.parts, corners, positions), jnp.float32),
            "dkernel": jax.ShapeDtypeStruct(shape, kernel.dtype) if splits == 1 else partitioning.zeros(shape, like=x),
        },
        grid=(programs, splits),
        cut=cut,
    )
    return made["dkernel"], jnp.sum(made["dweight"], axis=3)


_FORWARD = partitioning.Pass(_forward, batched=frozenset({"x", "row", "weight", "y"}))
_BACKWARD = partitioning.Pass(_backward, batched=frozenset({"x", "row", "weight", "g", "dx", "dweight"}))


def _launch(name: str, kernel, operands: dict, results: dict, *, grid: tuple[int, ...], cut: Cut) -> dict[str, Any]:
    return launch(
        functools.partial(kernel, cut=cut),
        operands,
        results,
        name=f"deform_conv_{name}",
        grid=grid,
        warps=cut.tile.warps,
        stages=cut.tile.stages,
        interpret=cut.plan.interpret,
    )
