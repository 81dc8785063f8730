"""The four kernels. Each gathers, interpolates, modulates and multiplies in one pass.

No sample is ever written to memory: the backward kernels make again what they need.

    y(p0) = Σ_n  s_n(p0) · w_n,    s_n(p0) = Δm_n · x(p_n),    x(p_n) = Σ_q  W_q(p_n) · x_q

Here p_n stands for the point where tap n reads at p0, its offset Δp_n included. Around it lie the
corners q, with the pixels x_q and the weights W_q. The sample s_n is a row of channels, w_n the
tap's matrix. With g the gradient of y, a sample's gradient is ds_n(p0) = g(p0) · w_nᵀ, and so

    dx_q  = Σ_p0 Σ_n  W_q(p_n) · Δm_n · ds_n(p0)              backward_x
    dΔm_n = Σ_q  W_q(p_n) · e_q                               backward_points
    dΔp_n = Δm_n · Σ_q  ∂W_q/∂p_n · e_q                       backward_points
    dw_n  = Σ_p0  s_n(p0)ᵀ · g(p0)                            backward_kernel

with e_q = Σ_c x_q · ds_n(p0), the gradient of a corner's weight before modulation.
`sampling.corners` tells which pixels are corners and what they weigh: it runs, and is
differentiated, inside the kernels.

All references are to whole arrays, without the stack's axis:

    x_ref, dx_ref                  (B, *spatial, C)
    kernel_ref, dkernel_ref        (K, C // feature groups, F), a matrix for each tap
    offset_ref, doffset_ref        (B, *out_spatial, OG * K * n)
    mask_ref, dmask_ref            (B, *out_spatial, OG * K), or None
    bias_ref                       (F,), or None
    y_ref, g_ref                   (B, *out_spatial, F)
"""

import functools
import operator
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from dcn_jax._pallas.blocks import Span, add, both, extend, load, loop, outer, quotient, store, unravel
from dcn_jax.geometry import Window
from dcn_jax.ops.deform_conv.pallas_gpu_tiles import Cut, Plan, Segment, count_tiles, tile_positions
from dcn_jax.sampling import Border, Positions, corners


def forward(x_ref, kernel_ref, offset_ref, mask_ref, bias_ref, y_ref, *, cut: Cut):
    """y(p0) = Σ_n s_n(p0) · w_n + bias, for a tile of positions and a block of features.

    Grid: blocks of features of all feature groups, tiles of positions.
    """
    feature_group, number = unravel(pl.program_id(0), cut.feature_blocks)
    features = cut.group_features(feature_group, number)
    positions = tile_positions(cut, x_ref.shape[0], pl.program_id(1))

    # Channels outside, taps inside: the taps of a tile read nearly the same pixels, and so few
    # channels of those that they stay in the first-level cache.
    def add_channels(number, total):
        part, number = unravel(number, cut.channel_blocks)
        segment = feature_group * cut.segments_per_feature_group + part
        offset_group = quotient(segment, cut.segments_per_offset_group)
        segment = Segment(segment, part, offset_group, feature_group)
        channels = cut.segment_channels(number)

        def add_tap(tap, total):
            reads = _reads(cut.window, offset_ref, mask_ref, positions, offset_group, tap)
            samples = _samples(x_ref, reads, positions, cut.columns(segment, channels))
            matrix = load(kernel_ref, outer(cut.rows(segment, channels), features, tap))
            return total + _dot(cut.plan, samples, matrix)

        return loop(cut.window.taps, add_tap, total)

    total = jnp.zeros((cut.tile.positions, cut.tile.features), jnp.float32)
    total = loop(cut.segments_per_feature_group * cut.channel_blocks, add_channels, total)
    if bias_ref is not None:
        total += load(bias_ref, features).astype(jnp.float32)[None, :]
    store(y_ref, outer(positions, features), total)


