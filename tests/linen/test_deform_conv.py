"""`dcn_jax.linen.DeformConv` as a linen module: its signature, collections, and linen's own transformations."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax.core import freeze

from dcn_jax.linen import DeformConv
from tests.support.running import normal

pytestmark = pytest.mark.lenient
X = normal(2, 4, 5, 3)
OWN = {
    "offset_groups": 1,
    "modulated": True,
    "mask_scale": 1.0,
    "max_offset": None,
    "offset_kernel_init": nn.initializers.zeros,
    "offset_bias_init": nn.initializers.zeros,
    "implementation": None,
    "padding_mode": "zeros",
    "offset_conv_cls": None,
    "offset_branch": True,
    "offset_activation": None,
}
NORMAL = nn.initializers.normal(0.3)
noisy = functools.partial(DeformConv, offset_kernel_init=NORMAL)


def fields(layer):
    return {field.name: field.default for field in dataclasses.fields(layer)}


def test_it_takes_what_flax_s_conv_takes():
    """By the same names, order and defaults, less input_dilation and mask; then what only it has."""
    ours, flax_s = fields(DeformConv), fields(nn.Conv)
    for name in ("input_dilation", "mask"):
        del flax_s[name]
    assert list(ours) == [*[n for n in flax_s if n not in ("parent", "name")], *OWN, "parent", "name"]
    for name in flax_s.keys() - {
        "kernel_init"
    }:  # each lecun_normal() is a function of its own: test_layers.py compares it
        assert ours[name] == flax_s[name], name
    assert {name: ours[name] for name in OWN} == OWN


def test_init_and_apply_sow_only_where_it_is_asked_for():
    layer = DeformConv(4, (2, 2))
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    assert variables.keys() == {"params"}
    assert jax.eval_shape(layer.apply, variables, X).shape == (2, 4, 5, 4)
    _, seen = jax.eval_shape(functools.partial(layer.apply, mutable=["intermediates"]), variables, X)
    assert jax.tree.map(jnp.shape, seen) == {"intermediates": {"offset": ((2, 4, 5, 8),), "mask": ((2, 4, 5, 4),)}}


def test_capture_intermediates_finds_them_by_the_layer_s_name():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return DeformConv(2, (2, 2), name="second")(
                nn.relu(DeformConv(4, (2, 2), modulated=False, name="first")(x))
            )

    def look(x):
        return Net().init_with_output(jax.random.key(0), x, mutable=["params", "intermediates"])[1]["intermediates"]

    seen = jax.eval_shape(look, X)
    assert {name: set(layer) for name, layer in seen.items()} == {"first": {"offset"}, "second": {"offset", "mask"}}


def test_it_works_in_setup_and_shared():
    """One layer called twice: one set of parameters, two of each sown."""

    class Net(nn.Module):
        def setup(self):
            self.layer = noisy(3, (2, 2))

        def __call__(self, x):
            return self.layer(self.layer(x))

    variables = jax.eval_shape(Net().init, jax.random.key(0), X)
    assert set(variables["params"]) == {"layer"}
    _, seen = jax.eval_shape(functools.partial(Net().apply, mutable=["intermediates"]), variables, X)
    assert {name: len(values) for name, values in seen["intermediates"]["layer"].items()} == {"offset": 2, "mask": 2}


def test_frozen_parameters():
    layer = noisy(2, (2, 2))
    variables = jax.jit(lambda: layer.init(jax.random.key(0), X))()
    frozen, plain = (jax.jit(layer.apply)(v, X) for v in (freeze(variables), variables))
    np.testing.assert_array_equal(frozen, plain)


def test_partitioning_metadata_of_initializers_is_kept():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "features"))
    variables = jax.eval_shape(DeformConv(4, (2, 2), kernel_init=init).init, jax.random.key(0), X)
    assert variables["params"]["kernel"].names == (None, None, None, "features")
    assert nn.get_partition_spec(variables)["params"]["kernel"] == jax.P(None, None, None, "features")


def test_an_injected_convolution_makes_the_offsets():
    calls = []

    def conv(*args, **kwargs):
        calls.append(args)
        return jax.lax.conv_general_dilated(*args, **kwargs)

    for injected in ({"conv_general_dilated": conv}, {"conv_general_dilated_cls": lambda: conv}):
        layer = DeformConv(4, (2, 2), **injected)
        assert jax.eval_shape(layer.init_with_output, jax.random.key(0), X)[0].shape == (2, 4, 5, 4)
    assert len(calls) == 2


def test_scan_over_depth_equals_a_loop():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + noisy(3, (2, 2), name="layer")(x), None

    depth = 3
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)()
    params = jax.jit(lambda: stack.init(jax.random.key(0), X, None)["params"])()
    assert params["layer"]["kernel"].shape == (depth, 2, 2, 3, 3)

    @jax.jit
    def both(params, x):
        scanned, _ = stack.apply({"params": params}, x, None)
        for i in range(depth):
            x, _ = Block().apply({"params": jax.tree.map(lambda p, i=i: p[i], params)}, x, None)
        return scanned, x

    np.testing.assert_allclose(*both(params, X), rtol=1e-5, atol=1e-5)


def test_remat_changes_no_gradient():
    options = {"features": 2, "kernel_size": (2, 2), "offset_kernel_init": nn.initializers.normal(0.3)}
    plain, remat = DeformConv(**options), nn.remat(DeformConv)(**options)
    params = jax.jit(lambda: plain.init(jax.random.key(0), X)["params"])()

    def gradient(layer, params):
        return jax.grad(lambda p: (layer.apply({"params": p}, X) ** 2).sum())(params)

    expected, actual = jax.jit(lambda params: (gradient(plain, params), gradient(remat, params)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def test_nn_vmap_gives_each_its_own_parameters():
    ensemble = nn.vmap(DeformConv, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
    y, variables = jax.eval_shape(ensemble(4, (2, 2)).init_with_output, jax.random.key(0), X)
    assert y.shape == (3, 2, 4, 5, 4)
    assert variables["params"]["kernel"].shape == (3, 2, 2, 3, 4)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ("4", TypeError, "features='4' is a str; wanted an int"),
        (0, ValueError, "features=0 is too small; wanted at least 1"),
    ],
)
def test_features_that_make_no_sense(features, error, message):
    with pytest.raises(error, match=message):
        DeformConv(features, (2, 2)).init(jax.random.key(0), X)


def test_init_with_an_offset_makes_no_branch():
    """Nor does `apply` then want one; without the offset it does, and says what is missing."""
    layer, offset = DeformConv(4, (2, 2)), jnp.zeros((4, 5, 8))
    variables = jax.eval_shape(layer.init, jax.random.key(0), X, offset)
    assert variables["params"].keys() == {"kernel", "bias"}
    assert jax.eval_shape(layer.apply, variables, X, offset).shape == (2, 4, 5, 4)
    with pytest.raises(errors.ScopeParamNotFoundError, match="offset_conv"):
        jax.eval_shape(layer.apply, variables, X)


def test_remat_and_scan_over_frames_with_flow():
    """The arguments beside the input pass through linen's transformations: one layer, each frame with a flow of its own."""

    class Step(nn.Module):
        @nn.compact
        def __call__(self, carry, flow):
            carry = nn.remat(DeformConv)(3, (2, 2), offset_kernel_init=NORMAL, name="layer")(carry, base_offset=flow)
            return carry, carry

    scan = nn.scan(Step, variable_broadcast="params", split_rngs={"params": False})()
    flows = normal(3, 4, 5, 2, seed=1)
    params = jax.jit(lambda: scan.init(jax.random.key(0), X, flows)["params"])()

    @jax.jit
    def both(params):
        _, scanned = scan.apply({"params": params}, X, flows)
        layer, x, frames = DeformConv(3, (2, 2)), X, []
        for flow in flows:
            x = layer.apply({"params": params["layer"]}, x, base_offset=flow)
            frames.append(x)
        return scanned, jnp.stack(frames)

    np.testing.assert_allclose(*both(params), rtol=1e-5, atol=1e-5)
