"""The operands of the sum, and what any of its algorithms needs: reading one level, and adding to it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core.mesh import zeros_varying_like
from dcn_jax.geometry import Size, int32
from dcn_jax.sampling import METHODS, Border, Positions, Rows, locate


class Level(NamedTuple):
    """One map of those in `features`, and the points that read it; hashable."""

    border: Border
    method: str | tuple[str, ...]  # of `sampling.METHODS`; one for all axes, or one per axis
    to_pixels: Callable  # (coordinates along an axis, the map's size there) -> pixels
    first_row: Size  # its first pixel among the S
    first_point: int  # its first point among the T
    points: int  # how many

    @property
    def rows(self) -> Size:
        """How many pixels the map has, each a row of channels."""
        return math.prod(self.border.spatial)

    @property
    def corners(self) -> int:
        """How many pixels a point reads."""
        axes = len(self.border.spatial)
        methods = (self.method,) * axes if isinstance(self.method, str) else self.method
        return math.prod(METHODS[method] for method in methods)


class Operands(NamedTuple):
    """The arrays of the sum. Slices of points and weights are `Operands` too."""

    features: Any  # (B or 1, S, *M, D): the maps, one level's pixels after another's
    points: Any  # (B, Q, *M, T, n): coordinates that `to_pixels` understands, last spatial axis first
    weights: Any  # (B, Q, *M, T); None for ones


def zeros(operands: Operands) -> jax.Array:
    """Zeros of the result's shape and type, for a loop to add to."""
    features, points, _ = operands
    return zeros_varying_like(operands, features.dtype, (*points.shape[:-2], features.shape[-1]))


def take_level(level: Level, operands: Operands) -> Operands:
    """The operands with the points of one level."""
    return take(operands, level.first_point, level.points, axis=operands.features.ndim - 1)


def take(operands: Operands, start: Any, size: Size, axis: int) -> Operands:
    """The operands with a part of their points and weights."""

    def take(array):
        return lax.dynamic_slice_in_dim(array, start, size, axis, allow_negative_indices=False)

    features, *rest = operands
    return Operands(features, *jax.tree.map(take, rest))


def locate_points(level: Level, operands: Operands) -> Rows:
    """For each corner, which row of the level a point reads, and the weight: `(B, q, *M, P)`."""
    axes = jnp.moveaxis(operands.points[..., ::-1], -1, 0)
    sizes = (jnp.asarray(int32(size), axes.dtype) for size in level.border.spatial)
    points = jnp.stack([level.to_pixels(x, size) for x, size in zip(axes, sizes, strict=True)], axis=-1)
    scale = None if operands.weights is None else operands.weights[..., None]
    at = locate(Positions(jnp.int32(0), points[..., None, :]), scale, level.border, level.method)
    return jax.tree.map(lambda array: array[..., 0], at)


def gather(level: Level, features: jax.Array, row: jax.Array) -> jax.Array:
    """Rows of a level: `(B, q, *M, …, D)` for `row` `(B, q, *M, …)`; outside, its last row."""

    def read(features, row):
        return features.at[row].get(mode="promise_in_bounds", wrap_negative_indices=False)

    # Image and head are not folded into the index of a row: where they are split over devices,
    # every device would then gather all features.
    if features.ndim == 4:
        read = jax.vmap(read, in_axes=1, out_axes=1)
    row = jnp.minimum(row, int32(level.rows) - 1) + int32(level.first_row)
    if is_shared(features, row):
        return jax.vmap(read, in_axes=(None, 0))(features[0], row)
    return jax.vmap(read)(features, row)


def is_shared(features: jax.Array, row: jax.Array) -> bool:
    """Whether all images of `row` `(B, …)` read the maps of one."""
    return features.shape[0] == 1 != row.shape[0]


def add_rows(features: jax.Array, pixel: jax.Array, added: jax.Array) -> jax.Array:
    """Add rows `(B, q, *M, P, K, D)` to `features` at `pixel`, or nowhere if that is S."""
    # Not by `vmap`, which would move the heads of `features` to the front and back in each step.
    shared = is_shared(features, pixel)
    batching = (0, 2)[shared : features.ndim - 2]  # batch and heads
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(added.ndim - 1,),
        inserted_window_dims=(0, 1) if shared else (1,),
        scatter_dims_to_operand_dims=(1,),
        operand_batching_dims=batching,
        scatter_indices_batching_dims=batching,
    )
    return lax.scatter_add(features, pixel[..., None], added, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)
