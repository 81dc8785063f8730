"""Every error of the op: it names the argument, what was given and what was wanted, at trace time too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax import deform_conv, select_implementation

# A call that is right: a batch of 2, a map of 6 × 7, a window of 3 × 2, two offset groups and two feature groups.
X, KERNEL, OFFSET, MASK, BIAS = (2, 6, 7, 4), (3, 2, 2, 8), (2, 6, 7, 24), (2, 6, 7, 12), (8,)
SHAPES = {"x": X, "kernel": KERNEL, "offset": OFFSET, "mask": MASK, "bias": BIAS}

SHAPE_ERRORS = [
    # kernel
    ({"kernel": (2, 8)}, "kernel has shape (2, 8); wanted (*window, C // feature_group_count, features) with a window of 1, 2 or 3 axes"),
    ({"kernel": (1, 1, 1, 1, 2, 8)}, "kernel has shape (1, 1, 1, 1, 2, 8); wanted (*window, C // feature_group_count, features) with a window of 1, 2 or 3 axes"),
    ({"kernel": ()}, "kernel has shape (); wanted"),
    ({"kernel": (3, 0, 2, 8)}, "kernel has shape (3, 0, 2, 8); wanted (*window, C // feature_group_count, features) with a window of 1, 2 or 3 axes, none of them empty"),
    ({"kernel": (3, 2, 4, 8)}, "kernel has shape (3, 2, 4, 8); wanted (3, 2, 2, 8): (*window, C // feature_group_count, features) with C = 4, the channels of x, and feature_group_count=2"),
    # PyTorch's order
    ({"kernel": (8, 2, 3, 2)}, "kernel has shape (8, 2, 3, 2); wanted (*window, C // feature_group_count, features). It looks like PyTorch's, (features, C // feature_group_count, *window): pass kernel.transpose(2, 3, 1, 0)"),
    ({"x": (2, 4, 6, 7)}, "x has shape (2, 4, 6, 7); wanted (*batch, *spatial, C) with C = 4, as kernel (3, 2, 2, 8) and feature_group_count=2 have. It looks channels first, as PyTorch's arrays are: pass jnp.moveaxis(x, -3, -1)"),
    ({"x": (2, 4, 6, 7), "kernel": (8, 2, 3, 2)}, "pass kernel.transpose(2, 3, 1, 0)"),
    ({"x": (2, 4, 6, 7), "kernel": (8, 2, 3, 2), "offset": (2, 24, 6, 7)}, "pass kernel.transpose(2, 3, 1, 0)"),
    ({"kernel": (3, 2, 4, 0)}, "kernel has shape (3, 2, 4, 0); wanted (3, 2, 2, 0)"),
    ({"mask": (2, 12, 6, 7)}, "one value for each tap (6) of each offset group (2, as in offset). It looks channels first, as PyTorch's arrays are: pass jnp.moveaxis(mask, -3, -1)"),
    # x
    ({"x": (7, 4)}, "x has shape (7, 4); wanted (*batch, *spatial, C) with 2 spatial axes, the rank of the window of kernel, whose shape is (3, 2, 2, 8)"),
    ({"x": ()}, "x has shape (); wanted (*batch, *spatial, C) with 2 spatial axes"),
    ({"x": (2, 0, 7, 4)}, "x has shape (2, 0, 7, 4), a map without pixels; wanted at least one pixel along each spatial axis"),
    ({"x": (2, 6, 7, 3)}, "feature_group_count=2 must divide the 3 channels of the input and the 8 features of the result"),
    ({"kernel": (3, 2, 2, 7)}, "feature_group_count=2 must divide the 4 channels of the input and the 7 features of the result"),
    # offset
    ({"offset": (2, 6, 7, 23)}, "offset has shape (2, 6, 7, 23); wanted (*batch, 6, 7, OG * 12): the output positions, then K * n = 6 * 2 values for each offset group"),
    ({"offset": (2, 7, 6, 24)}, "offset has shape (2, 7, 6, 24); wanted (*batch, 6, 7, OG * 12)"),
    ({"offset": (2, 24, 6, 7)}, "offset has shape (2, 24, 6, 7); wanted (*batch, 6, 7, OG * 12): the output positions, then K * n = 6 * 2 values for each offset group; it looks channels-first: move its channel axis last"),
    ({"offset": (2, 6, 7, 36)}, "offset has shape (2, 6, 7, 36), that is 3 offset groups of 6 taps; wanted a number of groups that divides the 4 channels of x"),
    ({"offset": (3, 6, 7, 24)}, "offset has shape (3, 6, 7, 24), batch axes (3,); wanted those of x, (2,); any may be 1, and the first ones may be missing"),
    ({"offset": (1, 2, 6, 7, 24)}, "offset has shape (1, 2, 6, 7, 24), batch axes (1, 2); wanted those of x, (2,)"),
    ({"x": (1, 6, 7, 4)}, "offset has shape (2, 6, 7, 24), batch axes (2,); wanted those of x, (1,)"),
    # mask
    ({"mask": (2, 6, 7, 6)}, "mask has shape (2, 6, 7, 6); wanted (2, 6, 7, 12): one value for each tap (6) of each offset group (2, as in offset)"),
    ({"mask": (7, 12)}, "mask has shape (7, 12); wanted (2, 6, 7, 12)"),
    ({"mask": (3, 6, 7, 12)}, "mask has shape (3, 6, 7, 12), batch axes (3,); wanted those of x, (2,); any may be 1, and the first ones may be missing"),
    # bias
    ({"bias": (4,)}, "bias has shape (4,); wanted (8,): one value per feature of kernel"),
    ({"bias": ()}, "bias has shape (); wanted (8,)"),
]  # fmt: skip

OPTION_ERRORS = [
    ({"feature_group_count": 3}, ValueError, "feature_group_count=3 must divide the 4 channels of the input and the 8 features of the result"),
    ({"feature_group_count": 0}, ValueError, "feature_group_count=0 must divide"),
    ({"feature_group_count": -2}, ValueError, "feature_group_count=-2 must divide"),
    ({"feature_group_count": 2.0}, TypeError, "feature_group_count=2.0 is a float; wanted an int"),
    ({"feature_group_count": None}, TypeError, "feature_group_count=None is a NoneType; wanted an int"),
    ({"feature_group_count": True}, TypeError, "feature_group_count=True is a bool; wanted an int"),
    ({"max_offset": -1}, ValueError, "max_offset=-1 must be finite and not negative: a number of pixels"),
    ({"max_offset": float("inf")}, ValueError, "max_offset=inf must be finite and not negative"),
    ({"max_offset": (4, 4)}, TypeError, "max_offset=(4, 4) is a tuple; wanted a number of pixels, which bounds offsets along every axis, or None"),
    ({"max_offset": True}, TypeError, "max_offset=True is a bool; wanted a number of pixels"),
    ({"strides": (1, 2, 1)}, ValueError, "strides=(1, 2, 1) has 3 entries; wanted an int or 2 ints, one per spatial axis"),
    ({"kernel_dilation": 0}, ValueError, "kernel_dilation=0 is too small; wanted at least 1 on each axis"),
    ({"kernel_dilation": "2"}, TypeError, "kernel_dilation='2' is not made of ints"),
    ({"padding": "CAUSAL"}, ValueError, "padding='CAUSAL' has no meaning in a deformable convolution"),
    ({"padding": "CIRCULAR", "padding_mode": "edge"}, ValueError, "padding='CIRCULAR' means padding_mode='wrap', and padding_mode='edge' was given; leave it out"),
    ({"padding_mode": "border"}, ValueError, "padding_mode='border' is not known; wanted one of ('zeros', 'edge', 'wrap', 'reflect', 'symmetric') (torch's \"border\" is \"edge\")"),
    ({"padding": ((1, 1),)}, ValueError, "padding=((1, 1),) does not fit 2 spatial axes"),
    ({"padding": "VALID", "kernel_dilation": 4}, ValueError, "the output has no positions: a window of extent (9, 5) (size (3, 2), kernel_dilation (4, 4)) does not fit in a map of size (6, 7) with padding ((0, 0), (0, 0)); pad more, or use a smaller kernel or dilation"),
    ({"preferred_element_type": jnp.int32}, TypeError, "preferred_element_type=int32 is not a floating-point or complex dtype"),
    ({"preferred_element_type": "wide"}, TypeError, "preferred_element_type='wide' is not a dtype; wanted a floating-point or complex one, or None"),
    ({"preferred_element_type": 3}, TypeError, "preferred_element_type=3 is not a dtype"),
    ({"implementation": "cuda"}, ValueError, "implementation='cuda' is not known; wanted one of ('xla', 'pallas_gpu', 'pallas_tpu') or None"),
    ({"implementation": "pallas"}, ValueError, "implementation='pallas' is not known; wanted one of ('xla', 'pallas_gpu', 'pallas_tpu') or None (it is called 'pallas_gpu' now)"),
    ({"implementation": "matmul"}, ValueError, "implementation='matmul' is not known; wanted one of ('xla', 'pallas_gpu', 'pallas_tpu') or None (it is called 'pallas_tpu' now)"),
    ({"implementation": 3}, ValueError, "implementation=3 is not known; wanted one of ('xla', 'pallas_gpu', 'pallas_tpu') or None"),
]  # fmt: skip

KIND_ERRORS = [
    ({"x": [1.0]}, "x is a list; wanted an array (wrap it in jnp.asarray)"),
    ({"kernel": None}, "kernel is a NoneType; wanted an array (wrap it in jnp.asarray)"),
    ({"offset": 0.5}, "offset is a float; wanted an array (wrap it in jnp.asarray)"),
    ({"mask": True}, "mask is a bool; wanted an array (wrap it in jnp.asarray)"),
    ({"bias": (0.0,)}, "bias is a tuple; wanted an array (wrap it in jnp.asarray)"),
    ({"x": np.zeros(X, np.uint8)}, "x has dtype uint8; wanted a floating-point or complex array: x.astype(jnp.float32)"),
    ({"kernel": np.zeros(KERNEL, bool)}, "kernel has dtype bool; wanted a floating-point or complex array: kernel.astype(jnp.float32)"),
    ({"offset": np.zeros(OFFSET, np.int32)}, "offset has dtype int32; wanted a floating-point array: offset.astype(jnp.float32)"),
    ({"offset": np.zeros(OFFSET, np.complex64)}, "offset has dtype complex64; wanted a floating-point array"),
    ({"mask": np.ones(MASK, bool)}, "mask has dtype bool; wanted a floating-point array: mask.astype(jnp.float32)"),
    ({"bias": np.zeros(BIAS, np.int8)}, "bias has dtype int8; wanted a floating-point or complex array: bias.astype(jnp.float32)"),
]  # fmt: skip


def name(case):
    return "-".join(case) if isinstance(case, dict) else ""


def arrays(**changed):
    shapes = {**SHAPES, **changed}
    return [value if not isinstance(value, tuple) else np.zeros(value, np.float32) for value in shapes.values()]


def check(error, message, call):
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert message in str(raised.value)


def right(**options):
    return {"feature_group_count": 2, **options}


def test_the_call_that_is_changed_is_right():
    assert jax.eval_shape(functools.partial(deform_conv, **right()), *arrays()).shape == (2, 6, 7, 8)


@pytest.mark.parametrize(("changed", "message"), SHAPE_ERRORS, ids=name)
def test_shapes(changed, message):
    call = functools.partial(deform_conv, **right())
    check(ValueError, message, lambda: call(*arrays(**changed)))
    check(ValueError, message, lambda: jax.eval_shape(call, *arrays(**changed)))
    if "bias" not in changed:
        check(ValueError, message, lambda: select_implementation(*arrays(**changed)[:4], **right()))


def test_a_kernel_of_pytorch_s_whose_shape_fits_is_told_by_the_offsets():
    """Of three channels and a window of 3 × 3 the kernel alone does not tell."""
    zeros = functools.partial(np.zeros, dtype=np.float32)
    x, kernel, offset = zeros((1, 9, 9, 3)), zeros((8, 3, 3, 3)), zeros((1, 9, 9, 18))
    check(ValueError, "pass kernel.transpose(2, 3, 1, 0)", lambda: deform_conv(x, kernel, offset))
    assert jax.eval_shape(deform_conv, x, kernel.transpose(2, 3, 1, 0), offset).shape == (1, 9, 9, 8)
    assert jax.eval_shape(deform_conv, x, kernel, zeros((1, 9, 9, 48))).shape == (1, 9, 9, 3)  # a window of 8 × 3


@pytest.mark.parametrize(("changed", "error", "message"), OPTION_ERRORS, ids=name)
def test_options(changed, error, message):
    call = functools.partial(deform_conv, **right(**changed))
    check(error, message, lambda: call(*arrays()))
    check(error, message, lambda: jax.eval_shape(call, *arrays()))
    check(error, message, lambda: select_implementation(*arrays()[:4], **right(**changed)))


@pytest.mark.parametrize(("changed", "message"), KIND_ERRORS, ids=name)
def test_kinds(changed, message):
    arguments = dict(zip(SHAPES, arrays(), strict=True)) | changed
    check(TypeError, message, lambda: deform_conv(*arguments.values(), **right()))
    if all(hasattr(value, "dtype") for value in changed.values()):
        check(
            TypeError, message, lambda: jax.eval_shape(functools.partial(deform_conv, **right()), *arguments.values())
        )


@pytest.mark.parametrize("argument", SHAPES)
def test_shapes_alone_compute_nothing(argument):
    """A ShapeDtypeStruct serves `select_implementation`; the op itself says which argument is one."""
    structs = {argument: jax.ShapeDtypeStruct(SHAPES[argument], np.float32)}
    arguments = dict(zip(SHAPES, arrays(), strict=True)) | structs
    check(
        TypeError,
        f"{argument} is a ShapeDtypeStruct; wanted an array (wrap it in jnp.asarray)",
        lambda: deform_conv(*arguments.values(), **right()),
    )
    if argument != "bias":
        assert select_implementation(*list(arguments.values())[:4], **right())[0] == "xla"


def test_precision():
    """JAX's own words; no two of its versions take the same ones."""
    call = functools.partial(deform_conv, **right(precision="best"))
    check(ValueError, "Precision argument must be one of", lambda: call(*arrays()))
    check(ValueError, "but got best", lambda: jax.eval_shape(call, *arrays()))


