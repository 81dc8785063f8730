"""The sum that the family is made of: maps read at points, weighed and added.

    y(q, m) = Σ_l Σ_t  weight(q, m, t) · map_{l,m}(point(q, m, t))

over levels l and the points t of each, for a query q and a head m. `sum_readings` is the sum; of its
derivative `_push` takes tangents forward, and `_pull` takes a cotangent back.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax._core.dtypes import wide
from dcn_jax.geometry import Size, int32
from dcn_jax.sampling import Border, Positions, Rows, countable, locate, sum_rows


class Level(NamedTuple):
    """One of the maps that lie one after another, and the points that read it; hashable."""

    border: Border
    method: str  # of `sampling.METHODS`
    to_pixels: Callable[[jax.Array, jax.Array], jax.Array]  # of coordinates along an axis, and its size
    first_row: Size  # of the S rows
    first_point: int  # of the T points
    points: int

    @property
    def rows(self) -> Size:
        """How many pixels it has."""
        return math.prod(self.border.spatial)


class Query(NamedTuple):
    """What is read: T points, those of one level after those of another, in coordinates of their level."""

    points: jax.Array  # (B, Q, *M, T, n), last spatial axis first
    weights: jax.Array | None  # (B, Q, *M, T); None for ones

    @property
    def heads(self) -> int:
        """How many axes of heads there are: 1 or, because XLA's CPU backend would copy arrays for one of size 1, none."""
        return self.points.ndim - 4


def sum_readings(levels: tuple[Level, ...], features: jax.Array, query: Query) -> jax.Array:
    """The sum: features `(B, S, *M, D)`, Q queries -> `(B, Q, *M, D)`, in the dtype of `features`."""
    if not countable(features.shape[1]):
        raise ValueError(f"maps of {features.shape[1]} pixels; wanted fewer than 2**31")
    # Within shard_map, some arrays may vary over devices that others do not: all have to vary over the same ones.
    arrays = jax.tree.leaves((features, query))
    nothing = functools.reduce(operator.add, [jnp.zeros_like(array, query.points.dtype, ()) for array in arrays])
    features, query = jax.tree.map(lambda array: array + nothing.astype(array.dtype), (features, query))
    return _jitted_sum(levels, features, query)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum(levels: tuple[Level, ...], features: jax.Array, query: Query) -> jax.Array:
    """The sum, for all queries at once; on a TPU, which keeps what is read, for one block of them after another."""
    at_once, in_blocks = functools.partial(_sum_points, levels), functools.partial(_sum_blocks, levels)
    return lax.platform_dependent(features, query, tpu=in_blocks, default=at_once)


def _sum_points(levels: tuple[Level, ...], features: jax.Array, query: Query) -> jax.Array:
    """A point after another: what is read is weighed and added as it is read."""
    y = _zeros(features, query)
    for level in levels:

        def add(y, point, level=level):
            at = _locate(level, _take(query, point, 1, axis=2 + query.heads))
            return y + _read(level, features, at), None

        y, _ = lax.scan(add, y, level.first_point + jnp.arange(level.points, dtype=jnp.int32))
    return y


def _sum_blocks(levels: tuple[Level, ...], features: jax.Array, query: Query) -> jax.Array:
    """The same for one block of queries after another."""
    blocks = _blocks_of(query.points.shape[1], _FEWEST)

    def fill(y, block):
        part = _sum_points(levels, features, _take(query, blocks.start(block), blocks.size, axis=1))
        return lax.dynamic_update_slice_in_dim(y, part, blocks.start(block), 1, allow_negative_indices=False), None

    return lax.scan(fill, _zeros(features, query), jnp.arange(blocks.number, dtype=jnp.int32))[0]


def _sum_jvp(levels, primals, tangents):
    dots = [None if isinstance(dot, SymbolicZero) else dot for dot in jax.tree.leaves(tangents)]
    tangents = jax.tree.unflatten(jax.tree.structure(primals), dots)
    push, pull = functools.partial(_push, levels, primals), functools.partial(_pull, levels, primals)
    return _sum(levels, *primals), _transposable(push, pull, tangents, _zeros(*primals))


_sum.defjvp(_sum_jvp, symbolic_zeros=True)
_jitted_sum = jax.jit(_sum, static_argnums=0)  # a call outside of jit compiles once, not each time


def _transposable(push: Callable, pull: Callable, tangents: Any, zeros: jax.Array) -> jax.Array:
    """`push(tangents)`, which is linear, with a transpose that is stated: `pull(sums, v)` is sums + pushᵀ v.

    JAX's own would, for each reading, make a map of zeros, add to it, and add that to the gradient.
    """
    # To state a transpose, and be differentiated on to any order, JAX has linear equations. This one,
    #     x = tangents,  y - push x = zeros,
    # is solved by y = zeros + push tangents; and its transpose, u - pushᵀ v = sums,  v = v, by u = sums + pushᵀ v.

    def equation(unknown):
        x, y = _tie(unknown)
        return _tie((x, y - push(x)))

    solution = lax.custom_linear_solve(
        equation,
        _tie((tangents, zeros)),
        solve=lambda _, right: (right[0], right[1] + push(right[0])),
        transpose_solve=lambda _, right: (pull(*right), right[1]),
    )
    return _tie(solution)[1]


