"""A step of the sum on a TPU: one tap of a block, pixels read in pairs, with a row of zeros for what is outside.

A TPU fetches row after row, so half as many of twice the width take half the time; and a mask for
what is outside would cost it more than weighing the rows.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax._numerics import wide
from dcn_jax.geometry import Size, int32
from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.ops.deform_conv.xla_cut import Cut, Operands
from dcn_jax.ops.deform_conv.xla_tap import Regular, multiply, one_batch_axis, points_of
from dcn_jax.sampling import Border, Positions, Rows, neighbours, read_narrow


def product(spec: Spec, cut: Cut, regular: Regular, block: jax.Array, tap: jax.Array, part: Operands) -> jax.Array:
    """What a tap adds to a block, `(B * size, F)`: one offset group after another, so that no channels are moved.

    `part` has maps in pairs, a list of them.
    """
    points, scale = points_of(spec, cut, regular, block, tap, part)
    if spec.dtype == jnp.bfloat16:
        # To which a TPU rounds float32 itself; said here, their gradients would be rounded too.
        spec = spec._replace(dtype=spec.accumulate, precision=lax.Precision.DEFAULT)
    samples = []
    for group, rows in enumerate(part.rows):
        at = locate_pairs(
            Positions(points.regular[..., 0, :], points.offset[..., group, :]),
            None if scale is None else scale[..., group],
            Border(spec.window.spatial, spec.window.padding_mode),
        )
        summed = None if part.summed is None else part.summed[group]
        samples.append(sum_pairs(*one_batch_axis(rows, summed, at)))
    return _add_products(spec, samples, part.matrices)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _add_products(spec: Spec, samples: list[jax.Array], matrix: jax.Array) -> jax.Array:
    """Σ over offset groups and both pixels: samples `(N, 2 Cg)` of each, times `(C, F)`."""
    parts = zip(samples, jnp.split(matrix, spec.offset_groups), strict=True)
    spec = spec._replace(offset_groups=1)
    # The product adds the two pixels of a pair: cutting them apart would cost a TPU more.
    products = [multiply(spec, pair[:, None], jnp.concatenate([part, part])) for pair, part in parts]
    return functools.reduce(operator.add, products)


@_add_products.defjvp
def _add_products_jvp(spec, primals, tangents):
    (samples, matrix), (samples_dot, matrix_dot) = primals, tangents
    # Of the matrix itself and not of its copies: so the gradient is one product, and one sum over devices after the loop.
    added = jnp.concatenate([functools.reduce(operator.add, jnp.split(pair, 2, axis=-1)) for pair in samples], axis=-1)
    product_dot = multiply(spec._replace(offset_groups=1), added[:, None], matrix_dot)
    return _add_products(spec, *primals), _add_products(spec, samples_dot, matrix) + product_dot


def pair_up(rows: jax.Array, border: Border, groups: int) -> list[jax.Array]:
    """A map for each offset group, `(*B, R, Cg)` -> `(*B, R', 2 Cg)`: a pixel, and the one after it along the last axis.

    Beyond the border they are zero: the first pair of a line is the pixel before the map and its first one. The line after
    the last one is zero, and with it what is read for a point outside.
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
    return [p.reshape(*batch, math.prod(p.shape[first:-1]), 2 * channels) for p in pairs]


