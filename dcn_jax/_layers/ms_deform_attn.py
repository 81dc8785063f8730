"""What the layer MSDeformAttn shares in linen and nnx: all but the parameters.

`layer` is the layer of either framework; its options have the same names in both.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcn_jax._core import checks
from dcn_jax._core.dtypes import wide
from dcn_jax.geometry import Size, int32
from dcn_jax.ops.ms_deform_attn import ms_deform_attn
from dcn_jax.ops.ms_deform_attn.call import check_spatial_shapes

# ---- options


def check_options(layer: Any) -> None:
    """Raise if a count is not an int of at least 1, or the heads do not divide the channels."""
    for name in ("embed_dim", "num_heads", "num_levels"):
        checks.count(name, getattr(layer, name))
    if layer.embed_dim % layer.num_heads:
        raise ValueError(f"num_heads={layer.num_heads} must divide embed_dim={layer.embed_dim}")
    points_per_level(layer)


def points_per_level(layer: Any) -> tuple[int, ...]:
    """How many points each level has."""
    if checks.is_int(layer.num_points):
        checks.count("num_points", layer.num_points)
        return (layer.num_points,) * layer.num_levels
    return checks.per_level("num_points", layer.num_points, layer.num_levels)


def point_count(layer: Any) -> int:
    """How many points each query has, over all heads and levels."""
    return layer.num_heads * sum(points_per_level(layer))


def wide_dtype(layer: Any) -> Any:
    """The layer's dtype, but at least float32, for locations and weights; None stays None."""
    return None if layer.dtype is None else wide(layer.dtype)


def directions_init(layer: Any) -> Callable[..., jax.Array]:
    """The published initializer of the offsets' bias, which gives each head a direction.

    Head m looks along (cos, sin) of the angle 2π m / M, stretched to the edge of a square. The
    p-th point of a level lies p steps away, the first one step.
    """
    angles = 2 * np.pi / layer.num_heads * np.arange(layer.num_heads)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)  # (M, 2)
    directions /= np.abs(directions).max(axis=-1, keepdims=True)
    steps = np.concatenate([np.arange(count) + 1 for count in points_per_level(layer)])  # (T,)
    bias = (directions[:, None] * steps[:, None]).ravel()

    def init(key, shape, dtype=jnp.float32):
        return jnp.asarray(bias, dtype).reshape(shape)

    return init


# ---- the call


class Arguments(NamedTuple):
    """The arguments of a call, checked."""

    query: jax.Array  # (*batch, Q, E), in the dtype of locations and weights
    reference_points: jax.Array  # (*batch, Q, L, 2 or 4)
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
    if len(shapes) != layer.num_levels or len(shapes[0]) != 2:
        raise ValueError(
            f"spatial_shapes={shapes} has {len(shapes)} levels of {len(shapes[0])} sizes; wanted (height, width) for "
            f"each of num_levels={layer.num_levels}"
        )
    pixels = sum(map(math.prod, shapes))
    if value.ndim < 2 or value.shape[-2:] != (pixels, layer.embed_dim):
        raise ValueError(
            f"value has shape {value.shape}; wanted (*batch, {pixels}, {layer.embed_dim}): the pixels of all levels "
            f"one after another, as spatial_shapes={shapes} has them, and embed_dim channels"
        )
    batch = value.shape[:-2]
    if query.ndim != value.ndim or (*query.shape[:-2], query.shape[-1]) != (*batch, layer.embed_dim):
        raise ValueError(
            f"query has shape {query.shape}; wanted (*batch, Q, {layer.embed_dim}): the batch axes of value, {batch}, "
            "and embed_dim channels"
        )
    if padding_mask is not None:
        padding_mask = _check_padding_mask(padding_mask, value)
    reference_points = _check_reference_points(reference_points, query.shape[:-1], layer.num_levels)
    query = query.astype(wide_dtype(layer) or wide(query.dtype))
    return Arguments(query, reference_points, value, shapes, padding_mask)


def _check_reference_points(given: Any, queries: tuple[Size, ...], levels: int) -> jax.Array:
    """A reference point for each query and level: `(*batch, Q, L, 2 or 4)`."""
    given = checks.array("reference_points", given, jnp.floating)
    axes, coordinates = given.shape[:-1], given.shape[-1:]
    wanted = (*queries, levels)
    fits = len(axes) >= 2 and axes[-2] == wanted[-2] and checks.broadcasts(axes, wanted)
    if not fits or coordinates not in ((2,), (4,)):
        raise ValueError(
            f"reference_points has shape {given.shape}; wanted {(*wanted, '2 or 4')}: (x, y) or (x, y, width, height) "
            f"for each query and each of num_levels={levels}; the axis of levels may be 1, batch axes 1 or missing"
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
    """Where each point reads, from offsets `(*batch, Q, M · T · 2)`: `(*batch, Q, M, L, P, 2)`.

    An offset of 1 is one pixel of the level; with a box, half its width or height divided by P.
    """
    dtype = wide(offset.dtype, arguments.reference_points.dtype)
    offset, reference = offset.astype(dtype), arguments.reference_points.astype(dtype)
    centre = reference[..., :2]
    if reference.shape[-1] == 4:  # a box
        shares = jnp.asarray([[0.5 / count] for count in points_per_level(layer)], dtype)  # (L, 1)
        step = reference[..., 2:] * jnp.broadcast_to(shares, centre.shape)
    else:
        shapes = arguments.spatial_shapes
        sizes = [jnp.asarray(int32(size), dtype) for height, width in shapes for size in (width, height)]
        step = 1 / jnp.broadcast_to(jnp.stack(sizes).reshape(-1, 2), centre.shape)
    offset = offset.reshape(*offset.shape[:-1], *_points_shape(layer), 2)
    return _each_point(layer, centre) + _each_point(layer, step) * offset


def _each_point(layer: Any, per_level: jax.Array) -> jax.Array:
    """A pair per level for each point: `(…, L, 2)` -> `(…, 1, L, 1, 2)` or `(…, 1, T, 2)`."""
    if checks.is_int(layer.num_points):
        return per_level[..., None, :, None, :]
    counts = np.array(points_per_level(layer))
    return jnp.repeat(per_level, counts, axis=-2, total_repeat_length=int(counts.sum()))[..., None, :, :]


def softmax(layer: Any, logits: jax.Array) -> jax.Array:
    """The softmax over all points of a head: `(*batch, Q, M · T)` -> `(*batch, Q, M, L, P)`."""
    points = sum(points_per_level(layer))  # and not -1, which no queries would leave undecided
    each = jax.nn.softmax(logits.reshape(*logits.shape[:-1], layer.num_heads, points), axis=-1)
    return each.reshape(*logits.shape[:-1], *_points_shape(layer))


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
