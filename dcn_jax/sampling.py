"""Reading features between pixels: the bilinear gather at the heart of deformable convolution.

A point in n dimensions lies in a cell of 2^n pixels, its corners. It reads their mean, weighted
along each axis by how near the point is to each. By "nearest" and "floor" it reads one pixel, by
"cubic" 4^n.

This file defines what a point reads. Algorithms and kernels that compute the same in a quicker way
say so, and are tested against it.
"""

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax._core import checks, dtypes
from dcn_jax._core.mesh import on_any_mesh
from dcn_jax.geometry import Size, canonical_padding_mode, int32


def linear_sample(features: jax.Array, points: jax.Array, *, padding_mode: str | Sequence[str] = "zeros") -> jax.Array:
    """Read a map at fractional positions by n-linear interpolation.

        out(p) = Σ_q  Π_a max(0, 1 - |p_a - q_a|) · features(q)

    over all pixels q of the map, which `padding_mode` continues beyond its border. Pixel centres
    are at whole numbers, so a point in [0, size - 1] is inside. A NaN coordinate reads NaN.
    Differentiable in both arguments to any order; where a coordinate is a whole number, the
    derivative with respect to it is the right-hand one. Takes `jax.vmap`.

    | padding_mode | the map beyond its border | at ±inf and beyond 2**30 |
    |---|---|---|
    | "zeros" | zero; a point beyond (-1, size) reads zero | zero |
    | "edge" | its border pixels, on and on (torch's "border") | the border |
    | "wrap" | periodic: pixel size is pixel 0 | zero |
    | "reflect" | mirrored about the outermost pixel centres, period 2 size - 2 | zero |
    | "symmetric" | mirrored about the map's edges at -0.5 and size - 0.5, period 2 size | zero |

    The larger a coordinate, the coarser its fraction: in float32 it is exact to 2**-14 pixel below
    1,024, and to 1/16 pixel at a million. For large maps use float64. `deform_conv` needs no such
    care: it keeps the whole position and the offset from it apart.

    Args:
        features: `(*spatial, C)`, of n spatial axes; floating-point or complex.
        points: `(*query, n)`, in pixels, in the order of the spatial axes; any float dtype.
            Weights are computed in float32 or wider.
        padding_mode: a name of the table; one for all axes, or one per axis.

    Returns:
        `(*query, C)`, in the dtype of `features`.

    Raises:
        ValueError: the shapes of `features` and `points` do not fit each other, the map has no
            pixels, or `padding_mode` is not known.
        TypeError: an argument is not an array of such a dtype.

    Source: Dai et al., Deformable Convolutional Networks (arXiv 1703.06211), equations 3 and 4.

    Example:
        >>> import jax.numpy as jnp
        >>> ramp = jnp.arange(5.0)[:, None]  # a map of 5 pixels, 1 channel
        >>> points = jnp.array([[1.25], [-0.5], [4.5], [9.0]])
        >>> linear_sample(ramp, points)[:, 0]
        Array([1.25, 0.  , 2.  , 0.  ], dtype=float32)
        >>> linear_sample(ramp, points, padding_mode="wrap")[:, 0]
        Array([1.25, 2.  , 2.  , 4.  ], dtype=float32)
    """
    features = checks.array("features", features, jnp.inexact)
    points = checks.array("points", points, jnp.floating)
    if features.ndim < 2 or 0 in features.shape[:-1]:
        raise ValueError(f"features has shape {features.shape}; wanted (*spatial, C) with at least one pixel")
    if points.ndim < 1 or points.shape[-1] != features.ndim - 1:
        raise ValueError(
            f"points has shape {points.shape}; wanted (*query, {features.ndim - 1}): one coordinate for each spatial "
            f"axis of features, whose shape is {features.shape}"
        )
    spatial = features.shape[:-1]
    border, arrays = Border(spatial, canonical_padding_mode(padding_mode, len(spatial))), (features, points)
    return on_any_mesh(_sample, border, arrays, batched=(points,), batch=points.ndim - 1, whole=1)(*arrays)


