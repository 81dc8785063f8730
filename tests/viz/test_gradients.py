"""What a node depends on: against finite differences, and in networks where it is known by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from flax import nnx

import dcn_jax.linen
import dcn_jax.nnx
from dcn_jax.viz import (
    effective_receptive_field,
    effective_sampling,
    looked,
    plot_effective_sampling,
    plot_receptive_field,
)
from tests.support.looking import OFFSETS, both, deform, image, plain, stack

matplotlib.use("Agg")
from matplotlib import pyplot as plt

pytestmark = pytest.mark.lenient
X = image()


@pytest.fixture(scope="module")
def nets():
    return both()


def node(y):
    """Of the output `(3, 4, 3)` of the networks."""
    return jnp.sin(y[1, 2]).sum()


@pytest.mark.slow
def test_the_field_is_the_length_of_the_gradient_over_channels(nets):
    field = effective_receptive_field(nets["nnx"], X, node)
    gradient = jax.grad(lambda x: node(nets["nnx"](x[None])[0]))(X)
    assert field.shape == (10, 12)
    np.testing.assert_allclose(field, np.sqrt((np.asarray(gradient) ** 2).sum(-1)), rtol=1e-5)
    np.testing.assert_allclose(effective_receptive_field(nets["linen"], X, node), field, atol=1e-5)


def test_without_offsets_the_field_is_the_regular_one():
    ones = {"kernel_init": nnx.initializers.ones}
    model = stack(plain(**ones), plain(strides=2, padding=1, **ones))
    field = effective_receptive_field(model, image(1, (12, 12)), (2, 3, 0))
    around = [1, 2, 3, 2, 1]
    expected = np.zeros((12, 12))
    expected[2:7, 4:9] = np.outer(around, around)  # about (2·2, 2·3)
    np.testing.assert_allclose(field, expected, rtol=1e-6)


def test_strengths_are_those_of_finite_differences():
    """Each tap of one position is moved along each axis, by an offset added from outside."""
    layer = dcn_jax.nnx.DeformConv(2, 3, (3, 3), offset_kernel_init=OFFSETS, rngs=nnx.Rngs(0))
    x = image(2, (5, 6))

    def score(y):
        return jnp.sin(y).sum()

    ((points, strength),) = effective_sampling(layer, x, score)
    np.testing.assert_array_equal(points, looked(layer, x)[0].points)
    with jax.enable_x64(True):
        layer = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), layer)
        x = x.astype(jnp.float64)
        moves = jnp.zeros((18, 5, 6, 18)).at[np.arange(18), 2, 3, np.arange(18)].set(1e-6)
        scores = jax.vmap(lambda move: score(layer(x[None], base_offset=move)[0]))
        numeric = (scores(moves) - scores(-moves)).reshape(9, 2) / 2e-6
        np.testing.assert_allclose(strength[2, 3, 0], np.linalg.norm(numeric, axis=-1), rtol=1e-3)


@pytest.mark.slow
def test_points_and_strengths_of_each_deformable_layer_in_linen_as_in_nnx(nets):
    found = effective_sampling(nets["nnx"], X, node)
    layers = [layer for layer in looked(nets["nnx"], X) if layer.kind == "deform_conv"]
    assert [points.shape for points, _ in found] == [(5, 6, 2, 9, 2), (3, 4, 1, 9, 2)]
    assert [strength.shape for _, strength in found] == [(5, 6, 2, 9), (3, 4, 1, 9)]
    for layer, (points, strength), (_, other) in zip(
        layers, found, effective_sampling(nets["linen"], X, node), strict=True
    ):
        np.testing.assert_array_equal(points, layer.points)
        np.testing.assert_allclose(other, strength, atol=1e-5)
    last = found[1][1]
    assert (last[1, 2] > 0).all()
    last[1, 2] = 0
    assert (last == 0).all()  # the node is a position of the last layer


def test_only_taps_whose_movement_changes_the_node_count():
    """On a ramp down the map a tap counts by its weight; where the map is flat it does not."""
    weights = np.arange(9.0).reshape(3, 3, 1, 1)
    model = stack(deform(0.25, kernel_init=lambda *_: jnp.asarray(weights, jnp.float32)))
    ramp = jnp.broadcast_to(2 * jnp.arange(12.0)[:, None, None], (12, 12, 1))
    ((_, strength),) = effective_sampling(model, ramp, (6, 6, 0))
    np.testing.assert_allclose(strength[6, 6, 0], 2 * weights.ravel(), rtol=1e-5)
    assert strength.sum() == pytest.approx(2 * weights.sum())
    ((_, flat),) = effective_sampling(model, jnp.ones((12, 12, 1)), (6, 6, 0))
    np.testing.assert_allclose(flat, 0, atol=1e-6)


@pytest.mark.parametrize(
    "given",
    ["offset", pytest.param("base_offset", marks=pytest.mark.slow), pytest.param("flow", marks=pytest.mark.slow)],
)
def test_offsets_from_outside_are_moved_too(given):
    offset = jax.random.normal(jax.random.key(1), (1, 10, 12, 18))
    arguments = {"offset": {"offset": offset}, "base_offset": {"base_offset": offset}}
    arguments["flow"] = {"base_offset": jnp.tile(offset[..., :2], 9)}
    layer = dcn_jax.nnx.DeformConv(2, 1, (3, 3), modulated=False, rngs=nnx.Rngs(0))
    ((points, strength),) = effective_sampling(layer, X, (5, 6, 0), call=lambda m, x: m(x, **arguments[given]))
    shifted = arguments[given].get("offset", arguments[given].get("base_offset")).reshape(10, 12, 1, 9, 2)
    np.testing.assert_allclose(points - looked(stack(plain()), X[..., :1])[0].points, shifted, atol=1e-5)
    if given == "flow":  # one displacement for all taps
        flow = offset[..., :2]
        again = effective_sampling(layer, X, (5, 6, 0), call=lambda m, x: m(x, base_offset=flow))
        np.testing.assert_allclose(again[0][1], strength, rtol=1e-5)
    assert strength[5, 6].sum() > 0


@pytest.mark.slow
def test_plain_layers_count_as_deformable_ones_without_offsets():
    """The right-hand derivatives at whole-number positions are those of a fresh deformable network."""
    x = image(1, (8, 9))
    plains = stack(plain(strides=2), plain(kernel_dilation=2))
    deforms = stack(deform(strides=2), deform(kernel_dilation=2))
    for one, other in zip(plains.layers, deforms.layers, strict=True):
        other.kernel, other.bias = one.kernel, one.bias
    expected = effective_sampling(deforms, x, (1, 2, 0))
    found = effective_sampling(plains, x, (1, 2, 0), plain=True)
    for (points, strength), (expected_points, expected_strength) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(points, expected_points)
        np.testing.assert_allclose(strength, expected_strength, atol=1e-6)
    assert (found[0][1] > 0).sum() > 9


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 3])
def test_the_calls_of_a_scan_are_refused(length):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "intermediates": 0}
            layer = dcn_jax.linen.DeformConv(1, (1, 1), name="layer")
            scan = nn.scan(
                lambda layer, carry: (layer(carry), None),
                variable_axes=axes,
                split_rngs={"params": True},
                length=length,
                check_constancy_invariants=False,
            )
            return scan(layer, x)[0]

    x = image(1, (4, 4))
    variables = Scanned().init(jax.random.key(0), x[None])
    with pytest.raises(ValueError, match="a layer is called several times by one trace, as in a scan"):
        effective_sampling((Scanned(), variables), x, (1, 1, 0))


def test_a_network_without_deformable_layers_has_none():
    assert effective_sampling(stack(plain()), X[..., :1], (0, 0, 0)) == []


@pytest.mark.parametrize(
    ("node", "error", "message"),
    [
        (
            lambda y: y[0],
            ValueError,
            r"node gives an array of shape \(12, 1\) .*output for one image, of shape \(10, 12, 1\)",
        ),
        (
            lambda y: y[0, 0, 0] > 0,
            ValueError,
            "node gives an array of shape .* and dtype bool; wanted a floating-point",
        ),
        ((0, 0), ValueError, r"node gives an array of shape \(1,\)"),
        ("logit", TypeError, "node='logit' is not understood; wanted a function of the model's output for one image"),
    ],
)
def test_errors_name_the_node(node, error, message):
    with pytest.raises(error, match=message):
        effective_receptive_field(stack(plain()), X[..., :1], node)


# The plots


@pytest.fixture(autouse=True)
def _no_open_pictures():
    yield
    plt.close("all")


def test_the_field_lies_over_the_image():
    field = np.zeros((8, 10))
    field[2, 3] = 4.0
    ax = plot_receptive_field(np.zeros((16, 20, 3)), field)
    drawn = ax.images[-1]
    np.testing.assert_array_equal(drawn.get_array(), field)
    assert list(drawn.get_extent()) == [-0.5, 9.5, 7.5, -0.5]
    np.testing.assert_array_equal(drawn.get_alpha(), field / 4)
    plot_receptive_field(np.zeros((8, 10)), 0 * field).figure.canvas.draw()
    with pytest.raises(ValueError, match=r"field has shape \(8,\); wanted \(H, W\)"):
        plot_receptive_field(np.zeros((8, 10)), field[:, 0])


def test_dots_lie_where_the_strength_is():
    points = np.random.default_rng(0).random((4, 5, 1, 9, 2)) * 8
    strength = np.zeros((4, 5, 1, 9))
    strength[1, 2, 0, 3], strength[0, 0, 0, 8], strength[3, 3, 0, 0] = 1.0, 0.5, 0.001
    ax = plot_effective_sampling(np.zeros((16, 16)), points, strength, spatial=(8, 8))
    dots = ax.collections[-1]
    np.testing.assert_allclose(dots.get_offsets(), points[[0, 1], [0, 2], 0, [8, 3], ::-1])
    np.testing.assert_array_equal(dots.get_array(), [0.5, 1.0])
    assert (
        len(plot_effective_sampling(np.zeros((8, 8)), points, strength, threshold=0).collections[-1].get_offsets()) == 3
    )
    plot_effective_sampling(np.zeros((8, 8)), points, 0 * strength).figure.canvas.draw()
    with pytest.raises(ValueError, match=r"strength \(4, 5, 1\); wanted \(\*out, OG, K, 2\)"):
        plot_effective_sampling(np.zeros((8, 8)), points, strength[..., 0])
