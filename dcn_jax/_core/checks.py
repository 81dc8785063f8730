"""Checks of arguments. Each error names the argument, what was given and what was wanted."""

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim


def is_int(value: Any) -> bool:
    """Whether `value` is of an integer type; a bool does not count as one."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def count(name: str, value: Any) -> None:
    """Raise if `value` is not an int of at least 1."""
    if not is_int(value):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; wanted an int")
    if value < 1:
        raise ValueError(f"{name}={value!r} is too small; wanted at least 1")


def finite(name: str, value: Any) -> None:
    """Raise if `value` is not a finite number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; wanted a number such as 1.0")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not finite; wanted a number such as 1.0")


def per_axis(name: str, value: Any, rank: int, *, minimum: int) -> tuple[int, ...]:
    """`value`, an int for all spatial axes or a sequence of one per axis, as one int per axis."""
    values = [value] * rank if is_int(value) else value
    if not isinstance(values, Sequence) or not all(map(is_int, values)):
        raise TypeError(f"{name}={value!r} is not made of ints; wanted an int or {rank} ints, one per spatial axis")
    if len(values) != rank:
        raise ValueError(
            f"{name}={value!r} has {len(values)} entries; wanted an int or {rank} ints, one per spatial axis"
        )
    if any(v < minimum for v in values):
        raise ValueError(f"{name}={value!r} is too small; wanted at least {minimum} on each axis")
    return tuple(operator.index(v) for v in values)


def per_level(name: str, value: Any, levels: int, *, minimum: int) -> tuple[int, ...]:
    """`value` as one int per level, each at least `minimum`."""
    if not isinstance(value, Sequence) or not all(map(is_int, value)):
        raise TypeError(f"{name}={value!r} is not made of ints; wanted {levels} ints, one per level")
    if len(value) != levels or any(v < minimum for v in value):
        raise ValueError(f"{name}={value!r}; wanted {levels} ints of at least {minimum}, one per level")
    return tuple(map(operator.index, value))


def sizes(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """`value` as one size per spatial axis, each an int of at least 1 or a symbolic dimension."""
    if not isinstance(value, Sequence) or not any(map(is_symbolic_dim, value)):
        return per_axis(name, value, rank, minimum=1)
    known = per_axis(name, [1 if is_symbolic_dim(size) else size for size in value], rank, minimum=1)
    return tuple(size if is_symbolic_dim(size) else n for size, n in zip(value, known, strict=True))


def array(name: str, value: Any, kind: Any, *, shape_alone: bool = False) -> jax.Array:
    """`value` as a JAX array; raise if its dtype is not of `kind`, jnp.floating or jnp.inexact.

    With `shape_alone`, a `jax.ShapeDtypeStruct` is accepted too and returned unchanged.
    """
    struct = isinstance(value, jax.ShapeDtypeStruct)
    if not (hasattr(value, "shape") and hasattr(value, "dtype")) or (struct and not shape_alone):
        raise TypeError(f"{name} is a {type(value).__name__}; wanted an array (wrap it in jnp.asarray)")
    if not jnp.issubdtype(value.dtype, kind):
        wanted = "floating-point" if kind is jnp.floating else "floating-point or complex"
        raise TypeError(f"{name} has dtype {value.dtype}; wanted a {wanted} array: {name}.astype(jnp.float32)")
    return cast(jax.Array, value) if struct else jnp.asarray(value)


def floating_dtype(name: str, value: Any) -> jnp.dtype:
    """`value` as a dtype; raise if it is not floating-point or complex."""
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(f"{name}={value!r} is not a dtype; wanted a floating-point or complex one, or None") from error
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"{name}={dtype} is not a floating-point or complex dtype")
    return dtype


def one_layer(shape: Sequence[int], axes: int) -> None:
    """Raise if a layer's kernel of this shape has more than `axes` axes."""
    if len(shape) > axes:
        raise ValueError(
            f"the layer's kernel has shape {shape}, {len(shape)} axes; one layer's has {axes}. This is a stack of "
            "layers, as nnx.vmap makes it: call it in nnx.scan or nnx.vmap, which take the layers one by one"
        )


def channels_first(name: str, rank: int) -> str:
    """The end of an error for an array that lies as PyTorch's do; `rank` is the number of its spatial axes."""
    return f". It looks channels first, as PyTorch's arrays are: pass jnp.moveaxis({name}, {-rank - 1}, -1)"


def broadcasts(given: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether axes `given` broadcast to `wanted`: each is 1 or equal, and leading ones may be missing."""
    pairs = zip(reversed(given), reversed(wanted), strict=False)
    return len(given) <= len(wanted) and all(n in (1, size) for n, size in pairs)


def map_axes(
    name: str, shape: Any, *, other: str, batch: Any, positions: Any, channels: str, meaning: str, fits: bool
) -> None:
    """Raise if the argument `name` is not `(*batch, *positions, channels)`.

    Its batch axes must broadcast to `batch`, which are those of the argument `other`. `fits` tells
    whether its last axis is right. `channels` and `meaning` say in the message what is wanted.
    """
    axes = len(positions) + 1
    if not fits or shape[-axes:-1] != positions or not broadcasts(shape[:-axes], batch):
        first = channels_first(name, len(positions)) if shape[1 - axes :] == positions and len(shape) >= axes else ""
        raise ValueError(
            f"{name} has shape {shape}; wanted (*batch, {', '.join(map(str, positions))}, {channels}): batch axes that "
            f"broadcast to those of {other}, {batch}, then {meaning}{first}"
        )
