"""DCNv3: each channel is summed over taps of given offsets and weights; channels are not mixed.

It is `deform_conv` with a kernel of ones, one feature group per channel, and offsets in another
order. `run` shows it. DCNv4 differs only in how its arguments are packed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dcn_jax._core import checks, dtypes
from dcn_jax._core.mesh import on_any_mesh
from dcn_jax.geometry import Padding, Window, resolve_window
from dcn_jax.ops.deform_conv import deform_conv


def dcnv3(
    x: jax.Array,
    offset: jax.Array,
    mask: jax.Array,
    *,
    window: int | Sequence[int] = (3, 3),
    strides: int | Sequence[int] | None = 1,
    padding: Padding = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> jax.Array:
    """Sum each channel over taps with learned, fractional offsets and learned weights: DCNv3.

        y(p0, c) = Σ_k  m_k · x(p0 + s · (p_k + Δp_k), c)    p0 = output · stride - padding + centre

    p_k is the tap's place, `kernel_dilation · index - centre`, with
    `centre = kernel_dilation · (window - 1) // 2` along each axis. s is `offset_scale`. Channels
    form G groups; each has offsets Δp and weights m of its own. There is no kernel and no softmax:
    the layer `DCNv3` applies the softmax.

    The taps run down the first column of the window, then down the next, and an offset is (x, y).
    Both orders are the reverse of `deform_conv`'s. K is the number of taps,
    `window[0] * window[1]`, less 1 with `remove_center`.

    Args:
        x: `(*batch, H, W, C)`; any number of leading batch axes, none included.
        offset: `(*batch, Ho, Wo, G * K * 2)`, ordered [group, tap, (x, y)], in pixels of x before
            they are scaled; any float dtype. Batch axes may be 1 or missing: then images
            share the offsets.
        mask: `(*batch, Ho, Wo, G * K)`, ordered [group, tap], any sign; batch axes as for offset.
        window: taps along (height, width); an int is a square.
        strides: pixels between neighbouring outputs; one for both axes, or one per axis.
        padding: an int, one int or (low, high) pair per axis, or a name as in `deform_conv`.
        kernel_dilation: pixels between neighbouring taps; one for both axes, or one per axis.
        offset_scale: s, by which taps and offsets are stretched about the centre of the window.
        remove_center: leaves out the middle tap of the window, whose sizes must be odd.

    Returns:
        `(*batch, Ho, Wo, C)`, in the dtype of x; positions and sums are float32 or wider.

    Raises:
        ValueError: a shape or an option does not fit; the message names it.
        TypeError: an argument is of the wrong kind.

    Derivatives, infinite and NaN offsets, and symbolic sizes are as in `deform_conv`.

    Source: Wang et al., InternImage (arXiv 2211.05778), equation 2, and its code.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 32))
        >>> offset = jnp.full((2, 8, 8, 4 * 9 * 2), 0.5)  # 4 groups of 8 channels
        >>> mask = jnp.full((2, 8, 8, 4 * 9), 1 / 9)
        >>> dcnv3(x, offset, mask).shape
        (2, 8, 8, 32)
    """
    x = check_map(x)
    grid = make_grid(
        x.shape,
        window=window,
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        offset_scale=offset_scale,
        remove_center=remove_center,
    )
    offset = checks.array("offset", offset, jnp.floating)
    mask = checks.array("mask", mask, jnp.floating)
    values, groups = 2 * grid.taps, offset.shape[-1] // (2 * grid.taps) if offset.ndim else 0
    fits = groups > 0 and offset.shape[-1] == groups * values
    check_points(
        "offset", offset, x, grid, f"G * {values}", f"K * 2 = {grid.taps} * 2 values for each group", fits=fits
    )
    if x.shape[-1] % groups:
        raise ValueError(
            f"offset has shape {offset.shape}, that is {groups} groups of {grid.taps} taps; wanted a number of groups "
            f"that divides the {x.shape[-1]} channels of x"
        )
    wanted = groups * grid.taps
    meaning = f"one value for each tap ({grid.taps}) of each group ({groups}, as in offset)"
    check_points("mask", mask, x, grid, str(wanted), meaning, fits=mask.shape[-1:] == (wanted,))
    return run(grid, x, offset, mask)


class Grid(NamedTuple):
    """The taps of a call: a window, its stretch, and whether it lacks its middle tap."""

    window: Window
    scale: float
    remove_center: bool

    @property
    def taps(self) -> int:
        """How many taps are read: K."""
        return self.window.taps - self.remove_center


def centre(window: Window) -> tuple[int, ...]:
    """From a window's first regular tap to its centre, in pixels along each axis."""
    return tuple(dilation * (size - 1) // 2 for size, dilation in zip(window.size, window.dilation, strict=True))


def check_map(x: Any) -> jax.Array:
    """`x` as an array; raise if it is not `(*batch, H, W, C)` with at least one pixel and channel."""
    x = checks.array("x", x, jnp.inexact)
    if x.ndim < 3 or 0 in x.shape[-3:]:
        raise ValueError(f"x has shape {x.shape}; wanted (*batch, H, W, C), with at least one pixel and one channel")
    return x


def make_grid(
    shape: tuple[int, ...],
    *,
    window: Any,
    strides: Any,
    padding: Any,
    kernel_dilation: Any,
    offset_scale: Any,
    remove_center: Any,
) -> Grid:
    """The taps over a map of `shape` `(*batch, H, W, C)`; checks all options."""
    size = checks.per_axis("window", window, 2, minimum=1)
    resolved = resolve_window(
        size, spatial=shape[-3:-1], strides=strides, padding=padding, kernel_dilation=kernel_dilation
    )
    checks.finite("offset_scale", offset_scale)
    if remove_center not in (False, True):
        raise TypeError(f"remove_center={remove_center!r} is not known; wanted True or False")
    if remove_center and (not all(k % 2 for k in size) or size == (1, 1)):
        raise ValueError(
            f"remove_center=True, but window={size} has no middle tap, or no other tap; wanted odd sizes, not all 1"
        )
    return Grid(resolved, float(offset_scale), bool(remove_center))


def check_points(
    name: str, array: jax.Array, x: jax.Array, grid: Grid, channels: str, each: str, *, fits: bool
) -> None:
    """Raise if `array` is not `(*batch, Ho, Wo, channels)`; `each` says what a position has."""
    wanted = {"channels": channels, "meaning": f"the output positions, then {each}", "fits": fits}
    batch, positions = x.shape[:-3], grid.window.out_spatial
    checks.map_axes(name, array.shape, other="x", batch=batch, positions=positions, **wanted)


def run(grid: Grid, x: jax.Array, offset: jax.Array, mask: jax.Array) -> jax.Array:
    """The op of checked arguments, in DCNv3's orders."""
    arrays = x, offset, mask
    return on_any_mesh(_convolve, grid, arrays, batched=(x,), batch=x.ndim - 3, whole=3)(*arrays)


def _convolve(grid: Grid, x: jax.Array, offset: jax.Array, mask: jax.Array) -> jax.Array:
    window, channels, groups = grid.window, x.shape[-1], mask.shape[-1] // grid.taps
    offset = offset.reshape(*offset.shape[:-1], groups, grid.taps, 2)
    mask = mask.reshape(*mask.shape[:-1], groups, grid.taps, 1)
    wide = x.astype(dtypes.wide(x.dtype))  # in half precision the products with ones would be rounded
    return deform_conv(
        wide,
        jnp.ones((*window.size, 1, channels), wide.dtype),
        # A tap that is left out reads at infinity. That is zero even if pixels of x are infinite.
        _row_by_row(grid, _stretch(grid, offset)[..., ::-1], jnp.inf),
        _row_by_row(grid, mask, 0),
        strides=window.strides,
        padding=window.pads,
        kernel_dilation=window.dilation,
        feature_group_count=channels,
        padding_mode=window.padding_mode,
        preferred_element_type=x.dtype,
        implementation="xla",
    )


def _stretch(grid: Grid, offset: jax.Array) -> jax.Array:
    """Offsets `(…, G, K, (x, y))` from the unstretched taps: s · (p_k + Δp_k) - p_k."""
    if grid.scale == 1:
        return offset
    middle = centre(grid.window)
    columns, rows = (grid.window.dilation[axis] * np.arange(grid.window.size[axis]) - middle[axis] for axis in (1, 0))
    places = np.stack(np.meshgrid(columns, rows, indexing="ij"), axis=-1).reshape(-1, 2)  # p_k, as (x, y)
    if grid.remove_center:
        places = np.delete(places, len(places) // 2, axis=0)
    offset = offset.astype(dtypes.wide(offset.dtype))
    moved = jnp.asarray((grid.scale - 1) * places, offset.dtype)
    return grid.scale * offset + lax.expand_dims(moved, range(offset.ndim - 2))


def _row_by_row(grid: Grid, taps: jax.Array, absent: float) -> jax.Array:
    """`(…, G, K, v)` by columns -> `(…, G * kh * kw * v)` by rows; a missing tap is `absent`."""
    height, width = grid.window.size
    *front, groups, _, values = taps.shape
    if grid.remove_center:
        before, after = jnp.split(taps, [grid.taps // 2], axis=-2)
        taps = jnp.concatenate([before, jnp.full_like(taps[..., :1, :], absent), after], axis=-2)
    taps = jnp.swapaxes(taps.reshape(*front, groups, width, height, values), -2, -3)
    return taps.reshape(*front, groups * height * width * values)
