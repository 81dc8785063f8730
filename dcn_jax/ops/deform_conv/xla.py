"""The op in `jax.numpy`: a block of positions and one tap after another, so that little is in memory at once.

`run` brings the arrays to one batch axis B and one axis of positions P; `_sum_taps` is the sum over
the taps, and how it is differentiated; `_scan_blocks` is the loop; `_multiply` is the product.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

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


class Cut(NamedTuple):
    """How the sum over positions and taps is cut into steps."""

    blocks: int  # of positions
    deep: bool  # whether a step takes all taps of a block, in one deep product, or one


# The batch is kept apart from the positions: folded into them it would hide from the partitioner, and a call on a
# batch-sharded x would gather all of x on every device.
@functools.partial(jax.jit, static_argnums=0)  # a call outside of jit compiles once, not each time
def _sum_taps(spec: Spec, rows, matrices, offset, modulation) -> jax.Array:
    """Σ over taps: `(*B, R, Cg)`, `(K, C / groups, F)`, `(*B, P, OG, K, n)`, `(*B, P, OG, K)` -> `(B, P, F)`.

    In as many blocks of positions as suit the platform that it is compiled for, and its derivative in others.
    """
    from dcn_jax._by_platform import Computation, by_platform  # here, for `jax.extend` brings Pallas along

    def result_type(rows, matrices, *per_tap):
        images, _, positions, features = _sizes(spec, Cut(1, False), rows, matrices)
        arrays = (rows, matrices, *per_tap)
        # One position's product, for what JAX has to say of its precision.
        _multiply(spec, jnp.zeros_like(rows, shape=(1, spec.offset_groups, rows.shape[-1])), matrices[0])
        return _zeros(spec, (images, positions, features), arrays)

    cuts = [
        tuple(_cuts_by_platform(spec, rows, matrices.shape[-1], derivative).items()) for derivative in (False, True)
    ]
    scan, gradients = functools.partial(_scan_blocks, spec), functools.partial(_scan_gradients, spec)
    arrays = (rows, matrices, offset) if modulation is None else (rows, matrices, offset, modulation)
    return by_platform(Computation(scan, gradients, result_type, *cuts), *arrays)


def _cuts_by_platform(spec: Spec, rows, features: int, derivative: bool) -> dict[str, Cut]:
    """How the sum is cut into steps: more blocks take less scratch memory, but each costs time."""
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
    cuts = {platform: Cut(min(n, most), deep=False) for platform, n in blocks.items()}
    if deep := _blocks_of_all_taps(spec, rows, features, derivative):
        cuts["cpu"] = Cut(deep, deep=True)
    return {platform: cut for platform, cut in cuts.items() if platform == "default" or cut != cuts["default"]}


def _blocks_of_all_taps(spec: Spec, rows, features: int, derivative: bool) -> int | None:
    """Into how many blocks a CPU cuts the positions where it reads all taps of a block at once; None: it does not."""
    images, positions = math.prod(rows.shape[:-2]), math.prod(spec.window.out_spatial)
    if _depthwise(spec, rows) or not (isinstance(images, int) and isinstance(positions, int)):
        return None
    columns = images * positions * spec.window.taps * spec.offset_groups * rows.shape[-1] * rows.dtype.itemsize
    # So many that scratch memory stays a share of the columns, and more where they outgrow the caches. Where they divide
    # the positions, nothing is padded. What comes from several images or groups is brought into one order, in a copy.
    several = images > 1 or spec.feature_groups > 1
    least, most_bytes = (20 if several else 16, 1.75e6) if derivative else (5, 3.5e6)
    blocks = max(least, round(columns / most_bytes))
    blocks = next((n for n in range(blocks, min(2 * blocks, positions)) if positions % n == 0), min(blocks, positions))
    # Each block adds to the gradient of the whole kernel. Where that is much beside its samples, one tap at a time is as
    # fast; but not with several offset groups, whose samples that path's derivative takes twice as long to make.
    few = images * positions < 2 * blocks * features // spec.feature_groups
    return None if derivative and few and spec.offset_groups == 1 else blocks


def _scan_blocks(spec: Spec, cut: Cut, *arrays) -> jax.Array:
    """The sum over taps, one block of positions and one tap after another: of the samples, no more are ever kept."""
    rows, matrices, *_ = arrays
    images, size, positions, features = _sizes(spec, cut, rows, matrices)
    wholes = _whole_blocks(spec, cut, *arrays)

    if cut.deep:
        checkpointed = jax.checkpoint(lambda step: _product(spec, cut, step, *wholes), prevent_cse=False)
        _, y = lax.scan(lambda _, step: (None, checkpointed(step)), None, _steps(spec, cut))
        y = y.reshape(cut.blocks, spec.feature_groups, images, size, features // spec.feature_groups)
        return y.transpose(2, 0, 3, 1, 4).reshape(images, cut.blocks * size, features)[:, :positions]

    # One loop, not one within the other, whose arrays are indexed where they lie and not scanned over: so none is moved,
    # and XLA sees that the gradient of the kernel is a sum over the steps, which it takes over devices once, after the loop.
    @functools.partial(jax.checkpoint, prevent_cse=False)  # where it is differentiated, too, no samples are kept
    def add_tap(total, step):
        product = _product(spec, cut, step, *wholes)
        if cut.blocks == 1:
            return total + product[None], None
        return total.at[step[0]].add(product, mode="promise_in_bounds"), None

    # Where each channel is convolved apart, the sum has its shape: in a flat one, a CPU would find the offset group of each
    # channel anew, and take five times as long.
    groups = (spec.offset_groups,) if _depthwise(spec, rows) else ()
    total = _zeros(spec, (cut.blocks, images * size, *groups, features // math.prod(groups)), arrays)
    total, _ = lax.scan(add_tap, total, _steps(spec, cut))
    y = jnp.moveaxis(total.reshape(cut.blocks, images, size, features), 0, 1)
    return y.reshape(images, cut.blocks * size, features)[:, :positions]


def _scan_gradients(spec: Spec, cut: Cut, active: tuple[int, ...], y_bar: jax.Array, *arrays) -> list[jax.Array]:
    """The gradients by the arrays that are `active`: the transpose of `_scan_blocks`, step by step.

    It is what JAX would find, in a third of the time that it takes to trace.
    """
    images, size, _, features = _sizes(spec, cut, *arrays[:2])
    wholes, undo = jax.vjp(functools.partial(_whole_blocks, spec, cut), *arrays)
    y_bar = _pad(y_bar, 1, cut.blocks * size).reshape(images, cut.blocks, size, features)
    y_bar = jnp.moveaxis(y_bar, 1, 0).reshape(cut.blocks, images * size, features)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_step(sums, step):
        def of_active(*moving):
            moved = dict(zip(active, moving, strict=True))
            return _product(spec, cut, step, *(moved.get(i, array) for i, array in enumerate(wholes)))

        product, pull = jax.vjp(of_active, *(wholes[i] for i in active))
        bar = lax.dynamic_index_in_dim(y_bar, step[0], keepdims=False, allow_negative_indices=False)
        if cut.deep and spec.feature_groups > 1:  # (N, F) -> (G, N, F / G)
            bar = bar.reshape(images * size, spec.feature_groups, product.shape[-1]).swapaxes(0, 1)
        bars = pull(bar.reshape(product.shape))
        return [total + bar for total, bar in zip(sums, bars, strict=True)], None

    sums, _ = lax.scan(add_step, [jnp.zeros_like(wholes[i]) for i in active], _steps(spec, cut), reverse=True)
    whole_bars = dict(zip(active, sums, strict=True))
    bars = undo(tuple(whole_bars.get(i, jnp.zeros_like(whole)) for i, whole in enumerate(wholes)))
    return [bars[i] for i in active]


def _sizes(spec: Spec, cut: Cut, rows, matrices):
    """Images, positions in a block and in all, features."""
    positions = math.prod(spec.window.out_spatial)
    return math.prod(rows.shape[:-2]), -(-positions // cut.blocks), positions, matrices.shape[-1]


def _steps(spec: Spec, cut: Cut) -> tuple[jax.Array, jax.Array]:
    """The block and the tap of each step, blocks outside and taps inside: `(blocks * K,)` each; the first tap where deep."""
    taps = 1 if cut.deep else spec.window.taps
    block, tap = jnp.indices((cut.blocks, taps), jnp.int32).reshape(2, cut.blocks * taps)
    return block, tap


def _zeros(spec: Spec, shape: tuple[Size, ...], arrays) -> jax.Array:
    """Zeros to sum products of `arrays` in; within shard_map they vary over the devices that any of these vary over."""
    return functools.reduce(operator.add, [jnp.zeros_like(array, spec.accumulate, shape) for array in arrays])


def _product(spec: Spec, cut: Cut, step, rows, matrices, offset, modulation=None) -> jax.Array:
    """What one tap adds to one block of positions: `(B * size, F)`, or by offset groups as `_multiply` says.

    Where the cut is deep, what all taps add, by feature groups as `_multiply_deep` says.
    """
    (block, tap), window, batch = step, spec.window, rows.shape[:-2]
    images, size, positions, _ = _sizes(spec, cut, rows, matrices)
    first = _pad(regular_positions(window).reshape(positions, window.rank), 0, cut.blocks * size)
    if cut.deep:
        return _multiply_deep(spec, _samples(spec, size, rows, first, offset, modulation, block), matrices)
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


def _read_block(spec: Spec, size: Size, rows, first, offset, modulation, block) -> jax.Array:
    """The samples of a block, of all taps, each group's together: `(G, B, size, K, channels read at one point …)`.

    No axis is 1 long, for XLA's CPU backend would copy the samples.
    """
    window, batch_axes = spec.window, rows.ndim - 2
    taps, groups = window.taps, math.lcm(spec.offset_groups, spec.feature_groups)

    def take(array):  # (*B, P, OG, K * …) -> (*B, size, K, OG, …)
        array = lax.dynamic_slice_in_dim(array, block * int32(size), size, batch_axes, allow_negative_indices=False)
        array = array.reshape(*array.shape[: batch_axes + 1], spec.offset_groups, taps, array.shape[-1] // taps)
        array = jnp.repeat(array, groups // spec.offset_groups, batch_axes + 1)
        return array.swapaxes(batch_axes + 1, batch_axes + 2)

    first = lax.dynamic_slice_in_dim(first, block * int32(size), size, 0, allow_negative_indices=False)
    regular = first[:, None, None] + regular_taps(window).reshape(1, taps, 1, window.rank)  # (size, K, 1, n)
    offset = take(offset).astype(wide(offset.dtype, jnp.finfo(spec.accumulate).dtype))
    points = Positions(lax.expand_dims(regular, range(batch_axes)), offset)
    scale = None if modulation is None else take(modulation)[..., 0]
    channels = spec.offset_groups * rows.shape[-1]
    rows = rows.reshape(*rows.shape[:-2], math.prod(window.spatial) * groups, channels // groups)
    samples = _read(rows, locate(points, scale, Border(window.spatial, window.padding_mode)))  # (B, size, K, groups, …)
    several = spec.feature_groups, groups // spec.feature_groups
    samples = samples.reshape(*samples.shape[:3], *several, channels // groups).astype(spec.dtype)
    samples = samples.transpose(3, 0, 1, 2, 4, 5)
    return jnp.squeeze(samples, [axis for axis, n in zip((0, 4), several, strict=True) if n == 1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _samples(spec: Spec, size: Size, rows, first, offset, modulation, block) -> jax.Array:
    """`_read_block`, as an array of its own in the shape it has."""
    # XLA's CPU backend would join the reshaping for the product to the reading, find for each channel anew to which tap and
    # group it belongs, and take three times as long. It does not reach into a branch; an optimization barrier it drops.
    read = functools.partial(_read_block, spec, size)
    wanted = jax.eval_shape(read, rows, first, offset, modulation, block)

    def zeros(rows, *_):
        return jnp.zeros_like(rows, wanted.dtype, wanted.shape)

    return lax.cond(block >= 0, read, zeros, rows, first, offset, modulation, block)


@_samples.defjvp
def _samples_jvp(spec, size, primals, tangents):
    read = functools.partial(_read_block, spec, size)
    return _samples(spec, size, *primals), jax.jvp(read, primals, tangents)[1]


def _pad(array: jax.Array, axis: int, length: Size) -> jax.Array:
    """`array` with zeros appended along an axis, which is then `length` long."""
    return jnp.pad(array, [(0, length - n if a == axis else 0) for a, n in enumerate(array.shape)])


def _whole_blocks(spec: Spec, cut: Cut, rows, matrices, *per_tap: jax.Array) -> tuple[jax.Array, ...]:
    """`(*B, P, OG, K, …)` -> `(*B, blocks * size, OG, K * …)`; without an axis for a single offset group."""
    _, size, *_ = _sizes(spec, cut, rows, matrices)
    batch_axes = rows.ndim - 2

    def whole(array):
        *front, groups = array.shape[: batch_axes + 2]  # (*B, P), OG
        several = (groups,) if groups > 1 else ()  # an axis of 1 would make XLA's CPU backend copy the array
        array = array.reshape(*front, *several, math.prod(array.shape[batch_axes + 2 :]))
        return _pad(array, batch_axes, cut.blocks * size)

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


def _multiply_deep(spec: Spec, samples: jax.Array, matrices: jax.Array) -> jax.Array:
    """The samples of `_read_block` times the matrices of all taps: `(N, F)`, by several feature groups `(G, N, F / G)`."""
    groups, (taps, channels, features) = spec.feature_groups, matrices.shape
    product: Any = functools.partial(jnp.einsum, precision=spec.precision, preferred_element_type=spec.accumulate)
    depth, batch = taps * channels, samples.shape[1:3] if groups > 1 else samples.shape[:2]
    samples, matrices = samples.reshape(groups, math.prod(batch), depth), matrices.astype(spec.dtype)
    if groups == 1:
        return product("nc,cf->nf", samples[0], matrices.reshape(depth, features))
    return product("gnc,cgf->gnf", samples, matrices.reshape(depth, groups, features // groups))
