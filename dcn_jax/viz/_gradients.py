"""How strongly a node depends on each pixel, and on each place where a layer reads."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dcn_jax._core import checks
from dcn_jax.ops.deform_conv import deform_conv
from dcn_jax.viz import _calls
from dcn_jax.viz._canvas import canvas, check_image, scatter
from dcn_jax.viz._looked import Layer, looked
from dcn_jax.viz._node import Node, value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def effective_receptive_field(model: Any, x: Any, node: Node, *, call: Callable[..., Any] | None = None) -> np.ndarray:
    """How strongly a node of a network depends on each pixel of its image.

        field(q) = ‖∂node / ∂x(q)‖,  over the channels of pixel q

    Args:
        model: an `nnx.Module`, or a pair (linen module, variables).
        x: one image `(H, W, C)`, floating-point.
        node: a function of the model's output for that image, without a batch axis, to a number; or
            an index into that output: `(7, 7, 3)` for channel 3 at row 7, column 7.
        call: how to call the model with a batch of one, if it is not `model(images)`, as in `looked`.

    Returns:
        `(H, W)`.

    Raises:
        ValueError: node does not give one floating-point number.
        TypeError: an argument is of the wrong kind.
        ImportError: Flax is not installed.

    Source: Luo et al. (arXiv 1701.04128); Zhu et al. (arXiv 1811.11168), section 3.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.viz import effective_receptive_field
        >>> model = nnx.Conv(1, 1, (3, 3), kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
        >>> field = effective_receptive_field(model, jnp.ones((8, 8, 1)), node=(4, 4, 0))
        >>> field[2:7, 2:7]
        array([[0., 0., 0., 0., 0.],
               [0., 1., 1., 1., 0.],
               [0., 1., 1., 1., 0.],
               [0., 1., 1., 1., 0.],
               [0., 0., 0., 0., 0.]], dtype=float32)
    """
    images = _calls.batch_of_one(x)

    def response(images: jax.Array) -> jax.Array:
        return value_of(node, _calls.run(model, images, _calls.unchanged, call))

    return _length(jax.grad(response)(images)[0])


def effective_sampling(
    model: Any, x: Any, node: Node, *, plain: bool = False, call: Callable[..., Any] | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where each deformable layer reads, and how strongly a node depends on where that is.

        strength(p0, n) = ‖∂node / ∂p‖,  p = p0 · stride - low + p_n + Δp_n(p0)

    The gradient is that of the whole network above: a point counts if moving it would move the
    node. At a whole-number position, as in a new layer, it is the right-hand one.

    Args:
        model: an `nnx.Module`, or a pair (linen module, variables).
        x: one image `(H, W, C)`, floating-point.
        node: a function of the model's output for that image, without a batch axis, to a number; or
            an index into that output.
        plain: whether Flax's `Conv` count too, as deformable layers whose offsets are zero.
        call: how to call the model with a batch of one, if it is not `model(images)`, as in `looked`.

    Returns:
        For each call of a `DeformConv` (and of a `Conv`, if `plain`), in order, points
        `(*out, OG, K, n)` in pixels of the map that it reads, and their strength `(*out, OG, K)`.
        DCNv3, DCNv4 and attention are left out.

    Raises:
        ValueError: node does not give one floating-point number, or a layer is called several times
            by one trace (in a scan), which cannot be told apart.
        TypeError: an argument is of the wrong kind.
        ImportError: Flax is not installed.

    Source: Zhu et al. (arXiv 1811.11168), section 3.1: effective sampling / bin locations.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DeformConv
        >>> from dcn_jax.viz import effective_sampling
        >>> layer = DeformConv(1, 1, (3, 3), rngs=nnx.Rngs(0))
        >>> ((points, strength),) = effective_sampling(layer, jnp.ones((8, 8, 1)), node=(4, 4, 0))
        >>> points.shape, strength.shape
        ((8, 8, 1, 9, 2), (8, 8, 1, 9))
    """
    images = _calls.batch_of_one(x)
    kinds = ("deform_conv", "conv") if plain else ("deform_conv",)
    layers = [layer for layer in looked(model, x, call=call) if layer.kind in kinds]
    if len({layer.path for layer in layers}) < len(layers) and any(layer.reads is None for layer in layers):
        raise ValueError(_SEVERAL_CALLS)

    def response(moves: list[jax.Array]) -> jax.Array:
        left = iter(list(zip(layers, moves, strict=True)))

        def around(layer_call: _calls.Call) -> Any:
            if layer_call.kind not in kinds:
                return _calls.unchanged(layer_call)
            if (mine := next(left, None)) is None:
                raise ValueError(_SEVERAL_CALLS)
            return (_deformable if layer_call.kind == "deform_conv" else _plain)(layer_call, *mine)

        output = _calls.run(model, images, around, call)
        if next(left, None) is not None:
            raise ValueError(_SEVERAL_CALLS)
        return value_of(node, output)

    shapes = [layer.points.shape for layer in layers]
    # As the layers take them: (*out, OG * K * n).
    moves = [
        jnp.zeros((*shape[:-3], math.prod(shape[-3:])), _dtype(layer))
        for layer, shape in zip(layers, shapes, strict=True)
    ]
    strengths = [_length(g.reshape(shape)) for g, shape in zip(jax.grad(response)(moves), shapes, strict=True)]
    return [(layer.points, strength) for layer, strength in zip(layers, strengths, strict=True)]


def _dtype(layer: Layer) -> Any:
    return np.float32 if layer.offset is None else layer.offset.dtype


def _deformable(layer_call: _calls.Call, layer: Layer, move: jax.Array) -> Any:
    """The result of a deformable layer, with `move` `(*out, OG * K * n)` added to its offsets."""
    base_offset = (3, "base_offset")  # of the arguments that have names alone
    for argument in ((1, "offset"), base_offset):
        given = layer_call.argument(*argument)
        if given is not None:
            if given.shape[-1] != move.shape[-1]:  # a base offset for all taps together
                given = jnp.tile(given, move.shape[-1] // given.shape[-1])
            dtype = jnp.promote_types(given.dtype, move.dtype)
            move = jnp.expand_dims(move, tuple(range(given.ndim - move.ndim)))
            return _calls.unchanged(layer_call.replaced(*argument, given.astype(dtype) + move.astype(dtype)))
    return _calls.unchanged(layer_call.replaced(*base_offset, move))


def _plain(layer_call: _calls.Call, layer: Layer, move: jax.Array) -> Any:
    """The result of a plain layer; its derivative by `move`, which is zero, is that of a deformable one."""
    output = _calls.unchanged(layer_call)
    moved = deform_conv(
        lax.stop_gradient(layer_call.argument(*_calls.MAP["conv"])),
        jnp.asarray(layer.kernel),
        move,
        strides=layer.strides,
        padding=layer.padding,
        kernel_dilation=layer.kernel_dilation,
        padding_mode=layer.padding_mode,
        feature_group_count=layer.feature_group_count,
    ).astype(output.dtype)
    return output + (moved - lax.stop_gradient(moved))


_SEVERAL_CALLS = (
    "a layer is called several times by one trace, as in a scan, so that its calls cannot be told apart; make the model "
    "with a Python loop in place of the scan"
)


def _length(gradient: jax.Array) -> np.ndarray:
    """The length of each vector along the last axis."""
    return np.array(jnp.linalg.norm(gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32)), axis=-1))


