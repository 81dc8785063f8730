"""The sum that `grid_sample`, `ms_deform_attn` and `roi_align` share: readings of maps, weighted and added.

    y(q, m) = Σ_l Σ_t  weight(q, m, t) · map_{l,m}(point(q, m, t))

over levels l and the points t of each level, for a query q and a head m.

The letters of the shapes: B images; S pixels of all levels; Q queries, or q in a block; M heads of
D channels; T points of all levels, P of one level; n coordinates of a point; K corners, the pixels
that one point reads. `*M` is the axis of heads. `grid_sample` leaves it out, because XLA's CPU
backend copies arrays that have an axis of size 1. The features may have B = 1 where the points have
more: all then read the same maps.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core.mesh import zeros_varying_like
from dcn_jax.geometry import Size, int32
from dcn_jax.sampling import METHODS, Border, Positions, Rows, countable, locate


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


@functools.partial(jax.jit, static_argnums=0)  # a call outside of jit compiles once, not each time
def sum_readings(levels: tuple[Level, ...], operands: Operands) -> jax.Array:
    """The sum, `(B, Q, *M, D)`, in the dtype of the features."""
    # Imported here: platform_op imports Pallas by way of `jax.extend`, and that is slow.
    from dcn_jax._core.platform_op import Op, platform_op, type_of

    if not countable(operands.features.shape[1]):
        raise ValueError(f"maps of {operands.features.shape[1]} pixels; wanted fewer than 2**31")
    return platform_op(Op(levels, type_of(_zeros, operands), algorithms(levels, operands)), operands)


def algorithms(levels: tuple[Level, ...], operands: Operands) -> tuple[Any, Any]:
    """By platform: the algorithm of the sum, and the algorithm of its derivatives."""
    from dcn_jax._core.platform_op import Algorithm

    def made(result, number):
        blocks = _divide(operands.points.shape[1], number)
        return Algorithm(result, _gradients, blocks, gradients_can_be_mapped=True)

    # On a TPU the rows that a step gathers lie in memory, so a step takes a block of queries. For
    # other platforms XLA fuses gather, weights and sum into one kernel.
    of_sum = ("default", made(_sum_by_points, 1)), ("tpu", made(_sum_by_points_in_blocks, _FEWEST))
    return of_sum, (("default", made(_sum_by_levels, _blocks_of_derivatives(levels, operands))),)


def _zeros(operands: Operands) -> jax.Array:
    """Zeros of the result's shape and type, for a loop to add to."""
    features, points, _ = operands
    return zeros_varying_like(operands, features.dtype, (*points.shape[:-2], features.shape[-1]))


def _sum_by_points(levels: tuple[Level, ...], blocks: "_Blocks", operands: Operands) -> jax.Array:
    """The sum. Each step adds one point of every query."""
    del blocks
    y = _zeros(operands)
    for level in levels:

        def add(y, point, level=level):
            at = _locate(level, _take(operands, point, 1, axis=operands.features.ndim - 1))
            for row, weight in zip(*at, strict=True):
                rows = jnp.where((row < int32(level.rows))[..., None], _gather(level, operands.features, row), 0)
                y = y + jnp.sum(weight[..., None].astype(y.dtype) * rows, axis=-2)
            return y, None

        y, _ = lax.scan(add, y, level.first_point + jnp.arange(level.points, dtype=jnp.int32))
    return y


def _sum_by_points_in_blocks(levels: tuple[Level, ...], blocks: "_Blocks", operands: Operands) -> jax.Array:
    """The sum. Each step calls `_sum_by_points` on one block of queries."""

    def fill(y, block):
        part = _sum_by_points(levels, blocks, _take_queries(blocks, block, operands))
        return lax.dynamic_update_slice_in_dim(y, part, blocks.start(block), 1, allow_negative_indices=False), None

    return lax.scan(fill, _zeros(operands), jnp.arange(blocks.number, dtype=jnp.int32))[0]


