"""How a call is cut for the kernels: its plan, the table of tiles, and what a tile holds.

Channels fall into segments, each in one offset group and one feature group; a segment falls into
blocks. Positions of all images fall into tiles.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dcn_jax._core.pallas.blocks import Span, block, quotient, shift, unravel
from dcn_jax.geometry import Window
from dcn_jax.ops.deform_conv.call import Spec


class Plan(NamedTuple):
    """A call, and how the kernels are to run it; hashable."""

    spec: Spec
    product: lax.DotAlgorithmPreset  # how float32 products are made
    interpret: bool

    @property
    def segments(self) -> int:
        """Channels fall into this many runs, each in one offset group and one feature group."""
        return math.lcm(self.spec.offset_groups, self.spec.feature_groups)


class Tile(NamedTuple):
    """How much one program of a kernel holds at a time; powers of two, at least 16."""

    positions: int
    channels: int
    features: int
    warps: int = 8
    stages: int = 1


WARPS = 4224  # over which a sum over positions is spread: 32 for each multiprocessor of an H100

# For each way to make a product, the largest tile of each kernel: positions, channels, features. "half" and "TF32_TF32_F32"
# were chosen by times on an H200 (pallas_gpu.md), the others by registers alone. One stage: with more, pixels are copied
# through shared memory.
_TILES = {
    "half": {
        "forward, narrow": Tile(64, 32, 64, warps=4),
        "forward": Tile(64, 64, 128),
        "forward, wide": Tile(128, 64, 256),  # one program to a multiprocessor: gathered once for all features
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
    # In place of these two, where numbers do not come in eights and are loaded one by one, or points have eight corners:
    "odd or 3-D": {
        "forward": Tile(64, 32, 64),
        "backward_x": Tile(64, 32, 64),
        "backward_kernel": Tile(64, 32, 64),
    },
    "odd and 3-D": {
        "forward": Tile(32, 32, 64),
        "backward_x": Tile(32, 32, 32),
        "backward_kernel": Tile(32, 16, 64),
    },
    "TF32_TF32_F32_X3": {  # each operand is held twice
        "forward": Tile(64, 32, 128),
        "backward_x": Tile(64, 64, 64),
        "backward_kernel": Tile(64, 32, 64),
    },
    "F32_F32_F32": {  # no tensor cores; operands are held in registers whole
        "forward": Tile(64, 32, 128),
        "backward_x": Tile(32, 32, 32, warps=4),
        "backward_kernel": Tile(32, 64, 64),
    },
}
_INTERPRETED = Tile(16, 16, 16)  # small, so that small arrays take several


class Segment(NamedTuple):
    """A run of channels in one offset group and one feature group."""

    number: jax.Array  # among all segments
    part: jax.Array  # among those of its feature group
    offset_group: jax.Array
    feature_group: jax.Array


class Cut(NamedTuple):
    """How channels and features fall into groups, and these into a kernel's blocks; hashable."""

    plan: Plan
    tile: Tile
    channels: int  # of a segment
    features: int  # of a feature group

    @property
    def window(self) -> Window:
        """The window of the call."""
        return self.plan.spec.window

    @property
    def channel_blocks(self) -> int:
        """How many blocks hold the channels of a segment."""
        return pl.cdiv(self.channels, self.tile.channels)

    @property
    def feature_blocks(self) -> int:
        """How many blocks hold the features of a feature group."""
        return pl.cdiv(self.features, self.tile.features)

    @property
    def segments_per_offset_group(self) -> int:
        """How many segments lie in one offset group."""
        return self.plan.segments // self.plan.spec.offset_groups

    @property
    def segments_per_feature_group(self) -> int:
        """How many segments lie in one feature group."""
        return self.plan.segments // self.plan.spec.feature_groups

    def segment(self, number) -> Segment:
        """The `number`-th of all segments."""
        offset_group = quotient(number, self.segments_per_offset_group)
        feature_group, part = unravel(number, self.segments_per_feature_group)
        return Segment(number, part, offset_group, feature_group)

    @property
    def parts(self) -> int:
        """Over how many programs the channels and features of a tap and an offset group are spread."""
        return self.segments_per_offset_group * self.channel_blocks * self.feature_blocks

    def part(self, segment: Segment, channel_block, feature_block):
        """The number of such a program."""
        part = segment.number - segment.offset_group * self.segments_per_offset_group
        return (part * self.channel_blocks + channel_block) * self.feature_blocks + feature_block

    def segment_channels(self, number) -> Span:
        """The `number`-th block of a segment's channels, counted from its first."""
        return block(number, self.tile.channels, self.channels)

    def columns(self, segment: Segment, channels: Span) -> Span:
        """Channels of a segment as columns of a row of x, which holds those of an offset group."""
        part = segment.number - segment.offset_group * self.segments_per_offset_group
        return shift(channels, part * self.channels)

    def rows(self, segment: Segment, channels: Span) -> Span:
        """Channels of a segment as rows of a tap's matrix."""
        return shift(channels, segment.part * self.channels)

    def group_features(self, feature_group, number) -> Span:
        """The `number`-th block of a feature group's features: columns of y and of a matrix."""
        return shift(block(number, self.tile.features, self.features), feature_group * self.features)


