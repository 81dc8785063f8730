"""The checks of a call, which return its arrays and, in a `Spec`, everything else about it."""

import functools
import math
from numbers import Real
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core import checks, dtypes
from dcn_jax.geometry import Window, check_offset_shape, resolve_window
from dcn_jax.sampling import countable


class Arrays(NamedTuple):
    """The arrays of a call."""

    x: jax.Array  # (*batch, *spatial, C)
    kernel: jax.Array  # (*window, C // feature groups, F)
    offset: jax.Array  # (*batch, *out_spatial, OG * K * n)
    mask: jax.Array | None  # (*batch, *out_spatial, OG * K)
    bias: jax.Array | None  # (F,)


class Spec(NamedTuple):
    """Everything about a call except its arrays; hashable, so that it can be a static argument."""

    window: Window
    offset_groups: int
    feature_groups: int
    dtype: jnp.dtype  # of x and kernel in the products
    out_dtype: jnp.dtype
    precision: Any  # of the products, as the caller gave it
    max_offset: float | None = None  # offsets were clipped to it

    @property
    def accumulate(self) -> jnp.dtype:
        """The dtype in which products are summed."""
        return dtypes.wide(self.dtype)


def check_call(
    arrays: Arrays,
    *,
    strides: Any,
    padding: Any,
    kernel_dilation: Any,
    feature_group_count: Any,
    padding_mode: Any,
    precision: Any,
    preferred_element_type: Any,
    max_offset: Any = None,
    shapes_alone: bool = False,
) -> tuple[Spec, Arrays]:
    """Check the arguments of `deform_conv`; `shapes_alone` allows `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: a shape or an option does not fit; the message names it.
        TypeError: an argument is of the wrong kind.
    """
    array = functools.partial(checks.array, shape_alone=shapes_alone)
    x = array("x", arrays.x, jnp.inexact)
    kernel = array("kernel", arrays.kernel, jnp.inexact)
    offset = array("offset", arrays.offset, jnp.floating)

    _check_layout(x, kernel, offset, _window_rank(kernel), feature_group_count)
    window = call_window(
        x, kernel, strides=strides, padding=padding, kernel_dilation=kernel_dilation, padding_mode=padding_mode
    )
    batch, channels = x.shape[: -window.rank - 1], x.shape[-1]
    _check_kernel(kernel, window, channels, feature_group_count)
    offset_groups = _check_offset(offset, window, channels)
    offset = _with_batch_axes("offset", offset, window, batch)
    mask = None if arrays.mask is None else array("mask", arrays.mask, jnp.floating)
    if mask is not None:
        _check_mask(mask, window, batch, offset_groups)
        mask = _with_batch_axes("mask", mask, window, batch)
    bias = None if arrays.bias is None else array("bias", arrays.bias, jnp.inexact)
    if bias is not None and bias.shape != kernel.shape[-1:]:
        raise ValueError(f"bias has shape {bias.shape}; wanted {kernel.shape[-1:]}: one value per feature of kernel")

    dtype = jnp.result_type(x.dtype, kernel.dtype)
    out_dtype = _result_dtype(dtype if bias is None else jnp.result_type(dtype, bias.dtype), preferred_element_type)
    spec = Spec(
        window, offset_groups, int(feature_group_count), dtype, out_dtype, precision, check_max_offset(max_offset)
    )
    if spec.max_offset is not None and not shapes_alone:
        offset = _clip(offset, spec.max_offset)
    return spec, Arrays(x, kernel, offset, mask, bias)


def call_window(x: jax.Array, kernel: jax.Array, **options: Any) -> Window:
    """The window of `kernel` over the map x, by `resolve_window`'s options; raise if x or kernel lacks the axes."""
    rank = _window_rank(kernel)
    if len(x.shape) < rank + 1:
        raise ValueError(
            f"x has shape {x.shape}; wanted (*batch, *spatial, C) with {rank} spatial axes, the rank of the window of "
            f"kernel, whose shape is {kernel.shape}"
        )
    spatial = x.shape[-rank - 1 : -1]
    if 0 in spatial:
        raise ValueError(
            f"x has shape {x.shape}, a map without pixels; wanted at least one pixel along each spatial axis"
        )
    return resolve_window(kernel.shape[:rank], spatial=spatial, **options)


