"""Channels first or last, and checks of shapes, in which None is a size that is not known yet."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax.keras._backend import keras

FORMATS = ("channels_last", "channels_first")
Shape = tuple[int | None, ...]


def check_data_format(given: str | None) -> str:
    """`data_format`, checked; None is Keras's own setting."""
    if given is None:
        return keras.config.image_data_format()
    if not isinstance(given, str) or given.lower() not in FORMATS:
        raise ValueError(f"data_format={given!r} is not known; wanted one of {FORMATS}, or None for Keras's setting")
    return given.lower()


def channels_last(x: jax.Array, data_format: str) -> jax.Array:
    """Move the channels of an array in `data_format` to its last axis."""
    return jnp.moveaxis(x, 1, -1) if data_format == "channels_first" else x


def in_data_format(x: jax.Array, data_format: str) -> jax.Array:
    """Move the last axis of an array to where `data_format` has the channels."""
    return jnp.moveaxis(x, -1, 1) if data_format == "channels_first" else x


def shape_channels_last(shape: Sequence[Any], data_format: str) -> tuple[Any, ...]:
    """`channels_last`, of a shape."""
    return (*shape[:1], *shape[2:], *shape[1:2]) if data_format == "channels_first" else tuple(shape)


def shape_in_data_format(shape: Sequence[Any], data_format: str) -> tuple[Any, ...]:
    """`in_data_format`, of a shape."""
    return (shape[0], shape[-1], *shape[1:-1]) if data_format == "channels_first" else tuple(shape)


def tensors_of(inputs: Any, more: Sequence[Any] = ()) -> list[Any]:
    """The map, and the offset and the mask where they are given; None at the end stands for nothing."""
    several = isinstance(inputs, list | tuple)
    given = list(inputs) if several else [inputs]
    while given and given[-1] is None:
        given.pop()
    if more or not 1 <= len(given) <= 3 or not all(hasattr(each, "shape") for each in given):
        kinds = ", ".join(type(each).__name__ for each in [*(inputs if several else [inputs]), *more])
        raise TypeError(
            f"the layer was called with {kinds or 'no tensor'}; wanted one tensor, the map, or a list of two or three: "
            "layer([inputs, offset]), layer([inputs, offset, mask])"
        )
    return given


def shapes_of(shape: Any) -> list[Any]:
    """Shapes one after another: Keras hands over one, or a list of them."""
    return list(shape) if shape and isinstance(shape[0], list | tuple) else [shape]


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
