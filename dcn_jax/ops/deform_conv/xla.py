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

    y = _sum_taps(
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
@functools.partial(jax.jit, static_argnums=0)  # a call outside of jit compiles once, not each time
def _sum_taps(spec: Spec, rows, matrices, offset, modulation) -> jax.Array:
    """Σ over taps: `(*B, R, Cg)`, `(K, C / groups, F)`, `(*B, P, OG, K, n)`, `(*B, P, OG, K)` -> `(B, P, F)`.

    In as many blocks of positions as suit the platform that it is compiled for, and its derivative in others.
    """
    from dcn_jax._by_platform import Computation, by_platform  # here, for `jax.extend` brings Pallas along

    def result_type(rows, matrices, *per_tap):
        images, _, positions, features = _sizes(spec, 1, rows, matrices)
        arrays = (rows, matrices, *per_tap)
        # One position's product, for what JAX has to say of its precision.
        _multiply(spec, jnp.zeros_like(rows, shape=(1, spec.offset_groups, rows.shape[-1])), matrices[0])
        return _zeros(spec, (images, positions, features), arrays)

    blocks = [tuple(_blocks_by_platform(spec, rows, derivative).items()) for derivative in (False, True)]
    scan, gradients = functools.partial(_scan_blocks, spec), functools.partial(_scan_gradients, spec)
    arrays = (rows, matrices, offset) if modulation is None else (rows, matrices, offset, modulation)
    return by_platform(Computation(scan, gradients, result_type, *blocks), *arrays)


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


def _scan_blocks(spec: Spec, blocks: int, *arrays) -> jax.Array:
    """The sum over taps, one block of positions and one tap after another: of the samples, no more are ever kept."""
    rows, matrices, *_ = arrays
    images, size, positions, features = _sizes(spec, blocks, rows, matrices)
    wholes = _whole_blocks(spec, blocks, *arrays)

    # One loop, not one within the other, whose arrays are indexed where they lie and not scanned over: so none is moved,
    # and XLA sees that the gradient of the kernel is a sum over the steps, which it takes over devices once, after the loop.
    @functools.partial(jax.checkpoint, prevent_cse=False)  # where it is differentiated, too, no samples are kept
    def add_tap(total, step):
        product = _product(spec, blocks, step, *wholes)
        if blocks == 1:
            return total + product[None], None
        return total.at[step[0]].add(product, mode="promise_in_bounds"), None

    # Where each channel is convolved apart, the sum has its shape: in a flat one, a CPU would find the offset group of each
    # channel anew, and take five times as long.
    groups = (spec.offset_groups,) if _depthwise(spec, rows) else ()
    total = _zeros(spec, (blocks, images * size, *groups, features // math.prod(groups)), arrays)
    total, _ = lax.scan(add_tap, total, _steps(spec, blocks))
    y = jnp.moveaxis(total.reshape(blocks, images, size, features), 0, 1)
    return y.reshape(images, blocks * size, features)[:, :positions]


def _scan_gradients(spec: Spec, blocks: int, active: tuple[int, ...], y_bar: jax.Array, *arrays) -> list[jax.Array]:
    """The gradients by the arrays that are `active`: the transpose of `_scan_blocks`, step by step.

    It is what JAX would find, in a third of the time that it takes to trace.
    """
    images, size, _, features = _sizes(spec, blocks, *arrays[:2])
    wholes, undo = jax.vjp(functools.partial(_whole_blocks, spec, blocks), *arrays)
    y_bar = _pad(y_bar, 1, blocks * size).reshape(images, blocks, size, features)
    y_bar = jnp.moveaxis(y_bar, 1, 0).reshape(blocks, images * size, features)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_step(sums, step):
        def of_active(*moving):
            moved = dict(zip(active, moving, strict=True))
            return _product(spec, blocks, step, *(moved.get(i, array) for i, array in enumerate(wholes)))

        product, pull = jax.vjp(of_active, *(wholes[i] for i in active))
        bar = lax.dynamic_index_in_dim(y_bar, step[0], keepdims=False, allow_negative_indices=False)
        bars = pull(bar.reshape(product.shape))
        return [total + bar for total, bar in zip(sums, bars, strict=True)], None

    sums, _ = lax.scan(add_step, [jnp.zeros_like(wholes[i]) for i in active], _steps(spec, blocks), reverse=True)
    whole_bars = dict(zip(active, sums, strict=True))
    bars = undo(tuple(whole_bars.get(i, jnp.zeros_like(whole)) for i, whole in enumerate(wholes)))
    return [bars[i] for i in active]


def _sizes(spec: Spec, blocks: int, rows, matrices):
    """Images, positions in a block and in all, features."""
    positions = math.prod(spec.window.out_spatial)
    return math.prod(rows.shape[:-2]), -(-positions // blocks), positions, matrices.shape[-1]


def _steps(spec: Spec, blocks: int) -> tuple[jax.Array, jax.Array]:
    """The block and the tap of each step, blocks outside and taps inside: `(blocks * K,)` each."""
    block, tap = jnp.indices((blocks, spec.window.taps), jnp.int32).reshape(2, blocks * spec.window.taps)
    return block, tap


def _zeros(spec: Spec, shape: tuple[Size, ...], arrays) -> jax.Array:
    """Zeros to sum products of `arrays` in; within shard_map they vary over the devices that any of these vary over."""
    return functools.reduce(operator.add, [jnp.zeros_like(array, spec.accumulate, shape) for array in arrays])


def _product(spec: Spec, blocks: int, step, rows, matrices, offset, modulation=None) -> jax.Array:
    """What one tap adds to one block of positions: `(B * size, F)`, or by offset groups as `_multiply` says."""
    (block, tap), window, batch = step, spec.window, rows.shape[:-2]
    images, size, positions, _ = _sizes(spec, blocks, rows, matrices)
    first = _pad(regular_positions(window).reshape(positions, window.rank), 0, blocks * size)
    take = functools.partial(_take_step, batch_axes=len(batch), size=size, window=window)
    regular = lax.expand_dims(_regular(first, block, tap, size, window), range(len(batch)))
    dtype = wide(offset.dtype, jnp.finfo(spec.accumulate).dtype)
    points = Positions(regular, take(offset, block, tap).astype(dtype))
    scale = None if modulation is None else take(modulation, block, tap)[..., 0]
    samples = _read(rows, locate(points, scale, Border(window.spatial, window.padding_mode)))
    samples = samples.reshape(images * size, *samples.shape[2:])
    return _multiply(
        spec, samples, lax.dynamic_index_in_dim(matrices, tap, keepdims=False, allow_negative_indices=False)
    )


def _pad(array: jax.Array, axis: int, length: Size) -> jax.Array:
    """`array` with zeros appended along an axis, which is then `length` long."""
    return jnp.pad(array, [(0, length - n if a == axis else 0) for a, n in enumerate(array.shape)])


def _whole_blocks(spec: Spec, blocks: int, rows, matrices, *per_tap: jax.Array) -> tuple[jax.Array, ...]:
    """`(*B, P, OG, K, …)` -> `(*B, blocks * size, OG, K * …)`; without an axis for a single offset group."""
    _, size, *_ = _sizes(spec, blocks, rows, matrices)
    batch_axes = rows.ndim - 2

    def whole(array):
        *front, groups = array.shape[: batch_axes + 2]  # (*B, P), OG
        several = (groups,) if groups > 1 else ()  # an axis of 1 would make XLA's CPU backend copy the array
        array = array.reshape(*front, *several, math.prod(array.shape[batch_axes + 2 :]))
        return _pad(array, batch_axes, blocks * size)

    return rows, matrices, *map(whole, per_tap)


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
