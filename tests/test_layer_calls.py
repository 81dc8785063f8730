"""How both layers are called: offsets from outside, another branch or none, and a bound for each axis."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dcn_jax
from tests.support.layers import FRAMEWORKS, PLAIN, fill, linen, nnx_
from tests.support.running import normal

pytestmark = pytest.mark.lenient
X = normal(2, 5, 6, 4)
OFFSET = normal(2, 5, 6, 2 * 4 * 2, seed=1)
MASK = jnp.asarray(np.random.default_rng(2).random((2, 5, 6, 2 * 4)), jnp.float32)
OTHER = normal(2, 5, 6, 7, seed=3)


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return request.param


@pytest.fixture
def make(framework):
    """A function that makes the layer of one framework."""
    return FRAMEWORKS[framework]


def without_branch(make, kernel_size=(2, 2), **options):
    """A layer without a branch, and its parameters: kernel and bias alone."""
    layer = make(4, 6, kernel_size, offset_branch=False, beside={"offset": jnp.zeros((5, 5, 8))}, **options)
    params = fill(layer)
    assert params.keys() == {"kernel", "bias"}
    return layer, params


# ---- offsets from outside


@pytest.mark.parametrize("mask", [None, MASK], ids=["mask of ones", "mask"])
@pytest.mark.parametrize("modulated", [True, False])
def test_an_offset_from_outside_is_used_as_it_is(make, mask, modulated):
    """No bound and no scale, any number of offset groups, and no branch that runs."""
    layer = make(4, 6, (2, 2), max_offset=0.1, mask_scale=2.0, modulated=modulated)
    params = fill(layer)
    y, seen = jax.jit(lambda p, *args: (layer.apply(p, *args), layer.look(p, *args)))(params, X, OFFSET, mask)
    wanted = jax.jit(dcn_jax.deform_conv)(X, params["kernel"], OFFSET, mask, params["bias"])
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(seen.pop("offset"), OFFSET)
    if mask is not None:
        np.testing.assert_array_equal(seen.pop("mask"), mask)
    assert seen == {}
    assert "conv_general_dilated" not in str(jax.make_jaxpr(layer.apply)(params, X, OFFSET, mask))


def test_without_a_branch_there_are_no_parameters_of_one(make):
    layer, params = without_branch(make)
    y = jax.jit(layer.apply)(params, X, OFFSET, MASK)
    np.testing.assert_allclose(
        y, jax.jit(dcn_jax.deform_conv)(X, params["kernel"], OFFSET, MASK, params["bias"]), rtol=1e-5, atol=1e-5
    )


def test_one_offset_and_mask_serve_all_images(make):
    """Their gradients have the shapes that were given."""
    layer, params = without_branch(make)

    @jax.jit
    def values_and_gradients(offset, mask):
        return jax.value_and_grad(lambda *args: (layer.apply(params, X, *args) ** 2).sum(), (0, 1))(offset, mask)

    value, gradients = values_and_gradients(OFFSET[0], MASK[:1])
    full, wanted = values_and_gradients(jnp.stack([OFFSET[0]] * 2), jnp.stack([MASK[0]] * 2))
    np.testing.assert_allclose(value, full, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], wanted[0].sum(0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(gradients[1], wanted[1].sum(0, keepdims=True), rtol=1e-3, atol=1e-3)


# ---- what the branch sees, and what is added to what it emits


def test_the_branch_sees_other_features(make):
    """As many channels as they have; the result is that of the offsets that come of them."""
    layer = make(4, 6, (2, 2), offset_groups=2, beside={"offset_inputs": jnp.zeros((5, 5, 7))})
    params = fill(layer)
    assert params["offset_conv"]["kernel"].shape == (2, 2, 7, 24)

    @jax.jit
    def both(params):
        seen = layer.look(params, X, offset_inputs=OTHER)
        z = jax.lax.conv_general_dilated(
            OTHER, params["offset_conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return seen, z + params["offset_conv"]["bias"], layer.apply(params, X, offset_inputs=OTHER)

    seen, z, y = both(params)
    np.testing.assert_allclose(seen["offset"], z[..., :16], rtol=1e-4, atol=1e-4)
    wanted = jax.jit(dcn_jax.deform_conv)(X, params["kernel"], **seen, bias=params["bias"])
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 6, 2), (2, 5, 6, 16), (5, 6, 2), (1, 5, 6, 16)])
def test_a_base_offset_is_added_after_the_bound(make, shape):
    """One displacement for all taps, (dy, dx), or one for each; far beyond the bound."""
    layer = make(4, 6, (2, 2), offset_groups=2, max_offset=0.5)
    params, base = fill(layer), 4 * normal(*shape, seed=4)

    @jax.jit
    def with_and_without(params, base):
        return layer.look(params, X), layer.look(params, X, base_offset=base), layer.apply(params, X, base_offset=base)

    plain, moved, y = with_and_without(params, base)
    per_tap = np.tile(base, 8) if shape[-1] == 2 else base  # numpy repeats the last axis whole: dy, dx, dy, dx, …
    np.testing.assert_allclose(moved["offset"], plain["offset"] + per_tap, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(moved["mask"], plain["mask"])
    wanted = jax.jit(dcn_jax.deform_conv)(X, params["kernel"], **moved, bias=params["bias"])
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(moved["offset"]).max() > 4


def test_gradients_reach_the_other_features_and_the_base_offset(make):
    layer = make(4, 6, (2, 2), beside={"offset_inputs": jnp.zeros((5, 5, 7))})
    params, base = fill(layer), jnp.full((5, 6, 2), 0.3)
    gradients = jax.jit(
        jax.grad(lambda o, b: (layer.apply(params, X, offset_inputs=o, base_offset=b) ** 2).sum(), (0, 1))
    )(OTHER, base)
    assert [g.shape for g in gradients] == [OTHER.shape, base.shape]
    assert all(np.all(np.isfinite(g)) and np.any(g) for g in gradients)


# ---- a branch of the user's own


class LinenBranch(nn.Module):
    """Two layers, the first of which sees 5 × 5 pixels."""

    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Conv(self.features, (1, 1), name="last")(nn.relu(nn.Conv(3, (5, 5), name="first")(x)))


class NnxBranch(nnx.Module):
    def __init__(self, in_features, features, *, rngs):
        self.first = nnx.Conv(in_features, 3, (5, 5), rngs=rngs)
        self.last = nnx.Conv(3, features, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


OWN = {
    "another kernel": {name: functools.partial(conv, kernel_size=(1, 1)) for name, conv in PLAIN.items()},
    "several layers": {"linen": LinenBranch, "nnx": NnxBranch},
}


@pytest.mark.parametrize("name", OWN)
def test_a_branch_of_one_s_own(name):
    """The same parameters under `offset_conv`, the same numbers; what it emits is read as the default branch's is."""
    ours, theirs = (
        made(4, 6, (2, 2), offset_groups=2, max_offset=1.5, offset_conv_cls=OWN[name][framework])
        for framework, made in FRAMEWORKS.items()
    )
    params = fill(ours)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(theirs.init))
    assert set(params["offset_conv"]) == ({"first", "last"} if name == "several layers" else {"kernel", "bias"})
    branch = OWN[name]["linen"](24)

    @jax.jit
    def all_three(params, x):
        z = branch.apply({"params": params["offset_conv"]}, x)
        mask = jax.nn.sigmoid(z[..., 16:])
        wanted = dcn_jax.deform_conv(x, params["kernel"], 1.5 * jnp.tanh(z[..., :16] / 1.5), mask, params["bias"])
        return ours.apply(params, x), theirs.apply(params, x), wanted

    linen_y, nnx_y, wanted = all_three(params, X)
    np.testing.assert_array_equal(linen_y, nnx_y)
    np.testing.assert_allclose(linen_y, wanted, rtol=1e-4, atol=1e-4)


