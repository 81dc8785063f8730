"""How the TPU kernels divide the output positions into strips and tiles, and bring arrays into that order and back.

A strip is ROWS rows of output positions, from the left of the map to its right. A tile is COLUMNS
columns of a strip. The pixels that the taps of a tile can read form its patch; the patches of
neighbouring tiles overlap. The map gets margins, so that every patch lies inside it.
"""

import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax.geometry import Window
from dcn_jax.ops.deform_conv.call import Spec

# A tile has 8 columns, so that its patch starts where a vector register does, and 6 rows, so that
# its patch has 16 rows for a 3×3 kernel with offsets within ±4.
ROWS, COLUMNS = 6, 8
POSITIONS = ROWS * COLUMNS
LANES = 128  # channels and features are filled up with zeros to a multiple of this


class StripLayout(NamedTuple):
    """The sizes of strips, tiles and patches; hashable."""

    window: Window
    reach: int  # the largest offset, rounded up to whole pixels
    patch_rows: int
    patch_columns: int
    strips: int  # in a map of output positions
    tiles: int  # in a strip

    @property
    def columns(self) -> int:
        """The columns of the map with its margins: W."""
        return (self.tiles - 1) * COLUMNS + self.patch_columns

    @property
    def extra_strips(self) -> int:
        """How many strips of rows of the map, margins included, begin below the last strip of positions."""
        return -(-self.patch_rows // ROWS) - 1


class TpuCall(NamedTuple):
    """A call of the op, without its arrays, and how the kernels run it; hashable."""

    spec: Spec  # its out_dtype is the one that the kernels write
    layout: StripLayout
    precision: lax.Precision  # of float32 products
    interpret: bool


def layout_for(spec: Spec) -> StripLayout:
    """The layout of a call whose offsets are bounded."""
    window, reach = spec.window, math.ceil(cast(float, spec.max_offset))
    # At the bound itself the pixel above has the weight 0, and clipping makes its slope 0: the patch ends below it.
    rows, columns = (
        positions + (size - 1) * dilation + 2 * reach
        for positions, size, dilation in zip((ROWS, COLUMNS), window.size, window.dilation, strict=True)
    )
    height, width = window.out_spatial
    return StripLayout(window, reach, rows, round_up(columns, COLUMNS), -(-height // ROWS), -(-width // COLUMNS))


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def bytes_on_chip(layout: StripLayout, dtype: jnp.dtype, channels: int, features: int) -> int:
    """About how many bytes of a core's memory the backward kernel takes. The forward kernel takes fewer."""
    channels, features = round_up(channels, LANES), round_up(features, LANES)
    points, pixels = round_up(layout.window.taps * POSITIONS, LANES), layout.patch_rows * layout.patch_columns
    sums = layout.patch_rows * layout.columns * channels * 4
    maps = (layout.patch_rows + ROWS) * layout.columns * channels + ROWS * layout.tiles * COLUMNS * features
    kernel = layout.window.taps * channels * features
    blocks = (maps + kernel) * dtype.itemsize + kernel * 4 + 6 * round_up(layout.tiles, 8) * points * 4
    tile = 4 * (6 * pixels * points + 4 * points * channels + 3 * pixels * channels)
    return 2 * blocks + sums + tile  # two of each block: the next ones are fetched while these are used


def add_margins(layout: StripLayout, x: jax.Array) -> jax.Array:
    """The map `(S, B, H, W, C)` with margins of zeros, for the patches, and channels of zeros, up to a multiple of LANES."""
    pads = [(0, 0, 0), (0, 0, 0)]
    whole = (layout.strips - 1) * ROWS + layout.patch_rows, layout.columns
    for size, (low, _), pixels in zip(x.shape[2:4], layout.window.pads, whole, strict=True):
        pads.append((low + layout.reach, pixels - size - low - layout.reach, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), [*pads, (0, round_up(x.shape[-1], LANES) - x.shape[-1], 0)])


def remove_margins(layout: StripLayout, x_bar: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of `add_margins`: the gradient of x, of `shape`. `x_bar` may have more rows than the map with margins."""
    pads = [(0, 0, 0), (0, 0, 0)]
    for given, size, (low, _) in zip(x_bar.shape[2:4], shape[2:4], layout.window.pads, strict=True):
        pads.append((-low - layout.reach, size + low + layout.reach - given, 0))
    return lax.pad(x_bar, jnp.zeros((), x_bar.dtype), [*pads, (0, shape[-1] - x_bar.shape[-1], 0)])


def pad_to(array: jax.Array, *sizes: int) -> jax.Array:
    """`array` with zeros appended along its last axes, which then have these sizes."""
    whole = (*array.shape[: array.ndim - len(sizes)], *sizes)
    return jnp.pad(array, [(0, size - given) for given, size in zip(array.shape, whole, strict=True)])


def to_tiles(layout: StripLayout, array: jax.Array) -> jax.Array:
    """`(S, B, Ho, Wo, K)` -> `(S, B, strips, tiles, K * POSITIONS)`."""
    front, taps = array.shape[:2], array.shape[-1]
    array = pad_to(array, layout.strips * ROWS, layout.tiles * COLUMNS, taps)
    array = array.reshape(*front, layout.strips, ROWS, layout.tiles, COLUMNS, taps)
    return array.transpose(0, 1, 2, 4, 6, 3, 5).reshape(*front, layout.strips, layout.tiles, taps * POSITIONS)


def from_tiles(layout: StripLayout, tiles: jax.Array) -> jax.Array:
    """`(S, B, strips, tiles, K * POSITIONS)` -> `(S, B, Ho, Wo, K)`."""
    front, taps, (height, width) = tiles.shape[:2], layout.window.taps, layout.window.out_spatial
    tiles = tiles.reshape(*front, layout.strips, layout.tiles, taps, ROWS, COLUMNS).transpose(0, 1, 2, 5, 3, 6, 4)
    return tiles.reshape(*front, layout.strips * ROWS, layout.tiles * COLUMNS, taps)[:, :, :height, :width]


def regular_points(layout: StripLayout) -> jax.Array:
    """The pixel of its patch that each tap of a tile reads without offsets: `(2, K * POSITIONS)`, in int32."""
    # Computed from iotas, so that the program stores no constant.
    window = layout.window
    tap, position = jnp.divmod(jnp.arange(window.taps * POSITIONS, dtype=jnp.int32), POSITIONS)
    axes = zip(jnp.divmod(tap, window.size[1]), jnp.divmod(position, COLUMNS), window.dilation, strict=True)
    return jnp.stack([tap * dilation + position + layout.reach for tap, position, dilation in axes])
