"""Algorithm of a GPU, in two stages: read the samples of all taps of a block, then multiply them with the whole kernel.

    columns = samples (B * size, K * C)          one kernel, in which a thread reads all corners of a few channels
    y[block] = columns · matrices (K * C, F)     one product

A GPU takes some microseconds to launch a kernel, however little that kernel does, so the fewest kernels are wanted:
where memory allows it, all positions are one block. JOURNAL.md of the op says what XLA made of other forms.

The channels of a column are ordered [feature group, one of its groups, tap, channel], because then no array but the
kernel is transposed. G is the number of feature groups; `groups`, the least common multiple of G and OG.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core.mesh import zeros_varying_like
from dcn_jax.geometry import int32
from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.ops.deform_conv.xla.blocks import Blocks, Divided, Operands, differentiated, fill_up
from dcn_jax.ops.deform_conv.xla.reading import Corners, add_to_maps, locate_taps, pull_weights, samples_of


def result(spec: Spec, blocks: Blocks, operands: Operands) -> jax.Array:
    """The sum over taps, one block after another: `(B, P, F)`."""
    divided = blocks.divide(spec, operands)
    images, features = math.prod(operands.rows.shape[:-2]), operands.matrices.shape[-1]

    @partial(jax.checkpoint, prevent_cse=False)  # a derivative of the loop keeps no columns either
    def write(carry, _):
        block, y = carry
        part = blocks.take(spec, block, None, divided)
        samples = samples_of(*locate_taps(spec, blocks, block, part, _groups(spec)))
        samples = blocks.hide_filler(spec, block, samples)
        of_block = _multiply(spec, samples, part.matrices).astype(spec.out_dtype)
        start = block * int32(blocks.size)
        return (block + 1, lax.dynamic_update_slice_in_dim(y, of_block, start, 1, allow_negative_indices=False)), None

    empty = zeros_varying_like(operands, spec.out_dtype, (images, blocks.number * blocks.size, features))
    (_, y), _ = lax.scan(write, (jnp.int32(0), empty), length=blocks.number)
    return y[:, : math.prod(spec.window.out_spatial)]


def gradients(
    spec: Spec, blocks: Blocks, active: tuple[str, ...], y_bar: jax.Array, operands: Operands
) -> dict[str, jax.Array]:
    """The gradients of the operands named in `active`: the transpose of `result`, last block first."""
    divided, undo = jax.vjp(partial(blocks.divide, spec), operands)
    y_bar, active = fill_up(y_bar, 1, blocks.number * blocks.size), differentiated(divided, active)

    @partial(jax.checkpoint, prevent_cse=False)
    def add(carry, _):
        block, sums = carry
        part = blocks.take(spec, block, None, divided._replace(matrices=operands.matrices))
        start = block * int32(blocks.size)
        bar = lax.dynamic_slice_in_dim(y_bar, start, blocks.size, 1, allow_negative_indices=False)
        bars = _pull_block(spec, blocks, block, part, active, bar)
        added = {n: blocks.add_part(spec, block, None, divided, n, sums[n], bars[n]) for n in active}
        return (block - 1, added), None

    zeros = jax.tree.map(jnp.zeros_like, divided)
    zeros_of_active = {name: getattr(zeros, name) for name in active}
    (_, sums), _ = lax.scan(add, (jnp.int32(blocks.number - 1), zeros_of_active), length=blocks.number)
    return undo(zeros._replace(**sums))[0]._asdict()


def _pull_block(
    spec: Spec, blocks: Blocks, block: jax.Array, part: Divided, active: tuple[str, ...], bar: jax.Array
) -> dict[str, jax.Array]:
    """The gradients of the arrays of `part` named in `active`; `bar` is that of the block's result, `(B, size, F)`."""

    def located(given):
        maps, at = locate_taps(spec, blocks, block, part._replace(**given), _groups(spec))
        return (maps, at.weight), (at.row, at.is_read)

    given = {name: getattr(part, name) for name in active if name != "matrices"}
    (maps, weight), undo, (row, is_read) = jax.vjp(located, given, has_aux=True)
    bar = bar.astype(_dtype_of_cotangents(spec)).reshape(math.prod(bar.shape[:2]), bar.shape[-1])
    bar = lax.optimization_barrier(bar)  # with the block's slice in the product, XLA of JAX 0.10 finds no tiles for it
    samples_bar = _pull_samples(spec, part.matrices, bar).reshape(*row[0].shape, maps.rows.shape[-1])
    samples_bar = blocks.hide_filler(spec, block, samples_bar)
    at = Corners(row, is_read, weight)
    samples, weight_bar = pull_weights(maps, at, samples_bar)
    samples = blocks.hide_filler(spec, block, samples)
    (bars,) = undo((maps.gradients(add_to_maps(maps.zeros(), at, samples_bar)), weight_bar))
    return bars | {"matrices": _pull_matrices(spec, samples, part.matrices, bar)} if "matrices" in active else bars


