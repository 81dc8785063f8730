"""`looked`: the arrays are those that the layers read and made, in linen and nnx, and the model stays as it was."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dcn_jax.linen
import dcn_jax.nnx
from dcn_jax import deform_conv, sampling_points
from dcn_jax.interop import to_linen
from dcn_jax.viz import Layer, looked
from tests.support.looking import OFFSETS, Net, both, deform, image, plain, stack

pytestmark = pytest.mark.lenient
X = image()
ARRAYS = ("inputs", "output", "kernel", "bias", "offset", "mask")


@pytest.fixture(scope="module")
def nets():
    return both()


@pytest.fixture(scope="module")
def layers(nets):
    return {name: looked(net, X) for name, net in nets.items()}


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_it_returns_the_layers_in_the_order_of_their_calls(layers, framework):
    found = [(layer.path, layer.kind, layer.inputs.shape, layer.output.shape) for layer in layers[framework]]
    assert found == [
        ("stem", "conv", (10, 12, 2), (5, 6, 4)),
        ("deform", "deform_conv", (5, 6, 4), (5, 6, 4)),
        ("shortcut", "conv", (5, 6, 4), (5, 6, 4)),
        ("last", "deform_conv", (5, 6, 4), (3, 4, 3)),
    ]


def test_linen_and_nnx_are_equal(layers):
    for one, other in zip(layers["nnx"], layers["linen"], strict=True):
        for name in ARRAYS:
            assert (getattr(one, name) is None) == (getattr(other, name) is None)
            if getattr(one, name) is not None:
                np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-5)
        for name in ("window", "strides", "padding", "kernel_dilation", "padding_mode", "reads", "index"):
            assert getattr(one, name) == getattr(other, name)


def test_the_arrays_give_the_result_again(layers):
    """With the op, over the layer's arrays and geometry alone."""
    for layer in layers["nnx"]:
        offset = np.zeros((*layer.output.shape[:-1], 1, np.prod(layer.window), 2), np.float32)
        offset = offset if layer.offset is None else layer.offset
        geometry = {"strides": layer.strides, "padding": layer.padding, "kernel_dilation": layer.kernel_dilation}
        flat = (*layer.output.shape[:-1], -1)
        mask = None if layer.mask is None else layer.mask.reshape(flat)
        y = deform_conv(layer.inputs, layer.kernel, offset.reshape(flat), mask, layer.bias, **geometry)
        np.testing.assert_allclose(y, layer.output, atol=1e-5)
        points = sampling_points(offset.reshape(flat), layer.window, spatial=layer.spatial, **geometry)
        np.testing.assert_allclose(layer.points, points, atol=1e-5)
    assert layers["nnx"][1].offset.std() > 0.1
    assert layers["nnx"][1].mask.shape == (5, 6, 2, 9)
    assert layers["nnx"][3].mask is None


def test_it_tells_whose_results_a_layer_reads(layers):
    assert [layer.reads for layer in layers["nnx"]] == [(), (0,), (0,), (1, 2)]
    assert [layer.reads for layer in layers["linen"]] == [(), (0,), (0,), (1, 2)]


def test_the_model_stays_as_it_was(nets):
    net = nets["nnx"]
    before = nnx.state(net)
    classes = {path: type(module) for path, module in nnx.iter_graph(net)}
    looked(net, X)
    assert {path: type(module) for path, module in nnx.iter_graph(net)} == classes
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net), before)
    assert not nnx.state(net, nnx.Intermediate)


