"""Algorithm of a GPU where each channel is convolved alone: one kernel reads, weighs and adds.

    y = Σ_tap  samples(tap) · matrix(tap)        channel by channel

There is no product to make columns for, so no samples are in memory, and all positions are one block: more blocks
would only launch more kernels. C is OG · Cg channels, each with M features.
"""

import functools
import operator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.ops.deform_conv.xla.blocks import Blocks, Divided, Operands, differentiated
from dcn_jax.ops.deform_conv.xla.reading import Corners, add_to_maps, locate_taps, pull_weights, samples_of

# With more taps in one sum LLVM reads one channel at a time, and not four.
_TAPS_IN_A_SUM = 3


def result(spec: Spec, blocks: Blocks, operands: Operands) -> jax.Array:
    """The sum over taps: `(B, P, F)`."""
    block, divided = jnp.int32(0), blocks.divide(spec, operands)
    y = jax.checkpoint(partial(_sum_taps, spec, blocks, block))(blocks.take(spec, block, None, divided))
    return y.reshape(*y.shape[:2], operands.matrices.shape[-1]).astype(spec.out_dtype)


def _sum_taps(spec: Spec, blocks: Blocks, block: jax.Array, part: Divided) -> jax.Array:
    """The sum over taps, by group and channel: `(B, P, OG, Cg, M)`."""
    matrices = _by_group(spec, part.matrices)
    maps, at = locate_taps(spec, blocks, block, part, spec.offset_groups)
    # Without this barrier XLA finds the weights of each sum below in several kernels of their own. With the rows behind it
    # too, all of them would be in memory at once.
    is_read, weight = lax.optimization_barrier((at.is_read, at.weight))
    at = Corners(at.row, is_read, weight)
    sums = []
    for start in range(0, spec.window.taps, _TAPS_IN_A_SUM):
        taps = slice(start, start + _TAPS_IN_A_SUM)
        samples = samples_of(maps, jax.tree.map(lambda array, taps=taps: array[..., taps], at))
        sums.append(jnp.sum(samples[..., None].astype(matrices.dtype) * matrices[:, :, :, taps], axis=-3))
    return functools.reduce(operator.add, sums)


def gradients(
    spec: Spec, blocks: Blocks, active: tuple[str, ...], y_bar: jax.Array, operands: Operands
) -> dict[str, jax.Array]:
    """The gradients of the operands named in `active`: the transpose of `result`."""
    divided, undo = jax.vjp(partial(blocks.divide, spec), operands)
    active, block = differentiated(divided, active), jnp.int32(0)
    pull = jax.checkpoint(partial(_pull_taps, spec, blocks, block, active))
    bars = pull(blocks.take(spec, block, None, divided._replace(matrices=operands.matrices)), y_bar)
    zeros = jax.tree.map(jnp.zeros_like, divided)
    sums = {n: blocks.add_part(spec, block, None, divided, n, getattr(zeros, n), bars[n]) for n in active}
    return undo(zeros._replace(**sums))[0]._asdict()


def _pull_taps(
    spec: Spec, blocks: Blocks, block: jax.Array, active: tuple[str, ...], part: Divided, y_bar: jax.Array
) -> dict[str, jax.Array]:
    """The gradients of the arrays of `part` named in `active`; `y_bar` is that of the result, `(B, P, F)`."""

    def located(given):
        maps, at = locate_taps(spec, blocks, block, part._replace(**given), spec.offset_groups)
        return (maps, at.weight), (at.row, at.is_read)

    given = {name: getattr(part, name) for name in active if name != "matrices"}
    (maps, weight), undo, (row, is_read) = jax.vjp(located, given, has_aux=True)
    at, matrices = Corners(row, is_read, weight), _by_group(spec, part.matrices)
    groups, _, channels, each = matrices.shape[2:]
    y_bar = y_bar.astype(spec.accumulate).reshape(*y_bar.shape[:2], groups, 1, channels, each)
    samples_bar = jnp.sum(y_bar * matrices, axis=-1)  # (B, P, OG, K, Cg)
    samples, weight_bar = pull_weights(maps, at, samples_bar)
    (bars,) = undo((maps.gradients(add_to_maps(maps.zeros(), at, samples_bar)), weight_bar))
    if "matrices" in active:
        matrices_bar = jnp.sum(samples[..., None].astype(y_bar.dtype) * y_bar, axis=(0, 1))
        bars["matrices"] = matrices_bar.swapaxes(0, 1).reshape(part.matrices.shape)
    return bars


def _by_group(spec: Spec, matrices: jax.Array) -> jax.Array:
    """Matrices `(K, 1, F)`: `(1, 1, OG, K, Cg, M)`, to multiply the samples of every image and position."""
    taps, _, features = matrices.shape
    channels = spec.feature_groups // spec.offset_groups
    matrices = matrices.reshape(taps, spec.offset_groups, channels, features // spec.feature_groups)
    return matrices.swapaxes(0, 1)[None, None]
