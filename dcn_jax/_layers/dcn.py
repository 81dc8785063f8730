"""What the layers DCNv3 and DCNv4 share in linen and nnx: all but the parameters.

`layer` is the layer of either framework; its options have the same names in both.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core import checks, dtypes
from dcn_jax.geometry import Window
from dcn_jax.ops.dcnv3 import Grid, centre, check_grid_options, make_grid

Pair = int | Sequence[int]


def _gelu(x: jax.Array) -> jax.Array:  # a function with a name: a layer that holds a lambda cannot be pickled
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS = {"GELU": _gelu, "ReLU": jax.nn.relu, "SiLU": jax.nn.silu}

# Depthwise convolutions start as PyTorch's do: uniform within ±1 / √(taps).
DEPTHWISE_KERNEL_INIT = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def depthwise_bias_init(window: tuple[int, ...]) -> Callable[..., jax.Array]:
    """The initializer of a depthwise convolution's bias."""
    bound = math.prod(window) ** -0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


# ---- options


def check_options(layer: Any) -> None:
    """Raise if an option makes no sense, whatever the map."""
    square("kernel_size", layer.kernel_size)
    checks.count("channels", layer.channels)
    checks.count("group", layer.group)
    if layer.channels % layer.group:
        raise ValueError(f"group={layer.group} must divide channels={layer.channels}")
    check_grid_options(**op_options(layer))


def op_options(layer: Any) -> dict[str, Any]:
    """The options of the op, by the op's names."""
    return {
        "window": layer.kernel_size,
        "strides": layer.stride,
        "padding": layer.pad,
        "kernel_dilation": layer.dilation,
        "offset_scale": layer.offset_scale,
        "remove_center": layer.remove_center,
    }


def dtype_options(module: Any) -> dict[str, Any]:
    """The options that a module hands on to the Flax modules inside it."""
    return {name: getattr(module, name) for name in ("dtype", "param_dtype", "precision")}


def weight_count(layer: Any) -> int:
    """How many weights each output position has: G · K."""
    return layer.group * (math.prod(square("kernel_size", layer.kernel_size)) - bool(layer.remove_center))


def packed_features(layer: Any) -> int:
    """How many channels `offset_mask` emits: 3 per weight, rounded up to a multiple of 8."""
    return -(-3 * weight_count(layer) // 8) * 8


def square(name: str, size: Pair) -> tuple[int, ...]:
    """`size` as a window of two axes; an int is a square."""
    return checks.per_axis(name, size, 2, minimum=1)


def activation(act_layer: Any) -> Callable[..., Any]:
    """`act_layer` as a function; it is one, or the name of one."""
    if callable(act_layer):
        return act_layer
    if act_layer not in _ACTIVATIONS:
        raise ValueError(f"act_layer={act_layer!r} is not known; wanted one of {tuple(_ACTIVATIONS)} or a function")
    return _ACTIVATIONS[act_layer]


def check_norm(norm_layer: Any, call: str) -> None:
    """Raise if `norm_layer` is neither "LN" nor callable; `call` says how it is called."""
    if norm_layer != "LN" and not callable(norm_layer):
        raise ValueError(
            f'norm_layer={norm_layer!r} is not known; wanted "LN", or a function that makes the norm, called as '
            f'{call}: for "BN" functools.partial(BatchNorm, use_running_average=…)'
        )


# ---- the call


def check_input(layer: Any, inputs: Any) -> tuple[jax.Array, Grid]:
    """`inputs` `(*batch, H, W, channels)` in the layer's dtype, checked, and the taps over it."""
    inputs = checks.array("inputs", inputs, jnp.inexact)
    if inputs.ndim < 3 or inputs.shape[-1] != layer.channels:
        first = checks.channels_first("inputs", 2) if inputs.shape[-3:-2] == (layer.channels,) else ""
        raise ValueError(
            f"inputs has shape {inputs.shape}; wanted (*batch, H, W, {layer.channels}), as channels says{first}"
        )
    grid = make_grid(inputs.shape, **op_options(layer))
    return (inputs if layer.dtype is None else inputs.astype(layer.dtype)), grid


def around_centres(x: jax.Array, window: Window, size: tuple[int, ...]) -> jax.Array:
    """The map `(*batch, H, W, C)`, padded or cropped for a depthwise convolution with taps `size`.

    With the op's strides and no padding, that convolution has as many outputs as the op, and its
    windows have the same centres. If the op keeps the map's size, this is the published padding.
    """
    pads = [(0, 0, 0)] * x.ndim
    for axis, middle in enumerate(centre(window)):
        low = window.pads[axis][0] - middle + (size[axis] - 1) // 2
        reach = (window.out_spatial[axis] - 1) * window.strides[axis] + size[axis]
        pads[x.ndim - 3 + axis] = (low, reach - window.spatial[axis] - low, 0)
    return x if not any(low or high for low, high, _ in pads) else lax.pad(x, jnp.zeros((), x.dtype), pads)


def at_centres(x: jax.Array, window: Window) -> jax.Array:
    """The pixels at the op's window centres, zero outside the map: `(*batch, Ho, Wo, C)`."""
    down, right = window.strides
    return around_centres(x, window, (1, 1))[..., ::down, ::right, :]


def widen(x: jax.Array) -> jax.Array:
    """The map in float32 or wider: in half precision offsets would lose their fractions."""
    return x.astype(dtypes.wide(x.dtype))


def softmax(logits: jax.Array, groups: int) -> jax.Array:
    """The softmax over the taps of each group: `(…, G * K)`."""
    taps = logits.shape[-1] // groups
    return jax.nn.softmax(logits.reshape(*logits.shape[:-1], groups, taps), axis=-1).reshape(logits.shape)


def blend(
    y: jax.Array, x: jax.Array, query: jax.Array, weight: jax.Array, bias: jax.Array, window: Window
) -> jax.Array:
    """A mix of the op's result y and the map x that it read: y · (1 - σ) + x · σ.

    σ = sigmoid(weight · query + bias), one for each group, with weight `(G, C)` and bias `(G,)`.
    """
    query = widen(query)
    logits = jnp.einsum("...c,gc->...g", query, weight.astype(query.dtype))
    logits = logits + lax.expand_dims(bias.astype(query.dtype), range(logits.ndim - 1))
    share = jnp.repeat(jax.nn.sigmoid(logits), y.shape[-1] // weight.shape[0], axis=-1).astype(y.dtype)
    return y * (1 - share) + at_centres(x, window).astype(y.dtype) * share
