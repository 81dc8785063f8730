"""The op as fused GPU kernels, which gather, interpolate, modulate and multiply in one pass.

`run` brings a call to what the kernels read. `_op` and `_gradients` are the op and its derivative.
`_forward` and `_backward` launch the kernels of `pallas_gpu_kernels`, over a call that is cut by
`pallas_gpu_tiles`. What kernels of any op need is in `_pallas`. What was counted, and what to try, is
in pallas_gpu.md.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from dcn_jax._mesh import on_any_mesh
from dcn_jax._pallas import batching, sharding
from dcn_jax._pallas.launch import gpu_in_reach, interpreting, launch, stack_size
from dcn_jax._pallas.reverse import reverse_only
from dcn_jax.ops.deform_conv import pallas_gpu_kernels as kernels
from dcn_jax.ops.deform_conv import xla
from dcn_jax.ops.deform_conv.call import Arrays, Spec, add_bias
from dcn_jax.ops.deform_conv.pallas_gpu_tiles import PROGRAMS, Cut, Plan, count_tiles, cut_for

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
    if spec.window.rank > 2:
        reasons.append(f"it has {spec.window.rank} spatial axes (the kernels know 1 and 2)")
    if set(spec.window.padding_mode) != {"zeros"}:
        reasons.append(f"padding_mode={spec.window.padding_mode!r} (the kernels know 'zeros')")
    if any(map(is_symbolic_dim, (*arrays.x.shape, *spec.window.spatial))):
        reasons.append(f"x has the symbolic shape {arrays.x.shape} (the kernels are made for sizes that are known)")
    for name, array in (("x", arrays.x), ("kernel", arrays.kernel)):
        if array.dtype.name not in DTYPES:
            reasons.append(f"{name} has dtype {array.dtype} (the kernels know {', '.join(DTYPES)})")
    if _product(spec.precision) is None:
        known = ", ".join(map(str, _PRODUCTS))
        reasons.append(f"precision={spec.precision!r} is not among those the kernels know ({known})")
    if not interpreting() and not gpu_in_reach():
        reasons.append(
            f"it runs on CUDA GPUs, and JAX's backend here is {jax.default_backend()!r} (to compile for a GPU ahead of time, "
            "trace under jax.sharding.use_abstract_mesh with an abstract_device of platform 'gpu', or install jax's CUDA plugin)"
        )
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
    return on_any_mesh(
        functools.partial(_arrange, plan, spec.out_dtype),
        arrays,
        batched=(arrays.x, arrays.offset),
        batch=arrays.x.ndim - rank - 1,
        whole=rank + 1,
    )


def _arrange(plan: Plan, out_dtype, x, kernel, offset, mask, bias) -> jax.Array:
    """Flatten the batch axes and cast to what the kernels load; bring the result back."""
    batch = x.shape[: -plan.spec.window.rank - 1]

    def flat(array):
        shape = array.shape[len(batch) :]
        return jnp.broadcast_to(array, (*batch, *shape)).reshape(-1, *shape)  # one set of offsets may serve all images

    bias_inside = bias if bias is not None and bias.dtype.name in DTYPES else None
    arrays = Arrays(
        flat(x), kernel, flat(_loadable(offset)), None if mask is None else flat(_loadable(mask)), bias_inside
    )
    y = cast(jax.Array, _op(plan, jax.tree.map(reverse_only, sharding.vary_alike(arrays))))
    y = y.reshape(*batch, *y.shape[1:])
    bias_outside = bias if bias_inside is None else None  # wider than what the kernels load
    return add_bias(y, bias_outside).astype(out_dtype)


def _product(precision: Any) -> lax.DotAlgorithmPreset | None:
    """How to make a float32 product, by `precision` as lax understands it; None if the kernels cannot.

    lax looks at jax_default_matmul_precision too.
    """
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    (dot,) = jax.make_jaxpr(functools.partial(lax.dot, precision=precision))(one, one).eqns
    asked = dot.params["precision"]
    return _PRODUCTS.get(lax.DotAlgorithmPreset.DEFAULT if asked is None else asked)


def _loadable(array: jax.Array) -> jax.Array:
    """An offset or a mask in a dtype the kernels load."""
    return array if array.dtype.name in DTYPES else array.astype(jnp.float32)


# --- derivatives --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(plan: Plan, arrays: Arrays) -> jax.Array:
    """The op with one batch axis: x `(B, *spatial, C)` to `(B, *out_spatial, F)`."""
    return batching.run_pass(_FORWARD, plan, arrays).y


def _op_forward(plan, arrays):
    return _op(plan, arrays), arrays


def _op_backward(plan, arrays, g):
    return (_gradients(plan, arrays, reverse_only(g)),)


_op.defvjp(_op_forward, _op_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(plan: Plan, arrays: Arrays, g: jax.Array) -> Arrays:
    """The gradients of `_op` at `g`, the gradient of y."""
    x, kernel, offset, mask, bias = arrays
    made = batching.run_pass(_BACKWARD, plan, _BackwardOperands(x, kernel, offset, mask, g))
    dbias = None if bias is None else jnp.sum(g, axis=range(g.ndim - 1), dtype=jnp.float32).astype(bias.dtype)
    return Arrays(made.dx, made.dkernel, made.doffset, made.dmask, dbias)


def _gradients_forward(plan, arrays, g):
    return _gradients(plan, arrays, g), (arrays, g)


def _gradients_backward(plan, operands, cotangents):
    """By way of the XLA implementation, as is every derivative after it."""

    def gradients(arrays, g):
        return jax.vjp(functools.partial(xla.run, plan.spec), arrays)[1](g)[0]

    return jax.vjp(gradients, *operands)[1](cotangents)


_gradients.defvjp(_gradients_forward, _gradients_backward)


# --- the two passes, over arrays with a stack axis ----------------------------------------------------------------


class _ForwardResults(NamedTuple):
    y: jax.Array


class _BackwardOperands(NamedTuple):
    x: jax.Array
    kernel: jax.Array
    offset: jax.Array
    mask: jax.Array | None
    g: jax.Array


class _BackwardResults(NamedTuple):
    dx: jax.Array
    dkernel: jax.Array
    doffset: jax.Array
    dmask: jax.Array | None


def _forward(plan: Plan, operands: Arrays) -> _ForwardResults:
    x, kernel, offset, mask, bias = operands
    images, features = x.shape[1], kernel.shape[-1]
    cut = cut_for("forward", plan, x.shape[-1], features)
    shape = (stack_size(operands), images, *plan.spec.window.out_spatial, features)
    made = _launch(
        "forward",
        kernels.forward,
        {"x": x, "kernel": _matrices(plan, kernel), "offset": offset, "mask": mask, "bias": bias},
        {"y": jax.ShapeDtypeStruct(shape, plan.spec.out_dtype)},
        grid=(plan.spec.feature_groups * cut.feature_blocks, count_tiles(cut, images)),
        cut=cut,
    )
    return _ForwardResults(**made)


def _backward(plan: Plan, operands: _BackwardOperands) -> _BackwardResults:
    x, kernel, *_ = operands
    matrices = _matrices(plan, kernel)
    operands = operands._replace(kernel=matrices)
    dx = _launch_backward_x(plan, operands)
    doffset, dmask = _launch_backward_points(plan, operands)
    dkernel = _launch_backward_kernel(plan, operands)
    dkernel = dkernel.reshape(dkernel.shape[0], *kernel.shape[1:])
    return _BackwardResults(dx.astype(x.dtype), dkernel.astype(kernel.dtype), doffset, dmask)


def _launch_backward_x(plan: Plan, operands: _BackwardOperands) -> jax.Array:
    x, matrices, offset, mask, g = operands
    cut = cut_for("backward_x", plan, x.shape[-1], g.shape[-1])
    made = _launch(
        "backward_x",
        kernels.backward_x,
        {"kernel": matrices, "offset": offset, "mask": mask, "g": g},
        {"dx": sharding.zeros((stack_size(operands), *x.shape[1:]), like=x)},
        grid=(plan.segments * cut.channel_blocks, count_tiles(cut, x.shape[1])),
        cut=cut,
    )
    return made["dx"]


def _launch_backward_points(plan: Plan, operands: _BackwardOperands) -> tuple[jax.Array, jax.Array | None]:
    x, matrices, offset, mask, g = operands
    stack = stack_size(operands)

    def stacked(array):
        return None if array is None else jax.ShapeDtypeStruct((stack, *array.shape[1:]), array.dtype)

    cut = cut_for("backward_points", plan, x.shape[-1], g.shape[-1])
    made = _launch(
        "backward_points",
        kernels.backward_points,
        {"x": x, "kernel": matrices, "offset": offset, "mask": mask, "g": g},
        {"doffset": stacked(offset), "dmask": stacked(mask)},
        grid=(plan.spec.offset_groups, count_tiles(cut, x.shape[1])),
        cut=cut,
    )
    return made["doffset"], made["dmask"]


def _launch_backward_kernel(plan: Plan, operands: _BackwardOperands) -> jax.Array:
    x, matrices, offset, mask, g = operands
    stack = stack_size(operands)
    cut = cut_for("backward_kernel", plan, x.shape[-1], g.shape[-1])
    programs = plan.spec.window.taps * plan.segments * cut.channel_blocks * cut.feature_blocks
    splits = min(max(1, PROGRAMS // (programs * stack)), count_tiles(cut, x.shape[1]))
    shape = (stack, *matrices.shape[1:])
    made = _launch(
        "backward_kernel",
        functools.partial(kernels.backward_kernel, splits=splits),
        {"x": x, "offset": offset, "mask": mask, "g": g},
        {"dkernel": jax.ShapeDtypeStruct(shape, matrices.dtype) if splits == 1 else sharding.zeros(shape, like=x)},
        grid=(programs, splits),
        cut=cut,
    )
    return made["dkernel"]


_FORWARD = sharding.Pass(_forward, batched=frozenset({"x", "offset", "mask", "y"}))
_BACKWARD = sharding.Pass(_backward, batched=frozenset({"x", "offset", "mask", "g", "dx", "doffset", "dmask"}))


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


def _matrices(plan: Plan, kernel):
    """The kernel as one matrix for each tap: `(stack, K, C // feature groups, F)`."""
    return kernel.reshape(kernel.shape[0], plan.spec.window.taps, *kernel.shape[-2:])
