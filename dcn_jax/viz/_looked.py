"""What each layer of a model saw and did, when the model looked at one image."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from dcn_jax._core.checks import is_int
from dcn_jax._layers import dcn
from dcn_jax._layers.ms_deform_attn import points_per_level
from dcn_jax._layers.offset_conv import window_size
from dcn_jax.geometry import Window, resolve_window
from dcn_jax.ops import dcnv3, dcnv4
from dcn_jax.ops.ms_deform_attn.call import check_spatial_shapes
from dcn_jax.viz import _calls
from dcn_jax.viz._wiring import sources


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One call of a layer: the arrays that it read and made, as NumPy arrays without a batch axis, and its geometry.

    A "deform_conv" or a "conv" has a window and a kernel; only a "deform_conv" has an offset, and only
    if it is modulated a mask. A "dcn" (DCNv3, DCNv4) has a window, an offset and a mask in the orders of
    a "deform_conv", and no kernel; a tap that it leaves out has an offset of inf. An "attention" has
    locations and weights instead.
    """

    path: str  # the layer's place in the model, names joined by "."
    kind: str  # "deform_conv", "conv", "dcn" or "attention"
    inputs: np.ndarray  # (*spatial, C), the map that it read; of an attention (S, E), all levels
    output: np.ndarray  # (*out, features); of an attention (Q, E)
    kernel: np.ndarray | None = None  # (*window, C // feature_group_count, features)
    bias: np.ndarray | None = None  # (features,)
    window: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()  # (low, high) for each axis
    kernel_dilation: tuple[int, ...] = ()
    padding_mode: tuple[str, ...] = ()
    feature_group_count: int = 1
    offset: np.ndarray | None = None  # (*out, OG, K, n), in pixels of inputs, as used
    mask: np.ndarray | None = None  # (*out, OG, K), as used
    locations: np.ndarray | None = None  # (Q, M, L, P, 2), (x, y) in [0, 1] inside a map
    weights: np.ndarray | None = None  # (Q, M, L, P)
    spatial_shapes: tuple[tuple[int, int], ...] = ()  # (height, width) of each level
    points_per_level: tuple[int, ...] = ()  # of each level; if they differ, L and P are one axis in the arrays above
    index: int | None = None  # the layer's place among those that `looked` returned
    reads: tuple[int, ...] | None = None  # the places of the layers whose results it reads; None if that is not known

    @property
    def spatial(self) -> tuple[int, ...]:
        """The size of the map that a convolution read."""
        return self.inputs.shape[:-1]

    @property
    def points(self) -> np.ndarray:
        """Where the taps of a convolution read, in pixels of its map: `(*out, OG, K, n)`, in float64."""
        first = _grid(self.output.shape[:-1]) * self.strides - np.array(self.padding)[:, 0]  # (*out, n)
        taps = _grid(self.window).reshape(-1, len(self.window)) * self.kernel_dilation  # (K, n)
        regular = first[..., None, None, :] + taps.astype(float)
        return regular if self.offset is None else regular + self.offset.astype(float)

    def __repr__(self) -> str:
        """The shapes alone."""
        return f"Layer({self.path!r}, {self.kind!r}, {self.inputs.shape} -> {self.output.shape})"


def _grid(sizes: tuple[int, ...]) -> np.ndarray:
    """The index of each place: `(*sizes, n)`."""
    return np.moveaxis(np.indices(sizes), 0, -1)


def looked(model: Any, x: Any, *, call: Callable[..., Any] | None = None) -> list[Layer]:
    """Run a model on one image, and return what each of its layers read, used and made.

    Watched are this library's `DeformConv`, `DCNv3`, `DCNv4` and `MSDeformAttn` and Flax's `Conv`, of
    linen and of nnx, in the order of their calls; a layer that is called twice is there twice. What
    runs inside one of them, such as the convolution that emits the offsets, is left out.

    The model stays as it is. It runs as it would anyway: layers may be called under `jax.jit`,
    `jax.checkpoint` or a scan. For what an evaluation shows (dropout off, the batch norm's
    averages) put the model into that mode before, or by `call`.

    Args:
        model: an `nnx.Module`, or a pair (linen module, variables).
        x: one image `(H, W, C)` (or `(W, C)`, `(D, H, W, C)`), floating-point.
        call: how to call the model with a batch of one, if it is not `model(images)`:
            `lambda model, images: model(images, train=False)`. In linen `model` is the bound module.

    Returns:
        A list of `Layer`.

    Raises:
        ValueError: a layer saw a batch of more than one, or has an `input_dilation`.
        TypeError: `model` or `x` is of the wrong kind.
        ImportError: Flax is not installed.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DeformConv
        >>> from dcn_jax.viz import looked
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), 2, rngs=rngs), DeformConv(8, 8, (3, 3), rngs=rngs))
        >>> looked(model, jnp.ones((16, 16, 3)))
        [Layer('layers.0', 'conv', (16, 16, 3) -> (8, 8, 8)), Layer('layers.1', 'deform_conv', (8, 8, 8) -> (8, 8, 8))]
    """
    images = _calls.batch_of_one(x)
    seen: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def around(call: _calls.Call) -> Any:
        output, sown = call.run(*call.args, **call.kwargs)
        arrays, described = _READ[call.kind](call, output, sown)
        _when_known(lambda arrays: seen.append((described, arrays)), arrays)
        return output

    _calls.run(model, images, around, call)
    jax.effects_barrier()
    found = sources(model, images, call)
    if found is None or len(found) != len(seen):
        found = [None] * len(seen)
    return [
        Layer(
            **described,
            **jax.tree.map(np.asarray, arrays),
            index=index,
            reads=reads,
        )
        for index, ((described, arrays), reads) in enumerate(zip(seen, found, strict=True))
    ]


