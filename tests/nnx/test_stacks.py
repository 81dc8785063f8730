"""Stacks of layers, as `nnx.vmap` makes them for `nnx.scan`: each layer of the stack, or a refusal by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dcn_jax.linen
from dcn_jax.interop import from_linen, from_torch, to_linen, to_torch
from dcn_jax.nnx import DCNv3, DCNv4, DeformConv, MSDeformAttn, deformify
from tests.support.running import normal

pytestmark = pytest.mark.lenient
X = normal(2, 5, 6, 4)


def stack(make, number=3, **options):
    """`number` layers in one."""
    return nnx.vmap(make, **options)(nnx.Rngs(0).split(number))


def conv(rngs):
    return nnx.Conv(4, 4, (3, 3), bias_init=nnx.initializers.normal(1.0), rngs=rngs)


def deform(rngs):
    return DeformConv(4, 4, (3, 3), offset_kernel_init=nnx.initializers.normal(0.1), rngs=rngs)


def pick(layers, i):
    """Layer i of a stack, as the errors say."""
    graph, state = nnx.split(layers)
    return nnx.merge(graph, jax.tree.map(lambda array: array[i], state))


def scan(layers, x):
    """All layers of a stack, one after another."""
    return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers)


# The layers whose arrays PyTorch has, in a stack; and what each says of its axes.
REFUSED = {
    "Conv": conv,
    "ConvTranspose": lambda rngs: nnx.ConvTranspose(4, 4, (3, 3), rngs=rngs),
    "DeformConv": deform,
    "Linear": lambda rngs: nnx.Linear(4, 4, rngs=rngs),
    "Embed": lambda rngs: nnx.Embed(4, 4, rngs=rngs),
    "BatchNorm": lambda rngs: nnx.BatchNorm(4, rngs=rngs),
    "LayerNorm": lambda rngs: nnx.LayerNorm(4, rngs=rngs),
    "GroupNorm": lambda rngs: nnx.GroupNorm(4, 2, rngs=rngs),
    "DCNv3": lambda rngs: DCNv3(4, group=2, center_feature_scale=True, rngs=rngs),
    "DCNv4": lambda rngs: DCNv4(4, group=2, center_feature_scale=True, rngs=rngs),
    "MSDeformAttn": lambda rngs: MSDeformAttn(4, 2, 1, 2, rngs=rngs),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_takes_single_layers_refuses_stacks_by_name(name):
    made = nnx.Dict(block=nnx.eval_shape(lambda: stack(REFUSED[name])))
    message = r"block.* is a stack of layers, as nnx.vmap makes it: its arrays have 1 more axes"
    with pytest.raises(ValueError, match=message):
        to_torch(made)
    with pytest.raises(ValueError, match=message):
        from_torch(made, {})
    to_torch(nnx.Dict(block=REFUSED[name](nnx.Rngs(0))))


CALLED = {
    "DeformConv": (deform, (X,)),
    "DeformConv, offset": (deform, (X, jnp.zeros((5, 6, 18)))),
    "DCNv3": (REFUSED["DCNv3"], (X,)),
    "DCNv4": (REFUSED["DCNv4"], (X,)),
    "MSDeformAttn": (REFUSED["MSDeformAttn"], (jnp.ones((1, 4)), jnp.ones((1, 1, 2)), jnp.ones((20, 4)), ((4, 5),))),
}


@pytest.mark.parametrize("name", CALLED)
def test_a_kernel_with_an_axis_too_many_is_no_window(name):
    """Four layers of four channels: the axis of the stack could pass for one of channels."""
    make, arguments = CALLED[name]
    with pytest.raises(ValueError, match=r"kernel has shape \(4, .* axes; one layer's has .* nnx.scan or nnx.vmap"):
        stack(make, 4)(*arguments)


def test_linen_s_layers_refuse_stacked_parameters_too():
    """In Flax's words: a layer knows the shapes of its parameters."""
    params = jax.tree.map(lambda array: jnp.stack([array] * 3), to_linen(deform(nnx.Rngs(0))))
    with pytest.raises(Exception, match=r"expected.*shape.*\(3, 3, 3, 4, 4\)|\(3, 3, 3, 4, 27\)"):
        dcn_jax.linen.DeformConv(4, (3, 3)).apply({"params": params}, X)


def test_layers_from_pytorch_are_stacked_and_taken_apart():
    """As docs/migrating.md shows: single layers are filled, then their states are stacked."""
    layers = [deform(nnx.Rngs(seed)) for seed in range(3)]
    states = [to_torch(layer) for layer in layers]
    filled = [from_torch(nnx.eval_shape(lambda: deform(nnx.Rngs(0))), state) for state in states]
    graph = nnx.graphdef(filled[0])
    stacked = nnx.merge(graph, jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(nnx.state, filled)))
    y = X
    for layer in layers:
        y = layer(y)
    np.testing.assert_allclose(scan(stacked, X), y, rtol=1e-5, atol=1e-5)
    for i, state in enumerate(states):
        for name, array in to_torch(pick(stacked, i)).items():
            np.testing.assert_array_equal(array, state[name])


def test_linen_has_the_same_stacks():
    """`nn.scan` lays parameters out as `nnx.vmap` does: name for name, each layer of the stack."""

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return dcn_jax.linen.DeformConv(4, (3, 3), name="conv")(x), None

    layers = stack(deform)
    linen = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = {"conv": to_linen(layers)}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, jax.eval_shape(linen.init, jax.random.key(0), X, None)["params"]
    )
    y = scan(layers, X)
    np.testing.assert_allclose(linen.apply({"params": params}, X, None)[0], y, rtol=1e-5, atol=1e-5)
    back = from_linen(nnx.eval_shape(lambda: stack(deform)), params["conv"])
    np.testing.assert_array_equal(back.offset_conv.kernel[...], layers.offset_conv.kernel[...])


def test_deformify_does_each_layer_of_a_stack():
    """The same numbers at first, and branches of their own."""
    number = 5
    net = nnx.Dict(body=stack(conv, number))
    init = nnx.initializers.normal(1.0)
    copy = deformify(net, lambda path, module: True)
    assert (copy.body.kernel.shape, copy.body.offset_conv.kernel.shape) == ((number, 3, 3, 4, 4), (number, 3, 3, 4, 27))
    np.testing.assert_allclose(scan(copy.body, X), scan(net.body, X), rtol=1e-4, atol=1e-4)
    random = deformify(net, lambda path, module: True, offset_kernel_init=init).body.offset_conv.kernel[...]
    assert not np.array_equal(random[0], random[1])
    one = deformify(pick(net.body, 1), lambda path, module: True)
    np.testing.assert_allclose(pick(copy.body, 1)(X), one(X), rtol=1e-6)


def test_deformify_does_stacks_of_stacks():
    layers = nnx.vmap(lambda rngs: stack_of(rngs))(nnx.Rngs(0).split(2))
    copy = deformify(layers, lambda path, module: True)
    assert (copy.kernel.shape, copy.offset_conv.bias.shape) == ((2, 3, 3, 3, 4, 4), (2, 3, 27))


def stack_of(rngs):
    return nnx.vmap(conv)(rngs.split(3))


@pytest.mark.parametrize("number", [2, 3])
def test_deformify_refuses_stacks_along_another_axis(number):
    """Of 3 layers with 3 × 3 taps the kernel does not tell; the bias does."""
    layers = stack(conv, number, in_axes=0, out_axes=1)
    with pytest.raises(ValueError, match=r"the model itself cannot .* not stacked along the first axis"):
        deformify(layers, lambda path, module: True)
