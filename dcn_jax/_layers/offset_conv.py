"""What `DeformConv` shares in linen and nnx: options, offset branch, and the order of a call.

The branch is the convolution that emits the offsets and the logits of the mask; each framework
makes its own. A layer calls `check_input`, then `place_points`, which runs the branch, then
`convolve`. `layer` is the layer of either framework; its options have the same names in both.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax._core import checks, dtypes
from dcn_jax._core.mesh import on_any_mesh
from dcn_jax.geometry import Size, Window, canonical_padding, canonical_padding_mode, int32, resolve_window
from dcn_jax.ops.deform_conv import deform_conv
from dcn_jax.sampling import INTO_MAP

Bound = float | Sequence[float | None] | None


# ---- options


def window_size(kernel_size: int | Sequence[int]) -> tuple[int, ...]:
    """`kernel_size` as taps per spatial axis; an int means one axis, as in Flax's Conv."""
    rank = len(kernel_size) if isinstance(kernel_size, Sequence) else 1
    if rank not in (1, 2, 3):
        raise ValueError(f"kernel_size={kernel_size!r} has {rank} entries; wanted 1, 2 or 3, one per spatial axis")
    return checks.per_axis("kernel_size", kernel_size, rank, minimum=1)


def geometry(layer: Any) -> dict[str, Any]:
    """The options that place the window on the map, by the op's names."""
    return {name: getattr(layer, name) for name in ("strides", "padding", "kernel_dilation", "padding_mode")}


def check_options(layer: Any, channels: int, *, module: type, call: str) -> None:
    """Raise if an option of `DeformConv` alone makes no sense, or does not fit the channels.

    `module` is the framework's class of modules; `call` says how `offset_conv_cls` is called.
    """
    checks.count("offset_groups", layer.offset_groups)
    if channels % layer.offset_groups:
        raise ValueError(f"offset_groups={layer.offset_groups} must divide the {channels} channels of the input")
    for name in ("modulated", "offset_branch"):
        if not isinstance(value := getattr(layer, name), bool):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; wanted True or False")
    scale, wanted = layer.mask_scale, "the modulation's upper bound: 1.0, or 2.0 to start as a plain convolution"
    if not _is_number(scale):
        raise TypeError(f"mask_scale={scale!r} is a {type(scale).__name__}; wanted {wanted}")
    if not 0 < scale < math.inf:
        raise ValueError(f"mask_scale={scale!r} must be positive and finite: {wanted}")
    bounds_of(layer.max_offset, len(window_size(layer.kernel_size)))
    maker = layer.offset_conv_cls
    if maker is not None and (not callable(maker) or isinstance(maker, module)):
        raise TypeError(
            f"offset_conv_cls is a {type(maker).__name__}; wanted a function that makes the branch, called as {call}: "
            "a module's class, or functools.partial of it"
        )
    if maker is not None and not layer.offset_branch:
        raise ValueError("offset_conv_cls makes a branch, and offset_branch=False wants none; leave one of them out")


def bounds_of(max_offset: Bound, rank: int) -> tuple[float | None, ...]:
    """`max_offset`, checked, as one bound per spatial axis; None is no bound."""
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


# ---- the default branch


def branch_channels(layer: Any) -> tuple[int, int]:
    """How many channels the branch emits as offsets, OG·K·n, and as logits, OG·K or none."""
    size = window_size(layer.kernel_size)
    taps = layer.offset_groups * math.prod(size)
    return taps * len(size), taps * layer.modulated


def branch_options(layer: Any) -> dict[str, Any]:
    """The options with which Flax's Conv reads the pixels under the main convolution's window."""
    rank = len(window_size(layer.kernel_size))
    padding = canonical_padding(layer.padding, rank)
    if set(canonical_padding_mode(layer.padding_mode, rank, padding)) != {"zeros"}:
        padding = "VALID"  # `_extend` has padded the map already
    kept = ("strides", "kernel_dilation", "dtype", "param_dtype", "precision")
    return {"padding": padding, **{name: getattr(layer, name) for name in kept}}