def _sample(border: "Border", features: jax.Array, points: jax.Array) -> jax.Array:
    """`linear_sample` of checked arguments."""
    dtype, channels = features.dtype, features.shape[-1]
    points = points.astype(dtypes.wide(points.dtype, jnp.finfo(dtype).dtype))
    features = features.astype(dtypes.wide(dtype))  # a gather's transpose adds up the gradient in the gather's dtype
    at = locate(Positions(jnp.int32(0), points[..., None, :]), None, border)
    return sum_rows(features.reshape(math.prod(border.spatial), channels), at)[..., 0, :].astype(dtype)


class Border(NamedTuple):
    """A map's size along each axis, and the padding mode there."""

    spatial: tuple[Size, ...]
    padding_mode: tuple[str, ...]


# How many pixels a point reads along each axis. "linear": the corners of its cell. "nearest": the
# nearest pixel, at a tie the even one. "floor": the pixel at or below the point. "cubic": the two
# pixels below and the two above.
METHODS = {"linear": 2, "nearest": 1, "floor": 1, "cubic": 4}


class Positions(NamedTuple):
    """Positions, each as a whole number and an offset, so that a large position does not round the offset."""

    regular: jax.Array  # int32
    offset: jax.Array  # any float dtype; the two broadcast


class Rows(NamedTuple):
    """Which rows of a flattened map points read, and their weights: one array for each corner."""

    row: tuple[jax.Array, ...]  # the index of a row; the index after the last one where the corner is not read
    weight: tuple[jax.Array, ...]


def countable(rows: Size) -> bool:
    """Whether int32 can hold the number of rows. A symbolic number is taken to be small enough."""
    return not isinstance(rows, int) or rows < 2**31


def locate(
    points: Positions, scale: jax.Array | None, border: Border, method: str | tuple[str, ...] = "linear"
) -> Rows:
    """The rows that points read of a map `(*spatial, OG, Cg)`, flattened to rows of Cg channels.

    Points `(*query, OG, n)` -> arrays `(*query, OG)`. `scale`, `(*query, OG)`, multiplies the
    weights, if it is given. `method` is one for all axes, or one per axis.
    """
    regular, offset = points.regular, points.offset.astype(dtypes.wide(points.offset.dtype))
    groups = offset.shape[-2]
    group = lax.broadcasted_iota(jnp.int32, offset.shape[:-1], offset.ndim - 2) if groups > 1 else None
    axes = [
        Positions(regular if regular.ndim == 0 else regular[..., axis], offset[..., axis])
        for axis in range(offset.shape[-1])
    ]
    return locate_along(axes, group, groups, scale, border, method)


def locate_along(
    axes: Sequence[Positions],
    group: jax.Array | None,
    groups: int,
    scale: jax.Array | None,
    border: Border,
    method: str | tuple[str, ...] = "linear",
) -> Rows:
    """`locate` of positions along each axis, and each one's offset group. Shapes broadcast."""
    rows = math.prod(border.spatial) * groups
    if not countable(rows):
        raise ValueError(
            f"a map of {border.spatial} pixels in {groups} groups has {rows} rows; wanted fewer than 2**31"
        )
    indices, weights = [], []
    for pixel, share, read in corners(axes, border, method):
        index = pixel[0]
        for size, along in zip(border.spatial[1:], pixel[1:], strict=True):
            index = index * int32(size) + along
        if group is not None:
            index = index * groups + group
        indices.append(_select(read, index, int32(rows)))
        weights.append(share if scale is None else share * scale.astype(share.dtype))
    return Rows(tuple(indices), tuple(weights))


@jax.custom_jvp
def sum_rows(features: jax.Array, at: Rows, summed: jax.Array | None = None) -> jax.Array:
    """Σ over corners of weight · (row of features `(R, Cg)`, or zero outside): `(*query, Cg)`.

    `summed` is `features` in a wider dtype. If it is given, gradients flow to `summed` and not to
    `features`.
    """
    dtype = dtypes.wide(features.dtype, at.weight[0].dtype)
    read = [w[..., None].astype(dtype) * read_rows(features, i, summed).astype(dtype) for i, w in zip(*at, strict=True)]
    return functools.reduce(operator.add, read)


