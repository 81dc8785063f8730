"""Detectors of zeromodels with their own attention and with this library's: do they agree, and what do they cost.

    make test-keras                                             # makes the environment .venv-keras
    .venv-keras/bin/python -m benchmarks.keras_models           # both detectors, at their own image sizes
    .venv-keras/bin/python -m benchmarks.keras_models --models rf_detr --repeats 3

Weights are random. `ms_deform_attn_core` of the models' own module is replaced while a program is
traced, and put back. For each model, and each way to read:

    layers      largest difference of a deformable attention's output, over its largest value, each
                layer given the same input;
    end to end  the same of the model's boxes and logits. The queries are chosen before the first
                deformable attention, from the same numbers, so no tie falls otherwise;
    ms, MB      of a compiled forward pass, and of a training step (gradients of Σ output² by all
                weights, and SGD): medians of interleaved runs, and the memory beside the arguments.
"""

import argparse
import importlib
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import processor
from dcn_jax.keras import ms_deform_attn

MODELS = {  # of zeromodels.models: its class, its configuration, the sampling methods that make sense
    "rt_detr_v2": ("RTDETRV2Detect", "RTDetrV2Config", ("linear", "discrete")),
    "rf_detr": ("RFDETRDetect", "RFDetrConfig", ("linear",)),
}


class Cost(NamedTuple):
    """Of one program."""

    milliseconds: float
    megabytes: float


def our_core(method: str) -> Callable[..., jax.Array]:
    """Zeromodels' `ms_deform_attn_core` by `ms_deform_attn`."""

    def core(value, value_spatial_shapes, sampling_locations, attention_weights):
        value = jnp.transpose(value, (0, 3, 1, 2))  # (B, S, M, D)
        weights = attention_weights.reshape(sampling_locations.shape[:-1])  # (B, Q, M, L, P)
        return ms_deform_attn(value, value_spatial_shapes, sampling_locations, weights, method=method)

    return core


def differences(module: Any, model: Any, x: jax.Array) -> tuple[float, float]:
    """How far our linear attention is from theirs: the worst layer, and end to end."""
    theirs, ours, worst = module.ms_deform_attn_core, our_core("linear"), []

    def both(*arguments):
        wanted = theirs(*arguments)
        worst.append(relative(ours(*arguments), wanted))
        return wanted

    with mock.patch.object(module, "ms_deform_attn_core", both):
        wanted = model(x)
    with mock.patch.object(module, "ms_deform_attn_core", ours):
        actual = model(x)
    return max(worst), max(map(relative, jax.tree.leaves(actual), jax.tree.leaves(wanted)))


def relative(actual: jax.Array, wanted: jax.Array) -> float:
    """The largest difference over the largest value."""
    return float(jnp.abs(actual - wanted).max() / jnp.abs(wanted).max())


def forward(model: Any) -> Callable:
    """The model as a function of its weights."""
    return lambda trainable, other, x: model.stateless_call(trainable, other, x)[0]


def step(model: Any) -> Callable:
    """A training step as a function of the weights, to the new weights."""

    def loss(trainable, other, x):
        y, _ = model.stateless_call(trainable, other, x, training=True)
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(y))

    def program(trainable, other, x):
        gradients = jax.grad(loss)(trainable, other, x)
        return [weight - 1e-6 * gradient for weight, gradient in zip(trainable, gradients, strict=True)]

    return program


def measure(programs: dict[str, Any], arguments: tuple, repeats: int) -> dict[str, Cost]:
    """Milliseconds and megabytes of compiled programs, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if turn:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: Cost(statistics.median(times[name]), program.memory_analysis().temp_size_in_bytes / 1e6)
        for name, program in programs.items()
    }


def costs(module: Any, model: Any, x: jax.Array, methods: tuple[str, ...], repeats: int) -> dict[str, dict[str, Cost]]:
    """What a forward pass and a training step cost, with each attention."""
    cores = {"zeromodels": module.ms_deform_attn_core} | {f"dcn_jax, {method}": our_core(method) for method in methods}
    arguments = (
        [weight.value for weight in model.trainable_variables],
        [weight.value for weight in model.non_trainable_variables],
        x,
    )
    table = {}
    for kind, make in {"forward": forward, "step": step}.items():
        programs = {}
        for name, core in cores.items():
            with mock.patch.object(module, "ms_deform_attn_core", core):
                programs[name] = jax.jit(make(model)).lower(*arguments).compile()
        table[kind] = measure(programs, arguments, repeats)
    return table


def main(models: list[str], repeats: int) -> None:
    """Compare the models, and print what was found."""
    console = Console()
    version = importlib.metadata.version
    console.print(
        f"{processor()}, jax {jax.__version__}, keras {version('keras')}, zeromodels {version('zeromodels')}, one image"
    )
    for name in models:
        kind, configuration, methods = MODELS[name]
        package = importlib.import_module(f"zeromodels.models.{name}")
        module = importlib.import_module(f"zeromodels.models.{name}.{name}_layers")
        model = getattr(package, kind)(getattr(package, configuration)())
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, *model.input_shape[1:])), jnp.float32)
        layers, whole = differences(module, model, x)
        console.print(f"\n{kind}, {x.shape[1]}×{x.shape[2]}: layers {layers:.0e}, end to end {whole:.0e}")
        found = costs(module, model, x, methods, repeats)
        table = Table("attention", *(f"{kind}, {unit}" for kind in found for unit in ("ms", "MB")))
        for attention in found["forward"]:
            cells = [f"{value:,.0f}" for kind in found for value in found[kind][attention]]
            table.add_row(attention, *cells)
        console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each program (7)")
    options = parser.parse_args()
    main(options.models, options.repeats)
