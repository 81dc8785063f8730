"""Inside a kernel: counting, which elements of an array a program holds, and reaching them.

A `Span` names elements of an array by their indices and says which of them exist: a block need not
fit its axis. Spans of rows and of columns make the span of a matrix.
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
    """`fori_loop` from 0, with 32-bit counters."""
    if count == 1:
        return body(np.int32(0), start)
    # JAX counts in 64 bits where x64 is enabled, whatever the dtype of the limits.
    return lax.fori_loop(0, count, lambda number, carry: body(number.astype(jnp.int32), carry), start)


def quotient(number: jax.Array, by: int) -> jax.Array:
    """`number // by`, of what is not negative."""
    # Not by //, which rounds down: for a sign that is not there it compares, selects and divides
    # again. And not by a Python int, which is 64 bits wide where x64 is enabled.
    return lax.div(number, np.int32(by))


def unravel(number: jax.Array, *sizes: int) -> list[jax.Array]:
    """The index of the `number`-th element of an array `(…, *sizes)`.

    Of one size, that is the quotient and the remainder.
    """
    index = []
    for size in reversed(sizes):
        index.append(lax.rem(number, np.int32(size)))
        number = quotient(number, size)
    return [number, *reversed(index)]


@dataclasses.dataclass(frozen=True)
class Span:
    """Elements of an array."""

    index: tuple[Any, ...]  # along each axis of the array; they broadcast to each other
    exists: jax.Array | None  # which of them are in the array; None: all


def block(number, size: int, limit: int) -> Span:
    """The `number`-th block of `size` elements on an axis of `limit`."""
    index = number * size + jnp.arange(size, dtype=jnp.int32)
    return Span((index,), None if limit % size == 0 else index < limit)


def shift(span: Span, start) -> Span:
    """A span of one axis, counted from `start`."""
    return Span((start + span.index[0],), span.exists)


def outer(rows: Span, columns: Span, *leading) -> Span:
    """A matrix of elements: rows along the axes before the last, columns along the last.

    `leading` are the indices of the whole matrix along the array's first axes.
    """
    index = (*leading, *(i[:, None] for i in rows.index), *(i[None, :] for i in columns.index))
    rows_exist = None if rows.exists is None else rows.exists[:, None]
    columns_exist = None if columns.exists is None else columns.exists[None, :]
    return Span(index, _both(rows_exist, columns_exist))


def _both(exist: jax.Array | None, exist_too: jax.Array | None) -> jax.Array | None:
    """Where both hold; None: everywhere."""
    if exist is None or exist_too is None:
        return exist_too if exist is None else exist
    return exist & exist_too


def load(ref, span: Span, other: int = 0) -> jax.Array:
    """Read elements, `other` for those that do not exist."""
    if span.exists is None:
        return triton.load(ref.at[span.index])
    return triton.load(ref.at[span.index], mask=span.exists, other=jnp.array(other, ref.dtype))


def store(ref, span: Span, value) -> None:
    """Write elements, but for those that do not exist."""
    triton.store(ref.at[span.index], value.astype(ref.dtype), mask=span.exists)


def add(ref, span: Span, value, *, interpret: bool) -> None:
    """Add to elements that other programs add to as well, but for those that do not exist."""
    if not interpret:
        atomics.add(ref, span.index, value, span.exists)
        return
    # The interpreter drops an index beyond the array, and counts one below zero from its end.
    addupdate(ref, span.index, value if span.exists is None else jnp.where(span.exists, value, 0.0))
