"""`dcn_jax.linen.MSDeformAttn` as a linen module: options, collections, transformations."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax.linen import MSDeformAttn
from tests.support import attn
from tests.support.running import assert_close

pytestmark = pytest.mark.lenient
small = functools.partial(MSDeformAttn, **attn.SMALL)


def variables_of(layer, *arguments):
    return jax.eval_shape(lambda: layer.init(jax.random.key(0), *arguments))


def test_options_and_their_defaults():
    fields = {field.name: field.default for field in dataclasses.fields(MSDeformAttn)}
    first = {"embed_dim": 256, "num_heads": 8, "num_levels": 4, "num_points": 4, "method": "linear", "dtype": None}
    assert dict(list(fields.items())[: len(first)]) == first
    assert fields["param_dtype"] == jnp.float32
    assert fields["implementation"] is None


def test_init_and_apply_sow_only_where_it_is_asked_for():
    layer, arguments = small(), (*attn.draw(), attn.LEVELS)
    variables = variables_of(layer, *arguments)
    assert variables.keys() == {"params"}
    assert variables["params"].keys() == {"sampling_offsets", "attention_weights", "value_proj", "output_proj"}
    assert jax.eval_shape(lambda v: layer.apply(v, *arguments), variables).shape == (2, 5, 8)


def test_capture_intermediates_finds_them_by_the_layer_s_name():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, *arguments):
            return small(name="cross")(*arguments)

    arguments = (*attn.draw(), attn.LEVELS)
    look = functools.partial(Net().init_with_output, mutable=["params", "intermediates"])
    _, variables = jax.eval_shape(lambda: look(jax.random.key(0), *arguments))
    assert variables["intermediates"]["cross"].keys() == {"sampling_locations", "sampling_weights"}


@pytest.mark.slow
def test_remat_takes_the_sizes_as_static():
    query, points, value = attn.draw()
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda p: np.float32(rng.normal(0, 0.5, p.shape)), variables_of(small(), query, points, value, attn.LEVELS)
    )

    def gradient(kind):
        layer = kind(**attn.SMALL)
        return jax.grad(lambda v: (layer.apply(v, query, points, value, attn.LEVELS) ** 2).sum())(variables)

    plain, again = jax.jit(lambda: [gradient(k) for k in (MSDeformAttn, nn.remat(MSDeformAttn, static_argnums=4))])()
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), again, plain)


def test_sizes_that_are_traced_are_refused():
    layer, arguments = small(), (*attn.draw(), attn.LEVELS)
    with pytest.raises(TypeError, match="as ints that are known when the function is traced"):
        jax.eval_shape(layer.init, jax.random.key(0), *arguments)
