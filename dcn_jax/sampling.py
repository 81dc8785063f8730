"""Reading features between pixels: the bilinear gather at the heart of deformable convolution.

Nothing else in the library interpolates. In n dimensions a point lies in a cell of 2^n pixels, its corners; what it
reads is their mean, weighted along each axis by how near the point is. By two other methods it reads one pixel alone.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax._core import checks, dtypes
from dcn_jax._core.mesh import on_any_mesh
from dcn_jax.geometry import Size, canonical_padding_mode, int32


def linear_sample(features: jax.Array, points: jax.Array, *, padding_mode: str | Sequence[str] = "zeros") -> jax.Array:
    """Read a map at fractional positions by n-linear interpolation; beyond its border it is what `padding_mode` says.

        out(p) = Σ_q  Π_a max(0, 1 - |p_a - q_a|) · features(q)        over all pixels q, the map continued beyond its border

    Pixel centres are at whole numbers, so a point in [0, size - 1] is inside. A NaN coordinate reads NaN.
    Differentiable in both arguments to any order; where a coordinate is a whole number, the derivative
    with respect to it is the right-hand one. Takes `jax.vmap`.

    | padding_mode | the map beyond its border | at ±inf and beyond 2**30 |
    |---|---|---|
    | "zeros" | zero; a point beyond (-1, size) reads zero | zero |
    | "edge" | its border pixels, on and on (torch's "border") | the border |
    | "wrap" | periodic: pixel size is pixel 0 | zero |
    | "reflect" | mirrored about the outermost pixel centres, period 2 size - 2 | zero |
    | "symmetric" | mirrored about the map's edges at -0.5 and size - 0.5, period 2 size | zero |

    A point holds no more of a fraction than its dtype leaves it: a float32 coordinate is exact to 2**-14
    pixel below 1,024 and to 1/16 pixel at a million. `deform_conv` keeps the regular position apart and is
    exact at any size; for points of that kind use float64.

    Args:
        features: `(*spatial, C)`, of n spatial axes; floating-point or complex.
        points: `(*query, n)`, in pixels, in the order of the spatial axes; any float dtype. Weights are computed in
            float32 or wider.
        padding_mode: what the map is beyond its border, as in the table; one for all axes, or one per axis.

    Returns:
        `(*query, C)`, in the dtype of `features`.

    Raises:
        ValueError: the shapes of `features` and `points` do not fit each other, the map has no pixels, or
            `padding_mode` is not known.
        TypeError: an argument is not an array of such a dtype.

    Source: Dai et al., Deformable Convolutional Networks (arXiv 1703.06211), equations 3 and 4.

    Example:
        >>> import jax.numpy as jnp
        >>> ramp = jnp.arange(5.0)[:, None]  # a map of 5 pixels, 1 channel
        >>> linear_sample(ramp, jnp.array([[1.25], [-0.5], [4.5], [9.0]]))[:, 0]
        Array([1.25, 0.  , 2.  , 0.  ], dtype=float32)
        >>> linear_sample(ramp, jnp.array([[1.25], [-0.5], [4.5], [9.0]]), padding_mode="wrap")[:, 0]
        Array([1.25, 2.  , 2.  , 4.  ], dtype=float32)
    """
    features = checks.array("features", features, jnp.inexact)
    points = checks.array("points", points, jnp.floating)
    if features.ndim < 2 or 0 in features.shape[:-1]:
        raise ValueError(f"features has shape {features.shape}; wanted (*spatial, C) with at least one pixel")
    if points.ndim < 1 or points.shape[-1] != features.ndim - 1:
        raise ValueError(
            f"points has shape {points.shape}; wanted (*query, {features.ndim - 1}): one coordinate for each spatial axis "
            f"of features, whose shape is {features.shape}"
        )
    spatial = features.shape[:-1]
    border, arrays = Border(spatial, canonical_padding_mode(padding_mode, len(spatial))), (features, points)
    return on_any_mesh(_sample, border, arrays, batched=(points,), batch=points.ndim - 1, whole=1)(*arrays)


def _sample(border: "Border", features: jax.Array, points: jax.Array) -> jax.Array:
    """`linear_sample` of checked arguments."""
    dtype, channels = features.dtype, features.shape[-1]
    points = points.astype(dtypes.wide(points.dtype, jnp.finfo(dtype).dtype))
    features = features.astype(dtypes.wide(dtype))  # the gradient is summed in the dtype that is gathered from
    at = locate(Positions(jnp.int32(0), points[..., None, :]), None, border)
    return sum_rows(features.reshape(math.prod(border.spatial), channels), at)[..., 0, :].astype(dtype)


class Border(NamedTuple):
    """A map's size, and what it is beyond: both per axis."""

    spatial: tuple[Size, ...]
    padding_mode: tuple[str, ...]


# How a point is read: "linear" from the corners of its cell; from a single pixel by "nearest", the nearer one along each
# axis and half way the even one, or by "floor", the one at or below it.
METHODS = ("linear", "nearest", "floor")


class Positions(NamedTuple):
    """Positions as a whole part and an offset from it, which keeps its fraction however large the map is."""

    regular: jax.Array  # whole, in int32
    offset: jax.Array  # any float; the two broadcast


class Rows(NamedTuple):
    """What points read of a map that is flattened to rows: one array for each pixel, so 2^n of them or 1 by `METHODS`."""

    row: tuple[jax.Array, ...]  # the one after the last where the corner is not read
    weight: tuple[jax.Array, ...]


def countable(rows: Size) -> bool:
    """Whether rows, and the one after them, can be counted in int32; of sizes known only later it is taken for granted."""
    return not isinstance(rows, int) or rows < 2**31


def locate(points: Positions, scale: jax.Array | None, border: Border, method: str = "linear") -> Rows:
    """The rows that points read of a map `(*spatial, OG, Cg)`, flattened to rows of Cg channels.

    points `(*query, OG, n)`, scale of each point's weights `(*query, OG)`, or None -> arrays `(*query, OG)`.
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
    method: str = "linear",
) -> Rows:
    """`locate`, of positions along each spatial axis and each point's offset group, in any shapes that broadcast; None: one."""
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def sum_rows(
    features: jax.Array, at: Rows, span: tuple[Size, Size] | None = None, summed: jax.Array | None = None
) -> jax.Array:
    """Σ over corners of weight · (row of features, or zero outside): `(R, Cg)`, corners `(*query,)` -> `(*query, Cg)`.

    With a `span`, its first row and how many they are, the rows that are read are those of `features[first : first + count]`,
    without a copy of them, and no more is touched by the derivative. With `summed`, `features` in a wider dtype, the
    derivative is that with respect to it, and `features` has none.
    """
    dtype = dtypes.wide(features.dtype, at.weight[0].dtype)
    read = [
        w[..., None].astype(dtype) * read_rows(features, i, span, summed).astype(dtype)
        for i, w in zip(*at, strict=True)
    ]
    return functools.reduce(operator.add, read)


def _sum_rows_jvp(span, primals, tangents):
    """The derivative JAX would find, written so that its transpose is quick: no rows are kept, and one scatter adds all."""
    (features, at, summed), (features_dot, at_dot, summed_dot) = primals, tangents
    y = sum_rows(features, at, span, summed)
    index = jnp.stack(at.row)
    moving = [i for i, w in enumerate(at_dot.weight) if not isinstance(w, SymbolicZero)]
    y_dot = jnp.zeros_like(y)
    if moving:
        # Behind the barrier, or XLA would keep the rows that y has read to save reading them again, which costs more. And
        # all corners at once: of a product for each, XLA's CPU backend would compile each.
        moved = index if len(moving) == len(at.row) else jnp.stack([at.row[i] for i in moving])
        again = lax.optimization_barrier(moved)
        spread = _spread(jnp.stack([at_dot.weight[i] for i in moving]), y)
        y_dot = jnp.sum(spread * read_rows(features, again, span, summed).astype(y.dtype), axis=0)
    features_dot = features_dot if summed is None else summed_dot
    if not isinstance(features_dot, SymbolicZero):
        # All corners at once: the transpose is one scatter-add, where one a corner would each fill a map with zeros. And it
        # drops what is outside, where `_take` would have all points beyond a border add zeros to the same pixel.
        if span is not None:
            features_dot = lax.slice_in_dim(features_dot, span[0], span[0] + span[1])
        read = features_dot.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        y_dot = y_dot + jnp.sum(jnp.stack(at.weight)[..., None].astype(y.dtype) * read, axis=0)
    return y, y_dot


sum_rows.defjvp(_sum_rows_jvp, symbolic_zeros=True)


def read_rows(
    features: jax.Array, index: jax.Array, span: tuple[Size, Size] | None, summed: jax.Array | None
) -> jax.Array:
    """`_take`, in the dtype of `summed` and with its derivative where it is given."""
    take = functools.partial(_take, span=span)
    return take(features, index) if summed is None else read_narrow(take, features, summed, index)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def read_narrow(read: Callable, features: jax.Array, summed: jax.Array, index: jax.Array) -> jax.Array:
    """`read(features, index)`, which is linear in `features`, in the dtype of `summed` and with the derivative of its reading."""
    return read(features, index).astype(summed.dtype)


@read_narrow.defjvp
def _read_narrow_jvp(read, primals, tangents):
    return read_narrow(read, *primals), read(tangents[1], primals[2])


def _take(features: jax.Array, index: jax.Array, span: tuple[Size, Size] | None) -> jax.Array:
    """The rows of a span of `features` `(R, Cg)`, zero and without a gradient for the one after it: `(*query, Cg)`."""
    # Not by a gather that fills: of 32 channels, its checks took a CPU as long as the rest of the reading.
    first, count = span or (0, features.shape[0])
    last = int32(count) - 1
    row = jnp.minimum(index, last)
    read = features.at[row if span is None else row + int32(first)].get(
        mode="promise_in_bounds", wrap_negative_indices=False
    )
    return _select(lax.broadcast_in_dim(index <= last, read.shape, range(index.ndim)), read, 0)


def _spread(weight: jax.Array, features: jax.Array) -> jax.Array:
    """`weight` `(*query,)` repeated for every channel of `features`: `(*query, Cg)`."""
    # By a product with ones, whose transpose is one too: XLA's CPU backend multiplies matrices ten times faster than it
    # sums over the last axis, as the transpose of a broadcast would.
    ones = jnp.ones((1, features.shape[-1]), weight.dtype)
    return jnp.matmul(weight[..., None], ones, precision=lax.Precision.HIGHEST).astype(features.dtype)


def corners(
    position: Sequence[Positions], border: Border, method: str = "linear"
) -> Iterator[tuple[tuple[jax.Array, ...], jax.Array, jax.Array]]:
    """The pixels that points read: for each corner (its index along each axis, its weight, whether it is read).

    `position` holds one for each spatial axis. Elementwise, so that it also serves inside a kernel.
    """
    axes = [neighbours(p, size, mode, method) for p, size, mode in zip(position, *border, strict=True)]
    for corner in itertools.product(*axes):
        pixel, weights, reads = zip(*corner, strict=True)
        yield pixel, functools.reduce(operator.mul, weights), functools.reduce(operator.and_, reads)


# Beyond so many pixels an offset says no more than on which side it lies: its whole part fits an int32 below.
_FAR = 2.0**30


def neighbours(position: Positions, size: Size, mode: str, method: str):
    """The pixels that a position on an axis reads, each (its index in the map, its weight, whether it is read)."""
    size = int32(size)
    offset, pixel, fraction, near = cell(position, size, mode)
    if method == "linear":
        chosen = ((pixel, 1 - fraction), (pixel + 1, fraction))
    else:
        whole = jnp.where(jnp.isnan(offset), offset, jnp.ones_like(offset))  # the weight, which moves with nothing
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
    """A position's offset on an axis, the pixel at or below it, how far above that it lies, and whether it is near."""
    regular, offset = position
    # Before floor, where inf - floor(inf) would be NaN. By comparisons and not jnp.clip, because the minimum and maximum
    # of a GPU drop a NaN. Here it stays, makes the weights NaN, and is not near.
    distance = jnp.abs(offset)
    near, offset_near = distance < _FAR, lax.select(distance >= _FAR, jnp.zeros_like(offset), offset)
    below = jnp.floor(offset_near)
    fraction = offset_near - below
    far = jnp.where(offset < 0, -2, size) if mode == "edge" else -2  # outside; the border, where there is one
    pixel = jnp.where(near, regular + below.astype(jnp.int32), far)
    return offset, pixel, fraction, near


def _step(pixel: jax.Array, fraction: jax.Array, size: Size, mode: str, method: str) -> jax.Array:
    """How far the one pixel that is read lies above `pixel`: 0 or 1."""
    if method == "floor":
        return jnp.zeros_like(pixel)
    # Even is meant of the map: where it is mirrored, an index beyond the border may be even and its pixel odd.
    odd = (pixel if mode == "zeros" else INTO_MAP[mode](pixel, size)) % 2 == 1
    return ((fraction > 0.5) | ((fraction == 0.5) & odd)).astype(jnp.int32)


def _clip(index: jax.Array, size: Size) -> jax.Array:
    return lax.clamp(jnp.int32(0), index, jnp.asarray(size - 1, jnp.int32))


def _select(read: jax.Array, value: jax.Array, other: Any) -> jax.Array:
    """`jnp.where` of arrays of one shape, without the call of a function that XLA would have to inline each time."""
    return lax.select(read, value, jnp.full_like(value, other))


def _reflect(index: jax.Array, size: Size) -> jax.Array:
    period = jnp.maximum(2 * size - 2, 1)  # a map of one pixel is that pixel everywhere
    index = jnp.mod(index, period)
    return jnp.where(index < size, index, period - index)


def _symmetric(index: jax.Array, size: Size) -> jax.Array:
    index = jnp.mod(index, 2 * size)
    return jnp.where(index < size, index, 2 * size - 1 - index)


# Which pixel of the map stands at an index of the map as it is continued; "zeros" is not read beyond the border.
INTO_MAP = {"zeros": _clip, "edge": _clip, "wrap": jnp.mod, "reflect": _reflect, "symmetric": _symmetric}
