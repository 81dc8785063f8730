"""Where the four networks of 05_digits.py look, when they name one position of a digit.

After training there is a picture for each question, with a row for each test canvas and a column
for each network. The node that they ask about is the score of the label that the network gives to
the position marked by a cross.

    receptive_field.png      on which pixels does the score depend, and how strongly?
    effective_sampling.png   of all places where the three 3×3 layers read, which would move the score if they moved?
    sampling_through.png     which pixels does the position read through all five layers?
    saliency_region.png      which part of the canvas alone gives the same score, up to 10 %?

The last line should be "pictures: runs/where_it_looks".
"""

import importlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from digits_data import BACKGROUND, POSITIONS, load_digits
from digits_picture import pictured_canvases
from matplotlib import pyplot as plt
from PIL import Image

from dcn_jax.viz import (
    effective_receptive_field,
    effective_sampling,
    looked,
    plot_effective_sampling,
    plot_receptive_field,
    plot_saliency_region,
    plot_sampling_through,
    saliency_region,
    sampling_through,
)

digits = importlib.import_module("05_digits")  # a name that begins with a digit


class Question(NamedTuple):
    """A network, a canvas and a position of its output."""

    network: Any  # (linen module, variables)
    canvas: np.ndarray  # (32, 32, 1)
    at: tuple[int, int]

    @property
    def node(self) -> tuple[int, int, int]:
        """The index of the score of the label that the network gives to the position."""
        module, variables = self.network
        scores = module.apply(variables, self.canvas[None])[0]  # (16, 16, 11)
        return (*self.at, int(scores[self.at].argmax()))


def draw_receptive_field(ax: Any, asked: Question) -> None:
    """The pixels on which the score depends."""
    plot_receptive_field(asked.canvas, effective_receptive_field(asked.network, asked.canvas, asked.node), ax=ax)


def draw_effective_sampling(ax: Any, asked: Question) -> None:
    """The places of all three layers whose movement would move the score."""
    found = effective_sampling(asked.network, asked.canvas, asked.node, plain=True)[-3:]
    points, strength = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    plot_effective_sampling(asked.canvas, points, strength, spatial=(POSITIONS, POSITIONS), ax=ax)


def draw_sampling_through(ax: Any, asked: Question) -> None:
    """The pixels that the position reads through all layers; the paths to a pixel are added up."""
    points, weights = sampling_through(looked(asked.network, asked.canvas), asked.at, merge=True)
    pixels, which = np.unique(points, axis=0, return_inverse=True)
    plot_sampling_through(asked.canvas, pixels, np.bincount(which.ravel(), weights), ax=ax)


def draw_saliency_region(ax: Any, asked: Question) -> None:
    """The part of the canvas that is enough for the score."""
    mask, error = saliency_region(asked.network, asked.canvas, asked.node, key=jax.random.key(0))
    plot_saliency_region(asked.canvas, mask, ax=ax)
    ax.set_xlabel(f"{mask.mean():.0%} of it, error {error:.0%}", fontsize=7)


PICTURES: dict[str, Callable[[Any, Question], None]] = {
    "receptive_field": draw_receptive_field,
    "effective_sampling": draw_effective_sampling,
    "sampling_through": draw_sampling_through,
    "saliency_region": draw_saliency_region,
}


def middle(labels: np.ndarray) -> tuple[int, int]:
    """The position of the digit that is half-way through it."""
    on_digit = np.argwhere(labels != BACKGROUND)
    return tuple(on_digit[len(on_digit) // 2].tolist())


def mark(ax: Any, asked: Question) -> None:
    """A cross at the position, and the label that the network gives it."""
    row, column, label = asked.node
    width = ax.get_xlim()[1] - 0.5  # that of the canvas, or of the layers' maps
    y, x = ((place + 0.5) * width / POSITIONS - 0.5 for place in (row, column))
    ax.plot(x, y, "+", color="C2", markersize=7, markeredgewidth=1.5)
    name = "background" if label == BACKGROUND else str(label)
    ax.text(0.03, 0.97, name, transform=ax.transAxes, va="top", color="C2", fontsize=8)


def draw(path: Path, plot: Callable[[Any, Question], None], asked: dict[str, Sequence[Question]]) -> None:
    """One picture: a column for each network, a row for each canvas."""
    rows = len(next(iter(asked.values())))
    figure, axes = plt.subplots(
        rows, len(asked), figsize=(1.7 * len(asked), 1.75 * rows + 0.2), layout="constrained", squeeze=False
    )
    for column, (name, questions) in enumerate(asked.items()):
        axes[0, column].set_title(name, fontsize=9)
        for ax, question in zip(axes[:, column], questions, strict=True):
            plot(ax, question)
            mark(ax, question)
            ax.set(xticks=[], yticks=[])
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)  # fewer bytes


def main(out: Path, steps: int = 800, models: Sequence[str] = tuple(digits.LAYERS), canvases: int = 3) -> None:
    """Train the networks, ask each about each canvas, draw the answers."""
    data = load_digits()
    shown, labels = pictured_canvases(data[1])
    asked = {}
    for model in models:
        options = {"steps": steps, "batch": 16, "learning_rate": 0.01}
        run = digits.train(model, 0, data, report=lambda loss: None, **options)
        print(f"{model:8} mean IoU {run.row['mean_iou']:.3f}")
        network = run.network, run.variables
        asked[model] = [Question(network, shown[i], middle(labels[i])) for i in range(canvases)]
    out.mkdir(parents=True, exist_ok=True)
    for name, plot in PICTURES.items():
        draw(out / f"{name}.png", plot, asked)
    print(f"pictures: {out}")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["runs/where_it_looks"]))
