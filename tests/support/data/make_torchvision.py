"""Compute torchvision.npz: deformable convolutions and all their gradients by torchvision, in float64, on the CPU.

    pip install numpy torch torchvision    # written with torch 2.14.1, torchvision 0.29.1, NumPy 2.4.6
    python tests/support/data/make_torchvision.py

The ordinary geometry and those drawn from the tables below (window, strides, padding, dilation, groups, mask and bias or
none) each meet five kinds of offsets; then come the parameters of torchvision's own test (test/test_ops.py, TestDeformConv,
get_fn_args), with its batches of 33 and 0. Arrays are stored in this library's layout, channels last. Offsets are
float32 numbers, the other inputs multiples of 1/32 below 4, which bfloat16 and float16 hold too: what is compared is the
arithmetic, not the rounding of its inputs.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import deform_conv2d

GEOMETRIES = 11
OPTIONS = {
    "window": [(3, 3), (3, 3), (1, 1), (2, 2), (2, 3), (3, 1), (1, 4)],
    "strides": [(1, 1), (2, 2), (2, 1), (1, 3)],
    "padding": [(0, 0), (1, 1), (1, 0), (0, 2), (2, 2)],
    "kernel_dilation": [(1, 1), (2, 2), (1, 2), (3, 1)],
    "feature_group_count": [1, 2, 3],
    "offset_groups": [1, 2, 3],
    "mask": [True, False],
    "bias": [True, False],
}
SPATIAL = [(5, 5), (4, 6), (7, 3)]
OFFSETS = {
    "zero": lambda rng, shape: np.zeros(shape),
    "plus half": lambda rng, shape: np.full(shape, 0.5),
    "minus half": lambda rng, shape: np.full(shape, -0.5),
    "near": lambda rng, shape: rng.normal(0, 2, shape),
    "far": lambda rng, shape: rng.normal(0, 8, shape),
}
ORDINARY = {
    "window": (3, 3), "strides": (1, 1), "padding": (1, 1), "kernel_dilation": (1, 1),
    "feature_group_count": 1, "offset_groups": 1, "mask": True, "bias": True,
    "spatial": (3, 4), "channels": 4, "features": 3,
}  # fmt: skip
TORCHVISION = {
    "window": (3, 2), "strides": (2, 1), "padding": (1, 0), "kernel_dilation": (2, 1),
    "feature_group_count": 2, "offset_groups": 3, "mask": True, "bias": True,
    "spatial": (5, 4), "channels": 6, "features": 2,
}  # fmt: skip
TO_CHANNELS_LAST = {
    "x": (0, 2, 3, 1),
    "kernel": (2, 3, 1, 0),
    "offset": (0, 2, 3, 1),
    "mask": (0, 2, 3, 1),
    "bias": (0,),
}


def draw_geometries(rng):
    """GEOMETRIES of them, of 2 to 12 output positions, every option of every table among them."""
    while True:
        drawn = []
        while len(drawn) < GEOMETRIES:
            geometry = {name: values[rng.integers(len(values))] for name, values in OPTIONS.items()}
            geometry["spatial"] = SPATIAL[rng.integers(len(SPATIAL))]
            geometry["channels"] = 2 * int(np.lcm(geometry["feature_group_count"], geometry["offset_groups"]))
            geometry["features"] = 2 * geometry["feature_group_count"]
            if min(out_spatial(geometry)) >= 1 and 2 <= np.prod(out_spatial(geometry)) <= 12:
                drawn.append(geometry)
        if all(any(g[name] == v for g in drawn) for name, values in OPTIONS.items() for v in values):
            return drawn


def out_spatial(g):
    """The output's size along each axis."""
    rows = zip(g["spatial"], g["padding"], g["kernel_dilation"], g["window"], g["strides"], strict=True)
    return tuple(
        (size + 2 * pad - dilation * (taps - 1) - 1) // stride + 1 for size, pad, dilation, taps, stride in rows
    )


def thirtyseconds(values):
    """Rounded to multiples of 1/32 below 4."""
    return np.clip(np.round(values * 32), -127, 127) / 32


def draw_inputs(rng, g, batch):
    """x, kernel, mask, bias and the cotangent of the result, channels last."""
    taps, out = int(np.prod(g["window"])), out_spatial(g)
    shapes = {
        "x": (batch, *g["spatial"], g["channels"]),
        "kernel": (*g["window"], g["channels"] // g["feature_group_count"], g["features"]),
        "mask": (batch, *out, g["offset_groups"] * taps),
        "bias": (g["features"],),
        "cotangent": (batch, *out, g["features"]),
    }
    return {name: thirtyseconds(rng.normal(size=shape)) for name, shape in shapes.items() if g.get(name, True)}


def draw_offset(rng, kind, g, batch):
    """An offset of one of the kinds of OFFSETS, in numbers that float32 holds."""
    shape = (batch, *out_spatial(g), g["offset_groups"] * int(np.prod(g["window"])) * 2)
    return OFFSETS[kind](rng, shape).astype(np.float32)


def run_torchvision(g, inputs):
    """The result and the gradient with respect to each input, channels last, in float64."""
    leaves = {
        name: torch.tensor(inputs[name].transpose(np.argsort(axes)), dtype=torch.float64).contiguous().requires_grad_()
        for name, axes in TO_CHANNELS_LAST.items()
        if name in inputs
    }
    y = deform_conv2d(
        leaves["x"], leaves["offset"], leaves["kernel"], leaves.get("bias"),
        stride=g["strides"], padding=g["padding"], dilation=g["kernel_dilation"], mask=leaves.get("mask"),
    )  # fmt: skip
    y.backward(torch.tensor(inputs["cotangent"].transpose(0, 3, 1, 2)))
    results = {f"d_{name}": leaf.grad.numpy().transpose(TO_CHANNELS_LAST[name]) for name, leaf in leaves.items()}
    return {"y": y.detach().numpy().transpose(0, 2, 3, 1), **results}


def main():
    """Write torchvision.npz beside this script."""
    rng = np.random.default_rng(20)
    geometries = [(g, 2, list(OFFSETS)) for g in (ORDINARY, *draw_geometries(rng))]
    OFFSETS["normal"] = lambda rng, shape: rng.normal(size=shape)
    geometries += [(TORCHVISION, 33, ["normal"]), (TORCHVISION, 0, ["normal"])]

    arrays = {}
    for number, (geometry, batch, kinds) in enumerate(geometries):
        inputs = draw_inputs(rng, geometry, batch)
        arrays |= {f"{number}.{name}": value.astype(np.float16) for name, value in inputs.items()}
        for kind in kinds:
            offset = draw_offset(rng, kind, geometry, batch)
            results = run_torchvision(geometry, inputs | {"offset": offset})
            arrays |= {f"{number}.{kind}.{name}": value for name, value in {"offset": offset, **results}.items()}
    options = [{**g, "batch": batch, "kinds": kinds} for g, batch, kinds in geometries]
    path = Path(__file__).with_name("torchvision.npz")
    np.savez_compressed(path, options=json.dumps(options), **arrays)
    print(f"{sum(len(kinds) for *_, kinds in geometries)} cases, {path.stat().st_size / 1e3:.0f} kB: {path}")


if __name__ == "__main__":
    main()
