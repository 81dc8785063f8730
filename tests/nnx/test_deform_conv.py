"""`dcn_jax.nnx.DeformConv` as an nnx module: its signature, its state, and nnx's own transformations."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dcn_jax.nnx import DeformConv
from tests.support.running import normal

pytestmark = pytest.mark.lenient
X = normal(2, 4, 5, 3)
OWN = {
    "offset_groups": 1,
    "modulated": True,
    "mask_scale": 1.0,
    "max_offset": None,
    "offset_kernel_init": nnx.initializers.zeros_init(),
    "offset_bias_init": nnx.initializers.zeros_init(),
    "implementation": None,
    "padding_mode": "zeros",
    "offset_conv_cls": None,
    "offset_branch": True,
    "offset_in_features": None,
    "offset_activation": None,
}


@pytest.fixture(scope="module")
def parts():
    """Graph and state of a layer whose offsets are not zero."""

    def make():
        return DeformConv(3, 3, (2, 2), offset_kernel_init=nnx.initializers.normal(0.3), rngs=nnx.Rngs(0))

    return nnx.graphdef(nnx.eval_shape(make)), jax.jit(lambda: nnx.state(make()))()


@pytest.fixture
def layer(parts):
    """That layer, merged anew."""
    return nnx.merge(*parts, copy=True)


def test_it_takes_what_flax_s_conv_takes():
    """By the same names, kinds, order and defaults, less input_dilation and mask; then what only it has."""
    ours = dict(inspect.signature(DeformConv.__init__).parameters)
    flax_s = dict(inspect.signature(nnx.Conv.__init__).parameters)
    for name in ("input_dilation", "mask"):
        del flax_s[name]
    assert list(ours) == [*flax_s, *OWN]
    for name, parameter in flax_s.items():
        assert ours[name].kind == parameter.kind, name
        if name != "kernel_init":  # each lecun_normal() is a function of its own: test_layers.py compares it
            assert ours[name].default == parameter.default, name
    assert {name: ours[name].default for name in OWN} == OWN


def test_its_state_is_its_parameters(layer):
    flat = nnx.to_flat_state(nnx.state(layer))
    assert {path for path, _ in flat} == {("kernel",), ("bias",), ("offset_conv", "kernel"), ("offset_conv", "bias")}
    assert all(type(variable) is nnx.Param for _, variable in flat)


def test_metadata():
    layer = DeformConv(3, 3, (2, 2), kernel_metadata={"a": 1}, bias_metadata={"b": 2}, rngs=nnx.Rngs(0))
    assert (layer.kernel.a, layer.bias.b) == (1, 2)


def test_split_and_merge(layer):
    graph, state = nnx.split(layer)
    merged, kept = jax.jit(lambda state, x: (nnx.merge(graph, state)(x), layer(x)))(state, X)
    np.testing.assert_array_equal(merged, kept)


# ---- looking at offset and mask


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = DeformConv(3, 4, (2, 2), modulated=False, rngs=rngs)
        self.second = DeformConv(4, 2, (2, 2), rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_capture_finds_what_each_layer_sows():
    """Called, jitted from outside, jitted from inside; and the model is the same afterwards."""
    net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    before = nnx.graphdef(net)
    expected = {"first": {"offset": ((2, 4, 5, 8),)}, "second": {"offset": ((2, 4, 5, 8),), "mask": ((2, 4, 5, 4),)}}

    inside = nnx.jit(lambda net, x: nnx.capture(net, nnx.Intermediate)(x))
    outside = nnx.jit(nnx.capture(nnx.Intermediate)(lambda net, x: net(x)))
    for look in (inside, outside):
        y, seen = nnx.eval_shape(look, net, X)
        assert y.shape == (2, 4, 5, 2)
        assert jax.tree.map(jnp.shape, nnx.to_pure_dict(seen)) == expected
        assert nnx.graphdef(net) == before


def test_outside_of_capture_it_keeps_nothing(layer):
    """And warns of nothing: plain `sow` does both, and fails in any layer that jax.jit, grad or vmap closes over."""
    before = nnx.graphdef(layer)
    layer(X)
    jax.jit(lambda x: layer(x))(X)
    assert nnx.graphdef(layer) == before
    assert not jax.tree.leaves(nnx.pop(layer, nnx.Intermediate))


def test_captures_of_another_kind_get_nothing(layer):
    _, seen = nnx.capture(layer, nnx.Perturbation)(X)
    assert not jax.tree.leaves(seen)


# ---- transformations


def loss(layer, x):
    return ((layer(x) - 1) ** 2).mean()


def test_jit_traces_once(layer):
    traces = []

    @nnx.jit
    def run(layer, x):
        traces.append(x)
        return layer(x)

    for _ in range(3):
        y = run(layer, X)
    assert len(traces) == 1
    np.testing.assert_allclose(y, layer(X), rtol=1e-5, atol=1e-5)


def test_an_optimizer_step_changes_every_parameter_and_lowers_the_loss(layer):
    optimizer = nnx.Optimizer(layer, optax.sgd(0.05), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(layer))

    @nnx.jit
    def step(layer, optimizer, x):
        value, gradients = nnx.value_and_grad(loss)(layer, x)
        optimizer.update(layer, gradients)
        return value

    values = [float(step(layer, optimizer, X)) for _ in range(5)]
    assert values[-1] < 0.9 * values[0]
    after = nnx.to_pure_dict(nnx.state(layer))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert all(jax.tree.leaves(changed)), changed


def test_a_layer_that_jax_closes_over(layer):
    """jax.jit, grad and vmap of functions that call it, without passing it."""
    together, mapped = jax.jit(lambda x: (layer(x), jax.vmap(layer)(x)))(X)
    np.testing.assert_allclose(together, mapped, rtol=1e-5, atol=1e-5)
    assert jax.eval_shape(jax.grad(lambda x: layer(x).sum()), X).shape == X.shape


def test_vmap_over_layers_and_scan_over_depth():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        normal = nnx.initializers.normal(0.3)
        return DeformConv(3, 3, (2, 2), offset_kernel_init=normal, rngs=nnx.Rngs(key))

    keys = jax.random.split(jax.random.key(0), 3)
    graph = nnx.graphdef(nnx.eval_shape(make, keys))
    state = jax.jit(lambda keys: nnx.state(make(keys)))(keys)
    assert state["kernel"].shape == (3, 2, 2, 3, 3)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def scanned(layer, x):
        return x + layer(x)

    @jax.jit
    def both(state, x):
        y = scanned(nnx.merge(graph, state), x)
        for i in range(3):
            x = x + nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], state))(x)
        return y, x

    np.testing.assert_allclose(*both(state, X), rtol=1e-5, atol=1e-5)


def test_remat_changes_no_gradient(layer):
    graph, state = nnx.split(layer)
    remat = nnx.remat(lambda layer, x: layer(x))

    def gradient(call, state):
        return jax.grad(lambda state: (call(nnx.merge(graph, state), X) ** 2).sum())(state)

    expected, actual = jax.jit(lambda s: (gradient(lambda layer, x: layer(x), s), gradient(remat, s)))(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def test_preferred_element_type():
    layer = DeformConv(3, 3, (2, 2), dtype=jnp.bfloat16, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0))
    assert jax.eval_shape(layer, X).dtype == jnp.float32


def test_an_injected_convolution_makes_the_offsets():
    calls = []

    def conv(*args, **kwargs):
        calls.append(args)
        return jax.lax.conv_general_dilated(*args, **kwargs)

    layer = DeformConv(3, 4, (2, 2), conv_general_dilated=conv, rngs=nnx.Rngs(0))
    assert jax.eval_shape(layer, X).shape == (2, 4, 5, 4)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["in_features", "out_features"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [("4", TypeError, "='4' is a str; wanted an int"), (0, ValueError, "=0 is too small; wanted at least 1")],
)
def test_features_that_make_no_sense(name, value, error, message):
    options = {"in_features": 3, "out_features": 3} | {name: value}
    with pytest.raises(error, match=f"^{name}{message}"):
        DeformConv(**options, kernel_size=(2, 2), rngs=nnx.Rngs(0))


def test_inputs_of_other_channels(layer):
    with pytest.raises(
        ValueError, match=r"inputs has shape \(4, 5, 4\); wanted \(\*batch, \*spatial, 3\) with 2 spatial"
    ):
        layer(jnp.ones((4, 5, 4)))


# ---- a branch or none


def test_without_a_branch_there_is_none():
    layer = DeformConv(3, 3, (2, 2), offset_branch=False, rngs=nnx.Rngs(0))
    assert layer.offset_conv is None
    assert {path for path, _ in nnx.to_flat_state(nnx.state(layer))} == {("kernel",), ("bias",)}


def test_layers_of_the_same_options_are_the_same_to_jit():
    """Their graphs are equal, the branch's own functions included: nnx.jit compiles once for both."""
    for options in ({}, {"dtype": jnp.bfloat16}, {"padding_mode": "wrap", "max_offset": (1.0, None)}):
        one, other = (
            nnx.graphdef(nnx.eval_shape(lambda o=options: DeformConv(3, 3, (2, 2), **o, rngs=nnx.Rngs(0))))
            for _ in "ab"
        )
        assert one == other
        assert hash(one) == hash(other)


