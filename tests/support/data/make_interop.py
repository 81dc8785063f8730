"""Compute interop.npz: layers and networks of PyTorch on weights that tests/support/seeded.py makes, in float64.

    pip install numpy torch torchvision    # written with torch 2.14.1, torchvision 0.29.1, NumPy 2.4.6
    python -m tests.support.data.make_interop    # from the root of the repository

The layers are torchvision's `DeformConv2d` under the names that its users, mmcv, detectron2, PaddleDetection and
CharlesShang's port give to it and to the convolutions of its branch, and 4uiiurz1's order of channels. Only shapes and
outputs are stored, channels last.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.ops import DeformConv2d, deform_conv2d

from tests.support import seeded


def branch_conv(main, out):
    """A convolution with the geometry of `main`, but for its groups."""
    geometry = (main.kernel_size, main.stride, main.padding, main.dilation)
    return nn.Conv2d(main.in_channels, out, *geometry)


def sizes(main, offset_groups):
    """Channels of offsets and of masks."""
    masks = offset_groups * main.kernel_size[0] * main.kernel_size[1]
    return 2 * masks, masks


class Separate(DeformConv2d):
    """torchvision's, with an offset_conv and a mask_conv beside its weight."""

    def __init__(self, *args, offset_groups=1, modulated=True, **kwargs):
        super().__init__(*args, **kwargs)
        offsets, masks = sizes(self, offset_groups)
        self.offset_conv = branch_conv(self, offsets)
        self.mask_conv = branch_conv(self, masks) if modulated else None

    def forward(self, x):
        """Offsets and masks from x, then the op."""
        mask = None if self.mask_conv is None else torch.sigmoid(self.mask_conv(x))
        return super().forward(x, self.offset_conv(x), mask)


class Packed(DeformConv2d):
    """mmcv's packed layer, and those that differ by the branch's name alone."""

    def __init__(self, *args, offset_groups=1, modulated=True, name="conv_offset", **kwargs):
        super().__init__(*args, **kwargs)
        self.sizes, self.name = sizes(self, offset_groups), name
        self.add_module(name, branch_conv(self, sum(self.sizes) if modulated else self.sizes[0]))

    def forward(self, x):
        """Offsets and logits from one convolution, then the op."""
        branch = getattr(self, self.name)(x)
        offset, logits = branch[:, : self.sizes[0]], branch[:, self.sizes[0] :]
        return super().forward(x, offset, torch.sigmoid(logits) if logits.shape[1] else None)


class Apart(nn.Module):
    """A layer and its branch as two modules: detectron2's blocks, and PaddleDetection's layer."""

    def __init__(self, *args, main, branch, offset_groups=1, **kwargs):
        super().__init__()
        self.names = main, branch
        self.add_module(main, DeformConv2d(*args, **kwargs))
        self.sizes = sizes(getattr(self, main), offset_groups)
        self.add_module(branch, branch_conv(getattr(self, main), sum(self.sizes)))

    def forward(self, x):
        """Offsets and logits from one convolution, then the op."""
        main, branch = (getattr(self, name) for name in self.names)
        offset, logits = branch(x).split(self.sizes, dim=1)
        return main(x, offset, torch.sigmoid(logits))


class AllYAllX(nn.Module):
    """4uiiurz1's names and order of channels, over torchvision's op."""

    def __init__(self, channels, features):
        super().__init__()
        self.conv = nn.Conv2d(channels, features, 3, bias=False)
        self.p_conv = nn.Conv2d(channels, 18, 3, padding=1)
        self.m_conv = nn.Conv2d(channels, 9, 3, padding=1)

    def forward(self, x):
        """The y of all taps, then their x."""
        y, x_ = self.p_conv(x).chunk(2, dim=1)
        offset = torch.stack([y, x_], dim=2).flatten(1, 2)
        return deform_conv2d(x, offset, self.conv.weight, padding=1, mask=torch.sigmoid(self.m_conv(x)))


class Net(nn.Module):
    """A convolution, a batch norm, a packed layer in a Sequential, a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.body = nn.Sequential(Packed(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        """Logits."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.body(x).mean((2, 3)))


def resnet50():
    """torchvision's, the 3×3 convolutions of conv3 to conv5 deformable."""
    model = torchvision.models.resnet50()
    for stage in (model.layer2, model.layer3, model.layer4):
        for block in stage:
            block.conv2 = Packed(
                block.conv2.in_channels, block.conv2.out_channels, 3, block.conv2.stride, padding=1, bias=False
            )
    return model


CASES = {
    "torchvision": (lambda: Separate(4, 6, 3, 2, 1, groups=2, offset_groups=2), (2, 4, 6, 7)),
    "torchvision 1": (lambda: Separate(3, 2, (3, 2), (1, 2), (2, 1), (2, 1), bias=False, modulated=False), (2, 3, 5, 6)),
    "mmcv": (lambda: Packed(4, 6, 3, 2, 1, offset_groups=2), (2, 4, 6, 7)),
    "mmcv 1": (lambda: Packed(4, 6, 3, 1, 2, 2, bias=False, offset_groups=2, modulated=False), (2, 4, 5, 6)),
    "charlesshang": (lambda: Packed(4, 6, 3, 1, 1, name="conv_offset_mask"), (2, 4, 5, 6)),
    "legacy": (lambda: Apart(4, 6, 3, 2, 1, bias=False, main="conv2", branch="conv2_offset"), (2, 4, 5, 6)),
    "paddle": (lambda: Apart(4, 6, 3, 2, 1, main="conv_dcn", branch="conv_offset"), (2, 4, 5, 6)),
    "all_y_all_x": (lambda: AllYAllX(4, 6), (2, 4, 5, 6)),
    "net": (Net, (2, 3, 16, 18)),
    "resnet50": (resnet50, (1, 3, 64, 64)),
}  # fmt: skip


def main():
    """Write interop.npz beside this script."""
    arrays, shapes = {}, {}
    for case, (make, x_shape) in CASES.items():
        module = make().double().eval()
        tracked = {name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
        shapes[case] = {name: tuple(v.shape) for name, v in module.state_dict().items() if name not in tracked}
        weights = {name: torch.from_numpy(value) for name, value in seeded.state(shapes[case]).items()}
        module.load_state_dict(weights | tracked)
        with torch.no_grad():
            y = module(torch.from_numpy(seeded.uniform("x", x_shape)))
        arrays[case] = np.moveaxis(y.numpy(), 1, -1)
    path = Path(__file__).with_name("interop.npz")
    x_shapes = {case: shape for case, (_, shape) in CASES.items()}
    np.savez_compressed(path, shapes=json.dumps(shapes), x_shapes=json.dumps(x_shapes), **arrays)
    print(f"{len(arrays)} cases, {path.stat().st_size / 1e3:.0f} kB: {path}")


if __name__ == "__main__":
    main()
