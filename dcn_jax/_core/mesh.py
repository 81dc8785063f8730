"""Meshes of devices: how an op is placed on one is left to the partitioner."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def on_any_mesh(
    compute: Callable,
    spec: Any,
    arrays: Sequence[jax.Array | None],
    *,
    batched: Sequence[jax.Array],
    batch: int,
    whole: int,
) -> Callable:
    """`compute(spec, *arrays)` as a function of the arrays, which may lie on a mesh of any kind.

    On a mesh with explicit axes shardings are part of the types, and most functions of JAX would ask how their result is
    to be sharded. So `compute` runs with these axes made automatic. Its result has `batch` axes, which are sharded as those
    of `batched` are, and then `whole` axes, which are not sharded. `compute` and `spec` are to be hashable.
    """
    context = jax.sharding.get_abstract_mesh()
    meshes = [context, *(jax.typeof(array).sharding.mesh for array in arrays if array is not None)]
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return functools.partial(compute, spec)
    specs = [jax.typeof(array).sharding.spec[:batch] for array in batched]
    over: list[Any] = []
    for axes in zip(
        *specs, strict=True
    ):  # the first mesh axis of any array that splits no other axis of the result yet
        over.append(next((axis for axis in axes if axis is not None and axis not in over), None))
    out = NamedSharding(mesh, PartitionSpec(*over, *[None] * whole))
    # With no mesh in the context, arrays of one device have to move to the mesh of the others, and only jit does that.
    return functools.partial(_on_mesh if mesh is context else _jitted_on_mesh, compute, spec, out)


def _on_mesh(compute: Callable, spec: Any, out: NamedSharding, *arrays: jax.Array | None) -> Any:
    def place(array):  # on the explicit mesh before `auto_axes`: without this its gradient would have automatic axes
        return jax.sharding.reshard(array, NamedSharding(out.mesh, jax.typeof(array).sharding.spec))

    auto = jax.sharding.auto_axes(functools.partial(compute, spec), out_sharding=out)
    return auto(*jax.tree.map(place, arrays))


_jitted_on_mesh = jax.jit(_on_mesh, static_argnums=(0, 1, 2))


def zeros_varying_like(arrays: Any, dtype: Any, shape: Sequence[Any]) -> jax.Array:
    """Zeros to add to. Within `shard_map` they vary over the devices that any of `arrays` varies over, as the sum will."""
    return lax.pcast(jnp.zeros(shape, dtype), tuple(_varying(arrays)), to="varying")


def vary_alike(arrays: Any) -> Any:
    """`arrays`, which within `shard_map` then all vary over the same mesh axes, as the results of kernels do."""
    axes = _varying(arrays)
    return jax.tree.map(lambda a: lax.pcast(a, tuple(axes - _varying(a)), to="varying"), arrays)


def _varying(arrays: Any) -> frozenset:
    """The mesh axes over which any of `arrays` varies."""
    return frozenset().union(*(jax.typeof(array).mat.varying for array in jax.tree.leaves(arrays)))
