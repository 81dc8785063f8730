"""What the layer MSDeformAttn shares in linen, nnx and Keras: all but the parameters.

`layer` is the layer of any of them; its options have the same names in all.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dcn_jax._core import checks
from dcn_jax._core.dtypes import wide
from dcn_jax.geometry import Size, int32
from dcn_jax.ops.ms_deform_attn import ms_deform_attn
from dcn_jax.ops.ms_deform_attn.api import check_implementation
from dcn_jax.ops.ms_deform_attn.call import check_method, check_spatial_shapes

# The sizes of a map and the coordinates of a point, by the number of spatial axes.
_SIZES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
_COORDINATES = {1: ("x",), 2: ("x", "y"), 3: ("x", "y", "z")}

# ---- options


def check_options(layer: Any) -> None:
    """Raise if a count is not an int of at least 1, or the heads do not divide the channels."""
    for name in ("embed_dim", "num_heads", "num_levels", "num_axes"):
        checks.count(name, getattr(layer, name))
    if layer.num_axes not in _SIZES:
        raise ValueError(f"num_axes={layer.num_axes}; wanted 1, 2 or 3: the spatial axes of the maps")
    if layer.embed_dim % layer.num_heads:
        raise ValueError(f"num_heads={layer.num_heads} must divide embed_dim={layer.embed_dim}")
    points_per_level(layer)
    check_method(layer.method)
    check_implementation(layer.implementation)


def points_per_level(layer: Any) -> tuple[int, ...]:
    """How many points each level has."""
    if checks.is_int(layer.num_points):
        checks.count("num_points", layer.num_points)
        return (operator.index(layer.num_points),) * layer.num_levels
    return checks.per_level("num_points", layer.num_points, layer.num_levels, minimum=1)


def point_count(layer: Any) -> int:
    """How many points each query has, over all heads and levels."""
    return layer.num_heads * sum(points_per_level(layer))


def wide_dtype(layer: Any) -> Any:
    """The layer's dtype, but at least float32, for locations and weights; None stays None."""
    return None if layer.dtype is None else wide(layer.dtype)


def directions_init(layer: Any) -> Callable[..., jax.Array]:
    """The initializer of the offsets' bias, which gives each head a direction.

    The p-th point of a level lies p steps in its head's direction, the first one step.
    """
    steps = np.concatenate([np.arange(count) + 1 for count in points_per_level(layer)])  # (T,)
    bias = (_directions(layer)[:, None] * steps[:, None]).ravel()

    def init(key, shape, dtype=jnp.float32):
        return jnp.asarray(bias, dtype).reshape(shape)

    return init


def _directions(layer: Any) -> np.ndarray:
    """A direction for each head, stretched to the surface of a cube: `(M, n)`, x first.

    Over two axes the published ones, the angles 2π m / M. Over one axis right and left in turn;
    over three a spiral, whose points are spread evenly over a sphere.
    """
    heads, n = np.arange(layer.num_heads), layer.num_axes
    if n == 1:
        return np.where(heads % 2, -1.0, 1.0)[:, None]
    angles = (2 * np.pi / layer.num_heads if n == 2 else np.pi * (3 - np.sqrt(5))) * heads
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    if n == 3:
        z = 1 - (2 * heads + 1) / layer.num_heads
        directions = np.concatenate([directions * np.sqrt(1 - z**2)[:, None], z[:, None]], axis=-1)
    return directions / np.abs(directions).max(axis=-1, keepdims=True)


# ---- the call


class Arguments(NamedTuple):
    """The arguments of a call, checked."""

    query: jax.Array  # (*batch, Q, E), in the dtype of locations and weights; batch axes may be 1
    reference_points: jax.Array  # (*batch, Q, L, n or 2 n)
    value: jax.Array  # (*batch, S, E)
    spatial_shapes: tuple[tuple[Size, ...], ...]
    padding_mask: jax.Array | None  # (*batch, S)


def check_arguments(layer: Any, query, reference_points, value, spatial_shapes, padding_mask) -> Arguments:
    """The arguments of a call; raise if they do not fit each other or the layer.

    Raises:
        ValueError: a shape does not fit; the message names it.
        TypeError: an argument is of the wrong kind.
    """
    query, value = checks.array("query", query, jnp.floating), checks.array("value", value, jnp.floating)
    shapes = check_spatial_shapes(spatial_shapes)
    if len(shapes) != layer.num_levels or len(shapes[0]) != layer.num_axes:
        sizes = ", ".join(_SIZES[layer.num_axes])
        raise ValueError(
            f"spatial_shapes={shapes} has {len(shapes)} levels of {len(shapes[0])} sizes; wanted ({sizes}) for "
            f"each of num_levels={layer.num_levels}"
        )
    pixels = sum(map(math.prod, shapes))
    if value.ndim < 2 or value.shape[-2:] != (pixels, layer.embed_dim):
        raise ValueError(
            f"value has shape {value.shape}; wanted (*batch, {pixels}, {layer.embed_dim}): the pixels of all levels "
            f"one after another, as spatial_shapes={shapes} has them, and embed_dim channels"
        )
    batch = value.shape[:-2]
    fits = query.ndim >= 2 and query.shape[-1] == layer.embed_dim and checks.broadcasts(query.shape[:-2], batch)
    if not fits:
        raise ValueError(
            f"query has shape {query.shape}; wanted (*batch, Q, {layer.embed_dim}): the batch axes of value, {batch}, "
            "of which any may be 1 and the first may be missing, and embed_dim channels"
        )
    if padding_mask is not None:
        padding_mask = _check_padding_mask(padding_mask, value)
    reference_points = _check_reference_points(layer, reference_points, (*batch, query.shape[-2]))
    query = lax.expand_dims(query, range(value.ndim - query.ndim))
    query = query.astype(wide_dtype(layer) or wide(query.dtype))
    return Arguments(query, reference_points, value, shapes, padding_mask)


