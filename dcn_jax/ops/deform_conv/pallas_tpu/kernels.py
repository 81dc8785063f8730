"""The two TPU kernels. They read between pixels by a product with a matrix of weights, without a gather.

Offsets are bounded, so a tile of output positions reads one patch of the map. Its samples are

    samples (P, C) = weightsᵀ (P, pixels) · patch (pixels, C)
    weights[q, p]  = hat(y_p − q_y) · hat(x_p − q_x) · modulation_p,      hat(t) = max(0, 1 − |t|)

for the P points of all taps and positions of the tile, and the pixels q of the patch. Gradients are
products with the same matrix, without a scatter. The grid goes through the strips of the map, and a
program through the tiles of its strip. `x_bar` is the gradient of x.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dcn_jax.ops.deform_conv.pallas_tpu.tiles import COLUMNS, POSITIONS, ROWS, StripLayout

# The references are to the part of each array that one strip needs: N tiles of P points each, and W
# columns of the map with its margins. `call` is a `TpuCall`.
#
#     x_ref                         (1, 1, patch rows, W, C)
#     kernel_ref, kernel_bar_ref    (K, C, F)
#     regular_ref                   (2, P): the row and the column of the patch that a point reads without its offset
#     points_ref, points_bar_ref    (3, N, P): offsets along rows, offsets along columns, modulations
#     bias_ref                      (1, F)
#     y_ref, y_bar_ref              (ROWS, width, F); y_bar has all N · COLUMNS columns
#     x_bar_ref                     (ROWS, W, C)
#     sum_ref                       (patch rows, W, C), in float32: scratch memory that is kept from strip to strip


def forward(x_ref, kernel_ref, regular_ref, points_ref, bias_ref, y_ref, *, call):
    """y, bias included, for one strip."""
    layout, precision = call.layout, call.precision

    def tile(n, width):
        columns = columns_of(n)
        patch = read_patch(x_ref, columns.start, layout)  # (pixels, C)
        points = place_points(n, regular_ref, points_ref, layout)
        weights = points.weights()
        if patch.dtype == jnp.float32:
            samples = matrix_product(weights, patch, 0, 0, at_least_high(precision))  # (P, C)
        else:  # weights as the sum of two bfloat16: one is less exact than the float32 weights of a gather
            high, low = split_bfloat16(weights)
            samples = (matrix_product(high, patch, 0, 0) + matrix_product(low, patch, 0, 0)).astype(patch.dtype)
        total = bias_ref[...]  # (1, F)
        for tap in range(layout.window.taps):
            total += matrix_product(of_tap(samples, tap), kernel_ref[tap], 1, 0, precision)
        y = total.reshape(ROWS, COLUMNS, -1)[:, :width]
        y_ref[:, pl.ds(columns.start, width), :] = y.astype(y_ref.dtype)
        return 0

    # The last tile is outside the loop, because it may have fewer than COLUMNS columns.
    if layout.tiles > 1:
        lax.fori_loop(0, layout.tiles - 1, lambda n, _: tile(n, COLUMNS), 0)
    tile(layout.tiles - 1, layout.window.out_spatial[1] - (layout.tiles - 1) * COLUMNS)


def backward(
    x_ref, kernel_ref, regular_ref, points_ref, y_bar_ref, x_bar_ref, kernel_bar_ref, points_bar_ref, sum_ref, *, call
):
    """x_bar and points_bar for one strip; kernel_bar is a sum over all strips and images.

    The strips below read some of the same rows of the map. So x_bar is summed in `sum_ref`, which
    holds the rows that this strip reads. After the strip its first ROWS rows are finished: they go
    to `x_bar_ref`, and the others move up. After the last strip of positions, `extra_strips`
    programs do only that.
    """
    layout, precision = call.layout, call.precision
    image, strip = pl.program_id(1), pl.program_id(2)
    unfinished = layout.patch_rows - ROWS  # rows of the sum, after this strip

    def clear(n, _):
        sum_ref[:, columns_of(n), :] = jnp.zeros((layout.patch_rows, COLUMNS, sum_ref.shape[-1]), jnp.float32)
        return 0

    def tile(n, _):
        columns = columns_of(n)
        patch = read_patch(x_ref, columns.start, layout)  # (pixels, C)
        dtype, fine = patch.dtype, at_least_high(precision)
        y_bar = y_bar_ref[:, columns, :].reshape(POSITIONS, -1)
        points = place_points(n, regular_ref, points_ref, layout)
        weights = points.weights().astype(dtype)  # (pixels, P)
        samples = matrix_product(weights, patch, 0, 0, fine).astype(dtype)  # (P, C)
        parts = []
        for tap in range(layout.window.taps):
            kernel_bar_ref[tap] += matrix_product(of_tap(samples, tap), y_bar, 0, 0, precision)
            parts.append(matrix_product(y_bar, kernel_ref[tap], 1, 1, precision).astype(dtype))
        samples_bar = jnp.concatenate(parts)  # (P, C)
        patch_bar = matrix_product(weights, samples_bar, 1, 0, fine)  # (pixels, C)
        shape = layout.patch_rows, layout.patch_columns, -1
        sum_ref[:, pl.ds(columns.start, layout.patch_columns), :] += patch_bar.reshape(shape)
        weights_bar = matrix_product(patch, samples_bar, 1, 1, fine).reshape(shape)
        for axis, bar in enumerate(points.gradients(weights_bar)):
            points_bar_ref[axis, pl.ds(n, 1), :] = bar
        return 0

    def finish_rows(n, _):
        columns = columns_of(n)
        total = sum_ref[:, columns, :]
        x_bar_ref[:, columns, :] = total[:ROWS].astype(x_bar_ref.dtype)
        if unfinished:
            sum_ref[pl.ds(0, unfinished), columns, :] = total[ROWS:]
        sum_ref[pl.ds(unfinished, ROWS), columns, :] = jnp.zeros_like(total[:ROWS])
        return 0

    @pl.when((image == 0) & (strip == 0))
    def _():
        for tap in range(layout.window.taps):
            kernel_bar_ref[tap] = jnp.zeros(kernel_bar_ref.shape[1:], jnp.float32)

    @pl.when(strip == 0)
    def _():
        lax.fori_loop(0, layout.columns // COLUMNS, clear, 0)

    @pl.when(strip < layout.strips)
    def _():
        lax.fori_loop(0, layout.tiles, tile, 0)

    lax.fori_loop(0, layout.columns // COLUMNS, finish_rows, 0)


def columns_of(n):
    """The columns of the `n`-th tile."""
    return pl.ds(n * COLUMNS if isinstance(n, int) else pl.multiple_of(n * COLUMNS, COLUMNS), COLUMNS)


def read_patch(x_ref, column, layout: StripLayout) -> jax.Array:
    """The patch of the tile that starts at `column`: `(pixels, C)`."""
    patch = x_ref[0, 0, :, pl.ds(column, layout.patch_columns), :]
    return patch.reshape(layout.patch_rows * layout.patch_columns, -1)


def of_tap(samples: jax.Array, tap: int) -> jax.Array:
    """The samples of one tap at all positions of a tile."""
    return samples[tap * POSITIONS : (tap + 1) * POSITIONS]


class Hats(NamedTuple):
    """For each pixel and point along one axis, the hat function and its derivative by the point: `(pixels, P)`."""

    hat: jax.Array
    slope: jax.Array


class Points(NamedTuple):
    """The points of a tile."""

    y: Hats
    x: Hats
    modulation: jax.Array  # (1, P)

    def weights(self) -> jax.Array:
        """The weight of each pixel of the patch at each point: `(pixels, P)`."""
        rows = self.y.hat * self.modulation
        return (rows[:, None, :] * self.x.hat[None, :, :]).reshape(-1, rows.shape[1])

    def gradients(self, weights_bar: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The gradients of y, x and modulation, `(1, P)`, from the gradient of `weights`, `(rows, columns, P)`."""
        by_row = jnp.sum(weights_bar * self.x.hat[None], axis=1)
        slope_by_row = jnp.sum(weights_bar * self.x.slope[None], axis=1)
        return (
            jnp.sum(by_row * self.y.slope, axis=0, keepdims=True) * self.modulation,
            jnp.sum(slope_by_row * self.y.hat, axis=0, keepdims=True) * self.modulation,
            jnp.sum(by_row * self.y.hat, axis=0, keepdims=True),
        )


