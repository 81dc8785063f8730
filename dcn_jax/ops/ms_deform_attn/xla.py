"""The op in `jax.numpy`: a block of queries, a level and a point after another, so that little is in memory at once.

`run` brings the arrays to one batch axis; `_attend` is the sum; `_sum_levels` is the sum for a
block of queries, and `_sum_points` that over one level; `_read` reads some of its points.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._mesh import on_any_mesh
from dcn_jax._numerics import wide
from dcn_jax.geometry import int32
from dcn_jax.ops._blocks import count_blocks, derived_in_blocks, in_blocks, zeros_over
from dcn_jax.ops.ms_deform_attn.call import Arrays, Level, Spec
from dcn_jax.sampling import Border, Positions, locate, sum_rows

# In so many blocks of queries is the derivative taken where they are as many as pixels. Each
# takes time (48 MB of an encoder's maps are filled and added for every 16 MB) and saves memory:
# eight take 4.6 times that of the result, 36 take 3.
_BLOCKS = 36


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """`ms_deform_attn` of a checked call."""
    batch = arrays.value.ndim - 3
    return on_any_mesh(functools.partial(_attend_flat, spec), arrays, batched=arrays, batch=batch, whole=2)


def _attend_flat(spec: Spec, value, locations, weights) -> jax.Array:
    """Bring the arrays to one batch axis, and the result back."""
    batch, (heads, channels) = value.shape[:-3], value.shape[-2:]
    dtype = wide(value.dtype, locations.dtype, weights.dtype)
    position = wide(locations.dtype, jnp.finfo(value.dtype).dtype)

    def flatten(array, dtype):
        return array.reshape(math.prod(batch), *array.shape[len(batch) :]).astype(dtype)

    # A gradient is summed in the dtype that is read: hence in the result's already here.
    y = _attend(spec, flatten(value, dtype), flatten(locations, position), flatten(weights, position))
    return y.reshape(*batch, y.shape[1], heads * channels).astype(value.dtype)


@derived_in_blocks
def _attend(spec: Spec, value, locations, weights, *, derivative: bool) -> jax.Array:
    """`(B, S, M, D)`, `(B, Q, M, T, n)`, `(B, Q, M, T)` -> `(B, Q, M, D)`."""
    zeros = zeros_over((*weights.shape[:3], value.shape[-1]), value.dtype, value, locations, weights)
    blocks = count_blocks(locations.shape[1], value.shape[1], _BLOCKS) if derivative else 1
    return in_blocks(functools.partial(_sum_levels, spec, derivative, value), (locations, weights), zeros, blocks)


def _sum_levels(spec: Spec, derivative: bool, value, query, fresh) -> jax.Array:
    """The sum for some of the queries: `(B, S, M, D)`, (`(B, q, M, T, n)`, `(B, q, M, T)`) -> `(B, q, M, D)`."""
    locations, weights = query
    shape = (*weights.shape[:3], value.shape[-1])
    y = zeros_over(shape, value.dtype, value, *query)
    for level in spec.levels:
        # The derivative slices, that its steps may add to the level's pixels alone; else they
        # are read where they lie.
        pixels, first = (value[:, level.pixels], 0) if derivative else (value, level.pixels.start)
        y = _sum_points(level, spec.method, y, pixels, first, locations, weights, fresh)
    return y


def _sum_points(level: Level, method: str, y, pixels, start, locations, weights, fresh) -> jax.Array:
    """`y` `(B, q, M, D)` and the sum over a level's P points, of which each step takes `count`."""
    points = level.points.stop - level.points.start
    # One at a time, or all at once where they are few beside the pixels, to all of which each
    # step's gradient is added.
    queries, size = weights.shape[1], math.prod(level.spatial)
    known = isinstance(queries, int) and isinstance(size, int)
    few = known and 2 * queries * points * 2 ** len(level.spatial) <= size
    count = points if few else 1

    @functools.partial(jax.checkpoint, prevent_cse=False)  # keeps no samples for the backward pass
    def add(y, first):
        take = functools.partial(
            lax.dynamic_slice_in_dim, start_index=first, slice_size=count, allow_negative_indices=False
        )
        return y + _read(level, method, pixels, start, take(locations, axis=3), take(weights, axis=3), fresh), None

    if count == points:
        return add(y, jnp.int32(level.points.start))[0]
    return lax.scan(add, y, jnp.arange(level.points.start, level.points.stop, dtype=jnp.int32))[0]


def _read(level: Level, method: str, pixels, start, locations, weights, fresh) -> jax.Array:
    """Weighted values at points: `(B, S, M, D)`, `(B, q, M, P, n)`, `(B, q, M, P)` -> `(B, q, M, D)`, the sum over P."""
    size = jnp.stack([jnp.asarray(int32(s), locations.dtype) for s in level.spatial])
    points = locations[..., ::-1] * lax.expand_dims(size, range(locations.ndim - 1))
    if method == "discrete":
        points, border, method = points + 0.5, Border(level.spatial, ("edge",) * len(size)), "floor"
    else:
        points, border = points - 0.5, Border(level.spatial, ("zeros",) * len(size))
    at = locate(Positions(jnp.int32(0), points[..., None, :]), weights[..., None], border, method)
    at = jax.tree.map(lambda array: array[..., 0], at)  # (B, q, M, P)
    if fresh is not None:
        fresh, outside = fresh[:, None, None], int32(math.prod(level.spatial))
        at = at._replace(row=tuple(jnp.where(fresh, row, outside) for row in at.row))
    # Batch and heads as axes of their own, not in the index of the row: so they may be split
    # over devices.
    span = start, math.prod(level.spatial)
    read = jax.vmap(jax.vmap(functools.partial(sum_rows, span=span), in_axes=1, out_axes=1))
    return jnp.sum(read(pixels, at), axis=-2)
