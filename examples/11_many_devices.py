"""Train a network of 05_digits.py on all devices, and survive being killed.

Each device has a copy of the parameters and its share of each batch: a mesh,
two shardings and plain jit. JAX sums the gradients over devices and processes;
Orbax writes checkpoints in the background, in a folder that all hosts share.
SIGTERM, to any of the processes, and Ctrl-C save and stop. --resume goes on, on
any number of devices; on as many, the end is bit for bit that of a run that was
never interrupted. JAX_ENABLE_X64=1 trains in float64.

    python examples/11_many_devices.py --checkpoints runs/many --resume
    make train-many    # two processes of four devices each, on this machine

The last line should be like
"200 steps, parameters 0123456789ab, on 8 devices".
"""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, TextIO

try:
    import jax
    import jax.numpy as jnp
    import rich.console
    from digits_data import load_digits
    from digits_network import LAYERS, Network
    from digits_report import progress
    from many_devices_checkpoints import Checkpoints
    from many_devices_data import global_batch
    from many_devices_log import Log, sha256_of
    from many_devices_options import parse
    from many_devices_step import by_name, initial_state, make_optimizer, train_step
    from many_devices_stop import NotFinite, Problem, Signals
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; from the root of the repository: pip install -e ".[examples]"')


def train(args: Any, signals: Signals, console: rich.console.Console) -> int:
    """Train from the start or from a checkpoint, to the end or to a signal; returns the exit status."""
    # Explicit axes, the default, are more than Optax's losses take.
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, by_row = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))
    if args.batch % mesh.size:
        raise Problem(f"--batch {args.batch}: wanted a multiple of {mesh.size}, the number of devices")
    network, optimizer = Network(args.model), make_optimizer(args.learning_rate, args.give_up)
    state = jax.device_put(initial_state(network, optimizer, args.seed), everywhere)
    checkpoints = None
    if args.checkpoints:
        run = {"model": args.model, "seed": args.seed, "batch": args.batch, "learning_rate": args.learning_rate}
        checkpoints = Checkpoints(args.checkpoints, run, resume=args.resume)
        state = checkpoints.restore(state)
    step, key = int(state.step), jax.random.wrap_key_data(jnp.asarray(jax.device_get(state.key)))
    step_fn = jax.jit(train_step, static_argnums=(0, 1), donate_argnums=2, out_shardings=everywhere)
    digits = jax.device_get(load_digits()[0])
    make_batch = functools.partial(global_batch, key, digits=digits, size=args.batch, sharding=by_row)
    not_finite = NotFinite([name for name, _ in by_name(state.params)], args.give_up)
    received, profiled = 0, range(step + 2, step + 7)  # not the first step, which also compiles
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as profile:
        log = stack.enter_context(contextlib.closing(Log(args.json, args.tensorboard, console, step)))
        devices, processes = counted(mesh.size, "device"), counted(jax.process_count(), "process", "es")
        console.print(f"{devices} ({jax.default_backend()}) in {processes}, from step {step}")
        report = stack.enter_context(progress(args.model, args.steps, console, step))
        batch = make_batch(step)
        while step < args.steps and not received:
            if args.profile and step == profiled.start:
                profile.enter_context(jax.profiler.trace(args.profile))
            state, metrics = step_fn(network, optimizer, state, *batch, signals.on_devices(by_row))
            step += 1
            batch = make_batch(step)  # the next, while the devices are at work
            metrics = jax.device_get(metrics)  # waits for them
            if step == profiled.stop:
                profile.close()
            report(float(metrics.loss))
            log.step(step, metrics, show=step % args.log_every == 0 or step == args.steps)
            not_finite.check(step, metrics)
            received = int(metrics.signal)
            if checkpoints and (step % args.save_every == 0 or step == args.steps or received):
                checkpoints.save(step, state)
        if checkpoints:
            checkpoints.finish()
        if received:
            kept = (
                f"go on from {args.checkpoints} with --resume"
                if checkpoints
                else "nothing is kept without --checkpoints"
            )
            console.print(f"{signal.Signals(received).name}: stopped after step {step}; {kept}")
            return 0 if received == signal.SIGTERM else 128 + received
        parameters = sha256_of(by_name(state.params))
        log.row({"parameters": parameters})
    console.print(f"{step} steps, parameters {parameters[:12]}, on {devices}")
    return 0


def counted(number: int, noun: str, plural: str = "s") -> str:
    """The number and the noun."""
    return f"{number} {noun}{plural if number != 1 else ''}"


def own_stdout() -> TextIO:
    """Standard output for this program alone: what gloo prints there, a line for each connection, goes nowhere."""
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return ours


def main(argv: Sequence[str] | None = None) -> int:
    """Read the options, join the other processes, train; returns the exit status."""
    args, signals, stdout = parse(argv, models=LAYERS, description=__doc__), Signals(), None
    signals.listen()
    if args.coordinator:
        stdout = own_stdout()
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `signals`
        jax.distributed.initialize(args.coordinator, args.processes, args.process, shutdown_timeout_seconds=30)
    first = jax.process_index() == 0
    if not first:
        args.json = args.tensorboard = args.profile = None
    console = rich.console.Console(file=stdout, highlight=False, soft_wrap=True, quiet=not first)
    try:
        return train(args, signals, console)
    except Problem as problem:
        if first:
            print(problem, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
