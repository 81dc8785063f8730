"""Where the taps read: computed in XLA, before the GPU kernels, which only gather the rows they are given.

Inside a kernel, each thread that reads a part of a row would compute the row's number again: more
than half of its instructions. XLA computes it once, in a few passes over offset and mask.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core.dtypes import wide
from dcn_jax.geometry import Window, regular_positions, regular_taps
from dcn_jax.sampling import Border, Positions, locate_along


def locate_points(
    window: Window, offset_groups: int, offset: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The row of x at each corner of each point, and the corner's weight times the modulation.

    A corner outside the map gets the row after the last one. Both are `(B, OG * K, corners, P)`, in
    int32 and float32, of offset `(B, *out_spatial, OG * K * n)` and mask `(B, *out_spatial, OG *
    K)`.
    """

    def by_point(array, *rest):  # (B, *out_spatial, OG * K * …) -> (B, OG, K, …, P)
        return jnp.moveaxis(array.reshape(array.shape[0], -1, offset_groups, window.taps, *rest), 1, -1)

    # The kernels want positions last. `sampling.locate` has them first, and its results would have
    # to be transposed, in several passes. So the inputs are transposed here instead.
    offset = by_point(offset.astype(wide(offset.dtype)), window.rank)
    starts = regular_positions(window).reshape(-1, window.rank)  # (P, n)
    regular = regular_taps(window)[:, :, None] + starts.T[None]  # (K, n, P)
    regular = lax.expand_dims(regular, (0, 1))
    axes = [Positions(regular[..., axis, :], offset[..., axis, :]) for axis in range(window.rank)]
    group = lax.broadcasted_iota(jnp.int32, (1, offset_groups, 1, 1), 1) if offset_groups > 1 else None
    scale = None if mask is None else by_point(mask)
    at = locate_along(axes, group, offset_groups, scale, Border(window.spatial, window.padding_mode))

    def by_corner(arrays):  # one (B, OG, K, P) for each corner -> (B, OG * K, corners, P)
        together = jnp.stack(arrays, axis=3)
        return together.reshape(together.shape[0], -1, *together.shape[3:])

    return by_corner(at.row), by_corner(at.weight).astype(jnp.float32)
