"""The orders of offset and mask channels in other libraries; conversion to ours and back."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dcn_jax._core import checks

# From our offset (OG, kh, kw, 2), with (y, x) last, and mask (OG, kh, kw) to theirs.
ORDERS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "torchvision": lambda offset, mask: (offset, mask),
    "all_y_all_x": lambda offset, mask: (np.moveaxis(offset, -1, 0), mask),
    "all_x_all_y": lambda offset, mask: (np.moveaxis(offset[..., ::-1], -1, 0), mask),
    "dcnv3": lambda offset, mask: (offset[..., ::-1].swapaxes(1, 2), mask.swapaxes(1, 2)),
    "dcnv4": lambda offset, mask: (offset[..., ::-1].swapaxes(1, 2), mask.swapaxes(1, 2)),
}


def reorder_offsets(
    array: Any, order: str, *, window: Sequence[int], offset_groups: int = 1, axis: int = -1, inverse: bool = False
) -> np.ndarray:
    """Reorder channels of offsets, masks or both, from another library's order to ours or back.

        ours[i] = array[theirs(i)]  along `axis`

    Ours is [offset group, tap, axis] with taps row by row and (y, x) for each, and [offset group,
    tap] for a mask; an array of both has the offsets first. It also takes the weights
    and bias of a convolution that emits them (in PyTorch along `axis=0`).

    | order | channels | used by |
    |---|---|---|
    | "torchvision" | ours | torchvision, mmcv, detectron2, Paddle, ONNX |
    | "all_y_all_x" | [y or x, group, tap], then [group, tap] | 4uiiurz1's pytorch-deform-conv-v2 |
    | "all_x_all_y" | [x or y, group, tap], then [group, tap] | MindSpore, Ascend's operators |
    | "dcnv3" | as ours, but (x, y) for each tap, and the taps column by column | DCNv3 |
    | "dcnv4" | as "dcnv3", each group's masks after its offsets, padded to a multiple of 8 | DCNv4 |

    Only the order changes: the `offset_scale` of DCNv3 and DCNv4 (1.0 by default) is not applied.

    Args:
        array: OG·K·2 channels of offsets, OG·K of masks, or OG·K·3 of both, along `axis`.
        order: that of the other library, from the table above.
        window: the kernel's (height, width); K is their product.
        offset_groups: OG, groups of channels; each group has offsets of its own.
        axis: which axis of `array` holds the channels.
        inverse: go from our order to theirs. The padding channels of "dcnv4" are then zero.

    Returns:
        A NumPy array of exactly these values, without the padding channels of DCNv4.

    Raises:
        ValueError: `order` is not known, or the channels do not fit `window` and `offset_groups`.
        TypeError: `window` or `offset_groups` is not made of ints.

    Source: the published code of these libraries.

    Example:
        >>> import numpy as np
        >>> offset = np.array([1, 2, 10, 20])  # y of both taps, then x of both
        >>> reorder_offsets(offset, "all_y_all_x", window=(1, 2))
        array([ 1, 10,  2, 20])
        >>> reorder_offsets(_, "all_y_all_x", window=(1, 2), inverse=True)
        array([ 1,  2, 10, 20])
    """
    array = np.asarray(array)
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not known; wanted one of {tuple(ORDERS)}")
    window = checks.per_axis("window", window, 2, minimum=1)
    checks.count("offset_groups", offset_groups)
    masks = offset_groups * math.prod(window)
    padded = -(-3 * masks // 8) * 8 if order == "dcnv4" else 3 * masks
    channels = array.shape[axis] if array.ndim else 0
    if channels not in (masks, 2 * masks, 3 * masks) and (channels != padded or inverse):
        raise ValueError(
            f"array has {channels} channels along axis {axis} of its shape {array.shape}; wanted, for window={window} "
            f"and offset_groups={offset_groups}, {2 * masks} (offsets), {masks} (masks) or {3 * masks} (both)"
        )
    theirs = _theirs(order, (offset_groups, *window), min(channels, 3 * masks))
    if not inverse:
        return array.take(np.argsort(theirs), axis)
    result = array.take(theirs, axis)
    if channels < 3 * masks:
        return result
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, padded - channels)
    return np.pad(result, widths)


def _theirs(order: str, shape: tuple[int, ...], channels: int) -> np.ndarray:
    """For each of their channels the index of ours; the array holds offsets, masks or both."""
    masks = math.prod(shape)
    first_mask = 0 if channels == masks else 2 * masks
    offset, mask = ORDERS[order](
        np.arange(2 * masks).reshape(*shape, 2), np.arange(first_mask, first_mask + masks).reshape(shape)
    )
    if channels < 3 * masks:
        return (mask if channels == masks else offset).ravel()
    groups = shape[0] if order == "dcnv4" else 1
    return np.concatenate([offset.reshape(groups, -1), mask.reshape(groups, -1)], axis=1).ravel()
