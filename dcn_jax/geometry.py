"""Window arithmetic: strides, padding, output sizes, and where each tap of a kernel lands.

Everything here is counted in pixels of the input map; nothing reads the map itself.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax import _check, _numerics

Padding = str | int | Sequence[int | tuple[int, int]]

# Paddings that Flax's Conv takes and that a deformable convolution cannot honour, and what to do instead.
_REFUSED_PADDINGS = {
    "CIRCULAR": 'an offset may leave any finite border, so the map would not be periodic; pad x with jnp.pad(x, …, mode="wrap") and use "VALID"',
    "REFLECT": 'an offset may leave any finite border; pad x with jnp.pad(x, …, mode="reflect") and use "VALID"',
    "CAUSAL": "an offset may read the future, so nothing would be causal; for the same border use padding=((kernel_dilation * (K - 1), 0),)",
}


class Window(NamedTuple):
    """A convolution window over a map of known size, every option spelled out per spatial axis."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    spatial: tuple[int, ...]
    out_spatial: tuple[int, ...]

    @property
    def rank(self) -> int:
        """How many spatial axes there are: n."""
        return len(self.size)

    @property
    def taps(self) -> int:
        """How many taps the window has: K."""
        return math.prod(self.size)

    def place(self, axis: int, index, tap):
        """Where the `tap`-th tap along an axis reads for the `index`-th output along it, before any offset, in pixels."""
        return index * self.strides[axis] - self.pads[axis][0] + tap * self.dilation[axis]


def resolve_window(
    size: Sequence[int],
    *,
    spatial: Sequence[int],
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
) -> Window:
    """Spell out a convolution's geometry over a map of size `spatial`, and check it.

        out_spatial = (spatial + low + high - ((size - 1) · dilation + 1)) // strides + 1

    Args:
        size: the window's taps along each spatial axis.
        spatial: the map's pixels along each spatial axis.
        strides: pixels between neighbouring outputs; one for all axes, or one per axis.
        padding: "SAME", "SAME_LOWER" or "VALID" as XLA defines them, an int, one int per axis, or one (low, high) pair
            per axis. Negative padding crops.
        kernel_dilation: pixels between neighbouring taps; one for all axes, or one per axis.

    Returns:
        The `Window`.

    Raises:
        ValueError: an argument is malformed, or the window leaves no output position.
        TypeError: an argument is not made of ints.

    Example:
        >>> resolve_window((3, 3), spatial=(8, 8), strides=2).out_spatial
        (4, 4)
    """
    if not isinstance(size, Sequence):
        raise TypeError(f"window={size!r} is a {type(size).__name__}; wanted 1, 2 or 3 ints, one per spatial axis")
    if len(size) not in (1, 2, 3):
        raise ValueError(f"window={size!r} has {len(size)} entries; wanted 1, 2 or 3 ints, one per spatial axis")
    size = _check.per_axis("window", size, len(size), minimum=1)
    spatial = _check.per_axis("spatial", spatial, len(size), minimum=1)
    # None is 1 everywhere, as in Flax.
    strides = _check.per_axis("strides", 1 if strides is None else strides, len(size), minimum=1)
    dilation = _check.per_axis(
        "kernel_dilation", 1 if kernel_dilation is None else kernel_dilation, len(size), minimum=1
    )
    extent = tuple((k - 1) * d + 1 for k, d in zip(size, dilation, strict=True))
    pads = canonical_padding(padding, len(size))
    if isinstance(pads, str):
        pads = tuple((int(low), int(high)) for low, high in lax.padtype_to_pads(spatial, extent, strides, pads))
    out_spatial = tuple(
        (s + low + high - e) // stride + 1
        for s, (low, high), e, stride in zip(spatial, pads, extent, strides, strict=True)
    )
    if min(out_spatial) < 1:
        raise ValueError(
            f"the output has no positions: a window of extent {extent} (size {size}, kernel_dilation {dilation}) does "
            f"not fit in a map of size {spatial} with padding {pads}; pad more, or use a smaller kernel or dilation"
        )
    return Window(size, strides, dilation, pads, spatial, out_spatial)


