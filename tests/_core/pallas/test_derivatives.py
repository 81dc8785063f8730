"""Which derivatives are the kernels', and which those of the XLA form: here each bears a number of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax._core.pallas.derivatives import by_kernels


def form(operands):
    x, y = operands
    return x**3 * y


def op(x, y):
    """Twice the form, by what stands for kernels; its gradients by them are three times those of the form."""

    def pull(operands, g):
        return jax.tree.map(lambda bar: 3 * bar, jax.vjp(form, operands)[1](g)[0])

    return by_kernels(lambda operands: 2 * form(operands), pull, form, (x, y))


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
    found, wanted = jax.jit(lambda x, y: (derive(op, x, y), derive(lambda *operands: form(operands), x, y)))(x, y)
    np.testing.assert_allclose(found, factor * wanted, rtol=1e-5)