def test_scan_over_frames_with_flow(layer):
    flows = normal(3, 4, 5, 2, seed=1)
    graph, state = nnx.split(layer)

    @nnx.scan(in_axes=(None, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def scanned(layer, x, flow):
        y = layer(x, base_offset=flow)
        return y, y

    @jax.jit
    def both(state):
        _, together = scanned(nnx.merge(graph, state), X, flows)
        x, frames = X, []
        for flow in flows:
            x = nnx.merge(graph, state)(x, base_offset=flow)
            frames.append(x)
        return together, jnp.stack(frames)

    np.testing.assert_allclose(*both(state), rtol=1e-5, atol=1e-5)


# ---- meshes of explicit axes


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"padding_mode": "wrap", "max_offset": (1.0, None)},
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_out_sharding_is_that_of_the_result(options):
    """As in Flax's Conv; by default the result lies as the input does. The numbers are those without a mesh."""
    layer = DeformConv(3, 4, (2, 2), offset_kernel_init=nnx.initializers.normal(0.3), **options, rngs=nnx.Rngs(0))
    x, base = normal(8, 4, 5, 3, seed=1), jnp.full((4, 5, 2), 0.25)
    wanted = layer(x, base_offset=base)
    graph, state = nnx.split(layer)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.P("data"))
        for spec in (None, jax.P(), jax.P(None, None, None, "model"), jax.NamedSharding(mesh, jax.P("model"))):
            y = jax.jit(lambda state, x, s=spec: nnx.merge(graph, state)(x, base_offset=base, out_sharding=s))(state, x)
            lies = jax.P("data") if spec is None else getattr(spec, "spec", spec)
            assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, lies), y.ndim)
            np.testing.assert_allclose(y.astype(jnp.float32), wanted.astype(jnp.float32), rtol=1e-2, atol=1e-2)
