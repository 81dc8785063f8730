"""The names of a layer's arrays in PyTorch and Paddle, and the options that they do not have."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from flax import nnx

from dcn_jax.interop._convolutions import each_axis
from dcn_jax.nnx import DCNv3, DCNv4, DeformConv, MSDeformAttn
from dcn_jax.nnx._dcn import DepthwiseBlock


class Layout(NamedTuple):
    """The names of a deformable layer's modules; "{}" stands for the layer's own name."""

    main: str
    branch: tuple[str, ...]  # one module, or one for the offsets and one for the logits of the mask
    dilated: bool = True  # whether the branch has the dilation of the main convolution

    def at(self, layer: str) -> "Layout":
        """The layout for a layer of this name; the name of the model itself is empty."""
        branch = tuple(joined(name.format(layer)) for name in self.branch)
        return self._replace(main=joined(self.main.format(layer)), branch=branch)


def joined(*names: str) -> str:
    """Join names by dots: "layer1" and "0" give "layer1.0"; empty names are skipped."""
    return ".".join(name for name in names if name).lstrip(".")


LAYOUTS = {
    "mmcv": Layout("{}", ("{}.conv_offset",)),  # also detectron2's layers that contain their branch
    "torchvision": Layout("{}", ("{}.offset_conv", "{}.mask_conv")),
    "paddle": Layout("{}.conv_dcn", ("{}.conv_offset",), dilated=False),
    "charlesshang": Layout("{}", ("{}.conv_offset_mask",)),
    "legacy": Layout("{}", ("{}_offset",)),  # mmcv's first version and detectron2's blocks: conv2 and conv2_offset
}

# Names of arrays in PyTorch, by the name of the variable in nnx.
_NAMES = {"kernel": "weight", "bias": "bias"}
_NORM = {"scale": "weight", "bias": "bias"}
_BLEND = {name: name for name in ("center_feature_scale_proj_weight", "center_feature_scale_proj_bias")}
NAMES = {
    nnx.Conv: _NAMES,
    nnx.ConvTranspose: _NAMES,
    nnx.Linear: _NAMES,
    DeformConv: _NAMES,
    nnx.BatchNorm: {**_NORM, "mean": "running_mean", "var": "running_var"},
    nnx.LayerNorm: _NORM,
    nnx.GroupNorm: _NORM,
    nnx.Embed: {"embedding": "weight"},
    DCNv3: _BLEND,
    DCNv4: _BLEND,
}

# Arrays in PyTorch's state that hold nothing learnt: counts of batches; RT-DETRv2's 1 / P.
_NOT_NEEDED = {nnx.BatchNorm: ("num_batches_tracked",), MSDeformAttn: ("n_points_scale", "num_points_scale")}


def not_needed(module: Any) -> tuple[str, ...]:
    """The names of arrays in PyTorch's state of a module that hold nothing learnt."""
    return next((names for kind, names in _NOT_NEEDED.items() if isinstance(module, kind)), ())


def module_key(owner: Any, key: Any) -> str:
    """PyTorch's name of the module at `key` of its owner; "" if PyTorch has no such level."""
    if isinstance(owner, nnx.Sequential) and key == "layers":
        return ""
    if isinstance(owner, DepthwiseBlock):
        # In PyTorch a Sequential of conv, norm and act. The norm is one too: a batch norm and a
        # transposition, or a transposition and a layer norm.
        norm = "1.0" if isinstance(owner.norm, nnx.BatchNorm) else "1.1"
        return {"conv": "0", "norm": norm, "act": "2"}.get(key, str(key))
    return str(key)


def find_layout(layer: str, names: Iterable[str]) -> Layout:
    """The layout of a deformable layer in a state with these names; mmcv's if no name tells."""
    names = set(names)

    def evidence(layout: Layout) -> tuple[bool, bool]:
        branch = tuple(f"{module}." for module in layout.branch)
        return joined(layout.main, "weight") in names, any(name.startswith(branch) for name in names)

    return max((layout.at(layer) for layout in LAYOUTS.values()), key=evidence)


def branch_sizes(layer: DeformConv, layout: Layout, channels: int) -> tuple[int, ...]:
    """How many channels of a layer's branch each module of the layout emits."""
    if len(layout.branch) == 1 or not layer.modulated:
        return (channels,)
    logits = layer.offset_groups * math.prod(layer.kernel_size)
    return (channels - logits, logits)


def dilation_problems(name: str, layer: DeformConv, layout: Layout) -> list[str]:
    """Why a layer's branch reads other pixels than that of its layout, if so."""
    dilation = each_axis(layer.kernel_dilation, len(layer.kernel_size))
    if layout.dilated or layer.offset_conv_cls is not None or set(dilation) == {1}:
        return []
    return [
        f"{name or 'the layer'} has kernel_dilation {tuple(dilation)}, and Paddle's branch has none; make the layer "
        "with Paddle's branch: offset_conv_cls=functools.partial(nnx.Conv, kernel_size=…, strides=…, padding=…)"
    ]
