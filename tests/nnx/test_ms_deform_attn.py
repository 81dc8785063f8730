"""`dcn_jax.nnx.MSDeformAttn` as an nnx module: options, state, transformations."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcn_jax.nnx import MSDeformAttn
from tests.support import attn
from tests.support.running import assert_close

pytestmark = pytest.mark.lenient


def make(seed=0, **options):
    return MSDeformAttn(**(attn.SMALL | options), rngs=nnx.Rngs(seed))


def test_options_and_their_defaults():
    defaults = {name: p.default for name, p in inspect.signature(MSDeformAttn.__init__).parameters.items()}
    first = {"embed_dim": 256, "num_heads": 8, "num_levels": 4, "num_points": 4, "method": "linear", "dtype": None}
    assert dict(list(defaults.items())[1 : 1 + len(first)]) == first  # after self
    assert defaults["param_dtype"] == jnp.float32
    assert defaults["implementation"] is None


def test_a_call_leaves_the_layer_as_it_was():
    layer = nnx.eval_shape(make)
    before = jax.tree.structure(nnx.state(layer))
    nnx.eval_shape(lambda layer: layer(*attn.draw(), attn.LEVELS), layer)
    assert jax.tree.structure(nnx.state(layer)) == before
    assert before.num_leaves == 8


@pytest.mark.slow
@pytest.mark.parametrize("num_points", [2, [1, 2, 1]])
def test_jit_takes_the_layer_and_all_of_it_learns(num_points):
    layer = nnx.eval_shape(lambda: make(num_points=num_points))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(layer)):
        variable.set_value(jnp.asarray(rng.normal(0, 0.5, variable.shape), jnp.float32))
    query, points, value = attn.draw()

    @nnx.jit
    def run(layer, query, points, value):
        def loss(layer):
            y = layer(query, points, value, attn.LEVELS)
            return (y**2).sum(), y

        return nnx.grad(loss, has_aux=True)(layer)

    gradients, y = run(layer, query, points, value)
    assert_close(y, layer(query, points, value, attn.LEVELS), 1e-6)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.abs(gradient[...]).max() > 1e-4, path