def plot_receptive_field(image: Any, field: Any, *, ax: "Axes | None" = None) -> "Axes":
    """Draw over an image how strongly a node depends on each pixel; where it does not, the image stays.

    Args:
        image: `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)`, stretched over the field.
        field: `(H, W)`, from `effective_receptive_field`.
        ax: the Axes to draw on; by default those of a new figure.

    Returns:
        The Axes. The field is the last of `ax.images`, for `colorbar`.

    Raises:
        ValueError: a shape does not fit; the message names it.
        ImportError: matplotlib is not installed.

    Source: Luo et al. (arXiv 1701.04128); Zhu et al. (arXiv 1811.11168), figure 1.

    Example:
        >>> import numpy as np
        >>> from dcn_jax.viz import plot_receptive_field
        >>> ax = plot_receptive_field(np.zeros((16, 16)), np.eye(16))
        >>> ax.figure.savefig("field.png")  # doctest: +SKIP
    """
    image, field = check_image(image), np.asarray(field, float)
    if field.ndim != 2:
        raise ValueError(f"field has shape {field.shape}; wanted (H, W), as effective_receptive_field returns it")
    ax = canvas(image, field.shape, ax)
    top = field.max(initial=0) or 1
    height, width = field.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(field, cmap="inferno", vmin=0, vmax=top, alpha=np.sqrt(field / top), extent=extent)
    return ax


def plot_effective_sampling(
    image: Any,
    points: Any,
    strength: Any,
    *,
    spatial: Sequence[int] | None = None,
    threshold: float = 0.01,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw over an image where a layer reads, the points on which a node depends the larger and brighter.

    Args:
        image: `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)`, stretched over the layer's map.
        points: `(*out, OG, K, 2)`, one layer's from `effective_sampling`.
        strength: `(*out, OG, K)`, of the same layer.
        spatial: `(height, width)` of the map that the layer reads; by default that of the image.
        threshold: points below this share of the greatest strength are left out.
        ax: the Axes to draw on; by default those of a new figure.

    Returns:
        The Axes. The dots are the last of `ax.collections`, for `colorbar`.

    Raises:
        ValueError: a shape does not fit; the message names it.
        ImportError: matplotlib is not installed.

    Source: Zhu et al. (arXiv 1811.11168), figure 1.

    Example:
        >>> import numpy as np
        >>> from dcn_jax.viz import plot_effective_sampling
        >>> points, strength = np.full((4, 4, 1, 9, 2), 2.5), np.ones((4, 4, 1, 9))
        >>> ax = plot_effective_sampling(np.zeros((8, 8)), points, strength)
        >>> ax.figure.savefig("effective.png")  # doctest: +SKIP
    """
    image, points, strength = check_image(image), np.asarray(points, float), np.asarray(strength, float)
    spatial = checks.per_axis("spatial", image.shape[:2] if spatial is None else spatial, 2, minimum=1)
    if points.shape[-1:] != (2,) or points.shape[:-1] != strength.shape:
        raise ValueError(
            f"points has shape {points.shape} and strength {strength.shape}; wanted (*out, OG, K, 2) and (*out, OG, K), "
            "as effective_sampling returns them for each layer"
        )
    shown = strength >= threshold * strength.max(initial=0)
    shown &= np.isfinite(points).all(-1) & (strength > 0)
    ax = canvas(image, spatial, ax)
    scatter(ax, points[shown], strength[shown])
    return ax
