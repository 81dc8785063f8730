"""`plot_attention`: dots where a query's points read, their level by colour and their weight by area."""

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgba

from dcn_jax.viz import Layer, plot_attention

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RNG = np.random.default_rng(0)
LEVELS = (8, 6), (4, 3)
LOCATIONS = RNG.random((5, 2, 2, 3, 2))  # 5 queries, 2 heads, 2 levels, 3 points
WEIGHTS = RNG.random((5, 2, 2, 3))
IMAGE = np.zeros((16, 12, 3))


def layer(locations=LOCATIONS, weights=WEIGHTS, per_level=(3, 3)):
    arrays = {"inputs": np.zeros((60, 8)), "output": np.zeros((5, 8)), "locations": locations, "weights": weights}
    return Layer("attention", "attention", **arrays, spatial_shapes=LEVELS, points_per_level=per_level)


@pytest.fixture(autouse=True)
def _no_open_pictures():
    yield
    plt.close("all")


def test_dots_lie_where_the_points_read_in_pixels_of_the_image():
    ax = plot_attention(IMAGE, layer(), 2, head=1)
    for level, dots in enumerate(ax.collections):
        np.testing.assert_allclose(dots.get_offsets(), LOCATIONS[2, 1, level] * (12, 16) - 0.5)
        np.testing.assert_allclose(
            dots.get_sizes() / dots.get_sizes()[0], WEIGHTS[2, 1, level] / WEIGHTS[2, 1, level, 0]
        )
        np.testing.assert_array_equal(dots.get_facecolor()[0], to_rgba(f"C{level}"))
    labels = [dots.get_label() for dots in ax.collections]
    assert labels == ["level 0 (8 × 6)", "level 1 (4 × 3)"]
    zero, one = (dots.get_sizes()[0] for dots in ax.collections)
    assert zero / one == pytest.approx(WEIGHTS[2, 1, 0, 0] / WEIGHTS[2, 1, 1, 0])  # one scale for all levels


def test_several_queries_and_all_heads():
    ax = plot_attention(IMAGE, layer(), [0, 4])
    np.testing.assert_allclose(ax.collections[1].get_offsets(), LOCATIONS[[0, 4], :, 1].reshape(-1, 2) * (12, 16) - 0.5)


def test_levels_may_have_different_numbers_of_points():
    ax = plot_attention(IMAGE, layer(LOCATIONS[:, :, 0], WEIGHTS[:, :, 0], (1, 2)), 3, head=0)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), LOCATIONS[3, 0, 0, :1] * (12, 16) - 0.5)
    np.testing.assert_allclose(ax.collections[1].get_offsets(), LOCATIONS[3, 0, 0, 1:] * (12, 16) - 0.5)


def test_it_draws_on_the_axes_it_is_given():
    _, ax = plt.subplots()
    assert plot_attention(IMAGE[..., 0], layer(), 0, ax=ax) is ax


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((layer(), 5), {}, ValueError, r"query=5 does not exist; wanted an int in \[0, 5\), or several"),
        ((layer(), -1), {}, ValueError, "query=-1 does not exist"),
        ((layer(), 0), {"head": 2}, ValueError, r"head=2 does not exist; wanted an int in \[0, 2\)"),
        ((layer(), 0.5), {}, TypeError, "query=0.5 is not understood"),
        ((layer(), []), {}, TypeError, r"query=\[\] is not understood"),
        ((layer(None, None), 0), {}, TypeError, "layer is Layer.*; wanted an attention among what looked"),
        ((None, 0), {}, TypeError, "layer is None; wanted an attention"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=message):
        plot_attention(IMAGE, *arguments, **options)


def test_an_image_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"image has shape \(5,\); wanted \(H, W\)"):
        plot_attention(np.zeros(5), layer(), 0)
