"""Deformable convolution in plain NumPy loops and float64: slow, and meant to be obviously right.

Written from the formula, with window arithmetic of its own; it imports nothing of the library.

    y(p0) = Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n        x(p) = Σ_q  Π_a hat(p_a - q_a) · x(q)        hat(t) = max(0, 1 - |t|)
"""

import itertools
import math

import numpy as np


def hat(position, size):
    """How much each of the `size` pixels of an axis counts at `position`."""
    return np.maximum(0.0, 1.0 - np.abs(position - np.arange(size)))


def hat_slope(position, size):
    """The right-hand derivative of `hat` with respect to `position`."""
    right_of = position - np.arange(size)
    return np.where((right_of >= -1) & (right_of < 0), 1.0, np.where((right_of >= 0) & (right_of < 1), -1.0, 0.0))


def read(features, factors):
    """Σ over pixels of (one factor per axis and pixel) · features `(*spatial, C)`: `(C,)`."""
    for factor in factors:
        features = np.tensordot(factor, features, axes=(0, 0))
    return features


def linear_sample(features, points):
    """`(*spatial, C)`, `(*query, n)` -> `(*query, C)`."""
    features, points = np.asarray(features, np.float64), np.asarray(points, np.float64)
    out = np.zeros((*points.shape[:-1], features.shape[-1]))
    for query in np.ndindex(*points.shape[:-1]):
        out[query] = read(features, [hat(p, size) for p, size in zip(points[query], features.shape, strict=False)])
    return out


class Geometry:
    """Where the taps of a convolution land: per axis, low padding and number of outputs."""

    def __init__(self, spatial, window, strides, padding, dilation):
        each = [(value,) * len(window) if isinstance(value, int) else tuple(value) for value in (strides, dilation)]
        self.window, self.strides, self.dilation = window, *each
        self.low, self.out = [], []
        for a in range(len(window)):
            reach = (window[a] - 1) * self.dilation[a] + 1  # pixels from the first tap to the last, both counted
            if padding == "VALID":
                low = high = 0
            elif padding in ("SAME", "SAME_LOWER"):  # as many outputs as strides begin in the map
                total = max(0, (math.ceil(spatial[a] / self.strides[a]) - 1) * self.strides[a] + reach - spatial[a])
                low = total // 2 if padding == "SAME" else total - total // 2
                high = total - low
            elif isinstance(padding, int):
                low = high = padding
            else:
                low, high = padding[a] if isinstance(padding[a], (tuple, list)) else (padding[a], padding[a])
            self.low.append(low)
            self.out.append(len(range(-low, spatial[a] + high - reach + 1, self.strides[a])))

    def tap_positions(self, position):
        """The regular positions of all taps for the output at `position`, taps in row-major order: `(K, n)`."""
        starts = [p * s - low for p, s, low in zip(position, self.strides, self.low, strict=True)]
        axes = [
            [start + k * d for k in range(w)] for start, w, d in zip(starts, self.window, self.dilation, strict=True)
        ]
        return np.array(list(itertools.product(*axes)), np.float64)


def _prepare(x, kernel, offset, mask, bias, strides, padding, kernel_dilation, feature_group_count):
    x, kernel, offset = (np.asarray(a, np.float64) for a in (x, kernel, offset))
    rank = kernel.ndim - 2
    batch, spatial, channels = x.shape[: -rank - 1], x.shape[-rank - 1 : -1], x.shape[-1]
    geometry = Geometry(spatial, kernel.shape[:rank], strides, padding, kernel_dilation)
    taps, features = math.prod(geometry.window), kernel.shape[-1]
    groups = offset.shape[-1] // (taps * rank)
    positions = (*batch, *geometry.out)
    offset = offset.reshape(*positions, groups, taps, rank)
    mask = np.ones((*positions, groups, taps)) if mask is None else np.asarray(mask, np.float64)
    mask = mask.reshape(*positions, groups, taps)
    bias = np.zeros(features) if bias is None else np.asarray(bias, np.float64)
    # The kernel as one dense matrix per tap, zero between channels and features of different groups: (K, C, features).
    dense = np.zeros((taps, channels, features))
    inputs, outputs = channels // feature_group_count, features // feature_group_count
    for g in range(feature_group_count):
        block = kernel.reshape(taps, inputs, features)[:, :, g * outputs : (g + 1) * outputs]
        dense[:, g * inputs : (g + 1) * inputs, g * outputs : (g + 1) * outputs] = block
    return x, dense, offset, mask, bias, geometry, batch, spatial


