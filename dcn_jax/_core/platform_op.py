"""One op, an algorithm for each platform, and gradients that are stated.

Why `lax.platform_dependent` was not enough: a program's platform is known only when it is lowered. So
`platform_dependent` traces the algorithm of every platform, and JAX differentiates and transposes each,
to compile one of them: the gradients of one layer took 6 times as long to trace and lower (0.50 s, not
0.08; conv3-224, jax 0.10.2). Here an op is one primitive. Its tangents and transposes are calls of the same
primitive, and an algorithm is traced when a call is lowered, for the platform that it is lowered for.

The gradients are the algorithm's own. JAX's transpose of a loop of gathers would, in each step, make a map
of zeros, add to it, and add that map to the gradient. JAX finds all other derivatives (tangents, and the
derivatives of gradients) from the algorithm's result and gradients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir

from dcn_jax._core.mesh import vary_alike


class Algorithm(NamedTuple):
    """Two functions, which compute an op's result and its gradients; hashable. Where two are equal, one program serves both."""

    result: Callable  # (spec, blocks, operands) -> array
    gradients: Callable  # (spec, blocks, active, y_bar, operands) -> {name: gradient}, for each name in `active`
    blocks: Any  # how it divides the work
    # Whether `jax.vmap` maps `gradients`. Then an array that is not mapped has a gradient for each member in memory, which
    # are summed. Otherwise JAX transposes the mapped `result`, which sums as it goes.
    gradients_can_be_mapped: bool = False


Algorithms = tuple[tuple[str, Algorithm], ...]  # (platform, algorithm); "default" is every platform that is not named


class Op(NamedTuple):
    """Everything about an op but its arrays; hashable."""

    spec: Any  # handed to each function of its algorithms
    result: Any  # the result's type, by `type_of`
    algorithms: tuple[
        Algorithms, ...
    ]  # entry n is for the n-th derivative, entry 0 for the result; the last, for all higher
    # A jaxpr that never runs. JAX passes the list of devices to a lowering only if it finds, in the primitive's parameters, a
    # jaxpr with a call that needs it. `pallas_gpu` gives one.
    holds: Any = None


def type_of(compute: Callable, *arguments: Any) -> Any:
    """The type of the array `compute(*arguments)`, which is traced and never run."""
    return jax.make_jaxpr(compute)(*arguments).out_avals[0]


def platform_op(op: Op, operands: Any) -> jax.Array:
    """Compute an op on `operands`, a NamedTuple of arrays, some of which may be None. Call it under `jax.jit`."""
    # Within shard_map an array may be the same on devices over which another varies. All are made to vary alike here: so a
    # gradient is summed over the devices once, after the algorithm's loop, and not in each step.
    given = vary_alike({name: array for name, array in operands._asdict().items() if array is not None})
    call = _Call(
        of=_Result(op.spec, type(operands), tuple(given)),
        algorithms=op.algorithms,
        results=(op.result,),
        matmul_precision=jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
        x64=jax.config.jax_enable_x64,  # pyright: ignore[reportAttributeAccessIssue]
    )
    return _platform_op.bind(*given.values(), call=call, holds=op.holds)[0]


class _Call(NamedTuple):
    """Everything about a call of the primitive but its arrays."""

    of: Callable  # (algorithm, arrays) -> arrays
    algorithms: tuple[Algorithms, ...]  # entry 0 is for this function, entry 1 for its derivative, and so on
    results: tuple[Any, ...]  # their types
    matmul_precision: str | None  # as set where the call is made; where it is lowered, another may be set
    x64: bool


# The functions of a call: each takes an algorithm and a list of arrays. They are compared by value, and hold no arrays.


class _Result(NamedTuple):
    """The result of an op."""

    spec: Any
    operands: Callable  # the NamedTuple's class
    given: tuple[str, ...]  # the operands that are not None, in the order of the arrays

    def __call__(self, algorithm: Algorithm, arrays: Sequence[Any]) -> list[Any]:
        return [algorithm.result(self.spec, algorithm.blocks, self._named(arrays))]

    def gradients(self, algorithm: Algorithm, active: tuple[int, ...], y_bar: Any, *arrays) -> list[Any]:
        """The gradients of `arrays[i]`, for each i in `active`."""
        names = tuple(self.given[i] for i in active)
        found = algorithm.gradients(self.spec, algorithm.blocks, names, y_bar, self._named(arrays))
        return [found[name] for name in names]

    def _named(self, arrays: Sequence[Any]) -> Any:
        absent = dict.fromkeys(self.operands._fields)  # pyright: ignore[reportFunctionMemberAccess]
        return self.operands(**absent | dict(zip(self.given, arrays, strict=True)))


class _Tangents(NamedTuple):
    """How a function's results move when `arrays[i]` moves, for each i in `active`. Given the arrays, then those tangents."""

    of: Callable
    active: tuple[int, ...]

    def __call__(self, algorithm: Algorithm, arrays: Sequence[Any]) -> list[Any]:
        count = len(arrays) - len(self.active)
        primals, tangents = arrays[:count], arrays[count:]

        def of_active(*moving):
            moved = dict(zip(self.active, moving, strict=True))
            return self.of(algorithm, [moved.get(i, array) for i, array in enumerate(primals)])

        return jax.jvp(of_active, [primals[i] for i in self.active], list(tangents))[1]


