"""`deformify`: replaces chosen convolutions of an existing model by DeformConv."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax

from dcn_jax._core import extras
from dcn_jax.nnx._deform_conv import DeformConv
from dcn_jax.nnx._stacks import axes_too_many

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise extras.missing("dcn_jax.nnx", "flax") from error

Model = TypeVar("Model")

# The options that a deformable layer keeps from a convolution.
_KEPT = (
    "strides",
    "padding",
    "kernel_dilation",
    "feature_group_count",
    "use_bias",
    "dtype",
    "param_dtype",
    "precision",
    "promote_dtype",
    "preferred_element_type",
)
# The options that only a deformable layer has.
_CONV = inspect.signature(nnx.Conv.__init__).parameters
_OWN = [name for name in inspect.signature(DeformConv.__init__).parameters if name not in _CONV]


def deformify(
    model: Model,
    where: Callable[[tuple, Any], bool],
    *,
    mask_scale: float = 2.0,
    use_bias: bool | None = None,
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Model:
    """Copy a model with chosen `flax.nnx.Conv` layers made deformable; the copy computes the same.

        y(p0) = Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  b,  at first with Δp = 0 and Δm = 1

    w and b are the model's own. The new branches start at zero, and with `mask_scale=2.0` the
    modulation starts at 2 · sigmoid(0) = 1. So a pretrained network becomes deformable in one
    line, and training continues from where it was.

    The original model is unchanged; the copy has arrays of its own. Modules and variables that
    were shared in the model are shared in the copy. Kernels and biases keep the types and metadata
    of their variables. Make a new optimizer: an old one does not know the new branches, which
    should learn slowly (`dcn_jax.optim.offset_labels`).

    A stack of convolutions, which `nnx.vmap` makes for `nnx.scan`, becomes a stack of deformable
    layers, if the axis of the stack is the first.

    Args:
        model: any nnx model, or a container of models.
        where: `where(path, module)` is called for each `nnx.Conv`; True makes it deformable. The
            path is that of `nnx.iter_graph`, with names of attributes and indices of lists:
            `("layer4", 0, "conv2")`. A module that is used in several places has its first path.
            A callable filter of `nnx` works too, such as `nnx.PathContains("layer4")`. `where` is
            not called for the branches of layers that are deformable already.
        mask_scale: the modulation's upper bound. If modulated, only 2.0 keeps the result; 1.0
            halves it, less the bias.
        use_bias: True gives a bias of zeros to the layers whose convolution has none. False
            refuses a convolution that has one, which would be lost. None keeps what there is.
        rngs: keys for branches with random initializers; by default `nnx.Rngs(0)`.
        options: for all new layers, what only `DeformConv` takes: `modulated`, `offset_groups`, …

    Returns:
        The copy, of the model's type; a `DeformConv` if the model itself is a chosen `nnx.Conv`.

    Raises:
        ValueError: an option does not fit, `where` chooses none of the convolutions, or a chosen layer cannot become deformable: it has an
            `input_dilation`, a `mask`, causal padding or its own `conv_general_dilated`, or its
            class is derived from `nnx.Conv`. The message names the path of the layer.
        TypeError: an argument or option is of the wrong kind.

    Source: arXiv 1703.06211, section 2.3: deformable layers replace plain ones.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.nnx import deformify
        >>> rngs = nnx.Rngs(0)
        >>> net = nnx.Sequential(nnx.Conv(3, 4, (1, 1), rngs=rngs), nnx.Conv(4, 4, (3, 3), rngs=rngs))
        >>> deformable = deformify(net, lambda path, conv: conv.kernel_size == (3, 3))
        >>> [type(layer).__name__ for layer in deformable.layers]
        ['Conv', 'DeformConv']
        >>> x = jnp.ones((1, 8, 8, 3))
        >>> bool(jnp.allclose(deformable(x), net(x), atol=1e-5))
        True
    """
    if not callable(where):
        raise TypeError(f"where is a {type(where).__name__}; wanted a function of (path, module)")
    if unknown := [name for name in options if name not in _OWN]:
        raise TypeError(
            f"deformify() takes no option {unknown[0]}; wanted one that only DeformConv has: {', '.join(_OWN)}"
        )
    if not any(isinstance(node, nnx.Pytree) for _, node in nnx.iter_graph(model, graph=True)):
        raise TypeError(
            f"model is a {type(model).__name__} without nnx modules; wanted an nnx.Module, or a container of them"
        )
    if use_bias not in (None, True, False):
        raise TypeError(f"use_bias={use_bias!r} is a {type(use_bias).__name__}; wanted True, False or None")
    rngs = nnx.Rngs(0) if rngs is None else rngs
    copy = nnx.clone(model, arrays=True, graph=True)
    modules = [(path, node) for path, node in nnx.iter_graph(copy, graph=True) if isinstance(node, nnx.Pytree)]
    branches = {id(node) for _, layer in modules if isinstance(layer, DeformConv) for _, node in nnx.iter_graph(layer)}
    plain = [(path, node) for path, node in modules if isinstance(node, nnx.Conv) and id(node) not in branches]
    chosen = [(path, conv) for path, conv in plain if where(path, conv)]
    if plain and not chosen:
        paths = [str(path) for path, _ in plain]
        raise ValueError(
            f"where chose none of the {len(plain)} convolutions, whose paths are {', '.join(paths[:8])}"
            f"{', …' if len(paths) > 8 else ''}; wanted True for one of them, such as lambda path, conv: path == {paths[0]}"
        )
    layers = {
        id(conv): _deformable(path, conv, rngs, use_bias, {"mask_scale": mask_scale, **options})
        for path, conv in chosen
    }
    for _, module in modules:
        for name, value in list(vars(module).items()):
            if (new := _replaced(value, layers)) is not value:
                setattr(module, name, nnx.data(new))
    return _replaced(copy, layers)


def _replaced(value: Any, layers: dict[int, DeformConv]) -> Any:
    """`value` with its layers replaced, except inside modules; `value` itself if it has none."""
    leaves, structure = jax.tree.flatten(value, is_leaf=lambda node: isinstance(node, nnx.Pytree | nnx.Variable))
    if not any(id(leaf) in layers for leaf in leaves):
        return value
    return structure.unflatten([layers.get(id(leaf), leaf) for leaf in leaves])


def _deformable(path: tuple, conv: Any, rngs: nnx.Rngs, use_bias: bool | None, options: dict[str, Any]) -> DeformConv:
    """The deformable layer with the variables and options of `conv`."""
    at = "/".join(map(str, path)) or "the model itself"
    if reason := _refusal(conv, use_bias):
        raise ValueError(f"{at} cannot become deformable: {reason}; leave it out in `where`")
    kept = {name: getattr(conv, name) for name in _KEPT} | ({"use_bias": True} if use_bias else {})
    stack = conv.kernel.shape[: axes_too_many(conv)]

    def make(rngs: nnx.Rngs) -> DeformConv:
        return DeformConv(
            conv.in_features,
            conv.out_features,
            conv.kernel_size,
            **kept,
            kernel_init=nnx.initializers.zeros_init(),  # replaced below
            rngs=rngs,
            **options,
        )

    try:
        layer = _stacked(make, stack, rngs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{at} cannot become deformable: {error}") from error
    layer.kernel = conv.kernel
    if conv.bias is not None:
        layer.bias = conv.bias
    return layer


def _stacked(make: Callable[[nnx.Rngs], DeformConv], stack: tuple[int, ...], rngs: nnx.Rngs) -> DeformConv:
    """A layer, or a stack of layers whose variables have the axes `stack` in front."""
    if not stack:
        return make(rngs)
    return nnx.vmap(lambda rngs: _stacked(make, stack[1:], rngs))(rngs.split(stack[0]))


def _refusal(conv: Any, use_bias: bool | None) -> str | None:
    """Why no deformable layer computes what a convolution does, or None."""
    if type(conv) is not nnx.Conv:
        return f"it is a {type(conv).__name__}, and what it does beyond nnx.Conv would be lost"
    if not jax.tree.all(jax.tree.map(lambda dilation: dilation == 1, conv.input_dilation)):  # None has no leaves
        return f"input_dilation={conv.input_dilation!r}, and an offset between pixels that do not exist means nothing"
    if conv.mask is not None:
        return "it has a mask; multiply it into the kernel, and set the layer's mask to None"
    if conv.padding == "CAUSAL":
        return 'padding="CAUSAL", and an offset may read later positions'
    if conv.conv_general_dilated is not lax.conv_general_dilated:
        return "it has its own conv_general_dilated, which takes no offsets"
    if use_bias is False and conv.bias is not None:
        return "use_bias=False, and it has a bias, without which it computes something else"
    stacked, shape = axes_too_many(conv), conv.kernel.shape
    one = (*conv.kernel_size, conv.in_features // conv.feature_group_count, conv.out_features)
    if shape[stacked:] != one or (conv.bias is not None and conv.bias.shape != (*shape[:stacked], conv.out_features)):
        return f"it is a stack of layers whose arrays (kernel {shape}) are not stacked along the first axis"
    return None