def deform_conv(
    x,
    kernel,
    offset,
    mask=None,
    bias=None,
    *,
    strides=1,
    padding="SAME",
    kernel_dilation=1,
    feature_group_count=1,
):
    """`dcn_jax.deform_conv`, in float64."""
    x, dense, offset, mask, bias, geometry, batch, spatial = _prepare(
        x, kernel, offset, mask, bias, strides, padding, kernel_dilation, feature_group_count
    )
    groups, taps = mask.shape[-2:]
    width = x.shape[-1] // groups  # channels of an offset group
    y = np.zeros((*batch, *geometry.out, dense.shape[-1]))
    for image in np.ndindex(*batch):
        for position in np.ndindex(*geometry.out):
            at, regular = (*image, *position), geometry.tap_positions(position)
            y[at] = bias
            for g, k in np.ndindex(groups, taps):
                channels = slice(g * width, (g + 1) * width)
                point = regular[k] + offset[at][g, k]
                sample = read(x[image][..., channels], [hat(p, s) for p, s in zip(point, spatial, strict=True)])
                y[at] += (sample * mask[at][g, k]) @ dense[k, channels]
    return y


def gradients(
    cotangent,
    x,
    kernel,
    offset,
    mask=None,
    bias=None,
    *,
    strides=1,
    padding="SAME",
    kernel_dilation=1,
    feature_group_count=1,
):
    """Gradients of Σ cotangent · y with respect to x, kernel, offset, mask and bias (also where mask or bias is None)."""
    shapes = np.shape(x), np.shape(kernel), np.shape(offset)
    x, dense, offset, mask, bias, geometry, batch, spatial = _prepare(
        x, kernel, offset, mask, bias, strides, padding, kernel_dilation, feature_group_count
    )
    cotangent = np.asarray(cotangent, np.float64)
    groups, taps = mask.shape[-2:]
    width = x.shape[-1] // groups
    d_x, d_dense, d_offset, d_mask = (np.zeros_like(a) for a in (x, dense, offset, mask))
    d_bias = np.zeros_like(bias)
    for image in np.ndindex(*batch):
        for position in np.ndindex(*geometry.out):
            at, regular = (*image, *position), geometry.tap_positions(position)
            d_bias += cotangent[at]
            for g, k in np.ndindex(groups, taps):
                channels = slice(g * width, (g + 1) * width)
                features, point = x[image][..., channels], regular[k] + offset[at][g, k]
                hats = [hat(p, s) for p, s in zip(point, spatial, strict=True)]
                sample = read(features, hats)
                d_product = dense[k, channels] @ cotangent[at]  # of sample · mask
                d_dense[k, channels] += np.outer(sample * mask[at][g, k], cotangent[at])
                d_mask[at][g, k] = sample @ d_product
                d_sample = d_product * mask[at][g, k]
                for a in range(len(spatial)):
                    slopes = [hat_slope(point[a], spatial[a]) if b == a else h for b, h in enumerate(hats)]
                    d_offset[at][g, k, a] = read(features, slopes) @ d_sample
                weights = np.ones(())
                for h in hats:
                    weights = weights[..., None] * h
                d_x[image][..., channels] += weights[..., None] * d_sample
    # Back from one dense matrix per tap to the blocks that the grouped kernel holds.
    window, (inputs, features) = shapes[1][:-2], shapes[1][-2:]
    outputs = features // feature_group_count
    blocks = [
        d_dense[:, g * inputs : (g + 1) * inputs, g * outputs : (g + 1) * outputs] for g in range(feature_group_count)
    ]
    d_kernel = np.concatenate(blocks, axis=-1).reshape(*window, inputs, features)
    return d_x, d_kernel, d_offset.reshape(shapes[2]), d_mask.reshape(*mask.shape[:-2], groups * taps), d_bias
