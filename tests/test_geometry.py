"""Window arithmetic: output sizes are XLA's, taps land where the formula says, and errors say what is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from dcn_jax import sampling_points
from dcn_jax.geometry import canonical_padding, resolve_window
from tests.support import oracle
from tests.support.running import compiled, value_and_gradients


@st.composite
def geometries(draw):
    """(size, spatial, options) of 1 to 3 axes, some of which leave no output."""
    rank = draw(st.integers(1, 3))
    ints = lambda low, high: st.tuples(*[st.integers(low, high)] * rank)  # noqa: E731
    size, spatial = draw(ints(1, 5)), draw(ints(1, 9))
    padding = draw(
        st.one_of(
            st.sampled_from(["SAME", "SAME_LOWER", "VALID", "same", "valid"]),
            st.integers(0, 4),
            ints(0, 4),
            st.tuples(*[st.tuples(st.integers(-3, 5), st.integers(-3, 5))] * rank),
            st.lists(st.integers(0, 4), min_size=rank, max_size=rank),
        )
    )
    options = {
        "strides": draw(st.one_of(st.integers(1, 4), ints(1, 4), st.none())),
        "kernel_dilation": draw(st.one_of(st.integers(1, 4), ints(1, 4), st.none())),
        "padding": padding,
    }
    return size, spatial, options


def plain_output(size, spatial, strides, dilation, padding):
    """The output sizes of the plain convolution, in XLA's own words."""
    letters = "DHW"[: len(size)]
    if not isinstance(padding, str) and any(s + sum(p) < 0 for s, p in zip(spatial, padding, strict=True)):
        return (0,)  # cropped away; lax refuses it with words of its own
    plain = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        rhs_dilation=dilation,
        padding=padding,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    )
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((1, *spatial, 1), (*size, 1, 1))]
    return jax.eval_shape(plain, *shapes).shape[1:-1]


@settings(deadline=None, max_examples=150, derandomize=True)
@given(geometries())
def test_output_sizes_are_those_of_lax(geometry):
    size, spatial, options = geometry
    strides, dilation, padding = options["strides"], options["kernel_dilation"], options["padding"]
    strides, dilation = (1 if v is None else v for v in (strides, dilation))
    strides, dilation, padding = ((v,) * len(size) if isinstance(v, int) else v for v in (strides, dilation, padding))
    if isinstance(padding, str):
        padding = padding.upper()
    else:
        padding = [pad if isinstance(pad, tuple) else (pad, pad) for pad in padding]
    wanted = plain_output(size, spatial, strides, dilation, padding)
    if 0 in wanted:
        with pytest.raises(ValueError, match="the output has no positions"):
            resolve_window(size, spatial=spatial, **options)
    else:
        assert resolve_window(size, spatial=spatial, **options).out_spatial == wanted


@settings(deadline=None, max_examples=20, derandomize=True)
@given(geometries().filter(lambda g: g[2]["strides"] and g[2]["kernel_dilation"]), st.integers(1, 2), st.integers(0, 1))
def test_taps_land_where_the_formula_says(geometry, groups, batch_axes):
    size, spatial, options = geometry
    if isinstance(options["padding"], str):
        options = options | {"padding": options["padding"].upper()}
    wanted = oracle.Geometry(spatial, size, options["strides"], options["padding"], options["kernel_dilation"])
    if 0 in wanted.out:
        return
    taps, rank, batch = int(np.prod(size)), len(size), (2,) * batch_axes
    offset = np.random.default_rng(0).integers(-64, 65, (*batch, *wanted.out, groups, taps, rank)) / 16
    flat = jnp.asarray(offset.reshape(*batch, *wanted.out, -1), np.float32)
    points = compiled(sampling_points, window=size, spatial=spatial, **options)(flat)
    assert points.shape == offset.shape
    assert points.dtype == np.float32
    regular = np.array([wanted.tap_positions(p) for p in np.ndindex(*wanted.out)]).reshape(*wanted.out, 1, taps, rank)
    np.testing.assert_array_equal(points, regular + offset)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn])
def test_points_are_float32_for_narrower_offsets(dtype):
    """A coordinate above 256 has no fraction left in bfloat16."""
    points = sampling_points(jnp.full((4096, 1), 0.25, dtype), (1,), spatial=(4096,))
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points[:, 0, 0, 0], np.arange(4096) + 0.25)


def test_points_are_float64_for_float64_offsets(x64):
    points = sampling_points(jnp.full((4096, 1), 1e-10, np.float64), (1,), spatial=(4096,))
    assert points.dtype == np.float64
    np.testing.assert_array_equal(points[:, 0, 0, 0], np.arange(4096) + 1e-10)


def test_points_differentiate_to_one():
    place = functools.partial(sampling_points, window=(2,), spatial=(5,))
    _, (d_offset,) = value_and_gradients(place, (jnp.zeros((5, 2)),), np.ones((5, 1, 2, 1)))
    np.testing.assert_array_equal(d_offset, 1)


