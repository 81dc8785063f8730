"""A picture of where the taps of a deformable convolution read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from dcn_jax._core import checks
from dcn_jax.geometry import Padding, Window, check_offset_shape, resolve_window, sampling_points
from dcn_jax.viz._canvas import canvas, check_image
from dcn_jax.viz._points import into_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_sampling(
    image: Any,
    offset: Any,
    mask: Any = None,
    *,
    window: Sequence[int],
    at: Sequence[int] | Sequence[Sequence[int]],
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    padding_mode: str | Sequence[str] = "zeros",
    spatial: Sequence[int] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw over an image the regular taps of some output positions, and where they really read.

        a square at p0 · stride - low + p_n · dilation;  a dot at the same place + Δp_n(p0);  a line between

    It is the picture of the papers. The larger its modulation, the larger and brighter a dot.
    Squares and lines of one output position have one colour.

    The artists have labels, for `ax.legend()`; the dots are the last of `ax.collections`, for
    `colorbar`. The view is the map and one pixel around it. `ax.autoscale()` shows the dots
    outside it too, all of which read zero. With another `padding_mode` than "zeros" each dot lies
    in the map, where its tap reads.

    Args:
        image: `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)`, the background. It is stretched
            over the map that the layer reads, so it may be larger than that map.
        offset: `(Ho, Wo, OG * K * 2)` for one image, in pixels of that map, as layers sow it.
        mask: `(Ho, Wo, OG * K)`, the modulation, as layers sow it; None is 1 everywhere.
        window: the kernel's size along each of the two axes; K is its product.
        at: the output positions to draw, `[(row, column), …]`, or one (row, column).
        strides: of the layer; one for both axes, or one per axis.
        padding: of the layer: "SAME", "VALID", "CIRCULAR", "REFLECT", an int, or one int or (low,
            high) pair per axis.
        kernel_dilation: of the layer; one for both axes, or one per axis.
        padding_mode: of the layer: what lies beyond the border, one name or one per axis.
        spatial: `(height, width)` of the map that the layer reads; by default that of the image.
        ax: the Axes to draw on; by default those of a new figure.

    Returns:
        The Axes. To see them call `matplotlib.pyplot.show()` or `ax.figure.savefig(…)`.

    Raises:
        ValueError: a shape or a position does not fit; the message names it.
        TypeError: an option is of the wrong kind.
        ImportError: matplotlib is not installed.

    Source: Dai et al. (arXiv 1703.06211), figures 5, 6; Zhu et al. (arXiv 1811.11168), figure 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from dcn_jax.viz import plot_sampling
        >>> offset = jnp.full((16, 16, 18), 0.5)
        >>> ax = plot_sampling(jnp.zeros((16, 16)), offset, window=(3, 3), at=[(4, 4), (10, 12)])
        >>> ax.figure.savefig("sampling.png")  # doctest: +SKIP
    """
    image, offset = check_image(image), jnp.asarray(np.asarray(offset), jnp.float32)
    spatial = checks.per_axis("spatial", image.shape[:2] if spatial is None else spatial, 2, minimum=1)
    geometry = {"strides": strides, "padding": padding, "kernel_dilation": kernel_dilation, "spatial": spatial}
    resolved = resolve_window(checks.per_axis("window", window, 2, minimum=1), padding_mode=padding_mode, **geometry)
    _check_offset(offset.shape, resolved)
    modulation = _modulation(mask, offset.shape, resolved)
    rows, columns = _positions(at, resolved.out_spatial)

    # (P, OG, K, 2) for the P positions of `at`
    reads = np.asarray(sampling_points(offset, resolved.size, **geometry))[rows, columns]
    reads = into_map(reads, spatial, resolved.padding_mode)
    regular = np.asarray(sampling_points(jnp.zeros_like(offset), resolved.size, **geometry))[rows, columns]
    ax = canvas(image, spatial, ax)
    _draw(ax, regular[..., ::-1], reads[..., ::-1], modulation[rows, columns])
    return ax


def _check_offset(shape: tuple[int, ...], window: Window) -> None:
    """Raise if `shape` is not that of the offsets of one image."""
    if len(shape) != 3:
        raise ValueError(
            f"offset has shape {shape}; wanted (Ho, Wo, OG * {window.taps} * 2), for one image with two spatial "
            "axes: for the first image of a batch, offset[0]"
        )
    try:
        check_offset_shape(shape, window)
    except ValueError as error:
        raise ValueError(
            f"{error}; pass the window, strides, padding and kernel_dilation of the layer, and the spatial size of the "
            f"map that it reads (now {window.spatial})"
        ) from None


def _modulation(mask: Any, offset_shape: tuple[int, ...], window: Window) -> np.ndarray:
    """The modulation `(Ho, Wo, OG * K)`; ones if `mask` is None."""
    wanted = (*window.out_spatial, offset_shape[-1] // 2)
    if mask is None:
        return np.ones(wanted, np.float32)
    mask = np.asarray(mask, np.float32)
    if mask.shape != wanted:
        raise ValueError(
            f"mask has shape {mask.shape}; wanted {wanted}: one value for each of the {wanted[-1] // window.taps} * "
            f"{window.taps} points of each output position"
        )
    return mask


def _positions(at: Any, out_spatial: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of the output positions `at`."""
    wanted = f"(row, column) pairs of ints in [0, {out_spatial[0]}) and [0, {out_spatial[1]})"
    positions = np.atleast_2d(np.asarray(at))
    if positions.ndim != 2 or positions.shape[1] != 2 or positions.dtype.kind not in "iu":
        raise ValueError(f"at={at!r} is not understood; wanted one or more {wanted}")
    if (positions < 0).any() or (positions >= out_spatial).any():
        raise ValueError(
            f"at={at!r} lies outside the {out_spatial[0]} x {out_spatial[1]} output positions; wanted {wanted}"
        )
    return positions[:, 0], positions[:, 1]


def _draw(ax: "Axes", regular: np.ndarray, reads: np.ndarray, modulation: np.ndarray) -> None:
    """Draw P positions: squares and dots at `(P, OG, K, 2)`, as (x, y); modulation `(P, OG * K)`."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    hues = colormaps["Set2"](np.arange(len(regular)) % 8)  # one for each position
    hue_of_tap: Any = np.repeat(hues, modulation.shape[1], axis=0)
    moves = np.stack([regular, reads], axis=-2).reshape(-1, 2, 2)
    ax.add_collection(LineCollection(list(moves), colors=hue_of_tap, linewidths=0.8, zorder=2), autolim=False)
    ax.scatter(
        *regular.reshape(-1, 2).T,
        s=12,
        marker="s",
        facecolors="none",
        edgecolors=hue_of_tap,
        linewidths=0.8,
        label="regular grid",
    )
    ax.scatter(*regular.mean((1, 2)).T, s=70, marker="+", c=hues, linewidths=1.5, label="output position")
    ax.scatter(
        *reads.reshape(-1, 2).T,
        s=4 + 20 * modulation.ravel(),
        c=modulation.ravel(),
        cmap="plasma",
        vmin=0,
        vmax=max(1, modulation.max()),
        edgecolors="white",
        linewidths=0.4,
        zorder=3,
        label="where the taps read",
    )
