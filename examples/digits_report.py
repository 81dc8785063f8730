"""What 05_digits.py says of its networks: how far training is, a line for each, a table of all."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich.console
import rich.progress
import rich.table
from digits_scores import TEST_CANVASES

FIGURES = {"mean_iou": 3, "foreground_accuracy": 3, "step_ms": 1}  # of the table, and how many digits to show


@contextlib.contextmanager
def progress(name: str, steps: int, console: rich.console.Console, start: int = 0) -> Iterator[Callable[[float], None]]:
    """A line on the terminal during training, after `start` steps: call what it gives with each step's loss."""
    columns = (
        rich.progress.TextColumn("{task.description:17}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("loss {task.fields[loss]:.3f}"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=steps, completed=start, loss=math.nan)
        yield lambda loss: bar.update(task, advance=1, loss=loss)


def results_line(row: dict[str, Any]) -> str:
    """What one network reached."""
    scores = f"mean IoU {row['mean_iou']:.3f}  foreground accuracy {row['foreground_accuracy']:.3f}"
    return f"{row['model']:8} seed {row['seed']}  {scores}"


def results_table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    """One line for each model: its row, or the mean ± standard deviation over the seeds."""
    seeds = len({row["seed"] for row in rows})
    over = f", mean ± s.d. over {seeds} seeds" if seeds > 1 else ""
    table = rich.table.Table(title=f"{TEST_CANVASES:,} test canvases{over}")
    for name in ("model", "parameters", "mean IoU", "foreground accuracy", "ms a step"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        figures = [spread([row[key] for row in mine], digits) for key, digits in FIGURES.items()]
        table.add_row(model, f"{mine[0]['params']:,}", *figures)
    return table


def spread(values: Sequence[float], digits: int) -> str:
    """The value, or mean ± standard deviation of several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
