"""Time `deform_conv` beside the plain convolution of the same shape and, where there is one, torchvision's op.

Every figure is the median of many runs; all the runs of a workload (ours, the plain convolution's, torchvision's) take
turns in one loop, so that a machine that slows down slows them all. "forward_backward" computes the result and the
gradients of x, kernel, offset and mask (plain convolution: of x and kernel). torchvision runs in a Python of its own
(--peer-python) with as many threads, and is asked run by run.
"""

import argparse
import difflib
import functools
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with torchvision's process

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from workloads import WORKLOADS, Workload

MODES = ("forward", "forward_backward")
DTYPES = ("float32", "bfloat16", "float16")
GPU_CACHE = 200e6  # bytes; inputs are rotated until they are more than this, four times an H100's L2


class Group(NamedTuple):
    """Workloads and dtypes whose runs take turns, so that their times can be compared."""

    workloads: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)

    @property
    def with_peer(self) -> bool:
        """Groups that compare sizes with each other leave torchvision out."""
        return len(self.workloads) == 1


FIVE = ("conv2-224", "conv3-224", "conv4-224", "conv4-detector", "small")
KINDS = ("groups4", "offset-groups4", "groups4-offset-groups4", "groups32", "depthwise", "1d", "3d")
RESNET = ("conv3-224", "conv4-224", "conv5-224", "conv3-detector", "conv4-detector", "conv5-detector")
GPU = ("gpu-conv3", "gpu-conv4", "gpu-conv5", "gpu-conv2")
BATCHES = tuple(name for name in WORKLOADS if name.startswith("batch"))
MAPS = tuple(name for name in WORKLOADS if name.startswith("map"))

SUITES = {
    "cpu": tuple(Group((name,)) for name in dict.fromkeys((*FIVE, *RESNET, "stride2", "dcnv1", *KINDS))),
    "five": tuple(Group((name,)) for name in FIVE),
    "kinds": tuple(Group((name,)) for name in KINDS),
    "scaling": (Group(BATCHES), Group(MAPS)),
    "reach": (
        *(Group((name,), ("float32", "bfloat16")) for name in FIVE),
        *(Group((name,)) for name in KINDS),
        Group(BATCHES),
        Group(MAPS),
    ),
    "gpu": tuple(Group((name,), DTYPES) for name in GPU),
}


# Programs: what is timed


class JaxProgram:
    """A compiled function and the inputs it is timed on."""

    def __init__(self, function: Callable, inputs: Sequence[Sequence[jax.Array]]):
        self.inputs = inputs
        start = time.perf_counter()
        self.compiled = jax.jit(function).lower(*inputs[0]).compile()
        self.compile_s = time.perf_counter() - start
        memory = self.compiled.memory_analysis()
        self.scratch_bytes = memory.temp_size_in_bytes
        self.peak_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    def run(self, calls: int) -> float:
        """Milliseconds of one of `calls` calls."""
        start = time.perf_counter()
        for call in range(calls):
            result = self.compiled(*self.inputs[call % len(self.inputs)])
        jax.block_until_ready(result)
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
    cotangent = jax.random.normal(jax.random.key(1), y.shape).astype(y.dtype)
    return JaxProgram(with_gradients(function), [[cotangent, *arguments] for arguments in inputs])


