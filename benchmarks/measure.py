"""Measuring: runs that are compared take turns, and each row gets the medians of its runs."""

import functools
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.convolution import Convolution
from benchmarks.floor import floor_ms, measure_rates
from benchmarks.peers.process import PEERS, Peer, threads
from benchmarks.programs import Program, add_cotangent, deviation, exact, make_program, truth, with_gradients
from benchmarks.rows import EMPTY, STACKS, fastest, reason
from benchmarks.suites import Comparison
from benchmarks.workloads import WORKLOADS, Workload

SLOW = 6  # times the fastest run of a comparison: from here on a peer runs in fewer rounds
MEMORY_AND_COMPILING = "compile_s", "scratch_bytes", "peak_bytes"
VISITS = 3  # to each comparison, its rounds spread over them
GPU_CACHE = 200e6  # bytes that rotated inputs exceed: four times an H100's L2


class Settings(NamedTuple):
    """What all measurements of one command share."""

    device: str
    device_name: str
    implementations: tuple[str, ...]
    repeats: int
    tf32: bool
    peers: dict[str, Peer]

    @property
    def precision(self) -> str | None:
        """Of the products, for all sides."""
        return None if self.tf32 else "highest"


class Case(NamedTuple):
    """Whose run it is; the program is an implementation, "dense" or a peer."""

    workload: str
    dtype: str
    program: str


Run = Callable[[int], float]  # so many calls, to the milliseconds of one


# Taking turns


class Measurement:
    """Runs that are compared, the times they took so far, and the rows that tell these."""

    def __init__(self, rows: list[dict], runs: dict[Case, Run]):
        self.rows, self.runs = rows, runs
        self.times: dict[Case, list[float]] = {case: [] for case in runs}

    def take_turns(self, rounds: Sequence[int], slow_every: int, advance: Callable[[], None]) -> None:
        """Time each run once a round, slow peers' only in some, and update the rows' medians."""
        took = {}
        for case, run in self.runs.items():
            run(1)
            took[case] = run(1)
        slow = {case for case in took if case.program in PEERS and took[case] > SLOW * min(took.values())}
        for turn in rounds:
            there_and_back = -1 if turn % 2 else 1  # no run always follows the same other
            for case in list(self.runs)[::there_and_back]:
                if turn % (slow_every if case in slow else 1) == 0:
                    self.times[case].append(self.runs[case](calls_for(took[case])))
            advance()
        medians = {case: statistics.median(times) for case, times in self.times.items() if times}
        for row in self.rows:
            programs = {"ms": row["implementation"], "dense_ms": "dense", **{f"{peer}_ms": peer for peer in PEERS}}
            row |= {key: medians.get(Case(row["workload"], row["dtype"], p)) for key, p in programs.items()}
            if peer := fastest(row, PEERS):
                row |= {"peer": peer, **{f"peer_{key}": row.get(f"{peer}_{key}") for key in ("ms", "peak_bytes")}}


def calls_for(milliseconds: float) -> int:
    """How many calls make a run that a clock can measure."""
    return max(1, min(1000, round(20 / max(milliseconds, 1e-3))))


