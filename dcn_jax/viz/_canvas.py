"""An image under a map, to draw on; matplotlib loads here, when something is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dcn_jax._core import extras

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_image(image: Any) -> np.ndarray:
    """The image as an array; raise if it is not `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)`."""
    image = np.asarray(image)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (1, 3, 4)):
        raise ValueError(f"image has shape {image.shape}; wanted (H, W), or (H, W, channels) with 1, 3 or 4 channels")
    return image


def canvas(image: np.ndarray, spatial: Sequence[int], ax: "Axes | None") -> "Axes":
    """The Axes, with the image stretched over a map of size `spatial`."""
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError as error:
        raise extras.missing("dcn_jax.viz", "viz") from error

    ax = plt.subplots()[1] if ax is None else ax
    height, width = spatial
    ax.imshow(
        image if image.dtype == np.uint8 else image.astype(np.float32),  # matplotlib knows no bfloat16
        cmap="gray",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )
    ax.set(xlim=(-1.5, width + 0.5), ylim=(height + 0.5, -1.5))
    return ax


def scatter(ax: "Axes", points: np.ndarray, strength: np.ndarray) -> None:
    """Dots at `(P, 2)`, the stronger the larger and brighter, the strongest on top."""
    order = np.argsort(strength, kind="stable")
    top = strength.max(initial=0) or 1
    ax.scatter(
        *points[order].T[::-1],
        s=2 + 22 * strength[order] / top,
        c=strength[order],
        cmap="plasma",
        vmin=0,
        vmax=top,
        linewidths=0,
        zorder=3,
        label="where it reads",
    )
