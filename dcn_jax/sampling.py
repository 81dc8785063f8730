"""Reading features between pixels: the bilinear gather at the heart of deformable convolution.

Nothing else in the library interpolates. In n dimensions a point lies in a cell of 2^n pixels, its corners; what it
reads is their mean, weighted along each axis by how near the point is.
"""

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax import _check, _numerics


def linear_sample(features: jax.Array, points: jax.Array) -> jax.Array:
    """Read a map at fractional positions by n-linear interpolation, pixels outside the map counting as zero.

        out(p) = Σ_q  Π_a max(0, 1 - |p_a - q_a|) · features(q)        over the pixels q of the map

    Pixel centres are at whole numbers, so a point in [0, size - 1] is inside and one beyond (-1, size) reads zero,
    ±inf and 1e30 included. A NaN coordinate reads NaN. Differentiable in both arguments to any order; where a
    coordinate is a whole number, the derivative with respect to it is the right-hand one. Takes `jax.vmap`.

    Args:
        features: `(*spatial, C)`, of n spatial axes; floating-point or complex.
        points: `(*query, n)`, in pixels, in the order of the spatial axes; any float dtype. Weights are computed in
            float32 or wider.

    Returns:
        `(*query, C)`, in the dtype of `features`.

    Raises:
        ValueError: the shapes of `features` and `points` do not fit each other, or the map has no pixels.
        TypeError: an argument is not an array of such a dtype.

    Source: Dai et al., Deformable Convolutional Networks (arXiv 1703.06211), equations 3 and 4.

    Example:
        >>> import jax.numpy as jnp
        >>> ramp = jnp.arange(5.0)[:, None]  # a map of 5 pixels, 1 channel
        >>> linear_sample(ramp, jnp.array([[1.25], [-0.5], [4.5], [9.0]]))[:, 0]
        Array([1.25, 0.  , 2.  , 0.  ], dtype=float32)
    """
    features = _check.array("features", features, jnp.inexact)
    points = _check.array("points", points, jnp.floating)
    if features.ndim < 2 or 0 in features.shape[:-1]:
        raise ValueError(f"features has shape {features.shape}; wanted (*spatial, C) with at least one pixel")
    if points.ndim < 1 or points.shape[-1] != features.ndim - 1:
        raise ValueError(
            f"points has shape {points.shape}; wanted (*query, {features.ndim - 1}): one coordinate for each spatial axis "
            f"of features, whose shape is {features.shape}"
        )
    dtype = features.dtype
    points = points.astype(_numerics.wide(points.dtype, jnp.finfo(dtype).dtype))
    features = features.astype(_numerics.wide(dtype))  # the gradient is summed in the dtype that is gathered from
    *spatial, channels = features.shape
    at = locate(points[..., None, :], jnp.ones((*points.shape[:-1], 1), points.dtype), spatial)
    return sum_rows(features.reshape(math.prod(spatial), channels), at)[..., 0, :].astype(dtype)


class Rows(NamedTuple):
    """What points read of a map that is flattened to rows: one array for each of the 2^n corners of their cells."""

    index: tuple[jax.Array, ...]  # the one after the last where the corner is outside the map
    weight: tuple[jax.Array, ...]


def locate(points: jax.Array, scale: jax.Array, spatial: Sequence[int]) -> Rows:
    """The rows that points read of a map `(*spatial, OG, Cg)`, flattened to rows of Cg channels.

    points `(*query, OG, n)`, scale of each point's weights `(*query, OG)` -> arrays `(*query, OG)`.
    """
    groups = points.shape[-2]
    rows = math.prod(spatial) * groups
    if rows >= 2**31:
        raise ValueError(
            f"a map of {tuple(spatial)} pixels in {groups} groups has {rows} rows; wanted fewer than 2**31"
        )
    group = lax.broadcasted_iota(jnp.int32, points.shape[:-1], points.ndim - 2)
    points = points.astype(_numerics.wide(points.dtype))
    indices, weights = [], []
    for pixel, share, inside in corners([points[..., axis] for axis in range(len(spatial))], spatial):
        index = functools.reduce(lambda index, axis: index * axis[0] + axis[1], zip(spatial, pixel, strict=True), 0)
        indices.append(jnp.where(inside, index * groups + group, rows))
        weights.append(share * scale.astype(share.dtype))
    return Rows(tuple(indices), tuple(weights))


