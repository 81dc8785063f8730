"""A call of the op, checked: its arrays, and everything else about it."""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from dcn_jax._core import checks
from dcn_jax.geometry import Size

METHODS = ("linear", "nearest", "discrete")


class Arrays(NamedTuple):
    """The arrays of a call. T counts the points of all levels, which lie level after level."""

    value: jax.Array  # (*batch, S, M, D)
    locations: jax.Array  # (*batch, Q, M, T, n), in [0, 1], last spatial axis first
    weights: jax.Array  # (*batch, Q, M, T)


class Spec(NamedTuple):
    """Everything about a call except its arrays; hashable, so it can be a static argument."""

    spatial_shapes: tuple[tuple[Size, ...], ...]
    points_per_level: tuple[int, ...]
    method: str

    @property
    def levels(self) -> list[tuple[tuple[Size, ...], slice, slice]]:
        """For each level (its spatial shape, its pixels among the S, its points among the T)."""
        pixels, points = map(math.prod, self.spatial_shapes), self.points_per_level
        return list(zip(self.spatial_shapes, _spans(pixels), _spans(points), strict=True))


def check_attention(value, spatial_shapes, locations, weights, *, points_per_level, method) -> tuple[Spec, Arrays]:
    """The checked arguments of `ms_deform_attn`.

    Raises:
        ValueError: a shape or an option does not fit; the message names it.
        TypeError: an argument is of the wrong kind.
    """
    value = checks.array("value", value, jnp.inexact)
    locations = checks.array("sampling_locations", locations, jnp.floating)
    weights = checks.array("attention_weights", weights, jnp.floating)
    check_method(method)
    if value.ndim < 3:
        raise ValueError(f"value has shape {value.shape}; wanted (*batch, S, M, D): pixels, heads, channels of a head")
    shapes = check_spatial_shapes(spatial_shapes)
    _check_pixels(value, shapes)
    points = _check_points(points_per_level, locations, len(shapes))
    *batch, _, heads, _ = value.shape
    each = (sum(points),) if points_per_level is not None else (len(shapes), points[0])
    wanted = f"(*batch, Q, M, {'T' if points_per_level is not None else 'L, P'}, n)"
    rank, axes = len(shapes[0]), len(batch)
    queries = locations.shape[axes : axes + 1]
    if locations.shape != (*batch, *queries, heads, *each, rank):
        raise ValueError(
            f"sampling_locations has shape {locations.shape}; wanted {wanted} with the batch axes {tuple(batch)} and the "
            f"{heads} heads of value, {each} points and n = {rank}, as many coordinates as each of spatial_shapes has sizes"
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"attention_weights has shape {weights.shape}; wanted {locations.shape[:-1]}: one weight for each of "
            f"sampling_locations, whose shape is {locations.shape}"
        )
    flat = (*batch, *queries, heads, sum(points))
    return Spec(shapes, points, method), Arrays(value, locations.reshape(*flat, rank), weights.reshape(flat))


def check_method(method: Any) -> None:
    """Raise if no way of reading a map has this name."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; wanted one of {METHODS}")


def check_spatial_shapes(given: Any) -> tuple[tuple[Size, ...], ...]:
    """`spatial_shapes` as tuples of ints.

    Raises:
        ValueError: a size is below 1, or a level has not 1, 2 or 3 sizes, or not as many as others.
        TypeError: a size is not an int.
    """
    wanted = "wanted the sizes of each level, ((H1, W1), …), as ints that are known when the function is traced"
    if isinstance(given, jax.Array):
        raise TypeError(f"spatial_shapes is a {type(given).__name__}; {wanted}: a tuple, or a NumPy array")
    if isinstance(given, np.ndarray):
        given = given.tolist()
    if not isinstance(given, Sequence) or not all(isinstance(shape, Sequence | np.ndarray) for shape in given):
        raise TypeError(f"spatial_shapes={given!r} is no sequence of sequences; {wanted}")
    shapes = tuple(tuple(shape) for shape in given)
    if not all(is_symbolic_dim(size) or checks.is_int(size) for shape in shapes for size in shape):
        raise TypeError(f"spatial_shapes={given!r} is not made of ints; {wanted}")
    shapes = tuple(tuple(s if is_symbolic_dim(s) else operator.index(s) for s in shape) for shape in shapes)
    if not shapes:
        raise ValueError(f"spatial_shapes={given!r} has no levels; wanted at least one, ((H1, W1),)")
    ranks = {len(shape) for shape in shapes}
    if not (ranks <= {1, 2, 3} and len(ranks) == 1) or any(
        isinstance(s, int) and s < 1 for shape in shapes for s in shape
    ):
        raise ValueError(
            f"spatial_shapes={shapes}; wanted 1, 2 or 3 sizes of at least 1 for each level, as many for each"
        )
    return shapes


def _check_pixels(value: jax.Array, shapes: tuple[tuple[Size, ...], ...]) -> None:
    """Raise a ValueError if the pixels of `value` are not as many as those of all levels."""
    pixels = sum(map(math.prod, shapes))
    if value.shape[-3] != pixels:
        problem = (
            f"value has shape {value.shape}; wanted (*batch, {pixels}, M, D): the pixels of all levels one after another, as "
            f"spatial_shapes={shapes} has them"
        )
        if value.shape[-2] == pixels:
            problem += "; it looks heads-first: swap its axes -3 and -2"
        raise ValueError(problem)


def _check_points(points_per_level: Any, locations: jax.Array, levels: int) -> tuple[int, ...]:
    """How many points each level has."""
    if points_per_level is not None:
        return checks.per_level("points_per_level", points_per_level, levels, minimum=0)
    if locations.ndim < 5 or locations.shape[-3] != levels:
        raise ValueError(
            f"sampling_locations has shape {locations.shape}; wanted (*batch, Q, M, {levels}, P, n): as many points on each of "
            f"the {levels} levels of spatial_shapes; for a number that differs, pass points_per_level and (*batch, Q, M, T, n)"
        )
    return (locations.shape[-2],) * levels


def _spans(lengths) -> list[slice]:
    """The slices that parts of these lengths take, one after another."""
    ends = list(itertools.accumulate(lengths))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
