"""What the benchmark says of its rows: the table of results, the figures beside their limits, the picture."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table
from benchmarks.workloads import BATCHES, FIVE, GPU, GROUPS, KINDS, MAPS, WORKLOADS

STACK = "stack12"  # the workload's name in the row of a stack of 12 layers, which is compiled and not run


def ratio(row: dict, above: str, below: str) -> float | None:
    """row[above] / row[below], where both were measured."""
    return row[above] / row[below] if row.get(above) is not None and row.get(below) else None


def ratios(rows: list[dict], above: str, below: str) -> list[float]:
    """The ratio of each row that has one."""
    return [r for row in rows if (r := ratio(row, above, below)) is not None]


def geometric_mean(values: list[float]) -> float | None:
    """exp(mean(log(values))), or None of nothing."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


def show(value: float | None, form: str = "{:.2f}") -> str:
    """A figure for a table."""
    return "–" if value is None else form.format(value)


def spoken(mode: str) -> str:
    """The mode's name in a sentence."""
    return mode.replace("_", " + ")


# The table of results: heading, and the row's figure; a column without a figure is left out

COLUMNS = {
    "ms": lambda row: show(row["ms"]),
    "plain\nms": lambda row: show(row["dense_ms"]),
    "ours /\nplain": lambda row: show(ratio(row, "ms", "dense_ms")),
    "torchvision\nms": lambda row: show(row["peer_ms"]),
    "torchvision\n/ ours": lambda row: show(ratio(row, "peer_ms", "ms"), "{:.1f}"),
    "ours /\nfloor": lambda row: show(ratio(row, "ms", "floor_ms"), "{:.1f}"),
    "scratch /\ncolumns": lambda row: show(ratio(row, "scratch_bytes", "columns_bytes"), "{:.3f}"),
    "peak\nMB": lambda row: show(ratio(row, "peak_bytes", "megabyte"), "{:.0f}"),
    "plain\npeak MB": lambda row: show(ratio(row, "dense_peak_bytes", "megabyte"), "{:.0f}"),
    "torchvision\npeak MB": lambda row: show(ratio(row, "peer_peak_bytes", "megabyte"), "{:.0f}"),
    "error": lambda row: show(row.get("parity"), "{:.0e}"),
    "compile\ns": lambda row: show(row["compile_s"]),
    "plain\ncompile s": lambda row: show(row["dense_compile_s"]),
}
MEANS = {
    "ours /\nplain": lambda rows: show(geometric_mean(ratios(rows, "ms", "dense_ms"))),
    "torchvision\n/ ours": lambda rows: show(geometric_mean(ratios(rows, "peer_ms", "ms")), "{:.1f}"),
}


