"""RoI pooling: each box of a map becomes a small map of fixed size, whose bins a network may move.

A bin's samples are points, and their mean is the sum that attention takes of its points:
`weighted_reads` computes it. All images are one map of three axes there, (image, y, x). The image
is read by "floor", and the border of the published ops is that of an edge, cut off one pixel outside.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core import checks, dtypes
from dcn_jax._core.mesh import on_any_mesh
from dcn_jax.geometry import Size, int32
from dcn_jax.ops.weighted_reads import Level, Operands, sum_readings
from dcn_jax.sampling import Border

# A coordinate of a box, or an offset, that is as large as this reads zero: with an infinite one, or where a box's width
# overflows, the position would be NaN.
_FAR = 2.0**30


def roi_align(
    x: jax.Array,
    rois: jax.Array,
    *,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = True,
) -> jax.Array:
    """Pool boxes of a map to one size without rounding them: RoIAlign, with torchvision's numbers.

        out(r, i, j) = mean over s, t of  x_b(start_r + (i + (s + ½) / S, j + (t + ½) / S) · bin_r)

    with b, x1, y1, x2, y2 = rois(r), start = (y1, x1) · spatial_scale - ½, bin = (y2 - y1, x2 - x1)
    · spatial_scale / output_size, S = sampling_ratio, and s, t = 0 … S - 1. Positions are in pixels
    of x, whose centres are at whole numbers. Without `aligned` there is no - ½, and a box that is
    less than a pixel of x high or wide counts as one pixel.

    Between pixels x is interpolated linearly. Up to one pixel beyond the outermost pixel centres
    x has its border pixels' values; a sample that lies below -1 or above the map's size reads zero.

    | box | result |
    |---|---|
    | without area | all samples at the one line or point |
    | that ends before it starts | read backwards (with `aligned`) |
    | outside of the map, in part or wholly | each sample that is outside reads zero |
    | with an index that is no image, or a coordinate of ±inf or from 2**30 pixels of x | zero, with a zero gradient |
    | with a NaN | NaN in its own result alone |

    Differentiable in both arguments, the boxes' coordinates included, to any order, in forward and
    reverse mode. Where a sample is at a whole pixel, the derivative with respect to its position is
    the right-hand one.

    Args:
        x: `(batch, H, W, C)`, channels last; floating-point or complex.
        rois: `(R, 5)`, boxes as [index of the image in the batch, x1, y1, x2, y2], in pixels of the
            image that `spatial_scale` is of. Any float dtype; positions are computed in float32 or
            wider. R may be 0.
        output_size: bins of a box along (height, width); an int is a square.
        spatial_scale: pixels of x for one pixel of the image, such as 1 / 16.
        sampling_ratio: S, samples of a bin along each axis. torchvision's 0 or -1, a number that
            differs from box to box, is refused, because shapes are static.
        aligned: whether pixel centres of x are half a pixel from its edge, where 0 is.

    Returns:
        `(R, *output_size, C)`, in the dtype of x; summed in float32 or wider.

    Raises:
        ValueError: a shape or an option does not fit; the message names it and says what to write.
        TypeError: an argument is of the wrong kind.

    Source: He et al., Mask R-CNN (arXiv 1703.06870); torchvision.ops.roi_align.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
        >>> rois = jnp.array([[0, 0, 0, 4, 4], [0, 1, 1, 3, 2]], jnp.float32)  # the whole map, and two of its pixels
        >>> roi_align(x, rois, output_size=(1, 2))[..., 0]
        Array([[[6.5, 8.5]],
        <BLANKLINE>
               [[5. , 6. ]]], dtype=float32)
    """
    options = {"spatial_scale": spatial_scale, "sampling_ratio": sampling_ratio, "aligned": aligned}
    return deform_roi_pool(x, rois, output_size=output_size, **options)


def deform_roi_pool(
    x: jax.Array,
    rois: jax.Array,
    offset: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    gamma: float = 0.1,
    aligned: bool = True,
) -> jax.Array:
    """Pool boxes whose bins are moved and modulated: deformable RoI pooling, with mmcv's numbers.

        out(r, i, j) = mask(r, i, j) · the bin (i, j) of roi_align, moved by  gamma · offset(r, i, j) · (height_r, width_r)

    with the height and width of the box in pixels of x. All samples of a bin move together. Without
    `offset` and `mask` it is `roi_align`, whose docstring tells which boxes read what. A bin with
    an offset of ±inf or from 2**30 reads zero, with a zero gradient; a NaN makes NaN at its own bin
    alone.

    Differentiable in all arrays to any order, in forward and reverse mode (mmcv's gradient of an
    offset is wrong where a sample is within the pixel around the map).

    Under plain `jit` boxes may be split over devices that each have x: no device asks another for
    anything but the sum of x's gradients.

    Args:
        x: `(batch, H, W, C)`, channels last; floating-point or complex.
        rois: `(R, 5)`, as in `roi_align`.
        offset: `(R, ph, pw, 2)`, as (dy, dx), in parts of gamma times the box; any float dtype.
        mask: `(R, ph, pw)`, which multiplies the bins, or None for ones.
        output_size: (ph, pw), bins of a box along (height, width); an int is a square.
        spatial_scale: pixels of x for one pixel of the image, such as 1 / 16.
        sampling_ratio: samples of a bin along each axis, at least 1.
        gamma: what offsets are multiplied by, beside the box's size.
        aligned: as in `roi_align`; mmcv's is True.

    Returns:
        `(R, ph, pw, C)`, in the dtype of x; summed in float32 or wider.

    Raises:
        ValueError: a shape or an option does not fit; the message names it and says what to write.
        TypeError: an argument is of the wrong kind.

    Source: Dai et al., Deformable Convolutional Networks (arXiv 1703.06211), equation 5; Zhu et al.,
    Deformable ConvNets v2 (arXiv 1811.11168), for the mask; mmcv.ops.deform_roi_pool.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
        >>> rois = jnp.array([[0, 0, 0, 2, 2]], jnp.float32)
        >>> down = jnp.array([10.0, 0.0]).reshape(1, 1, 1, 2)  # by gamma · 10 = 1 height of the box
        >>> deform_roi_pool(x, rois, down, jnp.full((1, 1, 1), 0.5), output_size=1).item()  # half of (8 + 9 + 12 + 13) / 4
        5.25
    """
    spec = check_pooling(output_size, spatial_scale, sampling_ratio, gamma, aligned)
    arrays = _check_arrays(spec, x, rois, offset, mask)
    batched = [array for array in arrays[1:] if array is not None]
    return on_any_mesh(_pool, spec, arrays, batched=batched, batch=1, whole=3)(*arrays)


class Pooling(NamedTuple):
    """Everything about a call except its arrays."""

    output_size: tuple[int, ...]
    spatial_scale: float
    sampling_ratio: int
    gamma: float
    aligned: bool


def check_pooling(output_size: Any, spatial_scale: Any, sampling_ratio: Any, gamma: Any, aligned: Any) -> Pooling:
    """The options of a call; raise if one does not fit."""
    size = checks.per_axis("output_size", output_size, 2, minimum=1)
    checks.finite("spatial_scale", spatial_scale)
    checks.finite("gamma", gamma)
    if spatial_scale <= 0:
        raise ValueError(f"spatial_scale={spatial_scale!r}; wanted pixels of x for one of the image, such as 1 / 16")
    if checks.is_int(sampling_ratio) and sampling_ratio < 1:
        raise ValueError(
            f"sampling_ratio={sampling_ratio!r} asks for a number of samples that differs from box to box, and shapes "
            "are static here; wanted an int of at least 1, such as 2"
        )
    checks.count("sampling_ratio", sampling_ratio)
    if not isinstance(aligned, bool):
        raise TypeError(f"aligned={aligned!r} is a {type(aligned).__name__}; wanted True or False")
    return Pooling(size, float(spatial_scale), int(sampling_ratio), float(gamma), aligned)


def _check_arrays(spec: Pooling, x: Any, rois: Any, offset: Any, mask: Any) -> tuple[jax.Array | None, ...]:
    x, rois = checks.array("x", x, jnp.inexact), checks.array("rois", rois, jnp.floating)
    if x.ndim != 4 or 0 in x.shape[1:]:
        problem = f"x has shape {x.shape}; wanted (batch, H, W, C), channels last, with at least one pixel and channel"
        raise ValueError(problem + (", such as x[None] for one image" if x.ndim == 3 else ""))
    if rois.ndim != 2 or rois.shape[1] != 5:
        problem = f"rois has shape {rois.shape}; wanted (R, 5): the index of an image in x, x1, y1, x2, y2"
        if rois.shape[-1:] == (4,):
            problem += ". If all boxes are of image 0: jnp.pad(rois, ((0, 0), (1, 0)))"
        raise ValueError(problem)
    bins = (rois.shape[0], *spec.output_size)
    if offset is not None:
        offset = checks.array("offset", offset, jnp.floating)
        if offset.shape != (*bins, 2):
            problem = f"offset has shape {offset.shape}; wanted {(*bins, 2)}: (dy, dx) for each bin of each box"
            if offset.shape == (bins[0], 2, *bins[1:]):
                problem += ". From mmcv's order: jnp.moveaxis(offset, 1, -1)[..., ::-1]"
            raise ValueError(problem)
    if mask is not None:
        mask = checks.array("mask", mask, jnp.floating)
        if mask.shape != bins:
            raise ValueError(f"mask has shape {mask.shape}; wanted {bins}: a number for each bin of each box")
    return x, rois, offset, mask


def _pool(spec: Pooling, x: jax.Array, rois: jax.Array, offset: jax.Array | None, mask: jax.Array | None) -> jax.Array:
    """The op, whose boxes read one map of three axes, (image, y, x)."""
    *spatial, channels = x.shape
    bins, samples = math.prod(spec.output_size), spec.sampling_ratio**2
    if spatial[0] == 0:  # every index is out of range
        return jnp.zeros((rois.shape[0], *spec.output_size, channels), x.dtype)
    given = [array.dtype for array in (x, rois, offset, mask) if array is not None]
    # The sum's gradients have the dtype of its operands, so these are widened before it.
    dtype = dtypes.wide(*given)
    real = jnp.finfo(dtype).dtype
    points = _samples(spec, tuple(spatial), rois.astype(real), None if offset is None else offset.astype(real))
    points = points.reshape(rois.shape[0], bins, samples, 3)
    # Weights without a mask too: to divide the result would take its memory once more.
    weights = jnp.ones((), real) if mask is None else mask.astype(real).reshape(rois.shape[0], bins, 1)
    weights = jnp.broadcast_to(weights / samples, points.shape[:-1])
    rows = x.reshape(1, math.prod(spatial), channels).astype(dtype)
    y = sum_readings(_levels(tuple(spatial), bins, samples), Operands(rows, points, weights))
    return y.reshape(*rois.shape[:1], *spec.output_size, channels).astype(x.dtype)


def _levels(spatial: tuple[Size, ...], bins: int, samples: int) -> tuple[Level, ...]:
    """The map `(image, y, x)`, once for each part of the samples.

    Gradients are computed in steps of one level and some bins. If a box has few bins, a step of all
    samples would take many times the memory of the result.
    """
    part = min(samples, max(1, bins // 3))
    border, method = Border(spatial, ("zeros", "edge", "edge")), ("floor", "linear", "linear")
    return tuple(
        Level(border, method, _as_given, 0, first, min(part, samples - first)) for first in range(0, samples, part)
    )


def _as_given(position: jax.Array, size: jax.Array) -> jax.Array:
    """Points that are in pixels already."""
    del size
    return position


def _samples(spec: Pooling, spatial: tuple[Size, ...], rois: jax.Array, offset: jax.Array | None) -> jax.Array:
    """Where each sample reads, as (x, y, image): `(R, ph, pw, S, S, 3)`. An image of -1 reads zero."""
    image, boxes = rois[:, 0], rois[:, 1:] * spec.spatial_scale
    boxes, far = _without_far(boxes)
    far = jnp.any(far, axis=-1)[:, None, None]  # (R, 1, 1)
    boxes = boxes - 0.5 if spec.aligned else boxes
    start, size = boxes[:, 1::-1], (boxes[:, 2:] - boxes[:, :2])[:, ::-1]  # (R, (y, x))
    if not spec.aligned:
        size = jnp.where(size < 1, 1, size)  # not by jnp.maximum, which drops a NaN on a GPU
    start, step = start[:, None, None], size[:, None, None]  # (R, 1, 1, 2)
    if offset is not None:
        offset, far_offset = _without_far(offset)
        far = far | jnp.any(far_offset, axis=-1)  # (R, ph, pw)
        start = start + spec.gamma * step * offset
    y, x = (_along(spec, axis, start[..., axis], step[..., axis]) for axis in (0, 1))  # (R, ph, pw, S)
    y, x = jnp.broadcast_arrays(y[..., :, None], x[..., None, :])
    image = image[:, None, None, None, None]
    outside = _is_outside(y, spatial[1]) | _is_outside(x, spatial[2]) | far[..., None, None]
    image = jnp.where(outside & ~jnp.isnan(image), -1, image)
    return jnp.stack([x, y, image], axis=-1)


def _without_far(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`array` with zeros for what is infinite or too large, and where that was."""
    far = jnp.abs(array) >= _FAR
    return jnp.where(far, 0, array), far


def _along(spec: Pooling, axis: int, start: jax.Array, size: jax.Array) -> jax.Array:
    """The samples' positions along an axis, from the start and size of boxes `(R, 1 or ph, 1 or pw)`: `(R, ph, pw, S)`."""
    # torchvision's operations, in their order: at -1 and at the map's size a position's last bit decides what it reads.
    bins, samples = spec.output_size[axis], spec.sampling_ratio
    step = size / bins
    number = lax.broadcasted_iota(start.dtype, (1, *spec.output_size), 1 + axis)
    sample = lax.broadcasted_iota(start.dtype, (1, 1, 1, samples), 3)
    return (start + number * step)[..., None] + (sample + 0.5) * step[..., None] / samples


def _is_outside(position: jax.Array, size: Size) -> jax.Array:
    """Whether a position is more than a pixel beyond the centre of an outermost pixel."""
    return (position < -1) | (position > jnp.asarray(int32(size), position.dtype))
