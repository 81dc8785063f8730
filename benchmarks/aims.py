"""The aims: what the op should reach on a CPU and on a GPU, beside what was measured.

python -m benchmarks.aims gpu float32.json half.json    # of rows that --json wrote, of one run or several
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.peers.process import PEERS
from benchmarks.report import STYLE
from benchmarks.rows import counted, fastest, geometric_mean, ratio, ratios, show, spoken
from benchmarks.workloads import BATCHES, FAMILY, FIVE, GPU, GROUPS, KINDS, MAPS, TEN, WORKLOADS

ENGINES = tuple(name for name, kind in PEERS.items() if not kind.gradients)


class Aim(NamedTuple):
    """A figure, what it should reach, and whether less is better."""

    of: str  # a mode, and a dtype where there are several
    figure: str
    value: float | None
    limit: float
    at_most: bool = True

    @property
    def name(self) -> str:
        """The figure and what it is of."""
        return f"{self.of}: {self.figure}"

    @property
    def verdict(self) -> str:
        """Whether the value is on the right side of the limit."""
        if self.value is None:
            return "not measured"
        return "reached" if (self.value <= self.limit) == self.at_most or self.value == self.limit else "not reached"


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


def worst(values: list[float]) -> float | None:
    """The largest of what was measured."""
    return max(values, default=None)


def extreme(choose: Callable, rows: list[dict], above: str, below: str) -> tuple[float | None, str]:
    """The largest or smallest of the ratios, and whose it is."""
    found = [(value, row["workload"]) for row in rows if (value := ratio(row, above, below)) is not None]
    return choose(found, default=(None, "none"))


def shape_of_x(row: dict) -> tuple[int, ...]:
    """(batch, *spatial, C)."""
    return WORKLOADS[row["workload"]].shapes(row["dtype"])[0].shape


def spread(rows: list[dict], time: str = "ms") -> float | None:
    """The most time that a position takes over the least, among sizes of one kind."""
    times = [row[time] / math.prod(shape_of_x(row)[:-1]) for row in rows]
    return max(times) / min(times) if len(times) > 1 else None


def of_plain(rows: list[dict]) -> str:
    """The plain convolution's `spread`, to be set beside ours."""
    return f"(plain: {show(spread(rows, 'dense_ms'))})"


def cpu_aims(rows: list[dict]) -> list[Aim]:
    """What the XLA path should reach on a CPU, from the rows of the suite "reach"."""
    aims = []
    for mode, mean, most, peer, scratch in (
        ("forward", 1.2, 1.6, 12, 0.30),
        ("forward_backward", 1.8, 3.0, 25, 0.75),
    ):
        label, five, kinds = spoken(mode), select(rows, FIVE, mode), select(rows, KINDS, mode)
        to_plain, to_peer = ratios(five, "ms", "dense_ms"), ratios(five, "torchvision_ms", "ms")
        lean = ratios(select(rows, (*FIVE, *GROUPS), mode), "scratch_bytes", "columns_bytes")
        half = {row["workload"]: row["ms"] for row in select(rows, FIVE, mode, "bfloat16")}
        to_half = [half[row["workload"]] / row["ms"] for row in five if row["workload"] in half]
        batches, maps = select(rows, BATCHES, mode), select(rows, MAPS, mode)
        aims += [
            Aim(label, f"ours / plain, mean of {len(to_plain)}", geometric_mean(to_plain), mean),
            Aim(label, f"ours / plain, worst of {len(to_plain)}", worst(to_plain), most),
            Aim(label, f"torchvision / ours, mean of {len(to_peer)}", geometric_mean(to_peer), peer, at_most=False),
            Aim(label, "ours / plain, worst of grouped, 1-D, 3-D", worst(ratios(kinds, "ms", "dense_ms")), 4),
            Aim(label, f"scratch / columns, worst of {len(lean)}", worst(lean), scratch),
            Aim(label, f"bfloat16 / float32, worst of {len(to_half)}", worst(to_half), 1.5),
            Aim(label, f"an image's ms, batch 1 to 64, most / least {of_plain(batches)}", spread(batches), 1.5),
            Aim(label, f"a position's ms, map 14² to 224², most / least {of_plain(maps)}", spread(maps), 1.5),
        ]
    return [*aims, compiling(rows, "stack12", 2)]


