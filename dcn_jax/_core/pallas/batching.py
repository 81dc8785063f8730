"""`jax.vmap` of kernels: what it maps over becomes a stack, which one launch goes through."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from dcn_jax._core.pallas.partitioning import Pass, keep_local


def run_pass(direction: Pass, plan: Any, operands):
    """Run a pass on operands without a stack axis: a stack of one, or of what `jax.vmap` maps over."""
    call = custom_vmap(functools.partial(keep_local, direction, plan))

    @call.def_vmap
    def _(size, mapped, operands):
        (mapped,) = mapped
        stack = max(jax.tree.leaves(jax.tree.map(lambda a, m: a.shape[1 if m else 0], operands, mapped)))

        def fold(a, mapped):
            if not mapped and a.shape[0] == 1:
                return a  # one for the whole stack
            a = a if mapped else a[None]
            return jnp.broadcast_to(a, (size, stack, *a.shape[2:])).reshape(size * stack, *a.shape[2:])

        results = call(jax.tree.map(fold, operands, mapped))
        unfolded = jax.tree.map(lambda a: a.reshape(size, stack, *a.shape[1:]), results)
        return unfolded, jax.tree.map(lambda _: True, results)

    return jax.tree.map(lambda a: a[0], call(jax.tree.map(lambda a: a[None], operands)))
