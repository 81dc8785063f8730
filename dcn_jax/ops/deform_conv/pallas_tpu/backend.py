"""`deform_conv` as TPU kernels, for bounded offsets: matrix products instead of gathers and scatters.

`run` brings the arrays into the form that the kernels read. `_result` and `_gradients` are the op
and its gradients. `kernels` tells how they read. The kernels compile for TPUs v5e and v6e and are
tested in Pallas's interpreter. They have never run on a TPU.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from dcn_jax._core import dtypes
from dcn_jax._core.mesh import on_any_mesh
from dcn_jax._core.pallas import batching
from dcn_jax._core.pallas.derivatives import by_kernels
from dcn_jax._core.pallas.launch import interpreting, out_of_reach
from dcn_jax._core.platform_op import Op, platform_op, type_of
from dcn_jax.ops.deform_conv.call import Arrays, Spec, flatten_batch
from dcn_jax.ops.deform_conv.pallas_tpu.launch import BACKWARD, FORWARD, ON_CHIP, BackwardOperands, ForwardOperands
from dcn_jax.ops.deform_conv.pallas_tpu.tiles import TpuCall, bytes_on_chip, layout_for
from dcn_jax.ops.deform_conv.xla import backend as xla

DTYPES = ("float32", "bfloat16")
LIMIT = 8  # pixels: the largest bound of offsets; the pixels that a tile reads grow with it
TAPS = 9  # at most

# How float32 products are computed, by `precision`.
_PRECISIONS = {
    None: lax.Precision.DEFAULT,
    lax.DotAlgorithmPreset.DEFAULT: lax.Precision.DEFAULT,
    lax.DotAlgorithmPreset.BF16_BF16_F32: lax.Precision.DEFAULT,
    lax.DotAlgorithmPreset.BF16_BF16_F32_X3: lax.Precision.HIGH,
    lax.DotAlgorithmPreset.BF16_BF16_F32_X6: lax.Precision.HIGHEST,
    lax.DotAlgorithmPreset.F32_F32_F32: lax.Precision.HIGHEST,
} | {(precision, precision): precision for precision in lax.Precision}


def refusal(spec: Spec, arrays: Arrays) -> str | None:
    """All reasons why the kernels cannot take this call, in one sentence; None if they can."""
    window, bound, reasons = spec.window, spec.max_offset, []
    if bound is None or bound > LIMIT:
        reasons.append(
            f"max_offset={bound} (the pixels that a tile of positions reads are kept on chip: give a bound of at most "
            f"{LIMIT} pixels)"
        )
    if window.rank != 2:
        reasons.append(f"it has {window.rank} spatial axes (the kernels take 2)")
    if window.taps > TAPS:
        reasons.append(f"kernel has {window.taps} taps (the kernels take up to {TAPS}, for example a window of 3×3)")
    if set(window.strides) != {1}:
        reasons.append(f"strides={window.strides} (the kernels take 1)")
    if max(window.dilation) > 2:
        reasons.append(
            f"kernel_dilation={window.dilation} (the kernels take 1 and 2: the pixels that a tile reads grow with it)"
        )
    if set(window.padding_mode) != {"zeros"}:
        reasons.append(f"padding_mode={window.padding_mode} (the kernels take 'zeros')")
    if spec.feature_groups != 1 or spec.offset_groups != 1:
        reasons.append(
            f"it has feature_group_count={spec.feature_groups} and {spec.offset_groups} offset groups (the kernels take one "
            "of each: call the op for one group after another)"
        )
    if spec.dtype.name not in DTYPES:
        reasons.append(f"x and kernel have dtype {spec.dtype} (the kernels take {' and '.join(DTYPES)})")
    if _precision(spec.precision) is None:
        known = ", ".join(map(str, _PRECISIONS))
        reasons.append(f"precision={spec.precision!r} is not one that the kernels take ({known})")
    if any(map(is_symbolic_dim, (*arrays.x.shape, *window.spatial))):
        reasons.append(f"x has the symbolic shape {arrays.x.shape} (the kernels need sizes that are known)")
    elif not reasons:
        taken = bytes_on_chip(layout_for(spec), spec.dtype, *arrays.kernel.shape[-2:])
        if taken > ON_CHIP:
            reasons.append(
                f"x of shape {arrays.x.shape} with kernel of shape {arrays.kernel.shape} takes {taken / 2**20:.0f} MiB on "
                f"chip, and the kernels may take {ON_CHIP / 2**20:.0f} (for strips as wide as the map, the kernel and its "
                "gradient: call the op for some of the features at a time, or for parts of a wide map)"
            )
    if problem := out_of_reach("tpu"):
        reasons.append(problem)
    return "; and ".join(reasons) or None


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """The result of `deform_conv`, for a checked call that `refusal` returns None for."""
    if 0 in (arrays.x.size, arrays.kernel.size):
        return xla.run(spec, arrays)  # a kernel cannot take arrays without elements
    out_dtype = spec.out_dtype if spec.out_dtype.name in DTYPES else jnp.dtype("float32")
    precision = cast(lax.Precision, _precision(spec.precision))
    # Gradients may be traced later, outside `interpret`. They are interpreted if the result was.
    call = TpuCall(spec._replace(out_dtype=out_dtype), layout_for(spec), precision, interpreting())
    static, batched = (call, spec.out_dtype), (arrays.x, arrays.offset)
    return on_any_mesh(_arrange, static, arrays, batched=batched, batch=arrays.x.ndim - 3, whole=3)(*arrays)


def _arrange(static: tuple[TpuCall, Any], x, kernel, offset, mask, bias) -> jax.Array:
    """The op, for arrays with any batch axes and of any dtype. The batch axes become one for the kernels."""
    call, out_dtype = static
    spec, batch = call.spec, x.shape[:-3]

    flat = functools.partial(flatten_batch, batch)
    points = (*offset.shape[:-1], spec.window.taps)
    operands = ForwardOperands(
        flat(x).astype(spec.dtype),
        kernel.astype(spec.dtype).reshape(spec.window.taps, *kernel.shape[-2:]),
        flat(offset).astype(jnp.float32),
        flat(jnp.ones(points, jnp.float32) if mask is None else mask.astype(jnp.float32)),
        (jnp.zeros(kernel.shape[-1:]) if bias is None else bias).astype(jnp.float32),
    )
    y = _op(call, operands)
    return y.reshape(*batch, *y.shape[1:]).astype(out_dtype)


def _precision(precision: Any) -> lax.Precision | None:
    """How to compute float32 products, by `precision` as lax understands it; None if the kernels cannot."""
    return _PRECISIONS.get(dtypes.asked_precision(precision))


# --- the op and its gradients, for the operands of the kernels -----------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)  # a call outside of jit compiles once, not each time
def _op(call: TpuCall, operands: ForwardOperands) -> jax.Array:
    result = type_of(functools.partial(_by_xla, call.spec, call), operands)
    return platform_op(Op(call.spec, result, by_kernels(_result, _gradients, _by_xla, call)), operands)


def _by_xla(spec: Spec, call: TpuCall, operands: ForwardOperands) -> jax.Array:
    del call
    x, kernel, *rest = operands
    return xla.convolve(spec, x, kernel.reshape(*spec.window.size, *kernel.shape[1:]), *rest)


def _result(spec: Spec, call: TpuCall, operands: ForwardOperands) -> jax.Array:
    del spec
    return batching.run_pass(FORWARD, call, operands).y


def _gradients(spec: Spec, call: TpuCall, active: tuple[str, ...], y_bar: jax.Array, operands: ForwardOperands) -> dict:
    """The gradients of the operands named in `active`."""
    del spec
    x, kernel, offset, mask, _ = operands
    made = batching.run_pass(BACKWARD, call, BackwardOperands(x, kernel, offset, mask, y_bar))
    bias_bar = jnp.sum(y_bar, axis=(0, 1, 2), dtype=jnp.float32)
    found = ForwardOperands(made.x_bar, made.kernel_bar, made.offset_bar, made.mask_bar, bias_bar)
    return {name: getattr(found, name) for name in active}
