"""What 11_many_devices.py logs: JSON lines, lines on the terminal, and curves for TensorBoard."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import rich.console


class Log:
    """The log of a run, of steps after `start`. It goes on in a file whose run was interrupted."""

    def __init__(self, json_file: Path | None, tensorboard: Path | None, console: rich.console.Console, start: int):
        self.console, self.file = console, None
        self.curves: Any = None
        if json_file:
            begun = json_file.with_name(f"{json_file.name}.begun")
            begun.write_text("".join(lines_until(json_file, start) if start else []))
            begun.replace(json_file)  # at no moment is the file without its lines
            self.file = json_file.open("a")
        if tensorboard:
            import tensorboardX

            self.curves = tensorboardX.SummaryWriter(str(tensorboard), purge_step=start + 1)

    def step(self, step: int, metrics: Any, *, show: bool) -> None:
        """A line of JSON; with `show` the offsets too, a line on the terminal, and points of the curves."""
        row, loss = {"step": step, "loss": float(metrics.loss)}, float(metrics.loss)
        if show:
            row |= {"skipped": int(metrics.skipped[1])}
            row |= {name: float(length) for name, length in metrics.offsets.items()}
            self.console.print(line_of(row))
            for name in row.keys() - {"step"} if self.curves else ():
                self.curves.add_scalar(name, row[name], step)
        self.row(row | {"loss": loss if math.isfinite(loss) else None})

    def row(self, row: dict[str, Any]) -> None:
        """A line of JSON, given to the system at once."""
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Write what is left."""
        for output in (self.file, self.curves):
            if output:
                output.close()


def lines_until(path: Path, step: int) -> list[str]:
    """The lines of the steps up to `step`, of a file whose last line may be cut."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("}\n") and json.loads(line).get("step", math.inf) <= step]


def line_of(row: dict[str, Any]) -> str:
    """What the terminal shows of a row."""
    line = f"step {row['step']:5}  loss {row['loss']:.4f}"
    if "mean_offset" in row:
        line += f"  offsets {row['mean_offset']:.2f} pixels, at most {row['largest_offset']:.2f}"
    return line + (f"  skipped {row['skipped']}" if row["skipped"] else "")


def sha256_of(named: Iterable[tuple[str, Any]]) -> str:
    """The hash of all arrays' bytes, in their order."""
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for _, array in named)).hexdigest()
