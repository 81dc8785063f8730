"""Orders of axes, and shapes of which some sizes are not known."""

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
