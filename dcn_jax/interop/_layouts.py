"""What the arrays of one layer are called in PyTorch and Paddle, and the padding that they do not have."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from flax import nnx

from dcn_jax.nnx import DCNv3, DCNv4, DeformConv, MSDeformAttn
from dcn_jax.nnx._dcn import DepthwiseBlock


class Layout(NamedTuple):
    """How the arrays of a deformable layer are called, "{}" being the layer's own name.

    Where there are two modules in the branch, the first emits the offsets and the second the logits of the mask.
    """

    main: str
    branch: tuple[str, ...]
    dilated: bool = True  # whether the branch has the dilation of the main convolution

    def at(self, layer: str) -> "Layout":
        """The same of a layer of this name; the model itself has the empty name."""
        branch = tuple(joined(name.format(layer)) for name in self.branch)
        return self._replace(main=joined(self.main.format(layer)), branch=branch)


def joined(*names: str) -> str:
    """Names, one inside of the other: "layer1", "0" is "layer1.0"; empty ones do not count."""
    return ".".join(name for name in names if name).lstrip(".")


LAYOUTS = {
    "mmcv": Layout("{}", ("{}.conv_offset",)),  # and detectron2's, where it is packed
    "torchvision": Layout("{}", ("{}.offset_conv", "{}.mask_conv")),
    "paddle": Layout("{}.conv_dcn", ("{}.conv_offset",), dilated=False),
    "charlesshang": Layout("{}", ("{}.conv_offset_mask",)),
    "legacy": Layout("{}", ("{}_offset",)),  # mmcv's first version and detectron2's blocks: conv2 and conv2_offset
}

# What an array is called in PyTorch, by the variable's name here.
_NAMES = {"kernel": "weight", "bias": "bias"}
_NORM = {"scale": "weight", "bias": "bias"}
_BLEND = {name: name for name in ("center_feature_scale_proj_weight", "center_feature_scale_proj_bias")}
NAMES = {
    nnx.Conv: _NAMES,
    nnx.Linear: _NAMES,
    DeformConv: _NAMES,
    nnx.BatchNorm: {**_NORM, "mean": "running_mean", "var": "running_var"},
    nnx.LayerNorm: _NORM,
    nnx.GroupNorm: _NORM,
    nnx.Embed: {"embedding": "weight"},
    DCNv3: _BLEND,
    DCNv4: _BLEND,
}

# What a module's state in PyTorch holds beside, and nobody needs: counts of batches; RT-DETRv2's
# 1 / P of each point.
_NOT_NEEDED = {nnx.BatchNorm: ("num_batches_tracked",), MSDeformAttn: ("n_points_scale", "num_points_scale")}


def not_needed(module: Any) -> tuple[str, ...]:
    """Names in PyTorch's state of a module that hold nothing learnt."""
    return next((names for kind, names in _NOT_NEEDED.items() if isinstance(module, kind)), ())


def module_key(owner: Any, key: Any) -> str:
    """What the module at `key` of its owner is called in PyTorch; "" where there is none between."""
    if isinstance(owner, nnx.Sequential) and key == "layers":
        return ""
    if isinstance(owner, DepthwiseBlock):
        # There it is a Sequential, whose second is one too: a norm, and a transposition before it
        # (a layer norm's) or behind.
        norm = "1.0" if isinstance(owner.norm, nnx.BatchNorm) else "1.1"
        return {"conv": "0", "norm": norm, "act": "2"}.get(key, str(key))
    return str(key)


def find_layout(layer: str, names: Iterable[str]) -> Layout:
    """The layout of a deformable layer in a state of these names; mmcv's where it cannot be told."""
    names = set(names)

    def evidence(layout: Layout) -> tuple[bool, bool]:
        branch = tuple(f"{module}." for module in layout.branch)
        return joined(layout.main, "weight") in names, any(name.startswith(branch) for name in names)

    return max((layout.at(layer) for layout in LAYOUTS.values()), key=evidence)


def torch_axes(name: str, rank: int) -> tuple[int, ...]:
    """The axes of an array of PyTorch's in the order of ours: kernels are (*window, in, out) here, (out, in, *window) there."""
    return (rank - 1, rank - 2, *range(rank - 2)) if name == "kernel" else tuple(range(rank))


def branch_sizes(layer: DeformConv, layout: Layout, channels: int) -> tuple[int, ...]:
    """How the channels of a layer's branch are shared among the modules of a layout."""
    if len(layout.branch) == 1 or not layer.modulated:
        return (channels,)
    logits = layer.offset_groups * math.prod(layer.kernel_size)
    return (channels - logits, logits)


def padding_problems(name: str, layer: Any) -> list[str]:
    """Why PyTorch cannot have a convolution's padding, if so: there, it does not depend on the size of the map."""
    if not isinstance(layer.padding, str) or layer.padding.upper() not in ("SAME", "SAME_LOWER"):
        return []
    rank = len(layer.kernel_size)
    strides, dilation = _each(layer.strides, rank), _each(layer.kernel_dilation, rank)
    extent = [(size - 1) * step + 1 for size, step in zip(layer.kernel_size, dilation, strict=True)]
    if all(stride == 1 or size == 1 for stride, size in zip(strides, extent, strict=True)):
        return []
    pairs = tuple(((size - 1) // 2, (size - 1) // 2) for size in extent)
    return [
        f"{name or 'the layer'} has padding={layer.padding!r} at strides {tuple(strides)}, which pads by the size of the map, "
        f"as PyTorch never does; make it with the pairs that it has there, usually padding={pairs}"
    ]


def dilation_problems(name: str, layer: DeformConv, layout: Layout) -> list[str]:
    """Why a layer's branch looks elsewhere than that of its layout, if so."""
    dilation = _each(layer.kernel_dilation, len(layer.kernel_size))
    if layout.dilated or layer.offset_conv_cls is not None or set(dilation) == {1}:
        return []
    return [
        f"{name or 'the layer'} has kernel_dilation {tuple(dilation)}, and Paddle's branch never has; make the layer with "
        "offset_conv_cls=functools.partial(nnx.Conv, kernel_size=…, strides=…, padding=…), the branch as it is there"
    ]


def _each(value: int | Sequence[int] | None, rank: int) -> list[int]:
    return [1] * rank if value is None else [value] * rank if isinstance(value, int) else list(value)
