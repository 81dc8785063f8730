"""What both layers share: their options, and what they make of the output of their offset convolution."""

import math
from collections.abc import Sequence
from numbers import Real

import jax
import jax.numpy as jnp

from dcn_jax import _check
from dcn_jax.geometry import Padding, resolve_window


def window_of(kernel_size: int | Sequence[int]) -> tuple[int, ...]:
    """The window of a layer; an int is a one-dimensional window, as in Flax's Conv."""
    rank = len(kernel_size) if isinstance(kernel_size, Sequence) else 1
    if rank not in (1, 2, 3):
        raise ValueError(f"kernel_size={kernel_size!r} has {rank} entries; wanted 1, 2 or 3, one per spatial axis")
    return _check.per_axis("kernel_size", kernel_size, rank, minimum=1)


def check_options(
    channels: int, offset_groups: int, modulated: bool, mask_scale: float, max_offset: float | None
) -> None:
    """Raise where an option that only the layer has makes no sense."""
    _check.count("offset_groups", offset_groups)
    if channels % offset_groups:
        raise ValueError(f"offset_groups={offset_groups} must divide the {channels} channels of the input")
    if not isinstance(modulated, bool):
        raise TypeError(f"modulated={modulated!r} is a {type(modulated).__name__}; wanted True or False")
    _check_positive(
        "mask_scale", mask_scale, "the modulation's upper bound: 1.0, or 2.0 to start as a plain convolution"
    )
    if max_offset is not None:
        _check_positive("max_offset", max_offset, "a number of pixels, or None for no bound")


def _check_positive(name: str, value: float, wanted: str) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; wanted {wanted}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be positive and finite: {wanted}")


def check_input(
    inputs: jax.Array,
    window: tuple[int, ...],
    channels: int | None = None,
    *,
    strides: int | Sequence[int] | None,
    padding: Padding,
    kernel_dilation: int | Sequence[int] | None,
) -> None:
    """Raise where `inputs` is not `(*batch, *spatial, channels)`, of any channels if None, or the geometry does not fit."""
    if not hasattr(inputs, "shape"):
        raise TypeError(f"inputs is a {type(inputs).__name__}; wanted an array (wrap it in jnp.asarray)")
    rank = len(window)
    if len(inputs.shape) < rank + 1 or channels not in (None, inputs.shape[-1]):
        raise ValueError(
            f"inputs has shape {inputs.shape}; wanted (*batch, *spatial, {channels or 'C'}) with {rank} spatial axes, as "
            f"kernel_size={window} has"
        )
    # Here and not only in the op, before the offset convolution fails on it with an error of its own.
    resolve_window(
        window,
        spatial=inputs.shape[-rank - 1 : -1],
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
    )


def features(window: tuple[int, ...], offset_groups: int, modulated: bool) -> int:
    """How many channels the offset convolution emits: OG·K·n offsets and, if modulated, OG·K logits."""
    return offset_groups * math.prod(window) * (len(window) + modulated)


def split(
    branch: jax.Array, window: tuple[int, ...], *, modulated: bool, mask_scale: float, max_offset: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """Offset `(…, OG * K * n)` and mask `(…, OG * K)` from the offset convolution's output z.

    offset = max_offset · tanh(z / max_offset), or z itself;  mask = mask_scale · sigmoid(logits), or None
    """
    rank = len(window)
    offsets = branch.shape[-1] * rank // (rank + modulated)
    offset, logits = branch[..., :offsets], branch[..., offsets:]
    if max_offset is not None:
        offset = float(max_offset) * jnp.tanh(offset / float(max_offset))  # a Python float leaves the dtype alone
    return offset, float(mask_scale) * jax.nn.sigmoid(logits) if modulated else None
