"""Which algorithm computes the op, and in how many blocks of positions: one table, by platform.

| platform | algorithm | blocks |
|---|---|---|
| cpu | `all_taps`; `one_tap` where `_blocks_of_all_taps_on_cpu` finds none | so many that a block fits the caches |
| tpu | `pixel_pairs`; `one_tap` where `_can_pair` says no | 4 or 5; 32 where each channel is convolved alone |
| any other, so a GPU | `two_stage`; `depthwise` where each channel is convolved alone; `one_tap` where int32 cannot count the rows of all groups | as few as `blocks_on_gpu` allows; 1; 1 |

More blocks take less scratch memory, and each block costs time. A symbolic size counts as if it were 1.
"""

import math
from types import ModuleType

import jax
import jax.numpy as jnp

from dcn_jax._core.platform_op import Algorithm, Algorithms
from dcn_jax.geometry import Size
from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.ops.deform_conv.xla import all_taps, depthwise, one_tap, pixel_pairs, two_stage
from dcn_jax.ops.deform_conv.xla.blocks import Blocks, Operands, is_depthwise
from dcn_jax.sampling import countable

_TPU_TILE = 8  # positions
_MOST_IF_SYMBOLIC = 8  # blocks, where the number of positions is not known


def algorithms(spec: Spec, operands: Operands, *, derivative: bool) -> Algorithms:
    """The algorithm of the result, or of its derivatives, for each platform; "default" is any other."""
    narrow = _is_narrow(operands)
    of_all_taps = _blocks_of_all_taps_on_cpu(spec, operands, derivative)
    of_one_tap = _blocks_of_one_tap_on_cpu(spec, operands, derivative, narrow)
    chosen = {
        "default": _on_gpu(spec, operands, derivative),
        "cpu": (all_taps, of_all_taps) if of_all_taps else (one_tap, of_one_tap),
        "tpu": (pixel_pairs if _can_pair(spec, operands) else one_tap, _blocks_on_tpu(spec, operands)),
    }
    table = {
        platform: _algorithm(spec, module, number, widen_by_block=narrow and platform == "cpu")
        for platform, (module, number) in chosen.items()
    }
    return tuple((name, made) for name, made in table.items() if name == "default" or made != table["default"])


