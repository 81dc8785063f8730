"""Keeping kernels local: on a mesh, each device runs a kernel on its own part of the stack and of the batch.

JAX's partitioner cannot look inside a kernel. Left to itself it gathers all operands on every
device. `keep_local` tells it which axes may be split, and adds up over the devices the results that
have no batch axis, such as the gradient of the convolution's kernel.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

from dcn_jax._core.pallas.launch import stack_size


class Pass(NamedTuple):
    """The forward or the backward pass of an op; hashable."""

    run: Callable  # (call, operands) -> results: NamedTuples of arrays with a stack axis
    # The operands and results whose second axis is the batch. None for a TPU's pass, whose compiler takes no partitioning
    # rule (jax issue 38196): the pass runs on one device, or inside `jax.shard_map`.
    batched: frozenset[str] | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def keep_local(which: Pass, call: Any, operands):
    """`which.run(call, operands)`, with stack and batch split over devices as the first operand's are."""
    run = functools.partial(which.run, call)
    if which.batched is None:
        return run(operands)
    stack = stack_size(operands)
    axes_in = _name_axes(operands, stack, which.batched)
    axes_out = _name_axes(jax.eval_shape(run, operands), stack, which.batched)
    no_axes = AbstractMesh((), (), abstract_device=jax.sharding.get_abstract_mesh().abstract_device)

    def partition(mesh, operands, results):
        (operands,) = operands
        over_stack, over_batch, *_ = (*operands[0].sharding.spec, None, None)

        def place(arrays, axes):
            split = {"stack": over_stack, "batch": over_batch}
            specs = {name: NamedSharding(mesh, PartitionSpec(*map(split.get, axes[name]))) for name in axes}
            return arrays._replace(**specs)

        def run_here(operands):
            results = run(operands)
            if over_batch is None:
                return results
            # A result without a batch axis is a sum over the batch. Each device has a part of it.
            whole = [name for name in axes_out if "batch" not in axes_out[name]]
            return results._replace(**{name: lax.psum(getattr(results, name), over_batch) for name in whole})

        local = functools.partial(_run_without_mesh, run_here, tuple(mesh.shape.items()), no_axes)
        return mesh, local, place(results, axes_out), (place(operands, axes_in),)

    factors_in, factors_out = _name_factors(axes_in), _name_factors(axes_out)
    factors = " ".join([*factors_in, *factors_out]).split()
    partitioned = custom_partitioning(run)
    partitioned.def_partition(
        partition,
        sharding_rule=f"{', '.join(factors_in)} -> {', '.join(factors_out)}",
        need_replication_factors=tuple(factor for factor in factors if factor not in ("stack", "batch")),
    )
    return partitioned(operands)


# JAX traces the program of one device under the user's mesh. If that mesh has explicit axes, the
# addition inside `lax.psum` contains a sharding. XLA's GPU compiler then does not recognise it as
# an addition, and ends the process. This primitive traces and lowers the program under a mesh
# without axes instead.
_without_mesh_p = Primitive("without_mesh")
_without_mesh_p.multiple_results = True
_without_mesh_p.def_abstract_eval(lambda *_, jaxpr, no_axes: jaxpr.out_avals)


def _run_without_mesh(run: Callable, axes: tuple[tuple[Any, int], ...], no_axes: AbstractMesh, operands):
    """`run(operands)` on the mesh `no_axes`. `axes` are the names and sizes of the axes that `lax.psum` may name."""
    leaves, tree = jax.tree.flatten(operands)
    types = tree.unflatten([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves])
    with use_abstract_mesh(no_axes):
        jaxpr, results = jax.make_jaxpr(run, axis_env=axes, return_shape=True)(types)
    return jax.tree.unflatten(jax.tree.structure(results), _without_mesh_p.bind(*leaves, jaxpr=jaxpr, no_axes=no_axes))


def _lower_without_mesh(context, *arrays, jaxpr, no_axes):
    context = context.replace(avals_in=jaxpr.in_avals, avals_out=jaxpr.out_avals)
    with use_abstract_mesh(no_axes):
        return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(context, *arrays)


mlir.register_lowering(_without_mesh_p, _lower_without_mesh)


@functools.cache
def holds_kernels() -> Any:
    """A jaxpr that contains a call of `custom_partitioning`, as `keep_local` makes one.

    JAX passes the list of devices to a lowering only if a jaxpr contains such a call. A primitive
    whose lowering makes one must therefore have this jaxpr among its parameters.
    """
    same = custom_partitioning(lambda x: x)
    same.def_partition(lambda *_: None, sharding_rule="i -> i")
    with use_abstract_mesh(AbstractMesh((), ())):
        return jax.make_jaxpr(same)(jax.ShapeDtypeStruct((1,), jnp.float32))


def _name_axes(arrays, stack: int, batched: frozenset[str]) -> dict[str, tuple[str | None, ...]]:
    """For each array, the names of its axes: "stack", "batch", or None for an axis that is never split."""
    axes = {}
    for name, array in arrays._asdict().items():
        if array is not None:
            split = ("stack" if array.shape[0] == stack else None, *(["batch"] if name in batched else []))
            axes[name] = (*split, *[None] * (len(array.shape) - len(split)))
    return axes


def _name_factors(axes: dict[str, tuple[str | None, ...]]) -> list[str]:
    """For each array, its axes in the notation of a sharding rule: "stack kernel1 kernel2"."""
    return [" ".join(axis or f"{name}{i}" for i, axis in enumerate(of_array)) for name, of_array in axes.items()]
