"""An op that kernels compute, and its gradients; all its other derivatives are those of a form in XLA."""

from collections.abc import Callable
from typing import Any

import jax

from dcn_jax._core.platform_op import Computation, by_platform

_ORDERS = tuple((("default", order),) for order in ("result", "gradients", "what follows"))


def by_kernels(op: Callable, pull: Callable, by_xla: Callable, operands: Any, holds: Any = None) -> jax.Array:
    """`op(operands)`, with the gradients `pull(operands, g)` at `g`, that of the result, like the operands.

    Tangents, and what is derived from the gradients, are those of `by_xla(operands)`, which computes the same as `op`.
    """
    leaves, tree = jax.tree.flatten(operands)

    def compute(order, *leaves):
        return (op if order == "result" else by_xla)(tree.unflatten(leaves))

    def gradients(order, active, g, *leaves):
        if order == "gradients":
            found = jax.tree.leaves(pull(tree.unflatten(leaves), g))
            return [found[i] for i in active]

        def of_active(*moving):
            moved = dict(zip(active, moving, strict=True))
            return by_xla(tree.unflatten(moved.get(i, leaf) for i, leaf in enumerate(leaves)))

        return list(jax.vjp(of_active, *(leaves[i] for i in active))[1](g))

    def result_type(*leaves):
        return by_xla(tree.unflatten(leaves))

    return by_platform(
        Computation(compute, gradients, result_type, _ORDERS, gradients_of_maps=True, holds=holds), *leaves
    )
