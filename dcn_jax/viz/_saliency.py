"""A small region of an image that is enough for a node's response."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dcn_jax.viz import _calls
from dcn_jax.viz._canvas import canvas, check_image
from dcn_jax.viz._node import Node, value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TILE = 2  # pixels along each side of the smallest part that is kept or greyed out
_STEPS, _RATE = 200, 0.1  # of the search by gradients
_SIZES = 64  # how many sizes of the region are tried after it
_BLOCKS = (8, 4, 2, 1)  # tiles along each side of what is greyed out at once


def saliency_region(
    model: Any,
    x: Any,
    node: Node,
    *,
    error: float = 0.1,
    key: jax.Array,
    call: Callable[..., Any] | None = None,
) -> tuple[np.ndarray, float]:
    """A small region of an image that, with all else greyed out, gives a node's response to within a bound.

        |node(m · x + (1 - m) · x̄) - node(x)| ≤ error · |node(x)|,  with few pixels m = 1

    x̄ is the image's mean colour. A soft m is found by gradients (Adam). Of its tiles of 2×2
    pixels, the strongest that are enough are kept. Then blocks of tiles, large ones first, are
    greyed out one after another where the bound allows it, until no single tile can be. So each
    tile left is needed, though another region may be smaller.

    The model is called about as often as there are tiles, times the rounds of the last step (a few),
    under `jax.jit`: seconds for an image of 32×32 pixels, minutes for a large network and image.

    Args:
        model: an `nnx.Module`, or a pair (linen module, variables), in evaluation mode.
        x: one image `(H, W, C)`, floating-point.
        node: a function of the model's output for that image, without a batch axis, to a number; or
            an index into that output.
        error: the bound, as a share of the node's response to the whole image.
        key: of `jax.random`; from it the search starts. Equal keys give equal regions.
        call: how to call the model with a batch of one, if it is not `model(images)`, as in `looked`.

    Returns:
        The region `(H, W)`, of bools, and the error that it reaches. Its area is `mask.mean()`.

    Raises:
        ValueError: error is not positive and finite, the node's response is zero or not finite, or
            node does not give one floating-point number.
        TypeError: an argument is of the wrong kind.
        ImportError: Flax or Optax is not installed.

    Source: Zhu et al. (arXiv 1811.11168), section 3.1: error-bounded saliency regions.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.viz import saliency_region
        >>> model = nnx.Conv(1, 1, (4, 4), padding="VALID", kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
        >>> image = jax.random.uniform(jax.random.key(0), (16, 16, 1)) + jnp.linspace(0, 4, 16)[:, None]
        >>> mask, error = saliency_region(model, image, (4, 8, 0), error=0.001, key=jax.random.key(1))
        >>> int(mask.sum()), int(mask[4:8, 8:12].sum()), error <= 0.001
        (16, 16, True)
    """
    images = _calls.batch_of_one(x)
    if images.ndim != 4:
        raise ValueError(f"x has shape {images.shape[1:]}; wanted one image (H, W, C)")
    if not 0 < error < np.inf:
        raise ValueError(f"error={error!r}; wanted a positive share of the node's response, such as 0.1")

    def response(images: jax.Array) -> jax.Array:
        value = value_of(node, _calls.run(model, images, _calls.unchanged, call))
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))

    whole = float(jax.jit(response)(images))
    if whole == 0 or not np.isfinite(whole):
        raise ValueError(
            f"node is {whole} for the whole image, and a share of that is no bound; wanted a node with another response"
        )
    tiles, reached = jax.jit(functools.partial(_search, response, error))(images, key)
    return _on_pixels(np.asarray(tiles), images.shape[1:3]) > 0, float(reached)


def _search(response: Any, error: float, images: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tiles to keep, of zeros and ones, and the error that they reach."""
    grey = images.mean((1, 2), keepdims=True)
    whole = response(images)

    def error_of(tiles: jax.Array) -> jax.Array:
        mask = _on_pixels(tiles, images.shape[1:3])[None, :, :, None].astype(images.dtype)
        return jnp.abs(response(mask * images + (1 - mask) * grey) - whole) / jnp.abs(whole)

    shape = tuple(-(-size // TILE) for size in images.shape[1:3])
    soft = _by_gradients(error_of, error, shape, key)
    tiles = _strongest_enough(error_of, error, soft)
    tiles = _pruned(error_of, error, tiles, soft)
    return tiles, error_of(tiles)


def _on_pixels(tiles: Any, spatial: tuple[int, ...]) -> Any:
    """Values of tiles on the pixels `(H, W)` of the image; the last tiles may be cut."""
    return tiles.repeat(TILE, axis=0).repeat(TILE, axis=1)[: spatial[0], : spatial[1]]


def _by_gradients(error_of: Any, error: float, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """A soft region: values in (0, 1) of tiles, few of them large, whose error lies within half the bound."""
    import optax  # which Flax needs too, so it is there

    optimizer = optax.adam(_RATE)

    def loss(logits: jax.Array) -> jax.Array:
        tiles = jax.nn.sigmoid(logits)
        return tiles.mean() + jnp.square(jnp.maximum(error_of(tiles) / error - 0.5, 0))

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits), state)
        return (logits + updates, state), None

    logits = 2 + 0.1 * jax.random.normal(key, shape)
    (logits, _), _ = lax.scan(step, (logits, optimizer.init(logits)), length=_STEPS)
    return jax.nn.sigmoid(logits)


def _strongest_enough(error_of: Any, error: float, soft: jax.Array) -> jax.Array:
    """The fewest of the strongest tiles that are within the bound, of `_SIZES` sizes tried."""
    rank = jnp.argsort(jnp.argsort(-soft.ravel())).reshape(soft.shape)  # 0 is the strongest
    # The last of them is the whole image, whose error is zero.
    sizes = jnp.ceil(jnp.linspace(0, 1, _SIZES + 1)[1:] ** 2 * soft.size).astype(int)
    enough = lax.map(lambda size: error_of((rank < size).astype(soft.dtype)) <= error, sizes)
    return (rank < sizes[jnp.argmax(enough)]).astype(soft.dtype)


def _pruned(error_of: Any, error: float, tiles: jax.Array, soft: jax.Array) -> jax.Array:
    """The tiles without those that the bound allows to grey out: in blocks, then one by one until none is left."""
    blocks = jnp.array(_BLOCKS)

    def sweep(state):
        tiles, _, count = state
        return _sweep(error_of, error, tiles, soft, blocks[jnp.minimum(count, len(blocks) - 1)]), tiles, count + 1

    def unfinished(state):
        tiles, before, count = state
        return (count < len(blocks)) | (tiles != before).any()

    return lax.while_loop(unfinished, sweep, (tiles, tiles, jnp.int32(0)))[0]


def _sweep(error_of: Any, error: float, tiles: jax.Array, soft: jax.Array, block: jax.Array) -> jax.Array:
    """Grey out each block of `block` × `block` tiles, the weakest first, where the rest stays within the bound."""
    rows, columns = (jnp.arange(size) // block for size in tiles.shape)
    number = rows[:, None] * tiles.shape[1] + columns[None]  # of each tile's block
    strength = jnp.zeros(tiles.size).at[number].add(tiles * soft)

    def visit(tiles, chosen):
        without = jnp.where(number == chosen, 0, tiles)
        allowed = lax.cond((without != tiles).any(), lambda: error_of(without) <= error, lambda: jnp.zeros((), bool))
        return jnp.where(allowed, without, tiles), None

    return lax.scan(visit, tiles, jnp.argsort(strength))[0]


def plot_saliency_region(image: Any, mask: Any, *, ax: "Axes | None" = None) -> "Axes":
    """Draw an image with all but a region greyed out, as the network saw it, and the region's outline.

    Args:
        image: `(H, W)`, `(H, W, 1)` or `(H, W, 3)`, for which the region was found.
        mask: `(H, W)` of bools, from `saliency_region`.
        ax: the Axes to draw on; by default those of a new figure.

    Returns:
        The Axes.

    Raises:
        ValueError: a shape does not fit; the message names it.
        ImportError: matplotlib is not installed.

    Source: Zhu et al. (arXiv 1811.11168), figure 1.

    Example:
        >>> import numpy as np
        >>> from dcn_jax.viz import plot_saliency_region
        >>> mask = np.zeros((16, 16), bool)
        >>> mask[4:8, 6:12] = True
        >>> ax = plot_saliency_region(np.random.default_rng(0).random((16, 16)), mask)
        >>> ax.figure.savefig("region.png")  # doctest: +SKIP
    """
    image, mask = check_image(image), np.asarray(mask)
    if mask.shape != image.shape[:2] or mask.dtype != bool:
        raise ValueError(
            f"mask has shape {mask.shape} and dtype {mask.dtype}; wanted {image.shape[:2]} bools, as saliency_region "
            "returns them for this image"
        )
    kept = mask.reshape(mask.shape + (1,) * (image.ndim - 2))
    grey = image.mean((0, 1), keepdims=True, dtype=np.float32)
    shown = np.where(kept, image, grey)
    ax = canvas(shown.astype(image.dtype), mask.shape, ax)
    if image.shape[2:] in ((), (1,)):  # grey is the mean of the whole image's range
        ax.images[-1].set_clim(float(image.min()), float(image.max()))
    # A pixel ends half-way to the next; a border of zeros closes the outline at the image's edge.
    outline = np.pad(mask.repeat(8, 0).repeat(8, 1), 8).astype(float)
    along = [(np.arange(size) - 8 + 0.5) / 8 - 0.5 for size in outline.shape]
    ax.contour(along[1], along[0], outline, levels=[0.5], colors="C1", linewidths=1.2)
    return ax
