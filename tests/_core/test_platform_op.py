"""An op that is traced for one platform alone."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax._core.platform_op import Algorithm, Op, platform_op, type_of


class Arrays(NamedTuple):
    x: jax.Array
    y: jax.Array


def result(traced, number, arrays):
    """x³ · y times a number, that of the platform: so each use shows its own. `traced` collects them."""
    traced.append(number)
    return number * arrays.x**3 * arrays.y


def gradients(traced, number, active, bar, arrays):
    found = jax.vjp(functools.partial(result, traced, number), arrays)[1](bar)[0]
    return {name: getattr(found, name) for name in active}


class Traced(list):
    """A list that an op may hold: hashed as the object that it is."""

    __hash__ = object.__hash__


def make(traced, *orders, result=result, gradients=gradients, **options):
    """An op whose algorithms bear numbers: for each order of derivative, one by platform."""
    orders = orders or ({"default": 1, "cpu": 2, "tpu": 3},)
    made = tuple(
        tuple((platform, Algorithm(result, gradients, number, **options)) for platform, number in numbers.items())
        for numbers in orders
    )
    return lambda x, y: platform_op(Op(traced, type_of(jnp.add, x, y), made), Arrays(x, y))


@pytest.mark.parametrize(
    ("platforms", "parts"), [(["cpu"], {2}), (["cuda"], {1}), (["tpu"], {3}), (["cpu", "tpu"], {2, 3})]
)
def test_only_the_platforms_that_are_lowered_for_are_traced(platforms, parts):
    traced = Traced()
    op = make(traced)
    call = jax.jit(lambda x: jax.vjp(lambda x: op(x, x), x)[1](x))
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    jax.export.export(call, platforms=platforms)(x)
    assert set(traced) == parts


def test_derivatives_of_every_order_and_maps():
    x, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 3.0, 4.0])
    f = make(Traced())
    g = lambda x, y: 2 * x**3 * y  # noqa: E731
    for derive in (
        lambda f: f(x, y),
        lambda f: jax.jvp(f, (x, y), (y, x))[1],
        lambda f: jax.grad(lambda x: jnp.sum(jax.grad(lambda y: jnp.sum(f(x, y) ** 2))(y) ** 2))(x),
        lambda f: jax.hessian(lambda x: jnp.sum(f(x, y)))(x),
        lambda f: jax.vmap(jax.grad(f), in_axes=(0, None))(x, y[0]),
    ):
        np.testing.assert_allclose(jax.jit(lambda f=f, derive=derive: derive(f))(), derive(g), rtol=1e-5)


def test_each_order_of_derivative_has_its_algorithm():
    traced = Traced()
    op = make(traced, *({"default": order} for order in range(3)))
    f = lambda x: jnp.sum(op(x, x))  # noqa: E731
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    for derive, orders in ((f, {0}), (jax.grad(f), {1}), (jax.grad(lambda x: jnp.sum(jax.grad(f)(x))), {2})):
        traced.clear()
        jax.export.export(jax.jit(derive))(x)
        assert set(traced) == orders


@pytest.mark.parametrize("own", [False, True])
def test_the_gradient_of_a_map_may_be_a_map_of_gradients(own):
    """Otherwise JAX transposes the result. An array that serves all has the sum of theirs."""

    def seven_times(*given):
        return {name: 7 * g for name, g in gradients(*given).items()}

    op = make(Traced(), gradients=seven_times, gradients_can_be_mapped=own)
    x, y, z = jnp.arange(6.0).reshape(2, 3), jnp.ones((3, 2)), jnp.array([1.0, 2.0, 4.0])

    def gradient(f):
        def of_all(x, y, z):
            one_y = jax.vmap(jax.vmap(f, (0, None)), (0, None))(x[None], z)
            return jnp.sum(jax.vmap(f, (0, 1))(x, y) ** 2) + jnp.sum(one_y**2)

        return jax.jit(jax.grad(of_all, (0, 1, 2)))(x, y, z)

    wanted = gradient(lambda x, y: 2 * x**3 * y)
    for found, expected in zip(gradient(op), wanted, strict=True):
        np.testing.assert_allclose(found, (7 if own else 1) * expected, rtol=1e-5)


def test_settings_are_those_of_the_call_and_not_of_the_lowering():
    op = make(Traced(), result=lambda _, number, arrays: arrays.x @ arrays.y)
    with jax.default_matmul_precision("highest"):
        traced = jax.jit(lambda x: op(x, x)).trace(jnp.ones((2, 2)))
    assert "HIGHEST" in traced.lower().as_text()
