"""`dcn_jax.viz`: the artists stand where the points say, and what does not fit is refused by name."""

import math
import subprocess
import sys

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

from dcn_jax import sampling_points
from dcn_jax.geometry import resolve_window
from dcn_jax.viz import plot_sampling

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RNG = np.random.default_rng(0)
H, W = 8, 10
IMAGE = RNG.random((H, W))
OFFSET = RNG.normal(size=(H, W, 2 * 9 * 2)).astype(np.float32)  # two offset groups
POINTS = sampling_points(jnp.asarray(OFFSET), (3, 3), spatial=(H, W))
MASK = RNG.random((H, W, 2 * 9)).astype(np.float32)


def plot(image=IMAGE, offset=OFFSET, mask=None, *, window=(3, 3), **options):
    return plot_sampling(image, offset, mask, window=window, **options)


def zeros(window, **options):
    """The offsets of a plain convolution of this geometry."""
    out_spatial = resolve_window(window, spatial=(H, W), **options).out_spatial
    return jnp.zeros((*out_spatial, math.prod(window) * 2))


@pytest.fixture(autouse=True)
def _pictures(monkeypatch):
    """No picture is ever shown, and none stays open."""
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("plot_sampling called show"))
    yield
    plt.close("all")


def drawn(ax, label):
    """The (x, y) of the scattered markers with this label, as (rows, columns)."""
    (artist,) = [c for c in ax.collections if c.get_label() == label]
    return np.asarray(artist.get_offsets())[:, ::-1], artist


def test_each_dot_is_where_its_tap_reads():
    ax = plot(at=[(2, 3), (7, 9)])
    dots, _ = drawn(ax, "where the taps read")
    np.testing.assert_allclose(dots, np.concatenate([POINTS[2, 3], POINTS[7, 9]]).reshape(-1, 2))


