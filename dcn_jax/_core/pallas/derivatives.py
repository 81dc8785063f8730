"""The algorithms of an op whose result and gradients are kernels; all its other derivatives are those of a form in XLA."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dcn_jax._core.platform_op import Algorithm, Algorithms


def by_kernels(result: Callable, gradients: Callable, by_xla: Callable, blocks: Any) -> tuple[Algorithms, ...]:
    """For `platform_op`: the algorithms of the op, of its first derivative, and of all higher ones.

    `result` and `by_xla`, (spec, blocks, operands) -> array, compute the same. Tangents, and the derivatives of gradients,
    are those of `by_xla`.
    """
    in_order = (result, gradients), (by_xla, gradients), (by_xla, _Gradients(by_xla))
    return tuple((("default", Algorithm(*both, blocks, gradients_can_be_mapped=True)),) for both in in_order)


class _Gradients(NamedTuple):
    """The gradients of `of`, as JAX finds them."""

    of: Callable

    def __call__(self, spec: Any, blocks: Any, active: tuple[str, ...], y_bar: jax.Array, operands: Any) -> dict:
        def of_active(moving):
            return self.of(spec, blocks, operands._replace(**moving))

        return jax.vjp(of_active, {name: getattr(operands, name) for name in active})[1](y_bar)[0]