def results_table(rows: list[dict]) -> Table:
    """One line a row, then the geometric means of each mode, dtype and implementation."""
    figures = [{heading: figure({"megabyte": 1e6} | row) for heading, figure in COLUMNS.items()} for row in rows]
    headings = [heading for heading in COLUMNS if any(line[heading] != "–" for line in figures)]
    table = Table("workload", "mode", "dtype", "impl.", caption_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")

    kinds: dict[tuple[str, str, str], list[dict]] = {}
    notes: list[str] = []
    for row, line in zip(rows, figures, strict=True):
        kind = spoken(row["mode"]), row["dtype"], row["implementation"]
        if not row["error"]:
            kinds.setdefault(kind, []).append(row)
            table.add_row(row["workload"], *kind, *(line[heading] for heading in headings))
            continue
        if row["error"] not in notes:
            notes.append(row["error"])
        table.add_row(row["workload"], *kind, f"none ({notes.index(row['error']) + 1})")
    table.add_section()
    for kind, members in kinds.items():
        if len(members) > 1:
            means = [MEANS[heading](members) if heading in MEANS else "" for heading in headings]
            table.add_row("geometric mean", *kind, *means)
    if notes:
        table.caption = "\n".join(f"({number}) {note}" for number, note in enumerate(notes, 1))
    return table


# The figures that were set out to be reached


class Figure(NamedTuple):
    """A figure, what it should reach, and whether less is better."""

    name: str
    value: float | None
    limit: float
    at_most: bool = True

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


def spread(rows: list[dict], time: str = "ms") -> float | None:
    """The most time that a position takes over the least, among sizes of one kind."""
    times = [row[time] / math.prod(WORKLOADS[row["workload"]].x[:-1]) for row in rows]
    return max(times) / min(times) if len(times) > 1 else None


def of_plain(rows: list[dict]) -> str:
    """The plain convolution's `spread`, to be set beside ours."""
    return f"(plain: {show(spread(rows, 'dense_ms'))})"


def cpu_figures(rows: list[dict]) -> list[Figure]:
    """What the XLA path should reach on a CPU, from the rows of the suite "reach"."""
    figures = []
    for mode, mean, most, peer, scratch in (
        ("forward", 1.2, 1.6, 12, 0.30),
        ("forward_backward", 1.8, 3.0, 25, 0.75),
    ):
        label, five, kinds = spoken(mode), select(rows, FIVE, mode), select(rows, KINDS, mode)
        to_plain, to_peer = ratios(five, "ms", "dense_ms"), ratios(five, "peer_ms", "ms")
        lean = ratios(select(rows, (*FIVE, *GROUPS), mode), "scratch_bytes", "columns_bytes")
        half = {row["workload"]: row["ms"] for row in select(rows, FIVE, mode, "bfloat16")}
        to_half = [half[row["workload"]] / row["ms"] for row in five if row["workload"] in half]
        batches, maps = select(rows, BATCHES, mode), select(rows, MAPS, mode)
        figures += [
            Figure(f"{label}: ours / plain, mean of {len(to_plain)}", geometric_mean(to_plain), mean),
            Figure(f"{label}: ours / plain, worst of {len(to_plain)}", worst(to_plain), most),
            Figure(
                f"{label}: torchvision / ours, mean of {len(to_peer)}", geometric_mean(to_peer), peer, at_most=False
            ),
            Figure(f"{label}: ours / plain, worst of grouped, 1-D, 3-D", worst(ratios(kinds, "ms", "dense_ms")), 4),
            Figure(f"{label}: scratch / columns, worst of {len(lean)}", worst(lean), scratch),
            Figure(f"{label}: bfloat16 / float32, worst of {len(to_half)}", worst(to_half), 1.5),
            Figure(f"{label}: an image's ms, batch 1 to 64, most / least {of_plain(batches)}", spread(batches), 1.5),
            Figure(f"{label}: a position's ms, map 14² to 224², most / least {of_plain(maps)}", spread(maps), 1.5),
        ]
    stack = [row for row in rows if row["workload"] == STACK]
    figures.append(Figure("compiling 12 layers: ours / plain", worst(ratios(stack, "compile_s", "dense_compile_s")), 2))
    return figures


def gpu_figures(rows: list[dict]) -> list[Figure]:
    """What the fused kernels should reach on an H100, from the rows of the suite "gpu"."""
    figures = []
    for mode, single, half, dense in (("forward", 4, 8, 2.5), ("forward_backward", 4, 6, 4)):
        exact = select(rows, GPU, mode, "float32", "pallas")
        errors = [row["parity"] for row in exact if row.get("parity") is not None]
        limit = 5e-3 if any(row.get("tf32") for row in exact) else 1e-5
        figures.append(Figure(f"{spoken(mode)}, float32: relative error, worst", worst(errors), limit))
        for dtype, limit in (("float32", single), ("float16", half)):
            least = min(ratios(select(rows, GPU, mode, dtype, "pallas"), "peer_ms", "ms"), default=None)
            figures.append(Figure(f"{spoken(mode)}, {dtype}: torchvision / ours, least", least, limit, at_most=False))
        ours = select(rows, GPU, mode, "bfloat16", "pallas")
        label = f"{spoken(mode)}, bfloat16"
        figures.append(Figure(f"{label}: ours / plain, worst", worst(ratios(ours, "ms", "dense_ms")), dense))
        if mode == "forward":
            figures.append(Figure(f"{label}: ours / floor, worst", worst(ratios(ours, "ms", "floor_ms")), 3))
            scratch = [row["scratch_bytes"] for row in ours]
        else:  # one float32 copy of x, where its gradient is summed, is allowed on top
            scratch = [row["scratch_bytes"] - 4 * math.prod(WORKLOADS[row["workload"]].x) for row in ours]
        shares = [size / row["columns_bytes"] for size, row in zip(scratch, ours, strict=True)]
        beyond = "" if mode == "forward" else " beyond x in float32"
        figures.append(Figure(f"{label}: scratch{beyond} / columns, worst", worst(shares), 0.02))
    return figures


FIGURES = {"reach": cpu_figures, "gpu": gpu_figures}  # by suite


def figures_table(figures: list[Figure]) -> Table:
    """Each figure beside its limit."""
    table = Table("figure")
    for heading in ("measured", "set out for", ""):
        table.add_column(heading, justify="right")
    for figure in figures:
        limit = f"{'≤' if figure.at_most else '≥'} {figure.limit:g}"
        table.add_row(figure.name, show(figure.value, "{:.3g}"), limit, figure.verdict)
    return table


# The picture


def plot(rows: list[dict], path: str) -> None:
    """Draw each time over the plain convolution's as a bar from 1, on a logarithmic axis, one panel a mode."""
    from matplotlib.figure import Figure as Canvas

    rows = [row for row in rows if row["ms"] is not None]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    series: dict[str, dict] = {}  # label to {(workload, mode): ratio}
    for row in rows:
        place = row["workload"], row["mode"]
        series.setdefault(f"dcn_jax {row['implementation']}, {row['dtype']}", {})[place] = ratio(row, "ms", "dense_ms")
        if row["peer_ms"]:
            series.setdefault(f"torchvision, {row['dtype']}", {})[place] = ratio(row, "peer_ms", "dense_ms")

    thickness = 0.8 / len(series)
    canvas = Canvas(figsize=(2 + 4 * len(modes), 1.5 + 0.12 * len(workloads) * (1 + len(series))), layout="constrained")
    panels = canvas.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for panel, mode in zip(panels, modes, strict=True):
        for index, (label, values) in enumerate(series.items()):
            bars = [(w + index * thickness, values[n, mode]) for w, n in enumerate(workloads) if (n, mode) in values]
            places, widths = [place for place, _ in bars], [value - 1 for _, value in bars]
            panel.barh(places, widths, left=1, height=thickness, align="edge", label=label)
        panel.axvline(1, color="black", linewidth=1)
        panel.set(xscale="log", title=spoken(mode), xlabel="time / the plain convolution's")
        panel.set_yticks([w + 0.4 for w in range(len(workloads))], workloads)
    panels[0].set_ylim(len(workloads), -0.2)  # the first on top
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    canvas.savefig(path, dpi=150)
