"""The sum that `grid_sample` and `ms_deform_attn` are made of: maps read at points, weighted and added.

    y(q, m) = Σ_l Σ_t  weight(q, m, t) · map_{l,m}(point(q, m, t))

over levels l and the points t of each, for a query q and a head m.

The letters of the shapes: B images; S pixels of all levels; Q queries, q of them in a block; M heads of D channels; T points
of all levels, P of one; n coordinates of a point; K pixels that a point reads, its corners. `*M` is one axis, or no axis in
`grid_sample`: for an axis of size 1 XLA's CPU backend would copy the arrays.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core.mesh import vary_alike
from dcn_jax.geometry import Size, int32
from dcn_jax.sampling import Border, Positions, Rows, countable, locate, sum_rows

if TYPE_CHECKING:
    from dcn_jax._core.platform_op import Algorithms


class Level(NamedTuple):
    """One of the maps that lie one after another in `features`, and the points that read it; hashable."""

    border: Border
    method: str  # of `sampling.METHODS`
    to_pixels: Callable[[jax.Array, jax.Array], jax.Array]  # (coordinates along an axis, the map's size there) -> pixels
    first_row: Size  # where its pixels begin, among the S
    first_point: int  # where its points begin, among the T
    points: int

    @property
    def rows(self) -> Size:
        """How many pixels it has."""
        return math.prod(self.border.spatial)


class Operands(NamedTuple):
    """The arrays of the sum; or a part of them: the points of some queries, or of one level."""

    features: Any  # (B, S, *M, D)
    points: Any  # (B, Q, *M, T, n), in coordinates of their level, last spatial axis first
    weights: Any  # (B, Q, *M, T); None for ones


@functools.partial(jax.jit, static_argnums=0)  # a call outside of jit compiles once, not each time
def sum_readings(levels: tuple[Level, ...], operands: Operands) -> jax.Array:
    """The sum, `(B, Q, *M, D)`, in the dtype of the features."""
    # Imported here: platform_op imports `jax.extend`, which imports Pallas, and `import dcn_jax` is to stay quick.
    from dcn_jax._core.platform_op import Op, platform_op, type_of

    if not countable(operands.features.shape[1]):
        raise ValueError(f"maps of {operands.features.shape[1]} pixels; wanted fewer than 2**31")
    operands = vary_alike(operands)  # so that JAX sums each gradient over devices once, after the loops
    return platform_op(Op(levels, type_of(_zeros, operands), algorithms(levels, operands)), operands)


def algorithms(levels: tuple[Level, ...], operands: Operands) -> "tuple[Algorithms, Algorithms]":
    """The algorithms of the sum, and that of its derivatives, by platform."""
    from dcn_jax._core.platform_op import Algorithm

    at_once, in_blocks = (
        Algorithm(result, _gradients, _divide(levels, operands), gradients_can_be_mapped=True)
        for result in (_sum_points, _sum_blocks)
    )
    # A TPU keeps the rows that it reads. Other platforms read, weight and add in one kernel.
    return (("default", at_once), ("tpu", in_blocks)), (("default", in_blocks),)


def _zeros(operands: Operands) -> jax.Array:
    features, points, _ = operands
    return jnp.zeros_like(features, shape=(*points.shape[:-2], features.shape[-1]))


def _sum_points(levels: tuple[Level, ...], blocks: "_Blocks", operands: Operands) -> jax.Array:
    """The sum, for one point of all queries after another."""
    del blocks
    y = _zeros(operands)
    for level in levels:

        def add(y, point, level=level):
            part = _take_points(operands, point, 1)
            read = functools.partial(sum_rows, span=(level.first_row, level.rows))
            return y + jnp.sum(_each_head(read, part.features, _locate(level, part)), axis=-2), None

        y, _ = lax.scan(add, y, level.first_point + jnp.arange(level.points, dtype=jnp.int32))
    return y


def _sum_blocks(levels: tuple[Level, ...], blocks: "_Blocks", operands: Operands) -> jax.Array:
    """The sum, for all points of a level and of one block of queries after another."""
    y = _zeros(operands)
    for level in levels:

        @functools.partial(jax.checkpoint, prevent_cse=False)  # a derivative of the loop keeps no rows
        def add(y, block, level=level):
            weight, row = _corners(level, _take_block(level, blocks, block, operands))
            rows = jnp.where(_is_read(level, blocks, block, row)[..., None], _take_rows(level, operands.features, row), 0)
            part = jnp.einsum("bq...pkd,bq...pk->bq...d", rows, weight.astype(rows.dtype), precision=lax.Precision.HIGHEST)
            return _add_window(y, part, (0, blocks.start(block))), None

        y, _ = lax.scan(add, y, jnp.arange(blocks.number, dtype=jnp.int32))
    return y


# Its gradients


def _gradients(
    levels: tuple[Level, ...], blocks: "_Blocks", active: tuple[str, ...], y_bar: jax.Array, operands: Operands
) -> dict[str, jax.Array]:
    """The gradients of the operands named in `active`: all points of a level and of a block of queries at once."""
    sums = {name: jnp.zeros_like(getattr(operands, name)) for name in active}
    for level in levels:
        add = functools.partial(_add_gradients, level, blocks, operands, y_bar)
        add = jax.checkpoint(add, prevent_cse=False)
        sums, _ = lax.scan(add, sums, jnp.arange(blocks.number, dtype=jnp.int32))
    return sums


def _add_gradients(level: Level, blocks: "_Blocks", operands: Operands, y_bar: jax.Array, sums, block):
    """`sums` with the gradients that one level and one block of queries give."""
    sums, start = dict(sums), blocks.start(block)
    bar = lax.dynamic_slice_in_dim(y_bar, start, blocks.size, 1, allow_negative_indices=False)  # (B, q, *M, D)
    part = _take_block(level, blocks, block, operands)

    def corners(points, weights):
        return _corners(level, part._replace(points=points, weights=weights))

    weight, pull, row = jax.vjp(corners, part.points, part.weights, has_aux=True)
    read = _is_read(level, blocks, block, row)
    if "features" in sums:
        pixel = jnp.where(read, row + int32(level.first_row), int32(operands.features.shape[1]))
        added = weight[..., None].astype(bar.dtype) * jnp.expand_dims(bar, (-3, -2))
        sums["features"] = _add_rows(sums["features"], pixel, added)
    if "points" in sums or "weights" in sums:
        rows = _take_rows(level, operands.features, row)
        products = jnp.einsum("bq...pkd,bq...d->bq...pk", rows, bar, precision=lax.Precision.HIGHEST)
        bars = pull(jnp.where(read, jnp.real(products), 0).astype(weight.dtype))
        for name, added in zip(("points", "weights"), bars, strict=True):
            if name in sums:
                sums[name] = _add_window(sums[name], added, (0, start, *[0] * (row.ndim - 4), level.first_point))
    return sums, None


def _add_rows(features: jax.Array, pixel: jax.Array, added: jax.Array) -> jax.Array:
    """`features` with `added` `(B, q, *M, P, K, D)` added at pixels `(B, q, *M, P, K)`; those beyond S are dropped."""
    # Not by vmap, which would move the heads of `features` to the front and back each time.
    batching = (0, 2)[: features.ndim - 2]  # batch and heads
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(added.ndim - 1,),
        inserted_window_dims=(1,),
        scatter_dims_to_operand_dims=(1,),
        operand_batching_dims=batching,
        scatter_indices_batching_dims=batching,
    )
    return lax.scatter_add(features, pixel[..., None], added, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)


def _add_window(total: jax.Array, part: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    """`total` with `part` added from an element on, given by its first axes."""
    whole = [jnp.asarray(i, jnp.int32) for i in (*start, *[0] * (total.ndim - len(start)))]
    old = lax.dynamic_slice(total, whole, part.shape, allow_negative_indices=False)
    return lax.dynamic_update_slice(total, old + part, whole, allow_negative_indices=False)


# Reading


def _locate(level: Level, operands: Operands) -> Rows:
    """The rows of a level that its points read: arrays `(B, Q, *M, P)`."""
    axes = jnp.moveaxis(operands.points[..., ::-1], -1, 0)
    sizes = (jnp.asarray(int32(size), axes.dtype) for size in level.border.spatial)
    points = jnp.stack([level.to_pixels(x, size) for x, size in zip(axes, sizes, strict=True)], axis=-1)
    scale = None if operands.weights is None else operands.weights[..., None]
    at = locate(Positions(jnp.int32(0), points[..., None, :]), scale, level.border, level.method)
    return jax.tree.map(lambda array: array[..., 0], at)


def _corners(level: Level, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """The weights of all corners, and their rows of the level: both `(B, Q, *M, P, K)`."""
    at = _locate(level, operands)
    return jnp.stack(at.weight, -1), jnp.stack(at.row, -1)


def _is_read(level: Level, blocks: "_Blocks", block: jax.Array, row: jax.Array) -> jax.Array:
    """Whether each corner lies on the map, and its query is in no block before."""
    return (row < int32(level.rows)) & blocks.fresh(block, row.ndim)


def _take_rows(level: Level, features: jax.Array, row: jax.Array) -> jax.Array:
    """Rows of a level, the last for the one after it: `(B, S, *M, D)`, `(B, q, *M, P, K)` -> `(B, q, *M, P, K, D)`."""

    def take(features, row):
        return features.at[row].get(mode="promise_in_bounds", wrap_negative_indices=False)

    row = jnp.minimum(row, int32(level.rows) - 1) + int32(level.first_row)
    return _each_head(take, features, row)


def _each_head(read: Callable, features: jax.Array, at: Any) -> jax.Array:
    """`read` of the features `(S, D)` of each image and head, at rows `(Q, …)`."""
    # Batch and heads are axes of their own, not in the index of the row: so they may be split over devices.
    if features.ndim == 4:
        read = jax.vmap(read, in_axes=1, out_axes=1)
    return jax.vmap(read)(features, at)


# Blocks of queries


class _Blocks(NamedTuple):
    """Queries divided into blocks of one size. Where that does not divide them, the last block begins early."""

    queries: Size
    size: Size
    number: int

    def start(self, block: jax.Array) -> jax.Array:
        """The first query of a block."""
        return jnp.minimum(block * int32(self.size), int32(self.queries) - int32(self.size))

    def fresh(self, block: jax.Array, ndim: int) -> jax.Array:
        """Which of a block's queries are in no block before: `(1, size, 1, …)`, of `ndim` axes."""
        number = self.start(block) + lax.broadcasted_iota(jnp.int32, (1, self.size, *[1] * (ndim - 2)), 1)
        return number >= block * int32(self.size)


