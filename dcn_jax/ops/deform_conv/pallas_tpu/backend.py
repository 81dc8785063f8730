"""The op as TPU kernels, for offsets that are bounded: products with hat functions, without a gather or a scatter.

`run` brings a call to what is launched; `_convolve` and `_pull` are the op and its gradients. How the
kernels read is in `pallas_tpu_kernels`. They compile for TPUs v5e and v6e and are right in Pallas's
interpreter, and nobody has run them on a TPU.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from dcn_jax._core import dtypes
from dcn_jax._core.mesh import on_any_mesh
from dcn_jax._core.pallas import batching, partitioning
from dcn_jax._core.pallas.derivatives import by_kernels
from dcn_jax._core.pallas.launch import interpreting, out_of_reach
from dcn_jax._core.platform_op import Op, platform_op, type_of
from dcn_jax.ops.deform_conv.call import Arrays, Spec
from dcn_jax.ops.deform_conv.pallas_tpu.launch import BACKWARD, FORWARD, ON_CHIP, BackwardOperands, Operands, Plan
from dcn_jax.ops.deform_conv.pallas_tpu.tiles import bytes_on_chip, cut_for
from dcn_jax.ops.deform_conv.xla import backend as xla

DTYPES = ("float32", "bfloat16")
LIMIT = 8  # pixels: the largest bound of offsets; a window grows with it
TAPS = 9  # at most

# How float32 products are made, by what `precision` asks for.
_PRECISIONS = {
    None: lax.Precision.DEFAULT,
    lax.DotAlgorithmPreset.DEFAULT: lax.Precision.DEFAULT,
    lax.DotAlgorithmPreset.BF16_BF16_F32: lax.Precision.DEFAULT,
    lax.DotAlgorithmPreset.BF16_BF16_F32_X3: lax.Precision.HIGH,
    lax.DotAlgorithmPreset.BF16_BF16_F32_X6: lax.Precision.HIGHEST,
    lax.DotAlgorithmPreset.F32_F32_F32: lax.Precision.HIGHEST,
} | {(precision, precision): precision for precision in lax.Precision}


def refusal(spec: Spec, arrays: Arrays) -> str | None:
    """Why the kernels cannot take this call, all reasons in one sentence; None if they can."""
    window, bound, reasons = spec.window, spec.max_offset, []
    if bound is None or bound > LIMIT:
        reasons.append(
            f"max_offset={bound} (what a tile of positions reads is kept on chip: give a bound of at most {LIMIT} pixels)"
        )
    if window.rank != 2:
        reasons.append(f"it has {window.rank} spatial axes (the kernels know 2)")
    if window.taps > TAPS:
        reasons.append(f"kernel has {window.taps} taps (the kernels know up to {TAPS}, a window of 3×3 say)")
    if set(window.strides) != {1}:
        reasons.append(f"strides={window.strides} (the kernels know 1)")
    if max(window.dilation) > 2:
        reasons.append(f"kernel_dilation={window.dilation} (the kernels know 1 and 2: what a tile reads grows with it)")
    if set(window.padding_mode) != {"zeros"}:
        reasons.append(f"padding_mode={window.padding_mode} (the kernels know 'zeros')")
    if spec.feature_groups != 1 or spec.offset_groups != 1:
        reasons.append(
            f"it has feature_group_count={spec.feature_groups} and {spec.offset_groups} offset groups (the kernels know one "
            "of each: call the op for one group after another)"
        )
    if spec.dtype.name not in DTYPES:
        reasons.append(f"x and kernel have dtype {spec.dtype} (the kernels know {' and '.join(DTYPES)})")
    precision = _precision(spec.precision)
    if precision is None:
        known = ", ".join(map(str, _PRECISIONS))
        reasons.append(f"precision={spec.precision!r} is not among those the kernels know ({known})")
    if any(map(is_symbolic_dim, (*arrays.x.shape, *window.spatial))):
        reasons.append(f"x has the symbolic shape {arrays.x.shape} (the kernels are made for sizes that are known)")
    elif precision and not reasons:
        taken = bytes_on_chip(cut_for(spec, precision), spec.dtype, *arrays.kernel.shape[-2:])
        if taken > ON_CHIP:
            reasons.append(
                f"x of shape {arrays.x.shape} with kernel of shape {arrays.kernel.shape} takes {taken / 2**20:.0f} MiB on "
                f"chip (of {ON_CHIP / 2**20:.0f}, for strips as wide as the map, the kernel and its gradient: call the op for "
                "some of the features at a time, or for parts of a wide map)"
            )
    if problem := out_of_reach("tpu"):
        reasons.append(problem)
    return "; and ".join(reasons) or None


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """`deform_conv` of a checked call that `refusal` has nothing against."""
    if 0 in (arrays.x.size, arrays.kernel.size):
        return xla.run(spec, arrays)  # no products to make
    # The mode is kept in the plan: a backward pass traced later runs in that of its forward pass.
    out_dtype = spec.out_dtype if spec.out_dtype.name in DTYPES else jnp.dtype("float32")
    cut = cut_for(spec, cast(lax.Precision, _precision(spec.precision)))
    plan = Plan(spec._replace(out_dtype=out_dtype), cut, interpreting())
    compute = on_any_mesh(
        _arrange,
        (plan, spec.out_dtype),
        arrays,
        batched=(arrays.x, arrays.offset),
        batch=arrays.x.ndim - 3,
        whole=3,
    )
    return compute(*arrays)


def _arrange(call: tuple[Plan, Any], x, kernel, offset, mask, bias) -> jax.Array:
    """Flatten the batch axes and cast to what the kernels read; bring the result back."""
    plan, out_dtype = call
    spec, batch = plan.spec, x.shape[:-3]

    def flat(array):
        shape = array.shape[len(batch) :]
        return jnp.broadcast_to(array, (*batch, *shape)).reshape(-1, *shape)  # one set of offsets may serve all images

    points = (*offset.shape[:-1], spec.window.taps)
    operands = Operands(
        flat(x).astype(spec.dtype),
        kernel.astype(spec.dtype).reshape(spec.window.taps, *kernel.shape[-2:]),
        flat(offset).astype(jnp.float32),
        flat(jnp.ones(points, jnp.float32) if mask is None else mask.astype(jnp.float32)),
        (jnp.zeros(kernel.shape[-1:]) if bias is None else bias).astype(jnp.float32),
    )
    y = _op(plan, partitioning.vary_alike(operands))
    return y.reshape(*batch, *y.shape[1:]).astype(out_dtype)


def _precision(precision: Any) -> lax.Precision | None:
    """How to make a float32 product, by `precision` as lax understands it; None if the kernels cannot."""
    return _PRECISIONS.get(dtypes.asked_precision(precision))


# --- the op and its gradients, at the operands of a call -----------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)  # a call outside of jit compiles once, not each time
def _op(plan: Plan, operands: Operands) -> jax.Array:
    """y: `(B, Ho, Wo, F)`."""
    made = by_kernels(_convolve, _gradients, _by_xla, plan)
    return platform_op(Op(plan.spec, type_of(functools.partial(_by_xla, plan.spec, plan), operands), made), operands)


def _by_xla(spec: Spec, plan: Plan, operands: Operands) -> jax.Array:
    del plan
    x, kernel, *rest = operands
    return xla.convolve(spec, x, kernel.reshape(*spec.window.size, *kernel.shape[1:]), *rest)


def _gradients(spec: Spec, plan: Plan, active: tuple[str, ...], g: jax.Array, operands: Operands) -> dict[str, Any]:
    """Those of the operands named in `active`."""
    del spec
    found = _pull(plan, operands, g)
    return {name: getattr(found, name) for name in active}


def _convolve(spec: Spec, plan: Plan, operands: Operands) -> jax.Array:
    """The op by the kernels."""
    del spec
    return batching.run_pass(FORWARD, plan, operands).y


def _pull(plan: Plan, operands: Operands, g: jax.Array) -> Operands:
    """The gradients by the kernels, at `g`, the gradient of y."""
    x, kernel, offset, mask, _ = operands
    made = batching.run_pass(BACKWARD, plan, BackwardOperands(x, kernel, offset, mask, g))
    bias_bar = jnp.sum(g, axis=(0, 1, 2), dtype=jnp.float32)
    return Operands(made.x_bar, made.kernel_bar, made.offset_bar, made.mask_bar, bias_bar)
