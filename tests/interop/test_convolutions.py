"""Transposed convolutions from PyTorch and back: its own numbers, both ways of writing them in Flax, and paddings."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcn_jax.interop import from_torch, to_torch
from dcn_jax.nnx import DeformConv
from tests.support import seeded

pytestmark = pytest.mark.lenient
Y = np.load(Path(__file__).parent.parent / "support" / "data" / "transposed.npz")  # what make_transposed.py computed


def transpose(*shape, **options):
    """Both of Flax's ways to lay out a kernel."""
    return [
        lambda kernel=kernel, **more: nnx.ConvTranspose(*shape, transpose_kernel=kernel, **options, **more)
        for kernel in (False, True)
    ]


def dilated(*shape, **options):
    return lambda **more: nnx.Conv(*shape, **options, **more)


# Each case of make_transposed.py: the shape of its weight, and the layers of Flax that compute it.
CASES = {
    "up by two": ((3, 2, 4, 4), (1, 3, 4, 3), [
        *transpose(3, 2, (4, 4), 2),
        *transpose(3, 2, (4, 4), 2, padding=((2, 2), (2, 2))),
        dilated(3, 2, (4, 4), input_dilation=2, padding=2),
    ]),
    "unet": ((3, 2, 2, 2), (1, 3, 2, 3), [
        *transpose(3, 2, (2, 2), 2),
        *transpose(3, 2, (2, 2), 2, padding="VALID"),
        dilated(3, 2, (2, 2), input_dilation=2, padding=1),
    ]),
    "output_padding": ((2, 3, 3, 5), (1, 3, 2, 2), [
        *transpose(2, 3, (3, 5), (2, 3), padding=((1, 2), (2, 4)), use_bias=False),
        dilated(2, 3, (3, 5), input_dilation=(2, 3), padding=((1, 2), (2, 4)), use_bias=False),
    ]),
    "dilation": ((2, 3, 3, 3), (1, 3, 3, 2), [
        *transpose(2, 3, (3, 3), 2, padding=((3, 3), (3, 3)), kernel_dilation=2),
        dilated(2, 3, (3, 3), input_dilation=2, padding=3, kernel_dilation=2),
    ]),
    "stride above the window": ((2, 3, 2, 2), (1, 2, 3, 2), [
        *transpose(2, 3, (2, 2), 3, padding="VALID"),
        dilated(2, 3, (2, 2), input_dilation=3, padding=((1, 2), (1, 2))),
    ]),
    "one axis": ((2, 3, 3), (1, 4, 2), [*transpose(2, 3, 3, 2, padding="VALID"), dilated(2, 3, 3, input_dilation=2, padding=2)]),
    "three axes": ((2, 3, 1, 2, 3), (1, 2, 2, 3, 2), [
        *transpose(2, 3, (1, 2, 3), (1, 2, 1), padding=((0, 0), (1, 1), (1, 1))),
        dilated(2, 3, (1, 2, 3), input_dilation=(1, 2, 1), padding=(0, 1, 1)),
    ]),
    "groups": ((4, 3, 3, 3), (1, 2, 3, 4), [dilated(4, 6, (3, 3), input_dilation=2, padding=((1, 2), (1, 2)), feature_group_count=2)]),
    "depthwise": ((3, 1, 4, 4), (1, 3, 3, 3), [dilated(3, 3, (4, 4), input_dilation=2, padding=2, feature_group_count=3, use_bias=False)]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pytorch_s_transposed_convolutions(case, x64):
    """Its numbers from its weights, whichever way the layer is written, and its weights again."""
    weight, x_shape, layers = CASES[case]
    batch, *spatial, channels = x_shape
    x = np.moveaxis(seeded.uniform("x", (batch, channels, *spatial)), 1, -1)
    for make in layers:
        layer = make(rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        state = seeded.state({"weight": weight} | ({} if layer.bias is None else {"bias": layer.bias.shape}))
        assert from_torch(layer, state) is layer
        np.testing.assert_allclose(layer(jnp.asarray(x)), Y[case], rtol=1e-12, atol=1e-12)
        back = to_torch(layer)
        assert back.keys() == state.keys()
        for name, array in back.items():
            np.testing.assert_array_equal(array, state[name])


# ---- paddings, and what else PyTorch has not


def conv(window=(3, 3), **options):
    return nnx.Conv(4, 6, window, **options, rngs=nnx.Rngs(0))


def deform(window=(3, 3), **options):
    return DeformConv(4, 6, window, **options, rngs=nnx.Rngs(0))


def up(window=(3, 3), **options):
    return nnx.ConvTranspose(4, 6, window, **options, rngs=nnx.Rngs(0))


ALIKE = "and PyTorch's convolutions pad both sides alike.*jnp.pad"
OUTSIDE = "and PyTorch's deformable convolutions read zeros outside"
REFUSED = {
    "pairs that differ": (lambda: conv(padding=((0, 1), (1, 1))), ALIKE),
    "pairs that differ, deformable": (lambda: deform(strides=2, padding=((0, 1), (0, 1))), ALIKE),
    "crop": (lambda: conv(padding=-1), ALIKE),
    "same lower": (lambda: conv((2, 3), padding="SAME_LOWER"), ALIKE),
    "causal": (lambda: conv((3,), padding="CAUSAL"), ALIKE),
    "circular at a stride": (lambda: conv((2, 2), strides=2, padding="CIRCULAR"), ALIKE),
    "edge": (lambda: deform(padding=1, padding_mode="edge"), rf"padding_mode=\('edge', 'edge'\), {OUTSIDE}"),
    "one axis": (lambda: deform(padding=1, padding_mode=("zeros", "wrap")), OUTSIDE),
    "deformable circular": (lambda: deform(padding="CIRCULAR"), rf"padding_mode=\('wrap', 'wrap'\), {OUTSIDE}"),
    "mask": (lambda: conv(mask=np.ones((3, 3, 4, 6))), "a mask, and PyTorch's convolutions have none: multiply it"),
    "upwards, mask": (lambda: up(mask=np.ones((3, 3, 4, 6))), "a mask, and PyTorch's convolutions have none"),
    "upwards, same": (lambda: up(strides=2), r"which here is \(\(2, 1\), \(2, 1\)\).*pads \(\(2 - p, 2 - p \+ o\), "),
    "upwards, too far": (lambda: up(strides=2, padding=3), r"which here is \(\(3, 3\), \(3, 3\)\)"),
    "upwards, circular": (lambda: up(strides=2, padding="CIRCULAR"), "transposed convolutions pad with zeros"),
    "dilated, circular": (lambda: conv(input_dilation=2, padding="CIRCULAR"), "transposed convolutions pad with zeros"),
    "dilated, strides": (lambda: conv(input_dilation=2, strides=2), "strides=2 beside input_dilation=2; PyTorch has one"),
    "dilated, pairs": (lambda: conv(input_dilation=2, padding=((2, 4), (2, 2))), r"which here is \(\(2, 4\), \(2, 2\)\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("way", [to_torch, lambda model: from_torch(model, {})], ids=["to", "from"])
def test_what_no_convolution_of_pytorch_does_is_refused(name, way):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"the layer has .*{message}"):
        way(make())


ALLOWED = {
    "circular": lambda: conv(padding="CIRCULAR"),  # Conv2d(padding_mode="circular")
    "reflect at a stride": lambda: conv(strides=2, padding="REFLECT"),
    "same circular": lambda: conv((2, 2), padding="CIRCULAR"),  # Conv2d(padding="same", padding_mode="circular")
    "same": lambda: conv((2, 2), padding=((0, 1), (0, 1))),
    "wide": lambda: deform(padding=((4, 4), (2, 2))),
    "up": lambda: up((4, 4), strides=2),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_paddings_that_pytorch_has(name):
    to_torch(ALLOWED[name]())


def test_parameters_go_where_the_border_is_another():
    """The advice of the error: fill a layer whose border is zeros, and copy."""
    state = to_torch(deform(padding=1))
    there, filled = deform(padding=1, padding_mode="edge"), from_torch(deform(padding=1), state)
    nnx.update(there, nnx.state(filled))
    np.testing.assert_array_equal(there.kernel[...], filled.kernel[...])


@pytest.mark.parametrize(
    ("layer", "given", "hint"),
    [
        (conv, (4, 6, 3, 3), r"\(6, 4, 3, 3\). array.transpose\(1, 0, 2, 3\) has that shape .*nnx.ConvTranspose"),
        (up, (6, 4, 3, 3), r"\(4, 6, 3, 3\). array.transpose\(1, 0, 2, 3\) has that shape"),
        (conv, (3, 3, 4, 6), r"\(6, 4, 3, 3\). array.transpose\(3, 2, 0, 1\) has that shape \(Flax's order"),
        (lambda: nnx.Linear(3, 5, rngs=nnx.Rngs(0)), (3, 5), r"\(5, 3\). array.transpose\(1, 0\) has that shape"),
        (conv, (4, 6, 3, 2), r"\(6, 4, 3, 3\)(\n|$)"),
    ],
)
def test_a_weight_that_lies_otherwise_is_told_so(layer, given, hint):
    layer = layer()
    state = {"weight": np.ones(given), "bias": np.zeros(layer.bias.shape)}
    with pytest.raises(ValueError, match=rf"weight has shape .*; the model wants {hint}"):
        from_torch(layer, state)