def place_points(n, regular_ref, points_ref, layout: StripLayout) -> Points:
    """The points of the `n`-th tile."""
    y, x, modulation = (points_ref[axis, pl.ds(n, 1), :] for axis in range(3))
    return Points(
        hats(y, regular_ref[pl.ds(0, 1), :], layout.patch_rows),
        hats(x, regular_ref[pl.ds(1, 1), :], layout.patch_columns),
        modulation,
    )


def hats(offset: jax.Array, regular: jax.Array, pixels: int) -> Hats:
    """The weights that `sampling` gives with method "linear" and padding "zeros", for every pixel of an axis.

    The points are at `offset` from the whole numbers `regular`, both `(1, P)`. At a whole number
    the slope is the right-hand derivative. A NaN makes both weights of its point NaN.
    """
    # A NaN has no integer. So its whole part is 0 here, and only its fraction is NaN.
    whole = jnp.where(offset == offset, jnp.floor(offset), 0.0)
    fraction = offset - whole
    below = regular + whole.astype(jnp.int32)
    pixel = lax.broadcasted_iota(jnp.int32, (pixels, offset.shape[1]), 0)
    at_below, at_above = pixel == below, pixel == below + 1
    return Hats(
        jnp.where(at_below, 1 - fraction, jnp.where(at_above, fraction, 0.0)),
        jnp.where(at_below, -1.0, jnp.where(at_above, 1.0, 0.0)),
    )


def at_least_high(precision: lax.Precision) -> lax.Precision:
    """The precision of float32 products with weights, which must not be rounded to one bfloat16."""
    return max(precision, lax.Precision.HIGH, key=list(lax.Precision).index)


def matrix_product(
    a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, precision: lax.Precision = lax.Precision.DEFAULT
) -> jax.Array:
    """The product of two matrices, contracted over an axis of each, in float32.

    `precision` is for float32 matrices, as on a TPU: one product of bfloat16, three, or six.
    """
    numbers = (((axis_a,), (axis_b,)), ((), ()))
    # Without a precision of their own, products of bfloat16 would take that of
    # `jax.default_matmul_precision`. Inside TPU kernels JAX knows "default" and "highest" alone,
    # and "highest" would multiply bfloat16 as if it were float32.
    dot = functools.partial(
        lax.dot_general, dimension_numbers=numbers, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )
    if a.dtype == jnp.bfloat16:
        return dot(a, b)
    if precision == lax.Precision.HIGHEST:
        return dot(a, b, precision=precision)
    if precision == lax.Precision.DEFAULT:
        return dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    (a, a_rest), (b, b_rest) = split_bfloat16(a), split_bfloat16(b)
    return dot(a, b) + dot(a_rest, b) + dot(a, b_rest)


def split_bfloat16(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bfloat16 numbers whose sum is `a`, but for a relative error of 2⁻¹⁶."""
    high = a.astype(jnp.bfloat16)
    return high, (a - high.astype(jnp.float32)).astype(jnp.bfloat16)
