"""Refusing forward mode with an error that names the cure.

Forward mode that meets a `custom_vjp` raises an error that names neither the op nor a way out. So
what enters one passes through an identity first: its derivative is a primitive that transposes to
the identity, and refuses to be computed.
"""

import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def reverse_only(x: jax.Array, implementation: str) -> jax.Array:
    """x, differentiable in reverse mode alone."""
    del implementation
    return x


@reverse_only.defjvp
def _(implementation, primals, tangents):
    return reverse_only(primals[0], implementation), _refuse_p.bind(tangents[0], implementation=implementation)


def _refuse(*_, implementation):
    raise NotImplementedError(
        f"implementation={implementation!r} is differentiated in reverse mode (jax.grad, jax.vjp) and not in forward mode "
        "(jax.jvp, jax.jacfwd, jax.linearize, jax.hessian); use implementation='xla', which is differentiable in both"
    )


_refuse_p = Primitive("pallas_forward_mode")
_refuse_p.def_impl(_refuse)
_refuse_p.def_abstract_eval(lambda x, *, implementation: x)
mlir.register_lowering(_refuse_p, _refuse)
batching.defvectorized(_refuse_p)
ad.deflinear2(_refuse_p, lambda ct, _, *, implementation: [ct])
