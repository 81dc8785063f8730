"""Make roi.npz: torchvision's `roi_align` and its gradient, in float64, for boxes of every kind.

    pip install numpy torch torchvision    # written with torch 2.14.1, torchvision 0.29.1, NumPy 2.4.6
    python tests/support/data/make_roi.py

Boxes are inside the map, over its border, outside, without width or area, reversed, of whole numbers, and smaller than a
pixel. Arrays are stored in this library's layout, channels last.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import roi_align

SIZES = itertools.cycle([(2, 2), (3, 2), (1, 4)])
SCALES = itertools.cycle([1.0, 0.25, 0.5])


def draw_boxes(rng, size):
    """Boxes of every kind on a map of `size` (x, y), in pixels of the map: (R, 4)."""
    start, more = rng.uniform(0, 0.6, (9, 2)) * size, rng.uniform(0.1, 0.4, (9, 2)) * size
    start[1] -= 0.5 * size  # over the border
    more[2] += size
    start[3] += 1.2 * size  # outside
    more[4, 0] = 0  # without width
    more[5] = 0  # a point
    more[6] *= -1  # reversed
    start[7], more[7] = np.floor(start[7]), np.ceil(more[7])  # whole numbers
    more[8] = 0.3  # less than a pixel
    return np.concatenate([start, start + more], axis=1)


def main():
    rng, stored, options = np.random.default_rng(0), {}, []
    for number, (aligned, ratio) in enumerate(itertools.product((True, False), (1, 2, 3))):
        size, scale = next(SIZES), next(SCALES)
        x = rng.standard_normal((2, 5, 7, 2))
        boxes = draw_boxes(rng, np.array([7.0, 5.0])) / scale
        rois = np.concatenate([rng.integers(0, 2, (len(boxes), 1)), boxes], axis=1)
        leaf = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
        y = roi_align(leaf, torch.tensor(rois), size, scale, ratio, aligned)
        cotangent = torch.tensor(rng.standard_normal(y.shape))
        (d_x,) = torch.autograd.grad(y, leaf, cotangent)
        last = [array.detach().permute(0, 2, 3, 1).numpy() for array in (y, cotangent, d_x)]
        arrays = zip(("x", "rois", "y", "cotangent", "d_x"), (x, rois, *last), strict=True)
        stored |= {f"{number}.{name}": array for name, array in arrays}
        options.append({"output_size": size, "spatial_scale": scale, "sampling_ratio": ratio, "aligned": aligned})
    np.savez_compressed(Path(__file__).with_name("roi.npz"), options=json.dumps(options), **stored)


if __name__ == "__main__":
    main()
