"""The three GPU kernels. Each gathers, interpolates, modulates and multiplies in one pass.

    y(p)         = Σ_n  s_n(p) · w_n                   s_n(p) = Σ_q  W_q(r_n) · x_q           forward
    x_bar_q      = Σ_p Σ_n  W_q(r_n) · s_bar_n(p)      s_bar_n(p) = y_bar(p) · w_nᵀ           backward_x
    W_bar_q(r_n) = Σ_c  x_q · s_bar_n(p)               w_bar_n = Σ_p  s_n(p)ᵀ · y_bar(p)      backward_kernel

At the output position p, tap n reads at the point r_n. The pixels x_q around it are its corners.
W_q is the weight of a corner times the modulation; `points` has found the weights, and which rows
of x are the corners. The sample s_n is a row of channels, w_n is the tap's matrix, and x_bar is the
gradient of x, and so on. The samples are never written to memory.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from dcn_jax._core.pallas import asm
from dcn_jax._core.pallas.blocks import Elements, add, load, loop, outer, quotient, store, unravel
from dcn_jax.ops.deform_conv.pallas_gpu import tiles
from dcn_jax.ops.deform_conv.pallas_gpu.tiles import GpuCall, Segment, Tiling

# The references are to whole arrays, without the stack axis:
#
#     x_ref, x_bar_ref              (B, R, C // offset groups), with R rows: one for each pixel and offset group
#     kernel_ref, kernel_bar_ref    (K, C // feature groups, F): a matrix for each tap
#     row_ref                       (B, OG * K, corners, P): which rows of x the points read, R outside the map
#     weight_ref                    (B, OG * K, corners, P)
#     weight_bar_ref                (B, OG * K, terms, corners, P): its terms are added up afterwards
#     bias_ref                      (F,), or None
#     y_ref, y_bar_ref              (B, P, F)


def forward(x_ref, kernel_ref, row_ref, weight_ref, bias_ref, y_ref, *, tiling: Tiling):
    """y, bias included, for a tile of positions and a block of features.

    Grid: the blocks of features of all feature groups, the tiles of positions.
    """
    feature_group, number = unravel(pl.program_id(0), tiling.feature_blocks)
    features = tiling.group_features(feature_group, number)
    positions = tiles.tile_positions(tiling, x_ref.shape[0], pl.program_id(1))

    # The loop over channels is the inner one: rows and weights are the same for all channels.
    def add_points(number, total):
        tap, in_feature_group = unravel(number, tiling.segments_per_feature_group)
        segment = feature_group * tiling.segments_per_feature_group + in_feature_group
        offset_group = quotient(segment, tiling.segments_per_offset_group)
        segment = Segment(segment, offset_group, feature_group, in_feature_group)
        corners = _corners(tiling, x_ref, row_ref, weight_ref, positions, offset_group, tap)

        def add_channels(number, total):
            channels = tiling.segment_channels(number)
            pixels = _pixels(x_ref, positions, corners, tiling.x_columns(segment, channels))
            samples = _samples(tiling, pixels, corners)
            matrix = load(kernel_ref, outer(tiling.matrix_rows(segment, channels), features, tap))
            return _add_product(tiling.call, total, samples, matrix)

        return loop(tiling.channel_blocks, add_channels, total)

    total = jnp.zeros((tiling.tile.positions, tiling.tile.features), jnp.float32)
    total = loop(tiling.window.taps * tiling.segments_per_feature_group, add_points, total)
    if bias_ref is not None:
        total += load(bias_ref, features).astype(jnp.float32)[None, :]
    store(y_ref, outer(positions, features), total)


def backward_x(kernel_ref, row_ref, weight_ref, y_bar_ref, x_bar_ref, *, tiling: Tiling):
    """Adds to x_bar, which starts as float32 zeros, for a tile of positions and a block of channels.

    Grid: the blocks of channels of all segments, the tiles of positions.
    """
    number, channel_block = unravel(pl.program_id(0), tiling.channel_blocks)
    segment, channels = tiling.segment(number), tiling.segment_channels(channel_block)
    columns = tiling.x_columns(segment, channels)
    positions = tiles.tile_positions(tiling, x_bar_ref.shape[0], pl.program_id(1))

    def add_tap(tap, carry):
        corners = _corners(tiling, x_bar_ref, row_ref, weight_ref, positions, segment.offset_group, tap)
        samples_bar = _samples_bar(tiling, kernel_ref, y_bar_ref, positions, tap, segment, channels)
        for corner in corners:
            pixels = outer(_corner_rows(positions, corner), columns)
            add(x_bar_ref, pixels, corner.weight[:, None] * samples_bar, interpret=tiling.call.interpret)
        return carry

    loop(tiling.window.taps, add_tap, np.int32(0))


def backward_kernel(
    x_ref, kernel_ref, row_ref, weight_ref, y_bar_ref, weight_bar_ref, kernel_bar_ref, *, tiling: Tiling, splits: int
):
    """kernel_bar and a term of weight_bar, for a tap, a block of channels and a block of features.

    Both need the same pixels. The sum over the chunks of positions is divided among `splits`
    programs. If there are several, they add to kernel_bar, which starts as float32 zeros. Grid: the
    taps and blocks, the splits.
    """
    images, call = x_ref.shape[0], tiling.call
    tap, number, channel_block, feature_block = unravel(
        pl.program_id(0), call.segments, tiling.channel_blocks, tiling.feature_blocks
    )
    segment, channels = tiling.segment(number), tiling.segment_channels(channel_block)
    features = tiling.group_features(segment.feature_group, feature_block)
    columns, rows = tiling.x_columns(segment, channels), tiling.matrix_rows(segment, channels)
    matrix = load(kernel_ref, outer(rows, features, tap))
    term = tiling.weight_term(segment, channel_block, feature_block)
    count = pl.cdiv(tiles.count_chunks(tiling, images), splits)
    first = pl.program_id(1) * count

    zeros = jnp.zeros((tiling.tile.positions, tiling.tile.channels), jnp.float32)

    def add_positions(number, total):
        positions = tiles.chunk_positions(tiling, images, first + number)
        corners = _corners(tiling, x_ref, row_ref, weight_ref, positions, segment.offset_group, tap)
        pixels = _pixels(x_ref, positions, corners, columns)
        samples = _samples(tiling, pixels, corners)
        y_bar = load(y_bar_ref, outer(positions, features))
        samples_bar = _add_product(call, zeros, y_bar, matrix, ((1,), (1,)))
        image, position = positions.index
        for corner, of_corner in enumerate(pixels):
            index = (image, _point(tiling, segment.offset_group, tap), term, corner, position)
            products = asm.multiply_pixels(of_corner, samples_bar, interpret=call.interpret)
            store(weight_bar_ref, Elements(index, positions.exists), jnp.sum(products, axis=1))
        # The transpose of kernel_bar: a Hopper GPU multiplies 64 rows or more, and channels may be fewer.
        return _add_product(call, total, y_bar, samples, ((0,), (0,)))

    total = loop(count, add_positions, jnp.zeros((tiling.tile.features, tiling.tile.channels), jnp.float32)).T
    if splits == 1:
        store(kernel_bar_ref, outer(rows, features, tap), total)
    else:
        add(kernel_bar_ref, outer(rows, features, tap), total, interpret=call.interpret)


class _Corner(NamedTuple):
    """One corner of the point that a tap reads at each position of a tile: arrays `(positions,)`."""

    row: jax.Array
    exists: jax.Array  # whether the corner lies in the map, and the position exists
    weight: jax.Array


def _corners(tiling: Tiling, x_ref, row_ref, weight_ref, positions: Elements, offset_group, tap) -> list[_Corner]:
    """The corners of the points of a tap and an offset group."""
    image, position = positions.index
    rows, corners = x_ref.shape[1], row_ref.shape[2]
    found = []
    for corner in range(corners):
        at = Elements((image, _point(tiling, offset_group, tap), corner, position), positions.exists)
        row = load(row_ref, at, other=rows)
        found.append(_Corner(row, row < rows, load(weight_ref, at)))
    return found


def _point(tiling: Tiling, offset_group, tap):
    """The index of a tap's points on the axis `OG * K`."""
    return offset_group * tiling.window.taps + tap


