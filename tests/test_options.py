"""Options that make no sense are errors when an nnx layer is built, and when a linen layer makes its parameters."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import dcn_jax.linen
import dcn_jax.nnx

pytestmark = pytest.mark.lenient

X = jnp.ones((8, 8, 4))
CALLS = {
    "DeformConv": (X,),
    "DCNv3": (X,),
    "DCNv4": (X,),
    "MSDeformAttn": (jnp.ones((1, 4)), jnp.ones((1, 2, 2)), jnp.ones((8, 4)), ((2, 2), (2, 2))),
}
GOOD = {
    "DeformConv": {"kernel_size": (3, 3)},
    "DCNv3": {"channels": 4, "group": 2},
    "DCNv4": {"channels": 4, "group": 2},
    "MSDeformAttn": {"embed_dim": 4, "num_heads": 2, "num_levels": 2, "num_points": 2},
}


def build(framework, kind, options):
    """An nnx layer, called with nothing; or the parameters of a linen layer."""
    channels = {"linen": {"features": 6}, "nnx": {"in_features": 4, "out_features": 6}}[framework]
    given = GOOD[kind] | (channels if kind == "DeformConv" else {}) | options
    if framework == "nnx":
        return nnx.eval_shape(lambda: getattr(dcn_jax.nnx, kind)(**given, rngs=nnx.Rngs(0)))
    layer = getattr(dcn_jax.linen, kind)(**given)
    return jax.eval_shape(lambda: layer.init(jax.random.key(0), *CALLS[kind]))


WRONG = [
    ("DeformConv", {"strides": 0}, ValueError, "strides=0 is too small"),
    ("DeformConv", {"strides": (1, 1, 1)}, ValueError, "strides=(1, 1, 1) has 3 entries"),
    ("DeformConv", {"kernel_dilation": 1.5}, TypeError, "kernel_dilation=1.5 is not made of ints"),
    ("DeformConv", {"padding": "FULL"}, ValueError, "padding='FULL' is not known"),
    ("DeformConv", {"padding": "CAUSAL"}, ValueError, "padding='CAUSAL' has no meaning"),
    ("DeformConv", {"padding_mode": "border"}, ValueError, "padding_mode='border' is not known"),
    ("DeformConv", {"padding_mode": "border", "offset_branch": False}, ValueError, "padding_mode='border' is not known"),
    ("DeformConv", {"implementation": "cuda"}, ValueError, "implementation='cuda' is not known"),
    ("DeformConv", {"feature_group_count": 3}, ValueError, "feature_group_count=3 must divide"),
    ("DCNv3", {"kernel_size": (3, 3, 3)}, ValueError, "kernel_size=(3, 3, 3) has 3 entries"),
    ("DCNv3", {"dw_kernel_size": 0}, ValueError, "dw_kernel_size=0 is too small"),
    ("DCNv3", {"act_layer": "Swish"}, ValueError, "act_layer='Swish' is not known"),
    ("DCNv3", {"norm_layer": "BN"}, ValueError, "norm_layer='BN' is not known"),
    ("DCNv4", {"dw_kernel_size": (3,)}, ValueError, "dw_kernel_size=(3,) has 1 entries"),
    *[
        (kind, options, error, message)
        for kind in ("DCNv3", "DCNv4")
        for options, error, message in [
            ({"remove_center": True, "kernel_size": 1}, ValueError, "remove_center=True, but window=(1, 1) has no middle"),
            ({"remove_center": True, "kernel_size": (3, 4)}, ValueError, "remove_center=True, but window=(3, 4) has no middle"),
            ({"remove_center": "yes"}, TypeError, "remove_center='yes' is not known"),
            ({"offset_scale": "1"}, TypeError, "offset_scale='1' is a str; wanted a number"),
            ({"offset_scale": float("nan")}, ValueError, "offset_scale=nan is not finite"),
            ({"stride": 0}, ValueError, "strides=0 is too small"),
            ({"pad": (1, 1, 1)}, ValueError, "padding=(1, 1, 1) does not fit 2 spatial axes"),
            ({"dilation": 0}, ValueError, "kernel_dilation=0 is too small"),
            ({"group": 3}, ValueError, "group=3 must divide channels=4"),
        ]
    ],
    ("MSDeformAttn", {"method": "bilinear"}, ValueError, "method='bilinear' is not known"),
    ("MSDeformAttn", {"implementation": "pallas_gpu"}, ValueError, "implementation='pallas_gpu' is not there"),
    ("MSDeformAttn", {"num_axes": 0}, ValueError, "num_axes=0 is too small"),
    ("MSDeformAttn", {"num_points": (2, 0)}, ValueError, "num_points=(2, 0); wanted 2 ints of at least 1"),
]  # fmt: skip


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize(("kind", "options", "error", "message"), WRONG)
def test_before_the_layer_is_called(framework, kind, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build(framework, kind, options)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("kind", GOOD)
def test_without_them_the_layer_is_built(framework, kind):
    build(framework, kind, {})


@pytest.mark.parametrize("kind", ["DeformConv", "DCNv3", "DCNv4"])
def test_a_map_with_channels_first_is_told_so(kind):
    options = {"rngs": nnx.Rngs(0), **GOOD[kind]} | (
        {"in_features": 4, "out_features": 6} if kind == "DeformConv" else {}
    )
    layer = getattr(dcn_jax.nnx, kind)(**options)
    x = jnp.ones((2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"channels first, as PyTorch's arrays are: pass jnp.moveaxis\(inputs, -3, -1"):
        layer(x)
    layer(jnp.moveaxis(x, -3, -1))
