"""`saliency_region`, on networks whose region is known."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from flax import nnx

from dcn_jax.viz import plot_saliency_region, saliency_region
from tests.support.looking import both, image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

pytestmark = pytest.mark.lenient
KEY = jax.random.key(3)
X = image(3, (12, 14), seed=1)


class Sums(nnx.Module):
    """The sum of the pixels at given weights, `(H, W, 1)`."""

    def __init__(self, weights):
        self.weights = nnx.Param(jnp.asarray(weights, jnp.float32))

    def __call__(self, x):
        return (x * self.weights[...]).sum((1, 2, 3))


def first(y):
    return y


def errors_without_each_tile(model, x, node, mask):
    """The error of the region without each of its tiles, computed here."""
    x = np.asarray(x)
    grey = x.mean((0, 1))
    whole = float(node(model(jnp.asarray(x)[None])[0]))

    def error(mask):
        seen = np.where(mask[..., None], x, grey)
        return abs(float(node(model(jnp.asarray(seen)[None])[0])) - whole) / abs(whole)

    errors = []
    for row in range(0, mask.shape[0], 2):
        for column in range(0, mask.shape[1], 2):
            without = mask.copy()
            without[row : row + 2, column : column + 2] = False
            if (without != mask).any():
                errors.append(error(without))
    return error(mask), errors


@pytest.fixture(scope="module")
def patch():
    """A network that reads a patch of 4×6 pixels, and the patch."""
    weights = np.zeros((12, 14, 1))
    weights[4:8, 6:12] = np.random.default_rng(0).uniform(1, 2, (4, 6, 1))
    return Sums(weights), weights[..., 0] > 0


def test_with_a_tight_bound_the_region_is_all_that_the_network_reads(patch):
    model, read = patch
    mask, error = saliency_region(model, X, first, error=1e-4, key=KEY)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, read)
    assert 0 <= error <= 1e-4


def test_no_tile_can_go_and_the_error_is_as_said(patch):
    model, read = patch
    mask, error = saliency_region(model, X, first, error=0.3, key=KEY)
    assert 0 < mask.sum() < read.sum()
    assert not (mask & ~read).any()
    reached, without = errors_without_each_tile(model, X, first, mask)
    assert error == pytest.approx(reached, abs=1e-5)
    assert error <= 0.3
    assert min(without) > 0.3


def test_of_a_bright_spot_and_a_faint_one_the_bright_one_is_kept():
    weights = np.zeros((8, 8, 1))
    weights[0:2, 0:2], weights[6:8, 6:8] = 10, 1
    x = jnp.zeros((8, 8, 1)).at[0:2, 0:2].set(1).at[6:8, 6:8].set(1)  # the grey is 1/8
    mask, error = saliency_region(Sums(weights), x, first, error=0.1, key=KEY)
    np.testing.assert_array_equal(mask, weights[..., 0] == 10)
    assert error == pytest.approx(4 * (1 - 1 / 8) / 44, rel=1e-5)


def test_if_grey_is_enough_the_region_is_empty():
    mask, error = saliency_region(Sums(np.ones((6, 6, 1))), X[:6, :6], first, error=1e-3, key=KEY)
    assert not mask.any()
    assert error <= 1e-3


def test_odd_sizes_have_cut_tiles():
    weights = np.zeros((5, 7, 1))
    weights[4:, 6:] = 1
    mask, _ = saliency_region(Sums(weights), X[:5, :7], first, error=1e-3, key=KEY)
    np.testing.assert_array_equal(mask, weights[..., 0] == 1)


@pytest.mark.slow
def test_of_a_network_it_lies_in_the_receptive_field_and_is_the_same_for_a_key_and_in_linen():
    nets, x, node = both(), image(), (1, 2, 0)
    mask, error = saliency_region(nets["nnx"], x, node, key=KEY)
    again = saliency_region(nets["nnx"], x, node, key=KEY)
    np.testing.assert_array_equal(mask, again[0])
    assert error == again[1]
    reached, without = errors_without_each_tile(nets["nnx"], x, lambda y: y[node], mask)
    assert reached == pytest.approx(error, abs=1e-5)
    assert error <= 0.1
    assert min(without) > 0.1
    linen = saliency_region(nets["linen"], x, node, key=KEY)
    np.testing.assert_array_equal(mask, linen[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"error": 0.0}, ValueError, "error=0.0; wanted a positive share of the node's response"),
        ({"error": float("nan")}, ValueError, "error=nan; wanted a positive share"),
        ({"x": X[0]}, ValueError, r"x has shape \(14, 3\); wanted one image \(H, W, C\)"),
        ({"node": lambda y: 0 * y}, ValueError, "node is -?0.0 for the whole image, and a share of that is no bound"),
        ({"node": lambda y: jnp.inf * y}, ValueError, "node is -?(inf|nan) for the whole image"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    given = {"model": Sums(np.ones((12, 14, 1))), "x": X, "node": first, "key": KEY} | change
    with pytest.raises(error, match=message):
        saliency_region(given.pop("model"), given.pop("x"), given.pop("node"), **given)


# The plot


def test_the_plot_shows_the_region_and_its_outline():
    picture, mask = np.random.default_rng(0).random((8, 10)), np.zeros((8, 10), bool)
    mask[2:4, 0:6] = True
    ax = plot_saliency_region(picture, mask)
    shown = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(shown[mask], picture[mask], rtol=1e-6)
    np.testing.assert_allclose(shown[~mask], picture.mean(), rtol=1e-6)
    (outline,) = ax.collections[-1].get_paths()
    low, high = outline.get_extents().get_points()
    np.testing.assert_allclose(low, [-0.5, 1.5], atol=0.07)
    np.testing.assert_allclose(high, [5.5, 3.5], atol=0.07)
    colour = (255 * np.random.default_rng(0).random((8, 10, 3))).astype(np.uint8)
    plot_saliency_region(colour, mask).figure.canvas.draw()
    plot_saliency_region(picture, np.zeros((8, 10), bool)).figure.canvas.draw()
    with pytest.raises(ValueError, match=r"mask has shape \(8, 10\) and dtype float64; wanted \(8, 10\) bools"):
        plot_saliency_region(picture, mask.astype(float))
    plt.close("all")
