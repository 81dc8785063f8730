"""Time a training step of a ResNet with modulated layers beside the plain one.

    python -m benchmarks.training --device gpu
    python -m benchmarks.training --depth 18 --batch 4 --size 64 --quick    # on a CPU

The deformed network has a modulated deformable convolution in place of every
3×3 of conv3 to conv5, which makes 13 of ResNet-50. All compute in bfloat16 with
float32 parameters, descend by SGD with momentum, and give the old state's memory
to the new one. Parameters, images and offsets (± 1.4 pixels) are random. The
networks' steps take turns; a figure is the median of the rounds.

    ratio      is the time of a step over the plain network's;
    peak       is the memory of arguments, results and scratch, as XLA plans it;
    launches   (on a GPU) are the kernels, copies and library calls of a step;
    of a layer are those beyond the plain network's, for each deformable layer.
"""

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.launches import count_launches
from benchmarks.programs import use_device
from benchmarks.report import STYLE
from benchmarks.rows import reason, show
from dcn_jax.models.resnet import BasicBlock, Bottleneck, ResNet

NETWORKS = {18: (BasicBlock, (2, 2, 2, 2)), 50: (Bottleneck, (3, 4, 6, 3)), 101: (Bottleneck, (3, 4, 23, 3))}
DEFORMED = ("conv3", "conv4", "conv5")
CLASSES = 1000
OPTIMIZER = optax.sgd(1e-3, momentum=0.9)


class Network(NamedTuple):
    """A network and how it trains."""

    name: str  # "plain" or an implementation of the op
    state: Any  # parameters, statistics, the optimizer's state
    step: Callable  # (state, images, labels) to the next state and the loss


