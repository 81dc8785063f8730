"""Which layers' results a layer reads: found in the program of the model, traced with marks in it."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from dcn_jax.viz import _calls

Sources = frozenset[int]

# What a trace raises if Python's own control flow needs an array's value.
_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def sources(model: Any, images: jax.Array, call: Callable[..., Any] | None) -> list[tuple[int, ...]] | None:
    """For each call of a layer, in order, the calls whose results reach its input through no other layer.

    None if the model cannot be traced, because its Python code looks at the values of arrays.
    """
    numbers = itertools.count()

    def around(layer_call: _calls.Call) -> Any:
        number = next(numbers)
        which = _calls.MAP[layer_call.kind]
        marked = layer_call.replaced(*which, checkpoint_name(layer_call.argument(*which), f"read by {number}"))
        output, _ = layer_call.run(*marked.args, **marked.kwargs)
        return checkpoint_name(output, f"made by {number}")

    try:
        program = jax.make_jaxpr(lambda images: _calls.run(model, images, around, call))(images)
    except _NEEDS_VALUES:
        return None
    found: dict[int, Sources] = {}
    _walk(program.jaxpr, [frozenset()] * len(program.jaxpr.invars), found)
    return [tuple(sorted(found[number])) for number in sorted(found)]


def _walk(jaxpr: Any, incoming: Iterable[Sources], found: dict[int, Sources]) -> list[Sources]:
    """The sources of the program's results, from those of its arguments; marks on the way go into `found`."""
    known: dict[Any, Sources] = dict(zip(jaxpr.invars, incoming, strict=True))

    def of(variable: Any) -> Sources:
        return frozenset() if isinstance(variable, Literal) else known.get(variable, frozenset())

    for equation in jaxpr.eqns:
        incoming = [of(variable) for variable in equation.invars]
        known |= dict(zip(equation.outvars, _step(equation, incoming, found), strict=True))
    return [of(variable) for variable in jaxpr.outvars]


def _step(equation: Any, incoming: list[Sources], found: dict[int, Sources]) -> list[Sources]:
    """The sources of an equation's results."""
    everything = frozenset().union(*incoming)
    if equation.primitive.name == "name":
        what, _, number = equation.params["name"].rpartition(" by ")
        if what == "made":
            return [frozenset([int(number)])]
        if what == "read":
            found[int(number)] = everything
    inner = [jaxpr for value in equation.params.values() for jaxpr in _programs(value)]
    # A program inside takes the last of the equation's arguments: before those of a branch stands the condition.
    results = [_walk(jaxpr, _last(len(jaxpr.invars), incoming, everything), found) for jaxpr in inner]
    if len(inner) == 1 and len(inner[0].invars) == len(incoming) and len(results[0]) == len(equation.outvars):
        return results[0]
    return [everything.union(*itertools.chain(*results))] * len(equation.outvars)


def _last(count: int, incoming: list[Sources], everything: Sources) -> list[Sources]:
    """The last `count` of the sources; where there are fewer, all of them for each."""
    return incoming[len(incoming) - count :] if count <= len(incoming) else [everything] * count


def _programs(value: Any) -> list[Any]:
    """The programs in a parameter of an equation: one, or one for each branch."""
    values = value if isinstance(value, tuple | list) else [value]
    programs = [getattr(each, "jaxpr", each) for each in values]
    return [program for program in programs if hasattr(program, "eqns")]
