"""Keeping kernels local: each device runs them on its part of the stack and of the batch.

Left to itself the partitioner, which knows nothing of a kernel, gathers all that goes in on every
device.
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
    """One direction of an op; hashable."""

    run: Callable  # (plan, operands) -> results, both NamedTuples of stacked arrays (or None)
    # The operands and results whose second axis is the batch, by name; None leaves it to `shard_map`, for a TPU's compiler
    # asks nobody how to partition (jax issue 38196).
    batched: frozenset[str] | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def keep_local(direction: Pass, plan: Any, operands):
    """`direction.run(plan, operands)`, where the first operand's stack and batch lie."""
    run = functools.partial(direction.run, plan)
    if direction.batched is None:
        return run(operands)
    stack = stack_size(operands)
    axes_in = _name_axes(operands, stack, direction.batched)
    axes_out = _name_axes(jax.eval_shape(run, operands), stack, direction.batched)
    apart = AbstractMesh((), (), abstract_device=jax.sharding.get_abstract_mesh().abstract_device)

    def partition(mesh, operands, results):
        (operands,) = operands
        over_stack, over_batch, *_ = (*operands[0].sharding.spec, None, None)

        def place(arrays, axes):
            split = {"stack": over_stack, "batch": over_batch}
            specs = {name: PartitionSpec(*map(split.get, axes[name])) for name in axes}
            return arrays._replace(**{name: NamedSharding(mesh, spec) for name, spec in specs.items()})

        def run_here(operands):
            results = run(operands)
            if over_batch is None:
                return results
            # Each device has summed over its part of the batch what has no batch axis.
            whole = [name for name in axes_out if "batch" not in axes_out[name]]
            return results._replace(**{name: lax.psum(getattr(results, name), over_batch) for name in whole})

        run_apart = functools.partial(_run_apart, run_here, tuple(mesh.shape.items()), apart)
        return mesh, run_apart, place(results, axes_out), (place(operands, axes_in),)

    factors_in, factors_out = _name_factors(axes_in), _name_factors(axes_out)
    factors = " ".join([*factors_in, *factors_out]).split()
    call = custom_partitioning(run)
    call.def_partition(
        partition,
        sharding_rule=f"{', '.join(factors_in)} -> {', '.join(factors_out)}",
        need_replication_factors=tuple(factor for factor in factors if factor not in ("stack", "batch")),
    )
    return call(operands)


# What a device runs is a program of its own. But JAX makes it within the mesh that is set where it compiles; and where
# shardings are in the types there, the function that a sum over devices adds with holds one too, is no addition to XLA's
# compiler for GPUs, and ends the process. So it is traced and lowered apart from that mesh, as this primitive.
_apart_p = Primitive("apart")
_apart_p.multiple_results = True
_apart_p.def_abstract_eval(lambda *_, jaxpr, apart: jaxpr.out_avals)


def _run_apart(run: Callable, axes: tuple[tuple[Any, int], ...], apart: AbstractMesh, operands):
    """`run(operands)` on a mesh of no axes; `axes` are the names, with their sizes, that it may sum over."""
    leaves, tree = jax.tree.flatten(operands)
    types = tree.unflatten([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves])
    with use_abstract_mesh(apart):
        jaxpr, results = jax.make_jaxpr(run, axis_env=axes, return_shape=True)(types)
    return jax.tree.unflatten(jax.tree.structure(results), _apart_p.bind(*leaves, jaxpr=jaxpr, apart=apart))


def _lower_apart(context, *arrays, jaxpr, apart):
    context = context.replace(avals_in=jaxpr.in_avals, avals_out=jaxpr.out_avals)
    with use_abstract_mesh(apart):
        return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(context, *arrays)


mlir.register_lowering(_apart_p, _lower_apart)


@functools.cache
def holds_kernels() -> Any:
    """A jaxpr with a call of the kind that `keep_local` makes.

    JAX tells a lowering which devices it is for only where it sees such a call in a jaxpr. A primitive whose lowering
    makes one has this one among its parameters.
    """
    call = custom_partitioning(lambda x: x)
    call.def_partition(lambda *_: None, sharding_rule="i -> i")
    with use_abstract_mesh(AbstractMesh((), ())):
        return jax.make_jaxpr(call)(jax.ShapeDtypeStruct((1,), jnp.float32))


def _name_axes(arrays, stack: int, batched: frozenset[str]) -> dict[str, tuple[str | None, ...]]:
    """The axes of each array: "stack", "batch", and None for those that are never split."""
    axes = {}
    for name, array in arrays._asdict().items():
        if array is not None:
            split = ("stack" if array.shape[0] == stack else None, *(["batch"] if name in batched else []))
            axes[name] = (*split, *[None] * (len(array.shape) - len(split)))
    return axes


def _name_factors(axes: dict[str, tuple[str | None, ...]]) -> list[str]:
    """The axes of each array for the sharding rule: "stack kernel1 kernel2"."""
    return [" ".join(axis or f"{name}{i}" for i, axis in enumerate(of_array)) for name, of_array in axes.items()]


def zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Zeros to add into, in float32, that vary over mesh axes as `like` does."""
    return lax.pcast(jnp.zeros(shape, jnp.float32), tuple(jax.typeof(like).mat.varying), to="varying")