def _when_known(use: Callable[[Any], None], arrays: Any) -> None:
    """Call `use` with the arrays' values, in the order of the computation: under jit, once they are computed."""
    if any(isinstance(array, Tracer) for array in jax.tree.leaves(arrays)):
        jax.debug.callback(use, arrays, ordered=True)
    else:
        jax.effects_barrier()  # those of earlier layers come first
        use(arrays)


def _convolution(call: _calls.Call, output: Any, sown: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a convolution's `Layer`, which may be tracers, and its other fields."""
    layer, inputs = call.layer, call.argument(*_calls.MAP[call.kind])
    window = _window(call.path, layer, inputs)
    offset, mask = sown.get("offset"), sown.get("mask")
    if call.kind == "deform_conv" and offset is None:
        raise ValueError(
            f"the layer {call.path} sowed no offset, because a transformation around it drops what layers sow; give "
            'nn.scan or nn.vmap the argument variable_axes={…, "intermediates": 0}'
        )
    points = (*window.out_spatial, -1, window.taps)  # (*out, OG, K)
    arrays = {
        "inputs": _without_batch(call.path, "inputs", inputs, window.rank + 1),
        "output": _without_batch(call.path, "output", output, window.rank + 1),
        "kernel": call.parameter("kernel"),
        "bias": call.parameter("bias"),
        "offset": None if offset is None else offset.reshape(*points, window.rank),
        "mask": None if mask is None else mask.reshape(points),
    }
    if (zeroed := getattr(layer, "mask", None)) is not None:  # Flax's Conv: which weights count
        arrays["kernel"] = arrays["kernel"] * zeroed
    return arrays, {
        "path": call.path,
        "kind": call.kind,
        "feature_group_count": layer.feature_group_count,
        **_geometry(window),
    }


def _dcn(call: _calls.Call, output: Any, made: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of the `Layer` of a DCNv3 or DCNv4, which may be tracers, and its other fields."""
    inputs = call.argument(*_calls.MAP[call.kind])
    grid = dcnv3.make_grid(inputs.shape, **dcn.op_options(call.layer))
    if "offset_mask" in made:
        offset, mask = dcnv4.unpack(made["offset_mask"], call.layer.group, grid.taps)
    else:
        offset, mask = made["offset"], dcn.softmax(made["mask"], call.layer.group)
    offset, mask = dcnv3.as_deform_conv(grid, offset, mask)
    points = (*grid.window.out_spatial, call.layer.group, grid.window.taps)
    return {
        "inputs": _without_batch(call.path, "inputs", inputs, 3),
        "output": _without_batch(call.path, "output", output, 3),
        "offset": offset.reshape(*points, 2),
        "mask": mask.reshape(points),
    }, {"path": call.path, "kind": call.kind, **_geometry(grid.window)}


def _geometry(window: Window) -> dict[str, Any]:
    """The window of a `Layer`."""
    return {
        "window": window.size,
        "strides": window.strides,
        "padding": window.pads,
        "kernel_dilation": window.dilation,
        "padding_mode": window.padding_mode,
    }


def _window(path: str, layer: Any, inputs: Any) -> Window:
    """The window of a convolution over its input."""
    size = window_size(layer.kernel_size)
    if any(dilation != 1 for dilation in jax.tree.leaves(getattr(layer, "input_dilation", 1))):
        raise ValueError(
            f"the layer {path} has input_dilation={layer.input_dilation!r}: it reads between pixels that do not exist, "
            "which no picture can show; look at the part of the model without it"
        )
    padding = layer.padding
    if isinstance(padding, str) and padding.upper() == "CAUSAL":  # of Flax's Conv, with one axis
        padding = [((size[0] - 1) * (layer.kernel_dilation or 1), 0)]
    return resolve_window(
        size,
        spatial=inputs.shape[-len(size) - 1 : -1],
        strides=layer.strides,
        padding=padding,
        kernel_dilation=layer.kernel_dilation,
        padding_mode=getattr(layer, "padding_mode", "zeros"),
    )


def _attention(call: _calls.Call, output: Any, sown: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of an attention's `Layer`, which may be tracers, and its other fields."""
    axes = 4 if is_int(call.layer.num_points) else 3  # (Q, M, L, P) or (Q, M, P1 + P2 + …)
    arrays = {
        "inputs": _without_batch(call.path, "value", call.argument(*_calls.MAP[call.kind]), 2),
        "output": _without_batch(call.path, "output", output, 2),
        "locations": _without_batch(call.path, "locations", sown["sampling_locations"], axes + 1),
        "weights": _without_batch(call.path, "weights", sown["sampling_weights"], axes),
    }
    return arrays, {
        "path": call.path,
        "kind": call.kind,
        "spatial_shapes": check_spatial_shapes(call.argument(3, "spatial_shapes")),
        "points_per_level": points_per_level(call.layer),
    }


_READ = {"deform_conv": _convolution, "conv": _convolution, "dcn": _dcn, "attention": _attention}


def _without_batch(path: str, name: str, array: Any, axes: int) -> Any:
    """The array with its last `axes` axes alone."""
    batch = array.shape[: array.ndim - axes]
    if math.prod(batch) != 1:
        raise ValueError(
            f"{name} of the layer {path} has shape {array.shape}, which is a batch of {math.prod(batch)}; wanted one "
            "image throughout: the model may cut the image up or repeat it before this layer"
        )
    return array.reshape(array.shape[len(batch) :])