# Products


def _groups(spec: Spec) -> int:
    """The fewest groups of channels that both the offset groups and the feature groups are made of."""
    return math.lcm(spec.offset_groups, spec.feature_groups)


def _multiply(spec: Spec, samples: jax.Array, matrices: jax.Array) -> jax.Array:
    """Samples `(B, size, groups, K, C / groups)` times the kernel: `(B, size, F)`."""
    y = _einsum(spec, "ngc,gcf->ngf", _columns(spec, samples), _by_group(spec, matrices.astype(spec.dtype)))
    return y.reshape(*samples.shape[:2], matrices.shape[-1])


def _pull_samples(spec: Spec, matrices: jax.Array, bar: jax.Array) -> jax.Array:
    """The gradient of the columns, `(B * size, G, K * C / G)`, at `bar`, `(B * size, F)`."""
    matrices = _by_group(spec, matrices.astype(bar.dtype))
    bar = bar.reshape(bar.shape[0], spec.feature_groups, matrices.shape[-1])
    return _einsum(spec, "ngf,gcf->ngc", bar, matrices).astype(bar.dtype)


def _pull_matrices(spec: Spec, samples: jax.Array, matrices: jax.Array, bar: jax.Array) -> jax.Array:
    """The gradient of the matrices, `(K, C / G, F)`, at `bar`, `(B * size, F)`."""
    by_group, pull = jax.vjp(partial(_by_group, spec), matrices)
    bar = bar.reshape(bar.shape[0], spec.feature_groups, by_group.shape[-1])
    return pull(_einsum(spec, "ngc,ngf->gcf", _columns(spec, samples), bar))[0]


def _dtype_of_cotangents(spec: Spec) -> Any:
    """bfloat16 has the range of float32. float16 has not: where a loss is scaled up, cotangents overflow it."""
    return spec.dtype if spec.dtype == jnp.bfloat16 else spec.accumulate


def _columns(spec: Spec, samples: jax.Array) -> jax.Array:
    """Samples `(B, size, groups, K, C / groups)` as rows of the products: `(B * size, G, K * C / G)`."""
    images, size, *depth = samples.shape
    return samples.reshape(images * size, spec.feature_groups, math.prod(depth) // spec.feature_groups).astype(
        spec.dtype
    )


def _by_group(spec: Spec, matrices: jax.Array) -> jax.Array:
    """Matrices `(K, C / G, F)`, their channels in the order of the columns: `(G, K * C / G, F / G)`."""
    (taps, channels, features), groups = matrices.shape, spec.feature_groups
    of_one = _groups(spec) // groups  # groups in a feature group
    matrices = matrices.reshape(taps, of_one, channels // of_one, groups, features // groups)
    return matrices.transpose(3, 1, 0, 2, 4).reshape(groups, taps * channels, features // groups)


def _einsum(spec: Spec, subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product summed in float32 or wider; one feature group's is a product of two matrices."""
    einsum: Any = partial(jnp.einsum, precision=spec.precision, preferred_element_type=spec.accumulate)
    if spec.feature_groups > 1:
        return einsum(subscripts, left, right)
    axes = [part.index("g") for part in subscripts.replace("->", ",").split(",")]
    y = einsum(subscripts.replace("g", ""), jnp.squeeze(left, axes[0]), jnp.squeeze(right, axes[1]))
    return jnp.expand_dims(y, axes[2])