def wide_conv(x: jax.Array, kernel: jax.Array, *geometry: Any, **options: Any) -> jax.Array:
    """`lax.conv_general_dilated` that returns its sums in float32 or wider, not in half precision.

    Its derivative is that of the convolution in the dtype of the operands. So the backward pass
    multiplies in half precision too, and costs no more than that of a plain convolution.
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
    """The bias in the dtype of the result of `wide_conv`, to which Flax adds it."""
    return bias.astype(dtypes.wide(kernel.dtype))


# ---- the call


class Points(NamedTuple):
    """Where a call reads, and how much each tap counts."""

    offset: jax.Array  # (*batch, *out_spatial, OG * K * n)
    mask: jax.Array | None  # (*batch, *out_spatial, OG * K)
    bound: float | None = None  # passed to the op's TPU kernels, which need one; the layer has applied it


def check_input(layer: Any, inputs: jax.Array, channels: int | None = None) -> Window:
    """The window over `inputs`; raise if they are not `(*batch, *spatial, channels)`."""
    if not hasattr(inputs, "shape"):
        raise TypeError(f"inputs is a {type(inputs).__name__}; wanted an array (wrap it in jnp.asarray)")
    size = window_size(layer.kernel_size)
    rank = len(size)
    if len(inputs.shape) < rank + 1 or channels not in (None, inputs.shape[-1]):
        raise ValueError(
            f"inputs has shape {inputs.shape}; wanted (*batch, *spatial, {channels or 'C'}) with {rank} spatial axes, "
            f"as kernel_size={size} has"
        )
    # The op checks this too, but the branch runs first and would raise a message of Flax's.
    return resolve_window(size, spatial=inputs.shape[-rank - 1 : -1], **geometry(layer))


def place_points(
    layer: Any,
    branch: Callable[[jax.Array], jax.Array],
    window: Window,
    inputs: jax.Array,
    offset: jax.Array | None,
    mask: jax.Array | None,
    offset_inputs: jax.Array | None,
    base_offset: jax.Array | None,
    channels: int | None = None,
) -> Points:
    """The offset and mask that the caller gave, or else those that `branch` emits.

    The branch sees `inputs`, or `offset_inputs` if that is given. It was made for `channels`
    channels; None allows any number.
    """
    _check_arguments(layer, offset, mask, offset_inputs, base_offset)
    if offset is not None:
        return Points(offset, mask)
    seen = _branch_input(layer, window, inputs, offset_inputs, channels)
    offset, mask = _split(layer, window, inputs, branch(seen), base_offset)
    return Points(offset, mask, _bound_for_op(layer, window.rank) if base_offset is None else None)


def convolve(
    layer: Any,
    points: Points,
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    preferred_element_type: Any = None,
) -> jax.Array:
    """The main convolution, reading at `points`."""
    return deform_conv(
        inputs,
        kernel,
        points.offset,
        points.mask,
        bias,
        **geometry(layer),
        feature_group_count=layer.feature_group_count,
        precision=layer.precision,
        preferred_element_type=preferred_element_type,
        max_offset=points.bound,
        implementation=layer.implementation,
    )


def _check_arguments(layer: Any, offset: Any, mask: Any, offset_inputs: Any, base_offset: Any) -> None:
    """Raise if the arguments beside `inputs` do not go together."""
    if offset is None:
        if mask is not None:
            raise ValueError("mask was given without offset; wanted both, or neither: then the branch emits both")
        if not layer.offset_branch:
            raise ValueError("offset is None, and offset_branch=False leaves no branch to emit it; give offset")
        return
    for name, value in (("offset_inputs", offset_inputs), ("base_offset", base_offset)):
        if value is not None:
            raise ValueError(
                f"{name} was given beside offset, but only the branch takes {name}, and it does not run if offset "
                "is given; leave one of the two out"
            )
    checks.array("offset", offset, jnp.floating)
    if mask is not None:
        checks.array("mask", mask, jnp.floating)


def _branch_input(
    layer: Any, window: Window, inputs: jax.Array, offset_inputs: jax.Array | None, channels: int | None
) -> jax.Array:
    """The map that the branch sees, checked. For the default branch it is padded."""
    name, seen = ("inputs", inputs) if offset_inputs is None else ("offset_inputs", offset_inputs)
    if not hasattr(seen, "shape"):
        raise TypeError(f"{name} is a {type(seen).__name__}; wanted an array (wrap it in jnp.asarray)")
    if channels not in (None, seen.shape[-1]):
        raise ValueError(
            f"{name} has shape {seen.shape}; the branch was made for offset_in_features={channels}: give offset_inputs "
            f"of {channels} channels, or make the layer with another offset_in_features"
        )
    if layer.offset_conv_cls is not None:
        return seen
    _check_map(name, seen.shape, inputs, window.spatial, "channels", "the pixels of inputs, then channels", fits=True)
    batch = seen.ndim - window.rank - 1
    return on_any_mesh(_extend, window, (seen,), batched=(seen,), batch=batch, whole=window.rank + 1)(seen)


def _extend(window: Window, x: jax.Array) -> jax.Array:
    """The map `(*batch, *spatial, C)`, padded by `window.pads` with the pixels that `padding_mode` says."""
    if set(window.padding_mode) == {"zeros"}:
        return x  # the convolution pads with zeros by itself
    # Not by jnp.pad: it refuses negative pads, and in modes that repeat the map symbolic sizes.
    axes = zip(window.spatial, window.pads, window.padding_mode, strict=True)
    for axis, (size, (low, high), mode) in enumerate(axes):
        index = jnp.arange(low + size + high, dtype=jnp.int32) - int32(low)
        x = _read_along(x, x.ndim - 1 - window.rank + axis, index, size, mode)
    return x


def _read_along(x: jax.Array, axis: int, index: jax.Array, size: Size, mode: str) -> jax.Array:
    """The pixels at `index` along an axis of `size` pixels; `mode` says what lies outside."""
    if mode == "zeros":
        outside = (index < 0) | (index >= int32(size))
        return jnp.take(x, jnp.where(outside, int32(size), index), axis=axis, mode="fill", fill_value=0)
    return jnp.take(x, INTO_MAP[mode](index, int32(size)), axis=axis, mode="clip")


def _check_map(
    name: str, shape: Any, inputs: jax.Array, positions: Any, channels: str, meaning: str, fits: bool
) -> None:
    """`checks.map_axes` with the batch axes of `inputs`."""
    batch = inputs.shape[: -len(positions) - 1]
    checks.map_axes(
        name, shape, other="inputs", batch=batch, positions=positions, channels=channels, meaning=meaning, fits=fits
    )


def _split(
    layer: Any, window: Window, inputs: jax.Array, z: jax.Array, base_offset: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Offset `(…, OG * K * n)` and mask `(…, OG * K)` from the branch's output z.

    offset = max_offset · tanh(z / max_offset) + base_offset, without a bound z + base_offset
    mask = mask_scale · sigmoid(logits), or None
    """
    offsets, logits = branch_channels(layer)
    name, emitted = "the output of the branch, offset_conv,", offsets + logits
    meaning = f"the output positions, with {offsets} offsets and {logits} logits each"
    _check_map(name, z.shape, inputs, window.out_spatial, str(emitted), meaning, z.shape[-1:] == (emitted,))
    z = z.astype(dtypes.wide(z.dtype))
    offset = _bound(z[..., :offsets], bounds_of(layer.max_offset, window.rank))
    if base_offset is not None:
        offset = _add_base(offset, base_offset, inputs, window)
    return offset, float(layer.mask_scale) * jax.nn.sigmoid(z[..., offsets:]) if logits else None