class Twice(nnx.Module):
    """A layer that is called twice; batch norm in training, which changes its averages; jit and remat around it."""

    def __init__(self):
        self.layer = dcn_jax.nnx.DeformConv(2, 2, (3, 3), offset_kernel_init=OFFSETS, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.again(self.norm(self.layer(x)))

    @nnx.jit
    def again(self, x):
        return jax.checkpoint(self.layer)(x)


@pytest.mark.slow
def test_under_jit_and_remat_the_arrays_have_values():
    model = Twice()
    expected = model(X[None])[0]
    model = Twice()
    for _ in range(2):  # the second time, too, though jit has traced the function
        first, second = looked(model, X)
        assert (first.path, second.path) == ("layer", "layer")
        np.testing.assert_allclose(second.output, expected, atol=1e-5)
        assert second.reads == (0,)
    np.testing.assert_array_equal(model.norm.mean[...], 0)


class Scanned(nn.Module):
    """Linen layers under nn.jit and nn.scan."""

    axes: dict

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.jit(dcn_jax.linen.DeformConv)(2, (3, 3), offset_kernel_init=OFFSETS, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)

        def step(layer, carry):
            return (layer(carry), None)

        scan = nn.scan(
            step, variable_axes=self.axes, split_rngs={"params": True}, length=3, check_constancy_invariants=False
        )
        return scan(dcn_jax.linen.DeformConv(2, (3, 3), name="rest"), x)[0]


@pytest.mark.slow
def test_a_scan_gives_a_layer_for_each_of_its_steps():
    model = Scanned({"params": 0, "intermediates": 0})
    variables = model.init(jax.random.key(0), X[None])
    y = model.apply(variables, X[None], True, mutable=["batch_stats"])[0]  # traced by nn.jit before it is looked at
    layers = looked((model, variables), X, call=lambda model, images: model(images, train=True))
    assert [layer.path for layer in layers] == ["first", "rest", "rest", "rest"]
    np.testing.assert_allclose(layers[-1].output, y[0], atol=1e-5)
    assert [layer.reads for layer in layers] == [None] * 4


@pytest.mark.slow
def test_a_scan_that_drops_what_layers_sow_is_refused():
    model = Scanned({"params": 0})
    variables = model.init(jax.random.key(0), X[None])
    with pytest.raises(ValueError, match=r"the layer rest sowed no offset.*give nn.scan or nn.vmap.*intermediates"):
        looked((model, variables), X)


def test_control_flow_over_values_leaves_only_the_order():
    class Asks(nnx.Module):
        def __init__(self):
            self.layers = stack(plain(), plain())

        def __call__(self, x):
            return self.layers(x if float(x.sum()) > 0 else -x)

    assert [layer.reads for layer in looked(Asks(), X[..., :1])] == [None, None]


def test_a_branch_of_several_layers_is_part_of_its_layer():
    def branch(channels, features, *, rngs):
        return nnx.Sequential(nnx.Conv(channels, 4, (3, 3), rngs=rngs), nnx.Conv(4, features, (1, 1), rngs=rngs))

    assert [layer.path for layer in looked(stack(deform(offset_conv_cls=branch), plain()), X[..., :1])] == [
        "layers.0",
        "layers.1",
    ]


@pytest.mark.slow
def test_offsets_from_outside_and_base_offsets_are_those_that_were_used():
    layer = dcn_jax.nnx.DeformConv(2, 2, (3, 3), offset_kernel_init=OFFSETS, rngs=nnx.Rngs(0))
    given = jax.random.normal(jax.random.key(1), (10, 12, 18))
    (outside,) = looked(layer, X, call=lambda layer, images: layer(images, given))
    np.testing.assert_array_equal(outside.offset, given.reshape(10, 12, 1, 9, 2))
    assert outside.mask is None
    (alone,) = looked(layer, X)
    (based,) = looked(layer, X, call=lambda layer, images: layer(images, base_offset=jnp.ones((10, 12, 2))))
    np.testing.assert_allclose(based.offset, alone.offset + 1, atol=1e-5)


@pytest.mark.slow
def test_all_geometries_are_written_out():
    cls, options = plain(padding="CIRCULAR", kernel_dilation=2, kernel_size=(3, 5))
    (circular,) = looked(stack((cls, options)), X[..., :1])
    assert (circular.window, circular.kernel_dilation, circular.padding) == ((3, 5), (2, 2), ((2, 2), (4, 4)))
    assert circular.padding_mode == ("wrap", "wrap")
    causal = nnx.Conv(2, 1, (3,), padding="CAUSAL", kernel_dilation=2, rngs=nnx.Rngs(0))
    (causal,) = looked(causal, X[0])
    assert (causal.padding, causal.spatial, causal.output.shape) == (((4, 0),), (12,), (12, 1))
    (masked,) = looked(nnx.Conv(2, 1, (3, 3), mask=jnp.zeros((3, 3, 2, 1)), rngs=nnx.Rngs(0)), X)
    assert (masked.kernel == 0).all()


@pytest.mark.slow
def test_half_precision_is_kept():
    (layer,) = looked(stack(deform(0.5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)), X[..., :1].astype(jnp.bfloat16))
    assert (layer.inputs.dtype, layer.output.dtype, layer.offset.dtype) == (jnp.bfloat16, jnp.bfloat16, np.float32)
    np.testing.assert_array_equal(layer.offset, 0.5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DCNv3", {"remove_center": True, "offset_scale": 2.0, "kernel_size": (3, 5), "pad": (1, 2)}),
        pytest.param("DCNv4", {}, marks=pytest.mark.slow),
    ],
)
def test_the_points_of_dcnv3_and_dcnv4_give_their_results_again(name, options):
    """As those of a `deform_conv` with a kernel of ones, between the two projections."""
    layer = getattr(dcn_jax.nnx, name)(8, group=2, rngs=nnx.Rngs(0), **options)
    for part in ("offset", "mask", "offset_mask"):
        if hasattr(layer, part):
            kernel = getattr(layer, part).kernel
            kernel[...] = 0.3 * jax.random.normal(jax.random.key(1), kernel.shape)
    (seen,) = looked(layer, x := image(8, (5, 6)))
    assert (seen.kind, seen.kernel, seen.reads) == ("dcn", None, ())
    value = (layer.input_proj if name == "DCNv3" else layer.value_proj)(x)
    flat = (*seen.output.shape[:-1], -1)
    kernel = jnp.ones((*seen.window, 1, 8))
    y = deform_conv(
        value, kernel, seen.offset.reshape(flat), seen.mask.reshape(flat), padding=seen.padding, feature_group_count=8
    )
    np.testing.assert_allclose(layer.output_proj(y), seen.output, atol=1e-4)

    linen = getattr(dcn_jax.linen, name)(8, group=2, **options)
    (other,) = looked((linen, {"params": to_linen(layer)}), x)
    np.testing.assert_allclose(other.offset, seen.offset, atol=1e-5)
    np.testing.assert_allclose(other.mask, seen.mask, atol=1e-5)


