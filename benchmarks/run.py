"""Time `deform_conv` beside the plain convolution of the same shape and, where there is one, torchvision's op.

Every figure is the median of many runs; all the runs of a workload (ours, the plain convolution's, torchvision's) take
turns in one loop, so that a machine that slows down slows them all, and every workload is come back to twice, so that a
few slow seconds do not decide its figure. "forward_backward" computes the result and the
gradients of x, kernel, offset and mask (plain convolution: of x and kernel). torchvision runs in a Python of its own
(--peer-python) with as many threads, and is asked run by run.

In the table, "plain" is the plain convolution; "columns" are the bytes of the im2col columns, which neither of ours makes;
"floor" is the time that the products or the memory traffic of a forward pass take at the rates measured on this device;
"peak" is the memory of arguments, results and scratch; "error" (on a GPU) is the largest of result and gradients, against
the XLA implementation in full float32.
"""

import argparse
import difflib
import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with torchvision's process

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.report import FIGURES, STACK, figures_table, plot, results_table, spoken
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from benchmarks.workloads import BATCHES, FIVE, GPU, KINDS, MAPS, RESNET, WORKLOADS, Workload

MODES = ("forward", "forward_backward")
DTYPES = ("float32", "bfloat16", "float16")
VISITS = 3  # to each workload, its runs spread over them
WARM_UP = (
    0.05  # seconds before each run: cores wake up only by and by after another process's turn, and caches are cold
)
GPU_CACHE = 200e6  # bytes; inputs are rotated until they are more than this, four times an H100's L2


class Group(NamedTuple):
    """Workloads and dtypes whose runs take turns, so that their times can be compared."""

    workloads: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)

    @property
    def with_peer(self) -> bool:
        """Groups that compare sizes with each other leave torchvision out."""
        return len(self.workloads) == 1


def singly(workloads: Sequence[str], dtypes: tuple[str, ...] = ("float32",)) -> tuple[Group, ...]:
    """A group for each workload."""
    return tuple(Group((name,), dtypes) for name in workloads)


SUITES = {
    "cpu": singly([*FIVE, *(name for name in RESNET if name not in FIVE), "stride2", "dcnv1", *KINDS]),
    "five": singly(FIVE),
    "kinds": singly(KINDS),
    "scaling": (Group(BATCHES), Group(MAPS)),
    "reach": (*singly(FIVE, ("float32", "bfloat16")), *singly(KINDS), Group(BATCHES), Group(MAPS)),
    "gpu": singly(GPU, DTYPES),
}


# What is timed


class JaxProgram:
    """A compiled function and the inputs it is timed on."""

    def __init__(self, function: Callable, inputs: Sequence[Sequence[jax.Array]]):
        self.inputs = inputs
        start = time.perf_counter()
        self.compiled = jax.jit(function).lower(*inputs[0]).compile()
        self.compile_s = time.perf_counter() - start
        memory: Any = self.compiled.memory_analysis()
        self.scratch_bytes = memory.temp_size_in_bytes
        self.peak_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    def run(self, calls: int) -> float:
        """Milliseconds of one of `calls` calls, after some that count for nothing."""
        results, start = None, time.perf_counter()
        while results is None or time.perf_counter() - start < WARM_UP:
            results = jax.block_until_ready(self.compiled(*self.inputs[-1]))
        start = time.perf_counter()
        for call in range(calls):
            results = self.compiled(*self.inputs[call % len(self.inputs)])
        jax.block_until_ready(results)
        return 1e3 * (time.perf_counter() - start) / calls


def with_gradients(function: Callable) -> Callable:
    """`(cotangent, *arguments)` to the function's result and the gradients of its arguments."""

    def both(cotangent, *arguments):
        y, vjp = jax.vjp(function, *arguments)
        return y, vjp(cotangent)  # y too, or XLA would skip the forward pass of a plain convolution

    return both


def make_program(function: Callable, inputs: Sequence[Sequence[jax.Array]], mode: str) -> JaxProgram:
    """Compile `function` for `mode`."""
    if mode == "forward":
        return JaxProgram(function, inputs)
    y = jax.eval_shape(function, *inputs[0])
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape, np.float32)).astype(y.dtype)
    return JaxProgram(with_gradients(function), [[cotangent, *arguments] for arguments in inputs])