def _sum_by_levels(levels: tuple[Level, ...], blocks: "_Blocks", operands: Operands) -> jax.Array:
    """The sum, in the form that JAX differentiates: a step adds all points of a level, for a block of queries."""
    y = _zeros(operands)
    for level in levels:

        @functools.partial(jax.checkpoint, prevent_cse=False)  # without this, derivatives would keep every step's rows
        def add(y, block, level=level):
            weight, row = _corners(level, _take_level(level, _take_queries(blocks, block, operands)))
            rows = _gather(level, operands.features, row)
            rows = jnp.where(_is_added(level, blocks, block, row)[..., None], rows, 0)
            products = "bq...pkd,bq...pk->bq...d", rows, weight.astype(rows.dtype)
            part = jnp.einsum(*products, precision=lax.Precision.HIGHEST)
            return _add_window(y, part, (0, blocks.start(block))), None

        y, _ = lax.scan(add, y, jnp.arange(blocks.number, dtype=jnp.int32))
    return y


# Its gradients


def _gradients(
    levels: tuple[Level, ...], blocks: "_Blocks", active: tuple[str, ...], y_bar: jax.Array, operands: Operands
) -> dict[str, jax.Array]:
    """The gradients of the operands named in `active`, a level and a block of queries a step."""
    sums = {name: jnp.zeros_like(getattr(operands, name)) for name in active}
    for level in levels:
        add = jax.checkpoint(functools.partial(_add_gradients, level, blocks, operands, y_bar), prevent_cse=False)
        sums, _ = lax.scan(add, sums, jnp.arange(blocks.number, dtype=jnp.int32))
    return sums


def _add_gradients(level: Level, blocks: "_Blocks", operands: Operands, y_bar: jax.Array, sums, block):
    """One step of `_gradients`: adds its level's and its block's share to `sums`."""
    sums, start = dict(sums), blocks.start(block)
    bar = lax.dynamic_slice_in_dim(y_bar, start, blocks.size, 1, allow_negative_indices=False)  # (B, q, *M, D)
    part = _take_level(level, _take_queries(blocks, block, operands))

    def corners(points, weights):
        return _corners(level, part._replace(points=points, weights=weights))

    weight, pull, row = jax.vjp(corners, part.points, part.weights, has_aux=True)
    read = _is_added(level, blocks, block, row)
    if "features" in sums:
        pixel = jnp.where(read, row + int32(level.first_row), int32(operands.features.shape[1]))
        added = weight[..., None].astype(bar.dtype) * jnp.expand_dims(bar, (-3, -2))
        sums["features"] = _add_rows(sums["features"], pixel, added)
    if "points" in sums or "weights" in sums:
        rows = _gather(level, operands.features, row)
        products = jnp.einsum("bq...pkd,bq...d->bq...pk", rows, bar, precision=lax.Precision.HIGHEST)
        bars = pull(jnp.where(read, jnp.real(products), 0).astype(weight.dtype))
        for name, added in zip(("points", "weights"), bars, strict=True):
            if name in sums:
                sums[name] = _add_window(sums[name], added, (0, start, *[0] * (row.ndim - 4), level.first_point))
    return sums, None


def _add_rows(features: jax.Array, pixel: jax.Array, added: jax.Array) -> jax.Array:
    """Add rows `(B, q, *M, P, K, D)` to `features` at `pixel`, or nowhere if that is S."""
    # Not by `vmap`, which would move the heads of `features` to the front and back in each step.
    shared = _is_shared(features, pixel)
    batching = (0, 2)[shared : features.ndim - 2]  # batch and heads
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(added.ndim - 1,),
        inserted_window_dims=(0, 1) if shared else (1,),
        scatter_dims_to_operand_dims=(1,),
        operand_batching_dims=batching,
        scatter_indices_batching_dims=batching,
    )
    return lax.scatter_add(features, pixel[..., None], added, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)


