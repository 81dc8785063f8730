"""`explore`: a page in which one drags a position, and sees where the layers of a model read."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dcn_jax._core import checks
from dcn_jax.viz._looked import Layer, looked
from dcn_jax.viz._page import Page, pack

DTYPES = ("float32", "float16")


def explore(
    model: Any = None,
    x: Any = None,
    *,
    call: Callable[..., Any] | None = None,
    channels: int | None = None,
    dtype: str = "float32",
) -> Page:
    """Make a page in which one sees, and may drag, where the layers of a model read for one image.

    Drawn are the regular grid, the offsets Δp and the modulations Δm of each layer, and the formula
    with its numbers for each tap:

        y(p0) = Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  b

    The page is one file. It needs no network, and holds the maps that the layers read, their
    offsets, modulations and kernels. Without arguments there are offsets that sliders make. Both
    kinds of page also take arrays of one's own, dropped in as .npy or .npz.

    Args:
        model: an `nnx.Module`, or a pair (linen module, variables).
        x: one image `(H, W, C)`, floating-point.
        call: how to call the model with a batch of one, as in `looked`.
        channels: how many input and output channels of each layer to keep, those that vary the
            most on this image, spread evenly over the offset groups; by default all.
        dtype: "float32", or "float16" for half the size and three digits.

    Returns:
        A `Page`. A notebook shows it, and `page.save("explorer.html")` writes it.

    Raises:
        ValueError: an argument does not fit, or the model has no convolution over an image.
        TypeError: an argument is of the wrong kind.
        ImportError: Flax is not installed.

    Source: Dai et al. (arXiv 1703.06211), figures 5, 6; Zhu et al. (arXiv 1811.11168), figure 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DeformConv
        >>> from dcn_jax.viz import explore
        >>> layer = DeformConv(3, 8, (3, 3), rngs=nnx.Rngs(0))
        >>> page = explore(layer, jnp.ones((16, 16, 3)))
        >>> page.save("explorer.html")  # doctest: +SKIP
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; wanted one of {DTYPES}")
    if channels is not None:
        checks.count("channels", channels)
    if model is None and x is None:
        return Page(None)
    if model is None or x is None:
        given, missing = ("x", "model") if model is None else ("model", "x")
        raise ValueError(f"{given} is given without {missing}; wanted both, or none for a page with sliders")
    if np.ndim(x) != 3:
        raise ValueError(f"x has shape {np.shape(x)}; wanted one image (H, W, C), without a batch axis")
    layers = looked(model, x, call=call)
    shown = [layer for layer in layers if len(layer.window) == 2]
    if not shown:
        raise ValueError(f"the model called no convolution over an image; found were {layers}")
    picture = np.asarray(x, np.float32)[..., : 3 if np.shape(x)[-1] >= 3 else 1]
    deformable = [i for i, layer in enumerate(shown) if layer.offset is not None]
    return Page(
        {
            "about": _about(len(shown), len(layers)),
            "picture": pack(picture, "float32" if picture.size < 2**16 else "float16"),
            "first": deformable[-1] if deformable else len(shown) - 1,
            "layers": [
                _stored(layer, before, channels, dtype) for layer, before in zip(shown, _before(shown), strict=True)
            ],
        }
    )


def _about(shown: int, found: int) -> str:
    layers = f"{shown} layer{'s' if shown > 1 else ''}, as {'they' if shown > 1 else 'it'} ran on one image."
    left_out = found - shown
    return layers + (f" Left out: {left_out}, which read no image of two axes." if left_out else "")