def _tie(tree: Any) -> Any:
    """The same arrays, each of which depends on all by a sum over no elements: XLA drops it, JAX does not look into it."""
    # A linear equation wants all parts of its right-hand side to depend on what is differentiated, or none.
    sums = [jnp.real(jnp.sum(lax.slice_in_dim(array, 0, 0, axis=-1))) for array in jax.tree.leaves(tree)]
    widest = wide(*[total.dtype for total in sums])
    nothing = functools.reduce(operator.add, [total.astype(widest) for total in sums])
    return jax.tree.map(lambda array: array + nothing.astype(array.dtype), tree)


def _push(levels: tuple[Level, ...], primals, tangents) -> jax.Array:
    """The tangent of the sum, for one block of queries after another: `(B, Q, *M, D)`."""
    (features, query), (features_dot, query_dot) = primals, tangents
    moving = jax.tree.leaves(query_dot)
    pairs = zip(query, query_dot, strict=True)
    query_dot = Query(*(dot if a is None or dot is not None else jnp.zeros_like(a) for a, dot in pairs))
    blocks = _cut(levels, features.shape[1], query.points.shape[1])
    y = _zeros(features, query)
    for level in levels:

        @functools.partial(jax.checkpoint, prevent_cse=False)  # keeps nothing for derivatives of higher order
        def push_block(block, level=level):
            parts = [_take_points(level, blocks, block, tree) for tree in (query, query_dot)]
            weigh = functools.partial(_corners, level, blocks, block)
            weight, weight_dot, (row, read) = jax.jvp(weigh, parts[:1], parts[1:], has_aux=True)
            y = 0
            if moving:
                y = y + _read_apart(level, features, row, read, weight_dot)
            if features_dot is not None:
                y = y + _read_apart(level, features_dot, row, read, weight)
            return y

        def add_block(y, block, push_block=push_block):
            return _add_at(y, push_block(block), blocks.start(block)), None

        y, _ = lax.scan(add_block, y, jnp.arange(blocks.number, dtype=jnp.int32))
    return y


def _pull(levels: tuple[Level, ...], primals, sums, cotangent):
    """`sums`, of the shapes of the primals (None where none is wanted), with the gradients of the primals added."""
    features, query = primals
    blocks = _cut(levels, features.shape[1], query.points.shape[1])
    for level in levels:
        step = functools.partial(_pull_block, level, blocks, primals, cotangent)
        sums, _ = lax.scan(step, sums, jnp.arange(blocks.number, dtype=jnp.int32))
    return sums


def _pull_block(level: Level, blocks: "_Blocks", primals, cotangent, sums, block):
    """A level's gradients from a block of q queries, added where the sums lie."""
    (features, query), (features_sum, query_sum) = primals, sums
    v = _take(cotangent, blocks.start(block), blocks.size, axis=1)  # (B, q, *M, D)
    part = _take_points(level, blocks, block, query)
    weigh = functools.partial(_corners, level, blocks, block)
    weight, pull, (row, read) = jax.vjp(weigh, part, has_aux=True)
    if features_sum is not None:
        to = jnp.where(read, row + int32(level.first_row), int32(features.shape[1]))
        features_sum = _add_rows(features_sum, to, weight[..., None].astype(v.dtype) * jnp.expand_dims(v, (-3, -2)))
    if jax.tree.leaves(query_sum):
        rows = _take_rows(level, features, row)
        products = jnp.einsum("bq...pkd,bq...d->bq...pk", rows, v, precision=lax.Precision.HIGHEST)
        (gradient,) = pull(jnp.where(read, jnp.real(products), 0).astype(weight.dtype))
        at = 0, blocks.start(block), *[0] * query.heads, level.first_point
        pairs = zip(query_sum, gradient, strict=True)
        query_sum = Query._make(None if a is None else _add_window(a, g, at) for a, g in pairs)
    return (features_sum, query_sum), None


# Reading


def _locate(level: Level, query: Query) -> Rows:
    """The rows of a level that its points read: arrays `(B, Q, *M, P)`."""
    axes = jnp.moveaxis(query.points[..., ::-1], -1, 0)
    sizes = (jnp.asarray(int32(size), axes.dtype) for size in level.border.spatial)
    points = jnp.stack([level.to_pixels(x, size) for x, size in zip(axes, sizes, strict=True)], axis=-1)
    scale = None if query.weights is None else query.weights[..., None]
    at = locate(Positions(jnp.int32(0), points[..., None, :]), scale, level.border, level.method)
    return jax.tree.map(lambda array: array[..., 0], at)


