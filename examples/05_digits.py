"""Teach four small networks to label the pixels of warped digits, and draw where their taps read.

Each canvas is one of scikit-learn's 8×8 digits, turned, scaled (over a threefold range), sheared and
shifted, without end; test canvases are made of digits that are never trained on. Each position, at
half resolution, is to be labelled with its digit or as background. The networks are alike but for
their three residual 3×3 layers: plain convolutions, dilated ones (by 2), deformable ones (dcnv1) or
modulated deformable ones (dcnv2).

While it runs there is a line of progress for each network; at the end a table, and in the folder
of --out the picture sampling.png: test canvases with where the taps of one layer read, and what each
network makes of them. The last line should be "picture: runs/digits/sampling.png".
"""

import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

try:
    import jax
    import jax.numpy as jnp
    import optax
    import rich.console
    from digits_data import CANVAS, load_digits, make_batch
    from digits_network import LAYERS, Network, init, loss_of, make_adam
    from digits_options import parse
    from digits_picture import draw
    from digits_report import progress, results_line, results_table
    from digits_scores import Run, test
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; from the root of the repository: pip install -e ".[examples]"')


@functools.cache  # the same one for every seed, so that a step is compiled once for each network
def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam, with warm-up and cosine decay."""
    schedule = functools.partial(optax.warmup_cosine_decay_schedule, 0, warmup_steps=steps // 10, decay_steps=steps)
    return make_adam(schedule, learning_rate)


@functools.partial(jax.jit, static_argnames=("network", "optimizer", "batch"), donate_argnames=("variables", "state"))
def train_step(network, optimizer, variables, state, key, digits, batch):
    """One step on canvases made for it: (variables, optimizer state, loss)."""
    canvases, labels = make_batch(key, digits, batch)
    loss, gradients = jax.value_and_grad(lambda v: loss_of(network.apply(v, canvases), labels))(variables)
    updates, state = optimizer.update(gradients, state, variables)
    return optax.apply_updates(variables, updates), state, loss


def train(model, seed, data, *, steps, batch, learning_rate, report) -> Run:
    """Train on the first of `data`'s digits and test on the others; each step calls `report(loss)`."""
    digits, test_digits = data
    network, optimizer = Network(model), make_optimizer(learning_rate, steps)
    init_key, data_key = jax.random.split(jax.random.key(seed))
    variables: Any = init(network, init_key, jnp.zeros((1, CANVAS, CANVAS, 1)))
    state = jax.jit(optimizer.init)(variables)

    seconds = []
    for i in range(steps):
        start = time.perf_counter()
        key = jax.random.fold_in(data_key, i)
        variables, state, loss = train_step(network, optimizer, variables, state, key, digits, batch)
        loss = float(loss)  # waits for the step to end
        seconds.append(time.perf_counter() - start)
        report(loss)

    params = sum(leaf.size for leaf in jax.tree.leaves(variables))
    step_ms = 1000 * statistics.median(seconds[1:] or seconds)  # the first one also compiles
    scores = test(network, variables, test_digits)
    return Run({"model": model, "seed": seed, "params": params, **scores, "step_ms": step_ms}, network, variables)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the files; returns the exit status."""
    args = parse(argv, models=LAYERS, description=__doc__)
    options = {"steps": args.steps, "batch": args.batch, "learning_rate": args.learning_rate}
    console = rich.console.Console(highlight=False)
    data = load_digits()
    runs, interrupted = [], False
    try:
        for seed, model in itertools.product(range(args.seeds), args.model):
            start = time.perf_counter()
            with progress(f"{model}, seed {seed}", args.steps, console) as report:
                run = train(model, seed, data, report=report, **options)
            console.print(f"{results_line(run.row)}  {time.perf_counter() - start:.0f} s")
            runs.append(run)
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
