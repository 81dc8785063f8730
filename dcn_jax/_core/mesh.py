"""Meshes of devices: how an op is placed on one is left to the partitioner."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec


def on_any_mesh(compute: Callable, *, batched: Sequence[jax.Array], batch: int, whole: int) -> Callable:
    """`compute`, a function of arrays, so that it runs on a mesh of any kind, one with explicit axes included.

    Its result has `batch` axes, which are sharded as those of `batched` are, and then `whole` axes, which are not sharded.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return compute
    specs = [jax.typeof(array).sharding.spec[:batch] for array in batched]
    over = [next((axis for axis in axes if axis is not None), None) for axes in zip(*specs, strict=True)]
    return jax.sharding.auto_axes(compute, out_sharding=PartitionSpec(*over, *[None] * whole))


def zeros_varying_like(arrays: Any, dtype: Any, shape: Sequence[Any]) -> jax.Array:
    """Zeros to add to. Within `shard_map` they vary over the devices that any of `arrays` varies over, as the sum will."""
    zeros = [jnp.zeros_like(array, dtype, shape) for array in jax.tree.leaves(arrays)]
    return functools.reduce(operator.add, zeros)


def vary_alike(arrays: Any) -> Any:
    """Inside `shard_map`, arrays that all vary over the same mesh axes; JAX sums their gradients over the added ones."""
    axes = frozenset().union(*(jax.typeof(a).mat.varying for a in jax.tree.leaves(arrays)))
    return jax.tree.map(lambda a: jax.lax.pcast(a, tuple(axes - jax.typeof(a).mat.varying), to="varying"), arrays)
