"""Algorithm of a CPU: all taps of a block of output positions are read, then multiplied with the whole kernel at once.

    y[block] = samples (B * size, K * C) · matrices (K * C, F)

The sum over taps is inside the product, which is deep and quick. How fast the reading is depends on which loops XLA's
CPU backend and LLVM turn into vector instructions: JOURNAL.md of the op says what was found, and
tests/ops/deform_conv/xla/test_cpu_program.py notices when it changes.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dcn_jax._core.dtypes import wide
from dcn_jax.geometry import int32, regular_taps
from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.ops.deform_conv.xla.blocks import (
    Blocks,
    Divided,
    Operands,
    border_of,
    differentiated,
    one_batch_axis,
    read_images,
)
from dcn_jax.sampling import INTO_MAP, Border, Positions, Rows, cell, locate, read_rows


def result(spec: Spec, blocks: Blocks, operands: Operands) -> jax.Array:
    """The sum over taps, one block after another: `(B, P, F)`."""
    groups, images, features = spec.feature_groups, math.prod(operands.rows.shape[:-2]), operands.matrices.shape[-1]
    divided, first = blocks.divide(spec, operands), blocks.first_taps(spec)

    @partial(jax.checkpoint, prevent_cse=False)  # a derivative of the loop keeps no samples either
    def product(block, _):
        part = blocks.take(spec, block, None, divided)
        samples = _samples(spec, blocks, first, part._replace(matrices=None), block)
        return block + 1, _multiply(spec, samples, part.matrices)

    _, y = lax.scan(product, jnp.int32(0), length=blocks.number)
    y = y.reshape(blocks.number, groups, images, blocks.size, features // groups).transpose(2, 0, 3, 1, 4)
    y = y.reshape(images, blocks.number * blocks.size, features)
    return y[:, : math.prod(spec.window.out_spatial)].astype(spec.out_dtype)


def gradients(
    spec: Spec, blocks: Blocks, active: tuple[str, ...], y_bar: jax.Array, operands: Operands
) -> dict[str, jax.Array]:
    """The gradients of the operands named in `active`: the transpose of `result`, last block first."""
    groups, features = spec.feature_groups, operands.matrices.shape[-1]
    divided, undo = jax.vjp(partial(blocks.divide, spec), operands)
    first, y_bar, active = blocks.first_taps(spec), blocks.divide_cotangent(y_bar), differentiated(divided, active)

    @partial(jax.checkpoint, prevent_cse=False)
    def add(carry, _):
        block, sums = carry
        part = blocks.take(spec, block, None, divided._replace(matrices=operands.matrices))
        bar = blocks.take_cotangent(spec, block, y_bar)
        bar = bar.reshape(bar.shape[0], groups, features // groups).swapaxes(
            0, 1
        )  # (B * size, F) -> (G, B * size, F / G)
        bars = _pull_block(spec, blocks, first, block, part, active, bar)
        added = {n: blocks.add_part(spec, block, None, divided, n, sums[n], bars[n]) for n in active}
        return (block - 1, added), None

    zeros = jax.tree.map(jnp.zeros_like, divided)
    zeros_of_active = {name: getattr(zeros, name) for name in active}
    (_, sums), _ = lax.scan(add, (jnp.int32(blocks.number - 1), zeros_of_active), length=blocks.number)
    return undo(zeros._replace(**sums))[0]._asdict()


def _pull_block(
    spec: Spec, blocks: Blocks, first: jax.Array, block, part: Divided, active: tuple[str, ...], bar: jax.Array
) -> dict[str, jax.Array]:
    """The gradients of what a block reads, at `bar`, the gradient of its product."""

    def located(given):
        rows, wide_rows, points, scale = _locate_block(spec, blocks, first, part._replace(**given), block)
        rows, wide_rows, at = one_batch_axis(rows, wide_rows, locate(points, scale, border_of(spec)))
        return (rows, wide_rows, at.weight), at.row

    given = {name: getattr(part, name) for name in active if name != "matrices"}
    (rows, wide_rows, weight), undo, row = jax.vjp(located, given, has_aux=True)
    at = Rows(row, weight)
    samples = _samples(spec, blocks, first, part._replace(matrices=None), block)
    _, pull_product = jax.vjp(partial(_multiply, spec), samples, part.matrices)
    samples_bar, matrices_bar = pull_product(bar)
    read = jax.eval_shape(read_images, rows, wide_rows, at)
    (read_bar,) = jax.linear_transpose(partial(_arrange, spec), read)(samples_bar)
    read_bar = blocks.hide_filler(spec, block, read_bar)
    features_bar, weight_bar = jax.vmap(pull_rows)(rows, at, read_bar, wide_rows)
    both = (features_bar, None) if wide_rows is None else (jnp.zeros_like(rows), features_bar)
    (bars,) = undo((*both, weight_bar))
    return bars | {"matrices": matrices_bar} if "matrices" in active else bars


def _multiply(spec: Spec, samples: jax.Array, matrices: jax.Array) -> jax.Array:
    """Samples `([G,] B, size, K, …)` times matrices `(K, C / G, F)`: `(G, B * size, F / G)`."""
    groups, (taps, channels, features) = spec.feature_groups, matrices.shape
    depth, (images, size, *_) = taps * channels, samples.shape[1 if groups > 1 else 0 :]
    samples, matrices = samples.reshape(groups, images * size, depth), matrices.astype(spec.dtype)
    einsum: Any = partial(jnp.einsum, precision=spec.precision, preferred_element_type=spec.accumulate)
    if groups == 1:
        return einsum("nc,cf->nf", samples[0], matrices.reshape(depth, features))[None]
    return einsum("gnc,cgf->gnf", samples, matrices.reshape(depth, groups, features // groups))


# Samples of a block


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _samples(spec: Spec, blocks: Blocks, first: jax.Array, part: Divided, block: jax.Array) -> jax.Array:
    """`_read_block`, materialised, so that XLA cannot fuse the product's reshape into the gather."""
    # Fused, the gather would compute the tap and the group of every channel anew, in three times the time. XLA's CPU backend
    # does not fuse into a conditional, even one that is always true. It drops optimization barriers before it fuses.
    read = partial(_read_block_quickly, spec, blocks)
    wanted = jax.eval_shape(read, first, part, block)

    def zeros(first, part, block):
        return jnp.zeros_like(part.rows, wanted.dtype, wanted.shape)

    return lax.cond(block >= 0, read, zeros, first, part, block)