def _pixels(x_ref, positions: Elements, corners: list[_Corner], columns: Elements) -> list[jax.Array]:
    """x_q for each corner, zero outside the map: `(positions, channels)`."""
    return [load(x_ref, outer(_corner_rows(positions, corner), columns)) for corner in corners]


def _corner_rows(positions: Elements, corner: _Corner) -> Elements:
    """The rows of x that hold one corner, indexed (image, row)."""
    return Elements((positions.index[0], corner.row), corner.exists)


def _samples(tiling: Tiling, pixels: list[jax.Array], corners: list[_Corner]) -> jax.Array:
    """s_n(p) = Σ_q W_q(r_n) · x_q: `(positions, channels)`, in the dtype of the matrix products."""
    weights = [corner.weight for corner in corners]
    return asm.weighted_sum(pixels, weights, tiling.call.spec.dtype, interpret=tiling.call.interpret)


def _samples_bar(tiling: Tiling, kernel_ref, y_bar_ref, positions, tap, segment: Segment, channels) -> jax.Array:
    """s_bar_n(p) = y_bar(p) · w_nᵀ: `(positions, channels)`, in float32."""
    rows = tiling.matrix_rows(segment, channels)

    def add_features(number, total):
        features = tiling.group_features(segment.feature_group, number)
        y_bar = load(y_bar_ref, outer(positions, features))
        matrix = load(kernel_ref, outer(rows, features, tap))
        return _add_product(tiling.call, total, y_bar, matrix, ((1,), (1,)))

    total = jnp.zeros((tiling.tile.positions, tiling.tile.channels), jnp.float32)
    return loop(tiling.feature_blocks, add_features, total)


def _add_product(call: GpuCall, total, a, b, contract=((1,), (0,))) -> jax.Array:
    """`total + a · b`, contracted over the axes `contract`: operands of the call's dtype, a sum in float32."""
    dot = functools.partial(lax.dot_general, dimension_numbers=(contract, ((), ())), preferred_element_type=jnp.float32)
    a, b = a.astype(call.spec.dtype), b.astype(call.spec.dtype)
    if call.interpret:  # the machine that interprets has no TF32
        exact = call.dot_algorithm == lax.DotAlgorithmPreset.F32_F32_F32
        return total + dot(a, b, precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT)
    if call.spec.dtype != "float32":
        return total + dot(a, b)
    if call.dot_algorithm != lax.DotAlgorithmPreset.TF32_TF32_F32:
        return total + dot(a, b, precision=call.dot_algorithm)
    # Three products of bfloat16 instead of one of TF32: they keep 16 bits where TF32 has 11, and a
    # Hopper GPU cannot transpose an operand of TF32.
    (a, a_rest), (b, b_rest) = asm.split_bfloat16(a), asm.split_bfloat16(b)
    return total + dot(a_rest, b) + dot(a, b_rest) + dot(a, b)
