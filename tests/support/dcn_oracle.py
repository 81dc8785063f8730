"""DCNv3 and DCNv4 in plain NumPy loops and float64, from the published formula: slow, and meant to be obviously right.

    y(p0, c) = Σ_k  m_k · x(p0 - c · s + (k · dilation + Δ_k) · s, c)      p0 = output · stride - padding + c

Taps run over the width outside and over the height inside; offsets are (x, y). It imports nothing of the library.
"""

import numpy as np

from tests.support.oracle import hat, hat_slope, read


def _pairs(value):
    return [(v, v) if isinstance(v, int) else tuple(v) for v in ([value] * 2 if isinstance(value, int) else value)]


def _axes(spatial, window, strides, padding, kernel_dilation):
    """Per axis, height first: (window, stride, dilation, low padding, outputs)."""
    strides, dilations = ([value] * 2 if isinstance(value, int) else value for value in (strides, kernel_dilation))
    for size, k, s, d, (low, high) in zip(spatial, window, strides, dilations, _pairs(padding), strict=True):
        yield k, s, d, low, (size + low + high - (k - 1) * d - 1) // s + 1


def _samples(x, offset, *, window, strides, padding, kernel_dilation, offset_scale, remove_center):
    """For each output, group and tap: (the output's indices, its image's, group and tap as one number, channels, y, x)."""
    *batch, height, width, channels = x.shape
    (kh, sh, dh, ph, ho), (kw, sw, dw, pw, wo) = _axes((height, width), window, strides, padding, kernel_dilation)
    ch, cw = (dh * (kh - 1)) // 2, (dw * (kw - 1)) // 2
    taps = [(i, j) for i in range(kw) for j in range(kh) if not (remove_center and i == kw // 2 and j == kh // 2)]
    groups = offset.shape[-1] // (2 * len(taps))
    offset = offset.reshape(*batch, ho, wo, groups, len(taps), 2)
    for at in np.ndindex(*batch, ho, wo):
        *image, oy, ox = at
        for g in range(groups):
            for k, (i, j) in enumerate(taps):
                dx, dy = offset[at][g, k]
                px = (ox * sw - pw + cw) - cw * offset_scale + (i * dw + dx) * offset_scale
                py = (oy * sh - ph + ch) - ch * offset_scale + (j * dh + dy) * offset_scale
                each = channels // groups
                yield at, tuple(image), g * len(taps) + k, slice(g * each, (g + 1) * each), py, px


OPTIONS = {
    "window": (3, 3),
    "strides": 1,
    "padding": 1,
    "kernel_dilation": 1,
    "offset_scale": 1.0,
    "remove_center": False,
}


def dcnv3(x, offset, mask, **options):
    """`dcn_jax.dcnv3`, in float64."""
    x, offset, mask = (np.asarray(a, np.float64) for a in (x, offset, mask))
    height, width, channels = x.shape[-3:]
    y = np.zeros((*mask.shape[:-1], channels))
    for at, image, n, group, py, px in _samples(x, offset, **(OPTIONS | options)):
        y[at][group] += mask[at][n] * read(x[image][..., group], [hat(py, height), hat(px, width)])
    return y


def gradients(cotangent, x, offset, mask, **options):
    """Gradients of Σ cotangent · y with respect to x, offset and mask."""
    options = OPTIONS | options
    cotangent, x, offset, mask = (np.asarray(a, np.float64) for a in (cotangent, x, offset, mask))
    height, width, _ = x.shape[-3:]
    scale = options["offset_scale"]
    d_x, d_offset, d_mask = np.zeros_like(x), np.zeros_like(offset), np.zeros_like(mask)
    for at, image, n, group, py, px in _samples(x, offset, **options):
        features, dy = x[image][..., group], cotangent[at][group]
        weights, slopes = (hat(py, height), hat(px, width)), (hat_slope(py, height), hat_slope(px, width))
        d_mask[at][n] += dy @ read(features, weights)
        d_x[image][..., group] += mask[at][n] * weights[0][:, None, None] * weights[1][None, :, None] * dy
        d_offset[at][2 * n] += mask[at][n] * scale * (dy @ read(features, [weights[0], slopes[1]]))
        d_offset[at][2 * n + 1] += mask[at][n] * scale * (dy @ read(features, [slopes[0], weights[1]]))
    return d_x, d_offset, d_mask


def draw(x, groups, *, seed=0, **options):
    """Random x, offset and mask for an input of shape `x`; offsets within ±2 pixels, off the kinks if the scale is whole."""
    rng, given = np.random.default_rng(seed), OPTIONS | options
    axes = _axes(x[-3:-1], *(given[name] for name in ("window", "strides", "padding", "kernel_dilation")))
    positions = (*x[:-3], *(outputs for *_, outputs in axes))
    weights = groups * (given["window"][0] * given["window"][1] - given["remove_center"])
    offset = rng.integers(-2, 2, (*positions, 2 * weights)) + rng.uniform(0.1, 0.9, (*positions, 2 * weights))
    arrays = rng.standard_normal(x), offset / given["offset_scale"], rng.standard_normal((*positions, weights))
    return tuple(a.astype(np.float32) for a in arrays)


def pack(offset, mask, groups, padding=0):
    """DCNv4's order: for each group its offsets, then its masks; `padding` more channels at the end."""
    positions = mask.shape[:-1]
    each = [a.reshape(*positions, groups, -1) for a in (offset, mask)]
    packed = np.concatenate(each, axis=-1).reshape(*positions, -1)
    return np.concatenate([packed, np.full((*positions, padding), 7.0, packed.dtype)], axis=-1)
