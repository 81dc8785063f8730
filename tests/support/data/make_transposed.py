"""Compute transposed.npz: PyTorch's transposed convolutions on weights that tests/support/seeded.py makes, in float64.

    pip install numpy torch    # written with torch 2.13.0, NumPy 2.4.6
    python -m tests.support.data.make_transposed    # from the root of the repository

Only outputs are stored, channels last. The state's shapes are those of the tests' own layers.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.support import seeded

CASES = {
    "up by two": (lambda: nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1), (1, 3, 3, 4)),
    "unet": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=2), (1, 3, 3, 2)),
    "output_padding": (lambda: nn.ConvTranspose2d(2, 3, (3, 5), (2, 3), (1, 2), (1, 2), bias=False), (1, 2, 3, 2)),
    "dilation": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, dilation=2), (1, 2, 3, 3)),
    "stride above the window": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=3, output_padding=1), (1, 2, 2, 3)),
    "one axis": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (1, 2, 4)),
    "three axes": (lambda: nn.ConvTranspose3d(2, 3, (1, 2, 3), (1, 2, 1), (0, 0, 1)), (1, 2, 2, 2, 3)),
    "groups": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (1, 4, 2, 3)),
    "depthwise": (lambda: nn.ConvTranspose2d(3, 3, 4, stride=2, padding=1, groups=3, bias=False), (1, 3, 3, 3)),
}


def main():
    """Write transposed.npz beside this script."""
    arrays = {}
    for case, (make, x_shape) in CASES.items():
        module = make().double()
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        module.load_state_dict({name: torch.from_numpy(value) for name, value in seeded.state(shapes).items()})
        with torch.no_grad():
            y = module(torch.from_numpy(seeded.uniform("x", x_shape)))
        arrays[case] = np.moveaxis(y.numpy(), 1, -1)
    path = Path(__file__).with_name("transposed.npz")
    np.savez_compressed(path, **arrays)
    print(f"{len(arrays)} cases, {path.stat().st_size / 1e3:.0f} kB: {path}")


if __name__ == "__main__":
    main()
