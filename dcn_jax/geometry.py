"""Window arithmetic: strides, padding, output sizes, and where each tap of a kernel lands.

All lengths are in pixels of the input map. Nothing here reads the map.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from dcn_jax._core import checks, dtypes

Padding = str | int | Sequence[int | tuple[int, int]]
Size = Any  # an int, or a symbolic dimension of `jax.export`

# What lies beyond the border of a map, by the names of `jnp.pad`.
PADDING_MODES = ("zeros", "edge", "wrap", "reflect", "symmetric")

# Paddings of Flax's Conv that also say what lies beyond the border.
_MODE_OF_PADDING = {"CIRCULAR": "wrap", "REFLECT": "reflect"}

# Other libraries' names of padding modes, and ours.
_OTHER_NAMES = {
    "border": 'torch\'s "border" is "edge"',
    "replicate": '"replicate" is "edge"',
    "constant": '"constant" is "zeros"',
    "circular": '"circular" is "wrap"',
    "reflection": 'torch\'s "reflection" is "reflect" with align_corners=True and "symmetric" without',
}


class Window(NamedTuple):
    """A convolution window over a map of given size; every option is written per axis."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[Size, Size], ...]
    spatial: tuple[Size, ...]
    out_spatial: tuple[Size, ...]
    padding_mode: tuple[str, ...]

    @property
    def rank(self) -> int:
        """How many spatial axes there are: n."""
        return len(self.size)

    @property
    def taps(self) -> int:
        """How many taps the window has: K."""
        return math.prod(self.size)

    def place(self, axis: int, index, tap):
        """Where tap `tap` of output `index` reads along `axis`, without an offset, in pixels."""
        return index * self.strides[axis] - int32(self.pads[axis][0]) + tap * self.dilation[axis]


def int32(size: Size) -> Any:
    """A size for int32 arithmetic: a symbolic one becomes an int32 array, an int stays as it is."""
    return jnp.asarray(size, jnp.int32) if is_symbolic_dim(size) else size


def resolve_window(
    size: Sequence[int],
    *,
    spatial: Sequence[int],
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    padding_mode: str | Sequence[str] = "zeros",
) -> Window:
    """Check a convolution's geometry over a map of size `spatial`, and write it per axis.

        out_spatial = (spatial + low + high - ((size - 1) · dilation + 1)) // strides + 1

    Args:
        size: the window's taps along each spatial axis.
        spatial: the map's pixels along each spatial axis; they may be symbolic.
        strides: pixels between neighbouring outputs; one for all axes, or one per axis.
        padding: "SAME", "SAME_LOWER" or "VALID" as XLA defines them, "CIRCULAR" or "REFLECT" as
            Flax does, an int, or one int or (low, high) pair per axis. Negative padding crops.
        kernel_dilation: pixels between neighbouring taps; one for all axes, or one per axis.
        padding_mode: what lies beyond the border, one of `PADDING_MODES`, or one per axis.

    Returns:
        The `Window`.

    Raises:
        ValueError: an argument is malformed, or the window leaves no output position.
        TypeError: an argument is not made of ints.

    Example:
        >>> resolve_window((3, 3), spatial=(8, 8), strides=2).out_spatial
        (4, 4)
    """
    size, strides, dilation, named, modes = check_window(
        size, strides=strides, padding=padding, kernel_dilation=kernel_dilation, padding_mode=padding_mode
    )
    spatial = checks.sizes("spatial", spatial, len(size))
    extent = tuple((k - 1) * d + 1 for k, d in zip(size, dilation, strict=True))
    pads = _pads(named, spatial, extent, strides)
    out_spatial = _out_spatial(spatial, extent, strides, named, pads)
    if any(isinstance(positions, int) and positions < 1 for positions in out_spatial):
        raise ValueError(
            f"the output has no positions: a window of extent {extent} (size {size}, kernel_dilation {dilation}) does "
            f"not fit in a map of size {spatial} with padding {pads}; pad more, or use a smaller kernel or dilation"
        )
    return Window(size, strides, dilation, pads, spatial, out_spatial, modes)