def visits(comparisons: int, repeats: int) -> Iterator[tuple[int, range]]:
    """(comparison, its rounds): each is visited again, so that slow seconds decide no figure."""
    count = min(VISITS, repeats)
    for visit in range(count):
        rounds = range(visit * repeats // count, (visit + 1) * repeats // count)
        for comparison in range(comparisons):
            yield comparison, rounds


# What takes them


class Compiled(NamedTuple):
    """A workload's inputs, and a program of each implementation and of "dense", or why there is none."""

    inputs: list[list[jax.Array]]
    programs: dict[str, Program | Exception]


@functools.cache
def processor() -> str:
    """The name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else []
    return next(iter(names), platform.processor() or platform.machine())


def compile_workload(name: str, dtype: str, mode: str, settings: Settings) -> Compiled:
    """Compile all of ours that is compared; the peers prepare themselves."""
    work = WORKLOADS[name]
    inputs = make_inputs(work, dtype, settings.device)
    functions: dict[str, tuple[Callable, Sequence]] = {
        implementation: (functools.partial(work.call, implementation=implementation), inputs)
        for implementation in settings.implementations
    }
    if beside := work.beside(inputs):
        functions["dense"] = beside
    programs: dict[str, Program | Exception] = {}
    for program, (function, arguments) in functions.items():
        # "xla" is many kernels: they take longer than their launch, and minutes to compile in a chain
        chained = settings.device == "gpu" and isinstance(work, Convolution) and program != "xla"
        try:
            function = functools.partial(function, precision=settings.precision)
            programs[program] = make_program(function, arguments, mode, chained)
        except Exception as error:  # whatever it is, it goes into the row and the others go on
            programs[program] = error
    return Compiled(inputs, programs)


def compile_ahead(wanted: Sequence[tuple[Comparison, str]], settings: Settings) -> dict[tuple, Compiled]:
    """On a GPU, all programs by (workload, dtype, mode), compiled side by side; elsewhere none."""
    if settings.device != "gpu":
        return {}  # where compiling takes turns too, and its seconds are compared
    cases = [(name, dtype, mode) for c, mode in wanted for name in c.workloads for dtype in c.dtypes]
    works = dict.fromkeys((WORKLOADS[name], dtype) for name, dtype, _ in cases)
    exact_ones = dict.fromkeys((WORKLOADS[name], mode) for name, _, mode in cases)
    with ThreadPoolExecutor(threads()) as pool:
        # What several cases share is made once, before them.
        sets = {(work, seed) for work, dtype in works for seed in range(copies_on_gpu(work, dtype))}
        list(pool.map(lambda one: random_arrays(*one), sets))
        for work, mode in exact_ones:
            pool.submit(exact, work, mode)
        compiled = {case: pool.submit(compile_workload, *case, settings) for case in cases}
        return {case: future.result() for case, future in compiled.items()}


def prepare(comparison: Comparison, mode: str, settings: Settings, ahead: dict[tuple, Compiled]) -> Measurement:
    """Make ready all that is compared, in one mode; what is not compiled ahead is compiled now."""
    rows, runs = [], {}
    for name in comparison.workloads:
        for dtype in comparison.dtypes:
            compiled = ahead.get((name, dtype, mode)) or compile_workload(name, dtype, mode, settings)
            more_rows, more_runs = prepare_workload(name, dtype, mode, comparison.with_peer, settings, compiled)
            rows += more_rows
            runs |= more_runs
    return Measurement(rows, runs)


def prepare_workload(
    name: str, dtype: str, mode: str, with_peer: bool, settings: Settings, compiled: Compiled
) -> tuple[list[dict], dict[Case, Run]]:
    """The rows of a workload, without their times, and the runs that will tell these."""
    work = WORKLOADS[name]
    row = EMPTY | {
        "workload": name,
        "dtype": dtype,
        "mode": mode,
        **work.sizes(dtype),
        "tf32": settings.tf32,
        "device": settings.device_name,
        "processor": processor() if settings.device == "cpu" else None,
        "jax": jax.__version__,
    }
    (arguments,) = compiled.inputs[:1] if mode == "forward" else add_cotangent(work.call, compiled.inputs[:1])
    right = functools.cache(functools.partial(truth, work, mode, arguments))
    runs: dict[Case, Run] = {}
    dense = compiled.programs.get("dense")
    if isinstance(dense, Exception):
        raise dense
    if dense:
        row |= {f"dense_{key}": getattr(dense, key) for key in MEMORY_AND_COMPILING}
        runs[Case(name, dtype, "dense")] = dense.run
    if mode == "forward" and isinstance(work, Convolution):
        rates = measure_rates(settings.device, dtype, settings.precision)
        row |= {"floor_ms": floor_ms(work, dtype, rates), "flops": rates.flops, "bandwidth": rates.memory}
    for peer in settings.peers.values() if with_peer else ():
        case = Case(name, dtype, peer.name)
        facts, run = prepare_peer(peer, case, mode, len(compiled.inputs), arguments, right, settings)
        row |= {f"{peer.name}_{key}": value for key, value in facts.items()}
        if run:
            runs[case] = run
    rows = [row | {"implementation": implementation} for implementation in settings.implementations]
    for row in rows:
        program = prepare_ours(row, compiled.programs[row["implementation"]], right, settings)
        if program:
            runs[Case(name, dtype, row["implementation"])] = program.run
    return rows, runs


def prepare_ours(
    row: dict, program: Program | Exception, right: Callable[[], list], settings: Settings
) -> Program | None:
    """Run the row's program and note what that tells; if it cannot run, note why."""
    try:
        if isinstance(program, Exception):
            raise program
        program.run(1)
        row |= {key: getattr(program, key) for key in MEMORY_AND_COMPILING}
        if settings.device == "gpu":
            row["parity"] = deviation(right(), jax.tree.leaves(program.compiled(*program.inputs[0])))
    except Exception as error:  # whatever it is, it goes into the row and the others go on
        row["error"] = f"not available: {reason(error)}"
        return None
    return program


def prepare_peer(
    peer: Peer,
    case: Case,
    mode: str,
    copies: int,
    arguments: Sequence[jax.Array],
    right: Callable[[], list],
    settings: Settings,
) -> tuple[dict[str, Any], Run | None]:
    """What there is to tell of a peer, and its run if its results are ours."""
    label = f"{case.workload}, {case.dtype}, {mode}"
    answer = peer.prepare(WORKLOADS[case.workload], arguments, case.dtype, mode, copies, label)
    facts: dict[str, Any] = {key: answer.get(key) for key in ("error", "scratch_bytes", "peak_bytes", "timed")}
    if facts["error"]:
        return facts, None
    half = case.dtype != "float32"
    # At a whole pixel two derivatives are right. Rounding puts a few positions there; and torchvision rounds
    # the positions themselves to the dtype, in half precision to an eighth at 128 pixels.
    share = 1 if mode == "forward" else 0.9 if half else 0.999
    error = facts["parity"] = deviation(right(), answer["results"], share)
    if not error <= (0.1 if half or (settings.device == "gpu" and settings.tf32) else 1e-4):
        return facts | {"error": f"{peer.name} computes something else: its results are off by {error:.0e}"}, None
    return facts, functools.partial(peer.run, label)


@functools.cache
def random_arrays(work: Workload, seed: int) -> list[jax.Array]:
    """Arguments of the op in float32, drawn once for all dtypes and modes."""
    return work.arrays(seed, "float32")


def copies_on_gpu(work: Workload, dtype: str) -> int:
    """How many sets of arguments a GPU's cache cannot hold."""
    size = jnp.dtype(dtype).itemsize * sum(math.prod(s.shape) for s in work.shapes(dtype))
    return min(16, math.ceil(GPU_CACHE / size))


def make_inputs(work: Workload, dtype: str, device: str) -> list[list[jax.Array]]:
    """Arguments of the op; on a GPU so many sets of them that its cache cannot hold them all."""
    if device != "gpu":
        return [work.arrays(0, dtype)]
    return [[a.astype(dtype) for a in random_arrays(work, seed)] for seed in range(copies_on_gpu(work, dtype))]


# What is compiled and not run


def compile_stack(name: str, settings: Settings) -> dict:
    """A row with the seconds to trace, lower and compile so many layers with gradients; nothing runs."""
    layers = STACKS[name]
    work = Convolution((4, 14, 14, 256), 256)
    x, kernel, offset, mask = work.shapes("float32")

    def ours(x, *layers):
        for kernel, offset, mask in layers:
            x = work.call(x, kernel, offset, mask, implementation="xla")
        return x

    def plain(x, *kernels):
        return functools.reduce(work.dense, kernels, x)

    stacks = {"compile_s": (ours, (kernel, offset, mask)), "dense_compile_s": (plain, kernel)}
    seconds: dict[str, list[float]] = {key: [] for key in stacks}
    for _ in range(min(3 if layers > 1 else 9, settings.repeats)):
        for key, (function, layer) in stacks.items():
            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(with_gradients(function)).lower(x, x, *[layer] * layers).compile()
            seconds[key].append(time.perf_counter() - start)
    return EMPTY | {
        "workload": name,
        "implementation": "xla",
        "dtype": "float32",
        "mode": "forward_backward",
        **{key: statistics.median(measured) for key, measured in seconds.items()},
        "device": settings.device_name,
        "jax": jax.__version__,
    }
