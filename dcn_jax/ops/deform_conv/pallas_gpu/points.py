"""What the points of a call read, worked out before the kernels, which gather without knowing where.

XLA makes of it a few passes over offset and mask, and over their gradients. Inside the kernels each
of the threads that read a row would work it out again: it was more than half of what they did.
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
    """The rows of x that points read, the one after the last outside the map, and their weights, modulation included.

    offset `(B, *out_spatial, OG * K * n)`, mask `(B, *out_spatial, OG * K)` -> two of `(B, OG * K, corners, P)`, in int32
    and float32.
    """

    def by_point(array, *rest):  # (B, *out_spatial, OG * K * …) -> (B, OG, K, …, P)
        return jnp.moveaxis(array.reshape(array.shape[0], -1, offset_groups, window.taps, *rest), 1, -1)

    # Positions come last from the start, as the kernels read them: `sampling.locate`, which has them first, would take
    # several transposing passes.
    offset = by_point(offset.astype(wide(offset.dtype)), window.rank)
    starts = regular_positions(window).reshape(-1, window.rank)  # (P, n)
    regular = regular_taps(window)[:, :, None] + starts.T[None]  # (K, n, P)
    regular = lax.expand_dims(regular, (0, 1))
    axes = [Positions(regular[..., axis, :], offset[..., axis, :]) for axis in range(window.rank)]
    group = lax.broadcasted_iota(jnp.int32, (1, offset_groups, 1, 1), 1) if offset_groups > 1 else None
    scale = None if mask is None else by_point(mask)
    at = locate_along(axes, group, offset_groups, scale, Border(window.spatial, window.padding_mode))

    def by_corner(arrays):  # of (B, OG, K, P)
        together = jnp.stack(arrays, axis=3)
        return together.reshape(together.shape[0], -1, *together.shape[3:])

    return by_corner(at.row), by_corner(at.weight).astype(jnp.float32)
