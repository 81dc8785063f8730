"""The three kernels. Each gathers, interpolates, modulates and multiplies in one pass.

No sample is ever written to memory: the backward kernels make again what they need.

    y(p0) = Σ_n  s_n(p0) · w_n,    s_n(p0) = Σ_q  W_q(p_n) · x_q

Here p_n stands for the point where tap n reads at p0, its offset included. Around it lie the corners
q, with the pixels x_q and the weights W_q, modulation included. Which pixels and weights these are,
is known before: `pallas_gpu_points` tells. The sample s_n is a row of channels, w_n the tap's matrix.
With g the gradient of y, a sample's gradient is ds_n(p0) = g(p0) · w_nᵀ, and so

    dx_q  = Σ_p0 Σ_n  W_q(p_n) · ds_n(p0)              backward_x
    dW_q  = Σ_c  x_q · ds_n(p0)                        backward_kernel
    dw_n  = Σ_p0  s_n(p0)ᵀ · g(p0)                     backward_kernel

All references are to whole arrays, without the stack's axis:

    x_ref, dx_ref                  (B, R, C // offset groups), R rows: a pixel has one for each offset group
    kernel_ref, dkernel_ref        (K, C // feature groups, F), a matrix for each tap
    row_ref                        (B, OG * K, corners, P), the rows that points read, R outside the map
    weight_ref                     (B, OG * K, corners, P)
    dweight_ref                    (B, OG * K, parts, corners, P), whose parts are summed later
    bias_ref                       (F,), or None
    y_ref, g_ref                   (B, P, F)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from dcn_jax._core.pallas import asm
from dcn_jax._core.pallas.blocks import Span, add, load, loop, outer, quotient, store, unravel
from dcn_jax.ops.deform_conv.pallas_gpu.tiles import (
    Cut,
    Plan,
    Segment,
    count_runs,
    run_positions,
    tile_positions,
)


def forward(x_ref, kernel_ref, row_ref, weight_ref, bias_ref, y_ref, *, cut: Cut):
    """y(p0) = Σ_n s_n(p0) · w_n + bias, for a tile of positions and a block of features.

    Grid: blocks of features of all feature groups, tiles of positions.
    """
    feature_group, number = unravel(pl.program_id(0), cut.feature_blocks)
    features = cut.group_features(feature_group, number)
    positions = tile_positions(cut, x_ref.shape[0], pl.program_id(1))

    # Channels inside: where a point reads, and with which weights, is the same for all of them.
    def add_points(number, total):
        tap, part = unravel(number, cut.segments_per_feature_group)
        segment = feature_group * cut.segments_per_feature_group + part
        offset_group = quotient(segment, cut.segments_per_offset_group)
        segment = Segment(segment, part, offset_group, feature_group)
        corners = _corners(cut, x_ref, row_ref, weight_ref, positions, offset_group, tap)

        def add_channels(number, total):
            channels = cut.segment_channels(number)
            pixels = _pixels(x_ref, positions, corners, cut.columns(segment, channels))
            samples = _weigh(cut, pixels, corners)
            matrix = load(kernel_ref, outer(cut.rows(segment, channels), features, tap))
            return _add_dot(cut.plan, total, samples, matrix)

        return loop(cut.channel_blocks, add_channels, total)

    total = jnp.zeros((cut.tile.positions, cut.tile.features), jnp.float32)
    total = loop(cut.window.taps * cut.segments_per_feature_group, add_points, total)
    if bias_ref is not None:
        total += load(bias_ref, features).astype(jnp.float32)[None, :]
    store(y_ref, outer(positions, features), total)


def backward_x(kernel_ref, row_ref, weight_ref, g_ref, dx_ref, *, cut: Cut):
    """dx_q += Σ_n W_q(p_n) · ds_n(p0), for a tile of positions and a block of channels.

    dx starts as zeros, in float32. Grid: blocks of channels of all segments, tiles of positions.
    """
    number, channel_block = unravel(pl.program_id(0), cut.channel_blocks)
    segment, channels = cut.segment(number), cut.segment_channels(channel_block)
    columns = cut.columns(segment, channels)
    positions = tile_positions(cut, dx_ref.shape[0], pl.program_id(1))

    def add_tap(tap, carry):
        corners = _corners(cut, dx_ref, row_ref, weight_ref, positions, segment.offset_group, tap)
        dsamples = _dsamples(cut, kernel_ref, g_ref, positions, tap, segment, channels)
        for corner in corners:
            add(
                dx_ref,
                outer(_rows(positions, corner), columns),
                corner.weight[:, None] * dsamples,
                interpret=cut.plan.interpret,
            )
        return carry

    loop(cut.window.taps, add_tap, np.int32(0))


def backward_kernel(x_ref, kernel_ref, row_ref, weight_ref, g_ref, dweight_ref, dkernel_ref, *, cut: Cut, splits: int):
    """dw_n = Σ_p0 s_n(p0)ᵀ · g(p0) and dW_q = Σ_c x_q · ds_n(p0), for a tap and a block of channels and of features.

    Both read the same pixels. The sum over all runs of positions is split over `splits` programs; where
    these are several, dkernel starts as zeros, in float32. Grid: taps and blocks, splits.
    """
    images = x_ref.shape[0]
    tap, number, channel_block, feature_block = unravel(
        pl.program_id(0), cut.plan.segments, cut.channel_blocks, cut.feature_blocks
    )
    segment, channels = cut.segment(number), cut.segment_channels(channel_block)
    features = cut.group_features(segment.feature_group, feature_block)
    columns, rows = cut.columns(segment, channels), cut.rows(segment, channels)
    matrix = load(kernel_ref, outer(rows, features, tap))
    part = cut.part(segment, channel_block, feature_block)
    count = pl.cdiv(count_runs(cut, images), splits)
    first = pl.program_id(1) * count

    zeros = jnp.zeros((cut.tile.positions, cut.tile.channels), jnp.float32)

    def add_positions(number, total):
        positions = run_positions(cut, images, first + number)
        corners = _corners(cut, x_ref, row_ref, weight_ref, positions, segment.offset_group, tap)
        pixels = _pixels(x_ref, positions, corners, columns)
        samples = _weigh(cut, pixels, corners)
        g = load(g_ref, outer(positions, features))
        dsamples = _add_dot(cut.plan, zeros, g, matrix, ((1,), (1,)))
        image, position = positions.index
        for corner, read in enumerate(pixels):
            at = Span((image, _point(cut, segment.offset_group, tap), part, corner, position), positions.exists)
            store(dweight_ref, at, jnp.sum(asm.multiply(read, dsamples, interpret=cut.plan.interpret), axis=1))
        # Transposed, for on a Hopper GPU the left operand has 64 rows at least, and features are many.
        return _add_dot(cut.plan, total, g, samples, ((0,), (0,)))

    total = loop(count, add_positions, jnp.zeros((cut.tile.features, cut.tile.channels), jnp.float32)).T
    if splits == 1:
        store(dkernel_ref, outer(rows, features, tap), total)
    else:
        add(dkernel_ref, outer(rows, features, tap), total, interpret=cut.plan.interpret)


class _Corner(NamedTuple):
    """One of the pixels that each position's point reads; arrays `(positions,)`."""

    row: jax.Array
    read: jax.Array  # whether it is in the map, and the position exists
    weight: jax.Array


