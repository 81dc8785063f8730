"""Algorithm of a TPU: one tap of a block of positions after another, from a map whose rows hold two neighbouring pixels.

A TPU fetches row after row, so half as many rows of twice the width take half the time. A point outside the map reads a
row of zeros, because masking what it reads would cost more. With several offset groups, these are an axis before all
others, so that no channels are moved.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax._core.dtypes import wide
from dcn_jax._core.mesh import zeros_varying_like
from dcn_jax.geometry import Size, int32
from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.ops.deform_conv.xla.blocks import (
    Blocks,
    Divided,
    Operands,
    Regular,
    border_of,
    differentiated,
    one_batch_axis,
)
from dcn_jax.sampling import Border, Positions, Rows, neighbours


def result(spec: Spec, blocks: Blocks, operands: Operands) -> jax.Array:
    """The sum over taps: `(B, P, F)`."""
    images, features = math.prod(operands.rows.shape[:-2]), operands.matrices.shape[-1]
    divided, regular = _divide_pairs(spec, blocks, operands), blocks.regular_table(spec)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a derivative of the loop keeps no samples either
    def product(block, tap):
        return _product(spec, blocks, regular, block, tap, blocks.take(spec, block, tap, divided))

    # The taps are a loop of their own: a TPU keeps the sum that it carries on the chip.
    def sum_block(block, _):
        def add_tap(carry, _):
            tap, total = carry
            return (tap + 1, total + product(block, tap)), None

        zeros = zeros_varying_like(divided, spec.accumulate, (images * blocks.size, features))
        (_, total), _ = lax.scan(add_tap, (jnp.int32(0), zeros), length=spec.window.taps)
        return block + 1, total

    _, y = lax.scan(sum_block, jnp.int32(0), length=blocks.number)
    return blocks.join(spec, y.reshape(blocks.number, images, blocks.size, features))


def gradients(
    spec: Spec, blocks: Blocks, active: tuple[str, ...], y_bar: jax.Array, operands: Operands
) -> dict[str, jax.Array]:
    """The gradients of the operands named in `active`: the transpose of `result`, step by step, last step first."""
    divided, undo = jax.vjp(functools.partial(_divide_pairs, spec, blocks), operands)
    regular, y_bar, active = blocks.regular_table(spec), blocks.divide_cotangent(y_bar), differentiated(divided, active)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(carry, _):
        step, sums = carry
        block, tap = blocks.block_and_tap(spec, step)
        matrices = _pair_matrices(operands.matrices, spec.offset_groups)
        part = blocks.take(spec, block, tap, divided._replace(matrices=matrices))
        bar = blocks.take_cotangent(spec, block, y_bar)

        def of_active(given):
            return _product(spec, blocks, regular, block, tap, part._replace(**given))

        (bars,) = jax.vjp(of_active, {name: getattr(part, name) for name in active})[1](bar)
        added = {n: blocks.add_part(spec, block, tap, divided, n, sums[n], bars[n]) for n in active}
        return (step - 1, added), None

    zeros = jax.tree.map(jnp.zeros_like, divided)
    zeros_of_active = {name: getattr(zeros, name) for name in active}
    steps = blocks.number * spec.window.taps
    (_, sums), _ = lax.scan(add, (jnp.int32(steps - 1), zeros_of_active), length=steps)
    return undo(zeros._replace(**sums))[0]._asdict()


def _product(
    spec: Spec, blocks: Blocks, regular: Regular, block: jax.Array, tap: jax.Array, part: Divided
) -> jax.Array:
    """What one tap adds to a block: `(B * size, F)`. The maps and matrices of `part` are in pairs."""
    points, scale = blocks.tap_points(spec, regular, block, tap, part)
    if spec.dtype == jnp.bfloat16:
        # A TPU rounds float32 to bfloat16 in its products anyway. Rounding here would round the gradients too.
        spec = spec._replace(dtype=spec.accumulate, precision=lax.Precision.DEFAULT)
    if spec.offset_groups == 1:
        points = Positions(points.regular[..., 0, :], points.offset[..., 0, :])
        scale = None if scale is None else scale[..., 0]
    at = _locate_pairs(points, scale, spec.offset_groups, border_of(spec))
    # A narrow map is read in its wider copy: XLA's gather unpacks and packs bfloat16 rows, which takes longer.
    rows, _, at = one_batch_axis(part.rows if part.wide_rows is None else part.wide_rows, None, at)
    if spec.offset_groups > 1:  # (B, size, OG) -> (OG, B, size)
        at = jax.tree.map(lambda array: jnp.moveaxis(array, -1, 0), at)
    return _multiply(spec, _sum_pairs(rows, at), _materialized(part.matrices))


def _multiply(spec: Spec, samples: jax.Array, matrix: jax.Array) -> jax.Array:
    """Samples `([OG,] N, 2 Cg)` times a matrix `(OG * 2 Cg, F)`: the product also adds the two pixels of each pair."""
    einsum = functools.partial(jnp.einsum, precision=spec.precision, preferred_element_type=spec.accumulate)
    samples, matrix = samples.astype(spec.dtype), matrix.astype(spec.dtype)
    if spec.offset_groups == 1:
        return einsum("nc,cf->nf", samples, matrix)
    return einsum("gnc,gcf->nf", samples, matrix.reshape(spec.offset_groups, samples.shape[-1], matrix.shape[-1]))


@jax.custom_jvp
def _materialized(matrix: jax.Array) -> jax.Array:
    """`matrix` itself. Without this barrier XLA materialises the weighted samples before the forward product."""
    return lax.optimization_barrier(matrix)


_materialized.defjvp(lambda primals, tangents: (primals[0], tangents[0]))


# Maps and matrices in pairs


def _divide_pairs(spec: Spec, blocks: Blocks, operands: Operands) -> Divided:
    """`divide`, with maps and matrices in pairs."""
    pair_up = functools.partial(_pair_up, border=border_of(spec), groups=spec.offset_groups)
    matrices = _pair_matrices(operands.matrices, spec.offset_groups)
    divided = blocks.divide(spec, operands._replace(matrices=matrices))
    wide_rows = None if divided.wide_rows is None else pair_up(divided.wide_rows)
    return divided._replace(rows=pair_up(divided.rows), wide_rows=wide_rows)


def _pair_matrices(matrices: jax.Array, groups: int) -> jax.Array:
    """Each offset group's part of the taps' matrices twice, once for each pixel: `(K, C, F)` -> `(K, OG * 2 Cg, F)`."""
    return jnp.concatenate([part for part in jnp.split(matrices, groups, axis=1) for _ in range(2)], axis=1)


def _pair_up(rows: jax.Array, border: Border, groups: int) -> jax.Array:
    """Rows `(*B, R, Cg)` -> `(*B, OG * R', 2 Cg)`: each pixel beside the next of its line, offset group after group.

    Each line begins with the pair (zeros, first pixel) and ends with (last pixel, zeros). One more index along the first
    axis holds zeros, which points outside the map read.
    """
    *batch, _, channels = rows.shape
    maps = rows.reshape(*batch, *border.spatial, groups * channels)
    first, last = len(batch), maps.ndim - 2

    def beside(group, before, after):
        pads = [(0, 0)] * maps.ndim
        pads[last] = before, after
        pads[first] = pads[first][0], pads[first][1] + 1
        return jnp.pad(lax.slice_in_dim(maps, group * channels, (group + 1) * channels, axis=-1), pads)

    pairs = [jnp.concatenate([beside(group, 1, 0), beside(group, 0, 1)], axis=-1) for group in range(groups)]
    pairs = jnp.stack(pairs, axis=first)
    return pairs.reshape(*batch, math.prod(pairs.shape[first:-1]), 2 * channels)


def _locate_pairs(points: Positions, scale: jax.Array | None, groups: int, border: Border) -> Rows:
    """`sampling.locate` for maps of pairs: `row` has one entry for each pair that a point reads, `weight` has two.

    Points `(*query, n)`, modulations `(*query,)` -> arrays `(*query,)`. With several offset groups, they are the last axis
    of `query`.
    """
    offset = points.offset.astype(wide(points.offset.dtype))
    axes = [
        neighbours(Positions(points.regular[..., axis], offset[..., axis]), size, mode, "linear")
        for axis, (size, mode) in enumerate(zip(*border, strict=True))
    ]
    *lines, ((before, _, before_read), (_, _, after_read)) = axes
    first, *sizes = _lines(border.spatial)
    outside = first * math.prod(sizes)
    group = lax.broadcasted_iota(jnp.int32, before.shape, before.ndim - 1) * int32(outside + math.prod(sizes))
    rows, weights = [], []
    for corner in itertools.product(*lines):
        row, *pixel = [*(index for index, _, _ in corner), jnp.where(before_read, before + 1, 0)]
        read = functools.reduce(operator.and_, [read for _, _, read in corner], before_read | after_read)
        for size, along in zip(sizes, pixel, strict=True):
            row = row * int32(size) + along
        row = jnp.where(read, row, int32(outside))
        rows.append(row + group if groups > 1 else row)
        for _, weight, _ in axes[-1]:
            share = functools.reduce(operator.mul, [weight for _, weight, _ in corner] + [weight])
            weights.append(share if scale is None else share * scale.astype(share.dtype))
    return Rows(tuple(rows), tuple(weights))


def _lines(spatial: Sequence[Size]) -> tuple[Size, ...]:
    """How many lines of pairs a map has along each axis, and pairs in a line."""
    return (*spatial[:-1], spatial[-1] + 1)


@jax.custom_jvp
def _sum_pairs(pairs: jax.Array, at: Rows) -> jax.Array:
    """Σ weight · pair, each pixel of it by its own weight: `(B, R', 2 C)`, `(…, B, size)` -> `(…, B * size, 2 C)`."""
    return _weigh(_read(pairs, at), at.weight, _spread)


def _sum_pairs_jvp(primals, tangents):
    (pairs, at), (pairs_dot, at_dot) = primals, tangents
    read = _read(pairs, at)
    y = _weigh(read, at.weight, _spread)
    y_dot = jnp.zeros_like(y)
    if not isinstance(at_dot.weight[0], SymbolicZero):
        y_dot = y_dot + _weigh(read, at_dot.weight, _either)
    if not isinstance(pairs_dot, SymbolicZero):
        # All at once: the transpose is one scatter-add.
        read_dot = _rows(pairs_dot, jnp.stack(at.row))  # (rows, …, B, size, 2 C)
        first, second = (jnp.stack(at.weight[i::2]) for i in (0, 1))
        weight = _spread(first, second, read_dot.shape[-1]).reshape(read_dot.shape).astype(y.dtype)
        y_dot = y_dot + jnp.sum(weight * read_dot, axis=0).reshape(y.shape).astype(y.dtype)
    return y, y_dot


_sum_pairs.defjvp(_sum_pairs_jvp, symbolic_zeros=True)


def _read(pairs: jax.Array, at: Rows) -> list[jax.Array]:
    """The pairs at each of the rows: `(…, B * size, 2 C)`."""
    read = [_rows(pairs, row) for row in at.row]
    return [r.reshape(*r.shape[:-3], math.prod(r.shape[-3:-1]), r.shape[-1]) for r in read]


def _weigh(read: Sequence[jax.Array], weight: Sequence[jax.Array], spread: Callable) -> jax.Array:
    pairs = zip(weight[::2], weight[1::2], read, strict=True)
    parts = [spread(first, second, r.shape[-1]).reshape(r.shape).astype(r.dtype) * r for first, second, r in pairs]
    return functools.reduce(operator.add, parts)


def _either(first: jax.Array, second: jax.Array, width: int) -> jax.Array:
    """A weight for each channel of a pair: `(…, B, size)` -> `(…, B * size, width)`."""
    first, second = (w.reshape(*w.shape[:-2], math.prod(w.shape[-2:]), 1) for w in (first, second))
    before = lax.broadcasted_iota(jnp.int32, (*[1] * (first.ndim - 1), width), first.ndim - 1) < width // 2
    return jnp.where(before, first, second)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _spread(first: jax.Array, second: jax.Array, width: int) -> jax.Array:
    """`_either` as `(…, B, size, width)`, by a product with ones: a TPU takes longer to copy a weight into all lanes.

    A float32 is the sum of three bfloat16, so the product is exact.
    """
    if first.dtype != jnp.float32:
        either = _either(first, second, width)
        return either.reshape(*first.shape, width)
    pixel, place = (number.reshape(6, 1, 1) for number in np.divmod(np.arange(6), 3))
    weight = jnp.where(pixel == 0, first[..., None, :, :], second[..., None, :, :])
    high = lax.reduce_precision(weight, 8, 7)  # to bfloat16, where XLA may leave out conversions there and back
    middle = lax.reduce_precision(weight - high, 8, 7)
    part = jnp.where(place == 0, high, jnp.where(place == 1, middle, weight - high - middle))
    ones = pixel[:, :, 0] == np.arange(width) // (width // 2)
    part, ones = part.astype(jnp.bfloat16), jnp.asarray(ones, jnp.bfloat16)
    return jnp.einsum("...kbn,kc->...bnc", part, ones, preferred_element_type=first.dtype)


@_spread.defjvp
def _spread_jvp(width, primals, tangents):
    y = _spread(primals[0], primals[1], width)
    return y, _either(tangents[0], tangents[1], width).reshape(y.shape)


def _rows(pairs: jax.Array, row: jax.Array) -> jax.Array:
    """The rows of each image: `(B, R', 2 C)`, `(…, B, size)` -> `(…, B, size, 2 C)`."""
    batch = row.ndim - 2
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(row.ndim,),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(batch,),
    )
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(pairs, row[..., None], numbers, slice_sizes=(1, 1, pairs.shape[-1]), mode=mode)