def test_ints_of_any_kind():
    """NumPy's and JAX's whole numbers do as well as Python's, alone or in a sequence, for every option."""
    plain = resolve_window((3, 2), spatial=(9, 8), strides=(2, 1), padding=((1, 1), (1, 1)), kernel_dilation=2)
    for kind in (np.int32, np.uint8, np.int64, jnp.int32):
        one, two = kind(1), kind(2)
        for padding in (one, (one, one), [one, (1, one)], [[one, one], [one, one]]):
            window = resolve_window(
                (kind(3), two), spatial=[kind(9), kind(8)], strides=[two, one], padding=padding, kernel_dilation=two
            )
            assert window == plain
            assert repr(window) == repr(plain)


PADDINGS = '"SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", an int, 2 ints or 2 (low, high) pairs'


@pytest.mark.parametrize(
    ("padding", "error", "message"),
    [
        ("CAUSAL", ValueError, "padding='CAUSAL' has no meaning in a deformable convolution: an offset may read later positions, so the result is not causal; for the same border use padding=((kernel_dilation * (K - 1), 0),)"),
        ("FULL", ValueError, f"padding='FULL' is not known; wanted {PADDINGS}"),
        (None, TypeError, f"padding=None is a NoneType; wanted {PADDINGS}"),
        (1.0, TypeError, f"padding=1.0 is a float; wanted {PADDINGS}"),
        (True, TypeError, f"padding=True is a bool; wanted {PADDINGS}"),
        ((1, 1.5), TypeError, f"padding=(1, 1.5) is not made of ints; wanted {PADDINGS}"),
        (((1, 2), (None, 1)), TypeError, f"padding=((1, 2), (None, 1)) is not made of ints; wanted {PADDINGS}"),
        (("SAME", "VALID"), TypeError, f"padding=('SAME', 'VALID') is not made of ints; wanted {PADDINGS}"),
        ((1, 1, 1), ValueError, f"padding=(1, 1, 1) does not fit 2 spatial axes; wanted {PADDINGS}"),
        ([(1, 2)], ValueError, f"padding=[(1, 2)] does not fit 2 spatial axes; wanted {PADDINGS}"),
        (((1, 2, 3), (1, 2, 3)), ValueError, f"padding=((1, 2, 3), (1, 2, 3)) does not fit 2 spatial axes; wanted {PADDINGS}"),
        ((), ValueError, f"padding=() does not fit 2 spatial axes; wanted {PADDINGS}"),
    ],
)  # fmt: skip
def test_padding_errors(padding, error, message):
    with pytest.raises(error) as raised:
        canonical_padding(padding, 2)
    assert str(raised.value) == message


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(("padding", "mode"), [("CIRCULAR", "wrap"), ("reflect", "reflect")])
def test_paddings_that_say_what_lies_beyond(padding, mode, strides):
    """As in Flax: as much on each side whatever the stride, of even windows one more after the map."""
    window = resolve_window((3, 4), spatial=(9, 10), padding=padding, kernel_dilation=(2, 1), strides=strides)
    assert window.pads == ((2, 2), (1, 2))
    assert window.padding_mode == (mode, mode)
    for modes in (mode, (mode, mode), ("zeros", "zeros")):
        same = resolve_window((3, 4), spatial=(9, 10), padding=padding, kernel_dilation=(2, 1), padding_mode=modes)
        assert same.padding_mode == (mode, mode)


