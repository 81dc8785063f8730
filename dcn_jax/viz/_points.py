"""Where in a map the points beyond its border read."""

from collections.abc import Callable, Sequence

import numpy as np


def into_map(points: np.ndarray, spatial: Sequence[int], padding_mode: Sequence[str]) -> np.ndarray:
    """Points `(…, n)`, in pixels, brought to where they read. With "zeros" they stay: outside there is nothing."""
    axes = zip(spatial, padding_mode, strict=True)
    return np.stack([_FOLD[mode](points[..., axis], size) for axis, (size, mode) in enumerate(axes)], axis=-1)


def _reflect(position: np.ndarray, size: int) -> np.ndarray:
    if size == 1:
        return 0 * position
    position = np.mod(position, 2 * size - 2)
    return np.minimum(position, 2 * size - 2 - position)


def _symmetric(position: np.ndarray, size: int) -> np.ndarray:
    position = np.mod(position + 0.5, 2 * size)  # from the map's edge
    return np.clip(np.minimum(position, 2 * size - position) - 0.5, 0, size - 1)


_FOLD: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "zeros": lambda position, size: position,
    "edge": lambda position, size: np.clip(position, 0, size - 1),
    "wrap": np.mod,
    "reflect": _reflect,
    "symmetric": _symmetric,
}
