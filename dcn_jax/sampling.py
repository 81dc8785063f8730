"""Reading features between pixels: the bilinear gather at the heart of deformable convolution.

Nothing else in the library interpolates. In n dimensions a point lies in a cell of 2^n pixels, its corners; what it
reads is their mean, weighted along each axis by how near the point is.
"""

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from dcn_jax import _check


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
    points = points.astype(_check.wide(points.dtype, jnp.finfo(dtype).dtype))
    features = features.astype(_check.wide(dtype))  # the gradient is summed in the dtype that is gathered from
    return sample_groups(features[..., None, :], points[..., None, :])[..., 0, :].astype(dtype)


def sample_groups(features: jax.Array, points: jax.Array) -> jax.Array:
    """`linear_sample` for channels in groups that each read at points of their own.

    features `(*spatial, OG, Cg)`, points `(*query, OG, n)` -> `(*query, OG, Cg)`, in float32 or the wider dtype of both.
    """
    points = points.astype(_check.wide(points.dtype))
    group = jnp.arange(features.shape[-2])
    total = jnp.zeros((), _check.wide(features.dtype, points.dtype))
    spatial = features.shape[:-2]
    for pixel, weight, inside in corners([points[..., axis] for axis in range(len(spatial))], spatial):
        # Every index is in bounds by construction, so the gather (and its transpose, a scatter-add) needs no check.
        read = features.at[(*pixel, group)].get(mode="promise_in_bounds")  # (*query, OG, Cg)
        # The pixel itself is zeroed, not its weight: what lies at the border it was clamped to (an inf, say) is not
        # read, gets no gradient, and a NaN weight still makes NaN.
        read = jnp.where(inside[..., None], read, 0).astype(_check.wide(read.dtype, weight.dtype))
        total = total + weight[..., None].astype(read.dtype) * read
    return total


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
