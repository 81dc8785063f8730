"""Layers with nothing to do: no queries, an empty batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dcn_jax.linen
import dcn_jax.nnx
from dcn_jax import ms_deform_attn

SHAPES = ((4, 5),)


def attention(batch, queries):
    return (jnp.ones((batch, queries, 8)), jnp.full((batch, queries, 1, 2), 0.5), jnp.ones((batch, 20, 8)))


def linen(layer, *arguments):
    made = [jnp.ones((1, *argument.shape[1:])) if argument.shape[0] == 0 else argument for argument in arguments[:3]]
    full = [jnp.ones((a.shape[0], max(a.shape[1], 1), *a.shape[2:])) for a in made]
    variables = layer.init(jax.random.key(0), *full, *arguments[3:])
    return lambda *arrays: layer.apply(variables, *arrays, *arguments[3:])


def check(f, arrays, shape):
    """Compiled and not, forward and gradients."""
    for run in (f, jax.jit(f)):
        assert run(*arrays).shape == shape
    gradients = jax.jit(jax.grad(lambda *arrays: jnp.sum(f(*arrays) ** 2), argnums=range(len(arrays))))(*arrays)
    assert all(not jnp.any(jnp.isnan(gradient)) for gradient in gradients)


@pytest.mark.lenient
@pytest.mark.parametrize(("batch", "queries"), [(2, 0), (0, 3)])
def test_attention(batch, queries):
    arrays = attention(batch, queries)
    layer = dcn_jax.nnx.MSDeformAttn(8, 2, 1, 2, rngs=nnx.Rngs(0))
    check(lambda *arrays: layer(*arrays, SHAPES), arrays, (batch, queries, 8))
    check(linen(dcn_jax.linen.MSDeformAttn(8, 2, 1, 2), *arrays, SHAPES), arrays, (batch, queries, 8))


@pytest.mark.parametrize("points_per_level", [None, (0, 0)])
@pytest.mark.parametrize("method", ["linear", "discrete"])
def test_attention_of_the_op_without_points(points_per_level, method):
    """The sum of nothing: zero, as are its gradients."""
    shape = (2, 3, 2, 2, 0, 2) if points_per_level is None else (2, 3, 2, 0, 2)
    arrays = jnp.ones((2, 24, 2, 4)), jnp.ones(shape), jnp.ones(shape[:-1])
    options = {"points_per_level": points_per_level, "method": method}

    def attend(*arrays):
        return ms_deform_attn(arrays[0], ((4, 5), (2, 2)), *arrays[1:], **options)

    check(attend, arrays, (2, 3, 8))
    assert not jnp.any(attend(*arrays))
    y, tangent = jax.jvp(attend, arrays, arrays)
    assert not jnp.any(tangent)
    (back,) = jax.linear_transpose(lambda value: attend(value, *arrays[1:]), arrays[0])(y)
    assert back.shape == arrays[0].shape
    assert not jnp.any(back)


def test_a_level_without_points_adds_nothing():
    """The first level, read by no point, may be full of NaN."""
    value = jax.random.normal(jax.random.key(0), (24, 2, 4)).at[:20].set(jnp.nan)
    locations, weights = jax.random.uniform(jax.random.key(1), (3, 2, 2, 2)), jnp.ones((3, 2, 2))

    def both(locations, weights, value):
        y = ms_deform_attn(value, ((4, 5), (2, 2)), locations, weights, points_per_level=(0, 2))
        return y, ms_deform_attn(value[20:], ((2, 2),), locations, weights, points_per_level=(2,))

    y, wanted = jax.jit(both)(locations, weights, value)
    np.testing.assert_array_equal(y, wanted)
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(both(*a)[0] ** 2), (0, 1)))(locations, weights, value)
    assert all(jnp.all(jnp.isfinite(each)) for each in gradient)


@pytest.mark.lenient
@pytest.mark.parametrize("name", ["DeformConv", "DCNv3", "DCNv4"])
def test_an_empty_batch(name):
    x = jnp.ones((0, 4, 5, 8))
    options = {"DeformConv": ((8, 8, (3, 3)), (8, (3, 3))), "DCNv3": ((8,), (8,)), "DCNv4": ((8,), (8,))}[name]
    group = {} if name == "DeformConv" else {"group": 1}
    check(getattr(dcn_jax.nnx, name)(*options[0], **group, rngs=nnx.Rngs(0)), (x,), x.shape)
    check(linen(getattr(dcn_jax.linen, name)(*options[1], **group), x), (x,), x.shape)
