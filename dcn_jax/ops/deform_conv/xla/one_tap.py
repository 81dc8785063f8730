"""A step of the sum: one tap of a block of positions."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core.dtypes import wide
from dcn_jax.geometry import Size, int32, regular_positions, regular_taps
from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.ops.deform_conv.xla.schedule import Cut, Operands, batch_of, depthwise, sizes
from dcn_jax.sampling import Border, Positions, Rows, locate, sum_rows


class Regular(NamedTuple):
    """Where taps read before their offsets: two tables, made once and indexed in each step."""

    first: jax.Array  # (blocks * size, n): the first tap of each position
    reach: jax.Array  # (K, n): how far each tap lies from the first


def product(spec: Spec, cut: Cut, regular: Regular, block: jax.Array, tap: jax.Array, part: Operands) -> jax.Array:
    """What a tap adds to a block: `(B * size, F)`; by offset groups, `(B * size, OG, F / OG)`, where channels are apart."""
    points, scale = points_of(spec, cut, regular, block, tap, part)
    border = Border(spec.window.spatial, spec.window.padding_mode)
    samples = read_images(part.rows, part.summed, locate(points, scale, border))
    return multiply(spec, samples.reshape(math.prod(samples.shape[:2]), *samples.shape[2:]), part.matrices)


def points_of(spec: Spec, cut: Cut, table: Regular, block, tap, part: Operands) -> tuple[Positions, jax.Array | None]:
    """Where a tap reads for the positions of a block, `(*B, size, OG, n)`, and its modulations `(*B, size, OG)`."""
    batch_axes, size = len(batch_of(part)), sizes(spec, cut, part).block

    def by_group(array):  # (*B, size, OG, …), of which one OG is not there
        return array.reshape(*array.shape[: batch_axes + 1], spec.offset_groups, array.shape[-1])

    regular = lax.expand_dims(_regular(table, block, tap, size), range(batch_axes))
    scale = None if part.modulation is None else by_group(part.modulation)[..., 0]
    return Positions(regular, by_group(part.offset)), scale


def take(spec: Spec, cut: Cut, block: jax.Array, tap: jax.Array, wholes: Operands) -> Operands:
    """What a step reads: offsets and modulations `(*B, size, OG, …)` of a block, of a tap or all, and the matrices of these."""
    matrices = wholes.matrices
    if cut.step != "deep":
        matrices = lax.dynamic_index_in_dim(matrices, tap, keepdims=False, allow_negative_indices=False)

    def slice(array):
        start, shape = place(spec, cut, block, tap, wholes, array)
        return lax.dynamic_slice(array, start, shape, allow_negative_indices=False)

    offset = slice(wholes.offset)
    return wholes._replace(
        matrices=matrices.astype(spec.accumulate),  # in which their gradient is summed over the steps
        offset=offset.astype(wide(offset.dtype, jnp.finfo(spec.accumulate).dtype)),
        modulation=None if wholes.modulation is None else slice(wholes.modulation),
    )


def place(
    spec: Spec, cut: Cut, block, tap, wholes: Operands, array: jax.Array
) -> tuple[list[jax.Array], tuple[Size, ...]]:
    """Where in offsets or modulations `(*B, blocks * size, OG, K * …)` a step's part begins, and its shape."""
    batch_axes, size = len(batch_of(wholes)), sizes(spec, cut, wholes).block
    batch, several = array.shape[:batch_axes], array.shape[batch_axes + 1 : -1]
    width, zero = array.shape[-1] // (1 if cut.step == "deep" else spec.window.taps), jnp.zeros_like(tap)
    start = [*[zero] * batch_axes, block * int32(size), *[zero] * len(several), tap * width]
    return start, (*batch, size, *several, width)


def _regular(table: Regular, block, tap, size: Size) -> jax.Array:
    """Where a tap reads for the positions of a block, before its offset: `(size, 1, n)`, in int32."""
    reach = lax.dynamic_index_in_dim(table.reach, tap, allow_negative_indices=False)  # (1, n)
    return (take_block(table.first, block, size) + reach)[:, None]


def take_block(first: jax.Array, block: jax.Array, size: Size) -> jax.Array:
    """The positions of a block: `(blocks * size, n)` -> `(size, n)`."""
    start = [block * int32(size), jnp.zeros_like(block)]
    return lax.dynamic_slice(first, start, (size, first.shape[-1]), allow_negative_indices=False)


def regular(spec: Spec, cut: Cut, operands: Operands) -> Regular:
    """The regular positions of all blocks, in int32."""
    window, (_, size, positions, _) = spec.window, sizes(spec, cut, operands)
    first = pad(regular_positions(window).reshape(positions, window.rank), 0, cut.blocks * size)
    return Regular(first, regular_taps(window))


def pad(array: jax.Array, axis: int, length: Size) -> jax.Array:
    """`array` with zeros appended along an axis, which is then `length` long."""
    if array.shape[axis] == length:
        return array
    return jnp.pad(array, [(0, length - n if a == axis else 0) for a, n in enumerate(array.shape)])


def read_images(rows: jax.Array, summed: jax.Array | None, at: Rows) -> jax.Array:
    """The samples of maps `(*B, R, Cg)` at rows `(*B, …)`, some of whose batch axes are to be repeated: `(B, …, Cg)`."""
    rows, summed, at = one_batch_axis(rows, summed, at)
    return jax.vmap(lambda rows, summed, at: sum_rows(rows, at, None, summed))(rows, summed, at)


def one_batch_axis(rows: jax.Array, summed: jax.Array | None, at: Any) -> tuple[jax.Array, jax.Array | None, Any]:
    """Maps and rows with their batch axes as one, and what is shared repeated."""
    batch = rows.shape[:-2]

    def one_axis(array, wanted):
        return jnp.broadcast_to(array, wanted).reshape(math.prod(batch), *wanted[len(batch) :])

    at = jax.tree.map(lambda array: one_axis(array, (*batch, *array.shape[len(batch) :])), at)
    return one_axis(rows, rows.shape), None if summed is None else one_axis(summed, summed.shape), at


def multiply(spec: Spec, samples: jax.Array, matrix: jax.Array) -> jax.Array:
    """`(N, OG, Cg)` times one tap's matrices `(C / groups, F)`, feature group by feature group: `(N, F)`.

    Where each channel is convolved apart: `(N, OG, F / OG)`.
    """
    einsum: Any = partial(jnp.einsum, precision=spec.precision, preferred_element_type=spec.accumulate)
    samples, matrix = samples.astype(spec.dtype), matrix.astype(spec.dtype)
    (n, offset_groups, width), (channels, features), groups = samples.shape, matrix.shape, spec.feature_groups
    if depthwise(spec, width):
        matrix = matrix.reshape(offset_groups, width, features // groups)
        return einsum("noc,ocf->nocf", samples, matrix).reshape(n, offset_groups, features // offset_groups)
    # A flat matrix product: a batched one would make the gradient of the kernel contract two axes at once.
    samples = samples.reshape(n, offset_groups * width)
    if groups == 1:
        return einsum("nc,cf->nf", samples, matrix)
    samples = samples.reshape(n, groups, channels)
    matrix = matrix.reshape(channels, groups, features // groups)
    return einsum("ngc,cgf->ngf", samples, matrix).reshape(n, features)