def _bound_for_op(layer: Any, rank: int) -> float | None:
    """The op's `max_offset`, for the TPU kernels alone. The layer has applied it already."""
    bounds = [bound for bound in bounds_of(layer.max_offset, rank) if bound is not None]
    return max(bounds) if layer.implementation == "pallas_tpu" and len(bounds) == rank else None


def _bound(z: jax.Array, bounds: tuple[float | None, ...]) -> jax.Array:
    """max_offset · tanh(z / max_offset), axis by axis: `(…, OG * K * n)`."""
    if len(set(bounds)) == 1:
        return _bound_axis(z, bounds[0])
    axes = [_bound_axis(z[..., axis :: len(bounds)], bound) for axis, bound in enumerate(bounds)]
    return jnp.stack(axes, axis=-1).reshape(z.shape)


def _bound_axis(z: jax.Array, bound: float | None) -> jax.Array:
    if bound is None:
        return z
    return bound * jnp.tanh(z / bound) if bound else jnp.zeros_like(z)  # a Python float keeps z's dtype


def _add_base(offset: jax.Array, base: jax.Array, inputs: jax.Array, window: Window) -> jax.Array:
    """`offset` `(…, OG * K * n)` + `base` of as many channels, or of n: one vector for all taps."""
    base = checks.array("base_offset", base, jnp.floating)
    channels = dict.fromkeys([window.rank, offset.shape[-1]])
    wanted, fits = " or ".join(map(str, channels)), any(base.shape[-1:] == (n,) for n in channels)
    meaning = f"the output positions, then {window.rank} values for all taps together or {offset.shape[-1]} for each"
    _check_map("base_offset", base.shape, inputs, window.out_spatial, wanted, meaning, fits)
    if base.shape[-1] != offset.shape[-1]:
        base = jnp.tile(base, offset.shape[-1] // window.rank)  # ordered [offset group, tap, axis], axis last
    axes, dtype = max(offset.ndim, base.ndim), dtypes.wide(offset.dtype, base.dtype)
    offset, base = (lax.expand_dims(a, range(axes - a.ndim)).astype(dtype) for a in (offset, base))
    return offset + base