def backward_x(kernel_ref, offset_ref, mask_ref, g_ref, dx_ref, *, cut: Cut):
    """dx_q += Σ_n W_q(p_n) · Δm_n · ds_n(p0), for a tile of positions and a block of channels.

    dx starts as zeros, in float32. Grid: blocks of channels of all segments, tiles of positions.
    """
    images, *spatial, _ = dx_ref.shape
    number, channel_block = unravel(pl.program_id(0), cut.channel_blocks)
    segment, channels = cut.segment(number), cut.segment_channels(channel_block)
    columns = cut.columns(segment, channels)
    positions = tile_positions(cut, images, pl.program_id(1))

    def add_tap(tap, carry):
        reads = _reads(cut.window, offset_ref, mask_ref, positions, segment.offset_group, tap)
        dsamples = _dsamples(cut, kernel_ref, g_ref, positions, tap, segment, channels)
        if reads.modulation is not None:
            dsamples = dsamples * reads.modulation[:, None]
        for pixel, weight, inside in corners(reads.points, _border(spatial)):
            rows = Span((positions.index[0], *pixel), both(inside, positions.exists))
            add(dx_ref, outer(rows, columns), weight[:, None] * dsamples, interpret=cut.plan.interpret)
        return carry

    loop(cut.window.taps, add_tap, np.int32(0))


def backward_points(x_ref, kernel_ref, offset_ref, mask_ref, g_ref, doffset_ref, dmask_ref, *, cut: Cut):
    """dΔp_n = Δm_n · Σ_q ∂W_q/∂p_n · e_q and dΔm_n = Σ_q W_q(p_n) · e_q, for a tile of positions.

    Grid: offset groups, tiles of positions.
    """
    images, *spatial, _ = x_ref.shape
    offset_group = pl.program_id(0)
    positions = tile_positions(cut, images, pl.program_id(1))
    rank, taps = cut.window.rank, cut.window.taps

    def weigh(regular, *offsets):
        points = list(map(Positions, regular, offsets))
        pixels, weights, insides = zip(*corners(points, _border(spatial)), strict=True)
        return weights, (pixels, insides)

    def finish_tap(tap, carry):
        reads = _reads(cut.window, offset_ref, mask_ref, positions, offset_group, tap)
        regular, offsets = zip(*reads.points, strict=True)
        weigh_at = functools.partial(weigh, regular)
        weights, pull_back, (pixels, insides) = jax.vjp(weigh_at, *offsets, has_aux=True)

        def add_channels(number, totals):
            part, number = unravel(number, cut.channel_blocks)
            segment = cut.segment(offset_group * cut.segments_per_offset_group + part)
            channels = cut.segment_channels(number)
            # Triton wants what meets a product in the product's layout, and takes each corner there
            # through shared memory. What meets a product's transpose, it leaves where it was loaded.
            dsamples = _dsamples(cut, kernel_ref, g_ref, positions, tap, segment, channels, turned=True).T
            columns = cut.columns(segment, channels)
            sums = []
            for total, pixel, inside in zip(totals, pixels, insides, strict=True):
                read = _pixel(x_ref, positions, pixel, inside, columns)
                sums.append(total + jnp.sum(dsamples * read, axis=1))
            return tuple(sums)

        dweights = loop(  # e_q, for each corner
            cut.segments_per_offset_group * cut.channel_blocks,
            add_channels,
            tuple(jnp.zeros((cut.tile.positions,), jnp.float32) for _ in weights),
        )
        if dmask_ref is not None:
            dmodulation = functools.reduce(operator.add, map(operator.mul, weights, dweights))
            store(dmask_ref, extend(positions, offset_group * taps + tap), dmodulation)
            dweights = tuple(d * reads.modulation for d in dweights)
        for axis, doffset in enumerate(pull_back(dweights)):
            store(doffset_ref, extend(positions, (offset_group * taps + tap) * rank + axis), doffset)
        return carry

    loop(taps, finish_tap, np.int32(0))


def backward_kernel(x_ref, offset_ref, mask_ref, g_ref, dkernel_ref, *, cut: Cut, splits: int):
    """dw_n = Σ_p0 s_n(p0)ᵀ · g(p0), for a tap and a block of channels and of features.

    The sum over all tiles of positions is split over `splits` programs; where these are several,
    dkernel starts as zeros, in float32. Grid: taps and blocks, splits.
    """
    images = x_ref.shape[0]
    tap, number, channel_block, feature_block = unravel(
        pl.program_id(0), cut.plan.segments, cut.channel_blocks, cut.feature_blocks
    )
    segment, channels = cut.segment(number), cut.segment_channels(channel_block)
    features = cut.group_features(segment.feature_group, feature_block)
    count = pl.cdiv(count_tiles(cut, images), splits)
    first = pl.program_id(1) * count

    def add_positions(number, total):
        positions = tile_positions(cut, images, first + number)
        reads = _reads(cut.window, offset_ref, mask_ref, positions, segment.offset_group, tap)
        samples = _samples(x_ref, reads, positions, cut.columns(segment, channels))
        g = load(g_ref, outer(positions, features))
        return total + _dot(cut.plan, samples, g, ((0,), (0,)))

    total = loop(count, add_positions, jnp.zeros((cut.tile.channels, cut.tile.features), jnp.float32))
    rows = cut.rows(segment, channels)
    if splits == 1:
        store(dkernel_ref, outer(rows, features, tap), total)
    else:
        add(dkernel_ref, outer(rows, features, tap), total, interpret=cut.plan.interpret)