class Attends(nnx.Module):
    """Attention of four pixels over two levels."""

    def __init__(self, points):
        self.attention = dcn_jax.nnx.MSDeformAttn(8, 2, 2, points, rngs=nnx.Rngs(0))

    def __call__(self, x):
        levels = (8, 6), (4, 3)
        value = jnp.concatenate([x.reshape(1, -1, 8), x[:, ::2, ::2].reshape(1, -1, 8)], axis=1)
        return self.attention(value[:, :4], jnp.full((1, 4, 1, 2), 0.5), value, spatial_shapes=levels)


@pytest.mark.parametrize(
    ("points", "axes", "per_level"),
    [(3, (2, 3), (3, 3)), pytest.param((1, 2), (3,), (1, 2), marks=pytest.mark.slow)],
)
def test_an_attention_has_locations_and_weights(points, axes, per_level):
    (layer,) = looked(Attends(points), image(8, (8, 6)))
    assert (layer.path, layer.kind, layer.inputs.shape, layer.output.shape) == (
        "attention",
        "attention",
        (60, 8),
        (4, 8),
    )
    assert (layer.locations.shape, layer.weights.shape) == ((4, 2, *axes, 2), (4, 2, *axes))
    assert (layer.spatial_shapes, layer.points_per_level) == (((8, 6), (4, 3)), per_level)
    # Head 0 of a new layer looks right: its first point on level 0 lies one pixel from the middle.
    np.testing.assert_allclose(layer.locations[0, 0].reshape(-1, 2)[0], [0.5 + 1 / 6, 0.5], atol=1e-6)
    np.testing.assert_allclose(layer.weights.reshape(4, 2, -1).sum(-1), 1, atol=1e-6)


def test_a_layer_shows_its_shapes():
    layers = looked(stack(plain()), X[..., :1])
    assert repr(layers) == "[Layer('layers.0', 'conv', (10, 12, 1) -> (10, 12, 1))]"
    assert isinstance(layers[0], Layer)


@pytest.mark.parametrize(
    ("model", "x", "error", "message"),
    [
        (nn.Conv(1, (3, 3)), X, TypeError, "model is a Conv; wanted an nnx.Module, or a pair .*stand its variables"),
        (
            lambda x: x,
            X,
            TypeError,
            r"model is a function; wanted an nnx.Module, or a pair \(linen module, variables\)",
        ),
        (Net(), np.zeros((4, 4, 2), np.uint8), TypeError, "x has dtype uint8; wanted a floating-point image"),
        (Net(), X[0, 0], ValueError, r"x has shape \(2,\); wanted one image \(H, W, C\)"),
        (
            stack(plain(input_dilation=2, padding=1)),
            X[..., :1],
            ValueError,
            "the layer layers.0 has input_dilation=2: it reads between pixels",
        ),
    ],
)
def test_errors_name_the_argument(model, x, error, message):
    with pytest.raises(error, match=message):
        looked(model, x)


def test_a_layer_that_sees_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"inputs of the layer layers.0 has shape \(2, 10, 12, 1\), .* a batch of 2"):
        looked(stack(plain()), X[..., :1], call=lambda model, images: model(jnp.concatenate([images, images])))


def run(code):
    return subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)


def test_importing_the_room_loads_neither_flax_nor_optax_nor_matplotlib():
    code = "import sys, dcn_jax.viz; print([name for name in ('flax', 'optax', 'matplotlib') if name in sys.modules])"
    assert run(code).stdout == "[]\n"


@pytest.mark.parametrize("package", ["flax", pytest.param("optax", marks=pytest.mark.slow)])
def test_without_flax_the_error_says_what_to_install(package):
    result = run(
        f"import sys; sys.modules['{package}'] = None; import jax.numpy as jnp; from dcn_jax.viz import looked\n"
        "looked(None, jnp.zeros((4, 4, 1)))"
    )
    assert 'dcn_jax.viz needs the extra "flax": pip install "dcn-jax[flax]"' in result.stderr