def _read(level: Level, features: jax.Array, at: Rows) -> jax.Array:
    """Weighted rows, summed over the points: `(B, S, *M, D)`, `(B, Q, *M, P)` -> `(B, Q, *M, D)`."""
    read = functools.partial(sum_rows, span=(level.first_row, level.rows))
    return jnp.sum(_each_head(read, features, at), axis=-2)


def _take_points(level: Level, blocks: "_Blocks", block: jax.Array, query: Query) -> Query:
    """The points of a level that the queries of a block read."""
    part = _take(query, blocks.start(block), blocks.size, axis=1)
    first, last = level.first_point, level.first_point + level.points
    return jax.tree.map(lambda array: lax.slice_in_dim(array, first, last, axis=2 + query.heads), part)


def _corners(level: Level, blocks: "_Blocks", block: jax.Array, query: Query):
    """The corners of points: their weights, and (their rows of the level, whether these are read): `(B, q, *M, P, K)`."""
    at = _locate(level, query)
    row = jnp.stack(at.row, -1)
    return jnp.stack(at.weight, -1), (row, (row < int32(level.rows)) & blocks.fresh(block, row.ndim))


def _read_apart(level: Level, features: jax.Array, row: jax.Array, read: jax.Array, weight: jax.Array) -> jax.Array:
    """The weighted sum over points and corners, `(B, q, *M, D)`, as JAX can transpose it."""
    rows = jnp.where(read[..., None], _take_rows(level, features, row), 0)
    return jnp.einsum("bq...pkd,bq...pk->bq...d", rows, weight.astype(rows.dtype), precision=lax.Precision.HIGHEST)


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


def _add_rows(features: jax.Array, row: jax.Array, added: jax.Array) -> jax.Array:
    """`features` `(B, S, *M, D)` with `(B, q, *M, P, K, D)` added at rows `(B, q, *M, P, K)`; those beyond S are dropped."""
    # Not by vmap, which would bring the heads of `features` to the front and move them all each time.
    batching = (0, 2)[: features.ndim - 2]  # batch and heads
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(added.ndim - 1,),
        inserted_window_dims=(1,),
        scatter_dims_to_operand_dims=(1,),
        operand_batching_dims=batching,
        scatter_indices_batching_dims=batching,
    )
    return lax.scatter_add(features, row[..., None], added, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)


# Blocks


class _Blocks(NamedTuple):
    """Queries cut into blocks of one size; where that does not divide them, the last begins early."""

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


# Fewer queries are no reason for fewer: what many read at once does not stay in the caches.
_FEWEST = 8


def _cut(levels: tuple[Level, ...], pixels: Size, queries: Size) -> _Blocks:
    """Blocks so small that what each reads of a level is half of the result, or of the features if they are more."""
    corners = [2 ** len(level.border.spatial) if level.method == "linear" else 1 for level in levels]
    most = max(_FEWEST, *(2 * level.points * each for level, each in zip(levels, corners, strict=True)))
    if not (isinstance(queries, int) and isinstance(pixels, int)):
        return _blocks_of(queries, _FEWEST)
    return _blocks_of(queries, max(_FEWEST, min(most, round(most * queries / max(pixels, 1)))))


def _blocks_of(queries: Size, number: int) -> _Blocks:
    """Queries in about so many blocks."""
    size = -(-queries // number)
    return _Blocks(queries, size, -(-queries // max(size, 1)) if isinstance(queries, int) else number)


def _take(tree: Any, start: Any, size: Size, axis: int) -> Any:
    """The part of each array of a tree that begins at `start` along an axis."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, axis, allow_negative_indices=False), tree)


def _add_at(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """`total` `(B, Q, *M, D)` with `part` `(B, size, M, D)` added from query `start` on."""
    # Not by slicing and updating: the gradient of `total` would be moved in each step, where that of an addition stays.
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(total.ndim)), inserted_window_dims=(), scatter_dims_to_operand_dims=(1,)
    )
    return lax.scatter_add(
        total, start[None], part, numbers, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
    )


def _add_window(total: jax.Array, part: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    """`total` with `part` added from an element on, given by its first axes."""
    whole = [jnp.asarray(i, jnp.int32) for i in (*start, *[0] * (total.ndim - len(start)))]
    old = lax.dynamic_slice(total, whole, part.shape, allow_negative_indices=False)
    return lax.dynamic_update_slice(total, old + part, whole, allow_negative_indices=False)


def _zeros(features: jax.Array, query: Query) -> jax.Array:
    """Zeros to start the sum with."""
    return jnp.zeros_like(features, shape=(*query.points.shape[:-2], features.shape[-1]))