class _Reads(NamedTuple):
    """What a tap reads at a tile of positions: where, and how much of it counts."""

    points: list[Positions]  # p_n, for each spatial axis one of vectors
    modulation: jax.Array | None  # Δm_n; None: 1


def _reads(window: Window, offset_ref, mask_ref, positions: Span, offset_group, tap) -> _Reads:
    """Where a tap of an offset group reads, and its modulation."""
    along = unravel(tap, *window.size[1:])
    points = []
    for axis, (position, along_axis) in enumerate(zip(positions.index[1:], along, strict=True)):
        channel = (offset_group * window.taps + tap) * window.rank + axis
        offset = load(offset_ref, extend(positions, channel)).astype(jnp.float32)
        # It is zero there already. But samples made of nothing but what was loaded, Triton makes in
        # the layout of the product's operand: each corner goes through shared memory by itself, and
        # the next one is loaded after a barrier.
        offset = jnp.where(cast(jax.Array, positions.exists), offset, 0.0)
        points.append(Positions(window.place(axis, position, along_axis), offset))
    if mask_ref is None:
        return _Reads(points, None)
    modulation = load(mask_ref, extend(positions, offset_group * window.taps + tap))
    return _Reads(points, modulation.astype(jnp.float32))


def _border(spatial) -> Border:
    """A map of this size that is zero beyond its border, the only kind that the kernels read."""
    return Border(tuple(spatial), ("zeros",) * len(spatial))


def _pixel(x_ref, positions: Span, pixel, inside, columns: Span) -> jax.Array:
    """x_q of one corner of each position, zero outside the map: `(positions, channels)`, float32."""
    rows = Span((positions.index[0], *pixel), both(inside, positions.exists))
    return load(x_ref, outer(rows, columns)).astype(jnp.float32)


def _samples(x_ref, reads: _Reads, positions: Span, columns: Span) -> jax.Array:
    """s_n(p0) = Δm_n · Σ_q W_q(p_n) · x_q: `(positions, channels)`, in float32."""
    total = jnp.zeros((positions.size, columns.size), jnp.float32)
    for pixel, weight, inside in corners(reads.points, _border(x_ref.shape[1:-1])):
        weight = weight if reads.modulation is None else weight * reads.modulation
        total += weight[:, None] * _pixel(x_ref, positions, pixel, inside, columns)
    return total


def _dsamples(
    cut: Cut, kernel_ref, g_ref, positions: Span, tap, segment: Segment, channels: Span, *, turned: bool = False
) -> jax.Array:
    """ds_n(p0) = g(p0) · w_nᵀ: `(positions, channels)`, in float32; or turned, w_n · g(p0)ᵀ."""
    rows = cut.rows(segment, channels)

    def add_features(number, total):
        features = cut.group_features(segment.feature_group, number)
        g = load(g_ref, outer(positions, features))
        matrix = load(kernel_ref, outer(rows, features, tap))
        return total + _dot(cut.plan, *((matrix, g) if turned else (g, matrix)), ((1,), (1,)))

    shape = (channels.size, positions.size) if turned else (positions.size, channels.size)
    return loop(cut.feature_blocks, add_features, jnp.zeros(shape, jnp.float32))


def _dot(plan: Plan, a, b, contract=((1,), (0,))) -> jax.Array:
    """Matrix product on the tensor cores, of `plan.spec.dtype` into float32."""
    if plan.interpret:  # by the machine's own product
        exact = plan.product == lax.DotAlgorithmPreset.F32_F32_F32
        precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    else:
        precision = plan.product if plan.spec.dtype == "float32" else lax.Precision.DEFAULT
    a, b = a.astype(plan.spec.dtype), b.astype(plan.spec.dtype)
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)
