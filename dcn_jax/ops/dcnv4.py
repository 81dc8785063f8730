"""DCNv4: DCNv3's op, with offsets and weights packed into one array."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dcn_jax._core import checks
from dcn_jax.geometry import Padding
from dcn_jax.ops.dcnv3 import check_map, check_points, make_grid, run


def dcnv4(
    x: jax.Array,
    offset_mask: jax.Array,
    *,
    groups: int,
    window: int | Sequence[int] = (3, 3),
    strides: int | Sequence[int] | None = 1,
    padding: Padding = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> jax.Array:
    """Sum each channel over taps with learned, fractional offsets and learned weights: DCNv4.

        y(p0, c) = Σ_k  m_k · x(p0 + s · (p_k + Δp_k), c)    p0 = output · stride - padding + centre

    The same as `dcnv3`, which explains the letters, with Δp and m packed into one array. Neither
    the op nor DCNv4's layer takes a softmax.

    Args:
        x: `(*batch, H, W, C)`; any number of leading batch axes, none included.
        offset_mask: `(*batch, Ho, Wo, at least G * K * 3)`, any float dtype. Each group has K
            offsets (x, y), in pixels of x before they are scaled, then K weights of any sign; taps
            run down the columns of the window. Channels after the last group are ignored (the
            published layer pads to a multiple of 8). Batch axes may be 1 or missing: then images
            share the offsets.
        groups: G, groups of channels; each has offsets and weights of its own. It divides C.
        window: taps along (height, width); an int is a square.
        strides: pixels between neighbouring outputs; one for both axes, or one per axis.
        padding: an int, one int or (low, high) pair per axis, or a name as in `deform_conv`.
        kernel_dilation: pixels between neighbouring taps; one for both axes, or one per axis.
        offset_scale: s, by which taps and offsets are stretched about the centre of the window.
        remove_center: leaves out the middle tap of the window, whose sizes must be odd.

    Returns:
        `(*batch, Ho, Wo, C)`, in the dtype of x; positions and sums are float32 or wider.

    Raises:
        ValueError: a shape or an option does not fit; the message names it.
        TypeError: an argument is of the wrong kind.

    Derivatives, infinite and NaN offsets, and symbolic sizes are as in `deform_conv`.

    Source: Xiong et al., DCNv4 (arXiv 2401.06197); the orders of its published code.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 32))
        >>> offset_mask = jnp.ones((2, 8, 8, 112))  # 4 groups of 9 taps make 108 channels; 4 more are ignored
        >>> dcnv4(x, offset_mask, groups=4).shape
        (2, 8, 8, 32)
    """
    x = check_map(x)
    grid = make_grid(
        x.shape,
        window=window,
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        offset_scale=offset_scale,
        remove_center=remove_center,
    )
    checks.count("groups", groups)
    if x.shape[-1] % groups:
        raise ValueError(f"groups={groups} must divide the {x.shape[-1]} channels of x")
    packed = checks.array("offset_mask", offset_mask, jnp.floating)
    used, taps = groups * grid.taps * 3, grid.taps
    meaning = f"K * 3 = {taps} * 3 values for each of the {groups} groups: {taps} offsets (x, y), then {taps} weights"
    fits = packed.ndim > 0 and packed.shape[-1] >= used
    check_points("offset_mask", packed, x, grid, f"at least {used}", meaning, fits=fits)

    return run(grid, x, *unpack(packed, groups, taps))


def unpack(packed: jax.Array, groups: int, taps: int) -> tuple[jax.Array, jax.Array]:
    """Offsets `(…, G * K * 2)` and weights `(…, G * K)`, in DCNv3's orders, from DCNv4's packed one."""
    positions = packed.shape[:-1]
    packed = packed[..., : groups * taps * 3].reshape(*positions, groups, taps * 3)
    offset, mask = packed[..., : taps * 2], packed[..., taps * 2 :]
    return offset.reshape(*positions, groups * taps * 2), mask.reshape(*positions, groups * taps)
