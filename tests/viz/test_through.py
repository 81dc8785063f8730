"""`sampling_through`: stacks whose points are known by hand, and a walk of paths in plain Python as oracle."""

import itertools
import math

import matplotlib
import numpy as np
import pytest
from flax import nnx

from dcn_jax.viz import looked, plot_sampling_through, sampling_through
from tests.support.looking import both, by_hand, image, stack
from tests.support.looking import plain as plain_layer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

pytestmark = pytest.mark.lenient
X = image(1, (12, 12))


def plain(**geometry):
    return geometry


def deform(offset=0.0, **geometry):
    return {"offset": offset} | geometry


def through(*layers, at=(6, 6), size=(12, 12), **options):
    return sampling_through(by_hand(*layers, size=size), at, **options)


def summed(points, weights):
    """The weight of each point, of all paths that end there."""
    total = {}
    for point, weight in zip(np.round(points, 5).tolist(), weights, strict=True):
        total[tuple(point)] = total.get(tuple(point), 0) + weight
    return {point: pytest.approx(weight, abs=1e-5) for point, weight in total.items()}


def grid(rows, columns):
    return {(float(row), float(column)) for row in rows for column in columns}


def test_one_plain_layer_gives_nine_weights_of_one():
    points, weights = through(plain())
    assert points.shape == (9, 2)
    np.testing.assert_array_equal(weights, 1)
    np.testing.assert_array_equal(points, sorted(grid((5, 6, 7), (5, 6, 7))))


@pytest.mark.parametrize("kind", [plain, deform])
def test_without_offsets_two_layers_read_the_regular_field(kind):
    points, weights = through(kind(), kind())
    assert len(points) == 81
    # How many of the 81 paths end in each of the 5×5 pixels.
    ways = np.outer([1, 2, 3, 2, 1], [1, 2, 3, 2, 1])
    expected = {(4.0 + row, 4.0 + column): ways[row, column] for row in range(5) for column in range(5)}
    assert summed(points, weights) == expected
    merged = through(kind(), kind(), merge=True)
    assert summed(*merged) == expected
    assert len(merged[0]) == 81  # the last layer's points are not joined
    with_three = through(kind(), kind(), kind(), merge=True)
    assert len(with_three[0]) == 25 * 9
    assert with_three[1].sum() == 9**3


def test_strides_and_dilations_spread_the_field():
    # Position 3 of the second layer: 3·2 + {-2, 0, 2} below; in the first those ·1 + {-1, 0, 1}.
    points, _ = through(plain(), plain(strides=2, kernel_dilation=2, padding=2), at=(3, 3))
    assert set(map(tuple, points)) == grid(range(3, 10), range(3, 10))
    # "SAME" of an even map with stride 2 pads (0, 1): position 3 reads from 6 on.
    points, _ = through(plain(strides=2), plain(), at=(3, 3))
    assert set(map(tuple, points)) == grid(range(4, 11), range(4, 11))


def test_a_shift_by_whole_pixels_shifts_the_field():
    points, weights = through(deform([2.0, -1.0] * 9), deform([0.0, 1.0] * 9))
    assert set(map(tuple, points)) == grid(range(6, 11), range(4, 9))
    assert weights.sum() == 81


def test_a_fractional_reading_between_layers_stands_on_its_neighbours():
    """The second layer reads at (6 + 0.25, 6): three quarters of pixel 6, one of pixel 7."""
    points, weights = through(plain(window=(1, 1)), deform([0.25, 0.0], window=(1, 1)))
    assert summed(points, weights) == {(6.0, 6.0): 0.75, (7.0, 6.0): 0.25}
    points, weights = through(deform([0.5, 0.5], window=(1, 1)), deform([0.25, 0.5], window=(1, 1)))
    assert summed(points, weights) == {
        (6.5, 6.5): 0.375, (7.5, 6.5): 0.125, (6.5, 7.5): 0.375, (7.5, 7.5): 0.125
    }  # fmt: skip