def _corners(cut: Cut, x_ref, row_ref, weight_ref, positions: Span, offset_group, tap) -> list[_Corner]:
    """What the points of a tap and an offset group read."""
    image, position = positions.index
    rows, corners = x_ref.shape[1], row_ref.shape[2]
    found = []
    for corner in range(corners):
        at = Span((image, _point(cut, offset_group, tap), corner, position), positions.exists)
        row = load(row_ref, at, other=rows)
        found.append(_Corner(row, row < rows, load(weight_ref, at)))
    return found


def _point(cut: Cut, offset_group, tap):
    """The number of a tap's points in an offset group."""
    return offset_group * cut.window.taps + tap


def _pixels(x_ref, positions: Span, corners: list[_Corner], columns: Span) -> list[jax.Array]:
    """x_q, zero outside the map: for each corner, `(positions, channels)`."""
    return [load(x_ref, outer(_rows(positions, corner), columns)) for corner in corners]


def _rows(positions: Span, corner: _Corner) -> Span:
    """The rows of one corner, indexed (image, row)."""
    return Span((positions.index[0], corner.row), corner.read)


def _weigh(cut: Cut, pixels: list[jax.Array], corners: list[_Corner]) -> jax.Array:
    """s_n(p0) = Σ_q W_q(p_n) · x_q: `(positions, channels)`, in the dtype of the products."""
    weights = [corner.weight for corner in corners]
    return asm.weigh(pixels, weights, cut.plan.spec.dtype, interpret=cut.plan.interpret)


def _dsamples(cut: Cut, kernel_ref, g_ref, positions: Span, tap, segment: Segment, channels: Span) -> jax.Array:
    """ds_n(p0) = g(p0) · w_nᵀ: `(positions, channels)`, in float32."""
    rows = cut.rows(segment, channels)

    def add_features(number, total):
        features = cut.group_features(segment.feature_group, number)
        g = load(g_ref, outer(positions, features))
        matrix = load(kernel_ref, outer(rows, features, tap))
        return _add_dot(cut.plan, total, g, matrix, ((1,), (1,)))

    return loop(cut.feature_blocks, add_features, jnp.zeros((cut.tile.positions, cut.tile.channels), jnp.float32))


def _add_dot(plan: Plan, total, a, b, contract=((1,), (0,))) -> jax.Array:
    """The sum total + a · b, made on the tensor cores, of `plan.spec.dtype` into float32."""
    product = functools.partial(
        lax.dot_general, dimension_numbers=(contract, ((), ())), preferred_element_type=jnp.float32
    )
    a, b = a.astype(plan.spec.dtype), b.astype(plan.spec.dtype)
    if plan.interpret:  # by the machine's own product
        exact = plan.product == lax.DotAlgorithmPreset.F32_F32_F32
        return total + product(a, b, precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT)
    if plan.spec.dtype != "float32":
        return total + product(a, b)
    if plan.product != lax.DotAlgorithmPreset.TF32_TF32_F32:
        return total + product(a, b, precision=plan.product)
    # In parts of bfloat16: as exact as 16 bits, where TF32 has 11, and a Hopper GPU transposes no operand of TF32.
    (a, a_rest), (b, b_rest) = asm.split(a), asm.split(b)
    return total + product(a_rest, b) + product(a, b_rest) + product(a, b)
