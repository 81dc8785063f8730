"""The picture of 10_find_digits.py: where the queries at the digits found look."""

from pathlib import Path
from typing import Any

import numpy as np
from digits_data import CANVAS
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

MARKERS = "os"  # of the points on the fine map, and on the coarse one


def draw(images: Any, peaks: Any, names: Any, locations: Any, weights: Any, path: Path) -> None:
    """Each canvas twice: as it is, with the names found, and with the points of the queries that found them.

    images `(B, 32, 32, 1)`, peaks `(B, 16, 16)` of bools, names `(B, 16, 16)`, and of the last attention layer
    locations `(B, Q, M, L, P, 2)`, as (x, y) in [0, 1], and weights `(B, Q, M, L, P)`.
    """
    images, peaks, names, locations, weights = map(np.asarray, (images, peaks, names, locations, weights))
    figure, axes = plt.subplots(2, len(images), figsize=(2.6 * len(images), 5.6), layout="constrained")
    for i, image in enumerate(images):
        for ax in axes[:, i]:
            ax.imshow(image[..., 0], cmap="gray_r", vmax=2, extent=(0, CANVAS, CANVAS, 0))
            ax.set(xlim=(0, CANVAS), ylim=(CANVAS, 0), xticks=[], yticks=[])
        for number, (row, column) in enumerate(np.argwhere(peaks[i])):
            colour, query = colormaps["tab10"](number), row * peaks.shape[2] + column
            y, x = (np.array([row, column]) + 0.5) * CANVAS / peaks.shape[1]
            axes[0, i].text(x, y, names[i, row, column], color=colour, ha="center", va="center", size=22, weight="bold")
            for level, marker in enumerate(MARKERS):
                at = CANVAS * locations[i, query, :, level].reshape(-1, 2)
                size = 250 * weights[i, query, :, level].ravel()
                axes[1, i].scatter(*at.T, s=size, marker=marker, color=colour, alpha=0.7, linewidths=0)
            axes[1, i].plot(x, y, "+", color=colour, markersize=12, markeredgewidth=2.5)
    axes[0, 0].set_ylabel("what is found")
    axes[1, 0].set_ylabel("where its query looks")
    signs = [Line2D([], [], linestyle="", color="0.3", marker=m) for m in ("+", *MARKERS)]
    meanings = ["the query", "a point it reads on the fine map, by its weight", "and on the coarse one"]
    figure.legend(signs, meanings, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