def check_max_offset(max_offset: Any) -> float | None:
    """`max_offset` as a float, or None for no bound; raise if it is no finite number of pixels."""
    if max_offset is None:
        return None
    wanted = "a number of pixels, which bounds offsets along every axis, or None for no bound"
    if not isinstance(max_offset, Real) or isinstance(max_offset, bool):
        raise TypeError(f"max_offset={max_offset!r} is a {type(max_offset).__name__}; wanted {wanted}")
    if not 0 <= float(max_offset) < math.inf:
        raise ValueError(f"max_offset={max_offset!r} must be finite and not negative: {wanted}")
    return float(max_offset)


def kernel_shape(window: tuple[int, ...], channels: int, features: int, feature_group_count: int) -> tuple[int, ...]:
    """The shape of a kernel; raise if feature_group_count does not divide channels and features."""
    if not checks.is_int(feature_group_count):
        raise TypeError(
            f"feature_group_count={feature_group_count!r} is a {type(feature_group_count).__name__}; wanted an int"
        )
    if feature_group_count < 1 or channels % feature_group_count or features % feature_group_count:
        raise ValueError(
            f"feature_group_count={feature_group_count} must divide the {channels} channels of the input and the "
            f"{features} features of the result"
        )
    return (*window, channels // feature_group_count, features)


def _clip(offset: jax.Array, bound: float) -> jax.Array:
    """Clip offsets to ±`bound`. At and beyond it the derivative is zero; a NaN stays NaN."""
    limit = jnp.asarray(bound, offset.dtype)
    return lax.clamp(-limit, offset, limit)


def flatten_batch(batch: tuple[int, ...], array: jax.Array) -> jax.Array:
    """`array` `(*batch, …)` with its batch axes as one; an array that images share is repeated."""
    shape = array.shape[len(batch) :]
    return jnp.broadcast_to(array, (*batch, *shape)).reshape(-1, *shape)


def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`y` `(…, F)` + `bias` `(F,)`, in float32 or wider; `y` as it is without a bias."""
    if bias is None:
        return y
    y = y.astype(dtypes.wide(y.dtype, bias.dtype))
    return y + lax.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))


def _window_rank(kernel: jax.Array) -> int:
    """How many spatial axes a kernel `(*window, C // feature_group_count, features)` has."""
    rank = len(kernel.shape) - 2
    if rank not in (1, 2, 3) or 0 in kernel.shape[:rank]:
        raise ValueError(
            f"kernel has shape {kernel.shape}; wanted (*window, C // feature_group_count, features) with a window of "
            "1, 2 or 3 axes, none of them empty"
        )
    return rank


def _check_layout(x: jax.Array, kernel: jax.Array, offset: jax.Array, rank: int, groups: Any) -> None:
    """Raise if kernel or x fits only as PyTorch's: (features, C // groups, *window), (*batch, C, *spatial)."""
    if not checks.is_int(groups) or groups < 1 or x.ndim <= rank:
        return

    def counts(channels: tuple[int, ...], window: tuple[int, ...]) -> bool:
        """Whether one of these numbers of channels is that of offsets for whole groups of a window's taps."""
        per_group = rank * math.prod(window)
        return per_group > 0 and any(n > 0 and n % per_group == 0 for n in channels)

    channels, first = x.shape[-1], x.shape[-rank - 1]
    ours, theirs = kernel.shape[-2] * groups, kernel.shape[1] * groups
    fits, fits_turned = ours == channels, theirs in (channels, first)
    last, anywhere = offset.shape[-1:], (*offset.shape[-1:], *offset.shape[-rank - 1 : -rank])
    turned = kernel.shape[0] % groups == 0 and fits_turned and counts(anywhere, kernel.shape[2:])
    if turned and not (fits and counts(last, kernel.shape[:rank])):
        axes = (*range(2, rank + 2), 1, 0)
        raise ValueError(
            f"kernel has shape {kernel.shape}; wanted (*window, C // feature_group_count, features). It looks like "
            f"PyTorch's, (features, C // feature_group_count, *window): pass kernel.transpose{axes}"
        )
    if kernel.shape[-1] % groups == 0 and not fits and first == ours:
        raise ValueError(
            f"x has shape {x.shape}; wanted (*batch, *spatial, C) with C = {ours}, as kernel {kernel.shape} and "
            f"feature_group_count={groups} have{checks.channels_first('x', rank)}"
        )


def _check_kernel(kernel: jax.Array, window: Window, channels: int, feature_group_count: Any) -> None:
    wanted = kernel_shape(window.size, channels, kernel.shape[-1], feature_group_count)
    if kernel.shape != wanted:
        raise ValueError(
            f"kernel has shape {kernel.shape}; wanted {wanted}: (*window, C // feature_group_count, features) with "
            f"C = {channels}, the channels of x, and feature_group_count={feature_group_count}"
        )


def _check_offset(offset: jax.Array, window: Window, channels: int) -> int:
    """Check the last axes of `offset`, and that int32 can count the rows; return the number of offset groups."""
    groups = check_offset_shape(offset.shape, window)
    if channels % groups:
        raise ValueError(
            f"offset has shape {offset.shape}, that is {groups} offset groups of {window.taps} taps; wanted a number "
            f"of groups that divides the {channels} channels of x"
        )
    # `sampling.locate` checks this too, but it is traced when the program is lowered: too late to name the argument.
    rows = math.prod(window.spatial) * groups
    if not countable(rows):
        raise ValueError(
            f"x has {math.prod(window.spatial)} pixels along its spatial axes {window.spatial}, and offset has "
            f"{groups} offset groups; wanted a product below 2**31, not {rows}: call the op for strips of the map"
        )
    return groups


def _check_mask(mask: jax.Array, window: Window, batch: tuple[int, ...], offset_groups: int) -> None:
    wanted = (*window.out_spatial, offset_groups * window.taps)
    if mask.shape[-window.rank - 1 :] != wanted:
        is_first = mask.shape[-window.rank - 1 :] == (wanted[-1], *wanted[:-1])
        raise ValueError(
            f"mask has shape {mask.shape}; wanted {(*batch, *wanted)}: one value for each tap ({window.taps}) of each "
            f"offset group ({offset_groups}, as in offset){checks.channels_first('mask', window.rank) if is_first else ''}"
        )


def _with_batch_axes(name: str, array: jax.Array, window: Window, batch: tuple[int, ...]) -> jax.Array:
    """`array` with 1 for each batch axis that it lacks; raise if they do not broadcast to x's."""
    given = array.shape[: -window.rank - 1]
    if not checks.broadcasts(given, batch):
        raise ValueError(
            f"{name} has shape {array.shape}, batch axes {given}; wanted those of x, {batch}; any may be 1, and the "
            "first ones may be missing"
        )
    if len(given) == len(batch):
        return array
    shape = (1,) * (len(batch) - len(given)) + array.shape
    if isinstance(array, jax.ShapeDtypeStruct):
        return cast(jax.Array, jax.ShapeDtypeStruct(shape, array.dtype))
    return array.reshape(shape)


def _result_dtype(promoted: jnp.dtype, preferred_element_type: Any) -> jnp.dtype:
    """The dtype of the result: `preferred_element_type`, or else that of the arguments."""
    if preferred_element_type is None:
        return promoted
    preferred = checks.floating_dtype("preferred_element_type", preferred_element_type)
    if jnp.issubdtype(promoted, jnp.complexfloating) and not jnp.issubdtype(preferred, jnp.complexfloating):
        raise TypeError(
            f"preferred_element_type={preferred} cannot hold the result, which is {promoted}; wanted a complex dtype"
        )
    return preferred
