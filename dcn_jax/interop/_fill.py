"""Filling a model's variables from a state with the names of another library."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Order(NamedTuple):
    """How the axes of a variable lie in another library."""

    theirs: Callable[[np.ndarray], np.ndarray] | None  # makes their array of ours; None where nobody asks for it
    ours: Callable[[np.ndarray], np.ndarray] | None  # and ours of theirs


def transposed(axes: Sequence[int]) -> Order:
    """The order in which their array is ours with its axes transposed by `axes`."""
    return Order(lambda ours: ours.transpose(axes), lambda theirs: theirs.transpose(np.argsort(axes)))


SAME = Order(lambda array: array, lambda array: array)


class Slot(NamedTuple):
    """A variable, and the arrays of another library that hold the same numbers.

    In their order, the variable is the concatenation of these arrays along the first axis.
    """

    variable: Any
    order: Order
    names: tuple[str, ...]
    sizes: tuple[int, ...]  # of each array along the first axis; of one array alone they do not matter

    @property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """The shape of each array; None if the order does not tell."""
        if self.order.theirs is None:
            return dict.fromkeys(self.names)
        whole = self.order.theirs(np.broadcast_to(np.float32(0), self.variable.shape)).shape
        if len(self.names) == 1:
            return {self.names[0]: whole}
        return {name: (size, *whole[1:]) for name, size in zip(self.names, self.sizes, strict=True)}

    def split(self, value: np.ndarray) -> list[np.ndarray]:
        """Their arrays of our one."""
        assert self.order.theirs is not None
        whole = self.order.theirs(value)
        return [whole] if len(self.names) == 1 else np.split(whole, np.cumsum(self.sizes)[:-1])

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Our array of theirs."""
        assert self.order.ours is not None
        return np.asarray(self.order.ours(arrays[0] if len(arrays) == 1 else np.concatenate(arrays)))


def slot(variable: Any, *names: str, order: Order = SAME, sizes: Sequence[int] = ()) -> Slot:
    """A `Slot`; by default the array has the variable's axes."""
    return Slot(variable, order, names, tuple(sizes))


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
    for each in slots:
        value = each.variable.get_value()
        if isinstance(value, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{each.names[0]} has no value yet, only a shape, {each.variable.shape}: fill the model first"
            )
        pieces = each.split(np.asarray(value))
        state |= {name: np.array(piece, order="C") for name, piece in zip(each.names, pieces, strict=True)}
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
    missing = [f"{name} {shape or ''}".strip() for name, shape in wanted.items() if name not in state]
    misfits = [misfit for name, array in arrays.items() if (misfit := _misfit(name, array, wanted[name]))]
    values = (
        {} if missing or misfits else {id(each): each.join([arrays[name] for name in each.names]) for each in slots}
    )
    misfits += [
        f"{each.names[0]} became an array of shape {values[id(each)].shape} by arrays; the model wants {each.variable.shape}"
        for each in slots
        if id(each) in values and values[id(each)].shape != each.variable.shape
    ]
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
    for each in slots:
        variable = each.variable
        value = jnp.asarray(values[id(each)].astype(variable.dtype))  # a copy: no memory is shared with `state`
        old = variable.get_value()
        variable.set_value(jax.device_put(value, old.sharding) if isinstance(old, jax.Array) else value)


def _misfit(name: str, array: np.ndarray, shape: tuple[int, ...] | None) -> str | None:
    if shape is not None and array.shape != shape:
        return f"{name} has shape {array.shape}; the model wants {shape}{_order_hint(array.shape, shape)}"
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return f"{name} has dtype {array.dtype}; wanted floating-point numbers"
    return None


def _order_hint(given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Half a sentence, if `given` is `wanted` with the channels in another place."""
    rank = len(given)
    if rank != len(wanted) or rank < 2:
        return ""
    window = range(rank - 2)
    first_two, last_two = (1, 0, *range(2, rank)), (*window, rank - 1, rank - 2)
    reasons = {
        first_two: "a linear layer's is (out, in), a convolution's (out, in, *window), a transposed one's, for "
        "nnx.ConvTranspose, (in, out, *window)",
        last_two: "Flax's kernels are (*window, in, out)",
        (*range(2, rank), 1, 0): "PyTorch's order; Flax's is (*window, in, out)",
        (rank - 1, rank - 2, *window): "Flax's order; PyTorch's is (out, in, *window)",
    }
    for axes, reason in reasons.items():
        if tuple(given[axis] for axis in axes) == wanted:
            return f". array.transpose{axes} has that shape ({reason})"
    return ""


def _prefix_hint(wanted: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """A line naming the prefix, if all wanted names are in `state` behind the same prefix."""
    first = next(iter(wanted))
    prefixes = [name.removesuffix(first) for name in state if name.endswith(first)]
    fitting = [prefix for prefix in prefixes if prefix and all(prefix + name in state for name in wanted)]
    return [f"  all of these names are there with a prefix: prefix={prefix!r}" for prefix in fitting[:1]]