@_samples.defjvp
def _samples_jvp(spec, blocks, primals, tangents):
    return _samples(spec, blocks, *primals), jax.jvp(partial(_read_block, spec, blocks), primals, tangents)[1]


def _read_block(spec: Spec, blocks: Blocks, first: jax.Array, part: Divided, block: jax.Array) -> jax.Array:
    """The samples of a block, of all taps, as `_arrange` arranges them."""
    rows, wide_rows, points, scale = _locate_block(spec, blocks, first, part, block)
    samples = read_images(rows, wide_rows, locate(points, scale, border_of(spec)))
    return _arrange(spec, blocks.hide_filler(spec, block, samples))


def _read_block_quickly(spec: Spec, blocks: Blocks, first: jax.Array, part: Divided, block: jax.Array) -> jax.Array:
    """`_read_block`, where no derivative is wanted."""
    rows, wide_rows, points, scale = _locate_block(spec, blocks, first, part, block)
    rows, _, (points, scale) = one_batch_axis(rows, None, (points, scale))
    samples = jax.vmap(partial(sum_corners, border=border_of(spec)))(rows, points, scale)
    samples = blocks.hide_filler(spec, block, samples)
    return _arrange(spec, samples if wide_rows is None else samples.astype(wide_rows.dtype))


def _locate_block(
    spec: Spec, blocks: Blocks, first: jax.Array, part: Divided, block: jax.Array
) -> tuple[jax.Array, jax.Array | None, Positions, jax.Array | None]:
    """The maps by groups, `(*B, R, C / groups)`, where a block reads them, `(*B, size, K, groups, n)`, and its modulations.

    The groups are the fewest that both the offset groups and the feature groups are made of.
    """
    window, batch_axes = spec.window, part.rows.ndim - 2
    taps, groups = window.taps, math.lcm(spec.offset_groups, spec.feature_groups)

    def by_tap(array):  # (*B, size, [OG,] K * …) -> (*B, size, K, groups, …)
        array = array.reshape(*array.shape[: batch_axes + 1], spec.offset_groups, taps, array.shape[-1] // taps)
        array = jnp.repeat(array, groups // spec.offset_groups, batch_axes + 1)
        return array.swapaxes(batch_axes + 1, batch_axes + 2)

    def by_group(rows):  # (*B, H * W * OG, Cg) -> (*B, H * W * groups, C / groups)
        width = spec.offset_groups * rows.shape[-1] // groups
        return rows.reshape(*rows.shape[:-2], math.prod(window.spatial) * groups, width)

    first = blocks.take_positions(first, block)
    whole = first[:, None, None] + regular_taps(window).reshape(1, taps, 1, window.rank)  # (size, K, 1, n)
    points = Positions(lax.expand_dims(whole, range(batch_axes)), by_tap(part.offset))
    scale = None if part.modulation is None else by_tap(part.modulation)[..., 0]
    return by_group(part.rows), None if part.wide_rows is None else by_group(part.wide_rows), points, scale


def _arrange(spec: Spec, samples: jax.Array) -> jax.Array:
    """Samples `(B, size, K, groups, …)` as the product reads them: `([G,] B, size, K, [groups / G,] …)`.

    An axis of size 1 is left out: XLA's CPU backend would copy the samples for it.
    """
    several = spec.feature_groups, samples.shape[3] // spec.feature_groups
    samples = samples.reshape(*samples.shape[:3], *several, samples.shape[-1]).astype(spec.dtype)
    samples = samples.transpose(3, 0, 1, 2, 4, 5)
    return jnp.squeeze(samples, [axis for axis, n in zip((0, 4), several, strict=True) if n == 1])


# A CPU's own spelling of the reading that `sampling` defines, and of its gradients

# Up to so many channels, XLA's CPU backend reads and weighs a row channel by channel, without vector instructions.
_FEW_CHANNELS = 16


def sum_corners(features: jax.Array, points: Positions, scale: jax.Array | None, border: Border) -> jax.Array:
    """`sum_rows(features, locate(points, scale, border))`, quicker: `(R, Cg)`, `(*query, OG, n)` -> `(*query, OG, Cg)`.

    It is not meant to be differentiated.
    """
    rank, query, channels = points.offset.shape[-1], points.offset.shape[:-1], features.shape[-1]
    dtype = wide(features.dtype, points.offset.dtype)
    few_channels = channels <= _FEW_CHANNELS
    if few_channels:  # one new axis for each spatial axis, along which the lower and the upper corner will lie
        points, scale = jax.tree.map(lambda array: lax.expand_dims(array, range(rank)), (points, scale))
    axes = [Positions(points.regular[..., axis], points.offset[..., axis]) for axis in range(rank)]
    cells = [cell(position, size, mode) for position, size, mode in zip(axes, *border, strict=True)]
    group = lax.broadcasted_iota(jnp.int32, cells[0][0].shape, cells[0][0].ndim - 1)

    def corner(above: Sequence[Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The row of a corner, its weight, and whether it is read.

        `above[a]`: whether the corner is the upper neighbour along axis a; arrays that broadcast make several corners.
        """
        row: Any = 0
        weight: Any = 1
        is_read: Any = True
        for (offset, below, fraction, near), up, size, mode in zip(cells, above, *border, strict=True):
            pixel = below + up.astype(jnp.int32)
            if mode == "zeros":  # a corner that is not read may have any row: XLA clamps the gather's indices
                reads = pixel.astype(jnp.uint32) < jnp.uint32(int32(size))
            else:
                reads = ~jnp.isnan(offset) if mode == "edge" else near
                pixel = INTO_MAP[mode](pixel, int32(size))
            row, is_read = row * int32(size) + pixel, is_read & reads
            weight = weight * jnp.where(up, fraction, 1 - fraction)
        return row * query[-1] + group, weight if scale is None else weight * scale.astype(weight.dtype), is_read

    def weighed(row, weight, is_read):
        read = features.at[row].get(mode="promise_in_bounds", wrap_negative_indices=False).astype(dtype)
        return weight[..., None].astype(dtype) * jnp.where(is_read[..., None], read, 0)

    if not few_channels:
        corners = map(corner, itertools.product(np.array([False, True]), repeat=rank))
        return functools.reduce(operator.add, [weighed(*found) for found in corners])
    # Add the corners along an axis, not as four terms: LLVM would unroll the channel loop of four terms and not vectorise it.
    # Write a − (−b): XLA hands a reduction with + to a library, which is ten times as slow.
    shape = (2,) * rank + query
    found = corner([lax.broadcasted_iota(jnp.int32, shape, axis) == 1 for axis in range(rank)])
    parts = weighed(*(jnp.broadcast_to(array, shape).reshape(2**rank, *query) for array in found))
    return lax.reduce(parts, np.zeros((), dtype), lambda a, b: a - (-b), (0,))


def pull_rows(
    features: jax.Array, at: Rows, y_bar: jax.Array, summed: jax.Array | None = None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The gradients of `sum_rows(features, at)`, quicker: that of `summed` if it is given, else of `features`; of the weights.

    `(R, Cg)`, corners `(*query,)`, the gradient of the result `(*query, Cg)` -> `(R, Cg)`, and `(*query,)` for each corner.
    """
    index, y_bar = jnp.stack(at.row), y_bar[None]
    again = read_rows(features, lax.optimization_barrier(index), summed)
    weight_bar = _sum_channels(y_bar * again.astype(y_bar.dtype))
    zeros = jnp.zeros_like(features if summed is None else summed)
    update = (jnp.stack(at.weight)[..., None].astype(y_bar.dtype) * y_bar).astype(zeros.dtype)
    features_bar = zeros.at[index].add(update, mode="drop", wrap_negative_indices=False)
    return features_bar, tuple(bar.astype(w.dtype) for bar, w in zip(weight_bar, at.weight, strict=True))


@jax.custom_jvp
def _sum_channels(products: jax.Array) -> jax.Array:
    """The sum over the last axis, on a CPU: `(*query, Cg)` -> `(*query,)`."""
    # Add eight channels, C / 8 apart, into one. This is fused with the product, so only an eighth of it is stored, and the
    # loop of eight keeps LLVM from unrolling the loop around it before it makes vectors. Spelt with +, XLA would hand the sum
    # to a library, which takes five times as long. A product with ones adds the rest.
    *query, channels = products.shape
    parts = math.gcd(channels, 8)
    eight = products.reshape(*query, parts, channels // parts)
    few = lax.reduce(eight, np.zeros((), products.dtype), lambda a, b: a - -b, (len(query),))
    ones = jnp.ones((channels // parts, 1), products.dtype)
    return jnp.matmul(few, ones, precision=lax.Precision.HIGHEST)[..., 0]


@_sum_channels.defjvp
def _sum_channels_jvp(primals, tangents):
    return _sum_channels(*primals), jnp.sum(*tangents, axis=-1)
