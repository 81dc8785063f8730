"""The op's values and first gradients: against the oracle, by identities, and in every dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.support import oracle
from tests.support.cases import Case, draw
from tests.support.running import assert_close, check_against_oracle, compiled, value_and_gradients

needs, quick = pytest.mark.needs, pytest.mark.quick

# Each row differs from the others in what the name says; together they cover every option at every place it can take.
CASES = [
    pytest.param(draw((2, 5, 6, 4), (3, 3), 5), marks=quick, id="plain"),
    pytest.param(draw((2, 5, 6, 4), (3, 3), 5, mask=False, bias=False), marks=quick, id="v1, no bias"),
    pytest.param(draw((2, 5, 4, 6), (3, 3), 4, feature_group_count=2, offset_groups=3), marks=quick, id="groups"),
    pytest.param(draw((2, 4, 5, 6), (3, 3), 12, feature_group_count=6, offset_groups=2, mask=False), id="depthwise"),
    pytest.param(draw((2, 7, 6, 3), (2, 4), 2, strides=(2, 3)), id="strides, even kernel"),
    pytest.param(draw((1, 6, 7, 2), (2, 3), 3, strides=2, padding="SAME_LOWER"), id="SAME_LOWER"),
    pytest.param(draw((2, 7, 8, 2), (3, 2), 3, padding="VALID", kernel_dilation=(2, 3)), id="VALID, dilation"),
    pytest.param(draw((2, 4, 4, 2), (1, 3), 3, padding=2, strides=(1, 2)), id="int padding"),
    pytest.param(draw((2, 5, 4, 2), (3, 1), 3, padding=(1, 0), kernel_dilation=2, offset_groups=2), id="padding per axis"),
    pytest.param(draw((1, 5, 6, 2), (3, 2), 3, padding=((2, 0), (0, 3)), strides=2), marks=quick, id="asymmetric padding"),
    pytest.param(draw((1, 7, 8, 2), (3, 3), 3, padding=((-1, 0), (-1, -2))), id="cropping padding"),
    pytest.param(draw((2, 4, 5, 4), (1, 1), 6, feature_group_count=2), id="1×1"),
    pytest.param(draw((2, 2, 3, 2), (5, 4), 2), id="window larger than the map"),
    pytest.param(draw((2, 1, 1, 2), (3, 3), 2), id="map of one pixel"),
    pytest.param(draw((1, 3, 3, 2), (2, 2), 2, padding=((4, 0), (0, 5))), id="outputs outside the map"),
    pytest.param(draw((5, 4, 3), (3, 3), 2), id="no batch"),
    pytest.param(draw((2, 3, 4, 3, 2), (3, 2), 3, offset_groups=2, feature_group_count=1), marks=quick, id="two batch axes"),
    pytest.param(draw((0, 4, 5, 2), (3, 3), 3), marks=quick, id="batch of zero"),
    pytest.param(draw((2, 3, 3, 0), (2, 2), 3), id="no channels"),
    pytest.param(draw((2, 9, 4), (3,), 4, feature_group_count=2, offset_groups=4, strides=2), marks=quick, id="1-D"),
    pytest.param(draw((8, 3), (4,), 2, padding=((3, 0),), kernel_dilation=2), id="1-D, no batch"),
    pytest.param(draw((2, 2, 1, 3), (3,), 2, mask=False), id="1-D, one pixel"),
    pytest.param(draw((2, 3, 4, 3, 4), (2, 3, 2), 2, offset_groups=2, strides=(1, 2, 1)), marks=needs("rank 3"), id="3-D"),
    pytest.param(draw((4, 3, 5, 2), (1, 2, 3), 4, feature_group_count=2, padding=(0, 1, (2, 0)), kernel_dilation=(1, 2, 1), mask=False), marks=[needs("rank 3"), pytest.mark.slow], id="3-D, no batch"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(op, case):
    check_against_oracle(op, case, 1e-5)


@needs("float64")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(draw((2, 5, 4, 4), (3, 2), 2, offset_groups=2, feature_group_count=2), id="2-D"),
        pytest.param(draw((3, 7, 2), (3,), 3, strides=2), id="1-D", marks=pytest.mark.slow),
        pytest.param(draw((1, 2, 3, 3, 2), (2, 2, 1), 2), id="3-D", marks=[needs("rank 3"), pytest.mark.slow]),
    ],
)
def test_float64(op, x64, case):
    check_against_oracle(op, case.astype(np.float64), 1e-13)


# Identities

DENSE = {
    "SAME": draw((2, 7, 8, 4), (3, 3), 3, mask=False),
    "SAME, strides, even kernel": draw((2, 7, 8, 2), (2, 4), 3, strides=(3, 2)),
    "SAME_LOWER, even kernel": draw((1, 6, 5, 2), (4, 2), 3, strides=(2, 1), padding="SAME_LOWER"),
    "VALID, dilation, groups": draw((2, 9, 8, 6), (3, 2), 4, padding="VALID", kernel_dilation=(2, 3), feature_group_count=2, offset_groups=3),
    "pairs": draw((1, 5, 6, 2), (5, 3), 2, padding=((4, 0), (-1, 3)), strides=(2, 1)),
    "1-D": draw((2, 9, 4), (4,), 8, strides=2, feature_group_count=4, offset_groups=2),
    "3-D": draw((1, 4, 5, 3, 2), (2, 3, 2), 2, strides=(1, 2, 1), kernel_dilation=(2, 1, 1)),
}  # fmt: skip
DENSE = [pytest.param(case, id=name, marks=needs("rank 3") if name == "3-D" else ()) for name, case in DENSE.items()]


def convolve(x, kernel, bias, *, padding="SAME", strides=1, kernel_dilation=1, feature_group_count=1):
    """The plain convolution, channels last."""
    rank = kernel.ndim - 2
    spatial = "DHW"[:rank]
    y = lax.conv_general_dilated(
        x,
        kernel,
        (strides,) * rank if isinstance(strides, int) else strides,
        padding,
        rhs_dilation=(kernel_dilation,) * rank if isinstance(kernel_dilation, int) else kernel_dilation,
        feature_group_count=feature_group_count,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )
    return np.asarray(y) + bias


@pytest.mark.parametrize("case", DENSE)
def test_without_offsets_it_is_the_plain_convolution(op, case):
    x, kernel, offset, mask, bias = case.arrays
    mask = None if mask is None else np.ones_like(mask)
    y = compiled(op, **case.options)(x, kernel, np.zeros_like(offset), mask, bias)
    assert_close(y, convolve(x, kernel, bias, **case.options), 1e-6)


@pytest.mark.parametrize("shift", [(1, 0), (-2, 3), (4, -7)])
def test_whole_offsets_move_the_padding(op, shift):
    (x, kernel, offset, _, bias), _ = draw((2, 5, 6, 3), (3, 2), 4, padding=1, offset_groups=3)
    offset = np.broadcast_to(np.float32(shift), (*offset.shape[:-1], offset.shape[-1] // 2, 2)).reshape(offset.shape)
    y = compiled(op, padding=1)(x, kernel, offset, None, bias)
    moved = [(1 - s, 1 + s) for s in shift]
    assert_close(y, convolve(x, kernel, bias, padding=moved), 1e-6)


def test_each_tap_and_group_has_its_own_offset_and_mask(op):
    """The order of the channels: an offset of one tap of one group moves that tap along that axis, in that group alone."""
    x, kernel = np.zeros((1, 5, 5, 4), np.float32), np.zeros((3, 3, 4, 1), np.float32)
    x[0, 2, 3, 2] = 1  # group 1 of 2 holds channels 2 and 3
    kernel[0, 2, 2, 0] = 1  # tap 2 reads one row up and one column to the right
    offset, mask = np.zeros((1, 5, 5, 2, 9, 2), np.float32), np.ones((1, 5, 5, 2, 9), np.float32)
    offset[..., 1, 2, :] = (1, -2)  # so it now reads the same row, one column to the left
    mask[..., 1, 2] = 0.25
    y = compiled(op)(x, kernel, offset.reshape(1, 5, 5, 36), mask.reshape(1, 5, 5, 18))
    wanted = np.zeros((1, 5, 5, 1), np.float32)
    wanted[0, 2, 4, 0] = 0.25
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("argument", [0, 1, 3])
def test_linear_in_x_kernel_and_mask(op, argument):
    case = draw((2, 4, 5, 4), (3, 3), 4, feature_group_count=2, offset_groups=2, bias=False)
    first, second = case.arrays[argument], draw((2, 4, 5, 4), (3, 3), 4, feature_group_count=2, offset_groups=2, seed=1).arrays[argument]  # fmt: skip
    op = compiled(op, **case.options)
    of = lambda value: op(*[value if i == argument else a for i, a in enumerate(case.arrays)])  # noqa: E731
    assert_close(of(2 * first - 3 * second), 2 * np.asarray(of(first)) - 3 * np.asarray(of(second)), 1e-5)


# Dtypes


@needs("half")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_positions_in_float32(op, dtype):
    """On a map 4,096 wide, where a bfloat16 coordinate is off by up to 8 pixels and a float16 one by up to 1."""
    x = jnp.asarray(np.random.default_rng(0).integers(-4, 5, (1, 2, 4096, 1)), dtype)
    kernel = jnp.ones((1, 1, 1, 1), dtype)
    rng = np.random.default_rng(1)
    offset = np.stack([np.zeros((1, 2, 4096)), rng.integers(-8, 9, (1, 2, 4096)) / 4], axis=-1)  # exact in half
    op = compiled(op)
    y = op(x, kernel, jnp.asarray(offset, dtype))
    assert y.dtype == dtype
    np.testing.assert_array_equal(np.float64(y), oracle.deform_conv(np.float64(x), np.float64(kernel), offset))
    # A float32 offset is not rounded to the dtype of x either.
    far = offset + np.stack([np.zeros(4096), 2000 - np.arange(4096)], axis=-1)
    y = op(x, kernel, jnp.asarray(far, jnp.float32))
    np.testing.assert_array_equal(np.float64(y), oracle.deform_conv(np.float64(x), np.float64(kernel), far))


@needs("half")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("summed", ["channels", "taps"])
def test_half_precision_accumulates_in_float32(op, dtype, summed):
    """A sum of n ones stops at 256 in bfloat16, at 2,048 in float16."""
    n = 300 if dtype == jnp.bfloat16 else 2400
    channels, taps = (n, 1) if summed == "channels" else (n // 20, 20)
    x, kernel = jnp.ones((1, taps, channels), dtype), jnp.ones((taps, channels, 1), dtype)
    y = compiled(op, padding="VALID")(x, kernel, jnp.zeros((1, 1, taps), dtype))
    assert y.dtype == dtype
    assert float(y[0, 0, 0]) == n


@needs("half")
def test_half_precision_accumulates_gradients_in_float32(op):
    """Each gradient here is a sum of 300 ones: over positions (x, kernel, bias) or features (mask)."""
    n, dtype = 300, jnp.bfloat16
    to_pixel_0 = -jnp.arange(n, dtype=jnp.float32)[None, :, None]  # all positions read the pixel 0
    x, mask = jnp.ones((1, n, 1), dtype), jnp.ones((1, n, 1), dtype)

    def total(x, kernel, mask, bias):
        return jnp.sum(op(x, kernel, to_pixel_0, mask, bias), dtype=jnp.float32)

    gradients = jax.jit(jax.grad(total, (0, 1, 3)))(x, jnp.ones((1, 1, 1), dtype), mask, jnp.zeros(1, dtype))
    assert [g.dtype for g in gradients] == [dtype] * 3
    assert [float(g.ravel()[0]) for g in gradients] == [n] * 3
    d_mask = jax.jit(jax.grad(total, 2))(x, jnp.ones((1, 1, n), dtype), mask, jnp.zeros(n, dtype))
    np.testing.assert_array_equal(np.float32(d_mask), n)


@needs("half")
@pytest.mark.parametrize("dtype", [pytest.param(jnp.bfloat16, marks=quick), jnp.float16])
def test_half_precision_is_as_near_as_its_inputs_allow(op, dtype):
    rounded = draw((2, 5, 6, 8), (3, 3), 4, offset_groups=2).astype(dtype)
    exact = rounded.astype(np.float64)
    epsilon = float(jnp.finfo(dtype).eps)
    wanted = oracle.deform_conv(*exact.arrays)
    cotangent = np.random.default_rng(1).standard_normal(wanted.shape).astype(dtype)
    y, gradients = jax.jit(functools.partial(value_and_gradients, op))(rounded.arrays, cotangent)
    assert y.dtype == dtype
    assert_close(np.float64(y), wanted, 2 * epsilon)
    for gradient, wanted in zip(gradients, oracle.gradients(np.float64(cotangent), *exact.arrays), strict=True):
        assert gradient.dtype == dtype
        assert_close(np.float64(gradient), wanted, 4 * epsilon)


@needs("half")
def test_preferred_element_type(op):
    x, kernel, offset, mask, bias = draw((1, 4, 4, 8), (3, 3), 4).astype(jnp.bfloat16).arrays
    rounded = compiled(op)(x, kernel, offset, mask, bias)
    y = compiled(op, preferred_element_type=jnp.float32)(x, kernel, offset, mask, bias)
    assert (rounded.dtype, y.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(y.astype(jnp.bfloat16), rounded)
    assert not np.array_equal(y, np.float32(rounded)), "the result went through bfloat16"


@needs("half")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_offset_and_mask_of_another_dtype(op, dtype):
    """Also under strict promotion: they are no operands of the sum."""
    x, kernel, offset, mask, bias = draw((1, 4, 4, 2), (3, 3), 2).arrays
    mixed = Case((x, kernel, offset.astype(dtype), mask.astype(dtype), bias), {})
    check_against_oracle(op, mixed, 1e-5)


@needs("half")
@pytest.mark.lenient
def test_x_kernel_and_bias_promote(op):
    x, kernel, offset, mask, bias = draw((1, 4, 4, 2), (3, 3), 2).arrays
    half = jnp.bfloat16
    for mixed in [(x.astype(half), kernel), (x, kernel.astype(half))]:
        y = compiled(op)(*mixed, offset, mask, bias.astype(half))
        assert y.dtype == np.float32
        assert_close(y, oracle.deform_conv(*mixed, offset, mask, bias.astype(half)), 1e-5)
    # A bias wider than the rest is not rounded to it.
    halves = x.astype(half), kernel.astype(half), offset, mask
    y = compiled(op)(*halves, bias)
    assert y.dtype == np.float32
    without = compiled(op, preferred_element_type=np.float32)(*halves)
    assert_close(y, np.asarray(without) + bias, 1e-6)


@needs("half")
def test_strict_promotion_refuses_to_mix_x_and_kernel(op):
    x, kernel, offset, *_ = draw((1, 4, 4, 2), (3, 3), 2).arrays
    with pytest.raises(jax.dtypes.TypePromotionError):
        op(x.astype(jnp.bfloat16), kernel, offset)


@needs("float64")
@pytest.mark.lenient
def test_float64_where_only_one_argument_is(op, x64):
    """What is wider than float32 stays so: positions of a float64 offset, a float64 bias, a float64 kernel."""
    x, kernel, offset, mask, bias = draw((1, 3, 4, 2), (3, 3), 2).arrays
    op, bias = compiled(op), bias + np.float64(1e-9)
    alone = op(x, 0 * kernel, offset, mask, bias)
    assert alone.dtype == np.float64
    np.testing.assert_array_equal(alone, np.broadcast_to(bias, alone.shape))
    y = op(x, kernel.astype(np.float64), offset, mask)
    assert y.dtype == np.float64
    assert_close(y, oracle.deform_conv(x, kernel, offset, mask), 1e-12)
    wide = x.astype(np.float64), kernel.astype(np.float64), offset + 1e-9
    assert_close(op(*wide), oracle.deform_conv(*wide), 1e-12)


@needs("complex")
def test_complex(op):
    """The op is linear in x and kernel: a complex input is a real and an imaginary one."""
    x, kernel, offset, mask, _ = draw((1, 4, 3, 2), (3, 3), 2, bias=False).arrays
    other, *_ = draw((1, 4, 3, 2), (3, 3), 2, seed=1).arrays
    y = compiled(op)(x + 1j * other, kernel.astype(np.complex64), offset, mask)
    assert y.dtype == np.complex64
    assert_close(y.real, oracle.deform_conv(x, kernel, offset, mask), 1e-5)
    assert_close(y.imag, oracle.deform_conv(other, kernel, offset, mask), 1e-5)


@pytest.mark.parametrize("precision", ["highest", lax.Precision.HIGHEST])
def test_precision_reaches_the_product(op, precision):
    arguments = draw((1, 3, 3, 2), (3, 3), 2).arrays
    lowered = jax.jit(functools.partial(op, precision=precision)).lower(*arguments).as_text()
    assert "HIGHEST" in lowered
    assert "HIGHEST" not in jax.jit(op).lower(*arguments).as_text()


def test_numpy_arguments_and_options(op):
    """Arrays and ints of NumPy do as well as JAX's and Python's."""
    case = draw((2, 6, 7, 4), (3, 3), 4, strides=2, padding=(2, 1), kernel_dilation=2, feature_group_count=2)
    of_numpy = {"strides": np.int32(2), "padding": (np.int64(2), np.int8(1)), "kernel_dilation": (np.int64(2), 2), "feature_group_count": np.int64(2)}  # fmt: skip
    y = compiled(op, **case.options)(*case.arrays)
    np.testing.assert_allclose(op(*case.arrays, **of_numpy), y, rtol=1e-5, atol=1e-5)


@needs("half")
def test_gradient_of_a_narrow_kernel_is_summed_wide(op):
    """Of 5,003 positions in blocks: were their parts summed in bfloat16, the last digits would be lost."""
    x, kernel = jnp.ones((1, 5003, 2), jnp.bfloat16), jnp.ones((1, 2, 1), jnp.bfloat16)
    gradient = jax.grad(lambda k: op(x, k, jnp.zeros((1, 5003, 1))).astype(jnp.float32).sum())(kernel)
    np.testing.assert_array_equal(gradient, jnp.bfloat16(5003))
