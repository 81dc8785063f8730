"""Reading on a GPU, in few kernels: a quicker spelling of what `sampling` defines.

`sampling.Rows` marks a corner that is not read by a row after the last one. Here its row is some row of the map, and a
third array tells that it is not read. So XLA needs no kernels that compare rows.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core import dtypes
from dcn_jax.geometry import int32
from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.ops.deform_conv.xla.blocks import Blocks, Divided, border_of, fill_up, one_batch_axis
from dcn_jax.sampling import Positions, corners


class Maps(NamedTuple):
    """The maps, by groups of channels."""

    rows: Any  # (B, R, C / groups)
    wide_rows: Any  # in the dtype that products are summed in; gradients flow to it; None where `rows` are as wide

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of samples, and of the maps' gradients."""
        return (self.rows if self.wide_rows is None else self.wide_rows).dtype

    def zeros(self) -> jax.Array:
        """For gradients to be added to: `(B, R, C / groups)`."""
        return jnp.zeros_like(self.rows, self.dtype)

    def gradients(self, total: jax.Array) -> "Maps":
        """`total` as the gradient of `wide_rows` if they are given, and then zeros as that of `rows`; else as that of `rows`."""
        return Maps(total, None) if self.wide_rows is None else Maps(jnp.zeros_like(self.rows), total)


class Corners(NamedTuple):
    """Where points read: for each corner an array `(B, size, groups, K)`."""

    row: tuple[jax.Array, ...]
    is_read: tuple[jax.Array, ...]
    weight: tuple[jax.Array, ...]


def locate_taps(spec: Spec, blocks: Blocks, block: jax.Array, part: Divided, groups: int) -> tuple[Maps, Corners]:
    """The maps in `groups` groups of channels, and where the taps of a block read them."""
    window, batch_axes = spec.window, part.rows.ndim - 2

    def by_group(array, *each):  # (*B, size, [OG,] K * …) -> (*B, size, groups, K, …)
        array = array.reshape(*array.shape[: batch_axes + 1], spec.offset_groups, window.taps, *each)
        return jnp.repeat(array, groups // spec.offset_groups, batch_axes + 1)

    def split(rows):  # (*B, H * W * OG, Cg) -> (*B, H * W * groups, C / groups)
        width = spec.offset_groups * rows.shape[-1] // groups
        return rows.reshape(*rows.shape[:-2], math.prod(window.spatial) * groups, width)

    offset = by_group(part.offset, window.rank)
    offset = offset.astype(dtypes.wide(offset.dtype))
    scale = None if part.modulation is None else by_group(part.modulation)
    along = [
        Positions(lax.expand_dims(_regular(spec, blocks, block, axis), range(batch_axes)), offset[..., axis])
        for axis in range(window.rank)
    ]
    group = lax.broadcasted_iota(jnp.int32, offset.shape[:-1], batch_axes + 1)
    found = []
    for pixel, weight, is_read in corners(along, border_of(spec)):
        row = pixel[0]
        for size, index in zip(window.spatial[1:], pixel[1:], strict=True):
            row = row * int32(size) + index
        weight = weight if scale is None else weight * scale.astype(weight.dtype)
        found.append((row * groups + group if groups > 1 else row, is_read, weight))
    wide_rows = None if part.wide_rows is None else split(part.wide_rows)
    rows, wide_rows, found = one_batch_axis(split(part.rows), wide_rows, found)
    return Maps(rows, wide_rows), Corners(*map(tuple, zip(*found, strict=True)))


def _regular(spec: Spec, blocks: Blocks, block: jax.Array, axis: int) -> jax.Array:
    """Where the taps of a block read along an axis, before their offsets: `(size, 1, K)`."""
    # An iota for each axis: a table of positions, `(size, n)`, would be made by a kernel of its own.
    window, positions = spec.window, math.prod(spec.window.out_spatial)
    index = lax.broadcasted_iota(jnp.int32, window.out_spatial, axis).reshape(positions, 1, 1)
    index = fill_up(index, 0, blocks.number * blocks.size)
    index = lax.dynamic_slice_in_dim(index, block * int32(blocks.size), blocks.size, allow_negative_indices=False)
    tap = lax.broadcasted_iota(jnp.int32, window.size, axis).reshape(1, 1, window.taps)
    return window.place(axis, index, tap)


def samples_of(maps: Maps, at: Corners) -> jax.Array:
    """Σ over corners of weight · row of the map, or zero: `(B, size, groups, K, C / groups)`."""
    terms = [
        weight[..., None].astype(maps.dtype) * _read(maps, row, is_read)
        for row, is_read, weight in zip(*at, strict=True)
    ]
    return functools.reduce(operator.add, terms)


def pull_weights(maps: Maps, at: Corners, bar: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The samples, and the gradients of the corners' weights, where `bar` is that of the samples; each corner is read once."""
    bar = _of_maps(bar, maps.dtype)
    samples: Any = 0
    weight_bar = []
    for row, is_read, weight in zip(*at, strict=True):
        read = _read(maps, row, is_read)
        samples += weight[..., None].astype(maps.dtype) * read
        weight_bar.append(jnp.sum(jnp.real(bar * read), axis=-1).astype(weight.dtype))
    return samples, tuple(weight_bar)


def add_to_maps(total: jax.Array, at: Corners, bar: jax.Array) -> jax.Array:
    """`total`, `(B, R, C / groups)`, with weight · `bar` added to the row of each corner that is read, in one kernel."""
    none = int32(total.shape[1])
    row = jnp.stack([jnp.where(is_read, row, none) for row, is_read, _ in zip(*at, strict=True)], axis=1)
    update = jnp.stack(at.weight, axis=1)[..., None].astype(total.dtype) * _of_maps(bar, total.dtype)[:, None]

    def add(total, row, update):
        return total.at[row].add(update, mode="drop", wrap_negative_indices=False)

    return jax.vmap(add)(total, row, update)


def _of_maps(bar: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A gradient in the maps' dtype. That of a real map beside a complex kernel is the real part."""
    return (bar if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.real(bar)).astype(dtype)


def _read(maps: Maps, row: jax.Array, is_read: jax.Array) -> jax.Array:
    """Rows `(B, …)` of the maps, or zero: `(B, …, C / groups)`."""
    rows = _take(maps.rows, row) if maps.wide_rows is None else _take_narrow(*maps, row)
    return jnp.where(is_read[..., None], rows, 0)


@jax.custom_jvp
def _take_narrow(rows: jax.Array, wide_rows: jax.Array, row: jax.Array) -> jax.Array:
    return _take(rows, row).astype(wide_rows.dtype)


@_take_narrow.defjvp
def _take_narrow_jvp(primals, tangents):
    return _take_narrow(*primals), _take(tangents[1], primals[2])


@jax.vmap
def _take(rows: jax.Array, row: jax.Array) -> jax.Array:
    return rows.at[row].get(mode="promise_in_bounds", wrap_negative_indices=False)
