"""The linen and the nnx layer behind one face, for what both have to do alike."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dcn_jax.linen
import dcn_jax.nnx


class Layer(NamedTuple):
    """What a layer does with parameters (plain dictionaries) and an input; nothing is computed before it is asked for."""

    init: Callable[[], Any]  # the parameters a fresh layer has
    apply: Callable[..., jax.Array]  # params, x, and whatever else the layer takes -> y
    look: Callable[..., dict[str, jax.Array]]  # the same -> what it sows


def linen(channels, features, kernel_size, *, layer=dcn_jax.linen.DeformConv, seed=0, beside=None, **options) -> Layer:
    """`beside`: what `init` gets beside its input, from which linen tells what parameters to make."""
    module = layer(features, kernel_size, **options)
    x = jnp.zeros((5,) * (1 if isinstance(kernel_size, int) else len(kernel_size)) + (channels,), jnp.float32)

    def look(params, *args, **kwargs):
        _, variables = module.apply({"params": params}, *args, **kwargs, mutable=["intermediates"])
        return {name: value for name, (value,) in variables["intermediates"].items()}

    return Layer(
        init=lambda: module.init(jax.random.key(seed), x, **(beside or {}))["params"],
        apply=lambda params, *args, **kwargs: module.apply({"params": params}, *args, **kwargs),
        look=look,
    )


def nnx_(channels, features, kernel_size, *, layer=dcn_jax.nnx.DeformConv, seed=0, beside=None, **options) -> Layer:
    """`beside` as for `linen`; nnx is told how many channels the branch sees."""
    if beside and "offset_inputs" in beside:
        options["offset_in_features"] = beside["offset_inputs"].shape[-1]

    def make():
        return layer(channels, features, kernel_size, rngs=nnx.Rngs(seed), **options)

    graph, state = nnx.split(nnx.eval_shape(make))

    def merge(params):
        return nnx.merge(graph, nnx.map_state(lambda path, variable: variable.replace(_at(params, path)), state))

    def look(params, *args, **kwargs):
        _, intermediates = nnx.capture(merge(params), nnx.Intermediate)(*args, **kwargs)
        return {name: value for name, (value,) in nnx.to_pure_dict(intermediates).items()}

    return Layer(
        init=lambda: nnx.to_pure_dict(nnx.state(make(), nnx.Param)),
        apply=lambda params, *args, **kwargs: merge(params)(*args, **kwargs),
        look=look,
    )


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


FRAMEWORKS = {"linen": linen, "nnx": nnx_}
PLAIN = {"linen": flax.linen.Conv, "nnx": nnx.Conv}  # Flax's own


def fill(layer, seed=0, scale=0.5):
    """Parameters for `layer` from N(0, scale²): its offsets and logits are neither zero nor wild."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, scale, p.shape), p.dtype), jax.eval_shape(layer.init))


def convolutions(function, *arguments):
    """The dtypes (input, kernel, result) of each convolution in a function's program, as MLIR writes them."""
    program = jax.jit(function).lower(*arguments).as_text()
    types = r"stablehlo\.convolution.*: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\) -> tensor<[^>]*x(\w+)>"
    return re.findall(types, program)
