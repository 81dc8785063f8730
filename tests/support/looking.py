"""Small networks to look at, the same in linen and nnx."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dcn_jax.linen
import dcn_jax.nnx
from dcn_jax.geometry import resolve_window
from dcn_jax.interop import to_linen
from dcn_jax.viz import Layer

OFFSETS = nnx.initializers.normal(0.3)  # of a branch: its offsets are a pixel or so


def image(channels=2, size=(10, 12), seed=0):
    return jax.random.normal(jax.random.key(seed), (*size, channels))


class Net(nnx.Module):
    """A strided convolution, a residual deformable layer with a shortcut of its own, a deformable layer."""

    def __init__(self, *, seed=0, **options):
        rngs = nnx.Rngs(seed)
        options = {"offset_kernel_init": OFFSETS, "rngs": rngs} | options
        self.stem = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.deform = dcn_jax.nnx.DeformConv(4, 4, (3, 3), offset_groups=2, **options)
        self.shortcut = nnx.Conv(4, 4, (1, 1), use_bias=False, rngs=rngs)
        self.last = dcn_jax.nnx.DeformConv(4, 3, (3, 3), modulated=False, padding="VALID", **options)

    def __call__(self, x):
        x = jax.nn.relu(self.stem(x))
        y = jax.nn.relu(self.deform(x))
        return self.last(y + self.shortcut(x))


class LinenNet(nn.Module):
    """The same in linen."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        y = nn.relu(dcn_jax.linen.DeformConv(4, (3, 3), offset_groups=2, name="deform")(x))
        y = y + nn.Conv(4, (1, 1), use_bias=False, name="shortcut")(x)
        return dcn_jax.linen.DeformConv(3, (3, 3), modulated=False, padding="VALID", name="last")(y)


def both():
    """The two networks, with equal parameters, as the functions of `viz` take them."""
    net = Net()
    return {"nnx": net, "linen": (LinenNet(), {"params": to_linen(net)})}


def stack(*layers):
    """A sequence of layers of one channel; each is (class, options)."""
    rngs = nnx.Rngs(0)
    return nnx.Sequential(*[cls(1, 1, **({"kernel_size": (3, 3)} | options), rngs=rngs) for cls, options in layers])


def by_hand(*geometries, size=(12, 12)):
    """What `looked` would return for a stack of layers, without a network: only where they read.

    A geometry is what `resolve_window` takes, with an `offset` that is the same at all positions, `(OG * K * n)` or one
    number, and a `mask`, one number.
    """
    layers = []
    for geometry in geometries:
        offset, mask = (geometry.get(name) for name in ("offset", "mask"))
        window_size = geometry.get("window", (3,) * len(size))
        given = {name: value for name, value in geometry.items() if name not in ("offset", "mask", "window")}
        window = resolve_window(window_size, spatial=size, **given)
        if offset is not None:
            per_group = window.taps * window.rank
            flat = np.resize(np.asarray(offset, np.float32), max(np.size(offset), per_group))
            shape = (*window.out_spatial, len(flat) // per_group, window.taps, window.rank)
            offset = np.broadcast_to(flat.reshape(shape[window.rank :]), shape)
        layers.append(
            Layer(
                f"layers.{len(layers)}",
                "conv" if offset is None else "deform_conv",
                inputs=np.zeros((*size, 1)),
                output=np.zeros((*window.out_spatial, 1)),
                offset=offset,
                mask=None if mask is None else np.full(offset.shape[:-1], mask),
                window=window.size,
                strides=window.strides,
                padding=window.pads,
                kernel_dilation=window.dilation,
                padding_mode=window.padding_mode,
            )
        )
        size = window.out_spatial
    return layers


def deform(offset=0.0, **options):
    """A deformable layer whose offsets are the same everywhere: one number, or one for each channel of its branch."""
    bias = jnp.asarray(offset, jnp.float32)

    def init(key, shape, dtype):
        return jnp.broadcast_to(bias, shape).astype(dtype)

    return dcn_jax.nnx.DeformConv, {"modulated": False, "offset_bias_init": init} | options


def plain(**options):
    """A plain layer."""
    return nnx.Conv, options
