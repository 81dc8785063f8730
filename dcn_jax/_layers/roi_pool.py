"""What the layers of deformable RoI pooling share in linen and nnx: all but the parameters.

`layer` is the layer of either framework; its options have the same names in both. The dense layers
have the orders of mmcv's, so that its weights fit as they are.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax._core import checks
from dcn_jax._core.dtypes import wide
from dcn_jax.ops.roi_pool import check_pooling, deform_roi_pool

OPTIONS = ("output_size", "spatial_scale", "sampling_ratio", "gamma", "aligned")


def check_options(layer: Any) -> None:
    """Raise if an option does not fit."""
    check_pooling(**options(layer))
    checks.count("deform_fc_channels", layer.deform_fc_channels)


def options(layer: Any) -> dict[str, Any]:
    """The options of the op."""
    return {name: getattr(layer, name) for name in OPTIONS}


def bin_count(layer: Any) -> int:
    """How many bins a box has."""
    return math.prod(checks.per_axis("output_size", layer.output_size, 2, minimum=1))


def wide_dtype(layer: Any) -> Any:
    """The layer's dtype, but at least float32, for offsets and masks; None stays None."""
    return None if layer.dtype is None else wide(layer.dtype)


def look(layer: Any, x: jax.Array, rois: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of x in the layer's dtype, what the branches see: x, and `roi_align`'s bins `(R, C · ph · pw)`, channels first."""
    check_options(layer)
    x = checks.array("x", x, jnp.floating)
    channels = getattr(layer, "output_channels", x.shape[-1] if x.ndim else None)  # linen takes those of x
    if x.ndim == 4 and x.shape[-1] != channels:
        raise ValueError(
            f"x has shape {x.shape}; wanted (batch, H, W, {channels}), channels last: the layer has output_channels={channels}"
        )
    x = x if layer.dtype is None else x.astype(layer.dtype)
    pooled = deform_roi_pool(x, rois, **options(layer))
    return x, jnp.moveaxis(pooled, -1, 1).reshape(pooled.shape[0], math.prod(pooled.shape[1:]))


def to_offset(layer: Any, shifts: jax.Array) -> jax.Array:
    """From mmcv's `(R, 2 · ph · pw)`, all x and then all y, to the op's offset `(R, ph, pw, (dy, dx))`."""
    size = checks.per_axis("output_size", layer.output_size, 2, minimum=1)
    return jnp.moveaxis(shifts.reshape(shifts.shape[0], 2, *size), 1, -1)[..., ::-1]


def to_mask(layer: Any, logits: jax.Array) -> jax.Array:
    """The mask of logits `(R, ph · pw)`: `(R, ph, pw)`."""
    size = checks.per_axis("output_size", layer.output_size, 2, minimum=1)
    return jax.nn.sigmoid(logits.reshape(logits.shape[0], *size))


def pool(layer: Any, x: jax.Array, rois: jax.Array, offset: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The op with the layer's options."""
    return deform_roi_pool(x, rois, offset, mask, **options(layer))
