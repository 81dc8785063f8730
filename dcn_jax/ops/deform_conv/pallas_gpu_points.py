"""What the points of a call read, worked out before the kernels, which gather without knowing where.

XLA makes of it one pass over offset and mask, and of its derivative another. Inside the kernels each
of the threads that read a row would work it out again: it was more than half of what they did.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax.geometry import Window, int32, regular_positions, regular_taps
from dcn_jax.sampling import Border, Positions, corners


def locate_points(
    window: Window, offset_groups: int, offset: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The rows of x that points read, the one after the last outside the map, and their weights, modulation included.

    offset `(B, *out_spatial, OG * K * n)`, mask `(B, *out_spatial, OG * K)` -> two of `(B, OG * K, corners, P)`.
    """
    images, groups, rank = offset.shape[0], offset_groups * window.taps, window.rank
    points = jnp.moveaxis(offset.reshape(images, -1, groups, rank).astype(jnp.float32), 1, -1)  # (B, OG * K, n, P)
    starts = regular_positions(window).reshape(-1, rank).T  # (n, P)
    reach = jnp.tile(regular_taps(window), (offset_groups, 1))  # (OG * K, n)
    axes = [Positions(reach[:, axis, None] + starts[axis], points[:, :, axis]) for axis in range(rank)]
    scale = None if mask is None else jnp.moveaxis(mask.reshape(images, -1, groups).astype(jnp.float32), 1, -1)
    offset_group = lax.broadcasted_iota(jnp.int32, (groups, 1), 0) // window.taps
    pixels = math.prod(window.spatial)
    rows, weights = [], []
    for pixel, weight, read in corners(axes, Border(window.spatial, window.padding_mode)):
        index = pixel[0]
        for size, along in zip(window.spatial[1:], pixel[1:], strict=True):
            index = index * int32(size) + along
        rows.append(jnp.where(read, index * offset_groups + offset_group, pixels * offset_groups))
        weights.append(weight if scale is None else weight * scale)
    return jnp.stack(rows, axis=2), jnp.stack(weights, axis=2)
