"""The race on a GPU: who is fastest, our programs or others'. It decides what `implementation=None` takes there.

Each result is printed, and written with `--json`, as it comes, the most telling first: a run that is
cut short after five minutes has decided most. "xla" runs in the number of blocks that
`schedule.py` takes, and in one, two and four. On a CPU, to try the command, the algorithms
of a GPU run on small arrays.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from benchmarks.convolution import Convolution
from benchmarks.family import Attention, Depthwise, GridSample
from benchmarks.measure import calls_for, processor
from benchmarks.peers.process import PEERS, Peer, start_peers
from benchmarks.programs import MODES, add_cotangent, deviation, make_program, truth
from benchmarks.rows import reason, spoken
from benchmarks.workloads import LEVELS, Workload
from dcn_jax.ops.deform_conv.xla import schedule
from dcn_jax.ops.weighted_reads import sum as sums

BLOCKS = (1, 2, 4)
RIVAL = "deformops"  # it has fused kernels of the convolution and of attention; if it is missing, that is said
OLD = "f08c659"  # the commit whose "xla" had the form of a CPU on a GPU too
WORKER = Path(__file__).with_name("race_old.py")

# In the order in which they run
CONVOLUTIONS = tuple(
    Convolution(x, x[-1]) for x in ((8, 25, 42, 512), (8, 100, 168, 128), (8, 50, 84, 256), (16, 56, 56, 64))
)
FAMILY = (
    Attention(LEVELS, batch=2),
    Attention(LEVELS, queries=300, batch=2),
    GridSample((8, 256, 256, 64)),
    Depthwise("dcnv3", (8, 56, 56, 128), 4),
    Depthwise("dcnv4", (8, 56, 56, 128), 4),
)
SMALL = (
    (Convolution((4, 6, 7, 8), 8),),
    (
        Attention(((4, 5), (2, 3)), heads=2, channels=4, points=2),
        GridSample((1, 6, 7, 3)),
        Depthwise("dcnv3", (1, 6, 7, 8), 2),
    ),
)


class Race(NamedTuple):
    """What all heats share."""

    device: str
    repeats: int
    precision: str | None
    peers: dict[str, Peer]
    old: str | None  # a folder with the sources of OLD
    deadline: float
    say: Callable[[str], None]
    write: Callable[[dict], None]


class Heat(NamedTuple):
    """Contestants that are timed in turns: of one workload, dtype and mode."""

    work: Workload
    dtype: str
    mode: str

    def __str__(self) -> str:
        """For a heading."""
        return f"{self.work}, {self.dtype}, {spoken(self.mode)}"


class Contestant(NamedTuple):
    """Ready to run."""

    run: Callable[[int], float]  # so many calls, to the milliseconds of one
    error: float | None  # of result and gradients, against "xla" in full float32
    scratch: int | None  # bytes


def heats(quick: bool) -> Iterator[Heat]:
    """All of them, the most telling first."""
    convolutions, family = SMALL if quick else (CONVOLUTIONS, FAMILY)
    for works in (convolutions, family):
        for dtype in ("bfloat16", "float32"):
            yield from (Heat(work, dtype, mode) for work in works for mode in MODES)


@contextlib.contextmanager
def forms_of_a_gpu(blocks: int | None = None) -> Iterator[None]:
    """Programs that are traced here take a GPU's algorithms, on a CPU too; `blocks` is how many, None as `schedule` says."""
    kept = schedule.algorithms, schedule.blocks_on_gpu, sums.algorithms

    def of_sum(*arguments: Any) -> Any:
        return tuple((("default", dict(found)["default"]),) for found in kept[2](*arguments))

    schedule.algorithms = lambda *a, **k: (("default", dict(kept[0](*a, **k))["default"]),)
    schedule.blocks_on_gpu = kept[1] if blocks is None else lambda *_: blocks
    sums.algorithms = of_sum
    jax.clear_caches()  # of what was traced in other forms
    try:
        yield
    finally:
        schedule.algorithms, schedule.blocks_on_gpu, sums.algorithms = kept
        jax.clear_caches()


# Those who run


def entrants(heat: Heat, race: Race) -> dict[str, Callable[[], Contestant]]:
    """By name, what makes each contestant ready: it compiles it, runs it once and compares its results."""
    inputs = [heat.work.arrays(0, heat.dtype)]
    arguments = inputs[0] if heat.mode == "forward" else add_cotangent(heat.work.call, inputs)[0]
    right = truth(heat.work, heat.mode, arguments)
    ours = functools.partial(our_program, heat, race, inputs, right)
    found: dict[str, Callable[[], Contestant]] = {"xla": functools.partial(ours, "xla")}
    if isinstance(heat.work, Convolution):
        found["pallas_gpu"] = functools.partial(ours, "pallas_gpu")
        found["plain"] = functools.partial(plain_program, heat, race, inputs)
    for peer in race.peers.values():
        found[peer.name] = functools.partial(peer_program, heat, peer, arguments, right)
    if RIVAL not in race.peers and heat.work.op in PEERS[RIVAL].ops:
        found[RIVAL] = functools.partial(no_rival, race)
    if isinstance(heat.work, Convolution):
        found |= {f"xla, {n} block{'s' * (n > 1)}": functools.partial(ours, "xla", n) for n in BLOCKS}
    found[f"xla of {OLD}"] = functools.partial(old_program, heat, race, arguments, right)
    return found


def our_program(
    heat: Heat, race: Race, inputs: Any, right: Any, implementation: str, blocks: int | None = None
) -> Contestant:
    """Ours by an implementation, in so many blocks."""
    if implementation == "pallas_gpu" and race.device != "gpu":
        raise RuntimeError("needs a GPU")
    with forms_of_a_gpu(blocks):
        call = functools.partial(heat.work.call, implementation=implementation, precision=race.precision)
        program = make_program(call, inputs, heat.mode)
    results = jax.tree.leaves(program.compiled(*program.inputs[0]))
    return Contestant(program.run, deviation(right, results), program.scratch_bytes)