def test_a_branch_of_one_s_own_gets_its_inputs_unpadded(make, framework):
    shapes = []

    def branch(*args, **kwargs):
        module = PLAIN[framework](*args, kernel_size=(1, 1), **kwargs)
        if framework == "nnx":
            return Spy(module, shapes)
        return lambda x: shapes.append(x.shape) or module(x)

    layer = make(4, 6, (3, 3), padding_mode="wrap", offset_conv_cls=branch)
    jax.eval_shape(layer.apply, jax.eval_shape(layer.init), X)
    assert shapes[-1] == X.shape


class Spy(nnx.Module):
    def __init__(self, module, shapes):
        self.module = module
        self.seen = shapes.append

    def __call__(self, x):
        self.seen(x.shape)
        return self.module(x)


# ---- a bound for each axis


@pytest.mark.parametrize("make_one", [linen, nnx_])
@pytest.mark.parametrize("max_offset", [(0, 1.5, None), [2, 2, 2], (None, None, None), 0, (0.0, 0.0, 0.0), (3, 0, 0.5)])
def test_each_axis_has_a_bound_of_its_own(make_one, max_offset):
    layer = make_one(4, 2, (1, 2, 1), offset_groups=2, max_offset=max_offset)
    params, x = fill(layer), normal(3, 4, 5, 4, seed=5)
    free = make_one(4, 2, (1, 2, 1), offset_groups=2)
    bounded, z = (each.reshape(*x.shape[:-1], -1, 3) for each in jax.jit(
        lambda p: (layer.look(p, x)["offset"], free.look(p, x)["offset"])
    )(params))  # fmt: skip
    for axis, bound in enumerate(max_offset if isinstance(max_offset, (tuple, list)) else (max_offset,) * 3):
        along, wanted = bounded[..., axis], z[..., axis]
        if bound is not None:
            wanted = bound * np.tanh(wanted / bound) if bound else np.zeros_like(wanted)
        np.testing.assert_allclose(along, wanted, rtol=1e-4, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda p: (layer.apply(p, x) ** 2).sum()))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_a_layer_whose_depth_stays_undeformed(make):
    """max_offset=(0, …): each slice is convolved as if it were alone, whatever the branch emits."""
    layer = make(4, 6, (1, 2, 2), max_offset=(0, 8, 8))
    params, x = fill(layer), normal(3, 4, 5, 4, seed=6)
    flat = jax.jit(lambda p, x: jnp.stack([layer.apply(p, x[i : i + 1])[0] for i in range(3)]))(params, x)
    np.testing.assert_allclose(jax.jit(layer.apply)(params, x), flat, rtol=1e-5, atol=1e-5)


