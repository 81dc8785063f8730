"""Parameters of the user's own modules: `nnx.Param`s that belong to no layer of Flax or of dcn_jax."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from dcn_jax.interop._fill import SAME, Order
from dcn_jax.interop._layouts import NAMES

Rules = Mapping[str, Callable[[np.ndarray], np.ndarray]]

_CONTAINERS = (nnx.List, nnx.Dict)


def is_own(path: tuple, variable: Any, nodes: Mapping[tuple, Any]) -> bool:
    """Whether a variable is an `nnx.Param` that a module of the user's has as an attribute, or in a container."""
    if not isinstance(variable, nnx.Param):
        return False
    above = [nodes[path[:i]] for i in range(len(path)) if isinstance(nodes.get(path[:i]), nnx.Module)]
    owner = next((node for node in reversed(above) if not isinstance(node, _CONTAINERS)), nnx.Module())
    of_flax = [cls for cls in type(owner).__mro__ if cls.__module__.split(".")[0] == "flax"]
    return all(cls in NAMES or cls in nnx.Module.__mro__ for cls in of_flax)


def order_of(name: str, shape: tuple[int, ...], arrays: Rules, *, to_torch: bool) -> Order | str:
    """How PyTorch's array of a parameter of one's own lies, or a sentence that asks for it."""
    if (key := rule_of(name, arrays)) is not None:
        return Order(arrays[key], None) if to_torch else Order(None, arrays[key])
    if len(shape) <= 1:
        return SAME
    way = "it becomes PyTorch's array" if to_torch else "PyTorch's array becomes it"
    return (
        f"{name} {shape}: a parameter of your own with {len(shape)} axes; say how {way}: "
        f"arrays={{{name.rpartition('.')[2]!r}: lambda array: array}} if the axes are the same, or a function that "
        "transposes them"
    )


def rule_of(name: str, arrays: Rules) -> str | None:
    """The key of `arrays` that is the longest end of a dotted name."""
    parts = name.split(".")
    return next((end for i in range(len(parts)) if (end := ".".join(parts[i:])) in arrays), None)


def check_rules(arrays: Any, own: list[str]) -> None:
    """Raise if `arrays` is no mapping to functions, or one of its keys is the end of no name in `own`."""
    if not isinstance(arrays, Mapping) or not all(map(callable, arrays.values())):
        raise TypeError(f"arrays={arrays!r}; wanted a dictionary from names of parameters of your own to functions")
    used = {rule_of(name, arrays) for name in own}
    if unused := [key for key in arrays if key not in used]:
        raise ValueError(
            f"arrays has {unused[0]!r}, but the model has no parameter of its own of that name; it has {own or 'none'}"
        )
