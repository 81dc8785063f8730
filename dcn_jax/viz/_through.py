"""What an output position reads through several stacked layers."""

import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dcn_jax._core import checks
from dcn_jax.viz._canvas import canvas, check_image, scatter
from dcn_jax.viz._looked import Layer
from dcn_jax.viz._points import into_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def sampling_through(
    layers: Sequence[Layer],
    at: int | Sequence[int],
    *,
    rounded: bool = False,
    merge: bool = False,
    max_points: int = 20_000,
) -> tuple[np.ndarray, np.ndarray]:
    """The points of the first map that an output position reads through stacked layers, and their weights.

        weight(path) = Π_layers  Δm · g,   g = Π_a max(0, 1 - |p_a - q_a|)

    A path goes from the output position through one tap of each layer to a point of the first map.
    Δm is the modulation of its tap, 1 without. Between two layers, a reading at a fractional place
    p stands on up to 2ⁿ neighbours q, each with its share g; each is a path of its own. The kernels'
    weights are not counted in. One plain 3×3 layer gives nine weights of 1, n layers 9ⁿ.

    The last of `layers` is the one whose output position is `at`. From there the way back to the
    first map follows what each layer reads. Where it reads the results of several (a residual sum,
    a concatenation), the way with the most deformable layers is followed, of these the longest: the
    branch, not the shortcut. What lies between layers is taken to work position by position, as
    norms and activations do.

    Args:
        layers: what `looked` returned, or a part of it, of any number n of spatial axes.
        at: the output position of the last layer, n ints.
        rounded: whether a reading between layers stands on its nearest pixel alone, as in the
            papers' pictures; at a tie on the even one.
        merge: whether the paths that meet in a pixel between two layers become one, with the sum of
            their weights. There are far fewer then, and nothing is lost but how they came there.
        max_points: how many paths are followed at most. After each layer the strongest go on, and
            a warning says so.

    Returns:
        Points `(P, n)` in pixels of the map that the first layer reads, and weights `(P,)`, the
        strongest first. Points outside a map with zeros beyond its border are there too, and read
        zero; paths that leave a map between two layers end there.

    Raises:
        ValueError: `at` or an option does not fit, there is an attention on the way, or positions
            do not correspond between two layers, because something resizes the map.
        TypeError: `layers` is not made of `Layer`.

    Source: Dai et al. (arXiv 1703.06211), figure 5, of three layers, with rounded positions.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DeformConv
        >>> from dcn_jax.viz import looked, sampling_through
        >>> half = nnx.initializers.constant(0.5)  # each tap reads half a pixel further down and right
        >>> layer = DeformConv(1, 1, (3, 3), modulated=False, offset_bias_init=half, rngs=nnx.Rngs(0))
        >>> points, weights = sampling_through(looked(layer, jnp.ones((8, 8, 1))), at=(4, 4))
        >>> points[0], weights
        (array([3.5, 3.5]), array([1., 1., 1., 1., 1., 1., 1., 1., 1.]))
    """
    way = _way_back(layers)
    checks.count("max_points", max_points)
    paths = Paths(_position(at, way[0]), np.ones(1))
    strongest = False
    for layer, after in zip(way, [*way[1:], None], strict=True):
        paths = _through_taps(paths, layer)
        if after is not None:
            paths = _onto_pixels(paths, layer, rounded)
            paths = _merged(paths) if merge else paths
        strongest |= len(paths.weights) > max_points
        paths = _strongest(paths, max_points)
    if strongest:
        warnings.warn(
            f"sampling_through: after each layer only the strongest {max_points} paths were followed; raise max_points, "
            "or pass merge=True, which joins the paths that meet in a pixel",
            stacklevel=2,
        )
    points = into_map(paths.points, way[-1].spatial, way[-1].padding_mode)
    return points, paths.weights


class Paths(NamedTuple):
    """Where paths have come, and how strong they are."""

    points: np.ndarray  # (P, n), in pixels
    weights: np.ndarray  # (P,)


def _way_back(layers: Sequence[Layer]) -> list[Layer]:
    """The layers from the last one back to the first map."""
    layers = list(layers)
    if not layers or not all(isinstance(layer, Layer) for layer in layers):
        raise TypeError("layers is empty or not made of Layer; wanted what looked(model, x) returned, or a part of it")
    ways: list[list[Layer]] = []
    for place, layer in enumerate(layers):
        before = [ways[other] for other in range(place) if _is_read(layers, other, place)]
        # Of equal ways the one that was computed last.
        longest = max(reversed(before), key=_depth, default=[])
        ways.append([layer, *longest])
    for layer, before in itertools.pairwise(ways[-1]):
        _check_step(before, layer)
    if ways[-1][-1].kind == "attention":
        raise ValueError(_ATTENTION.format(ways[-1][-1].path))
    return ways[-1]


_ATTENTION = (
    "{} is an attention, whose queries have no place in a map; leave it out of layers, and draw it by plot_attention"
)


def _is_read(layers: list[Layer], other: int, place: int) -> bool:
    """Whether the layer at `place` reads the result of the one at `other`; if that is not known, of the one before."""
    reads = layers[place].reads
    return other == place - 1 if reads is None else layers[other].index in reads