@pytest.mark.parametrize(("shift", "pixel"), [(0.25, 6.0), (0.75, 7.0), (0.5, 6.0), (1.5, 8.0)])
def test_rounded_it_stands_on_the_nearest_at_a_tie_on_the_even(shift, pixel):
    points, weights = through(plain(window=(1, 1)), deform([shift, 0.0], window=(1, 1)), rounded=True)
    assert summed(points, weights) == {(pixel, 6.0): 1.0}


def test_each_offset_group_has_paths_of_its_own():
    """Two groups of the second layer, one shifted up by 2, one right by 3."""
    points, weights = through(plain(window=(1, 1)), deform([-2, 0, 0, 3], window=(1, 1)))
    assert summed(points, weights) == {(4.0, 6.0): 1.0, (6.0, 9.0): 1.0}


def test_modulations_multiply():
    _, weights = through(deform(mask=0.4), plain(), deform(mask=0.5))
    np.testing.assert_allclose(weights, 0.2)


def walk(layers, at):
    """The paths through a stack in plain Python: {point: weight}."""
    paths = {tuple(at): 1.0}
    for place, layer in enumerate(reversed(layers)):
        reached = {}
        for position, weight in paths.items():
            for tap, index in enumerate(itertools.product(*map(range, layer.window))):
                for group in range(1 if layer.offset is None else layer.offset.shape[-3]):
                    point = [
                        position[a] * layer.strides[a] - layer.padding[a][0] + index[a] * layer.kernel_dilation[a]
                        + (0 if layer.offset is None else float(layer.offset[position][group, tap, a]))
                        for a in (0, 1)
                    ]  # fmt: skip
                    tapped = weight * (1 if layer.mask is None else float(layer.mask[position][group, tap]))
                    for corner in [(0, 0)] if place == len(layers) - 1 else itertools.product((0, 1), repeat=2):
                        share = 1.0
                        if place < len(layers) - 1:
                            pixel = [math.floor(p) + c for p, c in zip(point, corner, strict=True)]
                            share = math.prod(1 - abs(p - q) for p, q in zip(point, pixel, strict=True))
                            if not all(0 <= q < size for q, size in zip(pixel, layer.spatial, strict=True)):
                                continue
                        else:
                            pixel = [round(p, 5) for p in point]
                        reached[tuple(pixel)] = reached.get(tuple(pixel), 0) + tapped * share
        paths = reached
    return paths


@pytest.fixture(scope="module")
def layers():
    """Of a network: strided, deformable, a shortcut beside that, deformable."""
    return looked(both()["nnx"], image())


@pytest.mark.parametrize("at", [(0, 0), (1, 2)])
def test_a_network_gives_what_a_walk_in_plain_python_gives(layers, at):
    stem, deformed, _, last = layers
    total = summed(*sampling_through(layers, at, max_points=10**7))
    walked = {point: weight for point, weight in walk([stem, deformed, last], at).items() if weight}
    assert total.keys() == walked.keys()
    assert total == pytest.approx(walked, abs=1e-5)
    merged = summed(*sampling_through(layers, at, merge=True))
    assert merged == pytest.approx(walked, abs=1e-5)


def test_of_a_residual_sum_the_branch_with_deformable_layers_is_followed(layers):
    """The shortcut of 1×1 is called last."""
    points, weights = sampling_through(layers, (1, 1), max_points=10**6)
    again = sampling_through([layers[0], layers[1], layers[3]], (1, 1), max_points=10**6)
    np.testing.assert_array_equal(points, again[0])
    np.testing.assert_array_equal(weights, again[1])
    shortcut, _ = sampling_through([layers[0], layers[2], layers[3]], (1, 1), max_points=10**6)
    assert len(shortcut) < len(points)


def test_a_part_of_the_layers_ends_at_the_map_of_its_first():
    layers = by_hand(plain(strides=2), plain(), plain())
    points, _ = sampling_through(layers[1:2], (3, 3))
    assert set(map(tuple, points)) == grid((2, 3, 4), (2, 3, 4))


def test_paths_end_where_they_leave_a_map_between_layers():
    points, _ = through(plain(), plain(), at=(0, 0))
    assert len(points) == 36  # of the second layer's nine taps four are in the map
    assert set(map(tuple, points)) == grid((-1, 0, 1, 2), (-1, 0, 1, 2))
    points, _ = through(plain(padding="CIRCULAR"), plain(padding="CIRCULAR"), at=(0, 0))
    assert len(points) == 81
    assert set(map(tuple, points)) == grid((10, 11, 0, 1, 2), (10, 11, 0, 1, 2))


