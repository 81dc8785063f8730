"""A number that a model computes for one image: the node that one asks about."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax._core import checks

Node = Callable[[Any], Any] | int | Sequence[Any]


def value_of(node: Node, output: Any) -> jax.Array:
    """The node's value, from the model's output for a batch of one."""
    output = jax.tree.map(lambda array: array[0], output)
    if not callable(node) and not (hasattr(output, "shape") and _is_index(node)):
        raise TypeError(
            f"node={node!r} is not understood; wanted a function of the model's output for one image to a number, or "
            "an index into that output, if it is one array"
        )
    value = node(output) if callable(node) else output[tuple(node) if isinstance(node, Sequence) else node]
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        shapes = jax.tree.map(jnp.shape, output)
        raise ValueError(
            f"node gives an array of shape {jnp.shape(value)} and dtype {jnp.result_type(value)}; wanted a "
            f"floating-point number, from the model's output for one image, of shape {shapes}"
        )
    return jnp.asarray(value)


def _is_index(node: Any) -> bool:
    return checks.is_int(node) or (isinstance(node, Sequence) and all(map(checks.is_int, node)))