def _sum_rows_jvp(primals, tangents):
    """JAX's derivative, written so that its transpose is one scatter and no rows are kept."""
    (features, at, summed), (features_dot, at_dot, summed_dot) = primals, tangents
    y = sum_rows(features, at, summed)
    index = jnp.stack(at.row)
    moving = [i for i, w in enumerate(at_dot.weight) if not isinstance(w, SymbolicZero)]
    y_dot = jnp.zeros_like(y)
    if moving:
        # Without this barrier XLA keeps the rows that y has gathered, which costs more than to
        # gather them again. One product for all corners: XLA's CPU backend compiles each product.
        moved = index if len(moving) == len(at.row) else jnp.stack([at.row[i] for i in moving])
        again = lax.optimization_barrier(moved)
        spread = _spread(jnp.stack([at_dot.weight[i] for i in moving]), y)
        y_dot = jnp.sum(spread * read_rows(features, again, summed).astype(y.dtype), axis=0)
    features_dot = features_dot if summed is None else summed_dot
    if not isinstance(features_dot, SymbolicZero):
        # One gather for all corners: its transpose is one scatter-add, and so one map of zeros. The
        # gather fills, so its transpose drops corners outside. The transpose of `_gather_rows` would
        # add the zeros of all of them to one pixel.
        read = features_dot.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        y_dot = y_dot + jnp.sum(jnp.stack(at.weight)[..., None].astype(y.dtype) * read, axis=0)
    return y, y_dot


sum_rows.defjvp(_sum_rows_jvp, symbolic_zeros=True)


def read_rows(features: jax.Array, index: jax.Array, summed: jax.Array | None) -> jax.Array:
    """`_gather_rows`. If `summed` is given, in its dtype, and gradients flow to `summed`."""
    return _gather_rows(features, index) if summed is None else _read_narrow(features, summed, index)


@jax.custom_jvp
def _read_narrow(features: jax.Array, summed: jax.Array, index: jax.Array) -> jax.Array:
    return _gather_rows(features, index).astype(summed.dtype)


@_read_narrow.defjvp
def _read_narrow_jvp(primals, tangents):
    return _read_narrow(*primals), _gather_rows(tangents[1], primals[2])


