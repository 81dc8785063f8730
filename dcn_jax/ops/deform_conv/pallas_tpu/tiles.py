"""How a call is cut into tiles for the TPU kernels, and its arrays brought into that order and back."""

import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax.geometry import Window
from dcn_jax.ops.deform_conv.call import Spec

# Positions of a tile: 8 columns, for a window then starts where a vector register does, and 6 rows, for
# with a 3×3 kernel and offsets within ±4 it then reads 16.
ROWS, COLUMNS = 6, 8
POSITIONS = ROWS * COLUMNS
LANES = 128  # channels and features are filled up to a multiple of it


class Cut(NamedTuple):
    """How a call is cut; hashable."""

    window: Window
    reach: int  # whole pixels that an offset reaches
    window_rows: int  # pixels that a tile reads
    window_columns: int
    strips: int  # of positions, ROWS each
    tiles: int  # of a strip
    precision: lax.Precision  # of float32 products

    @property
    def taps(self) -> int:
        """K."""
        return self.window.taps

    @property
    def width(self) -> int:
        """Columns of positions, of which the last tile may have fewer than COLUMNS."""
        return self.window.out_spatial[1]

    @property
    def columns(self) -> int:
        """Of the map with its margins: W."""
        return (self.tiles - 1) * COLUMNS + self.window_columns

    @property
    def flushes(self) -> int:
        """How many strips of the map with its margins begin below the last strip of positions."""
        return -(-(self.window_rows - ROWS) // ROWS)


def cut_for(spec: Spec, precision: lax.Precision) -> Cut:
    """How to cut a call whose offsets are bounded."""
    window, reach = spec.window, math.ceil(cast(float, spec.max_offset))
    rows, columns = (
        positions - 1 + (size - 1) * dilation + 2 * reach + 1
        for positions, size, dilation in zip((ROWS, COLUMNS), window.size, window.dilation, strict=True)
    )
    height, width = window.out_spatial
    return Cut(window, reach, rows, round_up(columns, COLUMNS), -(-height // ROWS), -(-width // COLUMNS), precision)


def round_up(size: int, multiple: int) -> int:
    """`size`, or the next larger multiple."""
    return -(-size // multiple) * multiple


def bytes_on_chip(cut: Cut, dtype: jnp.dtype, channels: int, features: int) -> int:
    """About how many bytes of a core's memory the gradients take, more than the forward pass does."""
    channels, features = round_up(channels, LANES), round_up(features, LANES)
    points, pixels = round_up(cut.taps * POSITIONS, LANES), cut.window_rows * cut.window_columns
    sums = cut.window_rows * cut.columns * channels * 4
    maps = (cut.window_rows + ROWS) * cut.columns * channels + ROWS * cut.tiles * COLUMNS * features
    kernel = cut.taps * channels * features
    blocks = (maps + kernel) * dtype.itemsize + kernel * 4 + 6 * round_up(cut.tiles, 8) * points * 4
    tile = 4 * (6 * pixels * points + 4 * points * channels + 3 * pixels * channels)
    return 2 * blocks + sums + tile  # blocks twice, for the next ones are fetched meanwhile


def extend(cut: Cut, x: jax.Array) -> jax.Array:
    """The map `(S, B, H, W, C)` with the margins that windows reach into, and channels of zeros."""
    pads = [(0, 0, 0), (0, 0, 0)]
    whole = (cut.strips - 1) * ROWS + cut.window_rows, cut.columns
    for size, (low, _), pixels in zip(x.shape[2:4], cut.window.pads, whole, strict=True):
        pads.append((low + cut.reach, pixels - size - low - cut.reach, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), [*pads, (0, round_up(x.shape[-1], LANES) - x.shape[-1], 0)])


def cut_back(cut: Cut, x_bar: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The gradient of x `shape` from that of `extend(x)`, which may have more rows: `extend` transposed."""
    pads = [(0, 0, 0), (0, 0, 0)]
    for given, size, (low, _) in zip(x_bar.shape[2:4], shape[2:4], cut.window.pads, strict=True):
        pads.append((-low - cut.reach, size + low + cut.reach - given, 0))
    return lax.pad(x_bar, jnp.zeros((), x_bar.dtype), [*pads, (0, shape[-1] - x_bar.shape[-1], 0)])


def fill(array: jax.Array, *shape: int) -> jax.Array:
    """`array` with zeros behind its last axes, up to `shape`."""
    whole = (*array.shape[: array.ndim - len(shape)], *shape)
    return jnp.pad(array, [(0, size - given) for given, size in zip(array.shape, whole, strict=True)])


def to_tiles(cut: Cut, array: jax.Array) -> jax.Array:
    """`(S, B, Ho, Wo, K)` -> `(S, B, strips, tiles, K * POSITIONS)`."""
    front, taps = array.shape[:2], array.shape[-1]
    array = fill(array, cut.strips * ROWS, cut.tiles * COLUMNS, taps)
    array = array.reshape(*front, cut.strips, ROWS, cut.tiles, COLUMNS, taps)
    return array.transpose(0, 1, 2, 4, 6, 3, 5).reshape(*front, cut.strips, cut.tiles, taps * POSITIONS)


def from_tiles(cut: Cut, tiles: jax.Array) -> jax.Array:
    """`(S, B, strips, tiles, K * POSITIONS)` -> `(S, B, Ho, Wo, K)`."""
    front, (height, width) = tiles.shape[:2], cut.window.out_spatial
    tiles = tiles.reshape(*front, cut.strips, cut.tiles, cut.taps, ROWS, COLUMNS).transpose(0, 1, 2, 5, 3, 6, 4)
    return tiles.reshape(*front, cut.strips * ROWS, cut.tiles * COLUMNS, cut.taps)[:, :, :height, :width]


def regular_points(cut: Cut) -> jax.Array:
    """Where the points of a tile lie in its window without their offsets: `(2, K * POSITIONS)`, in int32."""
    # Of iotas, for a call that is partitioned takes no constants.
    tap, position = jnp.divmod(jnp.arange(cut.taps * POSITIONS, dtype=jnp.int32), POSITIONS)
    axes = zip(jnp.divmod(tap, cut.window.size[1]), jnp.divmod(position, COLUMNS), cut.window.dilation, strict=True)
    return jnp.stack([tap * dilation + position + cut.reach for tap, position, dilation in axes])
