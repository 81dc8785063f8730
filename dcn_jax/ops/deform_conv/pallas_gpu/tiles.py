"""How the GPU kernels divide a call among programs: tiles, their sizes, and the elements they hold.

The channels are divided into segments. A segment is the largest run of channels that lies in one
offset group and in one feature group. A program takes a block of a segment's channels, a block of a
feature group's features, or both. And it takes either a tile of output positions, which may be
those of several images, or one chunk of positions after another, each of one image.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dcn_jax._core.pallas.blocks import Elements, block, quotient, shift, unravel
from dcn_jax.geometry import Window
from dcn_jax.ops.deform_conv.call import Spec


class GpuCall(NamedTuple):
    """A call of the op, without its arrays, and how the kernels run it; hashable."""

    spec: Spec  # its out_dtype is the one that the kernels write
    dot_algorithm: lax.DotAlgorithmPreset  # of float32 products
    interpret: bool

    @property
    def segments(self) -> int:
        """The number of segments that the channels are divided into."""
        return math.lcm(self.spec.offset_groups, self.spec.feature_groups)


class Tile(NamedTuple):
    """How many positions, channels and features one program has in registers (powers of two, at least 16), and its warps."""

    positions: int
    channels: int
    features: int
    warps: int = 8


WARPS = 4224  # backward_kernel divides its sum over positions among so many: 32 for each multiprocessor of an H100

# The largest tile of each kernel, by the dtype or the algorithm of the products: positions,
# channels, features. Those of "half" and "TF32_TF32_F32" are the fastest measured on an H200
# (JOURNAL.md), the others fit into the registers.
_TILES = {
    "half": {
        "forward, narrow": Tile(64, 32, 64, warps=4),
        "forward": Tile(64, 64, 128),
        "forward, wide": Tile(128, 64, 256),  # fills a multiprocessor, but gathers once for all features
        "backward_x": Tile(64, 64, 64, warps=4),
        "backward_kernel": Tile(64, 64, 128, warps=4),
        "backward_kernel, wide": Tile(128, 64, 256),
    },
    "TF32_TF32_F32": {
        "forward": Tile(64, 32, 128, warps=4),
        "backward_x": Tile(128, 64, 64, warps=4),
        "backward_kernel, narrow": Tile(64, 32, 64, warps=4),
        "backward_kernel": Tile(64, 64, 128),
    },
    # Replace "half" and "TF32_TF32_F32" if channels or features are no multiple of 8, and so are
    # loaded one by one ("odd"), or if the points have eight corners ("3-D").
    "odd or 3-D": {"forward": Tile(64, 32, 64), "backward_x": Tile(64, 32, 64), "backward_kernel": Tile(64, 32, 64)},
    "odd and 3-D": {"forward": Tile(32, 32, 64), "backward_x": Tile(32, 32, 32), "backward_kernel": Tile(32, 16, 64)},
    "TF32_TF32_F32_X3": {  # each operand takes twice the registers
        "forward": Tile(64, 32, 128),
        "backward_x": Tile(64, 64, 64),
        "backward_kernel": Tile(64, 32, 64),
    },
    "F32_F32_F32": {  # not on the tensor cores: the operands are in registers, whole
        "forward": Tile(64, 32, 128),
        "backward_x": Tile(32, 32, 32, warps=4),
        "backward_kernel": Tile(32, 64, 64),
    },
}
_INTERPRETED = Tile(16, 16, 16)  # small, so that the small arrays of tests take several tiles


class Segment(NamedTuple):
    """A run of channels in one offset group and one feature group."""

    number: jax.Array  # among all segments
    offset_group: jax.Array
    feature_group: jax.Array
    in_feature_group: jax.Array  # its number among the segments of its feature group


class Tiling(NamedTuple):
    """How one kernel divides channels and features among programs; hashable."""

    call: GpuCall
    tile: Tile
    channels: int  # of a segment
    features: int  # of a feature group

    @property
    def window(self) -> Window:
        """The window of the call."""
        return self.call.spec.window

    @property
    def channel_blocks(self) -> int:
        """The number of blocks in a segment."""
        return pl.cdiv(self.channels, self.tile.channels)

    @property
    def feature_blocks(self) -> int:
        """The number of blocks in a feature group."""
        return pl.cdiv(self.features, self.tile.features)

    @property
    def segments_per_offset_group(self) -> int:
        """The number of segments in an offset group."""
        return self.call.segments // self.call.spec.offset_groups

    @property
    def segments_per_feature_group(self) -> int:
        """The number of segments in a feature group."""
        return self.call.segments // self.call.spec.feature_groups

    def segment(self, number) -> Segment:
        """The `number`-th of all segments."""
        offset_group = quotient(number, self.segments_per_offset_group)
        feature_group, in_feature_group = unravel(number, self.segments_per_feature_group)
        return Segment(number, offset_group, feature_group, in_feature_group)

    def in_offset_group(self, segment: Segment) -> jax.Array:
        """The index of a segment among the segments of its offset group."""
        return segment.number - segment.offset_group * self.segments_per_offset_group

    @property
    def weight_terms(self) -> int:
        """The number of programs that each add a term to the gradient of one weight, from their channels and features."""
        return self.segments_per_offset_group * self.channel_blocks * self.feature_blocks

    def weight_term(self, segment: Segment, channel_block, feature_block):
        """The index of such a program."""
        return (
            self.in_offset_group(segment) * self.channel_blocks + channel_block
        ) * self.feature_blocks + feature_block

    def segment_channels(self, number) -> Elements:
        """The `number`-th block of a segment's channels, counted from the segment's first channel."""
        return block(number, self.tile.channels, self.channels)

    def x_columns(self, segment: Segment, channels: Elements) -> Elements:
        """Channels of a segment as columns of x, whose rows hold the channels of one offset group."""
        return shift(channels, self.in_offset_group(segment) * self.channels)

    def matrix_rows(self, segment: Segment, channels: Elements) -> Elements:
        """Channels of a segment as rows of a tap's matrix, which hold the channels of one feature group."""
        return shift(channels, segment.in_feature_group * self.channels)

    def group_features(self, feature_group, number) -> Elements:
        """The `number`-th block of a feature group's features, as columns of y and of a tap's matrix."""
        return shift(block(number, self.tile.features, self.features), feature_group * self.features)


