"""The two TPU kernels: reading between pixels as a product with a matrix of hat functions.

All that a tile of output positions reads lies in one window of the map, because offsets are bounded.
So its samples are one matrix product, without a gather:

    samples (K · positions, C) = weightsᵀ · window,    weights[q, p] = hat(y_p − q_y) · hat(x_p − q_x) · Δm_p

with the pixels q of the window, `(pixels, C)`, and p over taps and positions of the tile. The
gradients are products with the same matrix: no scatter either. A kernel goes through the map strip
by strip (a row of tiles, from the map's left to its right), and tile by tile within it.

References are to one strip. `N` is the number of tiles in it, `P` that of the taps times the positions
of a tile, `W` the columns of the map with its margins. Points are the offsets along rows and columns and
the modulation, in this order.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dcn_jax.ops.deform_conv.pallas_tpu.tiles import COLUMNS, POSITIONS, ROWS, Cut


def forward(x_ref, kernel_ref, regular_ref, points_ref, bias_ref, y_ref, *, cut: Cut):
    """`x_ref` (1, 1, window rows, W, C), `kernel_ref` (K, C, F), `points_ref` (3, N, P) -> `y_ref` (ROWS, width, F)."""

    def tile(n, width):
        columns = columns_of(n)
        window = read_window(x_ref, columns.start, cut)  # (pixels, C)
        points = place_points(n, regular_ref, points_ref, cut)
        weights = points.weights()
        if window.dtype == jnp.float32:
            samples = multiply(weights, window, 0, 0, finer(cut.precision))  # (P, C)
        else:  # the weights as two numbers, for one bfloat16 is less than gathering computes with
            high, low = halve(weights)
            samples = (multiply(high, window, 0, 0) + multiply(low, window, 0, 0)).astype(window.dtype)
        total = bias_ref[...]  # (1, F)
        for tap in range(cut.taps):
            total += multiply(of_tap(samples, tap), kernel_ref[tap], 1, 0, cut.precision)
        y = total.reshape(ROWS, COLUMNS, -1)[:, :width]
        y_ref[:, pl.ds(columns.start, width), :] = y.astype(y_ref.dtype)
        return 0

    # The last tile is apart, since its columns may end beyond the map's.
    if cut.tiles > 1:
        lax.fori_loop(0, cut.tiles - 1, lambda n, _: tile(n, COLUMNS), 0)
    tile(cut.tiles - 1, cut.width - (cut.tiles - 1) * COLUMNS)


def backward(
    x_ref, kernel_ref, regular_ref, points_ref, g_ref, x_bar_ref, kernel_bar_ref, points_bar_ref, sum_ref, *, cut: Cut
):
    """The gradients at `g_ref` (ROWS, N · COLUMNS, F).

    Strips overlap in what they read. So `sum_ref` (window rows, W, C) holds the gradient of the rows that
    the next strips read too. With each strip the first ROWS of it are finished, and go to `x_bar_ref`.
    """
    image, strip = pl.program_id(1), pl.program_id(2)
    kept = cut.window_rows - ROWS  # rows of the sum, after a strip

    def clear(n, _):
        sum_ref[:, columns_of(n), :] = jnp.zeros((cut.window_rows, COLUMNS, sum_ref.shape[-1]), jnp.float32)
        return 0

    def tile(n, _):
        columns = columns_of(n)
        window = read_window(x_ref, columns.start, cut)  # (pixels, C)
        dtype, fine = window.dtype, finer(cut.precision)
        g = g_ref[:, columns, :].reshape(POSITIONS, -1)
        points = place_points(n, regular_ref, points_ref, cut)
        weights = points.weights().astype(dtype)  # (pixels, P)
        samples = multiply(weights, window, 0, 0, fine).astype(dtype)  # (P, C)
        parts = []
        for tap in range(cut.taps):
            kernel_bar_ref[tap] += multiply(of_tap(samples, tap), g, 0, 0, cut.precision)
            parts.append(multiply(g, kernel_ref[tap], 1, 1, cut.precision).astype(dtype))
        samples_bar = jnp.concatenate(parts)  # (P, C)
        window_bar = multiply(weights, samples_bar, 1, 0, fine)  # (pixels, C)
        shape = cut.window_rows, cut.window_columns, -1
        sum_ref[:, pl.ds(columns.start, cut.window_columns), :] += window_bar.reshape(shape)
        weights_bar = multiply(window, samples_bar, 1, 1, fine).reshape(shape)
        for axis, bar in enumerate(points.pull(weights_bar)):
            points_bar_ref[axis, pl.ds(n, 1), :] = bar
        return 0

    def move_on(n, _):
        columns = columns_of(n)
        total = sum_ref[:, columns, :]
        x_bar_ref[:, columns, :] = total[:ROWS].astype(x_bar_ref.dtype)
        if kept:
            sum_ref[pl.ds(0, kept), columns, :] = total[ROWS:]
        sum_ref[pl.ds(kept, ROWS), columns, :] = jnp.zeros_like(total[:ROWS])
        return 0

    @pl.when((image == 0) & (strip == 0))
    def _():
        for tap in range(cut.taps):
            kernel_bar_ref[tap] = jnp.zeros(kernel_bar_ref.shape[1:], jnp.float32)

    @pl.when(strip == 0)
    def _():
        lax.fori_loop(0, cut.columns // COLUMNS, clear, 0)

    @pl.when(strip < cut.strips)
    def _():
        lax.fori_loop(0, cut.tiles, tile, 0)

    lax.fori_loop(0, cut.columns // COLUMNS, move_on, 0)


def columns_of(n):
    """The columns of the tile `n`."""
    return pl.ds(n * COLUMNS if isinstance(n, int) else pl.multiple_of(n * COLUMNS, COLUMNS), COLUMNS)


def read_window(x_ref, column, cut: Cut) -> jax.Array:
    """The window of the tile at `column`: `(pixels, C)`."""
    window = x_ref[0, 0, :, pl.ds(column, cut.window_columns), :]
    return window.reshape(cut.window_rows * cut.window_columns, -1)


def of_tap(samples: jax.Array, tap: int) -> jax.Array:
    """Those of all positions for one tap."""
    return samples[tap * POSITIONS : (tap + 1) * POSITIONS]


class Hats(NamedTuple):
    """Along one axis, the hat function of each point at each pixel, and its right-hand derivative by the point: `(pixels, P)`."""

    hat: jax.Array
    slope: jax.Array


class Points(NamedTuple):
    """The points of a tile."""

    y: Hats
    x: Hats
    modulation: jax.Array  # (1, P)

    def weights(self) -> jax.Array:
        """How much each pixel of the window counts at each point: `(pixels, P)`."""
        rows = self.y.hat * self.modulation
        return (rows[:, None, :] * self.x.hat[None, :, :]).reshape(-1, rows.shape[1])

    def pull(self, weights_bar: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The gradients of y, x and modulation, `(1, P)`, from that of `weights`, `(rows, columns, P)`."""
        by_row = jnp.sum(weights_bar * self.x.hat[None], axis=1)
        slope_by_row = jnp.sum(weights_bar * self.x.slope[None], axis=1)
        return (
            jnp.sum(by_row * self.y.slope, axis=0, keepdims=True) * self.modulation,
            jnp.sum(slope_by_row * self.y.hat, axis=0, keepdims=True) * self.modulation,
            jnp.sum(by_row * self.y.hat, axis=0, keepdims=True),
        )