def _before(layers: Sequence[Layer]) -> list[int | None]:
    """For each layer the place of the one before it, whose result it reads; None if positions do not correspond.

    Where it reads several results, as of a shortcut and a branch, that is the one behind which lie
    the most deformable layers, of these the longest way: as in `sampling_through`.
    """
    before: list[int | None] = []
    ways: list[tuple[int, int]] = []  # how many deformable layers there are on the way to a layer, and how many in all
    for place, layer in enumerate(layers):
        reads = [place - 1] if layer.reads is None else [i for i in range(place) if layers[i].index in layer.reads]
        fits = [i for i in reads if i >= 0 and layers[i].output.shape[:-1] == layer.spatial]
        best = max(fits, key=lambda i: (ways[i], i), default=None)
        before.append(best)
        deformable, length = (0, 0) if best is None else ways[best]
        ways.append((deformable + (layer.offset is not None), length + 1))
    return before


def _stored(layer: Layer, before: int | None, channels: int | None, dtype: str) -> dict[str, Any]:
    """A layer as the page keeps it: its geometry, and arrays of the kept channels."""
    groups = 1 if layer.offset is None else layer.offset.shape[-3]
    inputs, outputs = _kept(layer.inputs, groups, channels), _kept(layer.output, 1, channels)
    features, feature_groups, kernel = layer.output.shape[-1], layer.feature_group_count, layer.kernel
    if kernel is None:  # a DCNv3 or DCNv4 samples each channel by itself
        outputs, features, feature_groups = inputs, layer.inputs.shape[-1], layer.inputs.shape[-1]
    else:
        kernel = np.asarray(kernel)[..., outputs]
        kernel = kernel[..., inputs, :] if feature_groups == 1 else kernel
    arrays = {
        "x": layer.inputs[..., inputs],
        "kernel": kernel,
        "bias": None if layer.bias is None else layer.bias[outputs],
        "offset": None if layer.offset is None else layer.offset.reshape(*layer.offset.shape[:2], -1),
        "mask": None if layer.mask is None else layer.mask.reshape(*layer.mask.shape[:2], -1),
    }
    out = layer.output.shape[:-1]
    return {
        "name": layer.path or "the layer",
        "kind": _kind(layer),
        "before": before,
        "projects": layer.kernel is None,  # a DCNv3 or DCNv4, before and after it reads
        "spatial": layer.inputs.shape[:-1],
        "out": out,
        "window": layer.window,
        "strides": layer.strides,
        "pads": layer.padding,
        "dilation": layer.kernel_dilation,
        "modes": layer.padding_mode,
        "groups": groups,
        "featureGroups": feature_groups,
        "channels": layer.inputs.shape[-1],
        "features": features,
        "inputs": inputs.tolist(),
        "outputs": outputs.tolist(),
        **{name: pack(_finite(array, layer.path, name, dtype), dtype) for name, array in arrays.items()},
    }


def _kind(layer: Layer) -> str:
    """What the page calls a layer."""
    if layer.offset is None:
        return "plain"
    if layer.kernel is None:
        return "DCNv3 or DCNv4"
    return "deformable" if layer.mask is None else "modulated deformable"


def _kept(array: np.ndarray, groups: int, channels: int | None) -> np.ndarray:
    """The channels of `array` `(H, W, C)` to keep, in order: in each group those that vary the most."""
    width = array.shape[-1] // groups
    if channels is None or channels >= array.shape[-1]:
        return np.arange(array.shape[-1])
    spread = np.asarray(array, np.float64).std((0, 1)).reshape(groups, width)
    strongest = np.argsort(-spread, axis=1, kind="stable")[:, : max(1, channels // groups)]
    return np.sort((strongest + width * np.arange(groups)[:, None]).ravel())


def _finite(array: Any, path: str, name: str, dtype: str) -> np.ndarray | None:
    """The array in float32; raise if `dtype` cannot hold its values."""
    if array is None:
        return None
    array = np.asarray(array, np.float32)
    largest = np.abs(array, where=np.isfinite(array), out=np.zeros_like(array)).max(initial=0)
    if largest > np.finfo(dtype).max:
        raise ValueError(f'{name} of the layer {path} reaches {largest:.3g}, which float16 cannot hold; use "float32"')
    return array
