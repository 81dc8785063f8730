"""Atomic adds with relaxed memory order: an add does not order the program's other memory accesses.

That is enough for a sum that is read only after its kernel has ended. Pallas's own atomic add
acquires and releases: it puts a memory barrier before each add, and empties the first-level cache
after it. Here the same primitive is lowered as Pallas lowers it, and then set to relaxed. This
needs private parts of Pallas, as asm.py does. If one is missing, Pallas's own add is used.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton
from jax.extend.core import Primitive

try:
    from jax._src.lib.triton import dialect
    from jax._src.pallas.triton.lowering import triton_lowering_rules
    from jax._src.pallas.triton.primitives import AtomicOpType, atomic_rmw_p
    from jax._src.state.primitives import get_ref_and_transforms
    from jaxlib.mlir import ir

    _RELAXED = int(dialect.MemSemantic.RELAXED)
    _OPTIONS = {"atomic_type": AtomicOpType.ADD}
    _abstract_eval, _lower = atomic_rmw_p.abstract_eval, triton_lowering_rules[atomic_rmw_p]
except (ImportError, AttributeError, KeyError):

    def _add(ref, index, value, *, mask):
        triton.atomic_add(ref, index, value, mask=mask)

else:
    _add_p = Primitive("relaxed_atomic_add")
    _add_p.def_effectful_abstract_eval(lambda *avals, tree: _abstract_eval(*avals, args_tree=tree, **_OPTIONS))

    def _lower_relaxed(context, *operands, tree):
        before = _lower(context, *operands, args_tree=tree, **_OPTIONS)
        before.owner.attributes["sem"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), _RELAXED)
        return before

    triton_lowering_rules[_add_p] = _lower_relaxed

    def _add(ref, index, value, *, mask):
        operands, tree = jax.tree.flatten((*get_ref_and_transforms(ref, index, "add"), value, mask))
        _add_p.bind(*operands, tree=tree)


def add(ref, index: tuple[jax.Array, ...], value: jax.Array, mask: jax.Array | None) -> None:
    """Add to elements that other programs may add to too, where `mask` is True (None: everywhere). On a GPU alone."""
    _add(ref, index, value, mask=None if mask is None else jnp.broadcast_to(mask, value.shape))