# ---- a function of the raw offsets


def published(z):
    """BasicVSR++, E2FGVI and ProPainter: M · tanh(z), and not M · tanh(z / M)."""
    return 10 * jnp.tanh(z)


def test_offsets_are_activated_then_bounded_then_added_to_the_base(make):
    """Against NumPy in float64: 3 · tanh(10 · tanh(z) / 3) + base."""
    plain, layer = (make(4, 6, (2, 2), offset_groups=2, **options) for options in (
        {}, {"offset_activation": published, "max_offset": 3}
    ))  # fmt: skip
    params, base = fill(layer), 4 * normal(5, 6, 2, seed=4)
    run = jax.jit(lambda p: (plain.look(p, X), layer.look(p, X, base_offset=base), layer.apply(p, X, base_offset=base)))
    raw, seen, y = run(params)
    z = np.asarray(raw["offset"], np.float64)
    wanted = 3 * np.tanh(10 * np.tanh(z) / 3) + np.tile(base, 8)
    np.testing.assert_allclose(seen["offset"], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(seen["mask"], raw["mask"])
    y_of_wanted = jax.jit(dcn_jax.deform_conv)(X, params["kernel"], **seen, bias=params["bias"])
    np.testing.assert_allclose(y, y_of_wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "wanted"),
    [(published, 4.621171572600098), (functools.partial(jnp.clip, min=-0.3, max=0.3), 0.3), (None, 0.5)],
    ids=["BasicVSR++", "ALIKED", "none"],
)
def test_a_raw_offset_of_a_half(make, activation, wanted):
    half = jax.nn.initializers.constant(0.5)
    layer = make(4, 6, (2, 2), offset_activation=activation, offset_bias_init=half)
    np.testing.assert_allclose(layer.look(layer.init(), X)["offset"], wanted, rtol=1e-6)


def test_an_activation_sees_groups_taps_and_axes_in_a_wide_dtype(make):
    """So that it can tell dy from dx, and one offset group from another."""
    seen = []

    def vertical(z):
        seen.append((z.shape, z.dtype))
        return z * jnp.array([1.0, 0.0])

    options = {"offset_groups": 2, "modulated": False, "dtype": jnp.bfloat16}
    layer = make(4, 6, (2, 3), offset_activation=vertical, **options)
    params = fill(layer)
    offset, plain = layer.look(params, X)["offset"], make(4, 6, (2, 3), **options).look(params, X)["offset"]
    assert seen[-1] == ((2, 5, 6, 2, 6, 2), jnp.float32)
    np.testing.assert_array_equal(offset[..., 1::2], 0)
    np.testing.assert_array_equal(offset[..., ::2], plain[..., ::2])


def test_an_offset_from_outside_is_not_activated(make):
    layer = make(4, 6, (2, 2), offset_activation=published)
    np.testing.assert_array_equal(layer.look(fill(layer), X, OFFSET)["offset"], OFFSET)


@pytest.mark.parametrize(
    ("activation", "error", "message"),
    [
        (lambda z: z[..., 0], ValueError, r"returned an array of shape \(.*, 1, 4\) and .* given, \(.*, 1, 4, 2\):"),
        (lambda z: z > 0, ValueError, r"returned an array of shape \(.*, 1, 4, 2\) and dtype bool; wanted real"),
        (lambda z: None, ValueError, "offset_activation returned a NoneType; wanted real offsets"),
        ("tanh", TypeError, "offset_activation='tanh' is a str; wanted a function of the branch's offsets"),
    ],
)
def test_activations_that_make_no_sense(make, activation, error, message):
    def trace():
        layer = make(4, 6, (2, 2), offset_activation=activation)
        jax.eval_shape(layer.apply, jax.eval_shape(layer.init), X)

    with pytest.raises(error, match=message):
        trace()