@pytest.mark.parametrize(
    ("padding_mode", "padding", "error", "message"),
    [
        ("border", "SAME", ValueError, "padding_mode='border' is not known; wanted one of ('zeros', 'edge', 'wrap', 'reflect', 'symmetric') (torch's \"border\" is \"edge\")"),
        ("reflection", 1, ValueError, '(torch\'s "reflection" is "reflect" with align_corners=True and "symmetric" without)'),
        ("Zeros", 1, ValueError, "padding_mode='Zeros' is not known; wanted one of"),
        (("wrap", "mirror"), 1, ValueError, "padding_mode='mirror' is not known"),
        (("wrap",), 1, ValueError, "padding_mode=('wrap',) has 1 entries; wanted one name, or 2, one per spatial axis"),
        (None, 1, TypeError, "padding_mode=None is a NoneType; wanted one of ('zeros', 'edge', 'wrap', 'reflect', 'symmetric'), or a sequence of one for each spatial axis"),
        (("wrap", None), 1, TypeError, "padding_mode=('wrap', None) is a tuple; wanted one of"),
        (("wrap", "zeros"), "CIRCULAR", ValueError, "padding='CIRCULAR' means padding_mode='wrap', and padding_mode=('wrap', 'zeros') was given"),
        ("edge", "CIRCULAR", ValueError, "padding='CIRCULAR' means padding_mode='wrap', and padding_mode='edge' was given; leave it out, or pass padding as ints"),
    ],
)  # fmt: skip
def test_padding_mode_errors(padding_mode, padding, error, message):
    with pytest.raises(error) as raised:
        resolve_window((3, 3), spatial=(8, 8), padding=padding, padding_mode=padding_mode)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"size": 3}, TypeError, "window=3 is a int; wanted 1, 2 or 3 ints, one per spatial axis"),
        ({"size": ()}, ValueError, "window=() has 0 entries; wanted 1, 2 or 3 ints, one per spatial axis"),
        ({"size": (1, 1, 1, 1)}, ValueError, "window=(1, 1, 1, 1) has 4 entries; wanted 1, 2 or 3 ints"),
        ({"size": (3, 0)}, ValueError, "window=(3, 0) is too small; wanted at least 1 on each axis"),
        ({"size": (3, 2.0)}, TypeError, "window=(3, 2.0) is not made of ints"),
        ({"spatial": (8,)}, ValueError, "spatial=(8,) has 1 entries; wanted an int or 2 ints, one per spatial axis"),
        ({"spatial": (8, 0)}, ValueError, "spatial=(8, 0) is too small; wanted at least 1 on each axis"),
        ({"spatial": None}, TypeError, "spatial=None is not made of ints; wanted an int or 2 ints"),
        ({"strides": 0}, ValueError, "strides=0 is too small; wanted at least 1 on each axis"),
        ({"strides": (1, -1)}, ValueError, "strides=(1, -1) is too small"),
        ({"strides": (1, 1, 1)}, ValueError, "strides=(1, 1, 1) has 3 entries; wanted an int or 2 ints, one per spatial axis"),
        ({"strides": 1.5}, TypeError, "strides=1.5 is not made of ints; wanted an int or 2 ints, one per spatial axis"),
        ({"strides": True}, TypeError, "strides=True is not made of ints"),
        ({"strides": "22"}, TypeError, "strides='22' is not made of ints"),
        ({"kernel_dilation": 0}, ValueError, "kernel_dilation=0 is too small; wanted at least 1 on each axis"),
        ({"kernel_dilation": (2,)}, ValueError, "kernel_dilation=(2,) has 1 entries; wanted an int or 2 ints"),
        ({"kernel_dilation": (2, None)}, TypeError, "kernel_dilation=(2, None) is not made of ints"),
        ({"padding": "VALID", "kernel_dilation": 4}, ValueError, "the output has no positions: a window of extent (9, 5) (size (3, 2), kernel_dilation (4, 4)) does not fit in a map of size (8, 8) with padding ((0, 0), (0, 0)); pad more, or use a smaller kernel or dilation"),
        ({"padding": ((0, -6), (0, 0))}, ValueError, "the output has no positions: a window of extent (3, 2)"),
    ],
)  # fmt: skip
def test_geometry_errors(change, error, message):
    arguments = {"size": (3, 2), "spatial": (8, 8)} | change
    with pytest.raises(error) as raised:
        resolve_window(arguments.pop("size"), **arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 5, 27), "offset has shape (4, 5, 27); wanted (*batch, 4, 5, OG * 18): the output positions, then K * n = 9 * 2 values for each offset group; 27 is what a branch emits: give [..., :18] as offset, and as mask the sigmoid of the rest"),
        ((4, 5, 17), "offset has shape (4, 5, 17); wanted (*batch, 4, 5, OG * 18): the output positions, then K * n = 9 * 2 values for each offset group"),
        ((4, 5, 0), "offset has shape (4, 5, 0); wanted (*batch, 4, 5, OG * 18)"),
        ((5, 4, 18), "offset has shape (5, 4, 18); wanted (*batch, 4, 5, OG * 18)"),
        ((5, 18), "offset has shape (5, 18); wanted (*batch, 4, 5, OG * 18)"),
        ((18,), "offset has shape (18,); wanted (*batch, 4, 5, OG * 18)"),
        ((), "offset has shape (); wanted (*batch, 4, 5, OG * 18)"),
        ((2, 18, 4, 5), "; it looks channels-first: move its channel axis last"),
    ],
)  # fmt: skip
def test_offset_shape_errors(shape, message):
    with pytest.raises(ValueError, match="offset") as raised:
        jax.eval_shape(
            lambda offset: sampling_points(offset, (3, 3), spatial=(4, 5)), jax.ShapeDtypeStruct(shape, np.float32)
        )
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (np.zeros((4, 5, 18), int), "offset has dtype int64; wanted a floating-point array: offset.astype(jnp.float32)"),
        (np.zeros((4, 5, 18), complex), "offset has dtype complex128; wanted a floating-point array"),
        ([0.0] * 18, "offset is a list; wanted an array (wrap it in jnp.asarray)"),
        (None, "offset is a NoneType; wanted an array"),
    ],
)  # fmt: skip
def test_offset_kind_errors(offset, message):
    with pytest.raises(TypeError) as raised:
        sampling_points(offset, (3, 3), spatial=(4, 5))
    assert message in str(raised.value)
