"""Make family.npz: what torch computes, in float64 and with all gradients, for `grid_sample`, `affine_grid` and
`ms_deform_attn`.

    python make_family.py

needs torch (CPU) and NumPy. Positions are drawn away from the kinks, where torch's derivatives and this library's may
differ, and from the borders of the modes that clip. torch samples no 1-D maps: one is a 2-D map of one row here, read in the
middle of that row. Arrays are stored in this library's layout, channels last.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

SPATIAL = [(6,), (4, 5), (3, 4, 5), (1, 3)]
PADDING = {"zeros": lambda align: "zeros", "border": lambda align: "edge", "reflection": lambda align: "reflect" if align else "symmetric"}  # fmt: skip
ATTENTION = {
    "one level": {"spatial_shapes": [[3, 4]], "points": [2]},
    "levels": {"spatial_shapes": [[5, 4], [3, 2], [1, 1]], "points": [3, 3, 3]},
    "points by level": {"spatial_shapes": [[4, 5], [2, 3]], "points": [3, 1]},
    "3-D": {"spatial_shapes": [[2, 3, 4], [1, 2, 2]], "points": [2, 2]},
}
HEADS, CHANNELS, QUERIES, BATCH = 3, 2, 5, 2


def leaf(array):
    return torch.tensor(array, dtype=torch.float64).requires_grad_()


def to_grid(pixels, size, align_corners):
    """The inverse of torch's rule, for one axis."""
    return pixels / (size - 1) * 2 - 1 if align_corners else (2 * pixels + 1) / size - 1


def draw_grid(rng, spatial, align_corners, query):
    """Positions in and around a map, their fractions in [0.1, 0.4] or [0.6, 0.9], last spatial axis first."""
    axes = []
    for size in reversed(spatial):
        if align_corners and size == 1:
            axes.append(rng.uniform(-1.5, 1.5, query))  # all of which are pixel 0
            continue
        fraction = rng.uniform(0.1, 0.4, query) + 0.5 * rng.integers(0, 2, query)
        axes.append(to_grid(rng.integers(-size - 1, 2 * size + 1, query) + fraction, size, align_corners))
    return np.stack(axes, axis=-1)


def sample(features, grid, **options):
    """torch's grid_sample of `(B, *spatial, C)` at `(B, Q, n)`: `(B, Q, C)`."""
    rank = grid.shape[-1]
    if rank == 1:
        features = features[:, None]
        middle = -torch.ones_like(grid) if options["align_corners"] else torch.zeros_like(grid)
        grid = torch.cat([grid, middle], dim=-1)
    channels_first = features.movedim(-1, 1)
    places = grid.reshape(grid.shape[0], *[1] * (max(rank, 2) - 1), *grid.shape[1:])
    return F.grid_sample(channels_first, places, **options).flatten(2).movedim(1, 2)


METHODS = {"bilinear": "linear", "nearest": "nearest", "bicubic": "cubic"}


def grid_sample_cases(rng):
    every = itertools.product(SPATIAL, ("bilinear", "nearest"), PADDING, (False, True))
    cubic = itertools.product([(4, 5), (1, 3)], ("bicubic",), PADDING, (False, True))  # torch has it in 2-D alone
    # Cubic cases draw from a generator of their own, so that adding them changed no other.
    yield from (sampled(rng, *case) for case in every)
    own = np.random.default_rng(14)
    yield from (sampled(own, *case) for case in cubic)


def sampled(rng, spatial, method, padding, align):
    features = leaf(rng.normal(size=(BATCH, *spatial, CHANNELS)))
    grid = leaf(draw_grid(rng, spatial, align, (BATCH, 12)))
    y = sample(features, grid, mode=method, padding_mode=padding, align_corners=align)
    cotangent = rng.normal(size=y.shape)
    y.backward(torch.tensor(cotangent))
    options = {
        "method": METHODS[method],
        "padding_mode": PADDING[padding](align),
        "align_corners": align,
    }
    arrays = {"features": features, "grid": grid, "y": y, "d_features": features.grad, "d_grid": grid.grad}
    return options, arrays | {"cotangent": torch.tensor(cotangent)}