class Peer:
    """torchvision's op in a Python of its own, asked over a pipe."""

    def __init__(self, python: str, device: str, allow_tf32: bool):
        self.device, self.allow_tf32 = {"gpu": "cuda"}.get(device, device), allow_tf32
        script = Path(__file__).with_name("peer.py")
        self.process: Any = subprocess.Popen(
            [python, str(script), str(threads()), str(WARM_UP)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,  # Ctrl-C is ours to answer
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},  # its threads do not spin on into the next one's turn
        )  # fmt: skip
        self.version = self._answer()["version"]

    def ask(self, **command: Any) -> dict:
        """The worker's answer to one command."""
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"torchvision's process ended with status {self.process.wait()}")
        return json.loads(line)

    def prepare(self, work: Workload, dtype: str, mode: str, copies: int, name: str) -> dict:
        """Make the tensors of a workload, to be run by `name`; {"error": …} where torchvision cannot run it."""
        if len(work.window) != 2:
            return {"error": "torchvision's op has two spatial axes"}
        description = {**work._asdict(), "padding": work.padding, "out_spatial": work.out_spatial}
        settings = {"dtype": dtype, "mode": mode, "device": self.device, "allow_tf32": self.allow_tf32}
        return self.ask(name=name, prepare={"work": description, "copies": copies, **settings})

    def run(self, name: str, calls: int) -> float:
        """Milliseconds of one of `calls` calls of a prepared workload."""
        answer = self.ask(run=name, calls=calls)
        if "error" in answer:
            raise RuntimeError(f"torchvision: {answer['error']}")
        time.sleep(0.01)  # its threads spin for a while before they sleep
        return answer["ms"]

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def threads() -> int:
    """Cores that this process may use: XLA takes as many threads, and torch is told to."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Measuring


class Case(NamedTuple):
    """Whose run it is; the program is an implementation, "dense" or "peer"."""

    workload: str
    dtype: str
    program: str


Run = Callable[[int], float]  # so many calls, to the milliseconds of one


class Options(NamedTuple):
    """What all measurements of one command share."""

    device: str
    device_name: str
    implementations: tuple[str, ...]
    repeats: int
    tf32: bool
    peer: Peer | None


def calls_for(milliseconds: float) -> int:
    """How many calls make a run that a clock can measure."""
    return max(1, min(100, round(20 / max(milliseconds, 1e-3))))


class Job:
    """Runs whose times are to be compared, the times they took so far, and the rows that tell these."""

    def __init__(self, rows: list[dict], runs: dict[Case, Run]):
        self.rows, self.runs = rows, runs
        self.times: dict[Case, list[float]] = {case: [] for case in runs}

    def take_turns(self, rounds: Sequence[int], peer_every: int, advance: Callable[[], None]) -> None:
        """Time each run once a round, but the peer's only in some rounds, and bring the rows' medians up to date."""
        calls = {}
        for case, run in self.runs.items():
            run(1)
            calls[case] = calls_for(run(1))
        for turn in rounds:
            for case in list(self.runs)[
                :: -1 if turn % 2 else 1
            ]:  # there and back: no run always follows the same other
                if case.program != "peer" or turn % peer_every == 0:
                    self.times[case].append(self.runs[case](calls[case]))
            advance()
        medians = {case: statistics.median(times) for case, times in self.times.items() if times}
        for row in self.rows:
            names = {"ms": row["implementation"], "dense_ms": "dense", "peer_ms": "peer"}
            row |= {key: medians.get(Case(row["workload"], row["dtype"], program)) for key, program in names.items()}


class Rates(NamedTuple):
    """What this device can do, per second, measured."""

    flops: float  # of a matrix product
    memory: float  # bytes read and written of arrays that fit no cache
    cache: float  # bytes read of an array that fits one


@functools.cache
def measure_rates(device: str, dtype: str, precision: str | None) -> Rates:
    """The best of several runs of a large matrix product, a large copy, and many reads of a small array."""
    gpu = device == "gpu"
    side, large, small, step, reads = (8192, 2**28, 2**22, 2**16, 32) if gpu else (1024, 2**26, 2**18, 2**12, 32)

    def per_second(amount: float, function: Callable, *arguments: jax.Array) -> float:
        program = JaxProgram(function, [arguments])
        program.run(1)
        return 1e3 * amount / min(program.run(10 if gpu else 1) for _ in range(5))

    def read_often(a):  # fused into one loop: each element out reads `reads` elements in
        return sum(a[step * i : step * i + small] for i in range(reads))

    square = jnp.ones((side, side), dtype)
    return Rates(
        per_second(2 * side**3, lambda a, b: jnp.matmul(a, b, precision=precision), square, square),
        per_second(2 * 4 * large, lambda a: a + 1, jnp.ones(large, "float32")),
        per_second(4 * small * (reads + 1), read_often, jnp.ones(small + step * reads, "float32")),
    )


def floor(work: Workload, dtype: str, rates: Rates) -> float:
    """Milliseconds below which a forward pass cannot go: its products, its reading of corners, or its arguments."""
    itemsize = jnp.dtype(dtype).itemsize
    corners = work.columns * itemsize * 2 ** len(work.window)
    arguments = sum(math.prod(s.shape) for s in work.shapes(dtype)) * itemsize
    result = work.x[0] * math.prod(work.out_spatial) * work.features * itemsize
    return 1e3 * max(work.flops / rates.flops, corners / rates.cache, (arguments + result) / rates.memory)


@functools.cache
def exact(name: str, mode: str) -> Callable:
    """The XLA implementation in full float32 products, compiled."""
    function = functools.partial(WORKLOADS[name].deform_conv, implementation="xla", precision="highest")
    return jax.jit(function if mode == "forward" else with_gradients(function))


def parity(name: str, mode: str, program: JaxProgram) -> float:
    """The largest error of result and gradients on the first inputs, relative to the largest value of each."""
    arguments = program.inputs[0]
    ours = jax.tree.leaves(program.compiled(*arguments))
    truth = jax.tree.leaves(exact(name, mode)(*(a.astype(jnp.float32) for a in arguments)))
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(ours, truth, strict=True)]
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def prepare(name: str, dtype: str, mode: str, with_peer: bool, options: Options) -> tuple[list[dict], dict[Case, Run]]:
    """The rows of a workload, without their times, and the runs that will tell these."""
    work, precision = WORKLOADS[name], None if options.tf32 else "highest"
    itemsize = jnp.dtype(dtype).itemsize
    copies = 1
    if options.device == "gpu":
        copies = min(16, math.ceil(GPU_CACHE / (itemsize * sum(math.prod(s.shape) for s in work.shapes(dtype)))))
    inputs = [work.arrays(seed, dtype) for seed in range(copies)]

    def plain(*arguments):
        return work.dense(*arguments, precision=precision)

    dense = make_program(plain, [arguments[:2] for arguments in inputs], mode)
    runs = {Case(name, dtype, "dense"): dense.run}

    answer = {"error": "not asked for"}
    if options.peer and with_peer:
        label = f"{name}, {dtype}, {mode}"
        answer = options.peer.prepare(work, dtype, mode, copies, label)
        if "error" not in answer:
            runs[Case(name, dtype, "peer")] = functools.partial(options.peer.run, label)

    floor_ms = floor(work, dtype, measure_rates(options.device, dtype, precision)) if mode == "forward" else None
    rows = []
    for implementation in options.implementations:
        row = {
            "workload": name, "implementation": implementation, "dtype": dtype, "mode": mode,
            "ms": None, "dense_ms": None, "peer_ms": None, "compile_s": None, "scratch_bytes": None, "peak_bytes": None,
            "parity": None, "dense_compile_s": dense.compile_s, "dense_scratch_bytes": dense.scratch_bytes,
            "dense_peak_bytes": dense.peak_bytes, "peer_peak_bytes": answer.get("peak_bytes"), "floor_ms": floor_ms,
            "columns_bytes": work.columns * itemsize, "tf32": options.tf32, "error": None, "peer_error": answer.get("error"),
            "device": options.device_name, "jax": jax.__version__,
        }  # fmt: skip
        rows.append(row)

        def ours(*arguments, implementation=implementation):
            return work.deform_conv(*arguments, implementation=implementation, precision=precision)

        try:
            program = make_program(ours, inputs, mode)
            program.run(1)
        except Exception as error:  # whatever it is, it goes into the row and the others go on
            row["error"] = f"not available: {reason(error)}"
            continue
        row |= {key: getattr(program, key) for key in ("compile_s", "scratch_bytes", "peak_bytes")}
        if options.device == "gpu":
            row["parity"] = parity(name, mode, program)
        runs[Case(name, dtype, implementation)] = program.run
    return rows, runs


def prepare_group(group: Group, mode: str, options: Options) -> Job:
    """The job of timing a group in one mode."""
    rows, runs = [], {}
    for name in group.workloads:
        for dtype in group.dtypes:
            more_rows, more_runs = prepare(name, dtype, mode, group.with_peer, options)
            rows += more_rows
            runs |= more_runs
    return Job(rows, runs)


def compile_stack(options: Options) -> dict:
    """A row with the seconds to trace and compile a stack of 12 layers, forward and backward, without their times."""
    work = WORKLOADS["conv4-224"]
    x, kernel, offset, mask = work.shapes("float32")

    def ours(x, *layers):
        for kernel, offset, mask in layers:
            x = work.deform_conv(x, kernel, offset, mask, implementation="xla")
        return x

    def plain(x, *kernels):
        return functools.reduce(work.dense, kernels, x)

    stacks = {"compile_s": (ours, (kernel, offset, mask)), "dense_compile_s": (plain, kernel)}
    seconds = {key: [] for key in stacks}
    for _ in range(min(3, options.repeats)):
        for key, (function, layer) in stacks.items():
            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(with_gradients(function)).lower(x, x, *[layer] * 12).compile()
            seconds[key].append(time.perf_counter() - start)
    return {
        "workload": STACK, "implementation": "xla", "dtype": "float32", "mode": "forward_backward",
        "ms": None, "dense_ms": None, "peer_ms": None, "scratch_bytes": None, "error": None,
        **{key: statistics.median(measured) for key, measured in seconds.items()},
        "device": options.device_name, "jax": jax.__version__,
    }  # fmt: skip


# The command


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        """Say what is wrong and leave."""
        self.exit(2, f"{self.prog}: {message} (--help lists all options)\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's options, checked."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    what = p.add_argument_group("what to time")
    what.add_argument(
        "--suite", choices=SUITES, metavar="NAME",
        help=f"a set of workloads: {', '.join(SUITES)} (default: cpu, or gpu with --device gpu); reach and gpu also print "
        "the figures that were set out to be reached",
    )  # fmt: skip
    what.add_argument("--workload", nargs="+", metavar="NAME", help="workloads in place of a suite; --list names them")
    what.add_argument("--list", action="store_true", help="list the workloads and stop")
    what.add_argument("--dtype", nargs="+", choices=DTYPES, help="in place of the suite's own (float32 for most)")
    what.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help="(default: both)")
    what.add_argument(
        "--implementation", nargs="+", choices=("xla", "pallas"), help="(default: xla; both with --device gpu)"
    )
    what.add_argument("--compile", action="store_true", help="also compile a stack of 12 layers, as suite reach does")
    how = p.add_argument_group("how to time it")
    how.add_argument("--device", choices=("cpu", "gpu"), help="(default: JAX's own choice)")
    how.add_argument(
        "--peer-python", metavar="PATH",
        help="a Python with torchvision, to time its op too (default: with --device gpu this one, if it has it)",
    )  # fmt: skip
    how.add_argument("--repeats", type=int, default=20, metavar="N", help="rounds of runs (default: 20)")
    how.add_argument("--quick", action="store_true", help="2 rounds, for a first look")
    how.add_argument(
        "--minutes", type=float, metavar="M", help="begin nothing more after M minutes (default: 7 for suite gpu)"
    )
    how.add_argument("--no-tf32", action="store_true", help="full float32 products on a GPU, for all sides")
    out = p.add_argument_group("what to write")
    out.add_argument("--json", metavar="FILE", help="the rows, as a JSON list of objects")
    out.add_argument("--plot", metavar="FILE", help="a picture of the ratios (.png, .svg, .pdf)")
    args = p.parse_args(argv)

    for name in args.workload or ():
        if name not in WORKLOADS:
            near = difflib.get_close_matches(name, WORKLOADS, 1)
            p.error(f"--workload {name}: not known" + (f"; {near[0]}?" if near else "; --list names them"))
    if args.workload and args.suite:
        p.error("--suite and --workload exclude each other")
    if args.repeats < 1:
        p.error(f"--repeats {args.repeats}: wanted at least 1")
    for option in ("json", "plot"):
        path = getattr(args, option)
        if path and not Path(path).resolve().parent.is_dir():
            p.error(f"--{option} {path}: there is no such folder")
    if args.plot:
        if importlib.util.find_spec("matplotlib") is None:
            p.error('--plot needs matplotlib: pip install "dcn-jax[viz]"')
        if Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
            p.error(f"--plot {args.plot}: wanted a name that ends in .png, .svg or .pdf")
    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        args.device = jax.devices(args.device)[0].platform
    except RuntimeError as error:
        p.error(f"--device {args.device}: {reason(error)}")
    if not args.workload:
        args.suite = args.suite or args.device
    if args.minutes is None:
        args.minutes = 7 if args.suite == "gpu" else math.inf
    if args.peer_python:
        if problem := peer_problem(args.peer_python):
            p.error(f"--peer-python {args.peer_python}: {problem}")
    elif args.device == "gpu" and importlib.util.find_spec("torchvision"):
        args.peer_python = sys.executable
    return args


def peer_problem(python: str) -> str | None:
    """Why torchvision cannot be asked in that Python, or None."""
    if not shutil.which(python):
        return "no such program"
    check = subprocess.run([python, "-c", "import torchvision"], capture_output=True, text=True)
    return f"cannot import torchvision ({check.stderr.strip().splitlines()[-1]})" if check.returncode else None


def groups_of(args: argparse.Namespace) -> tuple[Group, ...]:
    """The groups that the command asks for."""
    groups = SUITES[args.suite] if args.suite else singly(args.workload)
    return tuple(group._replace(dtypes=tuple(args.dtype)) if args.dtype else group for group in groups)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measure, print the tables, write the files; returns the rows."""
    jax.config.update("jax_enable_compilation_cache", False)  # it would make compile times those of a file's reading
    args, start = parse(argv), time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    if args.list:
        for name, work in WORKLOADS.items():
            console.print(f"{name:24}{work}", highlight=False)
        return []

    options = Options(
        device=args.device,
        device_name=f"CPU, {threads()} threads" if args.device == "cpu" else jax.devices()[0].device_kind,
        implementations=tuple(args.implementation or (("xla", "pallas") if args.device == "gpu" else ("xla",))),
        repeats=2 if args.quick else args.repeats,
        tf32=not args.no_tf32,
        peer=Peer(args.peer_python, args.device, not args.no_tf32) if args.peer_python else None,
    )
    console.print(
        f"{options.device_name}; jax {jax.__version__}" + (f"; {options.peer.version}" if options.peer else "")
    )
    wanted = [(group, mode) for group in groups_of(args) for mode in args.mode]
    visits = min(VISITS, options.repeats)
    rounds = [range(n * options.repeats // visits, (n + 1) * options.repeats // visits) for n in range(visits)]
    jobs: list[Job] = []
    rows: list[dict] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(wanted) * options.repeats)
            for visit, (number, (group, mode)) in itertools.product(range(visits), enumerate(wanted)):
                if time.perf_counter() - start > 60 * args.minutes:
                    console.print(f"{args.minutes:g} minutes are over: what follows is what was measured until then")
                    break
                progress.update(task, description=f"{', '.join(group.workloads)}: {spoken(mode)}")
                if visit == 0:
                    jobs.append(prepare_group(group, mode, options))
                job = jobs[number]
                job.take_turns(rounds[visit], max(1, options.repeats // 7), functools.partial(progress.advance, task))
                if visit == 0:
                    rows += job.rows  # now that they have times, which later visits improve
            if args.compile or args.suite == "reach":
                progress.update(task, description="compiling 12 layers")
                rows.append(compile_stack(options))
    except KeyboardInterrupt:
        console.print("interrupted: what follows is what was measured until then")
    finally:
        if options.peer:
            options.peer.close()

    console.print(results_table(rows))
    if args.suite in FIGURES:
        console.print(figures_table(FIGURES[args.suite](rows)))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot and any(row["ms"] is not None for row in rows):
        plot(rows, args.plot)
    return rows


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the measuring, which has its own answer
        sys.exit(130)
