"""`to_linen` and `from_linen`: the same numbers from both layers, and errors that list everything."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import dcn_jax.linen
import dcn_jax.nnx
from dcn_jax.interop import from_linen, to_linen
from tests.support.running import normal

pytestmark = pytest.mark.lenient

X = normal(2, 6, 5, 4)
OPTIONS = {"padding": 1, "offset_groups": 2, "offset_kernel_init": jax.nn.initializers.normal()}


def layers():
    return dcn_jax.linen.DeformConv(6, (3, 3), **OPTIONS), dcn_jax.nnx.DeformConv(
        4, 6, (3, 3), rngs=nnx.Rngs(0), **OPTIONS
    )


def test_both_ways_give_the_same_numbers():
    linen, layer = layers()
    params = to_linen(layer)
    other = nnx.eval_shape(lambda: layers()[1])
    assert from_linen(other, params) is other
    ours, theirs, back = jax.jit(lambda params: (layer(X), linen.apply({"params": params}, X), other(X)))(params)
    np.testing.assert_allclose(theirs, ours, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(back, ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrap", [dict, freeze, lambda params: {"params": params}])
def test_what_linen_makes_is_taken(wrap):
    linen, layer = layers()
    shapes = jax.eval_shape(linen.init, jax.random.key(3), X)["params"]
    params = jax.tree.map(lambda p: np.random.default_rng(0).normal(size=p.shape).astype(p.dtype), shapes)
    back = to_linen(from_linen(layer, wrap(params)))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_lists_are_numbered_as_linen_does():
    linen = flax.linen.Sequential([flax.linen.Dense(3), flax.linen.relu, flax.linen.Dense(2)])
    params = linen.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    from_linen(model, params)
    np.testing.assert_array_equal(model(jnp.ones((1, 4))), linen.apply({"params": params}, jnp.ones((1, 4))))
    assert jax.tree.structure(to_linen(model)) == jax.tree.structure(params)


def test_all_that_does_not_fit_is_listed_and_nothing_is_changed():
    _, layer = layers()
    before, params = to_linen(layer), to_linen(layer)
    del params["bias"]
    params["offset_conv"]["kernel"] = params["offset_conv"]["kernel"][..., :-1]
    params["kernel"] = params["kernel"] + 1
    with pytest.raises(ValueError, match="left as it was") as caught:
        from_linen(layer, params | {"scale": np.ones(3)})
    assert str(caught.value).splitlines()[1:] == [
        "  missing (1):",
        "    bias (6,)",
        "  unexpected (1):",
        "    scale (3,)",
        "  misshapen (1):",
        "    offset_conv/kernel has shape (3, 3, 4, 53); the model wants (3, 3, 4, 54)",
    ]
    jax.tree.map(np.testing.assert_array_equal, before, to_linen(layer))


def test_statistics_are_no_parameters():
    with pytest.raises(
        ValueError, match="variables that are not parameters:\n  mean is a BatchStat\n  var is a BatchStat"
    ):
        to_linen(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