# What many queries read at once does not stay in the caches of a CPU.
_FEWEST = 8


def _divide(levels: tuple[Level, ...], operands: Operands) -> _Blocks:
    """Blocks so small that what each reads of a level is half of the result, or of the features if they are more."""
    pixels, queries = operands.features.shape[1], operands.points.shape[1]
    corners = [2 ** len(level.border.spatial) if level.method == "linear" else 1 for level in levels]
    most = max(_FEWEST, *(2 * level.points * each for level, each in zip(levels, corners, strict=True)))
    if not (isinstance(queries, int) and isinstance(pixels, int)):
        return _Blocks(queries, -(-queries // _FEWEST), _FEWEST)
    size = -(-queries // max(_FEWEST, min(most, round(most * queries / max(pixels, 1)))))
    return _Blocks(queries, size, -(-queries // max(size, 1)))


def _take_block(level: Level, blocks: _Blocks, block: jax.Array, operands: Operands) -> Operands:
    """The operands of a level's points and a block's queries."""
    part = _take(operands, blocks.start(block), blocks.size, axis=1)
    return _take_points(part, level.first_point, level.points)


def _take_points(operands: Operands, start: Any, count: int) -> Operands:
    """The operands of some points of each query."""
    return _take(operands, start, count, axis=operands.features.ndim - 1)


def _take(operands: Operands, start: Any, size: Size, axis: int) -> Operands:
    def take(array):
        return lax.dynamic_slice_in_dim(array, start, size, axis, allow_negative_indices=False)

    _, points, weights = operands
    return operands._replace(points=take(points), weights=None if weights is None else take(weights))
