"""Reading for one block of queries after another, so that little is in memory at once.

A result alone is made in one go: what it reads is weighed and added as it is read. It is the
derivative that holds what many queries read, and so takes them block by block.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax.geometry import Size, int32


def derived_in_blocks(compute: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`compute(spec, *arrays, derivative=…)` as a function `(spec, *arrays)`.

    Its derivative is that of `compute` with `derivative=True`.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def result(spec, *arrays):
        return compute(spec, *arrays, derivative=False)

    def result_jvp(spec, primals, tangents):
        active = [i for i, dot in enumerate(tangents) if not isinstance(dot, SymbolicZero)]

        def of_active(*arguments):
            whole = (arguments[active.index(i)] if i in active else primal for i, primal in enumerate(primals))
            return compute(spec, *whole, derivative=True)

        dot = jax.jvp(of_active, [primals[i] for i in active], [tangents[i] for i in active])[1]
        return result(spec, *primals), dot

    result.defjvp(result_jvp, symbolic_zeros=True)
    return jax.jit(result, static_argnums=0)  # a call outside of jit compiles once, not each time


def count_blocks(queries: Size, pixels: Size, most: int) -> int:
    """`most` where there are as many queries as pixels, fewer for fewer.

    For each block's gradient is added to whole maps.
    """
    if not (isinstance(queries, int) and isinstance(pixels, int)):
        return min(4, most)
    return max(1, min(most, round(most * queries / max(pixels, 1))))


def in_blocks(read: Callable[..., jax.Array], query: Any, zeros: jax.Array, blocks: int) -> jax.Array:
    """`read` for all queries, `blocks` times for a part of them; what it reads is read again in the backward pass.

    `query` is a tree of arrays `(B, Q, …)`, `zeros` what to add the results to, `(B, Q,
    *features)`. `read(part, fresh)` takes the same tree for some of the queries and returns `(B,
    size, *features)`. Where blocks of one size do not divide the queries, the last one begins
    early: `fresh`, `(size,)`, says which of its queries have not been read before, and for the
    others `read` has to return zeros; it is None where all are fresh.
    """
    queries: Size = zeros.shape[1]
    size = -(-queries // blocks)
    known = isinstance(queries, int)
    if known and size:
        blocks = -(-queries // size)
    if blocks == 1 or (known and not queries):
        return zeros + read(query, None)
    fits = known and blocks * size == queries

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def read_block(query, block):
        start = jnp.minimum(block * int32(size), int32(queries - size))
        part = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, 1, allow_negative_indices=False), query)
        fresh = None if fits else start + lax.iota(jnp.int32, size) >= block * int32(size)
        return read(part, fresh), start

    def add_block(total, block):
        return _add_at(total, *read_block(query, block)), None

    return lax.scan(add_block, zeros, jnp.arange(blocks, dtype=jnp.int32))[0]


def _add_at(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """`total` `(B, Q, …)` with `part` `(B, size, …)` added from `start` on."""
    # Not by slicing and updating: the gradient of `total` would be moved in each step, where
    # that of an addition stays.
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(total.ndim)), inserted_window_dims=(), scatter_dims_to_operand_dims=(1,)
    )
    return lax.scatter_add(
        total, start[None], part, numbers, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
    )


def zeros_over(shape: tuple[Size, ...], dtype: Any, *arrays: jax.Array) -> jax.Array:
    """Zeros to start a sum over `arrays` with."""
    # Within shard_map a scan wants its sum, from the start, to vary over the devices that any of
    # its arguments vary over.
    return functools.reduce(operator.add, [jnp.zeros_like(array, dtype, shape) for array in arrays])