def test_wild_offsets_read_nothing():
    offset = np.zeros(18, np.float32)
    offset[:4] = np.inf, 0, np.nan, 1e30
    points, _ = through(plain(), deform(offset))
    assert len(points) == 63


def test_the_number_of_points_is_capped_the_strongest_first_and_it_says_so(layers):
    _, weights = sampling_through(layers, (1, 1), max_points=10**6)
    assert (np.diff(weights) <= 0).all()
    with pytest.warns(UserWarning, match="only the strongest 500 paths were followed; raise max_points, or pass merge"):
        capped = sampling_through(layers, (1, 1), max_points=500)
    assert len(capped[0]) == len(capped[1]) == 500
    assert capped[1][0] == pytest.approx(weights[0])
    with pytest.warns(UserWarning, match="strongest 4 paths"):
        (four, _) = sampling_through(layers[:1], (1, 1), max_points=4)
    assert four.shape == (4, 2)


@pytest.mark.parametrize("rank", [1, 3])
def test_one_and_three_axes(rank):
    one = {"window": (1,) * rank}
    points, weights = through(plain(**one), deform(0.25, **one), at=(3,) * rank, size=(6, 7, 8)[:rank])
    assert points.shape == (2**rank, rank)
    np.testing.assert_allclose(weights @ points, 3.25)
    np.testing.assert_allclose(weights.max(), 0.75**rank)


@pytest.mark.parametrize(
    ("layers", "at", "options", "error", "message"),
    [
        ([], (0, 0), {}, TypeError, "layers is empty or not made of Layer; wanted what looked"),
        ([plain()], (12, 0), {}, ValueError, r"at=\(12, 0\) is no output position of layers.0; wanted 2 ints within"),
        ([plain()], (0.5, 0), {}, ValueError, r"at=\(0.5, 0\) is no output position"),
        ([plain()], 3, {}, ValueError, "at=3 is no output position"),
        ([plain()], (0, 0), {"max_points": 0}, ValueError, "max_points=0 is too small"),
    ],
)
def test_errors_name_the_argument(layers, at, options, error, message):
    with pytest.raises(error, match=message):
        sampling_through(by_hand(*layers), at, **options)


def test_a_pooling_on_the_way_is_named_and_the_advice_works():
    model = stack(plain_layer(), plain_layer())
    model.layers.insert(1, lambda x: nnx.max_pool(x, (2, 2), (2, 2)))
    layers = looked(model, X)
    with pytest.raises(ValueError, match=r"layers.2 reads a map of \(6, 6\), but layers.0 .*layers\[1:\]"):
        sampling_through(layers, (3, 3))
    assert len(sampling_through(layers[1:], (3, 3))[0]) == 9


# The plot


@pytest.fixture(autouse=True)
def _no_open_pictures():
    yield
    plt.close("all")


def test_dots_lie_at_the_points_the_strongest_on_top():
    points, weights = np.array([[3.5, 4.0], [8.0, 9.0], [1.0, 2.0]]), np.array([1.0, 0.5, 0.75])
    ax = plot_sampling_through(np.zeros((24, 24)), points, weights, spatial=(12, 12))
    dots = ax.collections[-1]
    np.testing.assert_array_equal(dots.get_offsets(), points[[1, 2, 0], ::-1])
    np.testing.assert_array_equal(dots.get_array(), [0.5, 0.75, 1.0])
    assert (np.diff(dots.get_sizes()) > 0).all()
    assert list(ax.images[0].get_extent()) == [-0.5, 11.5, 11.5, -0.5]
    assert plot_sampling_through(np.zeros((4, 4)), points[:0], weights[:0], ax=ax) is ax


def test_the_plot_names_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"points has shape \(3, 3\) and weights \(3,\); wanted \(P, 2\) and \(P,\)"):
        plot_sampling_through(np.zeros((4, 4)), np.zeros((3, 3)), np.zeros(3))
