"""From what the branch of a `DeformConv` emits to offset and mask.

`layer` is the layer of linen or nnx, or Keras's `Options`; the options have the same names in all.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core import checks, dtypes
from dcn_jax.geometry import Window

Bound = float | Sequence[float | None] | None


def window_size(kernel_size: int | Sequence[int]) -> tuple[int, ...]:
    """`kernel_size` as taps per spatial axis; an int means one axis, as in Flax's Conv."""
    rank = len(kernel_size) if isinstance(kernel_size, Sequence) else 1
    if rank not in (1, 2, 3):
        raise ValueError(f"kernel_size={kernel_size!r} has {rank} entries; wanted 1, 2 or 3, one per spatial axis")
    return checks.per_axis("kernel_size", kernel_size, rank, minimum=1)


def branch_channels(layer: Any) -> tuple[int, int]:
    """How many channels the branch emits as offsets, OG·K·n, and as logits, OG·K or none."""
    size = window_size(layer.kernel_size)
    taps = layer.offset_groups * math.prod(size)
    return taps * len(size), taps * layer.modulated


def bounds_of(max_offset: Bound, rank: int) -> tuple[float | None, ...]:
    """`max_offset`, checked, as one bound per spatial axis; None is no bound."""
    wanted = f"a number of pixels, None for no bound, or one of these for each of the {rank} spatial axes"
    one = max_offset is None or is_number(max_offset)
    bounds: Any = (max_offset,) * rank if one else max_offset
    if not isinstance(bounds, Sequence) or not all(bound is None or is_number(bound) for bound in bounds):
        raise TypeError(f"max_offset={max_offset!r} is a {type(max_offset).__name__}; wanted {wanted}")
    if len(bounds) != rank:
        raise ValueError(f"max_offset={max_offset!r} has {len(bounds)} entries; wanted {wanted}")
    if not all(bound is None or 0 <= bound < math.inf for bound in bounds):
        raise ValueError(f"max_offset={max_offset!r} must be finite and not negative: {wanted} (0: no offset at all)")
    return tuple(None if bound is None else float(bound) for bound in bounds)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def offset_and_mask(
    layer: Any, window: Window, inputs: jax.Array, z: jax.Array, base_offset: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Offset `(…, OG * K * n)` and mask `(…, OG * K)` from the branch's output z.

    offset = bounded(offset_activation(z)) + base_offset, each step only if the layer has it
    mask = mask_scale · sigmoid(logits), or None
    """
    offsets, logits = branch_channels(layer)
    name, emitted = "the output of the branch, offset_conv,", offsets + logits
    meaning = f"the output positions, with {offsets} offsets and {logits} logits each"
    check_map(name, z.shape, inputs, window.out_spatial, str(emitted), meaning, z.shape[-1:] == (emitted,))
    z = z.astype(dtypes.wide(z.dtype))
    offset = _bound(_activate(layer, window, z[..., :offsets]), bounds_of(layer.max_offset, window.rank))
    if base_offset is not None:
        offset = _add_base(offset, base_offset, inputs, window)
    return offset, float(layer.mask_scale) * jax.nn.sigmoid(z[..., offsets:]) if logits else None


def _activate(layer: Any, window: Window, z: jax.Array) -> jax.Array:
    """`offset_activation` of the offsets `(…, OG * K * n)`, which it gets as `(…, OG, K, n)`."""
    if layer.offset_activation is None:
        return z
    split = z.reshape(*z.shape[:-1], layer.offset_groups, window.taps, window.rank)
    y = layer.offset_activation(split)
    is_array = hasattr(y, "shape") and hasattr(y, "dtype")
    if not is_array or y.shape != split.shape or not jnp.issubdtype(y.dtype, jnp.floating):
        given = f"an array of shape {y.shape} and dtype {y.dtype}" if is_array else f"a {type(y).__name__}"
        raise ValueError(
            f"offset_activation returned {given}; wanted real offsets of the shape that it was given, {split.shape}: "
            "(*batch, *out_spatial, offset groups, taps, spatial axes)"
        )
    return y.astype(z.dtype).reshape(z.shape)


def bound_for_op(layer: Any, rank: int) -> float | None:
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
    check_map("base_offset", base.shape, inputs, window.out_spatial, wanted, meaning, fits)
    if base.shape[-1] != offset.shape[-1]:
        base = jnp.tile(base, offset.shape[-1] // window.rank)  # ordered [offset group, tap, axis], axis last
    axes, dtype = max(offset.ndim, base.ndim), dtypes.wide(offset.dtype, base.dtype)
    offset, base = (lax.expand_dims(a, range(axes - a.ndim)).astype(dtype) for a in (offset, base))
    return offset + base


def check_map(
    name: str, shape: Any, inputs: jax.Array, positions: Any, channels: str, meaning: str, fits: bool
) -> None:
    """`checks.map_axes` with the batch axes of `inputs`."""
    batch = inputs.shape[: -len(positions) - 1]
    checks.map_axes(
        name, shape, other="inputs", batch=batch, positions=positions, channels=channels, meaning=meaning, fits=fits
    )
