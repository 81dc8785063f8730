"""The layers DCNv3 and DCNv4 of both kinds behind one face, and the published parameters in their names."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dcn_jax.linen
import dcn_jax.nnx

FILE = np.load(Path(__file__).with_name("data") / "dcn.npz")
OPTIONS = json.loads(str(FILE["options"]))["layers"]
CHANNELS, GROUP = 8, 2

# torch's modules, and ours
_NAMES = {"dw_conv.0": "dw_conv.conv", "dw_conv.1.1": "dw_conv.norm"}


def stored(name):
    """A layer's input, and what torch computes of it."""
    return FILE[f"{name}.x"], FILE[f"{name}.y"]


def params(name):
    """The parameters that torch computed with, as a tree of ours."""
    prefix, tree = f"{name}.state.", {}
    for key in FILE.files:
        if key.startswith(prefix):
            module, _, leaf = key.removeprefix(prefix).rpartition(".")
            value = FILE[key]
            if leaf == "weight":
                leaf = "scale" if value.ndim == 1 else "kernel"
                value = value.transpose(*range(2, value.ndim), 1, 0) if value.ndim > 1 else value
            node = tree
            for part in filter(None, _NAMES.get(module, module).split(".")):
                node = node.setdefault(part, {})
            node[leaf] = jnp.asarray(value)
    return tree


def linen(kind, **options):
    """(parameters of a fresh layer, a function of parameters and inputs)."""
    layer = getattr(dcn_jax.linen, kind)(**({"channels": CHANNELS, "group": GROUP} | options))
    init = lambda: layer.init(jax.random.key(0), jnp.zeros((9, 9, layer.channels)))["params"]  # noqa: E731
    return init, lambda params, x: layer.apply({"params": params}, x)


def nnx_(kind, **options):
    """The same of the nnx layer."""
    options = {"channels": CHANNELS, "group": GROUP} | options

    def make():
        return getattr(dcn_jax.nnx, kind)(**options, rngs=nnx.Rngs(0))

    def apply(params, x):
        layer = make()
        nnx.update(layer, params)
        return layer(x)

    return lambda: nnx.to_pure_dict(nnx.state(make(), nnx.Param)), apply


FRAMEWORKS = {"linen": linen, "nnx": nnx_}
