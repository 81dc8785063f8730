"""Filling a model's variables from a state with the names of another library."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Slot(NamedTuple):
    """A variable, and the arrays of another library that hold the same numbers.

    `variable` transposed by `axes` is the concatenation of these arrays along the first axis.
    """

    variable: Any
    axes: tuple[int, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]  # of each array along the first axis

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array."""
        _, *rest = [self.variable.shape[axis] for axis in self.axes]
        return {name: (size, *rest) for name, size in zip(self.names, self.sizes, strict=True)}


def slot(variable: Any, *names: str, axes: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> Slot:
    """A `Slot`; by default the array has the variable's axes."""
    axes = tuple(range(len(variable.shape)) if axes is None else axes)
    return Slot(variable, axes, names, tuple(sizes or (variable.shape[axes[0]],)))


def variables(model: Any) -> Iterator[tuple[tuple, Any]]:
    """Path and variable of all that a model has learnt: no random keys, no sown values."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; wanted an nnx.Module (for linen, fill the dictionary of parameters)"
        )
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState | nnx.Intermediate):
            yield path, node


def read(slots: Sequence[Slot]) -> dict[str, np.ndarray]:
    """The arrays of `slots`, as contiguous copies."""
    state = {}
    for variable, axes, names, sizes in slots:
        value = variable.get_value()
        if isinstance(value, jax.ShapeDtypeStruct):
            raise ValueError(f"{names[0]} has no value yet, only a shape, {variable.shape}: fill the model first")
        pieces = np.split(np.asarray(value).transpose(axes), np.cumsum(sizes)[:-1])
        state |= {name: np.array(piece, order="C") for name, piece in zip(names, pieces, strict=True)}
    return state


def fill(
    slots: Sequence[Slot], state: Mapping[str, Any], *, unexpected: Sequence[str], problems: Sequence[str]
) -> None:
    """Fill the variables of `slots` from `state`; if anything does not fit, change nothing.

    Args:
        slots: of all variables of the model.
        state: the arrays by name.
        unexpected: names of `state` that belong to no slot.
        problems: further sentences for the error.

    Raises:
        ValueError: something does not fit; the message lists everything that does not.
    """
    wanted = {name: shape for each in slots for name, shape in each.shapes.items()}
    arrays = {name: np.asarray(state[name]) for name in wanted if name in state}
    missing = [f"{name} {shape}" for name, shape in wanted.items() if name not in state]
    misfits = [misfit for name, array in arrays.items() if (misfit := _misfit(name, array, wanted[name]))]
    found = {
        "missing": missing,
        "unexpected": [f"{name} {getattr(state[name], 'shape', '')}" for name in unexpected],
        "misshapen": misfits,
        "other": problems,
    }
    if any(found.values()):
        lines = ["\n    ".join([f"  {kind} ({len(each)}):", *each]) for kind, each in found.items() if each]
        hint = _prefix_hint(wanted, state) if missing else []
        raise ValueError("\n".join(["the state does not fit the model, which was left as it was:", *lines, *hint]))
    for variable, axes, names, _ in slots:
        whole = np.concatenate([arrays[name] for name in names]).transpose(np.argsort(axes))
        value = jnp.asarray(whole.astype(variable.dtype))  # a copy: the model does not share memory with `state`
        old = variable.get_value()
        variable.set_value(jax.device_put(value, old.sharding) if isinstance(old, jax.Array) else value)


def _misfit(name: str, array: np.ndarray, shape: tuple[int, ...]) -> str | None:
    if array.shape != shape:
        return f"{name} has shape {array.shape}; the model wants {shape}"
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return f"{name} has dtype {array.dtype}; wanted floating-point numbers"
    return None


def _prefix_hint(wanted: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """A line naming the prefix, if all wanted names are in `state` behind the same prefix."""
    first = next(iter(wanted))
    prefixes = [name.removesuffix(first) for name in state if name.endswith(first)]
    fitting = [prefix for prefix in prefixes if prefix and all(prefix + name in state for name in wanted)]
    return [f"  all of these names are there with a prefix: prefix={prefix!r}" for prefix in fitting[:1]]
