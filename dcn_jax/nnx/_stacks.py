"""Stacks of layers, as `nnx.vmap` makes them for `nnx.scan`: each variable has an axis too many."""

from typing import Any

from dcn_jax._core import extras
from dcn_jax.nnx._dcn import DCNv3, DCNv4
from dcn_jax.nnx._deform_conv import DeformConv

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise extras.missing("dcn_jax.nnx", "flax") from error

# How many axes a variable of one layer has.
_AXES = {
    nnx.Linear: {"kernel": 2, "bias": 1},
    nnx.Embed: {"embedding": 2},
    nnx.BatchNorm: {"scale": 1, "bias": 1, "mean": 1, "var": 1},
    nnx.GroupNorm: {"scale": 1, "bias": 1},
    DCNv3: {"center_feature_scale_proj_weight": 2, "center_feature_scale_proj_bias": 1},
    DCNv4: {"center_feature_scale_proj_weight": 2, "center_feature_scale_proj_bias": 1},
}


def axes_too_many(module: Any) -> int:
    """How many stacks a layer of Flax or dcn_jax is in; 0 for a single layer, and for modules that are not known."""
    for name, axes in _axes(module).items():
        variable = getattr(module, name, None)
        if isinstance(variable, nnx.Variable):
            return len(variable.shape) - axes
    return 0


def _axes(module: Any) -> dict[str, int]:
    if isinstance(module, nnx.Conv | nnx.ConvTranspose | DeformConv):
        return {"kernel": len(module.kernel_size) + 2, "bias": 1}
    if isinstance(module, nnx.LayerNorm):
        features = module.feature_axes
        axes = 1 if isinstance(features, int) else len(features)
        return {"scale": axes, "bias": axes}
    return next((axes for kind, axes in _AXES.items() if isinstance(module, kind)), {})


def stack_problems(model: Any) -> list[str]:
    """A sentence for each layer of a model that is a stack of layers, and in no other of them."""
    nodes = {path: module for path, module in nnx.iter_graph(model) if axes_too_many(module) > 0}
    return [
        f"{'.'.join(map(str, path)) or 'the model itself'} is a stack of layers, as nnx.vmap makes it: its arrays have "
        f"{axes_too_many(module)} more axes than those of one {type(module).__name__}; take the layers one by one: "
        "graph, state = nnx.split(stack), and nnx.merge(graph, jax.tree.map(lambda array: array[i], state)) is layer i"
        for path, module in nodes.items()
        if not any(path[:i] in nodes for i in range(len(path)))
    ]
