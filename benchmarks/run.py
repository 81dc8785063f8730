"""Time the ops beside the plain convolution and beside other libraries' ops.

    python -m benchmarks.run --quick --workload small    # a first look

Every figure is the median of many runs. Ours, the plain convolution's and the
peers' take turns, so that a machine that slows down slows them all, and each
workload is visited three times, so that a few slow seconds do not decide its
figure. "forward_backward" computes the result and the gradients of x, kernel,
offset and mask (plain convolution: of x and kernel). The peers are torchvision,
onnxruntime and OpenVINO, which only infer on a CPU, and on a GPU deformops, as
far as Pythons of your choice have them (--peer-python): each runs in a process
of its own, with as many threads, and counts only if its results are ours.
The family (--suite family) stands beside torch, attention also beside
zeromodels, which has it for JAX; DCNv3 and DCNv4 beside the dense DCNv2 of
their shape, which is their "plain". --suite layers times the
layer, offset convolution included, beside flax.nnx.Conv. --suite race runs on a
GPU ours in several forms, "xla" of an older commit (--archive DIR) and all
peers, the most telling first; it prints each result as it comes, and --json
writes a line for each.

A GPU computes small calls in less time than it takes to launch them from
Python. So there a run is of programs that call the op once for each of several
sets of inputs, which together fit no cache (the XLA implementation, whose many
kernels take longer, of single calls), and the peers' of CUDA graphs. All is
compiled before, side by side: compile seconds are of a busy machine.

A terminal of 80 columns shows what matters most; a wider one shows more, and
--json writes all. In the table,
  plain    is the plain convolution, and peer the fastest of the peers;
  scratch  is the memory beside arguments and results, columns that of the
           im2col columns, which neither of ours makes, result the result's;
  error    (on a GPU) is the largest of result and gradients, against the XLA
           implementation in full float32;
  floor    is the time of a forward pass's products or memory traffic at the
           rates measured on this device;
  peak     is the memory of arguments, results and scratch.
"""

import argparse
import difflib
import functools
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.aims import AIMS, aims_table
from benchmarks.measure import Measurement, Settings, compile_ahead, compile_stack, prepare, visits
from benchmarks.peers.process import PEERS, peer_problem, start_peers, threads
from benchmarks.plot import plot
from benchmarks.programs import MODES, use_device
from benchmarks.race import run_race
from benchmarks.report import print_results
from benchmarks.rows import STACKS, counted, spoken
from benchmarks.suites import COMPILED, DTYPES, SUITES, Comparison, singly
from benchmarks.workloads import WORKLOADS

IMPLEMENTATIONS = ("xla", "pallas_gpu")
PICTURES = (".png", ".svg", ".pdf")


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        usage=argparse.SUPPRESS,  # an error is one line then
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = p.add_argument_group("what to time")
    add = functools.partial(what.add_argument, metavar="NAME")
    add("--suite", choices=SUITES, help=f"a set of workloads: {', '.join(SUITES)} (default: cpu or gpu, as the device)")
    add("--workload", nargs="+", help="workloads in place of a suite; --list names them")
    what.add_argument("--list", action="store_true", help="list the workloads and stop")
    add("--dtype", nargs="+", choices=DTYPES, help=f"{', '.join(DTYPES)} (default: the suite's own)")
    add("--mode", nargs="+", choices=MODES, default=MODES, help=f"{', '.join(MODES)} (default: both)")
    add(
        "--implementation",
        nargs="+",
        choices=IMPLEMENTATIONS,
        help=f"{', '.join(IMPLEMENTATIONS)} (default: xla; both with --device gpu); pallas_tpu runs on TPUs alone, "
        "which this program does not time",
    )
    what.add_argument(
        "--compile", action="store_true", help=f"also compile stacks of layers, as suites {' and '.join(COMPILED)} do"
    )

    add = p.add_argument_group("how to time it").add_argument
    add("--device", choices=("cpu", "gpu"), metavar="NAME", help="cpu, gpu (default: JAX's own choice)")
    peer_help = (
        f"Pythons that have {', '.join(PEERS)}, or some (default: with --device gpu this one, if it has torchvision)"
    )
    add("--peer-python", nargs="+", default=[], metavar="PATH", help=peer_help)
    add("--repeats", type=int, default=20, metavar="N", help="rounds of runs (default: 20)")
    add("--quick", action="store_true", help="2 rounds, for a first look")
    add(
        "--minutes",
        type=float,
        metavar="M",
        help="begin nothing more after M minutes (default: 7 for suites gpu and race)",
    )
    add("--archive", metavar="DIR", help="suite race: an older commit's sources")
    add("--no-tf32", action="store_true", help="full float32 products on a GPU, for all sides")

    add = p.add_argument_group("what to write").add_argument
    add("--json", metavar="FILE", help="the rows, as a JSON list of objects")
    add("--plot", metavar="FILE", help=f"a picture of the ratios ({', '.join(PICTURES)})")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's options, checked; whatever is wrong is said in one line."""
    p = make_parser()
    args, unknown = p.parse_known_args(argv)
    if problem := unknown_problem(unknown, args) or problem_of(args):
        p.error(problem)
    args.device = use_device(p, args.device)
    if not args.workload:
        args.suite = args.suite or args.device
    if args.minutes is None:
        args.minutes = 7 if args.suite in ("gpu", "race") else math.inf
    if not args.peer_python and args.device == "gpu" and importlib.util.find_spec("torchvision"):
        args.peer_python = [sys.executable]
    return args


