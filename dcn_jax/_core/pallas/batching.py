"""`jax.vmap` of kernels: the mapped axis becomes the arrays' stack axis, and one launch runs all its members."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from dcn_jax._core.pallas.partitioning import Pass, keep_local


def run_pass(which: Pass, call: Any, operands):
    """Run a pass on arrays without a stack axis. Each `jax.vmap` around it multiplies the size of one stack axis."""
    on_stack = custom_vmap(functools.partial(keep_local, which, call))

    @on_stack.def_vmap
    def map_stack(members, mapped, operands):
        (mapped,) = mapped
        stack = max(jax.tree.leaves(jax.tree.map(lambda a, m: a.shape[1 if m else 0], operands, mapped)))
        launched = max(members, 1)  # a kernel takes no empty array: where there are no members, one is made and dropped

        def fold(a, mapped):
            if not mapped and a.shape[0] == 1:
                return a  # shared by all members of the stack
            a = a if mapped else a[None]
            a = jnp.zeros((1, *a.shape[1:]), a.dtype) if mapped and not members else a
            return jnp.broadcast_to(a, (launched, stack, *a.shape[2:])).reshape(launched * stack, *a.shape[2:])

        results = on_stack(jax.tree.map(fold, operands, mapped))
        unfolded = jax.tree.map(lambda a: a.reshape(launched, stack, *a.shape[1:])[:members], results)
        return unfolded, jax.tree.map(lambda _: True, results)

    return jax.tree.map(lambda a: a[0], on_stack(jax.tree.map(lambda a: a[None], operands)))
