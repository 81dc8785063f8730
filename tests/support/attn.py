"""MSDeformAttn of linen and nnx behind one face, and what torch computes of it: data/attn.npz."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dcn_jax.linen
import dcn_jax.nnx
from tests.support import seeded

_FILE = np.load(Path(__file__).with_name("data") / "attn.npz")
_ABOUT = json.loads(str(_FILE["about"]))
CASES = tuple(_ABOUT["cases"])
LEVELS = tuple(map(tuple, _ABOUT["levels"]))
PIXELS = sum(height * width for height, width in LEVELS)
INPUTS = ("query", "reference_points", "value")
SMALL = {"embed_dim": 8, "num_heads": 2, "num_levels": 3, "num_points": 2}


def options(case):
    """How the layer of a case is made."""
    given = _ABOUT["cases"][case]
    made = {name: given[name] for name in ("num_heads", "num_points")}
    return {"embed_dim": _ABOUT["embed_dim"], "num_levels": len(LEVELS)} | made


def stored(case, *names):
    """Arrays of a case by name; INPUTS, their gradients `d_…`, `y` and `cotangent`."""
    return [_FILE[f"{case}.{name}"] for name in names]


def padding_mask(case):
    """What of the maps of a case is padding, or None."""
    return _FILE[f"{case}.padding_mask"] if _ABOUT["cases"][case]["padding"] else None


def state(case):
    """PyTorch's state of a case."""
    return seeded.state(_ABOUT["shapes"][case])


def params(case):
    """The same as a tree of ours."""
    tree = {}
    for name, array in state(case).items():
        module, _, leaf = name.rpartition(".")
        leaf, array = ("kernel", array.T) if leaf == "weight" else (leaf, array)
        tree.setdefault(module, {})[leaf] = jnp.asarray(array)
    return tree


def draw(coordinates=2, *, batch=(2,), queries=5, embed_dim=8, seed=0):
    """A query, reference points and a value for LEVELS."""
    rng = np.random.default_rng(seed)
    query, value = (rng.normal(size=(*batch, n, embed_dim)).astype(np.float32) for n in (queries, PIXELS))
    return query, rng.uniform(size=(*batch, queries, len(LEVELS), coordinates)).astype(np.float32), value


def linen(**made):
    """(parameters of a fresh layer, a function of parameters and arguments, what that sows)."""
    layer = dcn_jax.linen.MSDeformAttn(**(SMALL | made))
    shapes = ((2,) * layer.num_axes,) * layer.num_levels
    pixels = layer.num_levels * 2**layer.num_axes
    query, value = (jnp.zeros((n, layer.embed_dim), jnp.float32) for n in (1, pixels))
    points = jnp.zeros((1, layer.num_levels, layer.num_axes))

    def init():
        return layer.init(jax.random.key(0), query, points, value, shapes)["params"]

    def apply(params, *args):
        return layer.apply({"params": params}, *args)

    def look(params, *args):
        _, variables = layer.apply({"params": params}, *args, mutable=["intermediates"])
        return {name: value for name, (value,) in variables["intermediates"].items()}

    return init, apply, look


def nnx_(**made):
    """The same of the nnx layer."""

    def make():
        return dcn_jax.nnx.MSDeformAttn(**(SMALL | made), rngs=nnx.Rngs(0))

    def merge(params):
        layer = make()
        nnx.update(layer, params)
        return layer

    def look(params, *args):
        _, intermediates = nnx.capture(merge(params), nnx.Intermediate)(*args)
        return {name: value for name, (value,) in nnx.to_pure_dict(intermediates).items()}

    return (
        lambda: nnx.to_pure_dict(nnx.state(make(), nnx.Param)),
        lambda params, *args: merge(params)(*args),
        look,
    )


FRAMEWORKS = {"linen": linen, "nnx": nnx_}