def ahead_aims(rows: list[dict]) -> list[Aim]:
    """What the XLA path should reach on a CPU beside engines that only infer, from the rows of the suite "ahead"."""
    engines = [row | {"engine_ms": row.get(f"{fastest(row, ENGINES)}_ms")} for row in select(rows, TEN, "forward")]
    to_engine, (most, last) = ratios(engines, "ms", "engine_ms"), extreme(max, engines, "ms", "engine_ms")
    batches, maps = select(rows, BATCHES, "forward"), select(rows, MAPS, "forward")
    beside, flat, both = (
        f"forward / faster of {', '.join(ENGINES)}",
        "forward, most / least",
        spoken("forward_backward"),
    )

    def to_plain(*names):
        return ratios(select(rows, names, "forward_backward"), "ms", "dense_ms")

    aims = [
        Aim(beside, f"mean of {len(to_engine)}", geometric_mean(to_engine), 1.0),
        Aim(beside, f"worst of {len(to_engine)}: {last}", most, 1.25),
        Aim(flat, f"ms an image, batch 1 to 64 {of_plain(batches)}", spread(batches), 1.5),
        Aim(flat, f"ms a position, map 14² to 224² {of_plain(maps)}", spread(maps), 1.9),
        Aim(both, f"ours / plain, mean of {len(to_plain(*FIVE))}", geometric_mean(to_plain(*FIVE)), 1.5),
        Aim(both, f"ours / plain, {WORKLOADS['small']}", worst(to_plain("small")), 2.5),
        Aim(both, f"ours / plain, {WORKLOADS['thin']}", worst(to_plain("thin")), 3.0),
        compiling(rows, "stack1", 6),
        compiling(rows, "stack12", 10),
    ]
    for dtype, limits in (("float32", (0.30, 0.75)), ("bfloat16", (0.60, 1.2))):
        for mode, limit in zip(("forward", "forward_backward"), limits, strict=True):
            lean = ratios(select(rows, TEN, mode, dtype), "scratch_bytes", "columns_bytes")
            figure = f"{spoken(mode)}, {dtype}, worst of {len(lean)}"
            aims.append(Aim("scratch / columns", figure, worst(lean), limit))
    return aims


def compiling(rows: list[dict], stack: str, limit: float) -> Aim:
    """The time to trace, lower and compile layers with gradients, beside the plain convolution's."""
    found = [row for row in rows if row["workload"] == stack]
    value = worst(ratios(found, "compile_s", "dense_compile_s"))
    return Aim("trace, lower, compile, with gradients", f"{counted(stack)}, ours / plain", value, limit)


def family_aims(rows: list[dict]) -> list[Aim]:
    """What the rest of the family should reach on a CPU, from the rows of the suite "family"."""
    aims = []
    for op in dict.fromkeys(WORKLOADS[name].op for name in FAMILY):
        names = [name for name in FAMILY if WORKLOADS[name].op == op]
        for mode, faster in (("forward", 2), ("forward_backward", 3)):
            label, found = f"{op}, {spoken(mode)}", select(rows, names, mode)
            if op.startswith("dcn"):
                most, name = extreme(max, found, "ms", "dense_ms")
                aims.append(Aim(label, f"ours / the dense DCNv2, worst: {name}", most, 1))
            else:
                for peer in (name for name, kind in PEERS.items() if op in kind.ops and "cpu" in kind.devices):
                    least, name = extreme(min, found, f"{peer}_ms", "ms")
                    aims.append(Aim(label, f"{peer} / ours, least: {name}", least, faster, at_most=False))
            most, name = extreme(max, found, "scratch_bytes", "result_bytes")
            aims.append(Aim(label, f"scratch / result, worst: {name}", most, 3))
    return aims