# ---- errors

CALLS = {
    "mask alone": ({"mask": MASK}, ValueError, "mask was given without offset; wanted both"),
    "offset and offset_inputs": ({"offset": OFFSET, "offset_inputs": X}, ValueError, "offset_inputs was given beside offset"),
    "offset and base_offset": ({"offset": OFFSET, "base_offset": OFFSET}, ValueError, "base_offset was given beside offset"),
    "offset kind": ({"offset": [[0.0]]}, TypeError, "offset is a list; wanted an array"),
    "offset dtype": ({"offset": jnp.zeros((5, 6, 8), int)}, TypeError, "offset has dtype int32; wanted a floating"),
    "offset shape": ({"offset": jnp.zeros((5, 6, 9))}, ValueError, r"offset has shape \(5, 6, 9\); wanted"),
    "offset batch": ({"offset": jnp.zeros((3, 5, 6, 8))}, ValueError, r"offset has shape \(3, 5, 6, 8\), batch axes \(3,\)"),
    "mask kind": ({"offset": OFFSET, "mask": 1.0}, TypeError, "mask is a float; wanted an array"),
    "mask shape": ({"offset": OFFSET, "mask": MASK[..., :4]}, ValueError, r"mask has shape \(2, 5, 6, 4\); wanted"),
    "offset_inputs kind": ({"offset_inputs": [[0.0]]}, TypeError, "offset_inputs is a list; wanted an array"),
    "offset_inputs pixels": ({"offset_inputs": X[:, 1:]}, ValueError, r"offset_inputs has shape \(2, 4, 6, 4\); wanted \(\*batch, 5, 6, channels\)"),
    "offset_inputs batch": ({"offset_inputs": jnp.zeros((3, 5, 6, 4))}, ValueError, r"offset_inputs has shape \(3, 5, 6, 4\); .* inputs, \(2,\)"),
    "base_offset kind": ({"base_offset": 1.0}, TypeError, "base_offset is a float; wanted an array"),
    "base_offset shape": ({"base_offset": jnp.zeros((5, 6, 3))}, ValueError, r"base_offset has shape \(5, 6, 3\); wanted \(\*batch, 5, 6, 2 or 8\)"),
    "base_offset batch": ({"base_offset": jnp.zeros((3, 5, 6, 2))}, ValueError, r"base_offset has shape \(3, 5, 6, 2\); .* inputs, \(2,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_make_no_sense(make, name):
    arguments, error, message = CALLS[name]
    layer = make(4, 6, (2, 2))
    with pytest.raises(error, match=message):
        layer.apply(fill(layer), X, **arguments)


def test_without_a_branch_an_offset_must_be_given(make):
    layer, params = without_branch(make)
    with pytest.raises(ValueError, match="offset is None, and offset_branch=False leaves no branch to emit it"):
        layer.apply(params, X)


def test_a_branch_of_one_s_own_that_emits_something_else(make, framework):
    layer = make(4, 6, (2, 2), offset_conv_cls=functools.partial(PLAIN[framework], kernel_size=(1, 1), strides=2))

    def trace():  # linen looks while it makes the parameters, nnx when it is called
        jax.eval_shape(layer.apply, jax.eval_shape(layer.init), jnp.zeros((5, 5, 4)))

    with pytest.raises(ValueError, match=r"output of the branch, offset_conv, has shape \(3, 3, 12\); .* 5, 5, 12\)"):
        trace()


def test_a_ready_made_branch_is_refused():
    message = r"offset_conv_cls is a Conv; wanted a function that makes the branch, called as offset_conv_cls\("
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(linen(4, 6, (2, 2), offset_conv_cls=nn.Conv(12, (1, 1))).init)
    with pytest.raises(TypeError, match=message):
        nnx_(4, 6, (2, 2), offset_conv_cls=nnx.Conv(4, 12, (1, 1), rngs=nnx.Rngs(0)))


def test_channels_that_an_nnx_branch_was_not_made_for():
    layer = nnx_(4, 6, (2, 2), beside={"offset_inputs": jnp.zeros((5, 5, 7))})
    with pytest.raises(
        ValueError, match=r"inputs has shape \(2, 5, 6, 4\); the branch was made for offset_in_features=7"
    ):
        layer.apply(fill(layer), X)
    with pytest.raises(
        ValueError, match=r"offset_inputs has shape .* 4\); the branch was made for offset_in_features=7"
    ):
        layer.apply(fill(layer), X, offset_inputs=X)
