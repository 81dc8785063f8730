"""Grids of affine maps for `grid_sample`, with the numbers of `torch.nn.functional.affine_grid`."""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core import checks, dtypes
from dcn_jax._core.mesh import on_any_mesh
from dcn_jax.geometry import Size, int32


def affine_grid(theta: jax.Array, spatial: Sequence[int], *, align_corners: bool = False) -> jax.Array:
    """The grid that makes `grid_sample` read a map through an affine transform.

        grid(p) = theta · (x, y[, z], 1)

    for each pixel p of the result, whose normalised position (x, y[, z]) lies in [-1, 1], the last
    spatial axis first: ±1 are the centres of the outermost pixels with align_corners, and the edges
    of the map without. So theta takes positions in the result to positions in the map that is read;
    the identity is `jnp.eye(n, n + 1)`. Differentiable to any order.

    | torch | here |
    |---|---|
    | `affine_grid(theta, (N, C, H, W))` | `affine_grid(theta, (H, W))`; the batch is theta's |

    Args:
        theta: `(*batch, n, n + 1)` for n = 1, 2 or 3 spatial axes: rows and columns in the order x,
            y, z, and then the shift; any number of batch axes, none included; any float dtype.
        spatial: the n sizes of the result, (H, W) for n = 2; they may be symbolic.
        align_corners: what -1 and 1 stand for; the same as in `grid_sample`. With it, an axis of
            one pixel lies at 0.

    Returns:
        `(*batch, *spatial, n)`, in float32 or the dtype of `theta` if that is wider.

    Raises:
        ValueError: the shape of `theta` does not fit, or `spatial` does not fit it.
        TypeError: an argument is of the wrong kind.

    Source: Jaderberg et al., Spatial Transformer Networks (arXiv 1506.02025), equation 1;
    torch.nn.functional.affine_grid.

    Example:
        >>> import jax.numpy as jnp
        >>> from dcn_jax import grid_sample
        >>> image = jnp.arange(6.0).reshape(2, 3, 1)
        >>> half_turn = jnp.array([[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
        >>> grid_sample(image, affine_grid(half_turn, (2, 3)))[..., 0]
        Array([[5., 4., 3.],
               [2., 1., 0.]], dtype=float32)
    """
    theta = checks.array("theta", theta, jnp.floating)
    rank = theta.shape[-2] if theta.ndim > 1 else 0
    if rank not in (1, 2, 3) or theta.shape[-1] != rank + 1:
        raise ValueError(f"theta has shape {theta.shape}; wanted (*batch, n, n + 1) with n = 1, 2 or 3 spatial axes")
    if isinstance(spatial, Sequence) and len(spatial) == rank + 2:
        raise ValueError(
            f"spatial={spatial!r} has {rank + 2} entries, as torch's size (N, C, …) has; wanted the {rank} sizes of "
            "the spatial axes alone, because the batch is that of theta"
        )
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners={align_corners!r} is a {type(align_corners).__name__}; wanted True or False")
    spec = _Spec(checks.sizes("spatial", spatial, rank), align_corners)
    return on_any_mesh(_make_grid, spec, (theta,), batched=(theta,), batch=theta.ndim - 2, whole=rank + 1)(theta)


class _Spec(NamedTuple):
    """Everything about a call except its array."""

    spatial: tuple[Size, ...]
    align_corners: bool


def _make_grid(spec: _Spec, theta: jax.Array) -> jax.Array:
    """The grid of checked arguments."""
    theta = theta.astype(dtypes.wide(theta.dtype))
    rank, batch = len(spec.spatial), theta.shape[:-2]
    # (*batch, 1, …, n, n + 1): an axis for each spatial one. Column by column, not as a matrix product,
    # whose precision users may have lowered.
    theta = theta.reshape(*batch, *[1] * rank, rank, rank + 1)
    columns = [theta[..., column] for column in range(rank + 1)]
    shape = (*[1] * len(batch), *spec.spatial, 1)
    places = (_positions(spec, axis, shape, theta.dtype) for axis in reversed(range(rank)))  # x first
    moved = [column * place for column, place in zip(columns[:-1], places, strict=True)]
    return functools.reduce(operator.add, moved) + columns[-1]  # (*batch, *spatial, n)


def _positions(spec: _Spec, axis: int, shape: tuple[Size, ...], dtype: jnp.dtype) -> jax.Array:
    """The normalised positions of pixels along a spatial axis, in an array of `shape`."""
    size = int32(spec.spatial[axis])
    pixel = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1 - len(spec.spatial) + axis)
    if spec.align_corners:
        # A map of one pixel has its centre at 0.
        return (2 * pixel - (size - 1)).astype(dtype) / jnp.maximum(size - 1, 1).astype(dtype)
    return (2 * pixel + 1 - size).astype(dtype) / jnp.asarray(size, dtype)