def _add_window(total: jax.Array, part: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    """Add `part` to the window of `total` that begins at `start`, on other axes at 0."""
    whole = [jnp.asarray(i, jnp.int32) for i in (*start, *[0] * (total.ndim - len(start)))]
    old = lax.dynamic_slice(total, whole, part.shape, allow_negative_indices=False)
    return lax.dynamic_update_slice(total, old + part, whole, allow_negative_indices=False)


# Reading one level


def _locate(level: Level, operands: Operands) -> Rows:
    """For each corner, which row of the level a point reads, and the weight: `(B, q, *M, P)`."""
    axes = jnp.moveaxis(operands.points[..., ::-1], -1, 0)
    sizes = (jnp.asarray(int32(size), axes.dtype) for size in level.border.spatial)
    points = jnp.stack([level.to_pixels(x, size) for x, size in zip(axes, sizes, strict=True)], axis=-1)
    scale = None if operands.weights is None else operands.weights[..., None]
    at = locate(Positions(jnp.int32(0), points[..., None, :]), scale, level.border, level.method)
    return jax.tree.map(lambda array: array[..., 0], at)


def _corners(level: Level, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """What `_locate` finds, corners stacked: weights and rows, both `(B, q, *M, P, K)`."""
    at = _locate(level, operands)
    return jnp.stack(at.weight, -1), jnp.stack(at.row, -1)


def _is_added(level: Level, blocks: "_Blocks", block: jax.Array, row: jax.Array) -> jax.Array:
    """Whether a corner is added: it lies on the map, and its query is in no earlier block."""
    in_block = lax.broadcasted_iota(jnp.int32, (1, blocks.size, *[1] * (row.ndim - 2)), 1)
    return (row < int32(level.rows)) & (blocks.start(block) + in_block >= block * int32(blocks.size))


def _gather(level: Level, features: jax.Array, row: jax.Array) -> jax.Array:
    """Rows of a level: `(B, q, *M, …, D)` for `row` `(B, q, *M, …)`; outside, its last row."""

    def read(features, row):
        return features.at[row].get(mode="promise_in_bounds", wrap_negative_indices=False)

    # Image and head are not folded into the index of a row: where they are split over devices,
    # every device would then gather all features.
    if features.ndim == 4:
        read = jax.vmap(read, in_axes=1, out_axes=1)
    row = jnp.minimum(row, int32(level.rows) - 1) + int32(level.first_row)
    if _is_shared(features, row):
        return jax.vmap(read, in_axes=(None, 0))(features[0], row)
    return jax.vmap(read)(features, row)


def _is_shared(features: jax.Array, row: jax.Array) -> bool:
    """Whether all images of `row` `(B, …)` read the maps of one."""
    return features.shape[0] == 1 != row.shape[0]


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
_FEWEST = 8


def _blocks_of_derivatives(levels: tuple[Level, ...], operands: Operands) -> int:
    """The number that makes a block's rows of a level half of the result, or of the features if they are larger."""
    features, points, _ = operands
    pixels, queries = features.shape[1], points.shape[1]
    most = max(2 * level.points * level.corners for level in levels)
    if _is_shared(features, points):
        return most
    if not (isinstance(queries, int) and isinstance(pixels, int)):
        return _FEWEST
    return max(_FEWEST, min(most, round(most * queries / max(pixels, 1))))


def _divide(queries: Size, number: int) -> _Blocks:
    """The queries in `number` blocks, or in a few less."""
    size = -(-queries // number)
    return _Blocks(queries, size, -(-queries // max(size, 1)) if isinstance(queries, int) else number)


def _take_queries(blocks: _Blocks, block: jax.Array, operands: Operands) -> Operands:
    """The operands with the queries of one block."""
    return _take(operands, blocks.start(block), blocks.size, axis=1)


def _take_level(level: Level, operands: Operands) -> Operands:
    """The operands with the points of one level."""
    return _take(operands, level.first_point, level.points, axis=operands.features.ndim - 1)


def _take(operands: Operands, start: Any, size: Size, axis: int) -> Operands:
    """The operands with a part of their points and weights."""

    def take(array):
        return lax.dynamic_slice_in_dim(array, start, size, axis, allow_negative_indices=False)

    features, *rest = operands
    return Operands(features, *jax.tree.map(take, rest))
