"""Algorithm for every platform: one tap of a block of output positions after another.

    y[block] = Σ_tap  samples(block, tap) · matrix(tap)

A step reads the samples of one tap, `(B * size, C)`, and multiplies them with that tap's matrix. So only one step's
samples are in memory, and the derivative reads them again.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core.mesh import zeros_varying_like
from dcn_jax.geometry import Size
from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.ops.deform_conv.xla.blocks import (
    Blocks,
    Divided,
    Operands,
    Regular,
    border_of,
    differentiated,
    is_depthwise,
    read_images,
)
from dcn_jax.sampling import locate


def result(spec: Spec, blocks: Blocks, operands: Operands) -> jax.Array:
    """The sum over taps: `(B, P, F)`."""
    images, features = math.prod(operands.rows.shape[:-2]), operands.matrices.shape[-1]
    divided, regular = blocks.divide(spec, operands), blocks.regular_table(spec)

    @partial(jax.checkpoint, prevent_cse=False)  # a derivative of the loop keeps no samples either
    def product(block, tap):
        return _product(spec, blocks, regular, block, tap, blocks.take(spec, block, tap, divided))

    # One loop: with nested loops XLA copies a block's arrays first. In one loop XLA also sees that the kernel's gradient is a
    # sum over steps, and sums it over devices once, after the loop.
    def add(carry, _):
        step, total = carry
        block, tap = blocks.block_and_tap(spec, step)
        if blocks.number == 1:
            return (step + 1, total + product(block, tap)[None]), None
        return (step + 1, total.at[block].add(product(block, tap), mode="promise_in_bounds")), None

    zeros = zeros_varying_like(divided, spec.accumulate, (blocks.number, *_shape(spec, blocks, operands)))
    (_, y), _ = lax.scan(add, (jnp.int32(0), zeros), length=blocks.number * spec.window.taps)
    return blocks.join(spec, y.reshape(blocks.number, images, blocks.size, features))


def gradients(
    spec: Spec, blocks: Blocks, active: tuple[str, ...], y_bar: jax.Array, operands: Operands
) -> dict[str, jax.Array]:
    """The gradients of the operands named in `active`: the transpose of `result`, step by step, last step first."""
    divided, undo = jax.vjp(partial(blocks.divide, spec), operands)
    regular, y_bar, active = blocks.regular_table(spec), blocks.divide_cotangent(y_bar), differentiated(divided, active)

    @partial(jax.checkpoint, prevent_cse=False)
    def add(carry, _):
        step, sums = carry
        block, tap = blocks.block_and_tap(spec, step)
        part = blocks.take(spec, block, tap, divided._replace(matrices=operands.matrices))
        bar = blocks.take_cotangent(spec, block, y_bar).reshape(_shape(spec, blocks, operands))

        def of_active(given):
            return _product(spec, blocks, regular, block, tap, part._replace(**given))

        (bars,) = jax.vjp(of_active, {name: getattr(part, name) for name in active})[1](bar)
        added = {n: blocks.add_part(spec, block, tap, divided, n, sums[n], bars[n]) for n in active}
        return (step - 1, added), None

    zeros = jax.tree.map(jnp.zeros_like, divided)
    zeros_of_active = {name: getattr(zeros, name) for name in active}
    steps = blocks.number * spec.window.taps
    (_, sums), _ = lax.scan(add, (jnp.int32(steps - 1), zeros_of_active), length=steps)
    return undo(zeros._replace(**sums))[0]._asdict()


def _shape(spec: Spec, blocks: Blocks, operands: Operands) -> tuple[Size, ...]:
    """The shape of a step's product: `(B * size, F)`; where each channel is convolved alone, `(B * size, OG, F / OG)`."""
    images, features = math.prod(operands.rows.shape[:-2]), operands.matrices.shape[-1]
    # Offset groups stay an axis of their own: in one axis with the channels, a CPU divides to find the group of every channel,
    # which takes five times as long.
    groups = (spec.offset_groups,) if is_depthwise(spec, operands.rows.shape[-1]) else ()
    return images * blocks.size, *groups, features // math.prod(groups)


def _product(
    spec: Spec, blocks: Blocks, regular: Regular, block: jax.Array, tap: jax.Array, part: Divided
) -> jax.Array:
    """What one tap adds to a block, of the shape `_shape`."""
    points, scale = blocks.tap_points(spec, regular, block, tap, part)
    samples = read_images(part.rows, part.wide_rows, locate(points, scale, border_of(spec)))  # (B, size, OG, Cg)
    samples = blocks.hide_filler(spec, block, samples)
    return _multiply(spec, samples.reshape(math.prod(samples.shape[:2]), *samples.shape[2:]), part.matrices)


def _multiply(spec: Spec, samples: jax.Array, matrix: jax.Array) -> jax.Array:
    """Samples `(N, OG, Cg)` times one tap's matrix `(C / groups, F)`, feature group by feature group."""
    einsum: Any = partial(jnp.einsum, precision=spec.precision, preferred_element_type=spec.accumulate)
    samples, matrix = samples.astype(spec.dtype), matrix.astype(spec.dtype)
    (n, offset_groups, width), (channels, features), groups = samples.shape, matrix.shape, spec.feature_groups
    if is_depthwise(spec, width):
        matrix = matrix.reshape(offset_groups, width, features // groups)
        return einsum("noc,ocf->nocf", samples, matrix).reshape(n, offset_groups, features // offset_groups)
    # A flat matrix product: the transpose of a batched one contracts two axes at once, which is slow.
    samples = samples.reshape(n, offset_groups * width)
    if groups == 1:
        return einsum("nc,cf->nf", samples, matrix)
    samples = samples.reshape(n, groups, channels)
    matrix = matrix.reshape(channels, groups, features // groups)
    return einsum("ngc,cgf->ngf", samples, matrix).reshape(n, features)