def tiling_for(kernel: str, call: GpuCall, channels: int, features: int) -> Tiling:
    """The tiling of a kernel, for `channels` of one offset group and all `features`. No tile is larger than these need."""
    channels = channels * call.spec.offset_groups // call.segments
    features = features // call.spec.feature_groups
    tile = _INTERPRETED if call.interpret else _largest_tile(kernel, call, channels, features)

    def fit(limit, size):
        return max(16, min(limit, pl.next_power_of_2(size)))

    tile = tile._replace(channels=fit(tile.channels, channels), features=fit(tile.features, features))
    return Tiling(call, tile, channels, features)


def _largest_tile(kernel: str, call: GpuCall, channels: int, features: int) -> Tile:
    """A kernel's entry in the table, for the channels of a segment and the features of a feature group."""
    name = call.dot_algorithm.name if call.spec.dtype == "float32" else "half"
    if name in ("half", "TF32_TF32_F32"):
        odd, solid = channels % 8 or features % 8, call.spec.window.rank == 3
        name = "odd and 3-D" if odd and solid else "odd or 3-D" if odd or solid else name
    width = "narrow" if features <= 64 else "wide" if features > 128 else ""
    tiles = _TILES[name]
    return tiles.get(f"{kernel}, {width}", tiles[kernel])


def count_tiles(tiling: Tiling, images: int) -> int:
    """How many tiles hold all positions of all images."""
    return pl.cdiv(images * math.prod(_column_strips(tiling.window)), tiling.tile.positions)


def tile_positions(tiling: Tiling, images: int, number) -> Elements:
    """The output positions of the `number`-th tile, indexed (image, position)."""
    strips, rows, columns = _column_strips(tiling.window)
    index = number * tiling.tile.positions + jnp.arange(tiling.tile.positions, dtype=jnp.int32)
    image, strip, row, column = unravel(index, strips, rows, columns)
    column = strip * columns + column
    width = tiling.window.out_spatial[-1]
    return Elements((image, row * width + column), (image < images) & (column < width))


def count_chunks(tiling: Tiling, images: int) -> int:
    """How many chunks hold all positions of all images."""
    return images * pl.cdiv(math.prod(tiling.window.out_spatial), tiling.tile.positions)


def chunk_positions(tiling: Tiling, images: int, number) -> Elements:
    """The `number`-th chunk: positions of one image that follow each other in memory, indexed (image, position)."""
    positions = math.prod(tiling.window.out_spatial)
    image, number = unravel(number, pl.cdiv(positions, tiling.tile.positions))
    position = number * tiling.tile.positions + jnp.arange(tiling.tile.positions, dtype=jnp.int32)
    return Elements((jnp.broadcast_to(image, position.shape), position), (image < images) & (position < positions))


def _column_strips(window: Window) -> tuple[int, int, int]:
    """The order of positions in tiles: down one strip of about 12 columns after another.

    So a tile is a few rows of 12 columns, and many pixels that it reads are still in the first-level
    cache. Returns how many strips there are, their rows, and their columns.
    """
    *rows, columns = window.out_spatial
    strips = max(1, round(columns / 12)) if rows else 1
    return strips, math.prod(rows), pl.cdiv(columns, strips)
