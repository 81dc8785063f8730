"""RoI pooling in plain NumPy loops and float64, with its gradients: slow, and meant to be obviously right."""

import numpy as np


def along(position, size):
    """(which pixels of an axis count how much, the right-hand derivative of that) at `position`."""
    share, slope = np.zeros(size), np.zeros(size)
    if not -1 <= position <= size:
        return share, slope
    below = int(np.floor(min(max(position, 0), size - 1)))
    above, fraction = min(below + 1, size - 1), min(max(position, 0), size - 1) - below
    share[below] += 1 - fraction
    share[above] += fraction
    if 0 <= position < size - 1:
        slope[below], slope[above] = -1, 1
    return share, slope


def pool(
    x, rois, offset=None, mask=None, cotangent=None, *, output_size, spatial_scale=1.0, sampling_ratio=2, gamma=0.1, aligned=True
):  # fmt: skip
    """The result `(R, ph, pw, C)`, and with a cotangent the gradients of x, rois, offset and mask."""
    x, rois = np.asarray(x, np.float64), np.asarray(rois, np.float64)
    bins = (len(rois), *output_size)
    offset = np.zeros((*bins, 2)) if offset is None else np.asarray(offset, np.float64)
    mask = np.ones(bins) if mask is None else np.asarray(mask, np.float64)
    cotangent = np.zeros((*bins, x.shape[-1])) if cotangent is None else np.asarray(cotangent, np.float64)
    y, (d_x, d_rois, d_offset, d_mask) = np.zeros((*bins, x.shape[-1])), map(np.zeros_like, (x, rois, offset, mask))
    samples = [(s, t) for s in range(sampling_ratio) for t in range(sampling_ratio)]
    for r, *bin in np.ndindex(bins):
        image, bar = int(rois[r, 0]), cotangent[(r, *bin)]
        if not 0 <= image < len(x):
            continue
        for sample in samples:
            shares, slopes, moves = [], [], []
            for a in (0, 1):  # height, width
                start, end = rois[r, 2 - a] * spatial_scale, rois[r, 4 - a] * spatial_scale
                part = (bin[a] + (sample[a] + 0.5) / sampling_ratio) / output_size[a]  # of the box, up to the sample
                part += gamma * offset[(r, *bin, a)]
                length = end - start if aligned else max(end - start, 1)
                share, slope = along(start - 0.5 * aligned + part * length, x.shape[1 + a])
                shares.append(share)
                slopes.append(slope)
                grows = spatial_scale if aligned or end - start >= 1 else 0  # the length with the box's end
                moves.append((spatial_scale - part * grows, part * grows, gamma * length))  # with start, end and offset
            weight = mask[(r, *bin)] / len(samples)
            read = np.einsum("h,w,hwc->c", *shares, x[image])
            y[(r, *bin)] += weight * read
            d_mask[(r, *bin)] += bar @ read / len(samples)
            d_x[image] += weight * np.einsum("h,w,c->hwc", *shares, bar)
            for a in (0, 1):
                factors = (slopes[0], shares[1]) if a == 0 else (shares[0], slopes[1])
                d_position = weight * np.einsum("h,w,hwc,c->", *factors, x[image], bar)
                for into, move in zip(
                    (d_rois[r, 2 - a :], d_rois[r, 4 - a :], d_offset[(r, *bin)][a:]), moves[a], strict=True
                ):
                    into[0] += d_position * move
    return y, (d_x, d_rois, d_offset, d_mask)


def draw(shape=(2, 6, 7, 3), boxes=6, output_size=(3, 4), seed=0, dtype=np.float64):
    """A map, boxes inside and outside of it, offsets and a mask."""
    rng = np.random.default_rng(seed)
    size = np.array(shape[2:0:-1])  # (x, y)
    start = rng.uniform(-0.2, 0.7, (boxes, 2)) * size
    end = start + rng.uniform(0.2, 0.8, (boxes, 2)) * size
    rois = np.concatenate([rng.integers(0, shape[0], (boxes, 1)), start, end], axis=1)
    bins = (boxes, *output_size)
    arrays = rng.standard_normal(shape), rois, rng.standard_normal((*bins, 2)), rng.uniform(size=bins)
    return tuple(array.astype(dtype) for array in arrays)
