"""The report: the table of results, as many of its columns as the terminal is wide."""

from collections.abc import Callable
from typing import NamedTuple

import rich.box
from rich.console import Console
from rich.table import Table

from benchmarks.peers.process import PEERS
from benchmarks.rows import STACKS, counted, geometric_mean, ratio, ratios, show, spoken

# Without lines between columns: at 80 characters, each of them would cost a figure.
STYLE = {"box": rich.box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}


class Column(NamedTuple):
    """A figure of each row, and of rows together where a mean makes sense."""

    heading: str
    figure: Callable[[dict], str]
    mean: Callable[[list[dict]], str] = lambda rows: ""


def quotient(heading: str, above: str, below: str, form: str = "{:.2f}") -> Column:
    """A column of quotients."""
    return Column(heading, lambda row: show(ratio(row, above, below), form))


def speed(heading: str, above: str, below: str, form: str = "{:.2f}") -> Column:
    """A column of quotients of times, with their geometric mean."""
    column = quotient(heading, above, below, form)
    return column._replace(mean=lambda rows: show(geometric_mean(ratios(rows, above, below)), form))


def amount(heading: str, key: str, form: str = "{:.2f}", unit: float = 1) -> Column:
    """A column of what the rows hold, in units of `unit`."""
    return Column(heading, lambda row: show(None if row.get(key) is None else row[key] / unit, form))


# What matters most comes first: a narrow terminal shows the first of them.
FIGURES = (
    amount("ms", "ms"),
    speed("ours /\nplain", "ms", "dense_ms"),
    speed("peer /\nours", "peer_ms", "ms", "{:.2f}"),
    quotient("scratch /\ncolumns", "scratch_bytes", "columns_bytes", "{:.3f}"),
    quotient("scratch /\nresult", "scratch_bytes", "result_bytes"),
    amount("error", "parity", "{:.0e}"),
    Column("peer", lambda row: row.get("peer") or "–"),
    amount("plain\nms", "dense_ms"),
    amount("peer\nms", "peer_ms"),
    quotient("ours /\nfloor", "ms", "floor_ms", "{:.1f}"),
    amount("compile\ns", "compile_s"),
    amount("plain\ncompile s", "dense_compile_s"),
    amount("peak\nMB", "peak_bytes", "{:.0f}", 1e6),
    amount("plain\npeak MB", "dense_peak_bytes", "{:.0f}", 1e6),
    amount("peer\npeak MB", "peer_peak_bytes", "{:.0f}", 1e6),
)


class Label(NamedTuple):
    """What tells rows apart: a column in short, or the title in full where all rows share it."""

    heading: str
    key: str
    short: Callable[[str], str]


LABELS = (
    Label("mode", "mode", {"forward": "forward", "forward_backward": "+ backward"}.__getitem__),
    Label("dtype", "dtype", {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}.__getitem__),
    Label("impl.", "implementation", str),
)


def print_results(rows: list[dict], console: Console) -> None:
    """Print the table of the rows, and below it what has no place in it."""
    measured = [row for row in rows if row["workload"] not in STACKS]
    if measured:
        print_table(measured, console)
    for row in rows:
        if row["workload"] in STACKS:
            console.print(
                f"\ncompiling {counted(row['workload'])}, {spoken(row['mode'])}: {show(row['compile_s'])} s, "
                f"plain {show(row['dense_compile_s'])} s, {show(ratio(row, 'compile_s', 'dense_compile_s'))} times",
                highlight=False,
            )


def print_table(rows: list[dict], console: Console) -> None:
    """Print what all rows share, a line for each, the means, and why some have no figures."""
    shared = [label for label in LABELS if len({row[label.key] for row in rows}) == 1]
    columns = [column for column in FIGURES if any(column.figure(row) != "–" for row in rows)]
    errors = list(dict.fromkeys(row["error"] for row in rows if row["error"]))
    # At least one column of figures is there, to say which rows have none.
    shown = next((n for n in range(len(columns), 1, -1) if fits(make_table(rows, columns[:n], errors), console)), 1)

    title = ", ".join(spoken(rows[0][label.key]) for label in reversed(shared))
    console.print(f"\n{title}\n" if title else "", highlight=False)
    console.print(make_table(rows, columns[:shown], errors))
    notes = [f"({number}) {error}" for number, error in enumerate(errors, 1)]
    rates = {row["dtype"]: (row["flops"] / 1e12, row["bandwidth"] / 1e12) for row in rows if row.get("flops")}
    notes += [
        f"For the floor, {dtype}: {flops:.3g} TFLOP/s of a product and {bandwidth:.3g} TB/s of memory were measured."
        for dtype, (flops, bandwidth) in rates.items()
    ]
    notes += dict.fromkeys(error for row in rows for peer in PEERS if (error := row.get(f"{peer}_error")))
    if left_out := [column.heading.replace("\n", " ") for column in columns[shown:]]:
        notes.append(f"A wider terminal shows more: {', '.join(left_out)}. --json FILE writes all.")
    if notes:
        console.print("\n" + "\n".join(notes), markup=False, highlight=False)


def fits(table: Table, console: Console) -> bool:
    """Whether each line of the table is shown whole."""
    unbounded = console.options.update(width=10_000)
    return console.measure(table, options=unbounded).maximum <= console.width


def make_table(rows: list[dict], columns: list[Column], errors: list[str]) -> Table:
    """One line a row, then the geometric means of the rows that have the same labels."""
    labels = [label for label in LABELS if len({row[label.key] for row in rows}) > 1]
    table = Table("workload", *(label.heading for label in labels), **STYLE)
    for column in columns:
        table.add_column(column.heading, justify="right")
    alike: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        told_by = tuple(label.short(row[label.key]) for label in labels)
        if row["error"]:
            table.add_row(row["workload"], *told_by, f"none ({errors.index(row['error']) + 1})")
        else:
            alike.setdefault(told_by, []).append(row)
            table.add_row(row["workload"], *told_by, *(column.figure(row) for column in columns))
    table.add_section()
    for told_by, members in alike.items():
        if len(members) > 1:
            table.add_row("geometric mean", *told_by, *(column.mean(members) for column in columns))
    return table
