"""Makes dcn.npz: DCNv3 and DCNv4, ops and layers, as torch computes them in float64, with gradients from its autograd.

    python tests/support/data/make_dcn.py        # in a Python that has torch

Written from the published formula over `torch.nn.functional.grid_sample`; the published Python core is not used, since
it swaps the paddings of height and width.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

OPS = [
    {},
    {"window": [3, 5], "padding": [1, 3], "offset_scale": 1.7, "remove_center": True},
    {"window": [2, 4], "strides": [2, 1], "padding": 2, "kernel_dilation": [3, 1], "offset_scale": 0.5},
    {"window": [5, 5], "strides": 2, "padding": [2, 4], "kernel_dilation": 2, "remove_center": True},
]
LAYERS = {
    "v3": {},
    "v3_scaled": {"dw_kernel_size": 5, "center_feature_scale": True, "offset_scale": 2.0, "remove_center": True},
    "v3_wide": {"kernel_size": 5, "pad": 4, "dilation": 2, "act_layer": "SiLU"},
    "v4": {},
    "v4_scaled": {"dw_kernel_size": 3, "center_feature_scale": True, "output_bias": False, "remove_center": True},
    "v4_bare": {"without_pointwise": True, "offset_scale": 0.5},
}
CHANNELS, GROUP = 8, 2


def pair(value):
    return [value, value] if isinstance(value, int) else list(value)


def places(window, remove_center):
    """The taps (column, row), columns outside."""
    taps = [(i, j) for i in range(window[1]) for j in range(window[0])]
    if remove_center:
        del taps[len(taps) // 2]
    return taps


def dcn(x, offset, mask, window=(3, 3), strides=1, padding=1, kernel_dilation=1, offset_scale=1.0, remove_center=False):
    """x (N, H, W, C), offset (N, Ho, Wo, G, K, 2), mask (N, Ho, Wo, G, K) -> (N, Ho, Wo, C)."""
    n, height, width, channels = x.shape
    _, rows, columns, groups, _, _ = offset.shape
    (sy, sx), (py, px), (dy, dx) = pair(strides), pair(padding), pair(kernel_dilation)
    cy, cx = dy * (window[0] - 1) // 2, dx * (window[1] - 1) // 2
    maps = x.reshape(n, height, width, groups, -1).permute(0, 3, 4, 1, 2).flatten(0, 1)
    y = 0
    for k, (i, j) in enumerate(places(window, remove_center)):
        at_x = torch.arange(columns)[None, :, None] * sx - px + cx + (i * dx - cx + offset[..., k, 0]) * offset_scale
        at_y = torch.arange(rows)[:, None, None] * sy - py + cy + (j * dy - cy + offset[..., k, 1]) * offset_scale
        # (-1, 1) are the centres of the outermost pixels
        grid = torch.stack([2 * at_x / (width - 1) - 1, 2 * at_y / (height - 1) - 1], -1)
        grid = grid.permute(0, 3, 1, 2, 4).flatten(0, 1)
        read = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=True)
        read = read.unflatten(0, (n, groups)).permute(0, 3, 4, 1, 2)
        y = y + read * mask[..., k, None]
    return y.reshape(n, rows, columns, channels)


def outputs(size, k, s, p, d):
    return (size + 2 * p - d * (k - 1) - 1) // s + 1


def blend(y, x, query, state):
    name = "center_feature_scale_proj"
    share = F.linear(query, state[f"{name}_weight"], state[f"{name}_bias"]).sigmoid()
    share = share.repeat_interleave(CHANNELS // GROUP, -1)
    return y * (1 - share) + x * share


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def depthwise(x, state, name):
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, 1, weight.shape[-1] // 2, 1, CHANNELS).permute(0, 2, 3, 1)


def op_options(options):
    size = options.get("kernel_size", 3)
    given = {"window": (size, size), "padding": options.get("pad", 1), "kernel_dilation": options.get("dilation", 1)}
    return given | {name: options[name] for name in ("offset_scale", "remove_center") if name in options}


def v3(x, state, options):
    projected = linear(x, state, "input_proj")
    z = depthwise(x, state, "dw_conv.0")
    z = F.layer_norm(z, (CHANNELS,), state["dw_conv.1.1.weight"], state["dw_conv.1.1.bias"], 1e-6)
    z = F.silu(z) if options.get("act_layer") == "SiLU" else F.gelu(z)
    offset = linear(z, state, "offset").unflatten(-1, (GROUP, -1, 2))
    mask = linear(z, state, "mask").unflatten(-1, (GROUP, -1)).softmax(-1)
    y = dcn(projected, offset, mask, **op_options(options))
    if options.get("center_feature_scale"):
        y = blend(y, projected, z, state)
    return linear(y, state, "output_proj")


def v4(x, state, options):
    taps = options.get("kernel_size", 3) ** 2 - options.get("remove_center", False)
    projected = x if options.get("without_pointwise") else linear(x, state, "value_proj")
    seen = depthwise(x, state, "offset_mask_dw") if options.get("dw_kernel_size") else x
    packed = linear(seen, state, "offset_mask")[..., : GROUP * taps * 3].unflatten(-1, (GROUP, 3 * taps))
    offset, mask = packed[..., : 2 * taps].unflatten(-1, (taps, 2)), packed[..., 2 * taps :]
    y = dcn(projected, offset, mask, **op_options(options))
    if options.get("center_feature_scale"):
        y = blend(y, projected, y, state)
    return y if options.get("without_pointwise") else linear(y, state, "output_proj")


def shapes(name, options):
    """The published layer's parameters."""
    c, taps = CHANNELS, options.get("kernel_size", 3) ** 2 - options.get("remove_center", False)
    dw = options.get("dw_kernel_size") or (options.get("kernel_size", 3) if name.startswith("v3") else None)
    weights, found = GROUP * taps, {}

    def add(layer, out, into=(c,), bias=True):
        found[f"{layer}.weight"] = (out, *into)
        if bias:
            found[f"{layer}.bias"] = (out,)

    if name.startswith("v3"):
        add("dw_conv.0", c, (1, dw, dw))
        add("dw_conv.1.1", c, ())
        add("offset", 2 * weights)
        add("mask", weights)
        add("input_proj", c)
        add("output_proj", c)
    else:
        if dw:
            add("offset_mask_dw", c, (1, dw, dw))
        add("offset_mask", -(-3 * weights // 8) * 8)
        if not options.get("without_pointwise"):
            add("value_proj", c)
            add("output_proj", c, bias=options.get("output_bias", True))
    if options.get("center_feature_scale"):
        found |= {"center_feature_scale_proj_weight": (GROUP, c), "center_feature_scale_proj_bias": (GROUP,)}
    return found


def main():
    """Draw the arguments, compute, and write what tests compare with."""
    random, stored = np.random.default_rng(0), {}

    def draw(*shape):
        return torch.tensor(random.standard_normal(shape).astype(np.float32), dtype=torch.float64)

    for number, options in enumerate(OPS):
        window = options.get("window", [3, 3])
        each = [pair(options.get(key, 1)) for key in ("strides", "padding", "kernel_dilation")]
        rows, columns = (outputs(s, k, *a) for s, k, *a in zip((5, 6), window, *each, strict=True))
        taps = len(places(window, options.get("remove_center", False)))
        arrays = [draw(2, 5, 6, 4), 2 * draw(2, rows, columns, 2, taps, 2), draw(2, rows, columns, 2, taps)]
        for array in arrays:
            array.requires_grad_()
        y = dcn(*arrays, **options)
        cotangent = draw(*y.shape)
        y.backward(cotangent)
        for key, array in zip(("x", "offset", "mask"), arrays, strict=True):
            flat = array.shape if key == "x" else (*array.shape[:3], -1)
            stored[f"{number}.{key}"] = array.detach().reshape(flat).numpy().astype(np.float32)
            stored[f"{number}.d_{key}"] = array.grad.reshape(flat).numpy()
        stored[f"{number}.y"], stored[f"{number}.cotangent"] = y.detach().numpy(), cotangent.numpy().astype(np.float32)
    for name, options in LAYERS.items():
        state = {key: 0.5 * draw(*shape) for key, shape in shapes(name, options).items()}
        x = draw(2, 5, 6, CHANNELS)
        y = (v3 if name.startswith("v3") else v4)(x, state, options)
        stored |= {f"{name}.state.{key}": value.numpy().astype(np.float32) for key, value in state.items()}
        stored |= {f"{name}.x": x.numpy().astype(np.float32), f"{name}.y": y.numpy()}
    stored["options"] = json.dumps({"ops": OPS, "layers": LAYERS})
    np.savez_compressed(Path(__file__).with_name("dcn.npz"), **stored)


if __name__ == "__main__":
    main()
