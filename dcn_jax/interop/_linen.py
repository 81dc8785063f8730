"""Parameters from nnx layers to linen layers and back; both have the same names."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from flax import nnx
from flax.traverse_util import unflatten_dict

from dcn_jax.interop._fill import Slot, fill, read, slot, variables

Layer = TypeVar("Layer", bound=nnx.Module)


def to_linen(layer: nnx.Module) -> dict[str, Any]:
    """The parameters of an nnx layer, as nested dictionaries for the linen layer of the same name.

        params["offset_conv"]["kernel"] = layer.offset_conv.kernel

    Args:
        layer: an nnx layer. In a list of modules, `layers[0]` becomes `layers_0`, as in linen. A
            stack of layers (`nnx.vmap`) becomes the parameters of linen's stack (`nn.scan`).

    Returns:
        NumPy arrays: the value of "params" in linen's variables.

    Raises:
        ValueError: the layer has variables that are not parameters, such as a batch norm's
            statistics; the message names them.
        TypeError: `layer` is not an `nnx.Module`.

    Source: `flax.linen` and `flax.nnx`, whose layers share their parameters' names.

    Example:
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DeformConv
        >>> params = to_linen(DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(0)))
        >>> params["offset_conv"]["kernel"].shape
        (3, 3, 4, 27)
    """
    slots, problems = _slots(layer)
    if problems:
        raise ValueError("\n  ".join(["the layer has variables that are not parameters:", *problems]))
    return unflatten_dict(read(slots), sep="/")


def from_linen(layer: Layer, params: Mapping[str, Any]) -> Layer:
    """Fill an nnx layer from the parameters of the linen layer of the same name, and return it.

        layer.offset_conv.kernel = params["offset_conv"]["kernel"]

    Args:
        layer: the nnx layer, made with the same options. It may be abstract (`nnx.eval_shape`).
        params: linen's dictionary or `FrozenDict`, with or without the outer "params".

    Returns:
        `layer` itself.

    Raises:
        ValueError: arrays are missing, unexpected or misshapen. The message lists all of it; the
            layer stays as it was.
        TypeError: `layer` is not an `nnx.Module`.

    Source: `flax.linen` and `flax.nnx`, whose layers share their parameters' names.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DeformConv
        >>> branch = {"kernel": np.zeros((1, 1, 4, 3)), "bias": np.zeros(3)}
        >>> params = {"kernel": np.ones((1, 1, 4, 8)), "bias": np.zeros(8), "offset_conv": branch}
        >>> layer = from_linen(DeformConv(4, 8, (1, 1), rngs=nnx.Rngs(0)), params)
        >>> float(layer.kernel[0, 0, 0, 0])
        1.0
    """
    state = dict(_flat(params["params"] if set(params) == {"params"} else params))
    slots, problems = _slots(layer)
    known = {name for each in slots for name in each.names}
    fill(slots, state, unexpected=[name for name in state if name not in known], problems=problems)
    return layer


def _slots(layer: Any) -> tuple[list[Slot], list[str]]:
    """The slots of a layer's parameters, and a sentence for each other variable."""
    found = [("/".join(_linen_path(path)), variable) for path, variable in variables(layer)]
    problems = [f"{name} is a {type(v).__name__}" for name, v in found if not isinstance(v, nnx.Param)]
    return [slot(variable, name) for name, variable in found if isinstance(variable, nnx.Param)], problems


def _linen_path(path: tuple) -> list[str]:
    """The path in linen: a number is joined to the name before it."""
    names: list[str] = []
    for key in path:
        if isinstance(key, int) and names:
            names[-1] += f"_{key}"
        else:
            names.append(str(key))
    return names


def _flat(params: Mapping[str, Any], *above: str) -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, *above, name)
        else:
            yield "/".join((*above, name)), value
