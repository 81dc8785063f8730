"""The op in `jax.numpy`: a block of positions and one tap after another, so that little is in memory at once.

`run` brings the arrays to one batch axis B and one axis of positions P; `_sum_taps` is the sum over
the taps, and how it is differentiated; `_scan_blocks` is the loop; `_multiply` is the product.
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax._mesh import on_any_mesh
from dcn_jax._numerics import wide
from dcn_jax.geometry import Size, Window, int32, regular_positions, regular_taps
from dcn_jax.ops.deform_conv.call import Arrays, Spec, add_bias
from dcn_jax.sampling import Border, Positions, Rows, locate, sum_rows


def refusal(spec: Spec, arrays: Arrays) -> str | None:
    """Why this backend cannot take a call: it takes every one."""
    del spec, arrays
    return None


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """`deform_conv` of a checked call."""
    rank = spec.window.rank
    return on_any_mesh(
        functools.partial(_convolve, spec),
        arrays,
        batched=(arrays.x, arrays.offset),
        batch=arrays.x.ndim - rank - 1,
        whole=rank + 1,
    )


def _convolve(spec: Spec, x, kernel, offset, mask, bias) -> jax.Array:
    """Bring the arrays to one axis of positions, sum over the taps, and bring the result back."""
    window, groups = spec.window, spec.offset_groups
    batch, channels = x.shape[: -window.rank - 1], x.shape[-1]
    per_tap = math.prod(window.out_spatial), groups, window.taps
    repeated = any(array is not None and array.shape[: len(batch)] != batch for array in (offset, mask))

    def flatten(array, *shape):
        """Batch axes as one; where offset or mask is to be repeated along some, as they are."""
        axes = array.shape[: len(batch)]
        return array.reshape(*(axes if repeated else (math.prod(axes),)), *shape)

    y = _jitted_sum_taps(
        spec,
        # Its gradient is summed in the dtype that is read: hence in the accumulator's already here.
        flatten(x, math.prod(window.spatial) * groups, channels // groups).astype(spec.accumulate),
        kernel.reshape(window.taps, *kernel.shape[-2:]),
        flatten(offset, *per_tap, window.rank),
        None if mask is None else flatten(mask, *per_tap),
    )
    return add_bias(y.reshape(*batch, *window.out_spatial, kernel.shape[-1]), bias).astype(spec.out_dtype)


# The batch is kept apart from the positions: folded into them it would hide from the partitioner, and a call on a
# batch-sharded x would gather all of x on every device.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_taps(spec: Spec, rows, matrices, offset, modulation) -> jax.Array:
    """Σ over taps: `(*B, R, Cg)`, `(K, C / groups, F)`, `(*B, P, OG, K, n)`, `(*B, P, OG, K)` -> `(B, P, F)`."""
    return _scan(spec, rows, matrices, offset, modulation, derivative=False)


def _sum_taps_jvp(spec, primals, tangents):
    """The derivative, a block of positions at a time: of the block's samples, no more than one tap's are ever kept."""
    active = [i for i, dot in enumerate(tangents) if dot is not None and not isinstance(dot, SymbolicZero)]

    def of_active(*arguments):
        whole = (arguments[active.index(i)] if i in active else primal for i, primal in enumerate(primals))
        return _scan(spec, *whole, derivative=True)

    # The result itself as without a derivative, in fewer blocks: nothing is kept for it.
    y = _sum_taps(spec, *primals)
    return y, jax.jvp(of_active, [primals[i] for i in active], [tangents[i] for i in active])[1]


_sum_taps.defjvp(_sum_taps_jvp, symbolic_zeros=True)
_jitted_sum_taps = jax.jit(_sum_taps, static_argnums=0)  # a call outside of jit compiles once, not each time


def _scan(spec: Spec, rows, matrices, offset, modulation, *, derivative: bool) -> jax.Array:
    """`_sum_taps`, in as many blocks of positions as suit the platform that it is compiled for."""
    scans = {
        platform: functools.partial(_scan_blocks, spec, blocks=blocks)
        for platform, blocks in _blocks_by_platform(spec, rows, derivative).items()
    }
    return lax.platform_dependent(rows, matrices, offset, modulation, **scans)


def _blocks_by_platform(spec: Spec, rows, derivative: bool) -> dict[str, int]:
    """Into how many blocks the positions are cut: more take less scratch memory, but each costs time."""
    positions = math.prod(spec.window.out_spatial)
    # Where channels are not multiplied together, more blocks take no more time.
    few = (4 if _depthwise(spec, rows) else 2) if derivative else 1
    # A block's samples, of one tap, stay in the caches of a CPU. Sizes that are known only when an exported program is
    # called count for nothing.
    known = [n for n in (*rows.shape[:-2], positions) if isinstance(n, int)]
    samples = math.prod(known) * spec.offset_groups * rows.shape[-1] * rows.dtype.itemsize
    blocks = {
        "default": few,
        "cpu": few * max(1, round(samples / 1.75e6)),
        "tpu": 8,  # it keeps the 2^n rows of each sample, and pads rows, and groups of channels, to 128 channels
    }
    most = positions if isinstance(positions, int) else 8
    blocks = {platform: min(n, most) for platform, n in blocks.items()}
    return {platform: n for platform, n in blocks.items() if platform == "default" or n != blocks["default"]}


def _scan_blocks(spec: Spec, rows, matrices, offset, modulation, *, blocks: int) -> jax.Array:
    """`_sum_taps`, one block of positions and one tap after another: each step is recomputed in the backward pass."""
    window, batch = spec.window, rows.shape[:-2]
    images, positions, features = math.prod(batch), math.prod(window.out_spatial), matrices.shape[-1]
    size = -(-positions // blocks)
    dtype = wide(offset.dtype, jnp.finfo(spec.accumulate).dtype)
    first = _pad(regular_positions(window).reshape(positions, window.rank), 0, blocks * size)
    whole_blocks = functools.partial(_whole_blocks, batch_axes=len(batch), length=blocks * size)
    offset, modulation = whole_blocks(offset), None if modulation is None else whole_blocks(modulation)
    take = functools.partial(_take_step, batch_axes=len(batch), size=size, window=window)

    # One loop, not one within the other, whose arrays are indexed where they lie and not scanned over: so none is moved,
    # and XLA sees that the gradient of the kernel is a sum over the steps, which it takes over devices once, after the loop.
    @functools.partial(jax.checkpoint, prevent_cse=False)  # keeps no samples for the backward pass
    def add_tap(total, step):
        block, tap = step
        regular = lax.expand_dims(_regular(first, block, tap, size, window), range(len(batch)))
        points = Positions(regular, take(offset, block, tap).astype(dtype))
        scale = None if modulation is None else take(modulation, block, tap)[..., 0]
        samples = _read(rows, locate(points, scale, Border(window.spatial, window.padding_mode)))
        samples = samples.reshape(images * size, *samples.shape[2:])
        matrix = lax.dynamic_index_in_dim(matrices, tap, keepdims=False, allow_negative_indices=False)
        product = _multiply(spec, samples, matrix)
        if blocks == 1:
            return total + product[None], None
        return total.at[block].add(product, mode="promise_in_bounds"), None

    # Within shard_map a scan wants its sum, from the start, to vary over the devices that any of its arguments vary over.
    arguments = [array for array in (rows, matrices, offset, modulation) if array is not None]
    # Where each channel is convolved apart, the sum has its shape: in a flat one, a CPU would find the offset group of each
    # channel anew, and take five times as long.
    groups = (spec.offset_groups,) if _depthwise(spec, rows) else ()
    shape = (blocks, images * size, *groups, features // math.prod(groups))
    zeros = [jnp.zeros_like(array, spec.accumulate, shape) for array in arguments]
    steps = jnp.indices((blocks, window.taps), jnp.int32).reshape(2, blocks * window.taps)
    total, _ = lax.scan(add_tap, functools.reduce(operator.add, zeros), tuple(steps))
    y = jnp.moveaxis(total.reshape(blocks, images, size, features), 0, 1)
    return y.reshape(images, blocks * size, features)[:, :positions]


def _pad(array: jax.Array, axis: int, length: Size) -> jax.Array:
    """`array` with zeros appended along an axis, which is then `length` long."""
    return jnp.pad(array, [(0, length - n if a == axis else 0) for a, n in enumerate(array.shape)])


def _whole_blocks(array: jax.Array, *, batch_axes: int, length: Size) -> jax.Array:
    """`(*B, P, OG, K, …)` -> `(*B, length, OG, K * …)`; without an axis for a single offset group."""
    *front, groups = array.shape[: batch_axes + 2]  # (*B, P), OG
    several = (groups,) if groups > 1 else ()  # an axis of 1 would make XLA's CPU backend copy the array
    array = array.reshape(*front, *several, math.prod(array.shape[batch_axes + 2 :]))
    return _pad(array, batch_axes, length)


def _take_step(array: jax.Array, block, tap, *, batch_axes: int, size: Size, window: Window) -> jax.Array:
    """What one block and tap need of whole blocks: `(*B, blocks * size, OG, K * …)` -> `(*B, size, OG, …)`."""
    batch, several = array.shape[:batch_axes], array.shape[batch_axes + 1 : -1]
    width, zero = array.shape[-1] // window.taps, jnp.zeros_like(tap)
    start = [*[zero] * batch_axes, block * int32(size), *[zero] * len(several), tap * width]
    step = lax.dynamic_slice(array, start, (*batch, size, *several, width), allow_negative_indices=False)
    return step.reshape(*batch, size, *(several or (1,)), width)


def _regular(first: jax.Array, block, tap, size: Size, window: Window) -> jax.Array:
    """Where a tap reads for the positions of a block, before its offset: `(size, 1, n)`, in int32."""
    start = [block * int32(size), jnp.zeros_like(block)]
    first = lax.dynamic_slice(first, start, (size, window.rank), allow_negative_indices=False)
    reach = lax.dynamic_index_in_dim(regular_taps(window), tap, allow_negative_indices=False)  # (1, n)
    return (first + reach)[:, None]


def _read(rows: jax.Array, at: Rows) -> jax.Array:
    """The samples `(B, size, OG, Cg)` of maps `(*B, R, Cg)` at rows `(*B, size, OG)`, some of whose axes are to be repeated."""
    batch = rows.shape[:-2]

    def one_axis(array, wanted):
        return jnp.broadcast_to(array, wanted).reshape(math.prod(batch), *wanted[len(batch) :])

    at = jax.tree.map(lambda array: one_axis(array, (*batch, *array.shape[len(batch) :])), at)
    return jax.vmap(sum_rows)(one_axis(rows, rows.shape), at)


def _depthwise(spec: Spec, channels: jax.Array) -> bool:
    """Whether each channel of an array `(…, R, Cg)` or `(…, OG, Cg)` is convolved apart."""
    return spec.feature_groups == spec.offset_groups * channels.shape[-1]


def _multiply(spec: Spec, samples: jax.Array, matrix: jax.Array) -> jax.Array:
    """`(N, OG, Cg)` times one tap's matrices `(C / groups, F)`, feature group by feature group: `(N, F)`.

    Where each channel is convolved apart: `(N, OG, F / OG)`.
    """
    product: Any = functools.partial(jnp.einsum, precision=spec.precision, preferred_element_type=spec.accumulate)
    samples, matrix = samples.astype(spec.dtype), matrix.astype(spec.dtype)
    (n, offset_groups, width), (channels, features), groups = samples.shape, matrix.shape, spec.feature_groups
    if _depthwise(spec, samples):
        matrix = matrix.reshape(offset_groups, width, features // groups)
        return product("noc,ocf->nocf", samples, matrix).reshape(n, offset_groups, features // offset_groups)
    # A flat matrix product: a batched one would make the gradient of the kernel contract two axes at once.
    samples = samples.reshape(n, offset_groups * width)
    if groups == 1:
        return product("nc,cf->nf", samples, matrix)
    samples = samples.reshape(n, groups, channels)
    matrix = matrix.reshape(channels, groups, features // groups)
    return product("ngc,cgf->ngf", samples, matrix).reshape(n, features)
