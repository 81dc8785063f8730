"""Deformable convolution of a map whose rows lie on several devices.

An unbounded offset may read any row, so XLA would fetch the whole map to every device. A bounded
one reads a few rows beyond its shard: the halo. Each device fetches its halo from its two
neighbours, and then calls `deform_conv` on its shard between the halos.

    device i - 1                  … a b c d │
    device i              halo: c d │ e f g h │ i j :halo
    device i + 1                            │ i j k l …
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dcn_jax._core import checks
from dcn_jax.geometry import Padding, Window
from dcn_jax.ops.deform_conv.api import deform_conv
from dcn_jax.ops.deform_conv.call import call_window, check_max_offset


def halo_deform_conv(
    x: jax.Array,
    kernel: jax.Array,
    offset: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    max_offset: int | float,
    axis_name: str | Sequence[str],
    spatial_axis: int = 0,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    feature_group_count: int = 1,
    padding_mode: str | Sequence[str] = "zeros",
    precision: Any = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """Compute `deform_conv(…, max_offset=max_offset)` of a map whose rows are split over devices.

        y(p0) = Σ_n  w_n · x(p0 + p_n + clip(Δp_n, ±max_offset)) · Δm_n  +  bias

    Call it inside `jax.shard_map`. Each array is then one device's shard of R rows, and the result
    is that device's rows of the result for the whole map. A device sends `low + ⌈max_offset⌉` of
    its rows to the next device and `high + ⌈max_offset⌉` to the one before, where (low, high) is
    the padding of that axis, and nothing else. Gradients of x send as much back.

    Args:
        x: `(*batch, R, *spatial, C)`, with one n-th of the map's rows on each of n devices.
        kernel: `(*window, C // feature_group_count, features)`, the same on all these devices.
        offset: `(*batch, R, *out_spatial, OG * K * n)` in pixels, of the output positions in x's rows.
        mask: `(*batch, R, *out_spatial, OG * K)` of the same positions, or None for 1 everywhere.
        bias: `(features,)`, the same on all these devices, or None.
        max_offset: pixels. Offsets are clipped to ±max_offset, along every axis. A larger bound
            makes wider halos.
        axis_name: the mesh axis that the rows are split over, as `jax.lax.ppermute` takes it; a
            tuple of names for several.
        spatial_axis: which spatial axis is split: 0 is the first one, the rows.
        strides: as in `deform_conv`; 1 along the split axis.
        padding: as in `deform_conv`; along the split axis it must keep the number of rows, as "SAME" does.
        kernel_dilation: as in `deform_conv`.
        feature_group_count: as in `deform_conv`.
        padding_mode: as in `deform_conv`; along the split axis "zeros" or "wrap".
        precision: as in `deform_conv`.
        preferred_element_type: as in `deform_conv`.
        implementation: as in `deform_conv`, which is called with it on each device.

    Returns:
        `(*batch, R, *out_spatial, features)`, what `deform_conv` returns for these rows. It is
        differentiable in every array to any order. A bfloat16 or float16 gradient of x is rounded
        once more in rows that two devices read. Where an offset equals a whole-number bound,
        `deform_conv` reads one more row, with weight zero; this function does not fetch it, so an
        infinite or NaN pixel there makes no NaN.

    Raises:
        ValueError: the call is not inside a `shard_map` over `axis_name`, there is no bound, a
            halo is wider than R rows, or an option does not fit; the message says which.
            `jax.shard_map` itself refuses rows that do not divide evenly over the devices.
        TypeError: an argument is of the wrong kind.

    Source: the exchange of halos is that of parallel stencil codes. The op is arXiv 1811.11168's.

    Example:
        >>> import functools
        >>> import jax
        >>> import jax.numpy as jnp
        >>> mesh = jax.make_mesh((jax.device_count(),), ("space",))
        >>> rows = jax.P(None, "space")  # of (B, H, W, C)
        >>> op = jax.shard_map(
        ...     functools.partial(halo_deform_conv, max_offset=2, axis_name="space"),
        ...     mesh=mesh, in_specs=(rows, jax.P(), rows), out_specs=rows,
        ... )
        >>> x = jax.random.normal(jax.random.key(0), (2, 64, 8, 4))
        >>> offset = jnp.full((2, 64, 8, 18), 0.5)
        >>> x, offset = jax.device_put((x, offset), jax.NamedSharding(mesh, rows))
        >>> kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 16))
        >>> jax.jit(op)(x, kernel, offset).shape
        (2, 64, 8, 16)
    """
    x = checks.array("x", x, jnp.inexact)
    kernel = checks.array("kernel", kernel, jnp.inexact)
    offset = checks.array("offset", offset, jnp.floating)
    window = call_window(
        x, kernel, strides=strides, padding=padding, kernel_dilation=kernel_dilation, padding_mode=padding_mode
    )
    devices = _check_devices(x, axis_name)
    _check_window(window, spatial_axis, padding)
    halo = _check_halo(window, spatial_axis, max_offset, offset.dtype, devices, axis_name)

    ring = window.padding_mode[spatial_axis] == "wrap"
    extended = _with_halo(x, x.ndim - window.rank - 1 + spatial_axis, halo, devices, axis_name, ring)

    def but_for_split_axis(values: tuple, value: Any) -> tuple:
        return (*values[:spatial_axis], value, *values[spatial_axis + 1 :])

    return deform_conv(
        extended,
        kernel,
        offset,
        mask,
        bias,
        strides=strides,
        padding=but_for_split_axis(window.pads, halo.pads),
        kernel_dilation=kernel_dilation,
        feature_group_count=feature_group_count,
        padding_mode=but_for_split_axis(window.padding_mode, "zeros"),  # nothing reads beyond the halo
        precision=precision,
        preferred_element_type=preferred_element_type,
        max_offset=max_offset,
        implementation=implementation,
    )


class _Halo(NamedTuple):
    """How many rows a shard needs of its neighbours, and its padding once it has them."""

    before: int
    after: int
    pads: tuple[int, int]


def _with_halo(x: jax.Array, axis: int, halo: _Halo, devices: int, axis_name: Any, ring: bool) -> jax.Array:
    """`x` between the last rows of the shard before it and the first rows of the shard after it.

    Beyond the first and the last shard are zeros, or, in a ring, the last and the first shard.
    """
    rows = x.shape[axis]
    up = [(i, i + 1) for i in range(devices - 1)] + [(devices - 1, 0)] * ring  # (from, to)
    down = [(to, here) for here, to in up]
    parts = [x]
    # A device that nobody sends to receives zeros.
    if halo.before:
        last = lax.slice_in_dim(x, rows - halo.before, rows, axis=axis)
        parts.insert(0, lax.ppermute(last, axis_name, up))
    if halo.after:
        first = lax.slice_in_dim(x, 0, halo.after, axis=axis)
        parts.append(lax.ppermute(first, axis_name, down))
    return lax.concatenate(parts, axis)


def _check_devices(x: jax.Array, axis_name: Any) -> int:
    """The number of devices along `axis_name`; raise if the call is not inside a shard_map that splits x over it."""
    try:
        devices, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} is not a mesh axis of a jax.shard_map around this call; call it inside "
            "jax.shard_map, over a mesh with that axis (for a map on one device there is deform_conv)"
        ) from error
    # With check_vma=False nothing is known to vary, the index neither.
    if missing := jax.typeof(index).mat.varying - jax.typeof(x).mat.varying:
        raise ValueError(
            f"x is the same on all devices along {sorted(missing)}; wanted its rows split over axis_name={axis_name!r}: "
            "name that axis in the in_specs of jax.shard_map, jax.P(None, axis_name) for (B, H, W, C)"
        )
    return devices


def _check_window(window: Window, axis: Any, padding: Any) -> None:
    """Raise if along the split axis the window makes no row of the result for each row, or borders are others."""
    if not checks.is_int(axis) or not 0 <= axis < window.rank:
        raise ValueError(
            f"spatial_axis={axis!r} is not one of the {window.rank} spatial axes of x; wanted an int from 0 to "
            f"{window.rank - 1}"
        )
    if window.strides[axis] != 1:
        raise ValueError(
            f"strides={window.strides} has {window.strides[axis]} along spatial axis {axis}, which is split over devices; "
            "wanted 1 there: call deform_conv on the whole map, or split another axis"
        )
    if window.padding_mode[axis] not in ("zeros", "wrap"):
        raise ValueError(
            f"padding_mode={window.padding_mode} has {window.padding_mode[axis]!r} along spatial axis {axis}, which is "
            'split over devices; wanted "zeros" or "wrap" there'
        )
    if window.out_spatial[axis] != window.spatial[axis]:
        low, high = window.pads[axis]
        wanted = (window.size[axis] - 1) * window.dilation[axis]
        raise ValueError(
            f"padding={padding!r} adds {low + high} rows along spatial axis {axis}, which is split over devices; "
            f'wanted "SAME", or {wanted} in all: the result then has as many rows as x, and divides over the devices'
        )


def _check_halo(
    window: Window, axis: int, max_offset: Any, offset_dtype: jnp.dtype, devices: int, axis_name: Any
) -> _Halo:
    """The halo of a shard; raise if there is no bound, or if more than the neighbours have to be asked."""
    bound = check_max_offset(max_offset)
    if bound is None:
        raise ValueError(
            "max_offset=None leaves offsets unbounded, which may read any row of the map; wanted a number of pixels, "
            "whose rows the devices exchange: without a bound call deform_conv on the whole map"
        )
    reach = float(np.asarray(bound, offset_dtype))  # deform_conv clips to the bound in this dtype
    low, high = window.pads[axis]
    # The shard's first tap reads down to row -low - reach, its last one up to reach + high rows beyond the shard.
    before, after = max(0, math.ceil(reach) + low), max(0, math.ceil(reach) + high)
    rows = window.spatial[axis]
    if max(before, after) > rows:
        raise ValueError(
            f"the halo of {max(before, after)} rows (max_offset={max_offset}, padding {(low, high)}) is wider than a shard, "
            f"which has {rows} rows on each of the {devices} devices along axis_name={axis_name!r}; use fewer devices "
            "there, or a smaller max_offset or kernel_dilation"
        )
    return _Halo(before, after, (low - before, high - after))
