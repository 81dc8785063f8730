"""Algorithm of the sum for a GPU: a level at a time, whose readings are weighed and added in few kernels.

A GPU takes some microseconds to launch a kernel, however little that kernel does. JOURNAL.md of `ms_deform_attn` says
what XLA made of other forms.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax.geometry import int32
from dcn_jax.ops.weighted_reads.levels import Level, Operands, add_rows, gather, take_level, zeros
from dcn_jax.sampling import Positions, corners

# With more points in one sum LLVM reads one channel at a time, and not four.
_POINTS_IN_A_SUM = 3

_Corner = tuple[jax.Array, jax.Array, jax.Array]  # (row of the level, whether it is read, weight), each (B, Q, *M, P)


def result(levels: tuple[Level, ...], blocks: None, operands: Operands) -> jax.Array:
    """The sum, `(B, Q, *M, D)`, in the dtype of the features."""
    del blocks
    y = None
    for level in levels:
        if y is not None:  # one level after another, so that the weights of one are in memory, and not those of all
            y, points = lax.optimization_barrier((y, operands.points))
            operands = operands._replace(points=points)
        of_level = jax.checkpoint(functools.partial(_sum_level, level))(operands)
        y = of_level if y is None else y + of_level
    return zeros(operands) if y is None else y


def _sum_level(level: Level, operands: Operands) -> jax.Array:
    """The sum over the points of one level."""
    found = _locate(level, take_level(level, operands))
    # Without this barrier XLA finds the weights of each sum below in kernels of their own.
    behind = lax.optimization_barrier([(is_read, weight) for _, is_read, weight in found])
    sums = []
    for start in range(0, level.points, _POINTS_IN_A_SUM):
        points = slice(start, start + _POINTS_IN_A_SUM)
        terms = [
            weight[..., points, None].astype(operands.features.dtype)
            * _read(level, operands.features, row[..., points], is_read[..., points])
            for (row, *_), (is_read, weight) in zip(found, behind, strict=True)
        ]
        sums.append(jnp.sum(functools.reduce(operator.add, terms), axis=-2))
    return functools.reduce(operator.add, sums, zeros(operands))


def gradients(
    levels: tuple[Level, ...], blocks: None, active: tuple[str, ...], y_bar: jax.Array, operands: Operands
) -> dict[str, jax.Array]:
    """The gradients of the operands named in `active`, a level after another."""
    del blocks
    sums = {name: jnp.zeros_like(getattr(operands, name)) for name in active}
    for level in levels:
        sums, points = lax.optimization_barrier((sums, operands.points))
        sums = jax.checkpoint(functools.partial(_add_gradients, level))(sums, operands._replace(points=points), y_bar)
    return sums


def _add_gradients(level: Level, sums: dict[str, jax.Array], operands: Operands, y_bar: jax.Array) -> Any:
    """`sums` with the gradients of what is read of one level."""
    sums, part = dict(sums), take_level(level, operands)

    def located(points, weights):
        found = _locate(level, part._replace(points=points, weights=weights))
        return [weight for *_, weight in found], [(row, is_read) for row, is_read, _ in found]

    weight, pull, places = jax.vjp(located, part.points, part.weights, has_aux=True)
    bar = y_bar[..., None, :]  # (B, Q, *M, 1, D)
    if "points" in sums or "weights" in sums:
        products = [jnp.real(bar * _read(level, operands.features, row, is_read)) for row, is_read in places]
        bars = pull([jnp.sum(p, axis=-1).astype(w.dtype) for p, w in zip(products, weight, strict=True)])
        for name, found in zip(("points", "weights"), bars, strict=True):
            if name in sums:
                axis = operands.features.ndim - 1
                sums[name] = lax.dynamic_update_slice_in_dim(sums[name], found, level.first_point, axis)
    if "features" in sums:
        none = int32(operands.features.shape[1])
        rows = [jnp.where(is_read, row + int32(level.first_row), none) for row, is_read in places]
        added = jnp.stack(weight, axis=-1)[..., None].astype(bar.dtype) * bar[..., None, :]
        sums["features"] = add_rows(sums["features"], jnp.stack(rows, axis=-1), added)
    return sums


def _locate(level: Level, operands: Operands) -> list[_Corner]:
    """Where the points of a level read: `levels.locate_points`, with some row of the level where a corner is not read."""
    spatial, dtype = level.border.spatial, operands.points.dtype
    axes = [
        Positions(jnp.int32(0), level.to_pixels(operands.points[..., -1 - axis], jnp.asarray(int32(size), dtype)))
        for axis, size in enumerate(spatial)
    ]
    found = []
    for pixel, weight, is_read in corners(axes, level.border, level.method):
        row = pixel[0]
        for size, along in zip(spatial[1:], pixel[1:], strict=True):
            row = row * int32(size) + along
        scaled = weight if operands.weights is None else weight * operands.weights.astype(weight.dtype)
        found.append((row, is_read, scaled))
    return found


def _read(level: Level, features: jax.Array, row: jax.Array, is_read: jax.Array) -> jax.Array:
    """Rows of a level, or zero: `(B, Q, *M, P, D)`."""
    return jnp.where(is_read[..., None], gather(level, features, row), 0)
