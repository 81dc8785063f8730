"""Calling a model while something stands around the calls of its layers, in linen and in nnx.

The model does not change. Of an nnx model a copy is called, whose layers are of classes derived
for this one call; a linen module is called under `flax.linen.intercept_methods`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcn_jax._core import extras


class Call(NamedTuple):
    """One call of a layer of the model."""

    path: str  # the names of attributes, joined by "."
    kind: str  # "deform_conv", "conv", "dcn" or "attention"
    layer: Any  # of nnx, or a bound module of linen
    run: Callable[..., tuple[Any, dict[str, Any]]]  # the layer itself: its result, and what it sowed and its PARTS made
    args: tuple
    kwargs: dict[str, Any]

    def argument(self, index: int, name: str) -> Any:
        """An argument by its place or its name; None if it was not given."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name)

    def replaced(self, index: int, name: str, value: Any) -> "Call":
        """The call with another value of an argument."""
        if len(self.args) > index:
            return self._replace(args=(*self.args[:index], value, *self.args[index + 1 :]))
        return self._replace(kwargs=self.kwargs | {name: value})

    def parameter(self, name: str) -> jax.Array | None:
        """A parameter of the layer by its name, or None if it has no such parameter."""
        if hasattr(self.layer, "scope"):  # linen
            from flax.linen import meta

            return meta.unbox(self.layer.variables["params"].get(name))
        parameter = getattr(self.layer, name)
        return None if parameter is None else parameter[...]


# Which argument is the map that a layer reads: its place and its name.
MAP = {"deform_conv": (0, "inputs"), "conv": (0, "inputs"), "dcn": (0, "inputs"), "attention": (2, "value")}

# The projections of DCNv3 and DCNv4, kind "dcn", that make offsets and weights, which these layers do not sow.
PARTS = ("offset", "mask", "offset_mask")

Around = Callable[[Call], Any]
_traced_for = jax.make_user_context(None)


def unchanged(call: Call) -> Any:
    """Run the layer as it is."""
    return call.run(*call.args, **call.kwargs)[0]


def batch_of_one(x: Any) -> jax.Array:
    """The image `(*spatial, C)` as a batch of one."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}; wanted a floating-point image: x.astype(jnp.float32)")
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}; wanted one image (H, W, C), without a batch axis")
    return x[None]


def run(model: Any, images: jax.Array, around: Around, call: Callable[..., Any] | None = None) -> Any:
    """The model's result for `images`. Each call of a layer is `around(Call)`, which may run the layer.

    Layers that a watched layer runs, such as an offset branch, are not watched.
    """
    try:
        import flax.linen
        from flax import nnx
    except ModuleNotFoundError as error:
        raise extras.missing("dcn_jax.viz", "flax") from error

    around = _outermost(around)
    if isinstance(model, nnx.Module):
        return _run_nnx(model, images, around, call)
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], flax.linen.Module):
        return _run_linen(*model, images, around, call)
    hint = "; beside a linen module stand its variables" if isinstance(model, flax.linen.Module) else ""
    raise TypeError(
        f"model is a {type(model).__name__}; wanted an nnx.Module, or a pair (linen module, variables){hint}"
    )


def _outermost(around: Around) -> Around:
    """`around` for calls that no other watched call is running; the others run as they are."""
    running = False

    def outermost(call: Call) -> Any:
        nonlocal running
        if running:
            return unchanged(call)
        running = True
        try:
            return around(call)
        finally:
            running = False

    return outermost


def _run_nnx(model: Any, images: jax.Array, around: Around, call: Callable[..., Any] | None) -> Any:
    from flax import nnx

    from dcn_jax.nnx import DCNv3, DCNv4, DeformConv, MSDeformAttn

    kinds = {DeformConv: "deform_conv", nnx.Conv: "conv", DCNv3: "dcn", DCNv4: "dcn", MSDeformAttn: "attention"}
    copy = nnx.clone(model, graph=True)
    for path, layer in list(nnx.iter_graph(copy, graph=True)):
        if kind := _kind(layer, kinds):
            seen: dict[str, Any] = {}
            layer.__class__ = _watched_class(type(layer), ".".join(map(str, path)), kind, seen, around)
            for name in PARTS if kind == "dcn" else ():
                if isinstance(part := getattr(layer, name, None), nnx.Module):
                    part.__class__ = _noted_class(type(part), name, seen)
    return copy(images) if call is None else call(copy, images)


def _kind(layer: Any, kinds: dict[type, str]) -> str | None:
    return next((kind for cls, kind in kinds.items() if isinstance(layer, cls)), None)


def _watched_class(cls: type, path: str, kind: str, seen: dict[str, Any], around: Around) -> type:
    """A class like `cls`, whose calls go through `around`; what it sows goes into `seen`."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            seen.clear()
            return cls.__call__(self, *args, **kwargs), dict(seen)

        return around(Call(path, kind, self, run, args, kwargs))

    def sow(_self: Any, _kind: Any, name: str, value: Any, *_: Any, **__: Any) -> bool:
        seen[name] = value
        return True

    # Layers sow only if they find `__captures__`, which nnx.capture gives them elsewhere.
    return type(cls)(cls.__name__, (cls,), {"__call__": __call__, "sow": sow, "__captures__": ()})


def _noted_class(cls: type, name: str, seen: dict[str, Any]) -> type:
    """A class like `cls`, whose result goes into `seen` under `name`."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen[name] = cls.__call__(self, *args, **kwargs)
        return seen[name]

    return type(cls)(cls.__name__, (cls,), {"__call__": __call__})


def _run_linen(module: Any, variables: Any, images: jax.Array, around: Around, call: Callable[..., Any] | None) -> Any:
    import flax.linen as nn

    from dcn_jax.linen import DCNv3, DCNv4, DeformConv, MSDeformAttn

    kinds = {DeformConv: "deform_conv", nn.Conv: "conv", DCNv3: "dcn", DCNv4: "dcn", MSDeformAttn: "attention"}
    made: dict[tuple, dict[str, Any]] = {}  # by the PARTS of layers, by the layer's path

    def interceptor(next_function: Any, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        layer = context.module
        kind = _kind(layer, kinds)
        if context.method_name != "__call__":
            return next_function(*args, **kwargs)
        if kind is None:
            output = next_function(*args, **kwargs)
            if layer.name in PARTS:
                made.setdefault(layer.path[:-1], {})[layer.name] = output
            return output

        def run(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            output = next_function(*args, **kwargs)
            values = layer.variables.get("intermediates", {})
            # A tuple is what the layer has sown, one value for each of its calls; a dictionary is its branch's.
            sown = {name: value[-1] for name, value in values.items() if isinstance(value, tuple)}
            return output, sown | made.get(layer.path, {})

        return around(Call(".".join(layer.path), kind, layer, run, args, kwargs))

    variables = {name: value for name, value in dict(variables).items() if name != "intermediates"}
    # The context is part of jit's key: what nn.jit traced before is traced anew, with the interceptor in it. In nnx
    # the new classes are part of the key.
    with nn.intercept_methods(interceptor), _traced_for(around):
        # All but the parameters may change in the call (the statistics of a batch norm); the changes are dropped.
        return module.apply(variables, images, method=call, mutable=nn.DenyList("params"))[0]
