"""How the sum over positions and taps is cut into steps, for each platform in its own way."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcn_jax.geometry import Size
from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.sampling import countable


class Operands(NamedTuple):
    """What is summed: its batch axes as one, or as they are where offset or mask is to be repeated along some."""

    rows: Any  # (*B, R, Cg): the map that is read
    matrices: Any  # (K, C / groups, F)
    offset: Any  # (*B, P, OG, K, n)
    modulation: Any  # (*B, P, OG, K), or None
    summed: Any  # a narrow map in the accumulator's dtype: nothing reads it, and its gradient is the map's; or None


class Cut(NamedTuple):
    """How the sum is cut into steps."""

    step: str  # "tap": one tap of a block of positions; "deep": all its taps; "pairs": one tap, pixels read in pairs
    blocks: int  # of positions
    # Whether steps take narrow arrays as they are: XLA's CPU backend takes bfloat16 to float32 in order to slice it, and
    # would do so before the loop, with all of an array.
    held: bool = False


class Sizes(NamedTuple):
    """How many there are."""

    images: Size
    block: Size  # positions in a block
    positions: Size  # in all
    features: int


def sizes(spec: Spec, cut: Cut, operands: Operands) -> Sizes:
    """The sizes of a sum that is cut."""
    positions = math.prod(spec.window.out_spatial)
    block = -(-positions // cut.blocks)
    if cut.step == "pairs":
        block = -(-block // 8) * 8  # whole tiles of a TPU
    return Sizes(math.prod(batch_of(operands)), block, positions, operands.matrices.shape[-1])


def batch_of(operands: Operands) -> tuple[Size, ...]:
    """The batch axes of the map, which may be in pairs, one array for each offset group."""
    return jax.tree.leaves(operands.rows)[0].shape[:-2]


def depthwise(spec: Spec, channels: int) -> bool:
    """Whether each of the channels of an offset group, Cg, is convolved apart."""
    return spec.feature_groups == spec.offset_groups * channels


def cuts_by_platform(spec: Spec, operands: Operands, derivative: bool) -> tuple[tuple[str, Cut], ...]:
    """A cut for each platform: more blocks take less scratch memory, but each costs time."""
    positions, channels = math.prod(spec.window.out_spatial), operands.rows.shape[-1]
    apart = depthwise(spec, channels)
    narrow = any(jnp.finfo(array.dtype).bits < 32 for array in jax.tree.leaves(operands._replace(summed=None)))
    # The derivative keeps more of a step. Where channels are not multiplied together, more blocks take no more time.
    few = (4 if apart else 2) if derivative else 1
    # A block's samples, of one tap, stay in the caches of a CPU. Sizes that are known only when an exported program is
    # called count for nothing.
    known = [n for n in (*operands.rows.shape[:-2], positions) if isinstance(n, int)]
    samples = math.prod(known) * spec.offset_groups * channels * jnp.dtype(spec.accumulate).itemsize
    # A TPU reads pairs where all channels are convolved together, and few are read apart.
    paired = spec.feature_groups == 1 and not apart and spec.offset_groups <= 8
    paired = paired and spec.window.padding_mode[-1] == "zeros" and countable(2 * math.prod(spec.window.spatial))
    cuts = {
        # A GPU has the memory; and each of the kernels of a step costs it a launch, however little it does.
        "default": Cut("tap", few if apart else 1),
        "cpu": Cut("tap", few * max(1, round(samples / 1.75e6)), narrow),
        # It keeps the 2^n rows of each sample, and pads rows, and groups of channels, to 128 channels.
        "tpu": Cut("pairs" if paired else "tap", 32 if apart else 5 if spec.offset_groups > 1 else 4),
    }
    if narrow and derivative:  # a step is in float32 all the same
        cuts["cpu"] = Cut("tap", _dividing(3 * cuts["cpu"].blocks, positions), narrow)
    if deep := _blocks_of_all_taps(spec, operands, derivative):
        cuts["cpu"] = Cut("deep", deep, narrow)
    most = positions if isinstance(positions, int) else 8
    cuts = {platform: cut._replace(blocks=min(cut.blocks, most)) for platform, cut in cuts.items()}
    return tuple((name, cut) for name, cut in cuts.items() if name == "default" or cut != cuts["default"])


def _blocks_of_all_taps(spec: Spec, operands: Operands, derivative: bool) -> int | None:
    """Into how many blocks a CPU cuts the positions where it reads all taps of a block at once; None: it does not."""
    images, _, positions, features = sizes(spec, Cut("deep", 1), operands)
    channels = operands.rows.shape[-1]
    known = isinstance(images, int) and isinstance(positions, int)
    groups = math.lcm(spec.offset_groups, spec.feature_groups)
    if depthwise(spec, channels) or not known or not countable(groups * math.prod(spec.window.spatial)):
        return None
    samples = images * positions * spec.offset_groups * channels * jnp.dtype(spec.accumulate).itemsize
    columns = samples * spec.window.taps
    # So many that scratch memory stays a share of the columns, and more where they outgrow the caches. What comes from several
    # images or groups is brought into one order, in a copy; and of narrow arrays a step is in float32 all the same.
    several, narrow = images > 1 or spec.feature_groups > 1, jnp.finfo(spec.dtype).bits < 32
    least, most_bytes, more = (20 if several else 14, 1.75e6, 1.5 if narrow else 1) if derivative else (5, 3.5e6, 1)
    blocks = min(_dividing(max(round(more * least), round(columns / most_bytes)), positions), positions)
    # Each block adds to the gradient of the whole kernel. Where that is much beside its samples, one tap at a time is as
    # fast; but not with several offset groups, whose samples that path's derivative takes twice as long to make.
    few = images * positions * more < 2 * blocks * features // spec.feature_groups
    return None if derivative and few and spec.offset_groups == 1 else blocks


def _dividing(blocks: int, positions: Size) -> int:
    """So many blocks, or up to twice as many, that they divide the positions where they can: then none of these is padded."""
    wanted = range(blocks, 2 * blocks if isinstance(positions, int) else blocks)
    return next((n for n in wanted if positions % n == 0), blocks)
