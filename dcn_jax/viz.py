"""Pictures: where the taps of a deformable convolution read."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from dcn_jax import _check, _extras
from dcn_jax.geometry import Padding, resolve_window, sampling_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_sampling(
    image: Any,
    points: Any,
    mask: Any = None,
    *,
    at: Sequence[int] | Sequence[Sequence[int]],
    window: Sequence[int] | None = None,
    strides: int | Sequence[int] | None = None,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    spatial: Sequence[int] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw, for some output positions, the regular grid of the taps and where they really read, over the image.

    The picture of the papers: a small square where each tap of the plain convolution would read, a line from there to
    where it reads now, and a dot there, larger and brighter the larger its modulation. Squares and lines of one output
    position have one colour.

    The artists carry labels, for `ax.legend()`; the dots are the last of `ax.collections`, for `colorbar`. The view is the
    map and one pixel around it; `ax.autoscale()` brings in dots further out, all of which read zero.

    Args:
        image: `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)`: what to draw on. It is stretched over the map that the
            points are counted in, so a picture may lie under the points of a smaller feature map.
        points: `(Ho, Wo, OG, K, 2)`, from `dcn_jax.sampling_points`, of one image.
        mask: `(Ho, Wo, OG * K)` or `(Ho, Wo, OG, K)`, the modulation, as the layers sow it; None is 1 everywhere.
        at: the output positions to draw, `[(row, column), …]`, or a single one.
        window: the kernel's size along each axis; by default a square of K taps.
        strides: of the convolution, as its other options below; by default what brings the map, padded "SAME", to
            (Ho, Wo).
        padding: "SAME", "VALID", an int, one int per axis, or one (low, high) pair per axis.
        kernel_dilation: pixels between neighbouring taps; one for all axes, or one per axis.
        spatial: `(height, width)` of the map that the points are counted in; by default that of the image.
        ax: the Axes to draw on; by default those of a new figure.

    Returns:
        The Axes. Nothing is shown: call `matplotlib.pyplot.show()`, or `ax.figure.savefig(…)`.

    Raises:
        ValueError: a shape or a position does not fit, or the window does not lead to `points`; the message names it.
        ImportError: matplotlib is not installed.

    Source: Dai et al. (arXiv 1703.06211), figures 5 and 6; Zhu et al. (arXiv 1811.11168), figure 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from dcn_jax import sampling_points
        >>> from dcn_jax.viz import plot_sampling
        >>> points = sampling_points(jnp.full((16, 16, 18), 0.5), (3, 3), spatial=(16, 16))
        >>> ax = plot_sampling(jnp.zeros((16, 16)), points, at=[(4, 4), (10, 12)])
        >>> ax.figure.savefig("sampling.png")  # doctest: +SKIP
    """
    image, points = np.asarray(image), np.asarray(points, np.float32)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (1, 3, 4)):
        raise ValueError(f"image has shape {image.shape}; wanted (H, W), or (H, W, channels) with 1, 3 or 4 channels")
    if points.ndim != 5 or points.shape[-1] != 2:
        raise ValueError(
            f"points has shape {points.shape}; wanted (Ho, Wo, OG, K, 2), those of one image with two spatial axes: for "
            "the first of a batch, points[0]"
        )
    *out_spatial, _, taps, _ = points.shape
    modulation = _modulation(mask, points.shape)
    rows, columns = _positions(at, out_spatial)
    spatial = _check.per_axis("spatial", image.shape[:2] if spatial is None else spatial, 2, minimum=1)
    regular = _regular_grid(out_spatial, taps, spatial, window, strides, padding, kernel_dilation)

    try:
        from matplotlib import colormaps
        from matplotlib import pyplot as plt
        from matplotlib.collections import LineCollection
    except ModuleNotFoundError as error:
        raise _extras.missing("dcn_jax.viz", "viz") from error

    if ax is None:
        ax = plt.subplots()[1]
    height, width = spatial
    ax.imshow(
        image if image.dtype == np.uint8 else image.astype(np.float32),  # matplotlib knows no bfloat16
        cmap="gray",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )
    ax.set(xlim=(-1.5, width + 0.5), ylim=(height + 0.5, -1.5))

    # From here on (x, y), matplotlib's order; (P, OG, K, 2) for the P positions of `at`.
    reads = points[rows, columns][..., ::-1]
    grid = np.broadcast_to(regular[rows, columns][..., ::-1], reads.shape)
    center = grid.mean((1, 2))
    moves = np.stack([grid, reads], axis=-2).reshape(-1, 2, 2)
    modulation = modulation[rows, columns].ravel()
    hues = colormaps["Set2"](np.arange(len(rows)) % 8)  # one for each position
    hue_of_tap: Any = np.repeat(hues, grid[0].size // 2, axis=0)
    ax.add_collection(LineCollection(list(moves), colors=hue_of_tap, linewidths=0.8, zorder=2), autolim=False)
    ax.scatter(
        *grid.reshape(-1, 2).T,
        s=12,
        marker="s",
        facecolors="none",
        edgecolors=hue_of_tap,
        linewidths=0.8,
        label="regular grid",
    )
    ax.scatter(*center.T, s=70, marker="+", c=hues, linewidths=1.5, label="output position")
    ax.scatter(
        *reads.reshape(-1, 2).T,
        s=4 + 20 * modulation,
        c=modulation,
        cmap="plasma",
        vmin=0,
        vmax=max(1, modulation.max()),
        edgecolors="white",
        linewidths=0.4,
        zorder=3,
        label="where the taps read",
    )
    return ax


def _modulation(mask: Any, points_shape: tuple[int, ...]) -> np.ndarray:
    """`(Ho, Wo, OG, K)`, ones where there is no mask."""
    *out_spatial, groups, taps, _ = points_shape
    if mask is None:
        return np.ones(points_shape[:-1], np.float32)
    mask = np.asarray(mask, np.float32)
    if mask.shape not in ((*out_spatial, groups * taps), points_shape[:-1]):
        raise ValueError(
            f"mask has shape {mask.shape}; wanted {(*out_spatial, groups * taps)}: one value for each of the {groups} * {taps} "
            f"points of each output position"
        )
    return mask.reshape(points_shape[:-1])


def _positions(at: Any, out_spatial: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the output positions asked for."""
    wanted = f"(row, column) pairs of ints in [0, {out_spatial[0]}) and [0, {out_spatial[1]})"
    positions = np.atleast_2d(np.asarray(at))
    if positions.ndim != 2 or positions.shape[1] != 2 or positions.dtype.kind not in "iu":
        raise ValueError(f"at={at!r} is not understood; wanted one or more {wanted}")
    if (positions < 0).any() or (positions >= out_spatial).any():
        raise ValueError(f"at={at!r} leaves the {out_spatial[0]} x {out_spatial[1]} output positions; wanted {wanted}")
    return positions[:, 0], positions[:, 1]


def _regular_grid(out_spatial, taps, spatial, window, strides, padding, kernel_dilation) -> np.ndarray:
    """`(Ho, Wo, 1, K, 2)`: where the taps of the plain convolution of this geometry read."""
    size = (math.isqrt(taps),) * 2 if window is None else _check.per_axis("window", window, 2, minimum=1)
    if math.prod(size) != taps:
        raise ValueError(
            f"window={window!r}, by default a square, does not have the {taps} taps of points; pass window="
        )
    if strides is None:
        strides = [-(-pixels // positions) for pixels, positions in zip(spatial, out_spatial, strict=True)]
    geometry = {"strides": strides, "padding": padding, "kernel_dilation": kernel_dilation}
    resolved = resolve_window(size, spatial=spatial, **geometry)
    if resolved.out_spatial != tuple(out_spatial):
        raise ValueError(
            f"points has output positions {tuple(out_spatial)}, but a window of {size} over a map of {tuple(spatial)} with "
            f"strides {resolved.strides}, padding {padding!r} and dilation {resolved.dilation} has {resolved.out_spatial}; "
            "pass the strides, padding, kernel_dilation and spatial that the points were made with"
        )
    return np.asarray(sampling_points(jnp.zeros((*out_spatial, taps * 2)), size, spatial=spatial, **geometry))