def _depth(way: list[Layer]) -> tuple[int, int]:
    return sum(layer.offset is not None for layer in way), len(way)


def _check_step(before: Layer, layer: Layer) -> None:
    """Raise if positions of the result of `before` are not those of the map that `layer` reads."""
    for each in (before, layer):
        if each.kind == "attention":
            raise ValueError(_ATTENTION.format(each.path))
    if before.output.shape[:-1] != layer.spatial:
        raise ValueError(
            f"{layer.path} reads a map of {layer.spatial}, but {before.path} before it makes one of "
            f"{before.output.shape[:-1]}: something between them, such as a pooling, moves positions; look through the "
            f"layers from {layer.path} on, layers[{layer.index}:]"
        )


def _position(at: Any, last: Layer) -> np.ndarray:
    """`at` as `(1, n)`; raise if it is no output position of the last layer."""
    sizes = last.output.shape[:-1]
    position = np.atleast_1d(np.asarray(at))
    fits = position.shape == (len(sizes),) and position.dtype.kind in "iu"
    if not fits or (position < 0).any() or (position >= sizes).any():
        raise ValueError(f"at={at!r} is no output position of {last.path}; wanted {len(sizes)} ints within {sizes}")
    return position[None].astype(float)


def _through_taps(paths: Paths, layer: Layer) -> Paths:
    """From output positions `(P, n)` to where the taps read: `(P * OG * K, n)`, in pixels of the layer's map."""
    index = tuple(paths.points.astype(int).T)
    points = layer.points[index]  # (P, OG, K, n)
    weights = np.broadcast_to(paths.weights[:, None, None], points.shape[:-1])
    if layer.mask is not None:
        weights = weights * layer.mask[index]
    points, weights = points.reshape(-1, points.shape[-1]), weights.ravel()
    near = np.isfinite(points).all(-1)  # an offset of inf reads nothing
    return Paths(points[near], weights[near])


def _onto_pixels(paths: Paths, layer: Layer, rounded: bool) -> Paths:
    """From points to the pixels of the layer's map that they stand on, each with its share."""
    rank = len(layer.window)
    below = np.floor(paths.points)
    fraction = paths.points - below
    if rounded:
        pixels, shares = np.round(paths.points)[:, None], np.ones((len(below), 1))
    else:
        corners = np.array(list(itertools.product((0, 1), repeat=rank)))  # (2ⁿ, n)
        pixels = below[:, None] + corners  # (P, 2ⁿ, n)
        shares = np.where(corners == 1, fraction[:, None], 1 - fraction[:, None]).prod(-1)
    pixels = into_map(pixels, layer.spatial, layer.padding_mode)
    read = ((pixels >= 0) & (pixels < layer.spatial)).all(-1) & (shares > 0)
    return Paths(pixels[read], (paths.weights[:, None] * shares)[read])


def _merged(paths: Paths) -> Paths:
    """Paths that are at one place as one path."""
    points, which = np.unique(paths.points, axis=0, return_inverse=True)
    return Paths(points, np.bincount(which.ravel(), paths.weights, len(points)))


def _strongest(paths: Paths, count: int) -> Paths:
    """The strongest paths, at most `count`, the strongest first and equals in the order of the taps."""
    order = np.argsort(-np.abs(paths.weights), kind="stable")[:count]
    return Paths(paths.points[order], paths.weights[order])


def plot_sampling_through(
    image: Any,
    points: Any,
    weights: Any,
    *,
    spatial: Sequence[int] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw over an image the points that an output position reads through stacked layers.

    The stronger a point, the larger and brighter its dot. The strongest are drawn last.

    Args:
        image: `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)`, stretched over the first map.
        points: `(P, 2)`, from `sampling_through`.
        weights: `(P,)`, from `sampling_through`.
        spatial: `(height, width)` of the map that the first layer reads; by default of the image.
        ax: the Axes to draw on; by default those of a new figure.

    Returns:
        The Axes. The dots are the last of `ax.collections`, for `colorbar`.

    Raises:
        ValueError: a shape does not fit; the message names it.
        ImportError: matplotlib is not installed.

    Source: Dai et al. (arXiv 1703.06211), figure 5.

    Example:
        >>> import numpy as np
        >>> from dcn_jax.viz import plot_sampling_through
        >>> ax = plot_sampling_through(np.zeros((16, 16)), np.array([[3.5, 4.0], [8.0, 9.0]]), np.array([1.0, 0.5]))
        >>> ax.figure.savefig("through.png")  # doctest: +SKIP
    """
    image, points, weights = check_image(image), np.asarray(points, float), np.asarray(weights, float)
    spatial = checks.per_axis("spatial", image.shape[:2] if spatial is None else spatial, 2, minimum=1)
    if points.ndim != 2 or points.shape[1] != 2 or weights.shape != points.shape[:1]:
        raise ValueError(
            f"points has shape {points.shape} and weights {weights.shape}; wanted (P, 2) and (P,), as sampling_through "
            "returns them for a model of two spatial axes"
        )
    ax = canvas(image, spatial, ax)
    scatter(ax, points, np.abs(weights))
    return ax
