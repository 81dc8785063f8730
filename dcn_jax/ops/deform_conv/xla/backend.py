"""The op in `jax.numpy`, on every platform: it brings the arrays to one batch axis, and hands over to an algorithm.

`schedule` names the algorithm; each is a file beside this one, and `platform_op` runs it when a program is lowered.
"""

import functools
import math

import jax
import jax.numpy as jnp

from dcn_jax._core.mesh import on_any_mesh, zeros_varying_like
from dcn_jax.ops.deform_conv.call import Arrays, Spec, add_bias
from dcn_jax.ops.deform_conv.xla.blocks import Operands


def refusal(spec: Spec, arrays: Arrays) -> str | None:
    """Why this backend cannot take a call: it takes every one."""
    del spec, arrays
    return None


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """`deform_conv` of a checked call."""
    rank = spec.window.rank
    compute = on_any_mesh(
        convolve, spec, arrays, batched=(arrays.x, arrays.offset), batch=arrays.x.ndim - rank - 1, whole=rank + 1
    )
    return compute(*arrays)


def convolve(spec: Spec, x, kernel, offset, mask, bias) -> jax.Array:
    """`run`, on a mesh without explicit axes.

    The batch stays an axis of its own. Folded into the positions, its sharding would be lost, and every device would
    gather all of a batch-sharded x.
    """
    window, groups = spec.window, spec.offset_groups
    batch, channels = x.shape[: -window.rank - 1], x.shape[-1]
    per_tap = math.prod(window.out_spatial), groups, window.taps
    shared = any(array is not None and array.shape[: len(batch)] != batch for array in (offset, mask))

    def flatten(array, *shape):
        """`array` with its batch axes as one. If offset or mask broadcast along some, every operand keeps all of them."""
        axes = array.shape[: len(batch)]
        return array.reshape(*(axes if shared else (math.prod(axes),)), *shape)

    operands = Operands(
        flatten(x, math.prod(window.spatial) * groups, channels // groups),
        kernel.reshape(window.taps, *kernel.shape[-2:]),
        flatten(offset, *per_tap, window.rank),
        None if mask is None else flatten(mask, *per_tap),
    )
    # A bias is added before the sum is rounded. Without one the op rounds, so its cotangent stays narrow until a block is taken.
    y = _sum_taps(spec if bias is None else spec._replace(out_dtype=spec.accumulate), operands)
    return add_bias(y.reshape(*batch, *window.out_spatial, kernel.shape[-1]), bias).astype(spec.out_dtype)


@functools.partial(jax.jit, static_argnums=0)  # a call outside of jit compiles once, not each time
def _sum_taps(spec: Spec, operands: Operands) -> jax.Array:
    """Σ over taps, `(B, P, F)`, by the algorithm of the platform that the program is lowered for."""
    # Imported here: platform_op imports `jax.extend`, which imports Pallas, and `import dcn_jax` is to stay quick.
    from dcn_jax._core.platform_op import Op, platform_op, type_of
    from dcn_jax.ops.deform_conv.xla.schedule import algorithms

    made = tuple(algorithms(spec, operands, derivative=derivative) for derivative in (False, True))
    return platform_op(Op(spec, type_of(functools.partial(_zeros, spec), operands), made), operands)


def _zeros(spec: Spec, operands: Operands) -> jax.Array:
    """Zeros `(B, P, F)` of the sum's type. A product of one number lets JAX raise on a precision that it cannot take."""
    one = jnp.zeros((1, 1), spec.dtype)
    jnp.matmul(one, one, precision=spec.precision, preferred_element_type=spec.accumulate)
    shape = math.prod(operands.rows.shape[:-2]), math.prod(spec.window.out_spatial), operands.matrices.shape[-1]
    return zeros_varying_like(operands, spec.accumulate, shape).astype(spec.out_dtype)