def _algorithm(spec: Spec, module: ModuleType, number: int, *, widen_by_block: bool) -> Algorithm:
    positions = math.prod(spec.window.out_spatial)
    number = min(number, positions if isinstance(positions, int) else _MOST_IF_SYMBOLIC)
    size = -(-positions // number)
    if module is pixel_pairs:
        size = -(-size // _TPU_TILE) * _TPU_TILE
    return Algorithm(module.result, module.gradients, Blocks(number, size, widen_by_block))


def _on_gpu(spec: Spec, operands: Operands, derivative: bool) -> tuple[ModuleType, int]:
    """The algorithm, and its blocks."""
    if is_depthwise(spec, operands.rows.shape[-1]):
        return depthwise, 1
    if not countable(math.lcm(spec.offset_groups, spec.feature_groups) * math.prod(spec.window.spatial)):
        return one_tap, 1
    return two_stage, blocks_on_gpu(spec, operands, derivative)


# Scratch memory that a GPU of 80 GB does not miss, in bytes; and if the columns are large, a share of them.
_SPARE = 256e6
_SHARE_OF_COLUMNS = {"result": 0.30, "derivative": 0.75}
# What a block takes beside its columns, or with their gradient too: weights, rows, and a part of the result.
_COLUMNS_OF_A_BLOCK = {"result": 1.15, "derivative": 2.2}
# In the derivative, of each tap: its row, its weight and that weight's gradient, and whether it is read.
_BYTES_OF_A_CORNER = 13


def blocks_on_gpu(spec: Spec, operands: Operands, derivative: bool) -> int:
    """The fewest whose scratch memory stays within a bound: each of several launches 5 kernels or 6, with gradients 10 to 15."""
    *batch, _, channels = operands.rows.shape
    positions, kind = math.prod(spec.window.out_spatial), "derivative" if derivative else "result"
    known = math.prod(n for n in (*batch, positions) if isinstance(n, int))
    row = max(channels, 1) * jnp.dtype(spec.dtype).itemsize
    columns = known * spec.window.taps * spec.offset_groups * row
    of_a_block = _COLUMNS_OF_A_BLOCK[kind]
    if derivative:  # beside short rows the corners count: eight of 3-D, or few channels
        of_a_block = max(of_a_block, 2 + 2**spec.window.rank * _BYTES_OF_A_CORNER / row)
    # The gradient of a narrow map is summed in float32.
    sums = (
        4 * math.prod(n for n in operands.rows.shape if isinstance(n, int))
        if derivative and _is_narrow(operands)
        else 0
    )
    bound = max(_SPARE, _SHARE_OF_COLUMNS[kind] * columns)
    number = max(1, math.ceil(of_a_block * columns / max(bound - sums, bound / 2)))
    return _dividing(number, positions)


def _blocks_on_tpu(spec: Spec, operands: Operands) -> int:
    # A TPU keeps all 2^n rows that a sample is made of, each padded to 128 channels.
    if is_depthwise(spec, operands.rows.shape[-1]):
        return 32
    return 5 if spec.offset_groups > 1 else 4


def _can_pair(spec: Spec, operands: Operands) -> bool:
    """Whether a TPU reads pixels in pairs: one feature group, few offset groups, zeros beyond a line, rows that int32 counts."""
    together = spec.feature_groups == 1 and not is_depthwise(spec, operands.rows.shape[-1])
    return (
        together
        and spec.offset_groups <= 8
        and spec.window.padding_mode[-1] == "zeros"
        and countable(2 * math.prod(spec.window.spatial))
    )


def _blocks_of_one_tap_on_cpu(spec: Spec, operands: Operands, derivative: bool, narrow: bool) -> int:
    """So many that the samples of one tap stay in the caches."""
    positions = math.prod(spec.window.out_spatial)
    *batch, _, channels = operands.rows.shape
    known = [n for n in (*batch, positions) if isinstance(n, int)]
    samples = math.prod(known) * spec.offset_groups * channels * jnp.dtype(spec.accumulate).itemsize
    times = (4 if is_depthwise(spec, channels) else 2) if derivative else 1  # the derivative keeps more of a step
    number = times * max(1, round(samples / 1.75e6))
    # Narrow arrays are computed in float32 all the same.
    return _dividing(3 * number, positions) if narrow and derivative else number


def _blocks_of_all_taps_on_cpu(spec: Spec, operands: Operands, derivative: bool) -> int | None:
    """So many that scratch memory stays a share of the columns (P · K · C numbers), and a block's columns fit the caches.

    None where one tap at a time is better: each channel is convolved alone, a size is symbolic, int32 cannot count the rows,
    or, in the derivative, the kernel is large beside a block.
    """
    *batch, _, channels = operands.rows.shape
    images, positions, features = math.prod(batch), math.prod(spec.window.out_spatial), operands.matrices.shape[-1]
    known = isinstance(images, int) and isinstance(positions, int)
    groups = math.lcm(spec.offset_groups, spec.feature_groups)
    if is_depthwise(spec, channels) or not known or not countable(groups * math.prod(spec.window.spatial)):
        return None
    samples = images * positions * spec.offset_groups * channels * jnp.dtype(spec.accumulate).itemsize
    columns = samples * spec.window.taps
    # More blocks with several images or groups, whose samples are copied into one order; and for narrow arrays, of which a
    # block is computed in float32.
    several, narrow = images > 1 or spec.feature_groups > 1, jnp.finfo(spec.dtype).bits < 32
    least, most_bytes, more = (20 if several else 14, 1.75e6, 1.5 if narrow else 1) if derivative else (5, 3.5e6, 1)
    number = min(_dividing(max(round(more * least), round(columns / most_bytes)), positions), positions)
    # Each block adds to the gradient of the whole kernel. Where the kernel is large beside a block's samples, one tap at a
    # time is as fast; with several offset groups it is not, because its derivative makes samples at half the speed.
    large_kernel = images * positions * more < 2 * number * features // spec.feature_groups
    return None if derivative and large_kernel and spec.offset_groups == 1 else number


def _is_narrow(operands: Operands) -> bool:
    return any(jnp.finfo(array.dtype).bits < 32 for array in jax.tree.leaves(operands))


def _dividing(blocks: int, positions: Size) -> int:
    """`blocks`, or the next number up to twice as many that divides the positions, so that no block is filled up."""
    wanted = range(blocks, 2 * blocks if isinstance(positions, int) else blocks)
    return next((n for n in wanted if positions % n == 0), blocks)