class Peer:
    """torchvision's op in a Python of its own, asked over a pipe."""

    def __init__(self, python: str, device: str, allow_tf32: bool):
        self.device, self.allow_tf32 = {"gpu": "cuda"}.get(device, device), allow_tf32
        script = Path(__file__).with_name("benchmark_peer.py")
        self.process = subprocess.Popen(
            [python, str(script), str(threads())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
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
        self.process.stdin.close()
        self.process.wait()


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
    return max(1, min(100, round(10 / max(milliseconds, 1e-3))))


def take_turns(runs: dict[Case, Run], repeats: int, advance: Callable[[], None]) -> dict[Case, float]:
    """Median milliseconds of each of `runs`, which take turns for `repeats` rounds; the peer joins in about 7 of them."""
    calls = {}
    for case, run in runs.items():
        run(1)
        calls[case] = calls_for(run(1))
    every = max(1, repeats // 7)
    times: dict[Case, list[float]] = {case: [] for case in runs}
    for turn in range(repeats):
        for case, run in runs.items():
            if case.program != "peer" or turn % every == 0:
                times[case].append(run(calls[case]))
        advance()
    return {case: statistics.median(measured) for case, measured in times.items()}


def reason(error: Exception) -> str:
    """One line that says why something is not available."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def prepare(name: str, dtype: str, mode: str, with_peer: bool, options: Options) -> tuple[list[dict], dict[Case, Run]]:
    """The rows of a workload, without their times, and the runs that will tell these."""
    work, precision = WORKLOADS[name], None if options.tf32 else "highest"
    itemsize = jnp.dtype(dtype).itemsize
    copies = 1
    if options.device == "gpu":
        copies = min(16, math.ceil(GPU_CACHE / (itemsize * sum(math.prod(s.shape) for s in work.shapes(dtype)))))
    inputs = [work.arrays(jax.random.key(seed), dtype) for seed in range(copies)]

    def plain(*arguments):
        return work.dense(*arguments, precision=precision)

    dense = make_program(plain, [arguments[:2] for arguments in inputs], mode)
    runs = {Case(name, dtype, "dense"): dense.run}

    answer = {"error": "not asked for"}
    if options.peer and with_peer:
        answer = options.peer.prepare(work, dtype, mode, copies, dtype)
    if "error" not in answer:
        runs[Case(name, dtype, "peer")] = functools.partial(options.peer.run, dtype)

    rows = []
    for implementation in options.implementations:
        row = {
            "workload": name, "implementation": implementation, "dtype": dtype, "mode": mode,
            "ms": None, "dense_ms": None, "peer_ms": None, "compile_s": None, "scratch_bytes": None, "peak_bytes": None,
            "dense_compile_s": dense.compile_s, "dense_scratch_bytes": dense.scratch_bytes,
            "dense_peak_bytes": dense.peak_bytes, "peer_peak_bytes": answer.get("peak_bytes"),
            "columns_bytes": work.columns * itemsize, "tf32": options.tf32, "error": None, "peer_error": answer.get("error"),
            "device": options.device_name, "jax": jax.__version__,
        }  # fmt: skip
        rows.append(row)

        def ours(*arguments, implementation=implementation):
            return work.deform_conv(*arguments, implementation=implementation, precision=precision)

        try:
            program = make_program(ours, inputs, mode)
            program.run(1)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            row["error"] = f"not available: {reason(error)}"
            continue
        row |= {name: getattr(program, name) for name in ("compile_s", "scratch_bytes", "peak_bytes")}
        runs[Case(name, dtype, implementation)] = program.run
    return rows, runs


def measure(group: Group, mode: str, options: Options, advance: Callable[[], None]) -> list[dict]:
    """The rows of a group in one mode."""
    if options.peer:
        options.peer.ask(forget=True)
    rows, runs = [], {}
    for name in group.workloads:
        for dtype in group.dtypes:
            more_rows, more_runs = prepare(name, dtype, mode, group.with_peer, options)
            rows += more_rows
            runs |= more_runs
    times = take_turns(runs, options.repeats, advance)
    for row in rows:
        names = {"ms": row["implementation"], "dense_ms": "dense", "peer_ms": "peer"}
        row |= {key: times.get(Case(row["workload"], row["dtype"], program)) for key, program in names.items()}
    return rows


STACK = 12  # layers of a ResNet-50 that the paper makes deformable


def compile_stack(options: Options) -> dict:
    """A row with the seconds to trace and compile a stack of layers, forward and backward."""
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
            jax.jit(with_gradients(function)).lower(x, x, *[layer] * STACK).compile()
            seconds[key].append(time.perf_counter() - start)
    return {
        "workload": f"stack{STACK}", "implementation": "xla", "dtype": "float32", "mode": "forward_backward",
        "ms": None, "dense_ms": None, "peer_ms": None, "scratch_bytes": None, "error": None,
        **{key: statistics.median(measured) for key, measured in seconds.items()},
        "device": options.device_name, "jax": jax.__version__,
    }  # fmt: skip


# Reports


def ratio(row: dict, above: str, below: str) -> float | None:
    """row[above] / row[below], where both were measured."""
    return row[above] / row[below] if row.get(above) is not None and row.get(below) else None


def geometric_mean(values: Iterable[float]) -> float | None:
    """exp(mean(log(values))), or None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else None


def show(value: float | None, form: str = "{:.2f}") -> str:
    """A figure for a table."""
    return "–" if value is None else form.format(value)


def results_table(rows: list[dict]) -> Table:
    """One line a row, and one with the geometric means of each implementation, dtype and mode."""
    table = Table(
        title="deform_conv beside the plain convolution"
        + (" and torchvision" if any(r["peer_ms"] for r in rows) else "")
    )
    table.add_column("workload")
    table.add_column("mode")
    table.add_column("dtype")
    table.add_column("impl.")
    for heading in (
        "ms",
        "plain ms",
        "ours / plain",
        "torchvision ms",
        "torchvision / ours",
        "scratch / columns",
        "compile s",
    ):
        table.add_column(heading, justify="right")
    kinds: dict[tuple[str, ...], list[dict]] = {}
    notes: dict[str, int] = {}
    for row in rows:
        labels = row["workload"], row["mode"].replace("_", " + "), row["dtype"], row["implementation"]
        if row["error"]:
            notes.setdefault(row["error"], len(notes) + 1)
            table.add_row(*labels, f"not available ({notes[row['error']]})")
            continue
        table.add_row(
            *labels,
            show(row["ms"]), show(row["dense_ms"]), show(ratio(row, "ms", "dense_ms")), show(row["peer_ms"]),
            show(ratio(row, "peer_ms", "ms"), "{:.1f}"), show(ratio(row, "scratch_bytes", "columns_bytes")),
            show(row["compile_s"]),
        )  # fmt: skip
        if row["ms"] is not None:
            kinds.setdefault(labels[1:], []).append(row)
    table.add_section()
    for labels, members in kinds.items():
        if len(members) > 1:
            to_dense = geometric_mean(ratio(row, "ms", "dense_ms") for row in members)
            to_peer = geometric_mean(r for row in members if (r := ratio(row, "peer_ms", "ms")) is not None)
            table.add_row("geometric mean", *labels, "", "", show(to_dense), "", show(to_peer, "{:.1f}"))
    table.caption = "\n".join(f"({number}) {note}" for note, number in notes.items()) or None
    table.caption_justify = "left"
    return table


class Figure(NamedTuple):
    """A figure, what it should reach, and whether less is better."""

    name: str
    value: float | None
    limit: float
    at_most: bool = True

    @property
    def reached(self) -> bool:
        """Whether the value is on the right side of the limit."""
        return self.value is not None and (self.value <= self.limit if self.at_most else self.value >= self.limit)


def select(
    rows: list[dict], workloads: Sequence[str], mode: str, dtype: str = "float32", implementation: str = "xla"
) -> list[dict]:
    """The rows of these workloads that have a time."""
    wanted = mode, dtype, implementation
    return [
        row
        for row in rows
        if row["workload"] in workloads and (row["mode"], row["dtype"], row["implementation"]) == wanted and row["ms"]
    ]


def worst(values: Iterable[float | None]) -> float | None:
    """The largest value, of those that were measured."""
    return max((value for value in values if value is not None), default=None)


def cpu_figures(rows: list[dict]) -> list[Figure]:
    """What the XLA path should reach on a CPU, from the rows of the suite "reach"."""
    figures = []
    for mode, mean, most, peer, scratch in (("forward", 1.2, 1.6, 12, 0.30), ("forward_backward", 1.8, 3.0, 25, 0.75)):
        label, five, kinds = mode.replace("_", " + "), select(rows, FIVE, mode), select(rows, KINDS, mode)
        ratios = [ratio(row, "ms", "dense_ms") for row in five]
        peers = [r for row in five if (r := ratio(row, "peer_ms", "ms")) is not None]
        halves = {row["workload"]: row["ms"] for row in select(rows, FIVE, mode, "bfloat16")}
        figures += [
            Figure(f"{label}: ours / plain, geometric mean of {len(five)}", geometric_mean(ratios), mean),
            Figure(f"{label}: ours / plain, worst of {len(five)}", worst(ratios), most),
            Figure(
                f"{label}: torchvision / ours, geometric mean of {len(peers)}",
                geometric_mean(peers),
                peer,
                at_most=False,
            ),
            Figure(
                f"{label}: ours / plain, worst of {', '.join(KINDS)}",
                worst(ratio(r, "ms", "dense_ms") for r in kinds),
                4,
            ),
            Figure(
                f"{label}: scratch / columns, worst",
                worst(ratio(r, "scratch_bytes", "columns_bytes") for r in five + kinds),
                scratch,
            ),
            Figure(
                f"{label}: bfloat16 / float32, geometric mean of {len(halves)}",
                geometric_mean(halves[row["workload"]] / row["ms"] for row in five if row["workload"] in halves),
                1.5,
            ),
            Figure(f"{label}: ms an image, batch 1 to 64, most / least", spread(select(rows, BATCHES, mode)), 1.5),
            Figure(f"{label}: ms a position, map 14² to 224², most / least", spread(select(rows, MAPS, mode)), 1.5),
        ]
    stack = [row for row in rows if row["workload"] == f"stack{STACK}"]
    figures.append(
        Figure(
            f"compiling {STACK} layers: ours / plain", worst(ratio(r, "compile_s", "dense_compile_s") for r in stack), 2
        )
    )
    return figures


def spread(rows: list[dict]) -> float | None:
    """The most time a position takes over the least, of sizes of one kind."""
    times = [row["ms"] / math.prod(WORKLOADS[row["workload"]].x[:-1]) for row in rows]
    return max(times) / min(times) if len(times) > 1 else None


def gpu_figures(rows: list[dict]) -> list[Figure]:
    """What the fused kernels should reach on an H100, from the rows of the suite "gpu"."""
    figures = []
    for mode, peers, dense in (
        ("forward", {"float32": 4, "float16": 8}, 2.5),
        ("forward_backward", {"float32": 4, "float16": 6}, 4),
    ):
        label = mode.replace("_", " + ")
        for dtype, limit in peers.items():
            times = [r for row in select(rows, GPU, mode, dtype, "pallas") if (r := ratio(row, "peer_ms", "ms"))]
            figures.append(
                Figure(f"{label}, {dtype}: torchvision / ours, least", min(times, default=None), limit, at_most=False)
            )
        halves = select(rows, GPU, mode, "bfloat16", "pallas")
        figures.append(
            Figure(f"{label}, bfloat16: ours / plain, worst", worst(ratio(r, "ms", "dense_ms") for r in halves), dense)
        )
        if mode == "forward":
            scratch = worst(ratio(row, "scratch_bytes", "columns_bytes") for row in halves)
            figures.append(Figure(f"{label}, bfloat16: scratch / columns, worst", scratch, 0.02))
    return figures


FIGURES = {"reach": cpu_figures, "gpu": gpu_figures}  # suite to what it should reach


def figures_table(figures: list[Figure]) -> Table:
    """Each figure beside its limit."""
    table = Table(title="What was set out to be reached")
    table.add_column("figure")
    for heading in ("measured", "reach", ""):
        table.add_column(heading, justify="right")
    for figure in figures:
        verdict = "not measured" if figure.value is None else "reached" if figure.reached else "not reached"
        table.add_row(figure.name, show(figure.value), f"{'≤' if figure.at_most else '≥'} {figure.limit:g}", verdict)
    return table


def plot(rows: list[dict], path: str) -> None:
    """Draw the times over the plain convolution's, on a logarithmic axis, one panel a mode."""
    from matplotlib.figure import Figure as Canvas

    rows = [row for row in rows if row["ms"] is not None]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    series = {}  # label to {(workload, mode): ratio}
    for row in rows:
        place = row["workload"], row["mode"]
        series.setdefault(f"{row['implementation']}, {row['dtype']}", {})[place] = ratio(row, "ms", "dense_ms")
        if row["peer_ms"]:
            series.setdefault(f"torchvision, {row['dtype']}", {})[place] = ratio(row, "peer_ms", "dense_ms")
    canvas = Canvas(figsize=(5 * len(modes) + 2, 1.5 + 0.18 * len(workloads) * (len(series) + 1)), layout="constrained")
    panels = canvas.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    height = 0.8 / len(series)
    for panel, mode in zip(panels, modes, strict=True):
        for index, (label, ratios) in enumerate(series.items()):
            placed = [
                (w + index * height, ratios[name, mode]) for w, name in enumerate(workloads) if (name, mode) in ratios
            ]
            panel.barh(*zip(*placed, strict=True), height=height, align="edge", label=label)
        panel.axvline(1, color="black", linewidth=1)
        panel.set(xscale="log", title=mode.replace("_", " + "), xlabel="time / plain convolution's")
        panel.set_yticks([w + 0.4 for w in range(len(workloads))], workloads)
    panels[0].invert_yaxis()
    panels[-1].legend(fontsize="small")
    canvas.savefig(path, dpi=150)


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
    what.add_argument(
        "--compile", action="store_true", help=f"also compile a stack of {STACK} layers, as suite reach does"
    )
    how = p.add_argument_group("how to time it")
    how.add_argument("--device", choices=("cpu", "gpu"), help="(default: JAX's own choice)")
    how.add_argument(
        "--peer-python", metavar="PATH",
        help="a Python with torchvision, to time its op too (default: with --device gpu this one, if it has it)",
    )  # fmt: skip
    how.add_argument("--repeats", type=int, default=20, metavar="N", help="rounds of runs (default: 20)")
    how.add_argument("--quick", action="store_true", help="2 rounds, for a first look")
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
    if args.device:
        jax.config.update("jax_platforms", {"gpu": "cuda", "cpu": "cpu"}[args.device])
    try:
        args.device = jax.default_backend()
    except RuntimeError as error:
        p.error(f"--device {args.device}: JAX finds none here ({reason(error)})")
    if args.peer_python:
        check = (
            subprocess.run([args.peer_python, "-c", "import torchvision"], capture_output=True, text=True)
            if shutil.which(args.peer_python)
            else None
        )
        if check is None:
            p.error(f"--peer-python {args.peer_python}: no such program")
        if check.returncode:
            p.error(
                f"--peer-python {args.peer_python}: cannot import torchvision ({check.stderr.strip().splitlines()[-1]})"
            )
    elif args.device == "gpu" and importlib.util.find_spec("torchvision"):
        args.peer_python = sys.executable
    return args


def groups_of(args: argparse.Namespace) -> list[Group]:
    """The groups that the command asks for."""
    if args.workload:
        groups = [Group((name,)) for name in args.workload]
    else:
        groups = SUITES[args.suite or ("gpu" if args.device == "gpu" else "cpu")]
    return [group._replace(dtypes=tuple(args.dtype)) if args.dtype else group for group in groups]


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measure, print the tables, write the files; returns the rows."""
    jax.config.update("jax_enable_compilation_cache", False)  # it would make compile times those of a file's reading
    args = parse(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    if args.list:
        for name, work in WORKLOADS.items():
            console.print(f"{name:24}{work}", highlight=False)
        return []

    device = jax.devices()[0]
    options = Options(
        device=args.device,
        device_name=f"CPU, {threads()} threads" if args.device == "cpu" else device.device_kind,
        implementations=tuple(args.implementation or (("xla", "pallas") if args.device == "gpu" else ("xla",))),
        repeats=2 if args.quick else args.repeats,
        tf32=not args.no_tf32,
        peer=Peer(args.peer_python, args.device, not args.no_tf32) if args.peer_python else None,
    )
    console.print(
        f"{options.device_name}; jax {jax.__version__}" + (f"; {options.peer.version}" if options.peer else "")
    )
    jobs = [(group, mode) for group in groups_of(args) for mode in args.mode]
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
            task = progress.add_task("", total=len(jobs) * options.repeats)
            for group, mode in jobs:
                progress.update(task, description=f"{', '.join(group.workloads)}: {mode.replace('_', ' + ')}")
                rows += measure(group, mode, options, functools.partial(progress.advance, task))
            if args.compile or args.suite == "reach":
                progress.update(task, description=f"compiling {STACK} layers")
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
    main()
