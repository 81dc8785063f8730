"""A step of the sum on a CPU: all taps of a block of positions are read, and make one deep product."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax.geometry import Size, regular_taps
from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.ops.deform_conv.xla import one_tap
from dcn_jax.ops.deform_conv.xla.reading import pull_rows, sum_corners
from dcn_jax.ops.deform_conv.xla.schedule import Cut, Operands, sizes
from dcn_jax.sampling import Border, Positions, Rows, locate


def product(spec: Spec, cut: Cut, first: jax.Array, block: jax.Array, part: Operands) -> jax.Array:
    """What all taps add to a block: `(G, B * size, F / G)`."""
    size = sizes(spec, cut, part).block
    return _multiply(spec, _samples(spec, size, first, part._replace(matrices=None), block), part.matrices)


def pull(spec: Spec, cut: Cut, first, block, part: Operands, active: tuple[str, ...], bar: jax.Array) -> dict:
    """The transpose of `product`: the gradients by the operands that are `active`."""
    size, border = sizes(spec, cut, part).block, Border(spec.window.spatial, spec.window.padding_mode)

    def located(moving):
        rows, summed, points, scale = _locate_block(spec, size, first, part._replace(**moving), block)
        rows, summed, at = one_tap.one_batch_axis(rows, summed, locate(points, scale, border))
        return (rows, summed, at.weight), at.row

    moving = {name: getattr(part, name) for name in active if name != "matrices"}
    (rows, summed, weight), undo, row = jax.vjp(located, moving, has_aux=True)
    at = Rows(row, weight)
    samples = _samples(spec, size, first, part._replace(matrices=None), block)
    _, pull_product = jax.vjp(partial(_multiply, spec), samples, part.matrices)
    samples_bar, matrices_bar = pull_product(bar)
    read = jax.eval_shape(one_tap.read_images, rows, summed, at)
    (read_bar,) = jax.linear_transpose(partial(_arrange, spec), read)(samples_bar)
    if summed is None:
        rows_bar, weight_bar = jax.vmap(pull_rows)(rows, at, read_bar)
        summed_bar = None
    else:
        summed_bar, weight_bar = jax.vmap(pull_rows)(rows, at, read_bar, summed)
        rows_bar = jnp.zeros_like(rows)
    (bars,) = undo((rows_bar, summed_bar, weight_bar))
    return bars | {"matrices": matrices_bar} if "matrices" in active else bars


def _multiply(spec: Spec, samples: jax.Array, matrices: jax.Array) -> jax.Array:
    """Samples `([G,] B, size, K, …)` times matrices `(K, C / G, F)`: `(G, B * size, F / G)`."""
    groups, (taps, channels, features) = spec.feature_groups, matrices.shape
    depth, (images, size, *_) = taps * channels, samples.shape[1 if groups > 1 else 0 :]
    samples, matrices = samples.reshape(groups, images * size, depth), matrices.astype(spec.dtype)
    einsum: Any = partial(jnp.einsum, precision=spec.precision, preferred_element_type=spec.accumulate)
    if groups == 1:
        return einsum("nc,cf->nf", samples[0], matrices.reshape(depth, features))[None]
    return einsum("gnc,cgf->gnf", samples, matrices.reshape(depth, groups, features // groups))


def _read_block(spec: Spec, size: Size, first: jax.Array, part: Operands, block: jax.Array) -> jax.Array:
    """The samples of a block, of all taps, each group's together: `(G, B, size, K, channels read at one point …)`."""
    rows, summed, points, scale = _locate_block(spec, size, first, part, block)
    at = locate(points, scale, Border(spec.window.spatial, spec.window.padding_mode))
    return _arrange(spec, one_tap.read_images(rows, summed, at))


def _read_block_quickly(spec: Spec, size: Size, first: jax.Array, part: Operands, block: jax.Array) -> jax.Array:
    """`_read_block`, where no derivative is wanted."""
    rows, summed, points, scale = _locate_block(spec, size, first, part, block)
    rows, _, (points, scale) = one_tap.one_batch_axis(rows, None, (points, scale))
    border = Border(spec.window.spatial, spec.window.padding_mode)
    samples = jax.vmap(partial(sum_corners, border=border))(rows, points, scale)
    return _arrange(spec, samples if summed is None else samples.astype(summed.dtype))


def _locate_block(
    spec: Spec, size: Size, first: jax.Array, part: Operands, block: jax.Array
) -> tuple[jax.Array, jax.Array | None, Positions, jax.Array | None]:
    """The map, and its wider copy, by group, where a block reads it, `(*B, size, K, groups, n)`, and its modulations."""
    window, batch_axes = spec.window, part.rows.ndim - 2
    taps, groups = window.taps, math.lcm(spec.offset_groups, spec.feature_groups)

    def by_tap(array):  # (*B, size, OG, K * …) -> (*B, size, K, OG, …)
        array = array.reshape(*array.shape[: batch_axes + 1], spec.offset_groups, taps, array.shape[-1] // taps)
        array = jnp.repeat(array, groups // spec.offset_groups, batch_axes + 1)
        return array.swapaxes(batch_axes + 1, batch_axes + 2)

    def by_group(rows):  # (*B, H * W * OG, Cg) -> (*B, H * W * groups, C / groups)
        width = spec.offset_groups * rows.shape[-1] // groups
        return rows.reshape(*rows.shape[:-2], math.prod(window.spatial) * groups, width)

    first = one_tap.take_block(first, block, size)
    regular = first[:, None, None] + regular_taps(window).reshape(1, taps, 1, window.rank)  # (size, K, 1, n)
    points = Positions(lax.expand_dims(regular, range(batch_axes)), by_tap(part.offset))
    scale = None if part.modulation is None else by_tap(part.modulation)[..., 0]
    return by_group(part.rows), None if part.summed is None else by_group(part.summed), points, scale


def _arrange(spec: Spec, samples: jax.Array) -> jax.Array:
    """Samples `(B, size, K, groups, …)` with the groups of features outside.

    No axis is 1 long, for XLA's CPU backend would copy the samples.
    """
    several = spec.feature_groups, samples.shape[3] // spec.feature_groups
    samples = samples.reshape(*samples.shape[:3], *several, samples.shape[-1]).astype(spec.dtype)
    samples = samples.transpose(3, 0, 1, 2, 4, 5)
    return jnp.squeeze(samples, [axis for axis, n in zip((0, 4), several, strict=True) if n == 1])


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _samples(spec: Spec, size: Size, first: jax.Array, part: Operands, block: jax.Array) -> jax.Array:
    """`_read_block`, as an array of its own in the shape it has."""
    # XLA's CPU backend would join the reshaping for the product to the reading, find for each channel anew to which tap and
    # group it belongs, and take three times as long. It does not reach into a branch; an optimization barrier it drops.
    read = partial(_read_block_quickly, spec, size)
    wanted = jax.eval_shape(read, first, part, block)

    def zeros(first, part, block):
        del first, block
        return jnp.zeros_like(part.rows, wanted.dtype, wanted.shape)

    return lax.cond(block >= 0, read, zeros, first, part, block)


@_samples.defjvp
def _samples_jvp(spec, size, primals, tangents):
    return _samples(spec, size, *primals), jax.jvp(partial(_read_block, spec, size), primals, tangents)[1]
