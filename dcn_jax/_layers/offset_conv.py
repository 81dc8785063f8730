"""What `DeformConv` shares in linen, nnx and Keras: options, offset branch, and the order of a call.

The branch is the convolution that emits the offsets and the logits of the mask; each framework
makes its own. A layer calls `check_input`, then `place_points`, which runs the branch, then
`convolve`. `layer` is the layer of linen or nnx, whose options have the same names in both, or
Keras's `Options`, which have them too.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax._core import checks, dtypes
from dcn_jax._core.mesh import on_any_mesh
from dcn_jax._layers.offsets import (
    bound_for_op,
    bounds_of,
    branch_channels,
    check_map,
    is_number,
    offset_and_mask,
    window_size,
)
from dcn_jax.geometry import (
    Size,
    Window,
    canonical_padding,
    canonical_padding_mode,
    check_window,
    int32,
    resolve_window,
)
from dcn_jax.ops.deform_conv import deform_conv
from dcn_jax.ops.deform_conv.api import check_implementation
from dcn_jax.sampling import INTO_MAP

# ---- options


def geometry(layer: Any) -> dict[str, Any]:
    """The options that place the window on the map, by the op's names."""
    return {name: getattr(layer, name) for name in ("strides", "padding", "kernel_dilation", "padding_mode")}


def check_options(layer: Any, channels: int, *, module: type, call: str) -> None:
    """Raise if an option makes no sense, or does not fit the channels.

    `module` is the framework's class of modules; `call` says how `offset_conv_cls` is called.
    """
    check_window(window_size(layer.kernel_size), **geometry(layer))
    check_implementation(layer.implementation)
    checks.count("offset_groups", layer.offset_groups)
    if channels % layer.offset_groups:
        raise ValueError(f"offset_groups={layer.offset_groups} must divide the {channels} channels of the input")
    for name in ("modulated", "offset_branch"):
        if not isinstance(value := getattr(layer, name), bool):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; wanted True or False")
    scale, wanted = layer.mask_scale, "the modulation's upper bound: 1.0, or 2.0 to start as a plain convolution"
    if not is_number(scale):
        raise TypeError(f"mask_scale={scale!r} is a {type(scale).__name__}; wanted {wanted}")
    if not 0 < scale < math.inf:
        raise ValueError(f"mask_scale={scale!r} must be positive and finite: {wanted}")
    bounds_of(layer.max_offset, len(window_size(layer.kernel_size)))
    if layer.offset_activation is not None and not callable(layer.offset_activation):
        raise TypeError(
            f"offset_activation={layer.offset_activation!r} is a {type(layer.offset_activation).__name__}; wanted a "
            "function of the branch's offsets (…, OG, K, n), such as lambda z: 10 * jnp.tanh(z), or None"
        )
    maker = layer.offset_conv_cls
    if maker is not None and (not callable(maker) or isinstance(maker, module)):
        raise TypeError(
            f"offset_conv_cls is a {type(maker).__name__}; wanted a function that makes the branch, called as {call}: "
            "a module's class, or functools.partial of it"
        )
    if maker is not None and not layer.offset_branch:
        raise ValueError("offset_conv_cls makes a branch, and offset_branch=False wants none; leave one of them out")


# ---- the default branch


def branch_features(layer: Any) -> int:
    """How many channels the branch emits: offsets, then logits."""
    return sum(branch_channels(layer))


def branch_options(layer: Any) -> dict[str, Any]:
    """The options with which Flax's Conv reads the pixels under the main convolution's window."""
    kept = ("strides", "kernel_dilation", "dtype", "param_dtype", "precision")
    return {"padding": branch_padding(layer), **{name: getattr(layer, name) for name in kept}}


def branch_padding(layer: Any) -> Any:
    """The padding that is left for the branch's convolution: none where `_extend` has padded the map already."""
    rank = len(window_size(layer.kernel_size))
    padding = canonical_padding(layer.padding, rank)
    return padding if set(canonical_padding_mode(layer.padding_mode, rank, padding)) == {"zeros"} else "VALID"


def wide_conv(x: jax.Array, kernel: jax.Array, *geometry: Any, **options: Any) -> jax.Array:
    """`lax.conv_general_dilated` that returns its sums in float32 or wider, not in half precision.

    Its derivative is that of the convolution in the dtype of the operands. So the backward pass
    multiplies in half precision too, and costs no more than that of a plain convolution.
    """
    conv = functools.partial(_conv, geometry, options)
    return conv(x, kernel) if dtypes.wide(x.dtype) == x.dtype else _accumulated(conv, x, kernel)


def _conv(geometry, options, x, kernel, dtype=None):
    def conv(x, kernel):
        return lax.conv_general_dilated(x, kernel, *geometry, **options, preferred_element_type=dtype)

    def filled_up(x, kernel):
        features = kernel.shape[-1]
        wider = jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 1) + [(0, _spare(features))])
        return lax.slice_in_dim(conv(x, wider), 0, features, axis=-1)

    # The JOURNAL.md of ops/deform_conv has the figures.
    return (
        lax.platform_dependent(x, kernel, cpu=filled_up, default=conv) if _spare(kernel.shape[-1]) else conv(x, kernel)
    )


def _spare(features: int) -> int:
    """How many channels bring a branch to a number that a CPU multiplies in two thirds of the time: 27 to 32."""
    spare = -features % 32
    return spare if features < 64 and 5 * spare <= features else 0


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
        is_first = channels is not None and inputs.shape[-rank - 1 : -rank] == (channels,)
        first = checks.channels_first("inputs", rank) if is_first else ""
        raise ValueError(
            f"inputs has shape {inputs.shape}; wanted (*batch, *spatial, {channels or 'C'}) with {rank} spatial axes, "
            f"as kernel_size={size} has{first}"
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
    offset, mask = offset_and_mask(layer, window, inputs, branch(seen), base_offset)
    return Points(offset, mask, bound_for_op(layer, window.rank) if base_offset is None else None)


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
    check_map(name, seen.shape, inputs, window.spatial, "channels", "the pixels of inputs, then channels", fits=True)
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