def cut_for(kernel: str, plan: Plan, channels: int, features: int) -> Cut:
    """The cut for a kernel of maps whose rows have so many channels: its tile is no larger than these and the features need."""
    channels = channels * plan.spec.offset_groups // plan.segments
    features = features // plan.spec.feature_groups
    tile = _INTERPRETED if plan.interpret else _largest_tile(kernel, plan, channels, features)

    def fit(limit, size):
        return max(16, min(limit, pl.next_power_of_2(size)))

    tile = tile._replace(channels=fit(tile.channels, channels), features=fit(tile.features, features))
    return Cut(plan, tile, channels, features)


def _largest_tile(kernel: str, plan: Plan, channels: int, features: int) -> Tile:
    """A kernel's entry in the table, for the channels of a segment and the features of a feature group."""
    name = plan.product.name if plan.spec.dtype == "float32" else "half"
    if name in ("half", "TF32_TF32_F32"):
        odd, solid = channels % 8 or features % 8, plan.spec.window.rank == 3
        name = "odd and 3-D" if odd and solid else "odd or 3-D" if odd or solid else name
    width = "narrow" if features <= 64 else "wide" if features > 128 else ""
    tiles = _TILES[name]
    return tiles.get(f"{kernel}, {width}", tiles[kernel])


def count_tiles(cut: Cut, images: int) -> int:
    """How many tiles hold all positions of all images."""
    return pl.cdiv(images * math.prod(_strips(cut.window)), cut.tile.positions)


def tile_positions(cut: Cut, images: int, number) -> Span:
    """The output positions of the `number`-th tile, indexed (image, position)."""
    strips, rows, columns = _strips(cut.window)
    index = number * cut.tile.positions + jnp.arange(cut.tile.positions, dtype=jnp.int32)
    image, strip, row, column = unravel(index, strips, rows, columns)
    column = strip * columns + column
    width = cut.window.out_spatial[-1]
    return Span((image, row * width + column), (image < images) & (column < width))


def count_runs(cut: Cut, images: int) -> int:
    """How many runs hold all positions of all images, none of them those of two."""
    return images * pl.cdiv(math.prod(cut.window.out_spatial), cut.tile.positions)


def run_positions(cut: Cut, images: int, number) -> Span:
    """The output positions of the `number`-th run, one after another as they lie in memory, indexed (image, position)."""
    positions = math.prod(cut.window.out_spatial)
    image, number = unravel(number, pl.cdiv(positions, cut.tile.positions))
    position = number * cut.tile.positions + jnp.arange(cut.tile.positions, dtype=jnp.int32)
    return Span((jnp.broadcast_to(image, position.shape), position), (image < images) & (position < positions))


def _strips(window: Window) -> tuple[int, int, int]:
    """How tiles run over a map: down one strip of columns after another, about as wide as high.

    What neighbouring points read is then found in the first-level cache. Returns (strips, rows,
    columns of a strip).
    """
    *rows, columns = window.out_spatial
    strips = max(1, round(columns / 12)) if rows else 1
    return strips, math.prod(rows), pl.cdiv(columns, strips)
