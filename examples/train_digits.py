"""Teach four small networks to label the pixels of warped handwritten digits, and draw where their taps read.

scikit-learn's 8×8 digits, each turned, scaled (over a threefold range), sheared and shifted onto a 32×32 canvas of its
own, without end; test canvases are made of digits that are never trained on. Each position, at half resolution, is to be
labelled with its digit or as background. The networks are alike but for their three residual 3×3 layers: plain
convolutions, dilated ones (by 2), deformable ones (dcnv1) or modulated deformable ones (dcnv2).

While it runs there is a line of progress for each network; at the end a table, and in the folder of --out the picture
sampling.png: test canvases with where the taps of one layer read, and what each network makes of them.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

try:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import rich.console
    import rich.progress
    import rich.table
    import sklearn.datasets
    from matplotlib import colormaps, colors
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    from dcn_jax import linear_sample
    from dcn_jax.linen import DeformConv
    from dcn_jax.optim import offset_labels
    from dcn_jax.viz import plot_sampling
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; from the root of the repository: pip install -e ".[examples]"')

IMAGE, CANVAS = 8, 32  # pixels along each side
POSITIONS = CANVAS // 2  # of labels, along each side
BACKGROUND, CLASSES = 10, 11  # the ten digits, then the background
TEST_CANVASES, TEST_BATCH = 1024, 128


# The data


class Digits(NamedTuple):
    """Handwritten digits and what they are."""

    images: jax.Array  # (N, 8, 8), ink in [0, 1]
    digits: jax.Array  # (N,)


def load_digits() -> tuple[Digits, Digits]:
    """scikit-learn's 1,797 digits: four fifths to train on, the others to test with."""
    data: Any = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images, digits = jnp.asarray(data.images[order] / 16, jnp.float32), jnp.asarray(data.target[order], jnp.int32)
    test = len(order) // 5
    return Digits(images[test:], digits[test:]), Digits(images[:test], digits[:test])


