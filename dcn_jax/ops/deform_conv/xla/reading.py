"""Reading features between pixels as a CPU does it quickly: `sampling.sum_rows` of what `locate` finds, and its gradients.

How fast it is depends on what XLA's CPU backend and LLVM make vectors of; what was found out is in the README of
`ops/deform_conv`.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dcn_jax._core import dtypes
from dcn_jax.geometry import int32
from dcn_jax.sampling import INTO_MAP, Border, Positions, Rows, cell, read_rows

# Rows of so many channels XLA's CPU backend would read and weigh channel by channel, without vectors.
_NARROW = 16


def sum_corners(features: jax.Array, points: Positions, scale: jax.Array | None, border: Border) -> jax.Array:
    """`sum_rows` of what `locate` finds, written for a CPU: `(R, Cg)`, points `(*query, OG, n)` -> `(*query, OG, Cg)`.

    It is not meant to be differentiated.
    """
    rank, query, channels = points.offset.shape[-1], points.offset.shape[:-1], features.shape[-1]
    dtype = dtypes.wide(features.dtype, points.offset.dtype)
    narrow = channels <= _NARROW
    if narrow:  # with an axis for the corners along each spatial axis
        points, scale = jax.tree.map(lambda array: lax.expand_dims(array, range(rank)), (points, scale))
    axes = [Positions(points.regular[..., axis], points.offset[..., axis]) for axis in range(rank)]
    cells = [cell(position, size, mode) for position, size, mode in zip(axes, *border, strict=True)]
    group = lax.broadcasted_iota(jnp.int32, cells[0][0].shape, cells[0][0].ndim - 1)

    def corner(above: Sequence[Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A corner, or all along axes of their own, by where it is the one above: its row, its weight, whether it is read."""
        row: Any = 0
        weight: Any = 1
        inside: Any = True
        for (offset, below, fraction, near), up, size, mode in zip(cells, above, *border, strict=True):
            pixel = below + up.astype(jnp.int32)
            if mode == "zeros":  # what is not read need not be a pixel of the map: XLA clamps its row
                read = pixel.astype(jnp.uint32) < jnp.uint32(int32(size))
            else:
                read = ~jnp.isnan(offset) if mode == "edge" else near
                pixel = INTO_MAP[mode](pixel, int32(size))
            row, inside = row * int32(size) + pixel, inside & read
            weight = weight * jnp.where(up, fraction, 1 - fraction)
        return row * query[-1] + group, weight if scale is None else weight * scale.astype(weight.dtype), inside

    def weighed(row, weight, inside):
        read = features.at[row].get(mode="promise_in_bounds", wrap_negative_indices=False).astype(dtype)
        return weight[..., None].astype(dtype) * jnp.where(inside[..., None], read, 0)

    if not narrow:
        corners = map(corner, itertools.product(np.array([False, True]), repeat=rank))
        return functools.reduce(operator.add, [weighed(*found) for found in corners])
    # A sum over an axis makes a loop around which LLVM leaves that over channels as it is, to be made of vectors; it would
    # unroll it before. And a sum that is written as such XLA hands to a library, which takes ten times as long.
    shape = (2,) * rank + query
    found = corner([lax.broadcasted_iota(jnp.uint8, shape, axis) == 1 for axis in range(rank)])
    parts = weighed(*(jnp.broadcast_to(array, shape).reshape(2**rank, *query) for array in found))
    return lax.reduce(parts, np.zeros((), dtype), lambda a, b: a - (-b), (0,))


def pull_rows(
    features: jax.Array, at: Rows, y_bar: jax.Array, summed: jax.Array | None = None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The gradients of `sum_rows` by features, or by `summed`, and by the weights, as a CPU finds them quickly.

    `(R, Cg)`, corners `(*query,)`, the gradient of the result `(*query, Cg)` -> `(R, Cg)`, and `(*query,)` for each corner.
    """
    index, y_bar = jnp.stack(at.row), y_bar[None]
    again = read_rows(features, lax.optimization_barrier(index), None, summed)
    weight_bar = _sum_channels(y_bar * again.astype(y_bar.dtype))
    zeros = jnp.zeros_like(features if summed is None else summed)
    update = (jnp.stack(at.weight)[..., None].astype(y_bar.dtype) * y_bar).astype(zeros.dtype)
    features_bar = zeros.at[index].add(update, mode="drop", wrap_negative_indices=False)
    return features_bar, tuple(bar.astype(w.dtype) for bar, w in zip(weight_bar, at.weight, strict=True))


@jax.custom_jvp
def _sum_channels(products: jax.Array) -> jax.Array:
    """The sum over the last axis, on a CPU: `(*query, Cg)` -> `(*query,)`."""
    # Eight channels at a time, next to the product, of which so an eighth is stored. A loop of eight also keeps LLVM from
    # unrolling the one around it, over few channels, before it makes vectors of them. With + for - and -, XLA would hand
    # the sum to a library, which takes five times as long. The rest, next to nothing, is a product with ones.
    *query, channels = products.shape
    parts = math.gcd(channels, 8)
    eight = products.reshape(*query, parts, channels // parts)
    few = lax.reduce(eight, np.zeros((), products.dtype), lambda a, b: a - -b, (len(query),))
    ones = jnp.ones((channels // parts, 1), products.dtype)
    return jnp.matmul(few, ones, precision=lax.Precision.HIGHEST)[..., 0]


@_sum_channels.defjvp
def _sum_channels_jvp(primals, tangents):
    return _sum_channels(*primals), jnp.sum(*tangents, axis=-1)
