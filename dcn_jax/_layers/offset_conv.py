"""What both layers share: their options, what their branch sees, and what they make of what it emits.

The branch is the convolution that emits offsets and modulation. A layer calls, in this order, `check_input`,
`check_call`, `view` (what the branch sees), its branch, and `split`.
"""

import functools
import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax._core import checks, dtypes
from dcn_jax.geometry import Padding, Size, Window, canonical_padding, canonical_padding_mode, int32, resolve_window
from dcn_jax.sampling import INTO_MAP

Bound = float | Sequence[float | None] | None


# ---- options


def window_of(kernel_size: int | Sequence[int]) -> tuple[int, ...]:
    """The window of a layer; an int is a one-dimensional window, as in Flax's Conv."""
    rank = len(kernel_size) if isinstance(kernel_size, Sequence) else 1
    if rank not in (1, 2, 3):
        raise ValueError(f"kernel_size={kernel_size!r} has {rank} entries; wanted 1, 2 or 3, one per spatial axis")
    return checks.per_axis("kernel_size", kernel_size, rank, minimum=1)


def check_options(
    channels: int,
    rank: int,
    *,
    offset_groups: int,
    modulated: bool,
    mask_scale: float,
    max_offset: Bound,
    offset_branch: bool,
) -> None:
    """Raise where an option that only the layer has makes no sense."""
    checks.count("offset_groups", offset_groups)
    if channels % offset_groups:
        raise ValueError(f"offset_groups={offset_groups} must divide the {channels} channels of the input")
    for name, value in (("modulated", modulated), ("offset_branch", offset_branch)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; wanted True or False")
    if not _is_number(mask_scale) or not 0 < mask_scale < math.inf:
        wanted = "the modulation's upper bound: 1.0, or 2.0 to start as a plain convolution"
        if not _is_number(mask_scale):
            raise TypeError(f"mask_scale={mask_scale!r} is a {type(mask_scale).__name__}; wanted {wanted}")
        raise ValueError(f"mask_scale={mask_scale!r} must be positive and finite: {wanted}")
    bounds_of(max_offset, rank)


def check_maker(offset_conv_cls: Any, module: type, call: str, *, offset_branch: bool) -> None:
    """Raise where `offset_conv_cls` cannot make a branch; `call` is how it is called, `module` what it must not be."""
    if offset_conv_cls is None:
        return
    if not callable(offset_conv_cls) or isinstance(offset_conv_cls, module):
        raise TypeError(
            f"offset_conv_cls is a {type(offset_conv_cls).__name__}; wanted what makes the branch, called as {call}: a "
            "module's class, or functools.partial of it"
        )
    if not offset_branch:
        raise ValueError("offset_conv_cls makes a branch, and offset_branch=False wants none; leave one of them out")


def bounds_of(max_offset: Bound, rank: int) -> tuple[float | None, ...]:
    """Check `max_offset` and write it as one bound per spatial axis, None where there is none."""
    wanted = f"a number of pixels, None for no bound, or one of these for each of the {rank} spatial axes"
    one = max_offset is None or _is_number(max_offset)
    bounds: Any = (max_offset,) * rank if one else max_offset
    if not isinstance(bounds, Sequence) or not all(bound is None or _is_number(bound) for bound in bounds):
        raise TypeError(f"max_offset={max_offset!r} is a {type(max_offset).__name__}; wanted {wanted}")
    if len(bounds) != rank:
        raise ValueError(f"max_offset={max_offset!r} has {len(bounds)} entries; wanted {wanted}")
    if not all(bound is None or 0 <= bound < math.inf for bound in bounds):
        raise ValueError(f"max_offset={max_offset!r} must be finite and not negative: {wanted} (0: no offset at all)")
    return tuple(None if bound is None else float(bound) for bound in bounds)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def features(window: tuple[int, ...], offset_groups: int, modulated: bool) -> int:
    """How many channels the branch emits: OG·K·n offsets and, if modulated, OG·K logits."""
    return offset_groups * math.prod(window) * (len(window) + modulated)


# ---- the call


def check_input(
    inputs: jax.Array,
    window: tuple[int, ...],
    channels: int | None = None,
    *,
    strides: int | Sequence[int] | None,
    padding: Padding,
    kernel_dilation: int | Sequence[int] | None,
    padding_mode: str | Sequence[str],
) -> Window:
    """The window over `inputs`, once they are known to be `(*batch, *spatial, channels)`, of any channels if None."""
    if not hasattr(inputs, "shape"):
        raise TypeError(f"inputs is a {type(inputs).__name__}; wanted an array (wrap it in jnp.asarray)")
    rank = len(window)
    if len(inputs.shape) < rank + 1 or channels not in (None, inputs.shape[-1]):
        raise ValueError(
            f"inputs has shape {inputs.shape}; wanted (*batch, *spatial, {channels or 'C'}) with {rank} spatial axes, as "
            f"kernel_size={window} has"
        )
    # Here and not only in the op, before the branch fails on it with an error of its own.
    return resolve_window(
        window,
        spatial=inputs.shape[-rank - 1 : -1],
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        padding_mode=padding_mode,
    )


def check_call(offset: Any, mask: Any, offset_inputs: Any, base_offset: Any, *, offset_branch: bool) -> None:
    """Raise where the arguments beside `inputs` do not go together."""
    if offset is None:
        if mask is not None:
            raise ValueError("mask was given without offset; wanted both, or neither and the branch emits them")
        if not offset_branch:
            raise ValueError("offset is None, and offset_branch=False leaves no branch to emit it; give offset")
        return
    for name, value in (("offset_inputs", offset_inputs), ("base_offset", base_offset)):
        if value is not None:
            raise ValueError(
                f"{name} was given beside offset, which is used as it is; wanted one of the two: leave offset out for the "
                f"branch to emit it, or leave {name} out"
            )
    checks.array("offset", offset, jnp.floating)
    if mask is not None:
        checks.array("mask", mask, jnp.floating)


def view(
    inputs: jax.Array, offset_inputs: jax.Array | None, window: Window, *, channels: int | None = None, own: bool
) -> jax.Array:
    """What the branch sees: `offset_inputs`, or `inputs`; continued beyond its border where the branch is not the user's `own`.

    `channels` is what the branch was made for, where it was made before.
    """
    seen = inputs if offset_inputs is None else offset_inputs
    if not hasattr(seen, "shape"):
        raise TypeError(f"offset_inputs is a {type(seen).__name__}; wanted an array (wrap it in jnp.asarray)")
    if channels not in (None, seen.shape[-1]):
        name = "inputs" if offset_inputs is None else "offset_inputs"
        raise ValueError(
            f"{name} has shape {seen.shape}; the branch was made for offset_in_features={channels}: give offset_inputs of "
            f"{channels} channels, or make the layer with another offset_in_features"
        )
    if own:
        return seen
    _check_axes("offset_inputs", seen.shape, inputs.shape, window.spatial, "the pixels of inputs")
    return _extend(seen, window)


def conv_padding(padding: Padding, padding_mode: str | Sequence[str], rank: int) -> Any:
    """The padding of the default branch: the layer's, or "VALID" where `view` continues the map."""
    named = canonical_padding(padding, rank)
    return named if set(canonical_padding_mode(padding_mode, rank, named)) == {"zeros"} else "VALID"


def _extend(x: jax.Array, window: Window) -> jax.Array:
    """The map `(*batch, *spatial, C)`, continued as `padding_mode` says as far as the regular taps reach."""
    if set(window.padding_mode) == {"zeros"}:
        return x  # the convolution's own padding does that, without a copy
    # Not by jnp.pad, which takes no negative pads (they crop), and no symbolic sizes in the modes that repeat the map.
    for axis, (size, (low, high), mode) in enumerate(
        zip(window.spatial, window.pads, window.padding_mode, strict=True)
    ):
        index = jnp.arange(low + size + high, dtype=jnp.int32) - int32(low)
        x = _read_along(x, x.ndim - 1 - window.rank + axis, index, size, mode)
    return x


def _read_along(x: jax.Array, axis: int, index: jax.Array, size: Size, mode: str) -> jax.Array:
    """The pixels at an index along an axis of the map as it is continued."""
    if mode == "zeros":
        outside = (index < 0) | (index >= int32(size))
        return jnp.take(x, jnp.where(outside, int32(size), index), axis=axis, mode="fill", fill_value=0)
    return jnp.take(x, INTO_MAP[mode](index, int32(size)), axis=axis, mode="clip")


def _check_axes(name: str, shape: Any, inputs: Any, positions: Any, meaning: str, last: Any = None) -> None:
    """Raise where `shape` is not (batch axes that broadcast to those of inputs, *positions, one of `last`)."""
    rank = len(positions)
    batch, given = inputs[: -rank - 1], shape[: max(0, len(shape) - rank - 1)]
    fits = len(given) <= len(batch) and all(
        n in (1, wanted) for n, wanted in zip(given, batch[len(batch) - len(given) :], strict=True)
    )
    if not fits or shape[-rank - 1 : -1] != positions or not (last is None or shape[-1] in last):
        channels = "channels" if last is None else " or ".join(dict.fromkeys(map(str, last)))
        raise ValueError(
            f"{name} has shape {shape}; wanted (*batch, {', '.join(map(str, positions))}, {channels}): batch axes that "
            f"broadcast to those of inputs, {batch}, then {meaning}, then channels"
        )


# ---- the branch


def wide_conv(x: jax.Array, kernel: jax.Array, *geometry: Any, **options: Any) -> jax.Array:
    """`lax.conv_general_dilated` whose result is float32 or wider: the products of halves stay as they are summed.

    Its derivative is that of the convolution within the dtype of its operands, so that no product of
    the backward pass is wider, and dearer, either.
    """
    conv = functools.partial(_conv, geometry, options)
    return conv(x, kernel) if dtypes.wide(x.dtype) == x.dtype else _accumulated(conv, x, kernel)


def _conv(geometry, options, x, kernel, dtype=None):
    return lax.conv_general_dilated(x, kernel, *geometry, **options, preferred_element_type=dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _accumulated(conv, x, kernel):
    return conv(x, kernel, dtypes.wide(x.dtype))


def _accumulated_jvp(conv, primals, tangents):
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    y = _accumulated(conv, x, kernel)
    parts = [] if isinstance(x_dot, SymbolicZero) else [conv(x_dot, kernel)]
    parts += [] if isinstance(kernel_dot, SymbolicZero) else [conv(x, kernel_dot)]
    return y, functools.reduce(operator.add, parts).astype(y.dtype)


_accumulated.defjvp(_accumulated_jvp, symbolic_zeros=True)


def wide_bias(bias: jax.Array, kernel: jax.Array) -> jax.Array:
    """The bias in the dtype of `wide_conv`'s result, to which it is added."""
    return bias.astype(dtypes.wide(kernel.dtype))


def split(
    z: jax.Array,
    inputs: jax.Array,
    window: Window,
    *,
    offset_groups: int,
    modulated: bool,
    mask_scale: float,
    max_offset: Bound,
    base_offset: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Offset `(…, OG * K * n)` and mask `(…, OG * K)` from the branch's output z.

    offset = max_offset · tanh(z / max_offset), or z itself, + base_offset;  mask = mask_scale · sigmoid(logits), or None
    """
    emitted = features(window.size, offset_groups, modulated)
    offsets = offset_groups * window.taps * window.rank
    meaning = f"the output positions, with {offsets} offsets and {emitted - offsets} logits each"
    _check_axes("the output of the branch, offset_conv,", z.shape, inputs.shape, window.out_spatial, meaning, [emitted])
    z = z.astype(dtypes.wide(z.dtype))
    offset = _bound(z[..., :offsets], bounds_of(max_offset, window.rank))
    if base_offset is not None:
        offset = _add_base(offset, base_offset, inputs, window)
    return offset, float(mask_scale) * jax.nn.sigmoid(z[..., offsets:]) if modulated else None


def bound_for(implementation: str | None, max_offset: Bound, rank: int, *, bounded: bool) -> float | None:
    """The op's `max_offset` for offsets that are `bounded` by the layer's, where the op cannot do without: else it would clip."""
    bounds = bounds_of(max_offset, rank)
    if implementation != "pallas_tpu" or not bounded or None in bounds:
        return None
    return max(bound for bound in bounds if bound is not None)


def _bound(z: jax.Array, bounds: tuple[float | None, ...]) -> jax.Array:
    """max_offset · tanh(z / max_offset), axis by axis: `(…, OG * K * n)`."""
    if len(set(bounds)) == 1:
        return _bound_axis(z, bounds[0])
    axes = [_bound_axis(z[..., axis :: len(bounds)], bound) for axis, bound in enumerate(bounds)]
    return jnp.stack(axes, axis=-1).reshape(z.shape)


def _bound_axis(z: jax.Array, bound: float | None) -> jax.Array:
    if bound is None:
        return z
    return bound * jnp.tanh(z / bound) if bound else jnp.zeros_like(z)  # a Python float leaves the dtype alone


def _add_base(offset: jax.Array, base: jax.Array, inputs: jax.Array, window: Window) -> jax.Array:
    """`offset` `(…, OG * K * n)` + `base`, as many channels or n: one displacement for all taps."""
    base = checks.array("base_offset", base, jnp.floating)
    channels = [window.rank, offset.shape[-1]]
    meaning = "the output positions"
    _check_axes("base_offset", base.shape, inputs.shape, window.out_spatial, meaning, channels)
    if base.shape[-1] != offset.shape[-1]:
        base = jnp.tile(base, offset.shape[-1] // window.rank)  # ordered [offset group, tap, axis], axis last
    axes, dtype = max(offset.ndim, base.ndim), dtypes.wide(offset.dtype, base.dtype)
    offset, base = (lax.expand_dims(a, range(axes - a.ndim)).astype(dtype) for a in (offset, base))
    return offset + base
