"""Reading a map at normalised positions, with the numbers of `torch.nn.functional.grid_sample`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dcn_jax._core import checks, dtypes
from dcn_jax._core.mesh import on_any_mesh
from dcn_jax.geometry import canonical_padding_mode
from dcn_jax.ops.weighted_reads import Level, Operands, sum_readings
from dcn_jax.sampling import Border

METHODS = ("linear", "nearest", "cubic")
_CURES = {"bilinear": ' (torch\'s "bilinear" is "linear")', "bicubic": ' (torch\'s "bicubic" is "cubic")'}


def grid_sample(
    features: jax.Array,
    grid: jax.Array,
    *,
    method: str = "linear",
    padding_mode: str | Sequence[str] = "zeros",
    align_corners: bool = False,
) -> jax.Array:
    """Read maps at normalised positions by linear or cubic interpolation, as torch's `grid_sample` does.

        out(q) = features at the pixel   (g + 1) / 2 · (size - 1)     with align_corners
                                         ((g + 1) · size - 1) / 2     without

    for each coordinate g of grid(q), and the size of the map along its axis: ±1 are the centres of
    the outermost pixels with align_corners, and the edges of the map without. Between pixels and
    beyond the border features are read as by `linear_sample`.

    Differentiable in both arguments to any order, in forward and reverse mode. At whole pixels the
    derivative with respect to the grid is the right-hand one (torch takes 0 where "border" and
    "reflection" clip). A coordinate of ±inf or 1e30 reads zero (with "edge" the border), and has a
    zero gradient itself. A NaN makes NaN at its own query alone.

    | torch | here |
    |---|---|
    | input (N, C, H, W), grid (N, Ho, Wo, 2) | features (N, H, W, C), grid (N, Ho, Wo, 2): only the channels move |
    | mode="bilinear", "nearest", "bicubic" | method="linear", "nearest", "cubic" |
    | padding_mode="zeros", "border" | padding_mode="zeros", "edge" |
    | padding_mode="reflection" | padding_mode="reflect" with align_corners=True, "symmetric" without |

    Args:
        features: `(*batch, *spatial, C)`, channels last, of n = 1, 2 or 3 spatial axes (`grid`
            says which); any number of batch axes, none included; floating-point or complex.
        grid: `(*batch, *query, n)`, with the same batch axes, which do not broadcast, and any
            query axes; inside the map from -1 to 1. The last axis is ordered as torch's, the last
            spatial axis first: (x,), (x, y), (x, y, z). Any float dtype; pixels are computed in
            float32 or wider.
        method: "linear"; "nearest" for the nearest pixel along each axis, at a tie the even one
            (no gradient for `grid`); or "cubic" for cubic convolution with a = -0.75, which reads
            4^n pixels: the two below and the two above along each axis, each of which
            `padding_mode` brings into the map by itself (torch has it for n = 2 only).
        padding_mode: "zeros", "edge", "wrap", "reflect" or "symmetric" (`linear_sample`); one for
            all axes, or one per spatial axis, in the order of `features`.
        align_corners: what -1 and 1 stand for, as in the formula.

    Returns:
        `(*batch, *query, C)`, in the dtype of `features`.

    Raises:
        ValueError: a shape or an option does not fit, or is torch's; the message names it and says
            what to write.
        TypeError: an argument is of the wrong kind.

    Source: Jaderberg et al., Spatial Transformer Networks (arXiv 1506.02025); Keys, Cubic
    Convolution Interpolation (IEEE TASSP 29, 1981); torch.nn.functional.grid_sample.

    Example:
        >>> import jax.numpy as jnp
        >>> image = jnp.arange(12.0).reshape(3, 4, 1)
        >>> corners = jnp.array([[-1.0, -1.0], [1.0, -1.0], [0.0, 0.0]])  # (x, y)
        >>> grid_sample(image, corners, align_corners=True)[:, 0]
        Array([0. , 3. , 5.5], dtype=float32)
        >>> grid_sample(image, corners)[:, 0]
        Array([0.  , 0.75, 5.5 ], dtype=float32)
    """
    spec, features, grid = _check_sampling(features, grid, method, padding_mode, align_corners)
    batch = features.ndim - len(spec.border.spatial) - 1
    arrays = features, grid
    return on_any_mesh(_sample_flat, spec, arrays, batched=arrays, batch=batch, whole=grid.ndim - batch)(*arrays)


class _Spec(NamedTuple):
    """Everything about a call except its arrays."""

    border: Border
    method: str
    align_corners: bool


def _check_sampling(features, grid, method, padding_mode, align_corners) -> tuple[_Spec, jax.Array, jax.Array]:
    features = checks.array("features", features, jnp.inexact)
    grid = checks.array("grid", grid, jnp.floating)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; wanted one of {METHODS}{_CURES.get(method, '')}")
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners={align_corners!r} is a {type(align_corners).__name__}; wanted True or False")
    rank = grid.shape[-1] if grid.ndim else 0
    if rank not in (1, 2, 3):
        problem = f"grid has shape {grid.shape}; wanted (*batch, *query, n) with n = 1, 2 or 3 coordinates, x first"
        if any(grid.ndim > n and grid.shape[-n - 1] == n for n in (2, 3)):
            problem += "; it looks channels-first: move its axis of coordinates last"
        raise ValueError(problem)
    batch, spatial = features.shape[: -rank - 1], features.shape[-rank - 1 : -1]
    if features.ndim < rank + 1 or 0 in spatial:
        raise ValueError(
            f"features has shape {features.shape}; wanted (*batch, *spatial, C), channels last, with {rank} spatial axes, as "
            f"many as grid, whose shape is {grid.shape}, has coordinates, none of them empty"
        )
    if grid.ndim < len(batch) + 1 or grid.shape[: len(batch)] != batch:
        raise ValueError(
            f"grid has shape {grid.shape}; wanted (*batch, *query, {rank}) with the batch axes of features, {batch}: features "
            f"has shape {features.shape}, that is (*batch, *spatial, C), channels last, with {rank} spatial axes. One grid for "
            "all images: jnp.broadcast_to(grid, (*batch, *query, n)), or jax.vmap with in_axes=(0, None)"
        )
    border = Border(spatial, canonical_padding_mode(padding_mode, rank))
    return _Spec(border, method, align_corners), features, grid


def _sample_flat(spec: _Spec, features: jax.Array, grid: jax.Array) -> jax.Array:
    """The op, computed with one batch axis and one axis of queries."""
    spatial, channels, dtype = spec.border.spatial, features.shape[-1], features.dtype
    batch = features.shape[: -len(spatial) - 1]
    query = grid.shape[len(batch) : -1]
    # The sum's gradients have the dtype of its operands, so these are widened before it.
    position = dtypes.wide(grid.dtype, jnp.finfo(dtype).dtype)
    rows = features.reshape(math.prod(batch), math.prod(spatial), channels)
    points = grid.reshape(math.prod(batch), math.prod(query), 1, len(spatial)).astype(position)
    level = Level(spec.border, spec.method, _from_centres if spec.align_corners else _from_edges, 0, 0, 1)
    y = sum_readings((level,), Operands(rows.astype(dtypes.wide(dtype, grid.dtype)), points, None))
    return y.reshape(*batch, *query, channels).astype(dtype)


def _from_centres(position: jax.Array, size: jax.Array) -> jax.Array:
    """Pixels of positions that are -1 and 1 at the centres of the outermost pixels."""
    # For a map of one pixel, ±inf · 0 would be NaN.
    return jnp.where(jnp.isinf(position), position, (position + 1) / 2 * (size - 1))


def _from_edges(position: jax.Array, size: jax.Array) -> jax.Array:
    """Pixels of positions that are -1 and 1 at the edges of the map."""
    return ((position + 1) * size - 1) / 2
