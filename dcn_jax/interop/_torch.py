"""Whole models and layers, from PyTorch's names and axes to ours and back."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from dcn_jax.interop._convolutions import convolution_problems, kernel_order
from dcn_jax.interop._fill import SAME, Slot, fill, read, slot, variables
from dcn_jax.interop._layouts import (
    LAYOUTS,
    NAMES,
    Layout,
    branch_sizes,
    dilation_problems,
    find_layout,
    joined,
    module_key,
    not_needed,
)
from dcn_jax.interop._own import Rules, check_rules, is_own, order_of
from dcn_jax.nnx import DeformConv
from dcn_jax.nnx._stacks import stack_problems

Model = TypeVar("Model", bound=nnx.Module)


def from_torch(
    model: Model, state: Mapping[str, np.ndarray], *, prefix: str = "", arrays: Rules = MappingProxyType({})
) -> Model:
    """Fill an nnx layer or model from the arrays of a PyTorch one, and return it.

        kernel (*window, in, out) = weight (out, in, *window), transposed

    The weight of a transposed convolution is `(in, out // groups, *window)`: `nnx.ConvTranspose` gets
    it, and an `nnx.Conv` with an `input_dilation`, with the window turned around where Flax's is.

    The attributes of the model give the names: `model.layer3[4].conv2` gets
    `layer3.4.conv2.weight` and `layer3.4.conv2.bias`. The modules of an `nnx.Sequential` are
    numbered as in PyTorch. Batch norms get their statistics too; `num_batches_tracked` is ignored.
    A `DeformConv` may have any of these layouts. The names in `state` tell each layer's layout:

    | layout | arrays |
    |---|---|
    | "mmcv" (and detectron2's) | `weight`, `bias`, and `conv_offset.*`: offsets, then logits |
    | "torchvision" | `weight`, `bias`, and `offset_conv.*` and `mask_conv.*` apart |
    | "paddle" | `conv_dcn.weight`, `conv_dcn.bias` and `conv_offset.*` |
    | "charlesshang" | as "mmcv", the branch called `conv_offset_mask.*` |
    | "legacy" | as "mmcv", the branch of `conv2` being its neighbour `conv2_offset.*` |

    `DCNv3`, `DCNv4` and `MSDeformAttn` have the published names, with `dw_conv.0` and
    `dw_conv.1.1` for `dw_conv.conv` and `dw_conv.norm`. The attention
    of HF, mmcv and RT-DETRv2 has them too.

    An `nnx.Param` that is an attribute of a module of your own, such as `gamma1`, gets the array of
    its path. With one axis or none it is taken as it is; for more, `arrays` says how it lies.

    The names do not tell the padding, `mask_scale` or bounds: make the layer with the values
    of the other one. A padding that no convolution of PyTorch has is refused: "SAME" at a stride
    above 1, where PyTorch pads both sides alike and XLA may not; pairs that differ; in deformable
    layers a `padding_mode` other than "zeros".

    Stacks of layers, as `nnx.vmap` makes them, are refused: fill single layers, and stack these.
    Random keys of an abstract model (of its dropouts) stay abstract. If the model is to be trained,
    make it without `nnx.eval_shape`, or give it keys: `nnx.reseed(model, dropout=0)`.

    Args:
        model: an `nnx.Module` of `nnx.Conv`, `nnx.ConvTranspose`, `nnx.Linear`, `nnx.Embed`,
            `nnx.BatchNorm`, `nnx.LayerNorm`, `nnx.GroupNorm`, parameters of your own and the layers
            of `dcn_jax.nnx`, or one of them. It may be abstract (`nnx.eval_shape`), which saves
            initializing it.
        state: the state of a PyTorch module as NumPy arrays by name (`{k: v.numpy() for k, v in
            module.state_dict().items()}`, or `read_checkpoint`). They get the dtypes of the model.
        prefix: the name in `state` of the module that `model` stands for, such as "backbone.";
            names without it are ignored.
        arrays: for parameters of your own, by name or by the end of it, a function that makes the
            parameter's array of PyTorch's: `{"level_embed": lambda array: array}`.

    Returns:
        `model` itself.

    Raises:
        ValueError: arrays are missing, unexpected or misshapen, or PyTorch has no counterpart for
            a module or a padding of the model. The message lists all; the model is unchanged.
        TypeError: `model` is not an `nnx.Module`, or `arrays` has something that is no function.

    Source: the published code of torchvision, mmcv and the layers, for names and orders.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DeformConv
        >>> state = {
        ...     "weight": np.ones((8, 4, 3, 3)),
        ...     "bias": np.zeros(8),
        ...     "conv_offset.weight": np.zeros((27, 4, 3, 3)),
        ...     "conv_offset.bias": np.zeros(27),
        ... }
        >>> layer = from_torch(DeformConv(4, 8, (3, 3), padding=1, rngs=nnx.Rngs(0)), state)
        >>> layer.kernel.shape, layer.offset_conv.kernel.shape
        ((3, 3, 4, 8), (3, 3, 4, 27))
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state is a {type(state).__name__}; wanted a dictionary of arrays by name: from_torch(model, "
            "read_checkpoint(path)) for a file, model.state_dict() of a PyTorch module"
        )
    prefix = prefix.removesuffix(".")
    slots, problems, spare = _slots(model, prefix, lambda name: find_layout(name, state), arrays, to_torch=False)
    known = {name for each in slots for name in each.names} | spare
    unexpected = [name for name in state if name.startswith(f"{prefix}." * bool(prefix)) and name not in known]
    fill(slots, state, unexpected=unexpected, problems=problems)
    return model


def to_torch(model: nnx.Module, *, layout: str = "mmcv", arrays: Rules = MappingProxyType({})) -> dict[str, np.ndarray]:
    """The arrays of an nnx layer or model in PyTorch's names and axes: `from_torch` reversed.

        weight (out, in, *window) = kernel (*window, in, out), transposed

    Args:
        model: what `from_torch` takes.
        layout: that of deformable layers, one of the table at `from_torch`.
        arrays: as for `from_torch`, but each function makes PyTorch's array of the parameter's.

    Returns:
        Contiguous NumPy copies in the dtypes of the model; `torch.from_numpy` takes them.

    Raises:
        ValueError: `layout` is not known, or PyTorch has no counterpart for something in the
            model; the message names it.
        TypeError: `model` is not an `nnx.Module`, or `arrays` has something that is no function.

    Source: the published code of torchvision, mmcv and the layers, for names and orders.

    Example:
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DeformConv
        >>> layer = DeformConv(4, 8, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
        >>> for name, array in sorted(to_torch(layer, layout="torchvision").items()):
        ...     print(name, array.shape)
        mask_conv.bias (9,)
        mask_conv.weight (9, 4, 3, 3)
        offset_conv.bias (18,)
        offset_conv.weight (18, 4, 3, 3)
        weight (8, 4, 3, 3)
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not known; wanted one of {tuple(LAYOUTS)}")
    slots, problems, _ = _slots(model, "", LAYOUTS[layout].at, arrays, to_torch=True)
    if problems:
        raise ValueError("\n  ".join(["the model has no counterpart in PyTorch:", *problems]))
    return read(slots)


def _slots(
    model: Any, prefix: str, layout_of: Callable[[str], Layout], arrays: Rules, *, to_torch: bool
) -> tuple[list[Slot], list[str], set[str]]:
    """The slots of a model, problems as sentences, and names in PyTorch that may be ignored."""
    learnt = dict(variables(model))
    if stacks := stack_problems(model):
        return [], stacks, set()
    nodes = dict(nnx.iter_graph(model))
    names = {path: _module_name(path, nodes, prefix) for path in nodes}
    layouts = {path: layout_of(names[path]) for path, node in nodes.items() if isinstance(node, DeformConv)}
    slots, problems, own = [], [], []
    for path, variable in learnt.items():
        owner = nodes.get(path[:-1])
        theirs = next((NAMES[kind] for kind in NAMES if isinstance(owner, kind)), {}).get(path[-1])
        if theirs is not None:
            slots.append(_known(path, variable, theirs, nodes, names, layouts))
            continue
        name = joined(_module_name(path[:-1], nodes, prefix), str(path[-1]))
        if not is_own(path, variable, nodes):
            kind = type(nodes.get(path[:-1], model)).__name__
            problems.append(f"{name} {variable.shape}: PyTorch's name for it in {kind} is not known")
            continue
        own.append(name)
        order = order_of(name, variable.shape, arrays, to_torch=to_torch)
        if isinstance(order, str):
            problems.append(order)
        else:
            slots.append(slot(variable, name, order=order))
    check_rules(arrays, own)
    # A default branch has the padding of its layer, so its problems would be listed twice.
    branches = {(*path, "offset_conv") for path in layouts if nodes[path].offset_conv_cls is None}
    for path, node in nodes.items():
        if isinstance(node, nnx.Conv | nnx.ConvTranspose | DeformConv) and path not in branches:
            problems += convolution_problems(names[path], node)
        if isinstance(node, DeformConv):
            problems += dilation_problems(names[path], node, layouts[path])
    # An array of a parameter that has a problem of its own is not unexpected too.
    ignored = {joined(names[path], name) for path, node in nodes.items() for name in not_needed(node)}
    return slots, problems, ignored | set(own)


def _known(path: tuple, variable: Any, theirs: str, nodes: Mapping, names: Mapping, layouts: Mapping) -> Slot:
    """The slot of a variable of a layer that has a counterpart, in which it is called `theirs`."""
    order = kernel_order(nodes[path[:-1]], len(variable.shape)) if path[-1] == "kernel" else SAME
    modules, sizes = _modules(path, variable.shape[-1], nodes, names, layouts)
    return slot(variable, *(joined(module, theirs) for module in modules), order=order, sizes=sizes)


def _module_name(path: tuple, nodes: Mapping[tuple, Any], prefix: str) -> str:
    """PyTorch's name of the module at a path."""
    return joined(prefix, *(module_key(nodes.get(path[:i]), key) for i, key in enumerate(path)))


def _modules(
    path: tuple, channels: int, nodes: Mapping, names: Mapping, layouts: Mapping
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The PyTorch modules that share a variable, and how many of its channels each has."""
    owner = path[:-1]
    if owner in layouts:
        return (layouts[owner].main,), (channels,)
    layer = next((path[:i] for i, key in enumerate(owner) if key == "offset_conv" and path[:i] in layouts), None)
    if layer is None:
        return (names[owner],), (channels,)
    branch = layouts[layer].branch
    inside = names[owner].removeprefix(joined(names[layer], "offset_conv")).lstrip(".")
    # A branch of one convolution may be two in PyTorch; one of several modules is not divided.
    sizes = (channels,) if inside else branch_sizes(nodes[layer], layouts[layer], channels)
    return tuple(joined(module, inside) for module in branch[: len(sizes)]), sizes
