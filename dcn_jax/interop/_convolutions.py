"""PyTorch's convolutions, plain and transposed: how their weights lie, and which paddings they have.

A transposed convolution is an `nnx.ConvTranspose`, or an `nnx.Conv` with an `input_dilation`, which
a port writes where it needs groups. Its stride is that dilation.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from dcn_jax.geometry import canonical_padding, canonical_padding_mode
from dcn_jax.interop._fill import Order, transposed

Pairs = tuple[tuple[int, int], ...]


def each_axis(value: int | Sequence[int] | None, rank: int) -> list[int]:
    """An option of Flax's convolutions, as one int per spatial axis."""
    return [1] * rank if value is None else [value] * rank if isinstance(value, int) else list(value)


def is_transposed(layer: Any) -> bool:
    """Whether PyTorch's counterpart of a layer is a transposed convolution."""
    dilated = isinstance(layer, nnx.Conv) and set(each_axis(layer.input_dilation, len(layer.kernel_size))) != {1}
    return dilated or isinstance(layer, nnx.ConvTranspose)


# ---- the order of a kernel


def kernel_order(layer: Any, rank: int) -> Order:
    """How PyTorch's weight lies: (out, in, *window), or of a transposed convolution (in, out, *window)."""
    if not is_transposed(layer) or getattr(layer, "transpose_kernel", False):
        return transposed((rank - 1, rank - 2, *range(rank - 2)))
    # Otherwise Flax's kernel slides over the dilated map, and PyTorch's weight is put down at each pixel.
    groups = getattr(layer, "feature_group_count", 1)
    return Order(functools.partial(_to_transposed, groups), functools.partial(_from_transposed, groups))


def _to_transposed(groups: int, kernel: np.ndarray) -> np.ndarray:
    """Flax's kernel (*window, in // groups, out) as PyTorch's weight (in, out // groups, *window)."""
    *window, channels, features = kernel.shape
    n = len(window)
    parts = np.flip(kernel, tuple(range(n))).reshape(*window, channels, groups, features // groups)
    return parts.transpose(n + 1, n, n + 2, *range(n)).reshape(groups * channels, features // groups, *window)


def _from_transposed(groups: int, weight: np.ndarray) -> np.ndarray:
    """`_to_transposed` reversed."""
    channels, features, *window = weight.shape
    n = len(window)
    parts = weight.reshape(groups, channels // groups, features, *window).transpose(*range(3, n + 3), 1, 0, 2)
    return np.flip(parts.reshape(*window, channels // groups, groups * features), tuple(range(n)))


# ---- paddings


def convolution_problems(name: str, layer: Any) -> list[str]:
    """Why PyTorch has no such convolution, if so, each reason as a sentence that begins with its name."""
    name = name or "the layer"
    masked = [
        f"{name} has a mask, and PyTorch's convolutions have none: multiply it into the kernel, and set mask to None"
    ]
    problems = masked if getattr(layer, "mask", None) is not None else []
    problem = _transposed_padding(layer) if is_transposed(layer) else _plain_padding(layer)
    return problems + ([f"{name} has {problem}"] if problem else [])


def _plain_padding(layer: Any) -> str | None:
    rank = len(layer.kernel_size)
    strides, extent = each_axis(layer.strides, rank), _extent(layer)
    if _named(layer, "CAUSAL"):
        return f"padding={layer.padding!r}, {_PADS_ALIKE}"
    if _named(layer, "SAME", "SAME_LOWER") and any(s > 1 and e > 1 for s, e in zip(strides, extent, strict=True)):
        pairs = tuple(((e - 1) // 2, (e - 1) // 2) for e in extent)
        return (
            f"padding={layer.padding!r} at strides {tuple(strides)}, which depends on the size of the map; PyTorch's "
            f"never does: make the layer with PyTorch's padding, usually padding={pairs}"
        )
    padding = canonical_padding(layer.padding, rank)
    modes = canonical_padding_mode(getattr(layer, "padding_mode", "zeros"), rank, padding)
    if not isinstance(layer, nnx.Conv) and set(modes) != {"zeros"}:
        return (
            f"padding_mode={modes}, and PyTorch's deformable convolutions read zeros outside the map: take a layer "
            'with padding_mode="zeros", and copy the parameters by nnx.update(layer, nnx.state(other))'
        )
    pads = padding if isinstance(padding, tuple) else _named_pads(padding, extent)
    same = all(s == 1 for s in strides) and pads == _named_pads("SAME", extent)  # PyTorch's padding="same"
    if same or all(low == high >= 0 for low, high in pads):
        return None
    return f"padding={layer.padding!r}, {_PADS_ALIKE}"


_PADS_ALIKE = (
    "and PyTorch's convolutions pad both sides alike: pad the map before the layer (jnp.pad, as F.pad there), and make "
    'the layer with padding="VALID"'
)


def _transposed_padding(layer: Any) -> str | None:
    rank, extent = len(layer.kernel_size), _extent(layer)
    dilated = isinstance(layer, nnx.Conv)
    steps = each_axis(layer.input_dilation if dilated else layer.strides, rank)
    if dilated and set(each_axis(layer.strides, rank)) != {1}:
        return f"strides={layer.strides!r} beside input_dilation={layer.input_dilation!r}; PyTorch has one or the other"
    if _named(layer, "CAUSAL", "CIRCULAR", "REFLECT"):
        return f"padding={layer.padding!r}, and PyTorch's transposed convolutions pad with zeros, by numbers"
    padding = canonical_padding(layer.padding, rank)
    pads = padding if isinstance(padding, tuple) else _named_pads(padding, extent)
    if isinstance(padding, str) and not dilated:
        pads = tuple(_conv_transpose_pads(padding, e, step) for e, step in zip(extent, steps, strict=True))
    dilation = each_axis(layer.kernel_dilation, rank)
    axes = zip(pads, extent, steps, dilation, strict=True)
    if all(low < e and 0 <= high - low < max(step, d, 1) for (low, high), e, step, d in axes):
        return None
    wanted = ", ".join(f"({e - 1} - p, {e - 1} - p + o)" for e in extent)
    return (
        f"padding={layer.padding!r}, which here is {pads}; a transposed convolution of PyTorch with padding=p and "
        f"output_padding=o pads ({wanted}), p at least 0 and o from 0 to below its stride: give the layer such pads"
    )


def _conv_transpose_pads(padding: str, extent: int, step: int) -> tuple[int, int]:
    """How `lax.conv_transpose` pads an axis."""
    if padding == "VALID":
        return extent - 1, max(extent, step) - 1
    low = extent - 1 if step > extent - 1 else -(-(extent + step - 2) // 2)
    return low, extent + step - 2 - low


def _extent(layer: Any) -> list[int]:
    """From the first pixel under the window to the last, along each axis."""
    dilation = each_axis(layer.kernel_dilation, len(layer.kernel_size))
    return [(size - 1) * step + 1 for size, step in zip(layer.kernel_size, dilation, strict=True)]


def _named(layer: Any, *names: str) -> bool:
    return isinstance(layer.padding, str) and layer.padding.upper() in names


def _named_pads(padding: str, extent: Sequence[int]) -> Pairs:
    """The pads of a named padding at strides of 1."""
    if padding == "VALID":
        return tuple((0, 0) for _ in extent)
    lower = padding == "SAME_LOWER"
    return tuple((e // 2, (e - 1) // 2) if lower else ((e - 1) // 2, e // 2) for e in extent)