def unknown_problem(unknown: list[str], args: argparse.Namespace) -> str | None:
    """What to say of arguments that are no options, and the cure, or None."""
    if not unknown:
        return None
    options = [f"--{name.replace('_', '-')}" for name in vars(args)]
    near = difflib.get_close_matches(unknown[0], options, 1)
    return f"unrecognized arguments: {' '.join(unknown)}; {f'{near[0]}?' if near else '--help lists all options'}"


def problem_of(args: argparse.Namespace) -> str | None:
    """The first thing that is wrong with the options, and its cure, or None."""
    for name in args.workload or ():
        if name not in WORKLOADS:
            near = difflib.get_close_matches(name, WORKLOADS, 1)
            return f"--workload {name}: not known; {f'{near[0]}?' if near else '--list names them'}"
    if args.workload and args.suite:
        return "--suite and --workload exclude each other; give one of them"
    if args.repeats < 1:
        return f"--repeats {args.repeats}: wanted at least 1"
    for option, path in (("json", args.json), ("plot", args.plot)):
        if path and not Path(path).resolve().parent.is_dir():
            return f"--{option} {path}: there is no such folder; make it first"
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        return '--plot needs matplotlib: pip install "dcn-jax[viz]"'
    if args.plot and Path(args.plot).suffix not in PICTURES:
        return f"--plot {args.plot}: wanted a name that ends in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}"
    for python in args.peer_python:
        if problem := peer_problem(python):
            return f"--peer-python {python}: {problem}; name a Python that has one"
    return None


def comparisons_of(args: argparse.Namespace) -> tuple[Comparison, ...]:
    """The comparisons that the command asks for."""
    comparisons = SUITES[args.suite] if args.suite else singly(args.workload)
    return tuple(c._replace(dtypes=tuple(args.dtype)) if args.dtype else c for c in comparisons)


def settings_of(args: argparse.Namespace) -> Settings:
    """What all measurements share; starts the peers' processes, if there are to be some."""
    gpu = args.device == "gpu"
    ops = {WORKLOADS[name].op for comparison in comparisons_of(args) for name in comparison.workloads}
    return Settings(
        device=args.device,
        device_name=f"CPU, {threads()} threads" if args.device == "cpu" else jax.devices()[0].device_kind,
        implementations=tuple(args.implementation or (IMPLEMENTATIONS if gpu else ("xla",))),
        repeats=2 if args.quick else args.repeats,
        tf32=not args.no_tf32,
        peers=start_peers(args.peer_python, ops, args.device, not args.no_tf32),
    )


def make_console() -> Console:
    """As wide as the terminal or as COLUMNS says; without either, wide enough for all columns."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=180)


def measure(args: argparse.Namespace, settings: Settings, deadline: float, console: Console) -> list[dict]:
    """The rows of all that was asked for, or of what there was time for."""
    wanted = [(comparison, mode) for comparison in comparisons_of(args) for mode in args.mode]
    measurements: list[Measurement] = []
    rows: list[dict] = []
    bar = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    try:
        with Progress(TextColumn("{task.description}"), *bar, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(wanted) * settings.repeats)
            advance = functools.partial(progress.advance, task)
            progress.update(task, description="compiling")
            ahead = compile_ahead(wanted, settings)
            for number, rounds in visits(len(wanted), settings.repeats):
                if time.perf_counter() > deadline:
                    console.print(f"{args.minutes:g} minutes are over: what follows is what was measured until then")
                    break
                comparison, mode = wanted[number]
                progress.update(task, description=f"{', '.join(comparison.workloads)}: {spoken(mode)}")
                first = number == len(measurements)
                if first:
                    measurements.append(prepare(comparison, mode, settings, ahead))
                measurements[number].take_turns(rounds, max(1, settings.repeats // 7), advance)
                if first:
                    rows += measurements[number].rows  # later visits improve their times
            for stack in STACKS if args.compile or args.suite in COMPILED else ():
                progress.update(task, description=f"compiling {counted(stack)}")
                rows.append(compile_stack(stack, settings))
    except KeyboardInterrupt:
        console.print("interrupted: what follows is what was measured until then")
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measure, print the tables, write the files; returns the rows."""
    # A GPU is shared with torchvision; a cache would make compile times those of reading a file.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_enable_compilation_cache", False)
    start = time.perf_counter()
    args, console = parse(argv), make_console()
    if args.list:
        for name, work in WORKLOADS.items():
            console.print(f"{name:24}{work}", highlight=False)
        return []

    if args.suite == "race":
        return run_race(args, console)
    settings = settings_of(args)
    try:
        versions = [f"jax {jax.__version__}", *(peer.version or peer.problem for peer in settings.peers.values())]
        console.print(f"{settings.device_name}; {', '.join(versions)}", highlight=False)
        rows = measure(args, settings, start + 60 * args.minutes, console)
    finally:
        for peer in settings.peers.values():
            peer.close()

    print_results(rows, console)
    if args.suite in AIMS:
        console.print("", aims_table(AIMS[args.suite](rows)), sep="\n")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot and any(row["ms"] and row["dense_ms"] for row in rows):
        plot(rows, args.plot)
    return rows


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the measuring, which has its own answer
        sys.exit(130)
