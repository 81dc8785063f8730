"""The picture of 05_digits.py: where the deformable networks read, and what each network says."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from digits_data import BACKGROUND, POSITIONS, Digits, make_batch
from digits_scores import Run
from matplotlib import colormaps, colors
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from dcn_jax.viz import plot_sampling

LABEL_COLOURS = colors.ListedColormap([*colormaps["tab10"](range(10)), "0.1"])  # the ten digits, then the background


def draw(runs: Sequence[Run], digits: Digits, path: Path) -> None:
    """Draw test canvases: where deformable networks' last layers read, and all networks' labels."""
    canvases, labels = pictured_canvases(digits)
    looks = {run.row["model"]: look_at(run, canvases) for run in runs}
    deformable = {name: look for name, look in looks.items() if look.offset is not None}
    figure, axes = make_axes([f"where {name} reads" for name in deformable], ["true labels", *looks], len(canvases))
    for i, canvas in enumerate(canvases):
        show_labels(axes["true labels", i], labels[i])
        for name, look in looks.items():
            show_labels(axes[name, i], look.labels[i])
        for name, look in deformable.items():
            ax, mask = axes[f"where {name} reads", i], None if look.mask is None else look.mask[i]
            at = pictured_positions(labels[i])
            plot_sampling(canvas, look.offset[i], mask, window=(3, 3), at=at, spatial=(POSITIONS, POSITIONS), ax=ax)
    if deformable:
        squares_and_dots = "□ the regular grid\n● where the taps of the last layer read, by their modulation"
        figure.suptitle(squares_and_dots, fontsize=9)
    names = [*map(str, range(BACKGROUND)), "background"]
    key = [Patch(color=LABEL_COLOURS(i), label=name) for i, name in enumerate(names)]
    figure.legend(handles=key, loc="outside lower center", ncols=6, frameon=False, fontsize=8, handlelength=1)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def make_axes(large: list[str], small: list[str], rows: int) -> tuple[Any, dict[tuple[str, int], Any]]:
    """A figure and its Axes by (name, row): in each row the large ones, then two lines of small ones."""
    half = (len(small) + 1) // 2
    columns = 2 * len(large) + half
    # The key below is four inches wide.
    figure = plt.figure(figsize=(max(4, 1.4 * columns), 2.8 * rows + 0.4), layout="constrained")
    grid = figure.add_gridspec(2 * rows, columns)
    axes = {}
    for i in range(rows):
        for j, name in enumerate(large):
            axes[name, i] = figure.add_subplot(grid[2 * i : 2 * i + 2, 2 * j : 2 * j + 2])
        for j, name in enumerate(small):
            axes[name, i] = figure.add_subplot(grid[2 * i + j // half, 2 * len(large) + j % half])
    for (name, i), ax in axes.items():
        ax.set_axis_off()
        if name in small or i == 0:
            ax.set_title(name, fontsize=9)
    return figure, axes


def show_labels(ax: Any, labels: np.ndarray) -> None:
    """One colour for each digit, none for the background."""
    ax.imshow(labels, cmap=LABEL_COLOURS, vmin=0, vmax=BACKGROUND, interpolation="nearest")


class Look(NamedTuple):
    """What a network makes of some canvases."""

    labels: np.ndarray  # (B, 16, 16)
    offset: Any = None  # (B, 16, 16, 18), of its last layer
    mask: Any = None  # (B, 16, 16, 9), of the same


def look_at(run: Run, canvases: np.ndarray) -> Look:
    """Run a network and pick up what its last deformable layer has sown."""
    scores, sown = jax.jit(functools.partial(run.network.apply, mutable="intermediates"))(run.variables, canvases)
    labels = np.asarray(scores).argmax(-1)
    layer = {name: np.asarray(value) for name, (value,) in sown.get("intermediates", {}).get("layer_2", {}).items()}
    return Look(labels, layer.get("offset"), layer.get("mask"))


def pictured_canvases(digits: Digits) -> tuple[np.ndarray, np.ndarray]:
    """Three test canvases and their labels, from a small digit to a large one."""
    canvases, labels = map(np.asarray, make_batch(jax.random.key(3), digits, 64))
    chosen = np.argsort((labels != BACKGROUND).sum((1, 2)), kind="stable")[[8, 34, 54]]
    return canvases[chosen], labels[chosen]


def pictured_positions(labels: np.ndarray) -> list[tuple[int, int]]:
    """Two positions on the digit, one near its top and one near its bottom."""
    on_digit = np.argwhere(labels != BACKGROUND)
    return [tuple(on_digit[len(on_digit) * part // 6].tolist()) for part in (1, 5)]
