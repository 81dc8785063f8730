"""Compute attn.npz: Deformable DETR's layer on weights that tests/support/seeded.py makes, in float64.

    pip install numpy torch    # written with torch 2.14.1, NumPy 2.4.6
    python -m tests.support.data.make_attn    # from the root of the repository

Written from the published formula over `torch.nn.functional.grid_sample`, under the names of the
published modules (HF transformers' and mmcv's are the same). Options, inputs, outputs and the
gradients of the inputs are stored.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.support import seeded

LEVELS = [[5, 4], [3, 2], [1, 3]]
BATCH, QUERIES = 2, 4
CASES = {
    "points": {"coordinates": 2, "padding": True, "num_heads": 2, "num_points": 3},
    "boxes": {"coordinates": 4, "padding": False, "num_heads": 4, "num_points": 2},
    "boxes, points by level": {"coordinates": 4, "padding": True, "num_heads": 2, "num_points": [3, 1, 2]},
}
EMBED = 8


class Attention(nn.Module):
    """The layer, without the residual and dropout that some have; True in the mask is padding."""

    def __init__(self, heads, points):
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(EMBED, heads * sum(points) * 2)
        self.attention_weights = nn.Linear(EMBED, heads * sum(points))
        self.value_proj = nn.Linear(EMBED, EMBED)
        self.output_proj = nn.Linear(EMBED, EMBED)

    def forward(self, query, reference_points, value, padding_mask):
        """`(B, Q, E)`, `(B, Q, L, 2 or 4)`, `(B, S, E)`, `(B, S)` or None -> `(B, Q, E)`."""
        value = self.value_proj(value)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.heads, -1))
        offset = self.sampling_offsets(query).unflatten(-1, (self.heads, -1, 2))
        weight = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        heads, pixel, point = [0] * self.heads, 0, 0
        for level, ((height, width), count) in enumerate(zip(LEVELS, self.points, strict=True)):
            reference = reference_points[:, :, level]
            for head in range(self.heads):
                image = value[:, pixel : pixel + height * width, head].unflatten(1, (height, width))
                for p in range(point, point + count):
                    if reference.shape[-1] == 2:
                        at = reference + offset[:, :, head, p] / torch.tensor([width, height])
                    else:
                        at = reference[..., :2] + offset[:, :, head, p] / count * reference[..., 2:] * 0.5
                    read = F.grid_sample(image.permute(0, 3, 1, 2), 2 * at[:, :, None] - 1, align_corners=False)
                    heads[head] = heads[head] + weight[:, :, head, p, None] * read[..., 0].transpose(1, 2)
            pixel, point = pixel + height * width, point + count
        return self.output_proj(torch.cat(heads, -1))


def main():
    """Write attn.npz beside this script."""
    arrays, shapes = {}, {}
    pixels = sum(height * width for height, width in LEVELS)
    for case, options in CASES.items():
        points = options["num_points"]
        module = Attention(
            options["num_heads"], points if isinstance(points, list) else [points] * len(LEVELS)
        ).double()
        shapes[case] = {name: list(v.shape) for name, v in module.state_dict().items()}
        module.load_state_dict({name: torch.from_numpy(v) for name, v in seeded.state(shapes[case]).items()})
        inputs = {
            "query": seeded.uniform("query", (BATCH, QUERIES, EMBED)),
            "reference_points": (1 + seeded.uniform("points", (BATCH, QUERIES, len(LEVELS), options["coordinates"])))
            / 2,
            "value": seeded.uniform("value", (BATCH, pixels, EMBED)),
        }
        inputs = {name: torch.from_numpy(array).requires_grad_() for name, array in inputs.items()}
        padding = torch.from_numpy(seeded.uniform("padding", (BATCH, pixels)) > 0.5)
        y = module(**inputs, padding_mask=padding if options["padding"] else None)
        cotangent = torch.from_numpy(seeded.uniform("cotangent", y.shape))
        y.backward(cotangent)
        stored = {"padding_mask": padding, "cotangent": cotangent, "y": y} | inputs
        stored |= {f"d_{name}": array.grad for name, array in inputs.items()}
        arrays |= {f"{case}.{name}": array.detach().numpy() for name, array in stored.items()}
    path = Path(__file__).with_name("attn.npz")
    about = {"levels": LEVELS, "embed_dim": EMBED, "shapes": shapes, "cases": CASES}
    np.savez_compressed(path, about=json.dumps(about), **arrays)
    print(f"{len(CASES)} cases, {path.stat().st_size / 1e3:.0f} kB: {path}")


if __name__ == "__main__":
    main()