def gpu_aims(rows: list[dict]) -> list[Aim]:
    """What the fused kernels should reach on an H100, from the rows of the suite "gpu"; "ours" is theirs."""
    # torchvision has no bfloat16: ours stands beside its float16, whose bytes are as many.
    halves = {(row["workload"], row["mode"]): row.get("torchvision_ms") for row in rows if row["dtype"] == "float16"}
    aims = []
    for mode, single, half, dense in (("forward", 4, 8, 2.5), ("forward_backward", 4, 6, 4)):
        exact = select(rows, GPU, mode, "float32", "pallas_gpu")
        errors = [row["parity"] for row in exact if row.get("parity") is not None]
        limit = 5e-3 if any(row.get("tf32") for row in exact) else 1e-5
        aims.append(Aim(f"{spoken(mode)}, float32", "relative error, worst", worst(errors), limit))
        for dtype, limit in (("float32", single), ("float16", half), ("bfloat16", half)):
            label, ours = f"{spoken(mode)}, {dtype}", select(rows, GPU, mode, dtype, "pallas_gpu")
            theirs = "torchvision"
            if dtype == "bfloat16":
                ours = [row | {"torchvision_ms": halves.get((row["workload"], mode))} for row in ours]
                theirs = "torchvision in float16"
            aims.append(against(label, theirs, ours, "torchvision_ms", limit))
            aims.append(against(label, "deformops", ours, "deformops_ms", 1))
        ours = select(rows, GPU, mode, "bfloat16", "pallas_gpu")
        label = f"{spoken(mode)}, bfloat16"
        most, name = extreme(max, ours, "ms", "dense_ms")
        aims.append(Aim(label, f"ours / plain, worst: {name}", most, dense))
        if mode == "forward":
            most, name = extreme(max, ours, "ms", "floor_ms")
            aims.append(Aim(label, f"ours / floor, worst: {name}", most, 3))
            scratch = [row["scratch_bytes"] for row in ours]
        else:  # one float32 copy of x, where its gradient is summed, is allowed on top
            scratch = [row["scratch_bytes"] - 4 * math.prod(shape_of_x(row)) for row in ours]
        shares = [size / row["columns_bytes"] for size, row in zip(scratch, ours, strict=True)]
        beyond = "" if mode == "forward" else " beyond x in float32"
        aims.append(Aim(label, f"scratch{beyond} / columns, worst", worst(shares), 0.02))
    return aims


def against(label: str, theirs: str, rows: list[dict], time: str, limit: float) -> Aim:
    """How many times as long a peer takes at the least, with the mean beside it."""
    least, name = extreme(min, rows, time, "ms")
    mean = show(geometric_mean(ratios(rows, time, "ms")))
    return Aim(label, f"{theirs} / ours, least (mean {mean}): {name}", least, limit, at_most=False)


AIMS = {"reach": cpu_aims, "ahead": ahead_aims, "family": family_aims, "gpu": gpu_aims}  # by suite


def aims_table(aims: list[Aim]) -> Table:
    """Each figure beside its aim, under a line that says what it is of."""
    table = Table("figure", **STYLE)
    for heading in ("measured", "aim", ""):
        table.add_column(heading, justify="right")
    for of, group in itertools.groupby(aims, lambda aim: aim.of):
        table.add_section()
        table.add_row(of)
        for aim in group:
            limit = f"{'≤' if aim.at_most else '≥'} {aim.limit:g}"
            table.add_row(f"  {aim.figure}", show(aim.value, "{:.3g}"), limit, aim.verdict)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of a suite's aims."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.aims", description="Each aim beside what was measured.")
    p.add_argument("suite", choices=AIMS)
    p.add_argument("rows", nargs="+", metavar="FILE", help="rows that python -m benchmarks.run --json wrote")
    args = p.parse_args(argv)
    rows = [row for file in args.rows for row in json.loads(Path(file).read_text())]
    Console().print(aims_table(AIMS[args.suite](rows)))


if __name__ == "__main__":
    main()
