"""A computation that is cut to suit the platform, and traced for that platform alone.

`lax.platform_dependent` traces, differentiates and transposes a branch for each platform, long before it is known which
of them will be compiled. Here a call is one primitive, its derivatives are calls of it again, and what they compute is
traced when they are lowered, for the platform that they are lowered for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir

Parts = tuple[tuple[str, Any], ...]  # platform by platform; "default" is any that is not named


class Computation(NamedTuple):
    """A function of several arrays to one, cut into parts, and its gradients."""

    compute: Callable  # (parts, *arrays) -> array
    gradients: Callable  # (parts, active, cotangent, *arrays) -> those of the arrays whose numbers are active
    result_type: Callable  # (*arrays) -> an array of the type of the result
    parts: tuple[Parts, ...]  # of the result, of its derivative, …; the last are those of all that follow
    # Whether the gradients of a map are these, mapped, and then added up for an array that serves all. Else JAX finds them,
    # and adds as it goes.
    gradients_of_maps: bool = False
    holds: Any = None  # a jaxpr with what its lowering may hold, where JAX looks whether that has to know its devices

    def __call__(self, parts: Any, arrays: Sequence[Any]) -> list[Any]:
        return [self.compute(parts, *arrays)]


def by_platform(computation: Computation, *arrays: jax.Array) -> jax.Array:
    """The result of a computation; it is differentiated, to any order, and mapped like any function of JAX."""
    call = _Call(
        of=computation,
        parts=computation.parts,
        holds=computation.holds,
        results=tuple(jax.make_jaxpr(computation.result_type)(*arrays).out_avals),
        matmul_precision=jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
        x64=jax.config.jax_enable_x64,  # pyright: ignore[reportAttributeAccessIssue]
    )
    return _bind(call, *arrays)[0]


class _Call(NamedTuple):
    """What is known of a call beside its arrays."""

    of: Callable  # (parts, arrays) -> arrays
    parts: tuple[Parts, ...]  # of this, of its derivative, …
    holds: Any
    results: tuple[Any, ...]  # their types
    matmul_precision: str | None  # as set where the call is made; where it is lowered they may be others
    x64: bool


# What a derivative computes. They are values, and hold no arrays.


class _Tangents(NamedTuple):
    """Of a function, along the arrays whose numbers are active: their tangents follow the arrays."""

    of: Callable
    active: tuple[int, ...]

    def __call__(self, parts: Any, arrays: Sequence[Any]) -> list[Any]:
        count = len(arrays) - len(self.active)
        primals, tangents = arrays[:count], arrays[count:]

        def of_active(*moving):
            moved = dict(zip(self.active, moving, strict=True))
            return self.of(parts, [moved.get(i, array) for i, array in enumerate(primals)])

        return jax.jvp(of_active, [primals[i] for i in self.active], list(tangents))[1]


class _Transpose(NamedTuple):
    """Of a function that is linear in some of its arrays: the others come first, then the cotangents."""

    of: Callable
    linear: tuple[Any, ...]  # the type of each array that it is linear in; None for the others

    def __call__(self, parts: Any, arrays: Sequence[Any]) -> list[Any]:
        types = [kind for kind in self.linear if kind is not None]
        count = len(self.linear) - len(types)
        fixed, cotangents = arrays[:count], arrays[count:]
        match self.of:
            case _Tangents(of=of, active=active) if len(types) == len(active) and (pull := _pull(of, active)):
                return pull(parts, *cotangents, *fixed)

        def of_linear(*moving):
            given, moved = iter(fixed), iter(moving)
            return self.of(parts, [next(given if kind is None else moved) for kind in self.linear])

        return list(jax.linear_transpose(of_linear, *types)(list(cotangents)))


class _Mapped(NamedTuple):
    """A function over an axis of its arrays."""

    of: Callable
    axes: tuple[int | None, ...]
    size: Any
    spmd_axis_name: Any

    def __call__(self, parts: Any, arrays: Sequence[Any]) -> list[Any]:
        of_one = functools.partial(self.of, parts)
        options = {"axis_size": self.size, "spmd_axis_name": self.spmd_axis_name}
        return jax.vmap(of_one, in_axes=(list(self.axes),), **options)(list(arrays))


def _pull(of: Callable, active: tuple[int, ...], *, mapped: bool = False) -> Callable | None:
    """The gradients that a function brings along: (parts, cotangent, *arrays) -> those of the active; None: it has none."""
    match of:
        case Computation() if of.gradients_of_maps or not mapped:
            return lambda parts, *arrays: of.gradients(parts, active, *arrays)
        case _Mapped() if pull := _pull(of.of, active, mapped=True):
            return functools.partial(_pull_map, of, [of.axes[i] for i in active], pull)
    return None


def _pull_map(of: _Mapped, axes: list[int | None], pull: Callable, parts: Any, *arrays) -> list[Any]:
    """The gradients of what is mapped over along `axes`; an array that serves all has the sum of theirs."""
    options = {"axis_size": of.size, "spmd_axis_name": of.spmd_axis_name}
    pull_one = jax.vmap(functools.partial(pull, parts), in_axes=(0, *of.axes), **options)
    found = zip(pull_one(*arrays), axes, strict=True)
    return [jnp.sum(g, axis=0) if axis is None else jnp.moveaxis(g, 0, axis) for g, axis in found]


_by_platform = Primitive("by_platform")
_by_platform.multiple_results = True


def _bind(call: _Call, *arrays) -> list[Any]:
    return _by_platform.bind(*arrays, call=call, holds=call.holds)


@_by_platform.def_abstract_eval
def _types(*arrays, call: _Call, holds):
    del arrays, holds
    return list(call.results)


@_by_platform.def_impl
def _run(*arrays, call: _Call, holds):
    return call.of(_parts(call, jax.default_backend()), arrays)


def _parts(call: _Call, platform: str) -> Any:
    parts = dict(call.parts[0])
    return parts.get(platform, parts["default"])


def _jvp(primals, tangents, *, call: _Call, holds):
    active = tuple(i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero))
    along = call._replace(of=_Tangents(call.of, active), parts=call.parts[1:] or call.parts)
    moved = _bind(along, *primals, *(tangents[i] for i in active))
    return _bind(call, *primals), moved


def _transpose(cotangents, *arrays, call: _Call, holds):
    linear = tuple(array.aval if ad.is_undefined_primal(array) else None for array in arrays)
    fixed = [array for array in arrays if not ad.is_undefined_primal(array)]
    types = tuple(kind for kind in linear if kind is not None)
    back = call._replace(of=_Transpose(call.of, linear), results=types)
    found = iter(_bind(back, *fixed, *map(ad.instantiate_zeros, cotangents)))
    return [None if kind is None else next(found) for kind in linear]


def _batch(axis, arrays, axes, *, call: _Call, holds):
    if all(along is None for along in axes):
        return _bind(call, *arrays), [None] * len(call.results)
    mapped = _Mapped(call.of, tuple(axes), axis.size, axis.spmd_name)
    results = tuple(unmapped_aval(axis.size, 0, kind) for kind in call.results)
    return _bind(call._replace(of=mapped, results=results), *arrays), [0] * len(results)


def _lower(context, *arrays, call: _Call, holds):
    platforms = context.platforms or context.module_context.platforms
    parts = {platform: _parts(call, platform) for platform in platforms}

    def of_platform(*arrays):
        if len(set(parts.values())) == 1:
            return call.of(parts[platforms[0]], arrays)
        # A program that is exported for several platforms chooses where it is called.
        branches = {platform: lambda *arrays, n=n: call.of(n, arrays) for platform, n in parts.items()}
        return lax.platform_dependent(*arrays, **branches)

    with jax.default_matmul_precision(call.matmul_precision), jax.enable_x64(call.x64):
        return mlir.lower_fun(of_platform)(context, *arrays)


ad.primitive_jvps[_by_platform] = _jvp
ad.primitive_transposes[_by_platform] = _transpose
batching.fancy_primitive_batchers[_by_platform] = _batch
mlir.register_lowering(_by_platform, _lower)
