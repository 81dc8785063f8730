"""Meshes of devices: what an op does on one is left to the partitioner."""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec


def on_any_mesh(
    compute: Callable, arrays: Sequence[jax.Array | None], *, batched: Sequence[jax.Array], batch: int, whole: int
) -> jax.Array:
    """`compute(*arrays)` on a mesh of any kind, those whose shardings are part of the types included.

    The result has `batch` axes, which lie as those of `batched` do, and then `whole` axes, which are not split.
    """
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        specs = [jax.typeof(array).sharding.spec[:batch] for array in batched]
        over = [next((axis for axis in axes if axis is not None), None) for axes in zip(*specs, strict=True)]
        compute = jax.sharding.auto_axes(compute, out_sharding=PartitionSpec(*over, *[None] * whole))
    return compute(*arrays)