def plain_program(heat: Heat, race: Race, inputs: Any) -> Contestant:
    """The plain convolution of the shape, cuDNN's on a GPU."""
    beside = heat.work.beside(inputs)
    assert beside, "only a convolution has one"
    function, arguments = beside
    program = make_program(functools.partial(function, precision=race.precision), arguments, heat.mode)
    return Contestant(program.run, None, program.scratch_bytes)


def peer_program(heat: Heat, peer: Peer, arguments: Sequence[jax.Array], right: Any) -> Contestant:
    """Another library's, in a process of its own; torchvision has no bfloat16 and takes float16."""
    dtype = (
        "float16" if heat.dtype == "bfloat16" and peer.name == "torchvision" and peer.device != "cpu" else heat.dtype
    )
    answer = peer.prepare(heat.work, arguments, dtype, heat.mode, 1, "race")
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return Contestant(functools.partial(peer.run, "race"), deviation(right, answer["results"]), None)


def no_rival(race: Race) -> Contestant:
    """Why the peer that matters most does not run."""
    missing = "--peer-python names no Python that has it"
    raise RuntimeError(missing if race.device in PEERS[RIVAL].devices else "needs a GPU")


def old_program(heat: Heat, race: Race, arguments: Sequence[jax.Array], right: Any) -> Contestant:
    """Our "xla" of an older commit, in a process of its own, which times itself."""
    if race.old is None:
        raise RuntimeError(f"--archive DIR names its sources: git archive {OLD} | tar -x -C DIR")
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "inputs.npz", *(np.asarray(a, np.float32) for a in arguments))
        options = heat.work.options | ({"spatial_shapes": heat.work.levels} if isinstance(heat.work, Attention) else {})
        task = {"op": heat.work.op, "options": options, "dtypes": [str(a.dtype) for a in arguments], "mode": heat.mode}
        task |= {"repeats": race.repeats, "precision": race.precision}
        command = [sys.executable, str(WORKER), folder, json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": race.old})
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["it ended"])[-1])
        answer = json.loads(done.stdout.splitlines()[-1])
        with np.load(Path(folder) / "results.npz") as stored:
            results = [stored[name] for name in stored.files]
    return Contestant(lambda calls: answer["ms"], deviation(right, results), answer["scratch"])


# The race


def run_heat(heat: Heat, race: Race) -> None:
    """Make ready all contestants, time them in turns, and say and write what each took."""
    race.say(f"\n{heat}")
    ready: dict[str, Contestant] = {}
    for name, prepare in entrants(heat, race).items():
        if time.perf_counter() > race.deadline:
            break
        try:
            ready[name] = prepare()
        except Exception as problem:  # one contestant's trouble is not the others'
            race.say(f"  {name:18}{reason(problem)[:60]}")
            race.write(row_of(heat, race, name) | {"problem": reason(problem)})
    times: dict[str, list[float]] = {name: [] for name in ready}
    calls = {name: calls_for(contestant.run(1)) for name, contestant in ready.items()}
    for turn in range(race.repeats):
        for name in list(ready)[:: -1 if turn % 2 else 1]:  # no one always follows the same other
            times[name].append(ready[name].run(calls[name]))
    for name, contestant in ready.items():
        ms = statistics.median(times[name])
        error = "" if contestant.error is None else f"  error {contestant.error:.1e}"
        scratch = "" if contestant.scratch is None else f"  scratch {contestant.scratch / 1e6:7.1f} MB"
        race.say(f"  {name:18}{1e3 * ms:10.0f} µs{error:15}{scratch}")
        measured = {"ms": ms, "error": contestant.error, "scratch_bytes": contestant.scratch}
        race.write(row_of(heat, race, name) | measured)


def row_of(heat: Heat, race: Race, name: str) -> dict[str, Any]:
    """Whose figures, and of what."""
    device = jax.devices()[0].device_kind if race.device == "gpu" else processor()
    row = {"workload": str(heat.work), "op": heat.work.op, "dtype": heat.dtype, "mode": heat.mode, "contestant": name}
    return row | {"tf32": race.precision is None, "device": device, "jax": jax.__version__}


def run_race(args: argparse.Namespace, console: Console) -> list[dict]:
    """All heats that there is time for; returns the rows."""
    rows: list[dict] = []

    def write(row: dict) -> None:
        rows.append(row)
        if args.json:
            with Path(args.json).open("a") as file:
                file.write(json.dumps(row) + "\n")

    if args.json:
        Path(args.json).write_text("")
    ops = {"deform_conv", "grid_sample", "ms_deform_attn"}
    peers = start_peers(args.peer_python, ops, args.device, not args.no_tf32)
    say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
    deadline = time.perf_counter() + 60 * args.minutes
    race = Race(
        args.device,
        2 if args.quick else args.repeats,
        "highest" if args.no_tf32 else None,
        peers,
        args.archive,
        deadline,
        say,
        write,
    )
    versions = [peer.version or str(peer.problem) for peer in peers.values()]
    say(", ".join([f"jax {jax.__version__}", *(versions or ["no peers: --peer-python names a Python that has some"])]))
    try:
        for heat in heats(args.quick or args.device == "cpu"):
            if time.perf_counter() > deadline:
                say(f"{args.minutes:g} minutes are over")
                break
            run_heat(heat, race)
    except KeyboardInterrupt:
        say("interrupted")
    finally:
        for peer in peers.values():
            peer.close()
    return rows