def random_warp(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A warp drawn at random: the matrix that turns, scales and shears an image, and where on the canvas its center goes."""
    keys = jax.random.split(key, 4)
    angle = jax.random.uniform(keys[0], minval=-0.5, maxval=0.5)  # radians, some 30 degrees either way
    scale = jnp.exp(
        jax.random.uniform(keys[1], minval=math.log(1.25), maxval=math.log(3.75))
    )  # a digit of 10 to 30 pixels
    shear = jax.random.uniform(keys[2], minval=-0.25, maxval=0.25)
    room = (CANVAS - scale * IMAGE) / 2
    center = (CANVAS - 1) / 2 + room * jax.random.uniform(keys[3], (2,), minval=-1, maxval=1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return scale * jnp.array([[cos, -sin], [sin, cos]]) @ jnp.array([[1.0, shear], [0.0, 1.0]]), center


def warp(image: jax.Array, matrix: jax.Array, center: jax.Array) -> jax.Array:
    """The image `(8, 8)` on its canvas `(32, 32, 1)`: pixel p reads the image at  matrix⁻¹ (p - center) + its middle."""
    pixels = jnp.stack(jnp.meshgrid(jnp.arange(CANVAS), jnp.arange(CANVAS), indexing="ij"), axis=-1)  # (32, 32, 2)
    points = (pixels - center) @ jnp.linalg.inv(matrix).T + (IMAGE - 1) / 2
    return linear_sample(image[..., None], points)


def label(canvas: jax.Array, digit: jax.Array) -> jax.Array:
    """`(16, 16)`: the digit where the 2×2 pixels of a position hold more than 0.4 of ink on average, else background."""
    ink = canvas.reshape(POSITIONS, 2, POSITIONS, 2).mean((1, 3))
    return jnp.where(ink > 0.4, digit, BACKGROUND)


def make_batch(key: jax.Array, data: Digits, size: int) -> tuple[jax.Array, jax.Array]:
    """`size` canvases `(size, 32, 32, 1)` of digits drawn at random, and their labels `(size, 16, 16)`."""
    choice, warps = jax.random.split(key)
    chosen = jax.random.randint(choice, (size,), 0, len(data.digits))
    matrices, centers = jax.vmap(random_warp)(jax.random.split(warps, size))
    canvases = jax.vmap(warp)(data.images[chosen], matrices, centers)
    return canvases, jax.vmap(label)(canvases, data.digits[chosen])


# The networks

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "conv": nn.Conv,
    "dilated": functools.partial(nn.Conv, kernel_dilation=2),
    "dcnv1": functools.partial(DeformConv, modulated=False),
    "dcnv2": DeformConv,  # starts at half of the plain convolution, which the GroupNorm after it makes up for
}


class Network(nn.Module):
    """Two plain convolutions, to half resolution; three residual 3×3 layers; the scores of each position's labels."""

    model: str
    features: int = 32

    @nn.compact
    def __call__(self, canvas: jax.Array) -> jax.Array:
        """`(B, 32, 32, 1)` -> `(B, 16, 16, 11)`."""
        x = nn.relu(nn.GroupNorm(8)(nn.Conv(16, (3, 3))(canvas)))
        x = nn.Conv(self.features, (3, 3), strides=2)(x)  # (B, 16, 16, features)
        for i in range(3):
            layer = LAYERS[self.model](self.features, (3, 3), name=f"layer_{i}")
            x = x + nn.relu(nn.GroupNorm(8)(layer(x)))
        return nn.Dense(CLASSES)(x)


# Training


@functools.cache  # the same one for every seed, so that a step is compiled once for each network
def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a warm-up and a cosine decay, the offset branches at a tenth of the rate, as in the papers."""

    def adam(rate: float) -> optax.GradientTransformation:
        return optax.adamw(optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps))

    rates = optax.multi_transform({"main": adam(learning_rate), "offset": adam(0.1 * learning_rate)}, offset_labels)
    return optax.chain(optax.clip_by_global_norm(1.0), rates)


def loss_of(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy, the positions of digits weighted fourfold: they are few."""
    weights = jnp.where(labels == BACKGROUND, 1.0, 4.0)
    return jnp.average(optax.softmax_cross_entropy_with_integer_labels(scores, labels), weights=weights)


class Run(NamedTuple):
    """One trained network and what it reached."""

    row: dict[str, Any]  # what --json writes
    network: Any
    variables: Any


def train(
    model: str,
    seed: int,
    data: tuple[Digits, Digits],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    report: Callable,
) -> Run:
    """Train one network and test it; `report(loss)` is called after each step."""
    digits, test_digits = data
    network, optimizer = Network(model), make_optimizer(learning_rate, steps)
    init_key, data_key = jax.random.split(jax.random.key(seed))
    variables: Any = jax.jit(network.init)(init_key, jnp.zeros((1, CANVAS, CANVAS, 1)))
    state = optimizer.init(variables)

    seconds = []
    for i in range(steps):
        start = time.perf_counter()
        key = jax.random.fold_in(data_key, i)
        variables, state, loss = train_step(network, optimizer, variables, state, key, digits, batch)
        loss = float(loss)  # waits for the step to end
        seconds.append(time.perf_counter() - start)
        report(loss)

    keys = jax.random.split(jax.random.key(0), TEST_CANVASES // TEST_BATCH)  # the same canvases for every network
    mean_iou, foreground_accuracy = scores_of(sum(confusion(network, variables, key, test_digits) for key in keys))
    row = {
        "model": model,
        "seed": seed,
        "params": sum(leaf.size for leaf in jax.tree.leaves(variables)),
        "mean_iou": mean_iou,
        "foreground_accuracy": foreground_accuracy,
        "step_ms": 1000 * statistics.median(seconds[1:] or seconds),  # the first one also compiles
    }
    return Run(row, network, variables)


@functools.partial(jax.jit, static_argnames=("network", "optimizer", "batch"), donate_argnames=("variables", "state"))
def train_step(network, optimizer, variables, state, key, digits, batch):
    """One step on canvases made for it: (variables, optimizer state, loss)."""
    canvases, labels = make_batch(key, digits, batch)
    loss, gradients = jax.value_and_grad(lambda v: loss_of(network.apply(v, canvases), labels))(variables)
    updates, state = optimizer.update(gradients, state, variables)
    return optax.apply_updates(variables, updates), state, loss


@functools.partial(jax.jit, static_argnames="network")
def confusion(network, variables, key, digits):
    """`(11, 11)`: how many positions of each class were labelled as each class, on one batch of canvases."""
    canvases, labels = make_batch(key, digits, TEST_BATCH)
    predicted = network.apply(variables, canvases).argmax(-1)
    return jnp.zeros((CLASSES, CLASSES), int).at[labels, predicted].add(1)


def scores_of(confusion: Any) -> tuple[float, float]:
    """Mean over the classes of intersection / union, and the share of digit positions labelled with their digit."""
    confusion = np.asarray(confusion)
    right = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - right
    digits = slice(0, BACKGROUND)
    return float(np.mean(right / np.maximum(union, 1))), float(right[digits].sum() / confusion[digits].sum())


# The report


FIGURES = {"mean_iou": 3, "foreground_accuracy": 3, "step_ms": 1}  # and how many digits to show


def results_table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    """One line for each model: its row, or the mean ± standard deviation over the seeds."""
    seeds = len({row["seed"] for row in rows})
    over = f", mean ± s.d. over {seeds} seeds" if seeds > 1 else ""
    table = rich.table.Table(title=f"{TEST_CANVASES:,} test canvases{over}")
    for name in ("model", "parameters", "mean IoU", "foreground accuracy", "ms a step"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        figures = [spread([row[key] for row in mine], digits) for key, digits in FIGURES.items()]
        table.add_row(model, f"{mine[0]['params']:,}", *figures)
    return table


def spread(values: Sequence[float], digits: int) -> str:
    """The value, or mean ± standard deviation of several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


LABEL_COLOURS = colors.ListedColormap([*colormaps["tab10"](range(10)), "0.1"])  # the ten digits, then the background


def draw(runs: Sequence[Run], digits: Digits, path: Path) -> None:
    """Draw test canvases: where the last layer of each deformable network reads, the labels, what each network says."""
    canvases, labels = pictured_canvases(digits)
    looks = {run.row["model"]: look_at(run, canvases) for run in runs}
    deformable = {model: look for model, look in looks.items() if look.offset is not None}
    figure, axes = make_axes([f"where {model} reads" for model in deformable], ["true labels", *looks], len(canvases))
    for i, canvas in enumerate(canvases):
        show_labels(axes["true labels", i], labels[i])
        for model, look in looks.items():
            show_labels(axes[model, i], look.labels[i])
        for model, look in deformable.items():
            ax, mask = axes[f"where {model} reads", i], None if look.mask is None else look.mask[i]
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
    """A figure and its Axes by (name, row): in each row the large ones, then the small ones in two lines."""
    half = (len(small) + 1) // 2
    columns = 2 * len(large) + half
    figure = plt.figure(figsize=(1.4 * columns, 2.8 * rows + 0.4), layout="constrained")
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


def show_labels(ax: Any, labels: jax.Array) -> None:
    """One colour for each digit, none for the background."""
    ax.imshow(labels, cmap=LABEL_COLOURS, vmin=0, vmax=BACKGROUND, interpolation="nearest")


class Look(NamedTuple):
    """What a network makes of some canvases."""

    labels: jax.Array  # (B, 16, 16)
    offset: Any = None  # (B, 16, 16, 18), of its last layer
    mask: Any = None  # (B, 16, 16, 9), their modulation


def look_at(run: Run, canvases: jax.Array) -> Look:
    """Run a network and pick up what its last deformable layer has sown."""
    scores, sown = jax.jit(functools.partial(run.network.apply, mutable="intermediates"))(run.variables, canvases)
    labels = scores.argmax(-1)
    layer = sown.get("intermediates", {}).get("layer_2")
    if layer is None:
        return Look(labels)
    return Look(labels, layer["offset"][0], layer["mask"][0] if "mask" in layer else None)


def pictured_canvases(digits: Digits) -> tuple[jax.Array, jax.Array]:
    """Three test canvases and their labels, from a small digit to a large one."""
    canvases, labels = make_batch(jax.random.key(3), digits, 64)
    by_size = jnp.argsort((labels != BACKGROUND).sum((1, 2)))
    chosen = by_size[jnp.array([8, 34, 54])]
    return canvases[chosen], labels[chosen]


def pictured_positions(labels: jax.Array) -> list[tuple[int, int]]:
    """Two positions on the digit, one near its top and one near its bottom."""
    on_digit = np.argwhere(labels != BACKGROUND)
    return [tuple(on_digit[len(on_digit) * part // 6].tolist()) for part in (1, 5)]


# The command


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        """Say what is wrong and leave."""
        self.exit(2, f"{self.prog}: {message} (--help lists all options)\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's options, checked."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument(
        "--model", nargs="+", choices=LAYERS, default=list(LAYERS), help="which to train (default: all four)"
    )
    p.add_argument("--steps", type=int, default=800, metavar="N", help="of training, for each network (default: 800)")
    p.add_argument(
        "--seeds", type=int, default=1, metavar="N",
        help="train each network with the seeds 0 to N - 1 and give mean ± standard deviation (default: 1)",
    )  # fmt: skip
    p.add_argument("--batch", type=int, default=16, metavar="N", help="canvases in a step (default: 16)")
    p.add_argument(
        "--learning-rate", type=float, default=0.01, metavar="RATE",
        help="its highest value; that of the offset branches is a tenth of it (default: 0.01)",
    )  # fmt: skip
    p.add_argument(
        "--out", type=Path, default=Path("runs/digits"), metavar="DIR",
        help="where sampling.png goes; made if need be (default: runs/digits)",
    )  # fmt: skip
    p.add_argument(
        "--json", type=Path, metavar="FILE",
        help="write the results there, a list with an object for each network and seed: model, seed, params, mean_iou, "
        "foreground_accuracy, step_ms",
    )  # fmt: skip
    args = p.parse_args(argv)

    for option in ("steps", "seeds", "batch"):
        if getattr(args, option) < 1:
            p.error(f"--{option} {getattr(args, option)}: wanted at least 1")
    if not 0 < args.learning_rate < math.inf:
        p.error(f"--learning-rate {args.learning_rate}: wanted a positive number")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        p.error(f"--json {args.json}: wanted the name of a file in a folder that exists")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(f"--out {args.out}: cannot make this folder ({error.strerror})")
    args.model = list(dict.fromkeys(args.model))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the files; returns the exit status."""
    args = parse(argv)
    console = rich.console.Console(highlight=False)
    data = load_digits()
    runs: list[Run] = []
    columns = (
        rich.progress.TextColumn("{task.description:17}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("loss {task.fields[loss]:.3f}"),
        rich.progress.TimeRemainingColumn(),
    )
    interrupted = False
    try:
        with rich.progress.Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            for seed in range(args.seeds):
                for model in args.model:
                    task = progress.add_task(f"{model}, seed {seed}", total=args.steps, loss=math.nan)
                    start = time.perf_counter()
                    run = train(
                        model,
                        seed,
                        data,
                        steps=args.steps,
                        batch=args.batch,
                        learning_rate=args.learning_rate,
                        report=lambda loss, task=task: progress.update(task, advance=1, loss=loss),
                    )
                    progress.remove_task(task)
                    runs.append(run)
                    console.print(
                        f"{model:8} seed {seed}  mean IoU {run.row['mean_iou']:.3f}  foreground accuracy "
                        f"{run.row['foreground_accuracy']:.3f}  {time.perf_counter() - start:.0f} s"
                    )
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted: what follows is what was finished until then" if runs else "interrupted")

    rows = [run.row for run in runs]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if runs:
        console.print(results_table(rows))
        draw([run for run in runs if run.row["seed"] == 0], data[1], args.out / "sampling.png")
        console.print(f"picture: {args.out / 'sampling.png'}")
    return 130 if interrupted else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before or after the training, which has its own answer
        sys.exit(130)