def _gather_rows(features: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of `features` `(R, Cg)`: `(*query, Cg)`. Row R is zero, and has no gradient."""
    # A gather that fills checks each index, which took a CPU as long as the rest of the reading.
    last = int32(features.shape[0]) - 1
    rows = features.at[jnp.minimum(index, last)].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return _select(lax.broadcast_in_dim(index <= last, rows.shape, range(index.ndim)), rows, 0)


def _spread(weight: jax.Array, features: jax.Array) -> jax.Array:
    """`weight` `(*query,)` repeated for every channel of `features`: `(*query, Cg)`."""
    # A matrix product with ones, whose transpose is a matrix product too. The transpose of a
    # broadcast is a sum over the last axis, for which XLA's CPU backend takes ten times as long.
    ones = jnp.ones((1, features.shape[-1]), weight.dtype)
    return jnp.matmul(weight[..., None], ones, precision=lax.Precision.HIGHEST).astype(features.dtype)


def corners(
    position: Sequence[Positions], border: Border, method: str | tuple[str, ...] = "linear"
) -> Iterator[tuple[tuple[jax.Array, ...], jax.Array, jax.Array]]:
    """For each corner of points: (its pixel along each axis, its weight, whether it is read).

    `position` has an entry for each spatial axis. All is elementwise, so kernels can call this too.
    """
    methods = (method,) * len(position) if isinstance(method, str) else method
    axes = [neighbours(*axis) for axis in zip(position, *border, methods, strict=True)]
    for corner in itertools.product(*axes):
        pixel, weights, reads = zip(*corner, strict=True)
        yield pixel, functools.reduce(operator.mul, weights), functools.reduce(operator.and_, reads)


# A larger offset is far: only its sign is used. A smaller one has a whole part that fits an int32.
_FAR = 2.0**30


def neighbours(position: Positions, size: Size, mode: str, method: str):
    """The pixels on an axis that a position reads: each (index, weight, whether it is read)."""
    size = int32(size)
    offset, pixel, fraction, near = cell(position, size, mode)
    match method:
        case "linear":
            chosen = ((pixel, 1 - fraction), (pixel + 1, fraction))
        case "cubic":
            chosen = [(pixel + step, weight) for step, weight in zip((-1, 0, 1, 2), _cubic(fraction), strict=True)]
        case _:
            whole = jnp.where(jnp.isnan(offset), offset, jnp.ones_like(offset))  # a weight without a derivative
            chosen = ((pixel + _step(pixel, fraction, size, mode, method), lax.stop_gradient(whole)),)
    neighbours = []
    for index, weight in chosen:
        match mode:
            case "zeros":
                read = (index >= 0) & (index < size)
            case "edge":
                read = ~jnp.isnan(offset)
            case _:
                read = near
        neighbours.append((INTO_MAP[mode](index, size), weight, read))
    return neighbours


def cell(position: Positions, size: Size, mode: str) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A position's offset, the pixel at or below, the distance to it, whether it is near."""
    regular, offset = position
    # A far offset becomes 0, because inf - floor(inf) is NaN. A NaN offset stays, makes the weights
    # NaN, and is not near. Not by jnp.clip: the minimum and maximum of a GPU drop a NaN.
    distance = jnp.abs(offset)
    near, offset_near = distance < _FAR, lax.select(distance >= _FAR, jnp.zeros_like(offset), offset)
    below = jnp.floor(offset_near)
    fraction = offset_near - below
    # Far enough outside the map that none of four pixels lies in it; with "edge" on the offset's own side.
    far = jnp.where(offset < 0, -4, size) if mode == "edge" else -4
    pixel = jnp.where(near, regular + below.astype(jnp.int32), far)
    return offset, pixel, fraction, near


def _cubic(fraction: jax.Array) -> tuple[jax.Array, ...]:
    """The weights of the pixels at -1, 0, 1 and 2 from the one below: Keys' cubic convolution, with torch's a."""
    a, t, u = -0.75, fraction, 1 - fraction
    inner = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (t, u)]  # at distances t and 1 - t
    return a * t * u * u, *inner, a * u * t * t


def _step(pixel: jax.Array, fraction: jax.Array, size: Size, mode: str, method: str) -> jax.Array:
    """0 if a position reads `pixel` alone, 1 if it reads the pixel above alone."""
    if method == "floor":
        return jnp.zeros_like(pixel)
    # Even or odd is the pixel of the map: where the map is mirrored, an even index may stand for an
    # odd pixel.
    odd = (pixel if mode == "zeros" else INTO_MAP[mode](pixel, size)) % 2 == 1
    return ((fraction > 0.5) | ((fraction == 0.5) & odd)).astype(jnp.int32)


def _clip(index: jax.Array, size: Size) -> jax.Array:
    return lax.clamp(jnp.int32(0), index, jnp.asarray(size - 1, jnp.int32))


def _select(read: jax.Array, value: jax.Array, other: Any) -> jax.Array:
    """`jnp.where`, which is a jitted function: XLA would have to inline each of its calls."""
    return lax.select(read, value, jnp.full_like(value, other))


def _reflect(index: jax.Array, size: Size) -> jax.Array:
    period = jnp.maximum(2 * size - 2, 1)  # a map of one pixel is that pixel everywhere
    index = jnp.mod(index, period)
    return jnp.where(index < size, index, period - index)


def _symmetric(index: jax.Array, size: Size) -> jax.Array:
    index = jnp.mod(index, 2 * size)
    return jnp.where(index < size, index, 2 * size - 1 - index)


# The pixel of the map for an index that may lie beyond its border. With "zeros" that is not read.
INTO_MAP = {"zeros": _clip, "edge": _clip, "wrap": jnp.mod, "reflect": _reflect, "symmetric": _symmetric}
