"""A model of layers of all kinds, and what `deform_conv` makes of the arrays that its page stores."""

import base64
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dcn_jax import deform_conv
from dcn_jax.nnx import DeformConv

CHANNELS, FEATURES = 4, 6

# Borders, strides, dilations, windows, paddings and groups of both kinds; each name is one layer.
GEOMETRIES = {
    "zeros": {"kernel_size": (3, 3), "offset_groups": 2},
    "edge_wrap": {"kernel_size": (3, 3), "strides": 2, "padding_mode": ("edge", "wrap"), "feature_group_count": 2},
    "reflect_symmetric": {
        "kernel_size": (3, 5),
        "padding": ((1, 2), (3, 0)),
        "kernel_dilation": (2, 1),
        "padding_mode": ("reflect", "symmetric"),
    },
    "wrap_even": {"kernel_size": (2, 4), "strides": (1, 3), "padding_mode": "wrap", "offset_groups": 4},
    "symmetric_crop": {"kernel_size": (3, 3), "padding": ((-1, 4), (5, -2)), "padding_mode": "symmetric"},
    "edge_v1": {"kernel_size": (3, 3), "padding": "VALID", "padding_mode": "edge", "modulated": False},
    "both_groups": {"kernel_size": (1, 3), "offset_groups": 2, "feature_group_count": 2, "mask_scale": 2.0},
}


class Zoo(nnx.Module):
    """Layers beside one another, all of which read the image; the last one is plain."""

    def __init__(self, rngs):
        wild = {"offset_kernel_init": nnx.initializers.normal(1.0), "bias_init": nnx.initializers.normal(1.0)}
        for name, options in GEOMETRIES.items():
            setattr(self, name, DeformConv(CHANNELS, FEATURES, **options, **wild, rngs=rngs))
        self.plain = nnx.Conv(CHANNELS, FEATURES, (3, 3), 2, rngs=rngs)

    def __call__(self, x):
        return [getattr(self, name)(x) for name in (*GEOMETRIES, "plain")]


def image(height=9, width=11):
    return jax.random.normal(jax.random.key(5), (height, width, CHANNELS))


def stored_layers(html):
    """The layers as they stand in a page, their arrays decoded."""
    (text,) = re.findall(r'<script type="application/json" id="dcn-data">(.*?)</script>', html, flags=re.DOTALL)
    layers = json.loads(text)["layers"]
    return [{name: _decoded(value) for name, value in layer.items()} for layer in layers]


def _decoded(value):
    if not isinstance(value, dict):
        return value
    return np.frombuffer(base64.b64decode(value["base64"]), value["dtype"]).reshape(value["shape"])


class Answers:
    """What `deform_conv` says, in float64, of a layer as the page has it."""

    def __init__(self, layer):
        self.layer = layer
        self.offset, self.mask = layer["offset"], layer["mask"]
        taps = int(np.prod(layer["window"]))
        if self.offset is None:
            self.offset = np.zeros((*layer["out"], 2 * taps))
        if self.mask is None:
            self.mask = np.ones((*layer["out"], self.offset.shape[-1] // 2))
        self.everywhere = {
            "y": self.run(self.offset, self.mask, layer["kernel"]),
            "y-modulated": self.run(self.offset, self.mask, layer["kernel"]),
            "y-deformable": self.run(self.offset, None, layer["kernel"]),
            "y-regular": self.run(np.zeros_like(self.offset), None, layer["kernel"]),
        }

    def run(self, offset, mask, kernel, bias=True):
        layer = self.layer

        def double(array):
            return None if array is None else jnp.asarray(np.asarray(array, np.float64))

        with jax.enable_x64(True):
            y = deform_conv(
                double(layer["x"]),
                double(kernel),
                double(offset),
                double(mask),
                double(layer["bias"]) if bias else None,
                strides=layer["strides"],
                padding=[tuple(pair) for pair in layer["pads"]],
                kernel_dilation=layer["dilation"],
                feature_group_count=layer["featureGroups"],
                padding_mode=tuple(layer["modes"]),
            )
            return np.asarray(y)

    def adds(self, position, g, n, channel, feature):
        """What one tap of one offset group adds to one feature, from one channel."""
        kernel, mask = np.zeros_like(self.layer["kernel"]), np.zeros_like(self.mask)
        row, groups = channel % kernel.shape[2], self.layer["featureGroups"]
        if channel * groups // self.layer["channels"] != feature * groups // self.layer["features"]:
            return 0.0
        place = (*np.unravel_index(n, kernel.shape[:2]), row, feature)
        kernel[place] = self.layer["kernel"][place]
        tap = g * int(np.prod(kernel.shape[:2])) + n
        mask[..., tap] = self.mask[..., tap]
        return self.run(self.offset, mask, kernel, bias=False)[tuple(position)][feature]