def canonical_padding(padding: Padding, rank: int) -> str | tuple[tuple[int, int], ...]:
    """Check `padding` and write it as "SAME", "SAME_LOWER", "VALID" or one (low, high) pair per axis."""
    wanted = f'"SAME", "SAME_LOWER", "VALID", an int, {rank} ints or {rank} (low, high) pairs'
    if isinstance(padding, str):
        name = padding.upper()
        if name in _REFUSED_PADDINGS:
            raise ValueError(
                f"padding={padding!r} has no meaning in a deformable convolution: {_REFUSED_PADDINGS[name]}"
            )
        if name not in ("SAME", "SAME_LOWER", "VALID"):
            raise ValueError(f"padding={padding!r} is not known; wanted {wanted}")
        return name
    per_axis: Any = [padding] * rank if _check.is_int(padding) else padding
    if not isinstance(per_axis, Sequence):
        raise TypeError(f"padding={padding!r} is a {type(padding).__name__}; wanted {wanted}")
    pairs = [tuple(p) if isinstance(p, Sequence) else (p, p) for p in per_axis]
    if not all(_check.is_int(pad) for pair in pairs for pad in pair):
        raise TypeError(f"padding={padding!r} is not made of ints; wanted {wanted}")
    if len(pairs) != rank or not all(len(pair) == 2 for pair in pairs):
        raise ValueError(f"padding={padding!r} does not fit {rank} spatial axes; wanted {wanted}")
    return tuple((int(low), int(high)) for low, high in pairs)


def sampling_points(
    offset: jax.Array,
    window: Sequence[int],
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    spatial: Sequence[int],
) -> jax.Array:
    """Where each tap of a deformable convolution reads, in pixels of its input map.

        point(p0, n) = p0 · stride - low + tap(n) · dilation + offset(p0, n)

    with p0 the output position, tap(n) the tap's place in the window (row-major) and low the padding before the map.
    Pixel centres are at whole numbers, the first one at 0.

    Args:
        offset: `(*batch, *out_spatial, OG * K * n)` in pixels, any float dtype; the last axis is ordered
            [offset group, tap, axis], first spatial axis first, as in torchvision and mmcv.
        window: the kernel's size along each of the n spatial axes; K is its product.
        strides: pixels between neighbouring outputs; one for all axes, or one per axis.
        padding: "SAME", "VALID", an int, one int per axis, or one (low, high) pair per axis.
        kernel_dilation: pixels between neighbouring taps; one for all axes, or one per axis.
        spatial: the input map's size along each spatial axis.

    Returns:
        `(*batch, *out_spatial, OG, K, n)`, in float32 or the dtype of `offset` if that is wider.

    Raises:
        ValueError: the shape of `offset` does not fit the window, or the geometry leaves no output position.
        TypeError: `offset` is not a floating-point array.

    Source: Dai et al., Deformable Convolutional Networks (arXiv 1703.06211), equation 2.

    Example:
        >>> import jax.numpy as jnp
        >>> points = sampling_points(jnp.zeros((5, 5, 18)), (3, 3), spatial=(5, 5))
        >>> points.shape
        (5, 5, 1, 9, 2)
        >>> points[2, 2, 0, 0]  # the first tap reads one pixel up and one to the left
        Array([1., 1.], dtype=float32)
    """
    resolved = resolve_window(
        window, spatial=spatial, strides=strides, padding=padding, kernel_dilation=kernel_dilation
    )
    offset = _check.array("offset", offset, jnp.floating)
    check_offset_shape(offset.shape, resolved)
    return place_taps(offset, resolved, _numerics.wide(offset.dtype))


def check_offset_shape(shape: tuple[int, ...], window: Window) -> int:
    """Check the shape of `offset`, `(*batch, *out_spatial, OG * K * n)`, against a window; return OG."""
    rank, per_group = len(window.size), window.taps * len(window.size)
    if len(shape) < rank + 1 or shape[-rank - 1 : -1] != window.out_spatial or shape[-1] == 0 or shape[-1] % per_group:
        problem = (
            f"offset has shape {shape}; wanted (*batch, {', '.join(map(str, window.out_spatial))}, OG * {per_group}): "
            f"the output positions, then K * n = {window.taps} * {rank} values for each offset group"
        )
        if len(shape) > rank and shape[-rank:] == window.out_spatial and shape[-rank - 1] % per_group == 0:
            problem += "; it looks channels-first: move its channel axis last"
        raise ValueError(problem)
    return shape[-1] // per_group


def place_taps(offset: jax.Array, window: Window, dtype: jnp.dtype) -> jax.Array:
    """`sampling_points` over a resolved window, computed in `dtype`."""
    rank = len(window.size)
    groups = offset.shape[-1] // (window.taps * rank)
    offset = offset.reshape(*offset.shape[:-1], groups, window.taps, rank).astype(dtype)
    # Iotas, not constants: XLA computes them where they are used, and nothing of the map's size is stored in the program.
    grid = (*window.out_spatial, *window.size)
    regular = jnp.stack(
        [
            window.place(a, lax.broadcasted_iota(dtype, grid, a), lax.broadcasted_iota(dtype, grid, rank + a))
            for a in range(rank)
        ],
        axis=-1,
    ).reshape(*window.out_spatial, 1, window.taps, rank)
    return lax.expand_dims(regular, range(offset.ndim - regular.ndim)) + offset
