"""Where the queries of an attention look."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dcn_jax._core import checks
from dcn_jax.viz._canvas import canvas, check_image
from dcn_jax.viz._looked import Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_attention(
    image: Any,
    layer: Layer,
    query: int | Sequence[int],
    *,
    head: int | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw over an image where queries of an `MSDeformAttn` look, on which level, how strongly.

    Each level of the pyramid has a colour, which `ax.legend()` names. The area of a dot is the
    weight of its point, which sum to one over the points of a head.

    Args:
        image: `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)`; all levels lie over the whole of it.
        layer: an "attention" among what `looked` returned.
        query: which queries, one or several.
        head: which head; by default all of them.
        ax: the Axes to draw on; by default those of a new figure.

    Returns:
        The Axes, of the image's pixels. `ax.collections` has an entry for each level.

    Raises:
        ValueError: a query or head does not exist, `layer` is none of attention, or `image` is none.
        TypeError: `layer` is not a `Layer`, or `query` or `head` is no int.
        ImportError: matplotlib is not installed.

    Source: Zhu et al., Deformable DETR (arXiv 2010.04159), figure 6.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.nnx import MSDeformAttn
        >>> from dcn_jax.viz import looked, plot_attention
        >>> attention = MSDeformAttn(8, num_heads=2, num_levels=1, num_points=3, rngs=nnx.Rngs(0))
        >>> def look_at_the_middle(attention, images):
        ...     pixels = images.reshape(1, 16, 8)
        ...     return attention(pixels, jnp.full((1, 16, 1, 2), 0.5), pixels, ((4, 4),))
        >>> image = jnp.ones((4, 4, 8))
        >>> (layer,) = looked(attention, image, call=look_at_the_middle)
        >>> ax = plot_attention(image[..., 0], layer, query=5)
        >>> ax.figure.savefig("attention.png")  # doctest: +SKIP
    """
    image = check_image(image)
    if not isinstance(layer, Layer) or layer.locations is None or layer.weights is None:
        raise TypeError(f"layer is {layer!r}; wanted an attention among what looked(model, x) returned")
    queries, heads = layer.weights.shape[:2]
    rows = _chosen("query", query, queries)
    columns = list(range(heads)) if head is None else _chosen("head", head, heads)

    height, width = image.shape[:2]
    chosen = np.ix_(rows, columns)
    count = len(rows) * len(columns)
    # All points of the levels one after another: (N, P1 + P2 + …)
    places = layer.locations[chosen].astype(float).reshape(count, -1, 2) * (width, height) - 0.5
    weights = layer.weights[chosen].astype(float).reshape(count, -1)
    ax = canvas(image, (height, width), ax)
    ends = np.cumsum(layer.points_per_level)[:-1]
    levels = zip(layer.spatial_shapes, np.split(places, ends, axis=1), np.split(weights, ends, axis=1), strict=True)
    for level, (shape, places, weights) in enumerate(levels):
        ax.scatter(
            *places.reshape(-1, 2).T,
            s=240 * weights.ravel(),
            color=f"C{level}",
            edgecolors="white",
            linewidths=0.4,
            zorder=3,
            label=f"level {level} ({shape[0]} × {shape[1]})",
        )
    return ax


def _chosen(name: str, value: Any, count: int) -> list[int]:
    """The one or several indices that `value` names."""
    indices = [value] if checks.is_int(value) else value
    if not isinstance(indices, Sequence | np.ndarray) or not len(indices) or not all(map(checks.is_int, indices)):
        raise TypeError(f"{name}={value!r} is not understood; wanted an int in [0, {count}), or several")
    if any(not 0 <= index < count for index in indices):
        raise ValueError(f"{name}={value!r} does not exist; wanted an int in [0, {count}), or several")
    return [int(index) for index in indices]