def place_points(n, regular_ref, points_ref, cut: Cut) -> Points:
    """The points of the tile `n`."""
    y, x, modulation = (points_ref[axis, pl.ds(n, 1), :] for axis in range(3))
    return Points(
        _hats(y, regular_ref[pl.ds(0, 1), :], cut.window_rows),
        _hats(x, regular_ref[pl.ds(1, 1), :], cut.window_columns),
        modulation,
    )


def _hats(offset: jax.Array, regular: jax.Array, pixels: int) -> Hats:
    """Of points at `offset` from the whole numbers `regular`, both `(1, P)`; those of a NaN are NaN at two pixels."""
    # As an integer a NaN is what the platform makes of it: so it is in the fraction alone.
    whole = jnp.where(offset == offset, jnp.floor(offset), 0.0)
    fraction = offset - whole
    below = regular + whole.astype(jnp.int32)
    pixel = lax.broadcasted_iota(jnp.int32, (pixels, offset.shape[1]), 0)
    at_below, at_above = pixel == below, pixel == below + 1
    return Hats(
        jnp.where(at_below, 1 - fraction, jnp.where(at_above, fraction, 0.0)),
        jnp.where(at_below, -1.0, jnp.where(at_above, 1.0, 0.0)),
    )


def finer(precision: lax.Precision) -> lax.Precision:
    """Of products that stand for reading between pixels: float32 is not rounded to one bfloat16 there."""
    return max(precision, lax.Precision.HIGH, key=list(lax.Precision).index)


def multiply(
    a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, precision: lax.Precision = lax.Precision.DEFAULT
) -> jax.Array:
    """The product of two matrices, contracted over an axis of each, in float32.

    `precision` is that of float32 matrices, as the TPU's compiler reads it: one product of bfloat16, three, or six.
    """
    dot = functools.partial(
        lax.dot_general,
        dimension_numbers=(((axis_a,), (axis_b,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    if a.dtype == jnp.bfloat16:
        return dot(a, b)
    if precision == lax.Precision.HIGHEST:
        return dot(a, b, precision=precision)
    if precision == lax.Precision.DEFAULT:
        return dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    (a, a_rest), (b, b_rest) = halve(a), halve(b)
    return dot(a, b) + dot(a_rest, b) + dot(a, b_rest)


def halve(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bfloat16 numbers that add up to `a`, to 2⁻¹⁶ of it."""
    high = a.astype(jnp.bfloat16)
    return high, (a - high.astype(jnp.float32)).astype(jnp.bfloat16)