def _check_reference_points(layer: Any, given: Any, queries: tuple[Size, ...]) -> jax.Array:
    """A reference point for each query and level: `(*batch, Q, L, n or 2 n)`."""
    given = checks.array("reference_points", given, jnp.floating)
    axes, coordinates = given.shape[:-1], given.shape[-1:]
    n, wanted = layer.num_axes, (*queries, layer.num_levels)
    fits = len(axes) >= 2 and axes[-2] == wanted[-2] and checks.broadcasts(axes, wanted)
    if not fits or coordinates not in ((n,), (2 * n,)):
        point = ", ".join(_COORDINATES[n])
        box = ", ".join((*_COORDINATES[n], *reversed(_SIZES[n])))
        raise ValueError(
            f"reference_points has shape {given.shape}; wanted {(*wanted, f'{n} or {2 * n}')}: ({point}) or ({box}) "
            f"for each query and each of num_levels={layer.num_levels}; the axis of levels may be 1, batch axes 1 or "
            "missing"
        )
    return jnp.broadcast_to(given, (*wanted, *coordinates))


def _check_padding_mask(given: Any, value: jax.Array) -> jax.Array:
    if not hasattr(given, "shape") or getattr(given, "dtype", None) != jnp.bool_:
        raise TypeError(
            f"padding_mask is a {type(given).__name__} of dtype {getattr(given, 'dtype', None)}; wanted an array of "
            "bools, True where a pixel is padding: padding_mask.astype(bool)"
        )
    if given.shape != value.shape[:-1]:
        raise ValueError(
            f"padding_mask has shape {given.shape}; wanted {value.shape[:-1]}: one bool for each pixel of value"
        )
    return jnp.asarray(given)


# ---- the arithmetic


def place_points(layer: Any, offset: jax.Array, arguments: Arguments) -> jax.Array:
    """Where each point reads, from offsets `(*batch, Q, M · T · n)`: `(*batch, Q, M, L, P, n)`.

    An offset of 1 is one pixel of the level; with a box, half its width or height divided by P.
    """
    n = layer.num_axes
    dtype = wide(offset.dtype, arguments.reference_points.dtype)
    offset, reference = offset.astype(dtype), arguments.reference_points.astype(dtype)
    centre = reference[..., :n]
    if reference.shape[-1] == 2 * n:  # a box
        shares = jnp.asarray([[0.5 / count] for count in points_per_level(layer)], dtype)  # (L, 1)
        step = reference[..., n:] * jnp.broadcast_to(shares, centre.shape)
    else:
        sizes = [jnp.asarray(int32(size), dtype) for shape in arguments.spatial_shapes for size in reversed(shape)]
        step = 1 / jnp.broadcast_to(jnp.stack(sizes).reshape(-1, n), centre.shape)
    offset = offset.reshape(*offset.shape[:-1], *_points_shape(layer), n)
    return _each_point(layer, centre) + _each_point(layer, step) * offset


def _each_point(layer: Any, per_level: jax.Array) -> jax.Array:
    """What a level has, for each of its points: `(…, L, n)` -> `(…, 1, L, 1, n)` or `(…, 1, T, n)`."""
    if checks.is_int(layer.num_points):
        return per_level[..., None, :, None, :]
    counts = np.array(points_per_level(layer))
    return jnp.repeat(per_level, counts, axis=-2, total_repeat_length=int(counts.sum()))[..., None, :, :]


def softmax(layer: Any, logits: jax.Array, arguments: Arguments) -> jax.Array:
    """The softmax over all points of a head: `(*batch, Q, M · T)` -> `(*batch, Q, M, L, P)`."""
    points = sum(points_per_level(layer))  # and not -1, which no queries would leave undecided
    each = jax.nn.softmax(logits.reshape(*logits.shape[:-1], layer.num_heads, points), axis=-1)
    each = each.reshape(*logits.shape[:-1], *_points_shape(layer))
    queries = arguments.reference_points.shape[:-2]  # images share the queries where its batch axes are 1
    return jnp.broadcast_to(each, (*queries, *_points_shape(layer)))


def _points_shape(layer: Any) -> tuple[int, ...]:
    """(M, L, P), or (M, T) if `num_points` is given for each level."""
    if checks.is_int(layer.num_points):
        return layer.num_heads, layer.num_levels, layer.num_points
    return layer.num_heads, sum(points_per_level(layer))


def attend(layer: Any, value: jax.Array, arguments: Arguments, locations: jax.Array, weights: jax.Array) -> jax.Array:
    """The op on the projected `value` `(*batch, S, E)`, zero at padding: `(*batch, Q, E)`."""
    if arguments.padding_mask is not None:
        value = jnp.where(arguments.padding_mask[..., None], jnp.zeros((), value.dtype), value)
    return ms_deform_attn(
        value.reshape(*value.shape[:-1], layer.num_heads, value.shape[-1] // layer.num_heads),
        arguments.spatial_shapes,
        locations,
        weights,
        points_per_level=None if checks.is_int(layer.num_points) else layer.num_points,
        method=layer.method,
        implementation=layer.implementation,
    )
