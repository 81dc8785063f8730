"""The linen and the nnx layer behind one face, for what both have to do alike."""

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
    apply: Callable[[Any, Any], jax.Array]  # params, x -> y
    look: Callable[[Any, Any], dict[str, jax.Array]]  # params, x -> what it sows


def linen(channels, features, kernel_size, *, layer=dcn_jax.linen.DeformConv, seed=0, **options) -> Layer:
    module = layer(features, kernel_size, **options)
    x = jnp.zeros((5,) * (1 if isinstance(kernel_size, int) else len(kernel_size)) + (channels,), jnp.float32)

    def look(params, x):
        _, variables = module.apply({"params": params}, x, mutable=["intermediates"])
        return {name: value for name, (value,) in variables["intermediates"].items()}

    return Layer(
        init=lambda: module.init(jax.random.key(seed), x)["params"],
        apply=lambda params, x: module.apply({"params": params}, x),
        look=look,
    )


def nnx_(channels, features, kernel_size, *, layer=dcn_jax.nnx.DeformConv, seed=0, **options) -> Layer:
    def make():
        return layer(channels, features, kernel_size, rngs=nnx.Rngs(seed), **options)

    graph, state = nnx.split(nnx.eval_shape(make))

    def merge(params):
        return nnx.merge(graph, nnx.map_state(lambda path, variable: variable.replace(_at(params, path)), state))

    def look(params, x):
        _, intermediates = nnx.capture(merge(params), nnx.Intermediate)(x)
        return {name: value for name, (value,) in nnx.to_pure_dict(intermediates).items()}

    return Layer(
        init=lambda: nnx.to_pure_dict(nnx.state(make(), nnx.Param)),
        apply=lambda params, x: merge(params)(x),
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
