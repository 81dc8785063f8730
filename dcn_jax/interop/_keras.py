"""Layers from nnx to Keras and back, parameters included."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from dcn_jax._core import checks
from dcn_jax._layers import offset_conv
from dcn_jax.nnx import DeformConv, MSDeformAttn

# Options of both layers, by their names in nnx and in Keras.
_CONV_OPTIONS = {
    **{"strides": "strides", "padding": "padding", "kernel_dilation": "dilation_rate", "feature_group_count": "groups"},
    **{name: name for name in ("use_bias", "offset_groups", "modulated", "mask_scale", "max_offset", "padding_mode")},
    **{name: name for name in ("offset_branch", "implementation")},
}
_ATTENTION_OPTIONS = ("embed_dim", "num_heads", "num_levels", "num_points", "method", "implementation", "num_axes")
_PROJECTIONS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
_MIXED = {("bfloat16", "float32"): "mixed_bfloat16", ("float16", "float32"): "mixed_float16"}


def to_keras(layer: Any) -> Any:
    """The Keras layer of the same options and parameters as an nnx layer.

        to_keras(layer)(x) = layer(x)

    Keras has to run on JAX (`KERAS_BACKEND=jax`); its layers want exactly one batch axis.

    Args:
        layer: a `DeformConv` or `MSDeformAttn` of `dcn_jax.nnx`.

    Returns:
        A `DeformConv1D`, `DeformConv2D`, `DeformConv3D` or `MSDeformAttn` of `dcn_jax.keras`, built,
        channels last, with copies of the parameters. Its initializers are the defaults.

    Raises:
        ValueError: the layer has an option that Keras's has not; the message names all of them.
        TypeError: `layer` is of another kind.
        ImportError: Keras is not installed.
        RuntimeError: Keras runs on another backend.

    Source: Keras 3, whose kernels lie as Flax's do.

    Example:
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DeformConv
        >>> layer = DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
        >>> to_keras(layer)(x).shape  # doctest: +SKIP
        (2, 5, 5, 8)
    """
    from dcn_jax import keras

    if isinstance(layer, DeformConv):
        checks.one_layer(layer.kernel.shape, len(layer.kernel_size) + 2)
        _refuse_options(layer)
        kind = {1: keras.DeformConv1D, 2: keras.DeformConv2D, 3: keras.DeformConv3D}[len(layer.kernel_size)]
        options = {theirs: getattr(layer, ours) for ours, theirs in _CONV_OPTIONS.items()}
        made = kind(
            layer.out_features,
            layer.kernel_size,
            **options | {"strides": layer.strides or 1, "dilation_rate": layer.kernel_dilation or 1},
            offset_activation=layer.offset_activation,
            data_format="channels_last",
            dtype=_policy(layer),
        )
        made.build((None, *(None for _ in layer.kernel_size), layer.in_features))
    elif isinstance(layer, MSDeformAttn):
        checks.one_layer(layer.sampling_offsets.kernel.shape, 2)
        _refuse({"precision": layer.precision is not None})
        made = keras.MSDeformAttn(**{name: getattr(layer, name) for name in _ATTENTION_OPTIONS}, dtype=_policy(layer))
        made.build((None, None, layer.embed_dim))
    else:
        raise TypeError(
            f"layer is a {type(layer).__name__}; wanted a DeformConv or MSDeformAttn of dcn_jax.nnx (from linen, fill "
            "one by from_linen)"
        )
    for ours, theirs in _pairs(layer, made):
        theirs.assign(np.asarray(ours[...]))
    return made


def from_keras(layer: Any) -> Any:
    """The nnx layer of the same options and parameters as a Keras layer.

        from_keras(layer)(x) = layer(x)

    Args:
        layer: a `DeformConv1D`, `DeformConv2D`, `DeformConv3D` or `MSDeformAttn` of `dcn_jax.keras`
            that has its weights: it was called, or its `build` was.

    Returns:
        A `DeformConv` or `MSDeformAttn` of `dcn_jax.nnx`, with copies of the weights. Its channels
        are last, also where the Keras layer's are first.

    Raises:
        ValueError: the layer has no weights yet, or an `activation`, which an nnx layer has not.
        TypeError: `layer` is of another kind.
        ImportError: Keras is not installed.

    Source: Keras 3, whose kernels lie as Flax's do.

    Example:
        >>> from dcn_jax.keras import DeformConv2D  # doctest: +SKIP
        >>> layer = DeformConv2D(8, 3, padding="same")  # doctest: +SKIP
        >>> layer.build((None, None, None, 4))  # doctest: +SKIP
        >>> from_keras(layer).kernel.shape  # doctest: +SKIP
        (3, 3, 4, 8)
    """
    from dcn_jax import keras
    from dcn_jax.keras._backend import keras as library

    convert_to_numpy = library.ops.convert_to_numpy
    convolutions = (keras.DeformConv1D, keras.DeformConv2D, keras.DeformConv3D)
    if not isinstance(layer, (*convolutions, keras.MSDeformAttn)):
        names = ", ".join(kind.__name__ for kind in convolutions)
        raise TypeError(f"layer is a {type(layer).__name__}; wanted {names} or MSDeformAttn of dcn_jax.keras")
    if not layer.built:
        raise ValueError(f"the layer {layer.name} has no weights yet; call it once, or its build(shape of the input)")
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(layer.compute_dtype), "param_dtype": jnp.dtype(layer.variable_dtype)}
    if isinstance(layer, keras.MSDeformAttn):
        options = {name: getattr(layer, name) for name in _ATTENTION_OPTIONS}
        made: Any = MSDeformAttn(**options, **dtypes, rngs=nnx.Rngs(0))
    else:
        if not _is_linear(layer.activation):
            raise ValueError(
                f"activation={getattr(layer.activation, '__name__', layer.activation)} is not taken along, since an nnx "
                "layer has none; make the layer without it, and apply it to the result"
            )
        made = DeformConv(
            layer.kernel.shape[-2] * layer.groups,
            layer.filters,
            layer.kernel_size,
            **{ours: getattr(layer, theirs) for ours, theirs in _CONV_OPTIONS.items()},
            offset_activation=None if _is_linear(layer.offset_activation) else layer.offset_activation,
            **dtypes,
            rngs=nnx.Rngs(0),
        )
    for ours, theirs in _pairs(made, layer):
        ours.set_value(jnp.array(convert_to_numpy(theirs), ours.dtype))
    return made


def _pairs(ours: Any, theirs: Any) -> Iterator[tuple[Any, Any]]:
    """Each parameter of an nnx layer, and the variable of the Keras layer that holds the same numbers."""
    branches = _PROJECTIONS if isinstance(ours, MSDeformAttn) else ("offset_conv",)
    parts = [(ours, theirs)] if isinstance(ours, DeformConv) else []
    parts += [(getattr(ours, name), getattr(theirs, name)) for name in branches if getattr(ours, name) is not None]
    for mine, other in parts:
        yield mine.kernel, other.kernel
        if mine.bias is not None:
            yield mine.bias, other.bias


def _refuse_options(layer: DeformConv) -> None:
    own = layer.offset_conv_cls is not None
    convolve = getattr(layer.offset_conv, "conv_general_dilated", offset_conv.wide_conv)
    _refuse(
        {
            "precision": layer.precision is not None,
            "preferred_element_type": layer.preferred_element_type is not None,
            "promote_dtype": layer.promote_dtype is not promote_dtype,
            "offset_in_features": layer.offset_in_features != layer.in_features,
            "offset_conv_cls": own,
            "conv_general_dilated": not own and convolve is not offset_conv.wide_conv,
        },
    )


def _refuse(has: dict[str, bool]) -> None:
    """Raise if the layer has one of these options, which Keras's has not."""
    if any(has.values()):
        names = ", ".join(name for name, given in has.items() if given)
        raise ValueError(
            f"the layer was made with {names}, which the layer of dcn_jax.keras has not; leave it at its default"
        )


def _is_linear(activation: Any) -> bool:
    """Whether this is Keras's name for no activation."""
    return getattr(activation, "__name__", None) == "linear"


def _policy(layer: Any) -> str:
    """Keras's name for a pair of dtypes, that of the computation and that of the parameters: "mixed_bfloat16"."""
    stored = jnp.dtype(layer.param_dtype).name
    computed = stored if layer.dtype is None else jnp.dtype(layer.dtype).name
    if computed == stored:
        return computed
    if (computed, stored) not in _MIXED:
        raise ValueError(
            f"dtype={computed} with param_dtype={stored} is no policy of Keras's; wanted the same of both, or "
            f"{' or '.join(f'{c} with {s}' for c, s in _MIXED)}"
        )
    return _MIXED[computed, stored]
