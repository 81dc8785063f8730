"""What every algorithm needs: its operands, blocks of output positions, and where the taps of a block read.

The letters of the shapes: B images, P output positions, K taps, OG offset groups of Cg channels, F features, n spatial
axes. `*B` is one batch axis, or several where offset or mask are shared along some of them.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dcn_jax._core.dtypes import wide
from dcn_jax.geometry import Size, int32, regular_positions, regular_taps
from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.sampling import Border, Positions, Rows, sum_rows


class Operands(NamedTuple):
    """The arrays that the sum over taps is made of."""

    rows: Any  # (*B, R, Cg): the map, flattened to rows of one pixel and one offset group
    matrices: Any  # (K, C / feature groups, F)
    offset: Any  # (*B, P, OG, K, n)
    modulation: Any  # (*B, P, OG, K), or None


class Divided(NamedTuple):
    """The operands as a loop over blocks reads them; `take` makes of them what one step reads."""

    rows: Any  # (*B, R, Cg)
    matrices: Any  # (K, C / feature groups, F), in the dtype that products are summed in
    offset: Any  # (*B, number * size, [OG,] K * n)
    modulation: Any  # (*B, number * size, [OG,] K), or None
    # A copy of narrow rows in the dtype that products are summed in, or None where `rows` are as wide. The gradient flows to
    # the copy and not to `rows`, so that it is summed in that dtype.
    wide_rows: Any


class Regular(NamedTuple):
    """Where taps read before their offsets: two tables, made once before the loop, which each step indexes."""

    first: jax.Array  # `first_taps`
    reach: jax.Array  # (K, n): how far each tap lies from the first


class Blocks(NamedTuple):
    """The output positions, divided into blocks of one size. The last blocks are filled up with positions that read nothing."""

    number: int
    size: Size  # positions in a block
    # Whether bfloat16 arrays are widened block by block. Otherwise XLA's CPU backend widens them once before the loop, and all
    # of each array is in memory in float32.
    widen_by_block: bool = False

    def divide(self, spec: Spec, operands: Operands) -> Divided:
        """Offsets and modulations in whole blocks; matrices, and narrow rows, in the dtype that their gradient is summed in."""
        rows, wide_rows = operands.rows, None
        # A real map stays real beside a complex kernel.
        summed = spec.accumulate if jnp.iscomplexobj(rows) else jnp.finfo(spec.accumulate).dtype
        if rows.dtype != summed:
            rows, wide_rows = lax.stop_gradient(rows), rows.astype(summed)
        batch_axes, length = operands.rows.ndim - 2, self.number * self.size

        def in_blocks(array, value=0.0):  # (*B, P, OG, K, …) -> (*B, number * size, [OG,] K * …)
            *front, groups = array.shape[: batch_axes + 2]
            several = (groups,) if groups > 1 else ()  # XLA's CPU backend would copy the array for an axis of 1
            array = array.reshape(*front, *several, math.prod(array.shape[batch_axes + 2 :]))
            return fill_up(array, batch_axes, length, value)

        modulation = None if operands.modulation is None else in_blocks(operands.modulation)
        # A point at infinity reads nothing. With offsets of 0 a pixel would be read that may be NaN, and 0 · NaN would be added
        # to the gradient of the kernel.
        offset = in_blocks(operands.offset, jnp.inf)
        return Divided(rows, operands.matrices.astype(spec.accumulate), offset, modulation, wide_rows)

    def take(self, spec: Spec, block: jax.Array, tap: jax.Array | None, divided: Divided) -> Divided:
        """What one step reads of the divided operands: a block, and of its taps one, or all where `tap` is None."""
        hold = partial(self._hold, block)

        def take_part(array):
            start, shape = self._place(spec, block, tap, divided, array)
            return lax.dynamic_slice(hold(array), start, shape, allow_negative_indices=False)

        matrices, offset = divided.matrices, take_part(divided.offset)
        if tap is not None:
            matrices = lax.dynamic_index_in_dim(hold(matrices), tap, keepdims=False, allow_negative_indices=False)
        return divided._replace(
            rows=hold(divided.rows),
            matrices=matrices.astype(spec.accumulate),
            offset=offset.astype(wide(offset.dtype, jnp.finfo(spec.accumulate).dtype)),
            modulation=None if divided.modulation is None else take_part(divided.modulation),
        )

    def add_part(
        self, spec: Spec, block: jax.Array, tap: jax.Array | None, divided: Divided, name: str, total, part
    ) -> jax.Array:
        """`total` with a step's gradient of one operand put where `take` took it from: the transpose of `take`."""
        match name:
            case "offset" | "modulation":  # each element is read in one step only, so it is written and not added
                start, shape = self._place(spec, block, tap, divided, total)
                return lax.dynamic_update_slice(total, part.astype(total.dtype).reshape(shape), start)
            case "matrices" if tap is not None:
                none = jnp.zeros_like(
                    total
                )  # XLA sums `total` over devices after the loop only if it is added to as a whole
                return total + lax.dynamic_update_index_in_dim(none, part, tap, 0, allow_negative_indices=False)
        return total + part

    def first_taps(self, spec: Spec) -> jax.Array:
        """Where the first tap reads for each position of all blocks, before its offset: `(number * size, n)`, in int32."""
        window = spec.window
        first = regular_positions(window).reshape(math.prod(window.out_spatial), window.rank)
        return fill_up(first, 0, self.number * self.size)

    def take_positions(self, first: jax.Array, block: jax.Array) -> jax.Array:
        """The part of `first_taps` that belongs to a block: `(size, n)`."""
        start = [block * int32(self.size), jnp.zeros_like(block)]
        return lax.dynamic_slice(first, start, (self.size, first.shape[-1]), allow_negative_indices=False)

    def regular_table(self, spec: Spec) -> Regular:
        """The tables for steps of one tap."""
        return Regular(self.first_taps(spec), regular_taps(spec.window))

    def tap_points(
        self, spec: Spec, regular: Regular, block: jax.Array, tap: jax.Array, part: Divided
    ) -> tuple[Positions, jax.Array | None]:
        """Where one tap reads for the positions of a block, `(*B, size, OG, n)`, and its modulations, `(*B, size, OG)`."""
        batch_axes = part.rows.ndim - 2

        def by_group(array):  # (*B, size, [OG,] …) -> (*B, size, OG, …)
            return array.reshape(*array.shape[: batch_axes + 1], spec.offset_groups, array.shape[-1])

        reach = lax.dynamic_index_in_dim(regular.reach, tap, allow_negative_indices=False)  # (1, n)
        whole = (self.take_positions(regular.first, block) + reach)[:, None]  # (size, 1, n)
        scale = None if part.modulation is None else by_group(part.modulation)[..., 0]
        return Positions(lax.expand_dims(whole, range(batch_axes)), by_group(part.offset)), scale

    def block_and_tap(self, spec: Spec, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The block and the tap of a step of one tap: all taps of a block, then the next block."""
        # Counted, not scanned over: a TPU would slice arrays of blocks and taps in a kernel of their own.
        taps = jnp.int32(spec.window.taps)
        return lax.div(step, taps), lax.rem(step, taps)

    def join(self, spec: Spec, y: jax.Array) -> jax.Array:
        """The result of all blocks, `(number, B, size, F)`, without what the last block was filled up with: `(B, P, F)`."""
        y = jnp.moveaxis(y, 0, 1).reshape(y.shape[1], self.number * self.size, y.shape[-1])
        return y[:, : math.prod(spec.window.out_spatial)].astype(spec.out_dtype)

    def divide_cotangent(self, y_bar: jax.Array) -> jax.Array:
        """The result's cotangent, block by block: `(B, P, F)` -> `(number, B * size, F)`."""
        images, _, features = y_bar.shape
        y_bar = fill_up(y_bar, 1, self.number * self.size).reshape(images, self.number, self.size, features)
        return jnp.moveaxis(y_bar, 1, 0).reshape(self.number, images * self.size, features)

    def take_cotangent(self, spec: Spec, block: jax.Array, y_bar: jax.Array) -> jax.Array:
        """The cotangent of one block, `(B * size, F)`, in the dtype that products are summed in."""
        bar = self._hold(block, y_bar)
        bar = lax.dynamic_index_in_dim(bar, block, keepdims=False, allow_negative_indices=False)
        return bar.astype(spec.accumulate)

    def hide_filler(self, spec: Spec, block: jax.Array, samples: jax.Array) -> jax.Array:
        """Samples `(B, size, …)`, or their gradient, with zeros at positions that only fill up a block.

        Elsewhere than at borders that are all clamped their infinite offsets see to that.
        """
        positions = math.prod(spec.window.out_spatial)
        if positions == self.number * self.size or set(spec.window.padding_mode) != {"edge"}:
            return samples
        position = block * int32(self.size) + lax.broadcasted_iota(jnp.int32, samples.shape, 1)
        return jnp.where(position < int32(positions), samples, 0)

    def _place(
        self, spec: Spec, block: jax.Array, tap: jax.Array | None, divided: Divided, array: jax.Array
    ) -> tuple[list[jax.Array], tuple[Size, ...]]:
        """Where in `(*B, number * size, [OG,] K * …)` a step's part begins, and its shape."""
        batch_axes = divided.rows.ndim - 2
        batch, several = array.shape[:batch_axes], array.shape[batch_axes + 1 : -1]
        width = array.shape[-1] // (1 if tap is None else spec.window.taps)
        tap = jnp.zeros_like(block) if tap is None else tap
        zero = jnp.zeros_like(tap)
        start = [*[zero] * batch_axes, block * int32(self.size), *[zero] * len(several), tap * width]
        return start, (*batch, self.size, *several, width)

    def _hold(self, block: jax.Array, array: jax.Array) -> jax.Array:
        """`array` behind a barrier with the block's number: so it differs by block, and XLA cannot widen it before the loop."""
        if not self.widen_by_block or jnp.finfo(array.dtype).bits >= 32:
            return array
        return lax.optimization_barrier((array, block))[0]


def border_of(spec: Spec) -> Border:
    """The map's size, and what lies beyond its border."""
    return Border(spec.window.spatial, spec.window.padding_mode)


def is_depthwise(spec: Spec, channels: int) -> bool:
    """Whether each channel is convolved alone; `channels` are those of one offset group, Cg."""
    return spec.feature_groups == spec.offset_groups * channels


def fill_up(array: jax.Array, axis: int, length: Size, value: float = 0.0) -> jax.Array:
    """`array` with `value` appended along an axis, which is then `length` long."""
    if array.shape[axis] == length:
        return array
    widths = [(0, length - n if a == axis else 0) for a, n in enumerate(array.shape)]
    return jnp.pad(array, widths, constant_values=np.asarray(value, array.dtype))


def differentiated(divided: Divided, active: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the divided operands that gradients flow to, where the operands named in `active` want gradients."""
    return tuple("wide_rows" if name == "rows" and divided.wide_rows is not None else name for name in active)


def one_batch_axis(rows: jax.Array, wide_rows: jax.Array | None, at: Any) -> tuple[jax.Array, jax.Array | None, Any]:
    """Maps `(*B, R, Cg)`, and a tree of arrays `(*B, …)` that read them, with one batch axis; shared arrays are repeated."""
    batch = rows.shape[:-2]

    def one_axis(array):
        rest = array.shape[len(batch) :]
        return jnp.broadcast_to(array, (*batch, *rest)).reshape(math.prod(batch), *rest)

    return jax.tree.map(one_axis, (rows, wide_rows, at))


def read_images(rows: jax.Array, wide_rows: jax.Array | None, at: Rows) -> jax.Array:
    """The samples of maps `(*B, R, Cg)` at rows `(*B, …)`: `(B, …, Cg)`."""
    rows, wide_rows, at = one_batch_axis(rows, wide_rows, at)
    return jax.vmap(lambda rows, wide_rows, at: sum_rows(rows, at, wide_rows))(rows, wide_rows, at)