def affine_grid_cases():
    rng = np.random.default_rng(15)
    for spatial, align in itertools.product([(4, 5), (1, 3), (3, 1, 4)], (False, True)):
        n = len(spatial)
        theta = leaf(rng.normal(size=(BATCH, n, n + 1)))
        y = F.affine_grid(theta, (BATCH, 1, *spatial), align_corners=align)
        cotangent = torch.tensor(rng.normal(size=y.shape))
        y.backward(cotangent)
        arrays = {"theta": theta, "y": y, "d_theta": theta.grad, "cotangent": cotangent}
        yield {"spatial": spatial, "align_corners": align}, arrays


def draw_locations(rng, spatial, shape):
    """Locations in and around [0, 1], away from the kinks of every method."""
    axes = []
    for size in reversed(spatial):
        fraction = rng.uniform(0.1, 0.4, shape) + 0.5 * rng.integers(0, 2, shape)
        axes.append((rng.integers(-2, size + 1, shape) + fraction + 0.5) / size)
    return np.stack(axes, axis=-1)


def attend(value, shapes, locations, weights, points, method):
    """Σ over levels and points of weight · value at the location, by the formula: one grid_sample a level."""
    batch, _, heads, channels = value.shape
    y, pixel, point = 0, 0, 0
    for shape, count in zip(shapes, points, strict=True):
        size = int(np.prod(shape))
        level = value[:, pixel : pixel + size].movedim(2, 1).reshape(batch * heads, *shape, channels)
        at = locations[..., point : point + count, :].movedim(2, 1).reshape(batch * heads, -1, len(shape))
        if method == "discrete":
            index = 0
            for axis, length in enumerate(shape):
                along = (at[..., len(shape) - 1 - axis] * length + 0.5).to(torch.int64).clamp(0, length - 1)
                index = index * length + along
            rows = level.reshape(batch * heads, size, channels)
            read = torch.gather(rows, 1, index[..., None].expand(*index.shape, channels))
        else:
            mode = {"linear": "bilinear"}.get(method, method)
            read = sample(level, 2 * at - 1, mode=mode, padding_mode="zeros", align_corners=False)
        read = read.reshape(batch, heads, QUERIES, count, channels).movedim(1, 2)
        y = y + (read * weights[..., point : point + count, None]).sum(-2)
        pixel, point = pixel + size, point + count
    return y.flatten(2)


def attention_cases(rng):
    for (name, case), method in itertools.product(ATTENTION.items(), ("linear", "nearest", "discrete")):
        shapes, points = case["spatial_shapes"], case["points"]
        value = leaf(rng.normal(size=(BATCH, sum(int(np.prod(s)) for s in shapes), HEADS, CHANNELS)))
        drawn = [draw_locations(rng, s, (BATCH, QUERIES, HEADS, p)) for s, p in zip(shapes, points, strict=True)]
        locations = leaf(np.concatenate(drawn, axis=-2))
        weights = leaf(rng.uniform(size=locations.shape[:-1]))
        y = attend(value, shapes, locations, weights, points, method)
        cotangent = torch.tensor(rng.normal(size=y.shape))
        gradients = torch.autograd.grad(y, (value, locations, weights), cotangent, allow_unused=True)
        d_value, d_locations, d_weights = (
            torch.zeros_like(a) if g is None else g for g, a in zip(gradients, (value, locations, weights), strict=True)
        )
        arrays = {"value": value, "locations": locations, "weights": weights, "cotangent": cotangent, "y": y}
        gradients = {"d_value": d_value, "d_locations": d_locations, "d_weights": d_weights}
        yield {"name": name, "method": method, **case}, arrays | gradients


def main():
    """Write family.npz beside this script."""
    rng = np.random.default_rng(12)
    stored, options = {}, {}
    of_ops = {"grid_sample": grid_sample_cases(rng), "ms_deform_attn": attention_cases(rng)}
    for op, cases in {**of_ops, "affine_grid": affine_grid_cases()}.items():
        options[op] = []
        for number, (case, arrays) in enumerate(cases):
            options[op].append(case)
            stored |= {f"{op}.{number}.{name}": array.detach().numpy() for name, array in arrays.items()}
    path = Path(__file__).with_name("family.npz")
    np.savez_compressed(path, options=json.dumps(options), **stored)
    print(f"{sum(map(len, options.values()))} cases, {path.stat().st_size / 1e3:.0f} kB: {path}")


if __name__ == "__main__":
    main()