def check_window(
    size: Sequence[int],
    *,
    strides: int | Sequence[int] | None,
    padding: Padding,
    kernel_dilation: int | Sequence[int] | None,
    padding_mode: str | Sequence[str] = "zeros",
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str | tuple, tuple[str, ...]]:
    """Size, strides, dilation, padding and padding mode, checked and per axis: all that needs no map."""
    if not isinstance(size, Sequence):
        raise TypeError(f"window={size!r} is a {type(size).__name__}; wanted 1, 2 or 3 ints, one per spatial axis")
    if len(size) not in (1, 2, 3):
        raise ValueError(f"window={size!r} has {len(size)} entries; wanted 1, 2 or 3 ints, one per spatial axis")
    rank = len(size)
    size = checks.per_axis("window", size, rank, minimum=1)
    # None is 1 everywhere, as in Flax.
    strides = checks.per_axis("strides", 1 if strides is None else strides, rank, minimum=1)
    dilation = checks.per_axis("kernel_dilation", 1 if kernel_dilation is None else kernel_dilation, rank, minimum=1)
    named = canonical_padding(padding, rank)
    return size, strides, dilation, named, canonical_padding_mode(padding_mode, rank, named)


def _pads(padding: str | tuple, spatial, extent, strides) -> tuple[tuple[Size, Size], ...]:
    """One (low, high) pair per axis, from what `canonical_padding` returns."""
    if not isinstance(padding, str):
        return padding
    if padding in _MODE_OF_PADDING:  # the same for every stride, as in Flax
        return tuple(((e - 1) // 2, e // 2) for e in extent)
    pads = lax.padtype_to_pads(spatial, extent, strides, padding)
    return tuple((_plain_int(low), _plain_int(high)) for low, high in pads)


def _plain_int(size: Size) -> Size:
    return size if is_symbolic_dim(size) else int(size)


def _out_spatial(spatial, extent, strides, padding, pads) -> tuple[Size, ...]:
    """The sizes of the result. Symbolic ones compare equal to those of a plain convolution."""
    if not any(map(is_symbolic_dim, spatial)):
        sizes = zip(spatial, pads, extent, strides, strict=True)
        return tuple((s + low + high - e) // stride + 1 for s, (low, high), e, stride in sizes)
    axes = "HWD"[: len(spatial)]
    x, kernel = jax.ShapeDtypeStruct((1, *spatial, 1), jnp.float32), jax.ShapeDtypeStruct((*extent, 1, 1), jnp.float32)
    dense = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding if padding in ("SAME", "SAME_LOWER", "VALID") else pads,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )
    return jax.eval_shape(dense, x, kernel).shape[1:-1]


def canonical_padding(padding: Padding, rank: int) -> str | tuple[tuple[int, int], ...]:
    """`padding`, checked, as a name in capitals or as one (low, high) pair per axis."""
    wanted = f'"SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", an int, {rank} ints or {rank} (low, high) pairs'
    if isinstance(padding, str):
        name = padding.upper()
        if name == "CAUSAL":
            raise ValueError(
                f"padding={padding!r} has no meaning in a deformable convolution: an offset may read later positions, "
                "so the result is not causal; for the same border use padding=((kernel_dilation * (K - 1), 0),)"
            )
        if name not in ("SAME", "SAME_LOWER", "VALID", *_MODE_OF_PADDING):
            raise ValueError(f"padding={padding!r} is not known; wanted {wanted}")
        return name
    per_axis: Any = [padding] * rank if checks.is_int(padding) else padding
    if not isinstance(per_axis, Sequence):
        raise TypeError(f"padding={padding!r} is a {type(padding).__name__}; wanted {wanted}")
    pairs = [tuple(p) if isinstance(p, Sequence) else (p, p) for p in per_axis]
    if not all(checks.is_int(pad) for pair in pairs for pad in pair):
        raise TypeError(f"padding={padding!r} is not made of ints; wanted {wanted}")
    if len(pairs) != rank or not all(len(pair) == 2 for pair in pairs):
        raise ValueError(f"padding={padding!r} does not fit {rank} spatial axes; wanted {wanted}")
    return tuple((int(low), int(high)) for low, high in pairs)


def canonical_padding_mode(padding_mode: str | Sequence[str], rank: int, padding: Any = None) -> tuple[str, ...]:
    """`padding_mode`, checked, as one name per axis; a padding of "CIRCULAR" or "REFLECT" sets it."""
    modes = (padding_mode,) * rank if isinstance(padding_mode, str) else padding_mode
    if not isinstance(modes, Sequence) or not all(isinstance(mode, str) for mode in modes):
        raise TypeError(
            f"padding_mode={padding_mode!r} is a {type(padding_mode).__name__}; wanted one of {PADDING_MODES}, or a "
            "sequence of one for each spatial axis"
        )
    for mode in modes:
        if mode not in PADDING_MODES:
            cure = f" ({_OTHER_NAMES[mode]})" if mode in _OTHER_NAMES else ""
            raise ValueError(f"padding_mode={mode!r} is not known; wanted one of {PADDING_MODES}{cure}")
    if len(modes) != rank:
        raise ValueError(
            f"padding_mode={padding_mode!r} has {len(modes)} entries; wanted one name, or {rank}, one per spatial axis"
        )
    said = _MODE_OF_PADDING.get(padding) if isinstance(padding, str) else None
    if said is None:
        return tuple(modes)
    if tuple(modes) not in (("zeros",) * rank, (said,) * rank):
        raise ValueError(
            f"padding={padding!r} means padding_mode={said!r}, and padding_mode={padding_mode!r} was given; leave it "
            "out, or pass padding as ints"
        )
    return (said,) * rank


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

    p0 is the output position, tap(n) the tap's place in the window (row-major), and low the
    padding before the map. Pixel centres are at whole numbers; the first is at 0.

    Args:
        offset: `(*batch, *out_spatial, OG * K * n)` in pixels, any float dtype. The last axis is
            ordered [offset group, tap, axis], first axis first, as in torchvision and mmcv.
        window: the kernel's size along each of the n spatial axes; K is its product.
        strides: pixels between neighbouring outputs; one for all axes, or one per axis.
        padding: "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", an int, or one int or pair per axis.
        kernel_dilation: pixels between neighbouring taps; one for all axes, or one per axis.
        spatial: the input map's size along each spatial axis; it may be symbolic.

    Returns:
        `(*batch, *out_spatial, OG, K, n)`, in float32 or the dtype of `offset` if that is wider. A
        position is rounded to that dtype (in float32 to 1/16 pixel at position 1,000,000).
        `deform_conv` computes without this rounding.

    Raises:
        ValueError: the shape of `offset` does not fit the window, or there is no output position.
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
    offset = checks.array("offset", offset, jnp.floating)
    check_offset_shape(offset.shape, resolved)
    return place_taps(offset, resolved, dtypes.wide(offset.dtype))


def check_offset_shape(shape: tuple[int, ...], window: Window) -> int:
    """OG, from the shape of `offset`; raise if it is not `(*batch, *out_spatial, OG * K * n)`."""
    rank, per_group = len(window.size), window.taps * len(window.size)
    if len(shape) < rank + 1 or shape[-rank - 1 : -1] != window.out_spatial or shape[-1] == 0 or shape[-1] % per_group:
        problem = (
            f"offset has shape {shape}; wanted (*batch, {', '.join(map(str, window.out_spatial))}, OG * {per_group}): "
            f"the output positions, then K * n = {window.taps} * {rank} values for each offset group"
        )
        if len(shape) > rank and shape[-rank:] == window.out_spatial and shape[-rank - 1] % per_group == 0:
            problem += "; it looks channels-first: move its channel axis last"
        elif shape[-rank - 1 : -1] == window.out_spatial and shape[-1] and shape[-1] % (per_group + window.taps) == 0:
            offsets = shape[-1] // (per_group + window.taps) * per_group
            problem += f"; {shape[-1]} is what a branch emits: give [..., :{offsets}] as offset, and as mask the sigmoid of the rest"
        raise ValueError(problem)
    return shape[-1] // per_group


def place_taps(offset: jax.Array, window: Window, dtype: jnp.dtype) -> jax.Array:
    """`sampling_points` over a window, computed in `dtype`."""
    groups = offset.shape[-1] // (window.taps * window.rank)
    offset = offset.reshape(*offset.shape[:-1], groups, window.taps, window.rank).astype(dtype)
    taps = lax.expand_dims(regular_taps(window), range(window.rank + 1))
    regular = regular_positions(window)[..., None, None, :] + taps  # (*out_spatial, 1, K, n)
    return lax.expand_dims(regular.astype(dtype), range(offset.ndim - regular.ndim)) + offset


def regular_positions(window: Window) -> jax.Array:
    """Where the first tap of each output reads, without an offset: int32 `(*out_spatial, n)`."""
    # Iotas, not constants: a constant of the map's size would be stored in the program.
    iotas = [lax.broadcasted_iota(jnp.int32, window.out_spatial, axis) for axis in range(window.rank)]
    return jnp.stack([window.place(axis, index, 0) for axis, index in enumerate(iotas)], axis=-1)


def regular_taps(window: Window) -> jax.Array:
    """The distance from the first tap to each tap: `(K, n)`, in int32."""
    iotas = [lax.broadcasted_iota(jnp.int32, window.size, axis) for axis in range(window.rank)]
    taps = [dilation * index for dilation, index in zip(window.dilation, iotas, strict=True)]
    return jnp.stack(taps, axis=-1).reshape(window.taps, window.rank)
