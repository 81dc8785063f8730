"""Orders of axes, and shapes of which some sizes are not known."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax._core import checks
from dcn_jax.keras._backend import keras

FORMATS = ("channels_last", "channels_first")
Shape = tuple[int | None, ...]


def check_data_format(given: str | None) -> str:
    """`data_format`, checked; None is Keras's own setting."""
    if given is not None and given not in FORMATS:
        raise ValueError(f"data_format={given!r} is not known; wanted one of {FORMATS}, or None for Keras's setting")
    return given or keras.config.image_data_format()


def channels_last(x: jax.Array, data_format: str) -> jax.Array:
    """A tensor of the user's, with its channels last."""
    return jnp.moveaxis(x, 1, -1) if data_format == "channels_first" else x


def as_given(x: jax.Array, data_format: str) -> jax.Array:
    """A tensor whose channels are last, in the user's order."""
    return jnp.moveaxis(x, -1, 1) if data_format == "channels_first" else x


def shape_channels_last(shape: Sequence[Any], data_format: str) -> tuple[Any, ...]:
    """A shape of the user's, with its channels last."""
    return (*shape[:1], *shape[2:], *shape[1:2]) if data_format == "channels_first" else tuple(shape)


def shape_as_given(shape: Sequence[Any], data_format: str) -> tuple[Any, ...]:
    """A shape whose channels are last, in the user's order."""
    return (shape[0], shape[-1], *shape[1:-1]) if data_format == "channels_first" else tuple(shape)


def each(inputs: Any) -> list[Any]:
    """Tensors, or shapes, one after another; one alone stands for itself."""
    several = isinstance(inputs, list | tuple) and not all(size is None or checks.is_int(size) for size in inputs)
    return list(inputs) if several else [inputs]


def fits(shape: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether a shape may be the one that is wanted; a batch of 1 stands for any."""
    pairs = list(zip(shape, wanted, strict=False))
    return (
        len(shape) == len(wanted)
        and (shape[0] == 1 or _may_equal(*pairs[0]))
        and all(_may_equal(*p) for p in pairs[1:])
    )


def _may_equal(size: Any, other: Any) -> bool:
    """Whether two sizes, of which each may be unknown, may be the same."""
    return not (isinstance(size, int) and isinstance(other, int) and size != other)