class _Transpose(NamedTuple):
    """The transpose of a function that is linear in some arrays. Given the other arrays, then a cotangent of each result."""

    of: Callable
    linear: tuple[Any, ...]  # the type of each array that the function is linear in; None for the others

    def __call__(self, algorithm: Algorithm, arrays: Sequence[Any]) -> list[Any]:
        types = [kind for kind in self.linear if kind is not None]
        count = len(self.linear) - len(types)
        fixed, cotangents = arrays[:count], arrays[count:]
        match self.of:
            case _Tangents(of=of, active=active) if len(types) == len(active):
                if pull := _stated_gradients(of, algorithm, active):
                    return pull(*cotangents, *fixed)

        given = iter(fixed)
        arrays = [next(given) if kind is None else None for kind in self.linear]
        active = tuple(i for i, kind in enumerate(self.linear) if kind is not None)
        # Here the op itself is transposed (`jax.linear_transpose`). The gradients of a linear function do not depend on where
        # they are taken, so zeros stand for the arrays that it is linear in.
        if pull := _stated_gradients(self.of, algorithm._replace(gradients_can_be_mapped=True), active):
            at = [ad.instantiate_zeros(ad.Zero(self.linear[i])) if i in active else a for i, a in enumerate(arrays)]
            return pull(*cotangents, *at)

        def of_linear(*moving):
            moved = dict(zip(active, moving, strict=True))
            return self.of(algorithm, [moved.get(i, array) for i, array in enumerate(arrays)])

        return list(jax.linear_transpose(of_linear, *types)(list(cotangents)))


class _Mapped(NamedTuple):
    """A function over an axis of its arrays."""

    of: Callable
    axes: tuple[int | None, ...]
    size: Any
    spmd_axis_name: Any

    def __call__(self, algorithm: Algorithm, arrays: Sequence[Any]) -> list[Any]:
        return self.map(functools.partial(self.of, algorithm), (list(self.axes),))(list(arrays))

    def map(self, function: Callable, axes: tuple) -> Callable:
        """`function`, mapped as this one is, over `axes` of its arguments."""
        return jax.vmap(function, in_axes=axes, axis_size=self.size, spmd_axis_name=self.spmd_axis_name)


def _stated_gradients(
    of: Callable, algorithm: Algorithm, active: tuple[int, ...], *, mapped: bool = False
) -> Callable | None:
    """(cotangent, *arrays) -> the gradients of the active arrays, as the algorithm states them; None where it does not."""
    match of:
        case _Result() if algorithm.gradients_can_be_mapped or not mapped:
            return functools.partial(of.gradients, algorithm, active)
        case _Mapped() if pull := _stated_gradients(of.of, algorithm, active, mapped=True):
            return functools.partial(_pull_map, of, [of.axes[i] for i in active], pull)
    return None


def _pull_map(of: _Mapped, axes: list[int | None], pull: Callable, *arrays) -> list[Any]:
    """The gradients of a mapped function, mapped over `axes`; an array shared by all members gets the sum of theirs."""
    found = zip(of.map(pull, (0, *of.axes))(*arrays), axes, strict=True)
    return [jnp.sum(g, axis=0) if axis is None else jnp.moveaxis(g, 0, axis) for g, axis in found]


# The primitive: its types, its derivatives, maps of it, and its lowering.

_platform_op = Primitive("platform_op")
_platform_op.multiple_results = True


def _bind(call: _Call, holds: Any, *arrays) -> list[Any]:
    return _platform_op.bind(*arrays, call=call, holds=holds)


@_platform_op.def_abstract_eval
def _types(*arrays, call: _Call, holds):
    del arrays, holds
    return list(call.results)


@_platform_op.def_impl
def _run(*arrays, call: _Call, holds):
    return call.of(_algorithm_for(call, jax.default_backend()), arrays)


def _algorithm_for(call: _Call, platform: str) -> Algorithm:
    algorithms = dict(call.algorithms[0])
    return algorithms.get(platform, algorithms["default"])


def _jvp(primals, tangents, *, call: _Call, holds):
    active = tuple(i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero))
    along = call._replace(of=_Tangents(call.of, active), algorithms=call.algorithms[1:] or call.algorithms)
    moved = _bind(along, holds, *primals, *(tangents[i] for i in active))
    return _bind(call, holds, *primals), moved


def _transpose(cotangents, *arrays, call: _Call, holds):
    linear = tuple(array.aval if ad.is_undefined_primal(array) else None for array in arrays)
    fixed = [array for array in arrays if not ad.is_undefined_primal(array)]
    types = tuple(kind for kind in linear if kind is not None)
    back = call._replace(of=_Transpose(call.of, linear), results=types)
    found = iter(_bind(back, holds, *fixed, *map(ad.instantiate_zeros, cotangents)))
    return [None if kind is None else next(found) for kind in linear]


def _batch(axis, arrays, axes, *, call: _Call, holds):
    if all(along is None for along in axes):
        return _bind(call, holds, *arrays), [None] * len(call.results)
    mapped = _Mapped(call.of, tuple(axes), axis.size, axis.spmd_name)
    results = tuple(unmapped_aval(axis.size, 0, kind) for kind in call.results)
    return _bind(call._replace(of=mapped, results=results), holds, *arrays), [0] * len(results)


def _lower(context, *arrays, call: _Call, holds):
    platforms = context.platforms or context.module_context.platforms
    chosen = {platform: _algorithm_for(call, platform) for platform in platforms}

    def of_platform(*arrays):
        if len(set(chosen.values())) == 1:
            return call.of(chosen[platforms[0]], arrays)
        # A program that is exported for several platforms chooses where it is called.
        forms = {platform: lambda *arrays, a=algorithm: call.of(a, arrays) for platform, algorithm in chosen.items()}
        return lax.platform_dependent(*arrays, **forms)

    with jax.default_matmul_precision(call.matmul_precision), jax.enable_x64(call.x64):
        return mlir.lower_fun(of_platform)(context, *arrays)


ad.primitive_jvps[_platform_op] = _jvp
ad.primitive_transposes[_platform_op] = _transpose
batching.fancy_primitive_batchers[_platform_op] = _batch
mlir.register_lowering(_platform_op, _lower)
