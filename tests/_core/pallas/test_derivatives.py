"""Which derivatives are the kernels', and which those of the XLA form: here each bears a number of its own."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax._core.pallas.derivatives import by_kernels
from dcn_jax._core.platform_op import Op, platform_op, type_of


class Arrays(NamedTuple):
    x: jax.Array
    y: jax.Array


def form(spec, blocks, arrays):
    return arrays.x**3 * arrays.y


def twice_the_form(*given):
    """What stands for kernels."""
    return 2 * form(*given)


def three_times_its_gradients(spec, blocks, active, g, arrays):
    found = jax.vjp(functools.partial(form, spec, blocks), arrays)[1](g)[0]
    return {name: 3 * getattr(found, name) for name in active}


def op(x, y):
    made = by_kernels(twice_the_form, three_times_its_gradients, form, None)
    return platform_op(Op(None, type_of(jnp.add, x, y), made), Arrays(x, y))


def gradient(f, x, y):
    return jax.grad(lambda y: jnp.sum(f(x, y)))(y)  # by the second operand alone


@pytest.mark.parametrize(
    ("derive", "factor"),
    [
        (lambda f, x, y: f(x, y), 2),
        (gradient, 3),
        (lambda f, x, y: gradient(jax.vmap(f, (0, None)), x, y[0]), 3),  # one serves all
        (lambda f, x, y: jax.jvp(f, (x, y), (y, x))[1], 1),
        (lambda f, x, y: jax.jvp(lambda x: gradient(f, x, y), (x,), (y,))[1], 1),
        (lambda f, x, y: jax.grad(lambda x: jnp.sum(gradient(f, x, y)))(x), 1),
    ],
    ids=["result", "gradient", "gradient of a map", "tangent", "tangent of a gradient", "gradient of a gradient"],
)
def test_who_computes_what(derive, factor):
    x, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 3.0, 4.0])
    found, wanted = jax.jit(lambda x, y: (derive(op, x, y), derive(lambda x, y: x**3 * y, x, y)))(x, y)
    np.testing.assert_allclose(found, factor * wanted, rtol=1e-5)