@jax.custom_jvp
def sum_rows(features: jax.Array, at: Rows) -> jax.Array:
    """Σ over corners of weight · (row of features, or zero outside): `(R, Cg)`, corners `(*query,)` -> `(*query, Cg)`."""
    features = features.astype(_numerics.wide(features.dtype, at.weight[0].dtype))
    read = [w[..., None].astype(features.dtype) * _take(features, i) for i, w in zip(*at, strict=True)]
    return functools.reduce(operator.add, read)


def _sum_rows_jvp(primals, tangents):
    """The derivative JAX would find, written so that its transpose is quick: no rows are kept, and one scatter adds all."""
    (features, at), (features_dot, at_dot) = primals, tangents
    y = sum_rows(features, at)
    index = jnp.stack(at.index)
    # Behind the barrier, or XLA would keep the rows that y has read to save reading them again, which costs more.
    again = zip(lax.optimization_barrier(index), at_dot.weight, strict=True)
    read = [_spread(w, features) * _take(features, i) for i, w in again if not isinstance(w, SymbolicZero)]
    y_dot = functools.reduce(operator.add, read, jnp.zeros_like(y))
    if not isinstance(features_dot, SymbolicZero):
        # All corners at once: the transpose is one scatter-add, where one a corner would each fill a map with zeros. And it
        # drops what is outside, where `_take` would have all points beyond a border add zeros to the same pixel.
        read = features_dot.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        y_dot = y_dot + jnp.sum(jnp.stack(at.weight)[..., None].astype(features.dtype) * read, axis=0)
    return y, y_dot


sum_rows.defjvp(_sum_rows_jvp, symbolic_zeros=True)


def _take(features: jax.Array, index: jax.Array) -> jax.Array:
    """The rows of `features` `(R, Cg)`, zero and without a gradient for the row R, the outside: `(*query, Cg)`."""
    # Not by a gather that fills: of 32 channels, its checks took a CPU as long as the rest of the reading.
    last = len(features) - 1
    read = features.at[jnp.minimum(index, last)].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return jnp.where((index <= last)[..., None], read, 0)


def _spread(weight: jax.Array, features: jax.Array) -> jax.Array:
    """`weight` `(*query,)` repeated for every channel of `features`: `(*query, Cg)`."""
    # By a product with ones, whose transpose is one too: XLA's CPU backend multiplies matrices ten times faster than it
    # sums over the last axis, as the transpose of a broadcast would.
    ones = jnp.ones((1, features.shape[-1]), weight.dtype)
    return jnp.matmul(weight[..., None], ones, precision=lax.Precision.HIGHEST).astype(features.dtype)


def corners(
    position: Sequence[jax.Array], spatial: Sequence[int]
) -> Iterator[tuple[tuple[jax.Array, ...], jax.Array, jax.Array]]:
    """The pixels around points: for each corner of their cells (its index along each axis, its weight, whether it is in the map).

    `position` holds one array for each spatial axis. Elementwise, so that it also serves inside a kernel.
    """
    axes = [_neighbours(p, size) for p, size in zip(position, spatial, strict=True)]
    for corner in itertools.product(*axes):
        pixel, weights, insides = zip(*corner, strict=True)
        yield pixel, functools.reduce(operator.mul, weights), functools.reduce(operator.and_, insides)


def _neighbours(position: jax.Array, size: int):
    """The two pixels beside `position` on an axis, each (index clamped to the map, weight, whether it is in the map)."""
    # Clamped before floor, where inf - floor(inf) would be NaN, and outside [-1, size], where the reading is constantly
    # zero: so the derivative at -1, where every fresh layer with padding 1 reads, is the right-hand one. By comparisons
    # and not jnp.clip, because the minimum and maximum of a GPU drop a NaN.
    position = jnp.where(position < -2, -2, position)
    position = jnp.where(position > size + 1, size + 1, position)
    below = jnp.floor(position)
    fraction = position - below
    below = jnp.where(jnp.isnan(position), -2, below).astype(jnp.int32)  # NaN has a NaN weight and lies outside the map
    return [
        (jnp.clip(index, 0, size - 1), weight, (index >= 0) & (index < size))
        for index, weight in ((below, 1 - fraction), (below + 1, fraction))
    ]