def test_complex_is_not_made_real_in_silence():
    x = np.zeros(X, np.complex64)
    kernel = np.zeros(KERNEL, np.complex64)
    call = functools.partial(deform_conv, **right(preferred_element_type=np.float32))
    message = "preferred_element_type=float32 cannot hold the result, which is complex64; wanted a complex dtype"
    check(TypeError, message, lambda: call(x, kernel, *arrays()[2:4]))


# Which implementation


def test_select_implementation_takes_the_arguments_of_the_op():
    x, kernel, offset, mask, _ = arrays()
    implementation, reason = select_implementation(x, kernel, offset, mask, **right())
    assert implementation == "xla"
    assert reason
    assert select_implementation(x, kernel, offset, **right(implementation="xla")) == ("xla", "asked for by name")


def test_more_pixels_than_can_be_counted_are_told_when_the_call_is_traced():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2**15, 2**15, 2), (1, 1, 2, 1), (2**15, 2**15, 4))]
    with pytest.raises(ValueError, match=r"a product below 2\*\*31, not 2147483648: call the op for strips"):
        jax.eval_shape(deform_conv, *shapes)
    half = [jax.ShapeDtypeStruct((2**14, *s.shape[1:]), s.dtype) for s in (shapes[0], shapes[2])]
    assert jax.eval_shape(deform_conv, half[0], shapes[1], half[1]).shape == (2**14, 2**15, 1)