def test_the_regular_grid_is_that_of_the_plain_convolution():
    ax = plot(at=(2, 3))
    grid, _ = drawn(ax, "regular grid")
    around = [[2 + dy, 3 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    np.testing.assert_array_equal(grid, around * 2)
    np.testing.assert_array_equal(drawn(ax, "output position")[0], [[2, 3]])


def test_each_line_leads_from_the_grid_to_the_reading():
    ax = plot(at=(2, 3))
    (lines,) = [c for c in ax.collections if hasattr(c, "get_segments")]
    segments = np.stack(lines.get_segments())[..., ::-1]  # (OG * K, 2 ends, 2)
    np.testing.assert_allclose(segments[:, 0], drawn(ax, "regular grid")[0])
    np.testing.assert_allclose(segments[:, 1], drawn(ax, "where the taps read")[0])


def test_colour_and_size_are_the_modulation():
    dots = drawn(plot(mask=MASK, at=(2, 3)), "where the taps read")[1]
    np.testing.assert_array_equal(dots.get_array(), MASK[2, 3])
    assert (np.argsort(dots.get_sizes()) == np.argsort(MASK[2, 3])).all()
    assert dots.get_clim() == (0, 1)


def test_without_a_mask_every_modulation_is_one_and_above_one_the_colours_stretch():
    assert (drawn(plot(at=(2, 3)), "where the taps read")[1].get_array() == 1).all()
    assert drawn(plot(mask=2 * MASK, at=(2, 3)), "where the taps read")[1].get_clim() == (
        0,
        2 * MASK[2, 3].max(),
    )


@pytest.mark.parametrize(
    "geometry",
    [
        {"strides": 2},
        {"padding": "VALID", "strides": 1},
        {"padding": 2, "kernel_dilation": 2, "strides": (1, 2)},
        {"window": (1, 5)},
    ],
)
def test_the_geometry_is_that_of_sampling_points(geometry):
    geometry = {"window": (3, 3)} | geometry
    offset = zeros(**geometry) + 0.5
    points = sampling_points(offset, spatial=(H, W), **geometry)
    ax = plot(offset=offset, at=[(0, 0), (1, 2)], **geometry)
    dots, _ = drawn(ax, "where the taps read")
    np.testing.assert_array_equal(dots, np.concatenate([points[0, 0], points[1, 2]]).reshape(-1, 2))
    np.testing.assert_array_equal(drawn(ax, "regular grid")[0], dots - 0.5)


@pytest.mark.parametrize(("mode", "row"), [("edge", 0), ("wrap", H - 1), ("reflect", 1), ("symmetric", 0)])
def test_beyond_the_border_a_dot_lies_where_its_tap_reads(mode, row):
    ax = plot(offset=zeros((3, 3)), at=(0, 4), padding_mode=mode)
    np.testing.assert_array_equal(drawn(ax, "where the taps read")[0][:3], [[row, 3], [row, 4], [row, 5]])
    np.testing.assert_array_equal(drawn(ax, "regular grid")[0][:3], [[-1, 3], [-1, 4], [-1, 5]])


def test_a_padding_may_name_the_mode():
    circular = drawn(plot(at=(0, 4), padding="CIRCULAR"), "where the taps read")[0]
    np.testing.assert_array_equal(circular, drawn(plot(at=(0, 4), padding_mode="wrap"), "where the taps read")[0])


def test_an_image_of_another_size_lies_under_the_map():
    ax = plot(RNG.random((80, 100, 3)), at=(2, 3), spatial=(H, W))
    assert list(ax.images[0].get_extent()) == [-0.5, W - 0.5, H - 0.5, -0.5]
    np.testing.assert_array_equal(drawn(ax, "output position")[0], [[2, 3]])


@pytest.mark.parametrize(
    "image", [jnp.zeros((H, W), jnp.bfloat16), np.zeros((H, W, 1), bool), np.zeros((H, W, 4), np.uint8)]
)
def test_images_of_all_kinds_are_drawn(image):
    plot(image, at=(0, 0)).figure.canvas.draw()


def test_wild_offsets_do_not_break_the_picture():
    offset = OFFSET.copy()
    offset[2, 3, :6] = np.repeat([np.inf, np.nan, 1e30], 2)
    ax = plot(offset=offset, at=(2, 3))
    ax.figure.canvas.draw()
    assert ax.get_xlim() == (-1.5, W + 0.5)
    assert ax.get_ylim() == (H + 0.5, -1.5)


def test_it_draws_on_the_axes_it_is_given():
    _, axes = plt.subplots(1, 2)
    assert plot(at=(0, 0), ax=axes[1]) is axes[1]
    assert not axes[0].has_data()
    assert plot(at=(0, 0)).figure is not axes[0].figure


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros(5)}, r"image has shape \(5,\); wanted \(H, W\)"),
        ({"image": np.zeros((5, 5, 2))}, r"image has shape \(5, 5, 2\); wanted .*1, 3 or 4 channels"),
        ({"offset": OFFSET[None]}, r"offset has shape \(1, 8, 10, 36\); wanted \(Ho, Wo, OG \* 9 \* 2\).*offset\[0\]"),
        ({"offset": OFFSET[..., :17]}, r"offset has shape \(8, 10, 17\); wanted \(\*batch, 8, 10, OG \* 18\)"),
        ({"mask": MASK[..., :9]}, r"mask has shape \(8, 10, 9\); wanted \(8, 10, 18\)"),
        ({"at": (1, 2, 3)}, r"at=\(1, 2, 3\) is not understood; wanted one or more \(row, column\) pairs"),
        ({"at": (1.5, 2.0)}, r"at=\(1.5, 2.0\) is not understood"),
        ({"at": []}, r"at=\[\] is not understood"),
        ({"at": [(8, 0)]}, r"at=\[\(8, 0\)\] lies outside the 8 x 10 output positions"),
        ({"at": (0, -1)}, r"at=\(0, -1\) lies outside the 8 x 10 output positions"),
        ({"window": (3, 5)}, r"offset has shape \(8, 10, 36\); wanted \(\*batch, 8, 10, OG \* 30\).*pass the window"),
        ({"window": (3, 3, 3)}, r"window=\(3, 3, 3\) has 3 entries; wanted an int or 2 ints"),
        (
            {"strides": 2},
            r"offset has shape \(8, 10, 36\); wanted \(\*batch, 4, 5, .*pass the window, strides.*now \(8, 10\)",
        ),
        ({"spatial": (8, 10, 3)}, r"spatial=\(8, 10, 3\) has 3 entries"),
        ({"padding": "CAUSAL"}, r"padding='CAUSAL' has no meaning"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        plot(**{"at": (2, 3)} | change)


def run(code):
    return subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)


def test_matplotlib_is_imported_when_called():
    assert run("import sys, dcn_jax.viz; sys.exit('matplotlib' in sys.modules)").returncode == 0


def test_without_matplotlib_the_error_says_what_to_install():
    result = run(
        "import sys; sys.modules['matplotlib'] = None; import numpy as np; from dcn_jax.viz import plot_sampling\n"
        "plot_sampling(np.zeros((4, 4)), np.zeros((4, 4, 18)), window=(3, 3), at=(0, 0))"
    )
    assert 'dcn_jax.viz needs the extra "viz": pip install "dcn-jax[viz]"' in result.stderr
