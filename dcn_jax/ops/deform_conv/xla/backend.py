"""The op in `jax.numpy`: a block of positions and a tap after another, so that little is in memory at once.

`run` brings the arrays to one batch axis B and one axis of positions P; `_sum_taps` is the sum over
the taps, cut into steps for each platform (`xla_cut`); `_sum_steps` is the loop over the steps, and
`_pull_steps` its transpose. What a step does is in `xla_tap`; on a CPU in `xla_deep`, on a TPU in `xla_pairs`.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core.mesh import on_any_mesh
from dcn_jax.geometry import Size
from dcn_jax.ops.deform_conv.call import Arrays, Spec, add_bias
from dcn_jax.ops.deform_conv.xla import all_taps, one_tap, pixel_pairs
from dcn_jax.ops.deform_conv.xla.one_tap import Regular
from dcn_jax.ops.deform_conv.xla.schedule import Cut, Operands, cuts_by_platform, depthwise, sizes
from dcn_jax.sampling import Border


def refusal(spec: Spec, arrays: Arrays) -> str | None:
    """Why this backend cannot take a call: it takes every one."""
    del spec, arrays
    return None


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """`deform_conv` of a checked call."""
    rank = spec.window.rank
    return on_any_mesh(
        functools.partial(convolve, spec),
        arrays,
        batched=(arrays.x, arrays.offset),
        batch=arrays.x.ndim - rank - 1,
        whole=rank + 1,
    )


def convolve(spec: Spec, x, kernel, offset, mask, bias) -> jax.Array:
    """Bring the arrays to one axis of positions, sum over the taps, and bring the result back.

    On a mesh whose axes are in the types, `run` is to be called.
    """
    window, groups = spec.window, spec.offset_groups
    batch, channels = x.shape[: -window.rank - 1], x.shape[-1]
    per_tap = math.prod(window.out_spatial), groups, window.taps
    repeated = any(array is not None and array.shape[: len(batch)] != batch for array in (offset, mask))

    def flatten(array, *shape):
        """Batch axes as one; where offset or mask is to be repeated along some, as they are."""
        axes = array.shape[: len(batch)]
        return array.reshape(*(axes if repeated else (math.prod(axes),)), *shape)

    rows, summed = flatten(x, math.prod(window.spatial) * groups, channels // groups), None
    if rows.dtype != spec.accumulate:
        # What is read stays narrow. The gradient is that of a wider copy, which only the derivative sees, and so is summed
        # in the accumulator's dtype.
        rows, summed = lax.stop_gradient(rows), rows.astype(spec.accumulate)
    operands = Operands(
        rows,
        kernel.reshape(window.taps, *kernel.shape[-2:]),
        flatten(offset, *per_tap, window.rank),
        None if mask is None else flatten(mask, *per_tap),
        summed,
    )
    # Where no bias is added it is rounded there, and its cotangent is not made wide before it is cut.
    y = _sum_taps(spec if bias is None else spec._replace(out_dtype=spec.accumulate), operands)
    return add_bias(y.reshape(*batch, *window.out_spatial, kernel.shape[-1]), bias).astype(spec.out_dtype)


# The batch is kept apart from the positions: folded into them it would hide from the partitioner, and a call on a
# batch-sharded x would gather all of x on every device.
@functools.partial(jax.jit, static_argnums=0)  # a call outside of jit compiles once, not each time
def _sum_taps(spec: Spec, operands: Operands) -> jax.Array:
    """Σ over taps: `(B, P, F)`, cut into steps as suits the platform that it is compiled for, and its derivative in others."""
    from dcn_jax._core.platform_op import Computation, by_platform  # here, for `jax.extend` brings Pallas along

    # A flat list of arrays, and which they are.
    given = {name: array for name, array in operands._asdict().items() if array is not None}
    names, absent = list(given), dict.fromkeys(operands._fields)

    def named(*arrays):
        return Operands(**absent | dict(zip(names, arrays, strict=True)))

    def result_type(*arrays):
        operands = named(*arrays)
        images, _, positions, features = sizes(spec, Cut("tap", 1), operands)
        # One position's product, for what JAX has to say of its precision.
        sample = jnp.zeros_like(operands.rows, shape=(1, spec.offset_groups, operands.rows.shape[-1]))
        one_tap.multiply(spec, sample, operands.matrices[0])
        return _zeros(spec, (images, positions, features), operands).astype(spec.out_dtype)

    def gradients(cut, active, y_bar, *arrays):
        found = _pull_steps(spec, cut, tuple(names[i] for i in active), y_bar, named(*arrays))
        return [getattr(found, names[i]) for i in active]

    return by_platform(
        Computation(
            lambda cut, *arrays: _sum_steps(spec, cut, named(*arrays)),
            gradients,
            result_type,
            tuple(cuts_by_platform(spec, operands, derivative=derivative) for derivative in (False, True)),
        ),
        *given.values(),
    )


def _sum_steps(spec: Spec, cut: Cut, operands: Operands) -> jax.Array:
    """The sum, one step after another: of the samples, no more than a step's are ever kept."""
    images, size, positions, features = sizes(spec, cut, operands)
    wholes, regular = _whole_blocks(spec, cut, operands), one_tap.regular(spec, cut, operands)
    groups = spec.feature_groups

    @functools.partial(jax.checkpoint, prevent_cse=False)  # where it is differentiated, too, no samples are kept
    def product(step):
        return _product(spec, cut, regular, step, _part(spec, cut, step, wholes))

    match cut.step:
        case "deep":
            _, y = lax.scan(lambda i, _: (i + 1, product(_step(spec, cut, i))), jnp.int32(0), length=_count(spec, cut))
            y = y.reshape(cut.blocks, groups, images, size, features // groups).transpose(2, 0, 3, 1, 4)
        case "pairs":
            y = jnp.moveaxis(_sum_by_block(spec, cut, product, operands), 0, 1)
        case _:
            y = jnp.moveaxis(_sum_in_place(spec, cut, product, operands), 0, 1)
    return y.reshape(images, cut.blocks * size, features)[:, :positions].astype(spec.out_dtype)


def _sum_by_block(spec: Spec, cut: Cut, product: Callable, operands: Operands) -> jax.Array:
    """Σ of the steps' products, `(blocks, B, size, F)`: the taps in a loop of their own, whose sum a TPU keeps on the chip."""
    images, size, _, features = sizes(spec, cut, operands)

    def sum_block(block, _):
        def add_tap(carry, _):
            tap, total = carry
            return (tap + 1, total + product((block, tap))), None

        zeros = _zeros(spec, _shape(spec, cut, operands), operands)
        (_, total), _ = lax.scan(add_tap, (jnp.int32(0), zeros), length=spec.window.taps)
        return block + 1, total

    _, y = lax.scan(sum_block, jnp.int32(0), length=cut.blocks)
    return y.reshape(cut.blocks, images, size, features)


def _sum_in_place(spec: Spec, cut: Cut, product: Callable, operands: Operands) -> jax.Array:
    """Σ of the steps' products, `(blocks, B, size, F)`, in one loop."""
    images, size, _, features = sizes(spec, cut, operands)

    # One loop, not one within the other, whose arrays are indexed where they lie and not scanned over: so none is moved,
    # and XLA sees that the gradient of the kernel is a sum over the steps, which it takes over devices once, after the loop.
    def add(carry, _):
        i, total = carry
        step = _step(spec, cut, i)
        if cut.blocks == 1:
            return (i + 1, total + product(step)[None]), None
        return (i + 1, total.at[step[0]].add(product(step), mode="promise_in_bounds")), None

    zeros = _zeros(spec, (cut.blocks, *_shape(spec, cut, operands)), operands)
    (_, total), _ = lax.scan(add, (jnp.int32(0), zeros), length=_count(spec, cut))
    return total.reshape(cut.blocks, images, size, features)


def _pull_steps(spec: Spec, cut: Cut, active: tuple[str, ...], y_bar: jax.Array, operands: Operands) -> Operands:
    """The gradients by the operands that are `active`: the transpose of `_sum_steps`, step by step.

    It is what JAX would find, in a third of the time that it takes to trace.
    """
    images, size, _, features = sizes(spec, cut, operands)
    wholes, undo = jax.vjp(functools.partial(_whole_blocks, spec, cut), operands)
    regular = one_tap.regular(spec, cut, operands)
    y_bar = one_tap.pad(y_bar, 1, cut.blocks * size).reshape(images, cut.blocks, size, features)
    y_bar = jnp.moveaxis(y_bar, 1, 0).reshape(cut.blocks, images * size, features)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(carry, _):
        i, sums = carry
        step = _step(spec, cut, i)
        part = _part(spec, cut, step, wholes._replace(matrices=_matrices(spec, cut, operands)))

        bar = _hold(cut, y_bar, step[0])
        bar = lax.dynamic_index_in_dim(bar, step[0], keepdims=False, allow_negative_indices=False)
        bar = bar.astype(spec.accumulate)
        if cut.step == "deep":  # (N, F) -> (G, N, F / G)
            bar = bar.reshape(images * size, spec.feature_groups, features // spec.feature_groups).swapaxes(0, 1)
            bars = all_taps.pull(spec, cut, regular.first, step[0], part, active, bar)
        else:

            def of_active(moving):
                return _product(spec, cut, regular, step, part._replace(**moving))

            _, pull = jax.vjp(of_active, {name: getattr(part, name) for name in active})
            (bars,) = pull(bar.reshape(_shape(spec, cut, operands)))
        sums = {name: _add_part(spec, cut, step, wholes, name, sums[name], bars[name]) for name in active}
        return (i - 1, sums), None

    zeros = jax.tree.map(jnp.zeros_like, wholes)
    zeros_of_active = {name: getattr(zeros, name) for name in active}
    count = _count(spec, cut)
    (_, sums), _ = lax.scan(add, (jnp.int32(count - 1), zeros_of_active), length=count)
    return undo(zeros._replace(**sums))[0]


def _add_part(spec: Spec, cut: Cut, step: tuple[jax.Array, jax.Array], wholes: Operands, name: str, total, part):
    """What a step adds to the gradient of an operand, which has its place: the transpose of `one_tap.take`."""
    match name:
        case "offset" | "modulation":  # each is read in one step
            start, shape = one_tap.place(spec, cut, *step, wholes, total)
            return lax.dynamic_update_slice(total, part.astype(total.dtype).reshape(shape), start)
        case "matrices" if cut.step != "deep":
            none = jnp.zeros_like(total)
            return total + lax.dynamic_update_index_in_dim(none, part, step[1], 0, allow_negative_indices=False)
    return jax.tree.map(operator.add, total, part)


def _part(spec: Spec, cut: Cut, step: tuple[jax.Array, jax.Array], wholes: Operands) -> Operands:
    """What a step reads."""
    rows, matrices, offset, modulation, _ = wholes
    held = wholes._replace(
        rows=_hold(cut, rows, step[0]),
        matrices=matrices if cut.step == "deep" else _hold(cut, matrices, step[0]),
        offset=_hold(cut, offset, step[0]),
        modulation=_hold(cut, modulation, step[0]),
    )
    return one_tap.take(spec, cut, *step, held)


def _hold(cut: Cut, arrays: Any, block: jax.Array) -> Any:
    """`arrays`, of which narrow ones are not to be seen as the same in each step, where the cut says so."""

    def hold(array):
        return lax.optimization_barrier((array, block))[0] if jnp.finfo(array.dtype).bits < 32 else array

    return jax.tree.map(hold, arrays) if cut.held else arrays


def _product(spec: Spec, cut: Cut, regular: Regular, step: tuple[jax.Array, jax.Array], part: Operands) -> jax.Array:
    """What a step adds to its block, of the shape `_shape`."""
    block, tap = step
    match cut.step:
        case "deep":
            return all_taps.product(spec, cut, regular.first, block, part)
        case "pairs":
            return pixel_pairs.product(spec, cut, regular, block, tap, part)
    return one_tap.product(spec, cut, regular, block, tap, part)


def _shape(spec: Spec, cut: Cut, operands: Operands) -> tuple[Size, ...]:
    """The shape of a step's product."""
    images, size, _, features = sizes(spec, cut, operands)
    if cut.step == "deep":
        return spec.feature_groups, images * size, features // spec.feature_groups
    # Where each channel is convolved apart, by offset groups: in a flat sum, a CPU would find the offset group of each
    # channel anew, and take five times as long.
    groups = (spec.offset_groups,) if depthwise(spec, operands.rows.shape[-1]) else ()
    return images * size, *groups, features // math.prod(groups)


def _count(spec: Spec, cut: Cut) -> Size:
    """How many steps there are."""
    return cut.blocks * (1 if cut.step == "deep" else spec.window.taps)


def _step(spec: Spec, cut: Cut, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The block and the tap of a step, blocks outside and taps inside; where a step takes all taps, the first."""
    # Counted, not scanned over as arrays, of which a TPU would slice each in a kernel of its own.
    if cut.step == "deep":
        return i, jnp.zeros_like(i)
    taps = jnp.int32(spec.window.taps)
    return lax.div(i, taps), lax.rem(i, taps)


def _whole_blocks(spec: Spec, cut: Cut, operands: Operands) -> Operands:
    """What steps take their part of: `(*B, P, OG, K, …)` -> `(*B, blocks * size, OG, K * …)`; maps in pairs, if so cut."""
    batch_axes, length = operands.rows.ndim - 2, cut.blocks * sizes(spec, cut, operands).block
    border = Border(spec.window.spatial, spec.window.padding_mode)

    def whole(array):
        *front, groups = array.shape[: batch_axes + 2]  # (*B, P), OG
        several = (groups,) if groups > 1 else ()  # an axis of 1 would make XLA's CPU backend copy the array
        array = array.reshape(*front, *several, math.prod(array.shape[batch_axes + 2 :]))
        return one_tap.pad(array, batch_axes, length)

    def maps(array):
        return pixel_pairs.pair_up(array, border, spec.offset_groups) if cut.step == "pairs" else array

    rows, _, offset, modulation, summed = operands
    return Operands(
        rows=maps(rows),
        matrices=_matrices(spec, cut, operands).astype(spec.accumulate),  # in which their gradient is summed
        offset=whole(offset),
        modulation=None if modulation is None else whole(modulation),
        summed=None if summed is None else maps(summed),
    )


def _matrices(spec: Spec, cut: Cut, operands: Operands) -> jax.Array:
    """The taps' matrices, for maps in pairs if so cut."""
    matrices = operands.matrices
    return pixel_pairs.pair_matrices(matrices, spec.offset_groups) if cut.step == "pairs" else matrices


def _zeros(spec: Spec, shape: tuple[Size, ...], operands: Operands) -> jax.Array:
    """Zeros to sum products in; within shard_map they vary over the devices that any of the operands vary over."""
    zeros = [jnp.zeros_like(array, spec.accumulate, shape) for array in jax.tree.leaves(operands)]
    return functools.reduce(operator.add, zeros)
