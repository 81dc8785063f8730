"""Algorithms of the sum for a CPU and a TPU: loops over points, or over blocks of queries."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax.geometry import Size, int32
from dcn_jax.ops.weighted_reads.levels import (
    Level,
    Operands,
    add_rows,
    gather,
    is_shared,
    locate_points,
    take,
    take_level,
    zeros,
)


def sum_by_points(levels: tuple[Level, ...], blocks: "_Blocks", operands: Operands) -> jax.Array:
    """The sum. Each step adds one point of every query."""
    del blocks
    y = zeros(operands)
    for level in levels:

        def add(y, point, level=level):
            at = locate_points(level, take(operands, point, 1, axis=operands.features.ndim - 1))
            for row, weight in zip(*at, strict=True):
                rows = jnp.where((row < int32(level.rows))[..., None], gather(level, operands.features, row), 0)
                y = y + jnp.sum(weight[..., None].astype(y.dtype) * rows, axis=-2)
            return y, None

        y, _ = lax.scan(add, y, level.first_point + jnp.arange(level.points, dtype=jnp.int32))
    return y


def sum_by_points_in_blocks(levels: tuple[Level, ...], blocks: "_Blocks", operands: Operands) -> jax.Array:
    """The sum. Each step calls `sum_by_points` on one block of queries."""

    def fill(y, block):
        part = sum_by_points(levels, blocks, _take_queries(blocks, block, operands))
        return lax.dynamic_update_slice_in_dim(y, part, blocks.start(block), 1, allow_negative_indices=False), None

    return lax.scan(fill, zeros(operands), jnp.arange(blocks.number, dtype=jnp.int32))[0]


def sum_by_levels(levels: tuple[Level, ...], blocks: "_Blocks", operands: Operands) -> jax.Array:
    """The sum, in the form that JAX differentiates: a step adds all points of a level, for a block of queries."""
    y = zeros(operands)
    for level in levels:

        @functools.partial(jax.checkpoint, prevent_cse=False)  # without this, derivatives would keep every step's rows
        def add(y, block, level=level):
            weight, row = _corners(level, take_level(level, _take_queries(blocks, block, operands)))
            rows = gather(level, operands.features, row)
            rows = jnp.where(_is_added(level, blocks, block, row)[..., None], rows, 0)
            products = "bq...pkd,bq...pk->bq...d", rows, weight.astype(rows.dtype)
            part = jnp.einsum(*products, precision=lax.Precision.HIGHEST)
            return _add_window(y, part, (0, blocks.start(block))), None

        y, _ = lax.scan(add, y, jnp.arange(blocks.number, dtype=jnp.int32))
    return y


# Its gradients


def gradients(
    levels: tuple[Level, ...], blocks: "_Blocks", active: tuple[str, ...], y_bar: jax.Array, operands: Operands
) -> dict[str, jax.Array]:
    """The gradients of the operands named in `active`, a level and a block of queries a step."""
    sums = {name: jnp.zeros_like(getattr(operands, name)) for name in active}
    for level in levels:
        add = jax.checkpoint(functools.partial(_add_gradients, level, blocks, operands, y_bar), prevent_cse=False)
        sums, _ = lax.scan(add, sums, jnp.arange(blocks.number, dtype=jnp.int32))
    return sums


def _add_gradients(level: Level, blocks: "_Blocks", operands: Operands, y_bar: jax.Array, sums, block):
    """One step of `gradients`: adds its level's and its block's share to `sums`."""
    sums, start = dict(sums), blocks.start(block)
    bar = lax.dynamic_slice_in_dim(y_bar, start, blocks.size, 1, allow_negative_indices=False)  # (B, q, *M, D)
    part = take_level(level, _take_queries(blocks, block, operands))

    def corners(points, weights):
        return _corners(level, part._replace(points=points, weights=weights))

    weight, pull, row = jax.vjp(corners, part.points, part.weights, has_aux=True)
    read = _is_added(level, blocks, block, row)
    if "features" in sums:
        pixel = jnp.where(read, row + int32(level.first_row), int32(operands.features.shape[1]))
        added = weight[..., None].astype(bar.dtype) * jnp.expand_dims(bar, (-3, -2))
        sums["features"] = add_rows(sums["features"], pixel, added)
    if "points" in sums or "weights" in sums:
        rows = gather(level, operands.features, row)
        products = jnp.einsum("bq...pkd,bq...d->bq...pk", rows, bar, precision=lax.Precision.HIGHEST)
        bars = pull(jnp.where(read, jnp.real(products), 0).astype(weight.dtype))
        for name, added in zip(("points", "weights"), bars, strict=True):
            if name in sums:
                sums[name] = _add_window(sums[name], added, (0, start, *[0] * (row.ndim - 4), level.first_point))
    return sums, None


def _add_window(total: jax.Array, part: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    """Add `part` to the window of `total` that begins at `start`, on other axes at 0."""
    whole = [jnp.asarray(i, jnp.int32) for i in (*start, *[0] * (total.ndim - len(start)))]
    old = lax.dynamic_slice(total, whole, part.shape, allow_negative_indices=False)
    return lax.dynamic_update_slice(total, old + part, whole, allow_negative_indices=False)


def _corners(level: Level, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """What `locate_points` finds, corners stacked: weights and rows, both `(B, q, *M, P, K)`."""
    at = locate_points(level, operands)
    return jnp.stack(at.weight, -1), jnp.stack(at.row, -1)


def _is_added(level: Level, blocks: "_Blocks", block: jax.Array, row: jax.Array) -> jax.Array:
    """Whether a corner is added: it lies on the map, and its query is in no earlier block."""
    in_block = lax.broadcasted_iota(jnp.int32, (1, blocks.size, *[1] * (row.ndim - 2)), 1)
    return (row < int32(level.rows)) & (blocks.start(block) + in_block >= block * int32(blocks.size))


# Blocks of queries


class _Blocks(NamedTuple):
    """Queries in blocks of one size. The last block may overlap the one before it."""

    queries: Size
    size: Size
    number: int

    def start(self, block: jax.Array) -> jax.Array:
        """The first query of a block."""
        return jnp.minimum(block * int32(self.size), int32(self.queries) - int32(self.size))


# The fewest blocks for derivatives: with fewer, a block's rows do not stay in a CPU's caches. Also the
# number of blocks for the sum on a TPU.
FEWEST = 8


def blocks_of_derivatives(levels: tuple[Level, ...], operands: Operands) -> int:
    """The number that makes a block's rows of a level half of the result, or of the features if they are larger."""
    features, points, _ = operands
    pixels, queries = features.shape[1], points.shape[1]
    most = max(2 * level.points * level.corners for level in levels)
    if is_shared(features, points):
        return most
    if not (isinstance(queries, int) and isinstance(pixels, int)):
        return FEWEST
    return max(FEWEST, min(most, round(most * queries / max(pixels, 1))))


def divide(queries: Size, number: int) -> _Blocks:
    """The queries in `number` blocks, or in a few less."""
    size = -(-queries // number)
    return _Blocks(queries, size, -(-queries // max(size, 1)) if isinstance(queries, int) else number)


def _take_queries(blocks: _Blocks, block: jax.Array, operands: Operands) -> Operands:
    """The operands with the queries of one block."""
    return take(operands, blocks.start(block), blocks.size, axis=1)
