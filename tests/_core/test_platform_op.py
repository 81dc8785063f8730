"""A computation that is traced for one platform alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax._core.platform_op import Computation, by_platform

PARTS = (("default", 1), ("cpu", 2), ("tpu", 3))


def computation(traced):
    """x³ · y times the number of parts, which `traced` collects: so each use shows its own number."""

    def compute(parts, x, y):
        traced.append(parts)
        return parts * x**3 * y

    def gradients(parts, active, bar, x, y):
        return [jax.vjp(lambda *arrays: compute(parts, *arrays), x, y)[1](bar)[i] for i in active]

    return Computation(compute, gradients, lambda x, y: x + y, (PARTS,))


@pytest.mark.parametrize(
    ("platforms", "parts"), [(["cpu"], {2}), (["cuda"], {1}), (["tpu"], {3}), (["cpu", "tpu"], {2, 3})]
)
def test_only_the_platforms_that_are_lowered_for_are_traced(platforms, parts):
    traced = []
    call = jax.jit(lambda x: jax.vjp(lambda x: by_platform(computation(traced), x, x), x)[1](x))
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    jax.export.export(call, platforms=platforms)(x)
    assert set(traced) == parts


def test_derivatives_of_every_order_and_maps():
    x, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 3.0, 4.0])
    f = lambda x, y: by_platform(computation([]), x, y)  # noqa: E731
    g = lambda x, y: 2 * x**3 * y  # noqa: E731
    for derive in (
        lambda f: f(x, y),
        lambda f: jax.jvp(f, (x, y), (y, x))[1],
        lambda f: jax.grad(lambda x: jnp.sum(jax.grad(lambda y: jnp.sum(f(x, y) ** 2))(y) ** 2))(x),
        lambda f: jax.hessian(lambda x: jnp.sum(f(x, y)))(x),
        lambda f: jax.vmap(jax.grad(f), in_axes=(0, None))(x, y[0]),
    ):
        np.testing.assert_allclose(jax.jit(lambda f=f, derive=derive: derive(f))(), derive(g), rtol=1e-5)


def test_each_order_of_derivative_has_its_parts():
    traced = []
    parts = tuple((("default", order),) for order in range(3))
    made = computation(traced)._replace(parts=parts)
    f = lambda x: jnp.sum(by_platform(made, x, x))  # noqa: E731
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    for derive, orders in ((f, {0}), (jax.grad(f), {1}), (jax.grad(lambda x: jnp.sum(jax.grad(f)(x))), {2})):
        traced.clear()
        jax.export.export(jax.jit(derive))(x)
        assert set(traced) == orders


@pytest.mark.parametrize("own", [False, True])
def test_the_gradient_of_a_map_may_be_a_map_of_gradients(own):
    """Else JAX goes through `compute`. An array that serves all has the sum of theirs."""
    made = computation([])._replace(gradients_of_maps=own)
    marked = made._replace(gradients=lambda *given: [7 * g for g in made.gradients(*given)])
    x, y, z = jnp.arange(6.0).reshape(2, 3), jnp.ones((3, 2)), jnp.array([1.0, 2.0, 4.0])

    def gradient(f):
        def of_all(x, y, z):
            one_y = jax.vmap(jax.vmap(f, (0, None)), (0, None))(x[None], z)
            return jnp.sum(jax.vmap(f, (0, 1))(x, y) ** 2) + jnp.sum(one_y**2)

        return jax.jit(jax.grad(of_all, (0, 1, 2)))(x, y, z)

    wanted = gradient(lambda x, y: 2 * x**3 * y)
    for found, expected in zip(gradient(lambda *arrays: by_platform(marked, *arrays)), wanted, strict=True):
        np.testing.assert_allclose(found, (7 if own else 1) * expected, rtol=1e-5)


def test_settings_are_those_of_the_call_and_not_of_the_lowering():
    product = Computation(lambda _, x, y: x @ y, lambda *_: [], lambda x, y: x @ y, (PARTS,))
    with jax.default_matmul_precision("highest"):
        traced = jax.jit(lambda x: by_platform(product, x, x)).trace(jnp.ones((2, 2)))
    assert "HIGHEST" in traced.lower().as_text()
