"""Used inside a kernel: loops and index arithmetic, and loading, storing and adding blocks of an array.

`Elements` are some elements of an array: their indices, and a mask of those to read or write.
A block may reach beyond the end of its axis. Elements beyond it are masked.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton
from jax.ref import addupdate

from dcn_jax._core.pallas import atomics


def loop(count: int, body: Callable, start):
    """`lax.fori_loop` from 0 to `count`, with a 32-bit counter."""
    if count == 1:
        return body(np.int32(0), start)
    # If x64 is enabled, JAX counts in 64 bits, whatever the dtype of the limits.
    return lax.fori_loop(0, count, lambda number, carry: body(number.astype(jnp.int32), carry), start)


def quotient(number: jax.Array, divisor: int) -> jax.Array:
    """`number // divisor`, for numbers that are not negative."""
    # `//` rounds down, so it compiles to a comparison, a selection and a second division, for
    # negative numbers. A Python int would make the division a 64-bit one if x64 is enabled.
    return lax.div(number, np.int32(divisor))


def unravel(number: jax.Array, *sizes: int) -> list[jax.Array]:
    """The index of the `number`-th element of an array `(…, *sizes)`. For one size: the quotient and the remainder."""
    index = []
    for size in reversed(sizes):
        index.append(lax.rem(number, np.int32(size)))
        number = quotient(number, size)
    return [number, *reversed(index)]


@dataclasses.dataclass(frozen=True)
class Elements:
    """Some elements of an array."""

    index: tuple[Any, ...]  # one entry for each axis of the array; the entries broadcast to each other
    exists: jax.Array | None  # a mask: which elements to read or write; None means all


def block(number, size: int, limit: int) -> Elements:
    """The `number`-th block of `size` elements on an axis of `limit` elements."""
    index = number * size + jnp.arange(size, dtype=jnp.int32)
    return Elements((index,), None if limit % size == 0 else index < limit)


def shift(elements: Elements, start) -> Elements:
    """Elements of one axis, each moved up by `start`."""
    return Elements((start + elements.index[0],), elements.exists)


def outer(rows: Elements, columns: Elements, *leading) -> Elements:
    """A matrix of elements: each of `rows` with each of `columns`.

    `leading` are indices of the array's first axes, `rows` of the next ones, `columns` of the last.
    """
    index = (*leading, *(i[:, None] for i in rows.index), *(i[None, :] for i in columns.index))
    rows_exist = None if rows.exists is None else rows.exists[:, None]
    columns_exist = None if columns.exists is None else columns.exists[None, :]
    if rows_exist is None or columns_exist is None:
        return Elements(index, columns_exist if rows_exist is None else rows_exist)
    return Elements(index, rows_exist & columns_exist)


def load(ref, elements: Elements, other: int = 0) -> jax.Array:
    """Read elements. Those that do not exist read as `other`."""
    if elements.exists is None:
        return triton.load(ref.at[elements.index])
    return triton.load(ref.at[elements.index], mask=elements.exists, other=jnp.array(other, ref.dtype))


def store(ref, elements: Elements, value) -> None:
    """Write the elements that exist."""
    triton.store(ref.at[elements.index], value.astype(ref.dtype), mask=elements.exists)


def add(ref, elements: Elements, value, *, interpret: bool) -> None:
    """Add to the elements that exist; other programs may add to them at the same time."""
    if not interpret:
        atomics.add(ref, elements.index, value, elements.exists)
        return
    # `addupdate` has no mask, and a masked index may lie in the array: there, 0 is added.
    addupdate(ref, elements.index, value if elements.exists is None else jnp.where(elements.exists, value, 0.0))