def locate_pairs(points: Positions, scale: jax.Array | None, border: Border) -> Rows:
    """`sampling.locate` for a map of pairs: one row and two weights for each. `(*query, n)`, `(*query,)` -> `(*query,)`."""
    offset = points.offset.astype(wide(points.offset.dtype))
    axes = [
        neighbours(Positions(points.regular[..., axis], offset[..., axis]), size, mode, "linear")
        for axis, (size, mode) in enumerate(zip(*border, strict=True))
    ]
    *lines, ((before, _, before_read), (_, _, after_read)) = axes
    sizes = _lines(border.spatial)
    rows, weights = [], []
    for corner in itertools.product(*lines):
        pixel = [*(index for index, _, _ in corner), jnp.where(before_read, before + 1, 0)]
        read = functools.reduce(operator.and_, [read for _, _, read in corner], before_read | after_read)
        row = pixel[0]
        for size, along in zip(sizes[1:], pixel[1:], strict=True):
            row = row * int32(size) + along
        rows.append(jnp.where(read, row, int32(math.prod(sizes))))
        for _, weight, _ in axes[-1]:
            share = functools.reduce(operator.mul, [weight for _, weight, _ in corner] + [weight])
            weights.append(share if scale is None else share * scale.astype(share.dtype))
    return Rows(tuple(rows), tuple(weights))


def _lines(spatial: Sequence[Size]) -> tuple[Size, ...]:
    """How many lines of pairs a map has along each axis, and pairs in a line."""
    return (*spatial[:-1], spatial[-1] + 1)


@jax.custom_jvp
def sum_pairs(pairs: jax.Array, summed: jax.Array | None, at: Rows) -> jax.Array:
    """Σ weight · pair, each pixel of it by its own weight: `(B, R', 2 C)`, `(B, size)` -> `(B * size, 2 C)`.

    With `summed`, `pairs` in a wider dtype, the derivative is that with respect to it, and `pairs` has none.
    """
    return _weigh([_fetch(pairs, summed, row) for row in at.row], at.weight)


def _sum_pairs_jvp(primals, tangents):
    (pairs, summed, at), (pairs_dot, summed_dot, at_dot) = primals, tangents
    read = [_fetch(pairs, summed, row) for row in at.row]
    y = _weigh(read, at.weight)
    y_dot = jnp.zeros_like(y)
    summed_dot = pairs_dot if summed is None else summed_dot
    if not isinstance(at_dot.weight[0], SymbolicZero):
        y_dot = y_dot + _weigh(read, at_dot.weight)
    if not isinstance(summed_dot, SymbolicZero):
        # All at once: the transpose is one scatter-add.
        read_dot = _rows(summed_dot, jnp.stack(at.row))  # (rows, B, size, 2 C)
        first, second = (jnp.stack(at.weight[i::2])[..., None] for i in (0, 1))
        dot = jnp.sum(_either(first, second, read_dot).astype(y.dtype) * read_dot, axis=0)
        y_dot = y_dot + dot.reshape(y.shape).astype(y.dtype)
    return y, y_dot


sum_pairs.defjvp(_sum_pairs_jvp, symbolic_zeros=True)


def _weigh(read: Sequence[jax.Array], weight: Sequence[jax.Array]) -> jax.Array:
    # On flat arrays: so it becomes a part of the product that follows.
    weight = [w.reshape(math.prod(w.shape[:2]), *w.shape[2:], 1) for w in weight]
    pairs = zip(weight[::2], weight[1::2], read, strict=True)
    parts = [_either(first, second, r).astype(r.dtype) * r for first, second, r in pairs]
    return functools.reduce(operator.add, parts)


def _either(first: jax.Array, second: jax.Array, pairs: jax.Array) -> jax.Array:
    """A weight for each channel of `pairs` `(…, 2 Cg)`."""
    width = pairs.shape[-1]
    before = lax.broadcasted_iota(jnp.int32, (1,) * (pairs.ndim - 1) + (width,), pairs.ndim - 1) < width // 2
    return jnp.where(before, first, second)


def _fetch(pairs: jax.Array, summed: jax.Array | None, row: jax.Array) -> jax.Array:
    """Rows `(B, size)` of `pairs`, in the dtype of `summed` and with its derivative where it is given: `(B * size, 2 C)`."""
    read = _rows(pairs, row) if summed is None else read_narrow(_rows, pairs, summed, row)
    return read.reshape(math.prod(row.shape[:2]), *read.shape[2:])


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