def make_network(name: str, depth: int, dtype: str, **options: Any) -> Network:
    """A ResNet with random parameters; "plain" has no deformable layer, "default" the implementation for None.

    `options` are those of `ResNet`.
    """
    block, depths = NETWORKS[depth]
    if name != "plain":
        options |= {"deform_stages": DEFORMED, "implementation": None if name == "default" else name}
    model = nnx.eval_shape(lambda: ResNet(block, depths, CLASSES, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0), **options))
    model.train()
    structure, *shapes = nnx.split(model, nnx.Param, ...)
    random = np.random.default_rng(0)
    parameters, statistics = (jax.tree.map_with_path(functools.partial(draw, random), tree) for tree in shapes)

    def loss_of(parameters, statistics, images, labels):
        model = nnx.merge(structure, parameters, statistics, copy=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(model(images).astype(jnp.float32), labels).mean()
        return loss, nnx.split(model, nnx.Param, ...)[2]

    def step(state, images, labels):
        parameters, statistics, momentum = state
        (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            parameters, statistics, images, labels
        )
        updates, momentum = OPTIMIZER.update(gradients, momentum)
        return (optax.apply_updates(parameters, updates), statistics, momentum), loss

    return Network(name, (parameters, statistics, OPTIMIZER.init(parameters)), step)


def draw(random: np.random.Generator, path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """A kernel that keeps the size of what it reads, of the branches too; scales and variances of 1; else 0."""
    name = jax.tree_util.keystr(path)
    if "kernel" in name:
        scale = math.sqrt(2 / math.prod(shape.shape[:-1]))
        return jnp.asarray(scale * random.standard_normal(shape.shape, np.float32), shape.dtype)
    return jnp.full(shape.shape, 1 if "scale" in name or "var" in name else 0, shape.dtype)


def deformable_layers(depth: int) -> int:
    """How many layers are deformed: one of a bottleneck, two of a basic block."""
    block, depths = NETWORKS[depth]
    return sum(depths[4 - len(DEFORMED) :]) * (1 if block is Bottleneck else 2)


class Training:
    """A network's compiled step, and the state that it makes again and again."""

    def __init__(self, network: Network, images: jax.Array, labels: jax.Array):
        self.name, self.state, self.batch = network.name, network.state, (images, labels)
        start = time.perf_counter()
        step = jax.jit(network.step, donate_argnums=0)
        self.compiled = step.lower(self.state, *self.batch).compile()
        self.compile_s = time.perf_counter() - start
        self.times: list[float] = []

    def run(self, steps: int) -> float:
        """Milliseconds of one of so many steps, each of which waits for the one before."""
        start = time.perf_counter()
        for _ in range(steps):
            self.state, self.loss = self.compiled(self.state, *self.batch)
        jax.block_until_ready(self.state)
        return 1e3 * (time.perf_counter() - start) / steps

    def row(self, device: str) -> dict[str, Any]:
        """What there is to tell."""
        memory: Any = self.compiled.memory_analysis()
        sizes = (getattr(memory, f"{what}_size_in_bytes") for what in ("argument", "output", "temp"))
        return {
            "network": self.name,
            "ms": statistics.median(self.times),
            "peak_bytes": sum(sizes) - memory.alias_size_in_bytes,
            "scratch_bytes": memory.temp_size_in_bytes,
            "launches": count_launches(self.compiled.as_text() or "") if device == "gpu" else None,
            "compile_s": self.compile_s,
            "loss": float(self.loss),
        }


def compile_networks(args: argparse.Namespace, console: Console) -> list[Training]:
    """A training of each network; on a GPU all are compiled at once, since it takes a minute."""
    random = np.random.default_rng(1)
    shape = (args.batch, args.size, args.size, 3)
    images = jnp.asarray(random.standard_normal(shape, np.float32), args.dtype)
    labels = jnp.asarray(random.integers(0, CLASSES, args.batch))

    def training(name: str) -> Training | Exception:
        try:
            return Training(make_network(name, args.depth, args.dtype), images, labels)
        except Exception as error:  # whatever it is, the others go on
            return error

    names = ["plain", *args.implementation]
    with ThreadPoolExecutor(len(names) if args.device == "gpu" else 1) as pool:
        trainings = dict(zip(names, pool.map(training, names), strict=True))
    for name, failed in trainings.items():
        if isinstance(failed, Exception):
            console.print(f"{name}: not available: {reason(failed)}", markup=False, highlight=False)
    return [t for t in trainings.values() if isinstance(t, Training)]


def table_of(rows: list[dict], args: argparse.Namespace) -> Table:
    """A line for each network, beside the plain one where that was compiled."""
    table = Table("network", **STYLE)
    for heading in ("ms", "images / s", "ratio", "peak MB", "launches", "of a layer", "compile s"):
        table.add_column(heading, justify="right")
    plain = next((row for row in rows if row["network"] == "plain"), None)
    for row in rows:
        more = ratio = None
        if plain:
            ratio = row["ms"] / plain["ms"]
            if row["launches"] is not None and row is not plain:
                more = (row["launches"] - plain["launches"]) / deformable_layers(args.depth)
        table.add_row(
            row["network"],
            show(row["ms"]),
            show(1e3 * args.batch / row["ms"], "{:.0f}"),
            show(ratio),
            show(row["peak_bytes"] / 1e6, "{:.0f}"),
            show(row["launches"], "{:d}"),
            show(more, "{:.1f}"),
            show(row["compile_s"], "{:.1f}"),
        )
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        usage=argparse.SUPPRESS,  # an error is one line then
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = "xla", "pallas_gpu", "default"
    p.add_argument("--device", choices=("cpu", "gpu"), help="cpu, gpu (default: JAX's own choice)")
    p.add_argument("--implementation", nargs="+", choices=names, help="default: xla, and on a GPU pallas_gpu too")
    p.add_argument("--depth", type=int, choices=NETWORKS, default=50, help="of the ResNet (default: 50)")
    p.add_argument("--batch", type=int, default=32, metavar="N", help="images of a step (default: 32)")
    p.add_argument("--size", type=int, default=224, metavar="N", help="their height and width (default: 224)")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation")
    p.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds of steps (default: 7)")
    p.add_argument("--quick", action="store_true", help="1 round, for a first look")
    p.add_argument("--json", metavar="FILE", help="the rows, as a JSON list of objects")
    args = p.parse_args(argv)
    for option in ("batch", "size", "repeats"):
        if getattr(args, option) < 1:
            p.error(f"--{option} {getattr(args, option)}: wanted at least 1")
    args.device = use_device(p, args.device)
    args.implementation = args.implementation or (["xla", "pallas_gpu"] if args.device == "gpu" else ["xla"])
    return args


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measure, print the table, write the file; returns the rows."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    args, console = parse(argv), Console()
    console.print(
        f"ResNet-{args.depth}, {args.batch} images of {args.size}², {args.dtype}, "
        f"{deformable_layers(args.depth)} layers deformed; {jax.devices()[0].device_kind}, jax {jax.__version__}",
        highlight=False,
    )
    trainings = compile_networks(args, console)
    for training in trainings:
        training.run(1)
    steps = {training: max(1, min(10, round(300 / training.run(1)))) for training in trainings}
    for turn in range(1 if args.quick else args.repeats):
        for training in trainings[:: -1 if turn % 2 else 1]:  # there and back
            training.times.append(training.run(steps[training]))
    rows = [vars(args) | training.row(args.device) for training in trainings]
    console.print(table_of(rows, args))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
