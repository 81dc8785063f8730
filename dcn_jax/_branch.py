"""What both layers share: their options, and what they make of the output of their offset convolution."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dcn_jax import _check


def window_of(kernel_size: int | Sequence[int]) -> tuple[int, ...]:
    """The window of a layer; an int is a one-dimensional window, as in Flax's Conv."""
    rank = len(kernel_size) if isinstance(kernel_size, Sequence) else 1
    return _check.per_axis("kernel_size", kernel_size, rank, minimum=1)


def check_options(channels: int, offset_groups: int, max_offset: float | None) -> None:
    """Raise where an option that only the layer has makes no sense."""
    if not _check.is_int(offset_groups):
        raise TypeError(f"offset_groups={offset_groups!r} is a {type(offset_groups).__name__}; wanted an int")
    if offset_groups < 1 or channels % offset_groups:
        raise ValueError(f"offset_groups={offset_groups} must divide the {channels} channels of the input")
    if max_offset is not None and not max_offset > 0:
        raise ValueError(f"max_offset={max_offset!r} must be positive, in pixels, or None for no bound")


def check_input(inputs: jax.Array, window: tuple[int, ...], channels: int) -> None:
    """Raise where `inputs` is not `(*batch, *spatial, channels)`."""
    if inputs.ndim < len(window) + 1 or inputs.shape[-1] != channels:
        raise ValueError(
            f"inputs has shape {inputs.shape}; wanted (*batch, *spatial, {channels}) with {len(window)} spatial axes, as "
            f"kernel_size={window} has"
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
        offset = max_offset * jnp.tanh(offset / max_offset)
    return offset, mask_scale * jax.nn.sigmoid(logits) if modulated else None
